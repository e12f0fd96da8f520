"""The Pyro messenger that watches a run: enumerates, gives values, and records a log-factor for every site."""

from typing import Any, cast

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK, Message
from torch import Tensor

from symhmm.capture.enumeration import Enumeration
from symhmm.capture.giving import Giver
from symhmm.capture.inputs import Inputs
from symhmm.capture.marks import set_mark
from symhmm.capture.observations import check_mask, check_shape, check_values, masked_log_prob
from symhmm.capture.records import Record, Result
from symhmm.capture.time_index import NotVectorisable, innermost
from symhmm.capture.tracking import Position, Tracker
from symhmm.errors import ProgramError, ShapeError
from symhmm.graph import Plate, Role


class DeeperPlates(Exception):
    """The program has more plate dimensions than were kept for it."""

    def __init__(self, depth: int) -> None:
        super().__init__(depth)
        self.depth = depth


class SiteMessenger(Messenger):
    """Records every site of a run.

    Args:
        position: where the program is.
        tracker: what is known of the tensors.
        inputs: values of parameters and latents.
        result: filled in here.
        nesting: number of rightmost dimensions kept for plates.
        check_data: whether observations are checked (never while tracing).
    """

    checks_arguments = True  # distributions look at their arguments when they are made

    def __init__(
        self, position: Position, tracker: Tracker, inputs: Inputs, result: Result, nesting: int, check_data: bool
    ) -> None:
        super().__init__()
        self.position, self.tracker, self.inputs, self.result = position, tracker, inputs, result
        self.nesting, self.check_data = nesting, check_data
        self.enumeration = Enumeration(nesting, tracker, position)
        self.giver = Giver(position, tracker, inputs, result)
        self.given: set[str] = set()
        self.used: list[tuple[str, Tensor, int]] = []

    def finish(self) -> None:
        """After the run."""

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        self.giver.param(msg)

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn, name = msg["fn"], msg["name"]
        if type(fn).__name__ == "_Subsample":
            self._subsample(msg)
            return
        deepest = max((-f.dim for f in msg["cond_indep_stack"] if f.vectorized), default=0)
        if deepest > self.nesting:
            raise DeeperPlates(deepest)
        self.enumeration.enter(msg)
        if msg["done"] or msg["is_observed"]:
            return
        self._require_token(name)
        if msg["infer"].get("num_samples") or msg["infer"].get("enumerate") == "sequential":
            raise ProgramError(
                f"site {name!r} asks for sampling or sequential enumeration, which exact summation has no use for.",
                details=[f"seen infer={ {k: v for k, v in msg['infer'].items() if not k.startswith('_')} }"],
                suggestion="infer={'enumerate': 'parallel'} or no infer= at all",
            )
        self._refuse_outer_handlers(msg)
        if getattr(fn, "has_enumerate_support", False):
            self.enumeration.enumerate(msg)
        elif getattr(fn.support, "is_discrete", False):
            raise ProgramError(
                f"discrete latent {name!r} has infinitely many values and cannot be summed out.",
                details=[f"its distribution is {type(fn).__name__}"],
                suggestion="a Categorical over a truncated range, or obs= if it was observed",
            )
        else:
            self._give_value(msg)

    def _subsample(self, msg: dict[str, Any]) -> None:
        self.giver.subsample(msg)

    def _give_value(self, msg: dict[str, Any]) -> None:
        self.giver.latent(msg, self.nesting)
        self.given.add(msg["name"])

    def _require_token(self, name: str) -> None:
        have = {t.loop for t in self.result.names.of(name)}
        missing = [level for level in self.position.levels if level.loop not in have]
        if missing:
            raise NotVectorisable(f"site name {name!r} does not depend on the loop variable")

    def _refuse_outer_handlers(self, msg: dict[str, Any]) -> None:
        """Handlers that pick single steps by name cannot be followed for all steps at once."""
        if not self.result.names.of(msg["name"]):
            return
        for handler in _PYRO_STACK[_PYRO_STACK.index(self) + 1 :]:
            data = getattr(handler, "data", None)
            names = (
                self.giver.step_names(msg["name"])
                if isinstance(data, dict) or isinstance(handler, BlockMessenger)
                else []
            )
            picked = [n for n in names if isinstance(data, dict) and n in data]
            if isinstance(handler, BlockMessenger):
                picked = [n for n in names if handler.hide_fn(cast(Message, {**msg, "name": n}))]
            if picked:
                raise NotVectorisable(f"a {type(handler).__name__} picks site {picked[0]!r} by name")

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        fn, name = msg["fn"], msg["name"]
        if type(fn).__name__ == "_Subsample":
            return
        if msg["infer"].get("_deterministic"):
            self._deterministic(msg)
            return
        self._require_token(name)
        if name in self.result.records:
            raise ProgramError(
                f"two sites are called {name!r}.", suggestion="a name that differs, such as f'{name}_{t}' in a loop"
            )
        self._refuse_outer_handlers(msg)
        self.tracker.quiet = True
        try:
            self._record(msg)
        finally:
            self.tracker.quiet = False

    def _record(self, msg: dict[str, Any]) -> None:
        fn, name, value, mask = msg["fn"], msg["name"], msg["value"], msg["mask"]
        support = self.enumeration.supports.get(name)
        stack = [f for f in reversed(msg["cond_indep_stack"]) if f.vectorized]
        role: Role = "discrete latent"
        # Nothing is computed from tensors in here that the tracker would have to know of.
        with torch._C.DisableTorchFunction():
            self._note_plates(stack)
            if support is None:
                given, unit = name in self.given, type(fn).__name__ == "Unit"
                role = "continuous latent" if given else "factor" if unit else "observed"
                while isinstance(fn, MaskedDistribution):
                    mask, fn = _both(mask, fn._mask), fn.base_dist
                if isinstance(mask, Tensor):
                    check_mask(name, mask, fn, {f.dim: f for f in stack}, self.nesting)
                if role == "observed":
                    check_shape(name, value, fn.event_dim, stack)
        helper = any(pass_ == "prev" for _, pass_, _ in self.position.steps)
        if self.check_data and role == "observed" and mask is not False and not helper:
            self._check_values(name, fn, value, mask)
        tensor = self._log_factor(msg, fn, mask, role)
        with torch._C.DisableTorchFunction():
            for x in (msg["mask"], value):
                if isinstance(x, Tensor):
                    self.used.append((name, x, innermost(x)._version))
            self._check_carried(name, tensor, mask)
            tensor, extra = self._weight(msg, tensor)
            tensor, dims, axes = self._named(msg, tensor)
            observed = (tuple(value.shape), type(fn).__name__) if role == "observed" else None
        plates, steps = tuple(f.name for f in stack), tuple(self.position.steps)
        self.result.records[name] = Record(
            name, role, tensor, dims, plates, axes, steps, extra, support, observed
        )  # fmt: skip

    def _log_factor(self, msg: dict[str, Any], fn: Any, mask: Any, role: Role) -> Tensor:
        return log_factor(fn, msg["value"], mask, role)

    def _check_values(self, name: str, fn: Any, value: Tensor, mask: Any) -> None:
        check_values(name, fn, value, mask, self.position.levels)

    def _check_carried(self, name: str, tensor: Tensor, mask: Any) -> None:
        mark = self.tracker.union(tensor, *([mask] if isinstance(mask, Tensor) else []))
        roles = {loop: role for loop, role, _ in self.position.steps}
        if any(roles.get(loop, "curr") == "curr" for loop in mark.carried):
            raise NotVectorisable(f"site {name!r} uses a tensor carried over more steps than the history")

    def _weight(self, msg: dict[str, Any], tensor: Tensor) -> tuple[Tensor, float]:
        """The weight set by `poutine.scale`: a number, or multiplied in where it differs between members."""
        scale, own = msg["scale"], 1.0
        for f in msg["cond_indep_stack"]:
            if f.vectorized and f.full_size is not None and f.size > 0:
                own = own * f.full_size / f.size
        if isinstance(scale, Tensor):
            if self.enumeration.sites_of(tensor, msg["name"]):
                if scale.dim():
                    raise ProgramError(
                        f"the scale of site {msg['name']!r} differs between members, which has no meaning where "
                        "discrete latents are summed out.",
                        suggestion="one number for poutine.scale",
                    )
                return tensor, float(scale) / own
            weighted = tensor * (scale / own)
            set_mark(weighted, self.tracker.union(tensor, scale))
            return weighted, 1.0
        weight = scale / own
        return tensor, 1.0 if abs(weight - 1.0) < 1e-12 else weight

    def _named(self, msg: dict[str, Any], tensor: Tensor) -> tuple[Tensor, tuple[str, ...], tuple[str, ...]]:
        """``tensor`` with one dimension per name: no dimension for what it does not depend on."""
        plates = {f.dim: f.name for f in msg["cond_indep_stack"] if f.vectorized}
        shape = tensor.shape
        names: list[str | None] = []
        for dim in range(-len(shape), 0):
            if shape[dim] == 1:
                names.append(None)
            elif dim >= -self.nesting:
                if dim not in plates:
                    raise _undeclared(msg, dim, tuple(shape))
                names.append(plates[dim])
            else:
                names.append(self.enumeration.name_of(dim, shape[dim], msg, tensor))
                if names[-1] is None:
                    raise _undeclared(msg, dim, tuple(shape))
        for at, (dim_name, stride) in enumerate(zip(names, tensor.stride(), strict=True)):
            # Memory that is read again and again for each member: the factor is the same for all of them.
            if stride == 0 and dim_name in plates.values():
                tensor, names[at] = tensor.narrow(at, 0, 1), None
        tensor = tensor.reshape([s for s, n in zip(tensor.shape, names, strict=True) if n is not None])
        dims = [n for n in names if n is not None]
        for level in reversed(self.position.levels):
            if level.holds(tensor):
                tensor = level.unbatch(tensor)
                dims.insert(0, level.loop)
        return tensor, tuple(dims), tuple(level.loop for level in self.position.levels)

    def _note_plates(self, stack: list[Any]) -> None:
        for f in stack:
            full = f.full_size if f.full_size is not None else f.size
            plate = Plate(f.size, full / f.size, f.dim)
            seen = self.result.plates.setdefault(f.name, plate)
            if (seen.size, seen.dim) != (plate.size, plate.dim):
                raise ShapeError(
                    f"plate {f.name!r} is used with different sizes or dimensions.",
                    details=[f"seen size {plate.size} at dim {plate.dim} and size {seen.size} at dim {seen.dim}"],
                    suggestion="one plate object, used everywhere",
                )

    def _deterministic(self, msg: dict[str, Any]) -> None:
        value = msg["value"]
        for level in reversed(self.position.levels):
            if level.holds(value):
                value = level.unbatch(value)
        if not any(role == "prev" for _, role, _ in self.position.steps):
            self.result.deterministic[msg["name"]] = value


