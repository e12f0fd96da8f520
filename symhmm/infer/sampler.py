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
        the chains by their place, and whether Ctrl-C ended them early; then the last ones are short or missing.
    """
    nutpie = require_nutpie()
    waiting, running, found = list(range(len(starts))), dict[int, Any](), dict[int, Chain]()
    try:
        while waiting or running:
            while waiting and len(running) < cores:
                i = waiting.pop(0)
                model = _model(evaluate, where, starts[i], tick)
                running[i] = nutpie.sample(
                    model,
                    draws=draws,
                    tune=tune,
                    chains=1,
                    cores=1,
                    seed=seeds[i],
                    progress_bar=False,
                    save_warmup=False,
                    blocking=False,
                    target_accept=target_accept,
                    maxdepth=max_depth,
                )
            for i in list(running):
                try:
                    found[i] = _chain(partial(running[i].wait, timeout=PAUSE), where)
                except TimeoutError:
                    continue
                del running[i]
                done(i, found[i])
    except KeyboardInterrupt:
        for i, r in running.items():
            begun = _chain(r.abort, where)
            if len(begun.points):
                found[i] = begun
        return found, True
    except BaseException:
        for r in running.values():
            r.cancel()
        raise
    return found, False


def _model(evaluate: Evaluate, where: Whitening, start: Array, tick: Callable[[], None]) -> Any:
    from nutpie.compiled_pyfunc import from_pyfunc

    n = start.size

    def log_density() -> Callable[[Array], tuple[float, Array]]:
        def f(z: Array) -> tuple[float, Array]:
            value, gradient = evaluate(where.point(z))
            return value, np.ascontiguousarray(where.slope(gradient))

        return f

    def expand(seed1: int, seed2: int, chain: int) -> Callable[[Array], dict[str, Array]]:
        def g(z: Array) -> dict[str, Array]:
            tick()
            return {"z": z}

        return g

    return from_pyfunc(
        n, log_density, expand, [np.dtype("float64")], [(n,)], ["z"], make_initial_point_fn=lambda seed: start
    )


def _chain(end: Callable[[], Any], where: Whitening) -> Chain:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about chains that are short
        trace = end()
    stats = trace.sample_stats

    def read(name: str) -> Array:
        x: Array = np.asarray(stats[name].values[0], dtype=np.float64)
        return x

    z = trace.posterior["z"].values[0]
    whole = np.isfinite(z).all(-1)  # an aborted chain is padded
    points = np.stack([where.point(row) for row in z[whole]]) if whole.any() else np.zeros((0, z.shape[-1]))
    columns = [read(n)[whole] for n in ("logp", "energy", "diverging", "depth", "step_size")]
    return Chain(points, *columns)
