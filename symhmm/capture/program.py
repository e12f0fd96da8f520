"""`capture`: a Pyro program in, its factor graph out. The only door to Pyro's handlers."""

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_PARAM_STORE, _PYRO_STACK
from torch import Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_map

from symhmm.capture.deferred import DeferringMessenger
from symhmm.capture.factors import factor_graph
from symhmm.capture.inputs import Inputs
from symhmm.capture.loops import LoopRunner, Schedule
from symhmm.capture.open import OpenSiteMessenger
from symhmm.capture.records import Result
from symhmm.capture.sites import DeeperPlates, SiteMessenger
from symhmm.capture.stack import stack
from symhmm.capture.time_index import NotVectorisable, innermost
from symhmm.capture.tracking import Position, Tracker
from symhmm.capture.verify import full_length, windows
from symhmm.capture.verify import verify as verify_steps
from symhmm.errors import ProgramError, ShapeError, SymhmmError, SymhmmWarning
from symhmm.graph import FactorGraph, Recipe
from symhmm.recorder import tracing

# Pyro's handlers are global state: one capture at a time.
_LOCK = threading.RLock()


def capture(
    program: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    values: Mapping[str, Tensor] | None = None,
    subsamples: Mapping[str, Tensor] | None = None,
    recipe: Recipe | None = None,
    max_plate_nesting: int | None = None,
    verify: bool = True,
    open: bool = False,
) -> FactorGraph:
    """The log-density of a Pyro program as a factor graph over its discrete latents.

    Time loops (`pyro.markov`) are run for all steps at once where that gives the program's own factors, else step by
    step and stacked over time, else left unrolled; ``graph.loops`` says which, and why. Pyro's parameter store and
    handlers and torch's random state are left as they were.

    Args:
        program: any Pyro program; `config_enumerate` is not needed.
        args: its positional arguments.
        kwargs: its keyword arguments.
        values: constrained values of parameters and continuous latents; a latent in a subsampled plate has the plate's
            full size. What is missing starts at the parameter's own initial value, or at the mean of the prior.
        subsamples: indices of the members used of a subsampled plate; drawn from torch's generator if missing.
        recipe: repeat an earlier capture without deciding or verifying anything, as needed while tracing.
        max_plate_nesting: number of rightmost dimensions kept for plates; found out if None.
        verify: compare the vectorised loops with steps run one by one (all of them in loops of up to 1000 sites).
        open: leave parameters and continuous latents to the Pyro handlers around this call, which see them as statements
            of their own; the graph then holds all other factors. Needs ``recipe``.

    Raises:
        ProgramError: the program has no meaning as a probability model, or cannot be followed.
        ShapeError: plates, masks or distributions have sizes that do not fit.
        DataError: observations are NaN or outside the support and not masked, or a loop has no steps.

    >>> import pyro.distributions as dist
    >>> def program(y):
    ...     z = 0
    ...     for t in pyro.markov(range(len(y))):
    ...         z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
    ...         pyro.sample(f"y_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=y[t])
    >>> graph = capture(program, (torch.zeros(50),))
    >>> [(f.name, f.inputs) for f in graph.factors][-2:]
    [('z_{time}', {'z_{time-1}': 2, 'z_{time}': 2}), ('y_{time}', {'time': 49, 'z_{time}': 2})]
    """
    given, sites = Inputs(values, subsamples), OpenSiteMessenger if open else SiteMessenger
    with _LOCK, _checks_restored(), nullcontext(given) if open else _isolated(given) as inputs:
        arguments = _dense(tuple(args)), _dense(dict(kwargs or {}))
        call = _Call(program, *arguments, inputs, pyro.poutine.util.is_validation_enabled(), sites)
        if recipe is not None:
            try:
                return _finish(_run(call, recipe), recipe)
            except NotVectorisable as error:
                raise ProgramError(
                    f"the program cannot be captured as before: {error}.", suggestion="capture it again without recipe="
                ) from error
        return _decide(call, max_plate_nesting, verify)


