"""Ranks of the truth among the draws of NUTS are uniform, over data sets drawn from the priors."""

import json

import numpy as np
import pytest

from benchmarks.calibration import RANKS, main, report, simulate, uniformity


def test_uniformity_knows_uniform_from_not():
    even = [k % (RANKS + 1) for k in range(400)]
    assert uniformity(even) > 0.9
    assert uniformity([k // 2 for k in even]) < 1e-6


def test_simulated_data_have_the_moments_of_their_values():
    """Far from the states' own noise: the share of steps above the middle is that of the second state."""
    generator = np.random.default_rng(0)
    found = [simulate(generator) for _ in range(200)]
    z = np.array([(t["loc"] - [-1.0, 1.0]) / 0.3 for t, _ in found])
    assert abs(z.mean()) < 4 / 20
    assert abs(z.std() - 1) < 0.2
    truth, y = found[0]
    assert y.shape == (40, 10)
    low, high = np.sort(truth["loc"]) + 5 * truth["scale"] * np.array([-1, 1])
    assert bool(((y > low) & (y < high)).all())


def test_a_report_from_what_was_kept(tmp_path):
    row = {"method": "svi", "ok": True, "covered": {"up": True, "down": True, "own[0]": False},
           "wide": {"up": 1.0, "down": float("inf"), "own[0]": 2.0},
           "ranks": {"up": 3, "down": 2, "own[0]": 4}, "seconds": 0.1}  # fmt: skip
    file = tmp_path / "kept.jsonl"
    file.write_text("\n".join(json.dumps({**row, "seed": k}) for k in range(2)))
    found = main(["svi"], 2, str(file))
    assert len(found) == 2
    text = report(found)
    assert "up            1.000" in text
    assert "down          1.000" in text
    assert "(2 without an upper end)" in text
    assert "own           0.000" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ranks_are_uniform(tmp_path):
    found = main(["nuts"], 200, str(tmp_path / "kept.jsonl"))
    for name in found[0]["ranks"]:
        assert uniformity(f["ranks"][name] for f in found) > 1e-3, name
