"""The reference: Pyro's own `TraceEnum_ELBO` at given parameter and latent values, value and gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from program_table import Program
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.poutine.messenger import Messenger
from torch import Tensor

Values = dict[str, Tensor]


@contextmanager
def double_precision() -> Iterator[None]:
    """Programs make their tensors in the default dtype; oracles need float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class GiveParams(Messenger):
    """Gives every `pyro.param` the value named in ``leaves``.

    A parameter of a network is used by the network directly, whatever `pyro.param` returns. It is therefore written in
    place, and stands in ``leaves`` itself from then on, so that gradients reach it; leaving the context restores it.
    """

    def __init__(self, leaves: Values) -> None:
        super().__init__()
        self.leaves = leaves
        self.original: list[tuple[torch.nn.Parameter, Tensor]] = []

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        own = msg["args"][1] if len(msg["args"]) > 1 else None
        if isinstance(own, torch.nn.Parameter) and own is not self.leaves[name]:
            self.original.append((own, own.detach().clone()))
            own.data.copy_(self.leaves[name].detach())
            self.leaves[name] = own
        msg["value"] = self.leaves[name]

    def __exit__(self, *error: Any) -> None:
        for parameter, value in self.original:
            parameter.data.copy_(value)
        self.original.clear()
        super().__exit__(*error)


def draw_values(program: Program, seed: int = 0) -> Values:
    """Values of all parameters (initial ones, moved a little) and continuous latents (from their priors)."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    trace = poutine.trace(program.model).get_trace(*program.arguments())
    values: Values = {}
    store = pyro.get_param_store()
    for name in store:
        free = store._params[name].detach()
        constraint = store._constraints[name]
        values[name] = torch.distributions.transform_to(constraint)(free + 0.2 * torch.randn_like(free))
    for name in trace.stochastic_nodes:
        node = trace.nodes[name]
        # Only continuous latents are given a value: discrete ones are summed out.
        if type(node["fn"]).__name__ != "_Subsample" and not node["fn"].has_enumerate_support:
            values[name] = node["value"].detach()
    pyro.clear_param_store()
    return {name: value.clone() for name, value in values.items()}


def log_density(program: Program, values: Mapping[str, Tensor], arguments: tuple[Any, ...] | None = None) -> Tensor:
    """Log-density of the program with all discrete latents summed out, in nats, with the graph to ``values``."""
    arguments = program.arguments() if arguments is None else arguments
    pyro.clear_param_store()
    elbo = TraceEnum_ELBO(max_plate_nesting=program.nesting, strict_enumeration_warning=False)
    model = poutine.condition(config_enumerate(program.model, default="parallel"), data=dict(values))
    try:
        return torch.as_tensor(-elbo.differentiable_loss(model, lambda *_: None, *arguments))
    finally:
        pyro.clear_param_store()


def reference(
    program: Program, values: Mapping[str, Tensor], arguments: tuple[Any, ...] | None = None
) -> tuple[Tensor, Values]:
    """Log-density and its gradient with respect to every (constrained) value; unused values have gradient zero."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    with GiveParams(leaves):
        total = log_density(program, leaves, arguments)
        names = list(leaves)
        found = torch.autograd.grad(total, [leaves[name] for name in names], allow_unused=True)
    gradients = {name: torch.zeros_like(leaves[name]) if g is None else g for name, g in zip(names, found, strict=True)}
    return total.detach(), {name: g.detach() for name, g in gradients.items()}
