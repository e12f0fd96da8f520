"""Progress: where a driver is and how long it will take, told to a bar on a terminal or to a function."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

SHOW_AFTER = 0.1  # seconds between two updates of a bar


@dataclass(frozen=True)
class Progress:
    """One report.

    Args:
        stage: what is being done.
        done, total: evaluations or steps; ``total`` is the most there can be.
        objective: nats, now.
        seconds_left: at the present pace, if ``total`` is used.
    """

    stage: str
    done: int
    total: int
    objective: float
    seconds_left: float


Listener = Callable[[Progress], None]


class Reporter:
    """Sends `Progress` to ``progress``: a function, True for a bar, None for a bar if standard error is a terminal."""

    def __init__(self, progress: bool | Listener | None, stage: str, total: int, done: int = 0) -> None:
        self.stage, self.total, self.first = stage, total, done
        self.began = self.shown = time.perf_counter()
        self.listener = progress if callable(progress) else None
        wanted = sys.stderr.isatty() if progress is None else bool(progress)
        self.bar = tqdm(total=total, initial=done, desc=stage, leave=False) if wanted and not self.listener else None

    def __call__(self, done: int, objective: float) -> None:
        now = time.perf_counter()
        if self.listener:
            left = (self.total - done) * (now - self.began) / max(done - self.first, 1)
            self.listener(Progress(self.stage, done, self.total, objective, left))
        elif self.bar is not None and now - self.shown > SHOW_AFTER:
            self.shown = now
            self.bar.set_postfix_str(f"{objective:.3f} nats", refresh=False)
            self.bar.update(done - self.bar.n)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