class _Call:
    """The program with its arguments."""

    def __init__(
        self,
        program: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Inputs,
        check: bool,
        sites: type[SiteMessenger],
    ) -> None:
        self.program, self.args, self.kwargs, self.inputs, self.check = program, args, kwargs, inputs, check
        self.sites = sites
        self.history = 0  # the longest of its loops; that many more steps run one by one let first steps differ

    def __call__(self) -> None:
        self.program(*self.args, **self.kwargs)


class _Plates(list[Any]):
    """Pyro's list of the dimensions of open plates, which remembers how deep it was."""

    def __init__(self, plates: list[Any]) -> None:
        super().__init__(plates)
        self.deepest = len(plates)

    def append(self, plate: Any) -> None:
        super().append(plate)
        self.deepest = max(self.deepest, len(self))


class _Entered(Exception):
    """An exception came out of the program after a loop body had been run for all steps at once."""


def _decide(call: _Call, nesting: int | None, verify: bool) -> FactorGraph:
    """Try the tiers in order, with what each failure says."""
    recipe = Recipe("vector", nesting or 0)
    reason = ""
    while True:
        try:
            return _try(call, recipe, verify, reason)
        except DeeperPlates as found:
            if nesting is not None:
                raise ShapeError(
                    f"the program has {found.depth} plate dimensions, more than max_plate_nesting={nesting}.",
                    suggestion=f"max_plate_nesting={found.depth}",
                ) from None
            recipe = replace(recipe, max_plate_nesting=found.depth)
        except NotVectorisable as found:
            if found.peel and recipe.peel + found.peel <= 16:
                recipe = replace(recipe, peel=recipe.peel + found.peel)
            elif recipe.peel < call.history and recipe.tier == "vector":
                recipe = replace(recipe, peel=call.history)
            else:
                reason = str(found)
                recipe = Recipe("stacked", recipe.max_plate_nesting)
        except _Entered as found:
            error = found.__cause__
            if isinstance(error, RuntimeError) and "vmap" in str(error) and not recipe.fresh:
                recipe = replace(recipe, fresh=True)
            elif recipe.peel < call.history:
                recipe = replace(recipe, peel=call.history)
            else:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                recipe = Recipe("stacked", recipe.max_plate_nesting)


def _try(call: _Call, recipe: Recipe, verify: bool, reason: str) -> FactorGraph:
    result = _run(call, recipe)
    if recipe.tier == "vector":
        if verify and result.vectorised():
            _verify(call, result, Recipe("unrolled", recipe.max_plate_nesting))
        kept = [loop for loop in result.loops.values() if loop.reason and loop.total > 2]
        if kept:
            _warn(kept, "unrolled", kept[0].reason)
        return _finish(result, recipe)
    long = [loop for loop in result.loops.values() if loop.total > 2]
    left = [loop for loop in long if not loop.vector]
    if left and len(left) == len(long):
        recipe = replace(recipe, tier="unrolled")
    for loop in long:
        loop.reason = reason
    _warn(long, recipe.tier, reason)
    return _finish(result, recipe)


def _verify(call: _Call, result: Result, one_by_one: Recipe) -> None:
    """Compare a vectorised run with steps run one by one, their log-factors evaluated together if that will do."""
    schedule = windows(full_length(result))
    with torch.no_grad():
        try:
            verify_steps(result, _run(call, one_by_one, schedule, DeferringMessenger))
        except (SymhmmError, NotVectorisable, ValueError, RuntimeError):
            # Whatever it was, steps that are evaluated one by one have the last word, and the better message.
            verify_steps(result, _run(call, one_by_one, schedule))


def _warn(loops: list[Any], tier: str, reason: str) -> None:
    places = sorted({loop.where for loop in loops})
    how = "step by step and stacked over time" if tier == "stacked" else "step by step and left unrolled"
    warnings.warn(
        f"the time loop at {', '.join(places) or 'an unknown place'} was captured {how}, which is slower: {reason}.",
        SymhmmWarning,
        stacklevel=5,
    )


def _finish(result: Result, recipe: Recipe) -> FactorGraph:
    return factor_graph(result, recipe)


