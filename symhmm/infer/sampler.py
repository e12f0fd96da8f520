"""Sampler: chains of the no-U-turn sampler over a plain function of an array, run by nutpie one chain at a time.

Hoffman and Gelman (2014), as Seyboldt's nutpie has it, with adaptation from gradients. A chain is a function of its start and
its seed alone, whatever runs beside it.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np

from symhmm.errors import FitError
from symhmm.infer.target import Array
from symhmm.infer.whiten import Whitening

Evaluate = Callable[[Array], tuple[float, Array]]
PAUSE = 0.02  # seconds between two looks at running chains


@dataclass(frozen=True, eq=False)
class Chain:
    """Draws of one chain after its warm-up, with what the sampler says of each.

    Args:
        points: shape (draws, n).
        value: shape (draws,), log-density in the sampler's coordinates, nats.
        energy: shape (draws,), nats.
        diverging: shape (draws,), trajectories that left the level of energy; the draws beside them are not to be trusted.
        depth: shape (draws,), doublings of the trajectory.
        step_size: shape (draws,).
    """

    points: Array
    value: Array
    energy: Array
    diverging: Array
    depth: Array
    step_size: Array

    def arrays(self, prefix: str) -> dict[str, Array]:
        """For a checkpoint."""
        return {prefix + f.name: getattr(self, f.name) for f in fields(self)}

    def first(self, draws: int) -> "Chain":
        """Its first ``draws``."""
        return Chain(**{f.name: getattr(self, f.name)[:draws] for f in fields(self)})


def chain_from(arrays: dict[str, Any], prefix: str) -> Chain:
    """The chain that `Chain.arrays` wrote."""
    return Chain(**{f.name: arrays[prefix + f.name] for f in fields(Chain)})


def require_nutpie() -> Any:
    """The sampler, or a `FitError` that says how to get it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it imports
        try:
            import nutpie
        except ImportError as error:
            raise FitError(
                "method='nuts' needs the package nutpie, which is not installed.",
                suggestion="pip install 'symhmm[nuts]', or method='svi', which needs nothing else",
            ) from error
    return nutpie


def sample(
    evaluate: Evaluate,
    where: Whitening,
    starts: Sequence[Array],
    seeds: Sequence[int],
    *,
    tune: int,
    draws: int,
    target_accept: float,
    max_depth: int,
    cores: int = 1,
    tick: Callable[[], None] = lambda: None,
    done: Callable[[int, Chain], None] = lambda i, chain: None,
) -> tuple[dict[int, Chain], bool]:
    """Run chains from ``starts`` (in the coordinates of ``where``), at most ``cores`` at a time.

    Args:
        evaluate: log-density (nats) and its gradient.
        tick: called after each draw.
        done: called with each whole chain.

    Returns:
        the chains by their place, and whether Ctrl-C ended them early; then the last ones are short or missing. What
        ``evaluate`` or ``tick`` raise ends all chains and is raised here.
    """
    waiting, running, found = list(range(len(starts))), dict[int, _Run](), dict[int, Chain]()
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                i = waiting.pop(0)
                run = _Run(evaluate, where, starts[i], tick, tune)
                run.begin(seeds[i], tune=tune, draws=draws, target_accept=target_accept, maxdepth=max_depth)
                running[i] = run  # from here on Ctrl-C finds a sampler to ask
            for i, run in list(running.items()):
                try:
                    chain = _chain(_quietly(partial(run.sampler.wait, timeout=PAUSE)), where)
                except TimeoutError:
                    chain = None
                except RuntimeError:  # the sampler's own words for a start at which the evaluation raised
                    if run.fault is None:
                        raise
                    chain = None
                if chain is not None:
                    found[i] = run.before_fault(chain)
                    del running[i]
                if run.fault is not None:
                    raise run.fault
                if chain is not None:
                    done(i, chain)
    except KeyboardInterrupt:
        begun = {i: run.so_far() for i, run in running.items()}
        found |= {i: chain for i, chain in begun.items() if chain is not None}
        return {i: chain for i, chain in found.items() if len(chain.points)}, True
    except BaseException:
        for run in running.values():
            run.sampler.cancel()
        raise
    return found, False


class _Run:
    """A chain in a thread of the sampler's, out of which no exception may come: it would end in a panic."""

    def __init__(self, evaluate: Evaluate, where: Whitening, start: Array, tick: Callable[[], None], tune: int) -> None:
        self.evaluate, self.where, self.start, self.tick = evaluate, where, start, tick
        self.fault: BaseException | None = None
        self.drawn = -tune

    def begin(self, seed: int, **options: Any) -> None:
        nutpie = require_nutpie()
        from nutpie.compiled_pyfunc import from_pyfunc

        n = self.start.size
        model = from_pyfunc(
            n, lambda: self._log_density, lambda *_: self._draw, [np.dtype("float64")], [(n,)], ["z"],
            make_initial_point_fn=lambda seed: self.start,
        )  # fmt: skip
        self.sampler = nutpie.sample(
            model, chains=1, cores=1, seed=seed, progress_bar=False, save_warmup=False, blocking=False, **options
        )

    def so_far(self) -> Chain | None:
        """The draws that there are; None if they were being taken when Ctrl-C came, or the chain had not begun."""
        try:
            trace = _quietly(self.sampler.abort)
        except ValueError:  # the sampler has been emptied
            return None
        return self.before_fault(_chain(trace, self.where)) if "sample_stats" in trace.groups() else None

    def before_fault(self, chain: Chain) -> Chain:
        """The chain without the draws that were made after an exception, which repeat the last one."""
        return chain if self.fault is None else chain.first(max(self.drawn, 0))

    def _log_density(self, z: Array) -> tuple[float, Array]:
        if self.fault is None:
            try:
                value, gradient = self.evaluate(self.where.point(z))
                return value, np.ascontiguousarray(self.where.slope(gradient))
            except BaseException as fault:  # raised again by `sample`, in its own thread
                self.fault = fault
        return -np.inf, np.zeros_like(z)

    def _draw(self, z: Array) -> dict[str, Array]:
        if self.fault is None:
            try:
                self.tick()
                self.drawn += 1
            except BaseException as fault:  # as above
                self.fault = fault
        return {"z": z}


def _quietly(end: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about chains that are short
        return end()


def _chain(trace: Any, where: Whitening) -> Chain:
    stats = trace.sample_stats

    def read(name: str) -> Array:
        x: Array = np.asarray(stats[name].values[0], dtype=np.float64)
        return x

    z = trace.posterior["z"].values[0]
    whole = np.isfinite(z).all(-1)  # an aborted chain is padded
    points = np.stack([where.point(row) for row in z[whole]]) if whole.any() else np.zeros((0, z.shape[-1]))
    columns = [read(n)[whole] for n in ("logp", "energy", "diverging", "depth", "step_size")]
    return Chain(points, *columns)