def log_factor(fn: Any, value: Tensor, mask: Tensor | bool | None, role: Role) -> Tensor:
    """Log-probability of a site in nats: that of a discrete latent counts unmasked, masked data are never looked at."""
    if role == "discrete latent":
        return _log_prob(fn, value)
    return masked_log_prob(fn, value, mask, replace=role == "observed")


def _log_prob(fn: Any, value: Tensor) -> Tensor:
    """Log-probability of an enumerated value; probabilities that a plate repeats are turned into logits once."""
    if "probs" in vars(fn) and "logits" not in vars(fn) and type(fn).__name__ == "Categorical":
        probs = fn.probs
        repeated = [d for d in range(probs.dim()) if probs.stride(d) == 0 and probs.shape[d] > 1]
        if repeated:
            for d in repeated:
                probs = probs.narrow(d, 0, 1)
            fn.logits = torch.distributions.utils.probs_to_logits(probs).expand(fn.probs.shape)
    return fn.log_prob(value)


def _both(a: Any, b: Any) -> Any:
    if a is None or a is True:
        return b
    if b is None or b is True:
        return a
    return False if a is False or b is False else a & b


def _undeclared(msg: dict[str, Any], dim: int, shape: tuple[int, ...]) -> ShapeError:
    plates = {f.dim: f.name for f in msg["cond_indep_stack"] if f.vectorized}
    return ShapeError(
        f"site {msg['name']!r} has a batch dimension that is not a plate.",
        details=[f"seen log-probability of shape {shape}: size {shape[dim]} at dim {dim}", f"plates by dim: {plates}"],
        suggestion="pyro.plate around the site, or .to_event(1) on its distribution",
    )