def _run(
    call: _Call, recipe: Recipe, schedule: Schedule | None = None, messenger: type[SiteMessenger] | None = None
) -> Result:
    """Run the program once and return what it left behind."""
    position = Position()
    tracker = Tracker(position, recipe.fresh)
    validate = call.check and not tracing()
    runner = LoopRunner(
        position, recipe.tier == "vector", recipe.peel, schedule, lambda on: _set_validation(on and validate)
    )
    result = Result(position.names, runner.loops)
    make = messenger or call.sites
    sites = make(position, tracker, call.inputs, result, recipe.max_plate_nesting, validate)
    before = MarkovMessenger.__iter__
    MarkovMessenger.__iter__ = lambda markov: runner.iterate(markov)  # type: ignore[method-assign]
    call.inputs.restart()
    _set_validation(validate, arguments=make.checks_arguments)
    before_plates = _DIM_ALLOCATOR._stack
    plates = _DIM_ALLOCATOR._stack = _Plates(before_plates)
    try:
        with tracker, sites:
            call()
    except DeeperPlates:
        raise
    except (SymhmmError, NotVectorisable) as error:
        error.args = (position.names.readable(str(error)),)
        raise
    except Exception as error:
        # Whatever the user's program raised is raised again below, as it is or as the cause of what it means for us.
        # A state that is summed may stand in a dimension that a plate opened later wants: the program fails in its own code.
        if plates.deepest > recipe.max_plate_nesting:
            raise DeeperPlates(plates.deepest) from error
        _explain(error)
        if runner.entered:
            raise _Entered from error
        raise
    finally:
        runner.close()
        call.history = max((loop.history for loop in runner.loops.values()), default=0)
        MarkovMessenger.__iter__ = before  # type: ignore[method-assign]
        _DIM_ALLOCATOR._stack = before_plates
    if runner.incomplete:
        raise NotVectorisable("the loop is left before its end")
    _refuse_changed(sites.used)
    sites.finish()
    return stack(result) if recipe.tier == "stacked" else result


def _refuse_changed(used: list[tuple[str, Tensor, int]]) -> None:
    changed = [name for name, x, version in used if innermost(x)._version != version]
    if changed:
        raise ProgramError(
            f"a mask or value of site {changed[0]!r} was changed in place after the site used it.",
            suggestion="make a new tensor (mask = mask & x) instead of writing into the old one",
        )


def _explain(error: Exception) -> None:
    """Pyro's own complaint about plates, as one of ours."""
    if isinstance(error, ValueError) and "collide at dim" in str(error):
        raise ShapeError(
            "two plates use the same dimension.",
            details=[line for line in str(error).splitlines() if line],
            suggestion="another dim= for one of them",
        ) from error


def _set_validation(on: bool, arguments: bool = True) -> None:
    Distribution.set_default_validate_args(on and arguments)
    pyro.poutine.enable_validation(on)


def _dense(x: Any) -> Any:
    """Arguments without repeated memory: a dimension of stride 0 may be dense in the next data of the same shape."""

    def dense(leaf: Any) -> Any:
        plain = isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dim() > 0
        return leaf.contiguous() if plain and 0 in leaf.stride() else leaf

    return tree_map(dense, x)


@contextmanager
def _isolated(inputs: Inputs) -> Iterator[Inputs]:
    """No handler, plate, parameter or random draw gets in from outside, and none is left behind."""
    store = _PYRO_PARAM_STORE
    handlers, plates = list(_PYRO_STACK), _DIM_ALLOCATOR._stack
    params = store._params, store._param_to_name, store._constraints
    _PYRO_STACK[:], _DIM_ALLOCATOR._stack = [], []
    store.clear()
    try:
        yield inputs
    finally:
        _PYRO_STACK[:], _DIM_ALLOCATOR._stack = handlers, plates
        store._params, store._param_to_name, store._constraints = params
        inputs.finish()


@contextmanager
def _checks_restored() -> Iterator[None]:
    """Validation is switched on and off while the program runs."""
    checks = Distribution._validate_args, pyro.poutine.util.is_validation_enabled()
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks[0])
        pyro.poutine.enable_validation(checks[1])
