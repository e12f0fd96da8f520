"""Where the tests find reference data that are too large, or licensed otherwise, to be part of the package."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """``data_file("pilot_whales.csv")`` is the path of a reference file; the test is skipped where it does not exist.

    Looked for in the folder named by ``SYMHMM_DATA``, else in ``../shared/data`` beside the repository.
    """
    folder = Path(os.environ.get("SYMHMM_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        path = folder / name
        if not path.exists():
            pytest.skip(f"no reference data {name} in {folder}; set SYMHMM_DATA to the folder that has it")
        return path

    return find
