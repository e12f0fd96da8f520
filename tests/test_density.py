"""Densities: compiled once for each shape, equal to the program at any values and data, honest about what they cannot do."""

import warnings
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

import symhmm
from symhmm.compiler import density as module
from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.errors import GraphError, IntractableError, SymhmmWarning, ValuesError


@dataclass(frozen=True)
class Data:
    y: Tensor
    mask: Tensor


def data(length=9, number=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(length, number, generator=generator, dtype=torch.float64)
    return Data(y, torch.rand(length, number, generator=generator) < 0.8)


class Counted:
    """A program that counts how often it runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, data):
        self.runs += 1
        loc = pyro.param("loc", torch.tensor([-1.0, 0.5], dtype=torch.float64))
        stay = pyro.param("stay", torch.tensor(0.7, dtype=torch.float64), constraint=constraints.unit_interval)
        transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        with pyro.plate("individual", data.y.shape[1], dim=-1):
            shift = pyro.sample("shift", dist.Normal(torch.zeros((), dtype=torch.float64), 0.5))
            z = 0
            for t in pyro.markov(range(len(data.y))):
                z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
                with pyro.poutine.mask(mask=data.mask[t]):
                    pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z] + shift, 1.0), obs=data.y[t])


def values():
    return {
        "loc": torch.tensor([0.3, -0.8], dtype=torch.float64),
        "stay": torch.tensor(0.6, dtype=torch.float64),
        "shift": torch.linspace(-1, 1, 4, dtype=torch.float64),
    }


def fresh(given):
    """The same number without any of the compiled parts."""
    graph = symhmm.compile(Counted(), given).graph_at(values())
    return lower(graph, plan(graph, strategy="sequential"))


def test_one_capture_for_each_shape(monkeypatch):
    plans, traces = [], []
    monkeypatch.setattr(module, "plan", lambda *a, **k: plans.append(1) or plan(*a, **k))
    trace = module.trace
    monkeypatch.setattr(module, "trace", lambda *a, **k: traces.append(1) or trace(*a, **k))
    program = Counted()
    first = symhmm.compile(program, data())
    first.value_and_grad(first.pack(values()))
    assert (len(plans), len(traces)) == (1, 2)  # the value, and the value with its gradient
    runs = program.runs

    second = symhmm.compile(program, data(seed=1))
    third = first.bind(data(seed=2))
    for density in (second, third):
        density.value_and_grad(density.pack(values()))
        density.log_prob(values())
    assert (program.runs, len(plans), len(traces)) == (runs, 1, 2)
    torch.testing.assert_close(second.log_prob(values()), fresh(data(seed=1)), rtol=1e-10, atol=0)
    torch.testing.assert_close(third.log_prob(values()), fresh(data(seed=2)), rtol=1e-10, atol=0)
    torch.testing.assert_close(first.log_prob(values()), fresh(data()), rtol=1e-10, atol=0)

    before = len(plans)
    symhmm.compile(program, data(length=10))
    assert len(plans) == before + 1 and program.runs > runs


def test_gradient_of_the_vector_is_that_of_the_values():
    density = symhmm.compile(Counted(), data())
    vector = density.pack(values()).requires_grad_()
    wanted = density.log_prob(density.unpack(vector))
    (gradient,) = torch.autograd.grad(wanted, vector)
    seen = density.value_and_grad(vector)
    torch.testing.assert_close(seen[0], wanted.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[1], gradient, rtol=1e-10, atol=1e-12)


def test_many_values_at_once():
    density = symhmm.compile(Counted(), data())
    vectors = density.pack(values()) + torch.randn(5, density.size, dtype=torch.float64)
    together = torch.func.vmap(lambda v: density.log_prob(density.unpack(v)))(vectors)
    one_by_one = torch.stack([density.log_prob(density.unpack(v)) for v in vectors])
    torch.testing.assert_close(together, one_by_one, rtol=1e-12, atol=0)


def per_of(density):
    return lambda v: density.per("individual", density.unpack(v))


TRANSFORMS = {
    "vmap": lambda d, v: torch.func.vmap(per_of(d))(torch.stack([v, v + 1]))[0],
    "grad": lambda d, v: torch.func.grad(lambda x: per_of(d)(x).sum())(v),
    "vmap of grad": lambda d, v: torch.func.vmap(torch.func.grad(lambda x: per_of(d)(x).sum()))(v[None])[0],
    "jacrev": lambda d, v: torch.func.jacrev(per_of(d))(v),
    "make_fx": lambda d, v: make_fx(per_of(d))(v)(v),
    "inference mode": lambda d, v: torch.inference_mode()(per_of(d))(v),
    "factors": lambda d, v: torch.func.vmap(lambda x: d.factors_at(d.unpack(x)).factors[-1].term.data)(v[None])[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_first_asked_for_inside_of_a_transform_is_captured_outside(transform):
    """And what is kept of it serves other transforms, and none."""
    once, before = symhmm.compile(Counted(), data()), symhmm.compile(Counted(), data())
    vector = before.pack(values())
    before.per("individual", values())
    before.factors_at(values())
    torch.testing.assert_close(transform(once, vector), transform(before, vector), rtol=1e-12, atol=1e-12)
    for again in TRANSFORMS.values():
        torch.testing.assert_close(again(once, vector), again(before, vector), rtol=1e-12, atol=1e-12)
    free = vector.clone().requires_grad_()
    (seen,) = torch.autograd.grad(per_of(once)(free).sum(), free)
    torch.testing.assert_close(seen, TRANSFORMS["grad"](before, vector), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)  # torch's own, when it first sees forward mode
def test_derivatives_by_transforms_are_those_of_the_kernels():
    """In both modes; second derivatives against differences of the first."""
    density = symhmm.compile(Counted(), data())
    vector = density.pack(values())

    def f(v):
        return density.log_prob(density.unpack(v))

    wanted = density.value_and_grad(vector)[1]
    torch.testing.assert_close(torch.func.grad(f)(vector), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.func.jacfwd(f)(vector), wanted, rtol=1e-10, atol=1e-12)
    along = torch.linspace(-1.0, 1.0, density.size, dtype=torch.float64)
    torch.testing.assert_close(torch.func.jvp(f, (vector,), (along,))[1], wanted @ along, rtol=1e-10, atol=1e-12)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(f(forward_ad.make_dual(vector, along)))
    torch.testing.assert_close(dual.tangent, wanted @ along, rtol=1e-10, atol=1e-12)
    ahead, behind = (density.value_and_grad(vector + h * along)[1] for h in (1e-5, -1e-5))
    torch.testing.assert_close(torch.func.hessian(f)(vector) @ along, (ahead - behind) / 2e-5, rtol=1e-7, atol=1e-7)


def test_other_data_bound_inside_of_a_transform():
    density, other = symhmm.compile(program := Counted(), data()), data(seed=1)
    vector = density.pack(values())
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            bound = density.bind(other)
            seen = bound.log_prob(values())
        torch.testing.assert_close(seen, fresh(other), rtol=1e-12, atol=0)
        wanted = symhmm.compile(program, other).value_and_grad(vector)[1]
        torch.testing.assert_close(torch.func.grad(lambda v, d=bound: d.log_prob(d.unpack(v)))(vector), wanted)


def test_members_add_up():
    density = symhmm.compile(Counted(), data())
    members = density.per("individual", values())
    assert members.shape == (4,)
    torch.testing.assert_close(members.sum(), density.log_prob(values()), rtol=1e-12, atol=0)
    alone = Data(data().y[:, 2:3], data().mask[:, 2:3])
    one = symhmm.compile(Counted(), alone).log_prob(values() | {"shift": values()["shift"][2:3]})
    torch.testing.assert_close(members[2], one, rtol=1e-10, atol=0)
    with pytest.raises(GraphError, match="there is no plate 'animal'"):
        density.per("animal", values())


def test_roles_and_repr():
    density = symhmm.compile(Counted(), data())
    roles = density.roles()
    assert roles.of("fixed effect") == ("loc", "stay")
    assert roles.of("random effect") == ("shift",)
    assert roles.of("summed out") == ("z_{time}",)
    assert roles.of("observed") == ("y_{time}",)
    assert "random effect of individual" in repr(roles)
    assert "captured" in repr(density) and "7 free values" in repr(density)


def test_wrong_values_are_refused():
    density = symhmm.compile(Counted(), data())
    with pytest.raises(ValuesError, match="missing value 'stay'"):
        density.log_prob({"loc": values()["loc"], "shift": values()["shift"]})
    with pytest.raises(ValuesError, match="unknown value 'lok'"):
        density.log_prob(values() | {"lok": torch.tensor(1.0)})


def test_structure_that_depends_on_data_is_built_in_and_said():
    def program(y, lengths):
        z = 0
        for t in pyro.markov(range(int(lengths.max()))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(z.float(), 1.0), obs=y[t])

    y = torch.randn(8)
    short, long = torch.tensor([3, 5]), torch.tensor([3, 8])
    density = symhmm.compile(program, y, short)
    assert density.compiled.mode == "fixed data" and "fixed data because" in repr(density)
    again = density.bind(y, long)
    five = symhmm.compile(program, y[:5], torch.tensor([5, 5]))
    eight = symhmm.compile(program, y, torch.tensor([8, 8]))
    torch.testing.assert_close(density.log_prob({}), five.log_prob({}))
    torch.testing.assert_close(again.log_prob({}), eight.log_prob({}))


def test_structure_that_depends_on_values_runs_the_program():
    def program(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        shape = 2.0 if scale > 1.5 else 1.0
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z * shape, scale), obs=y)

    with pytest.warns(SymhmmWarning, match="runs at each evaluation"):
        density = symhmm.compile(program, torch.tensor(0.4))
    assert density.compiled.mode == "eager"
    for scale, shape in ((1.0, 1.0), (2.0, 2.0)):
        terms = (
            dist.Normal(torch.tensor([0.0, shape]), scale).log_prob(torch.tensor(0.4)) + torch.tensor([0.7, 0.3]).log()
        )
        seen = density.log_prob({"scale": torch.tensor(scale)})
        torch.testing.assert_close(seen, terms.logsumexp(0))
    value, gradient = density.value_and_grad(density.pack({"scale": torch.tensor(2.0)}))
    assert value.isfinite() and gradient.abs().item() > 0


def test_a_side_effect_that_changes_the_density_is_noticed():
    calls = [0]

    def program(y):
        calls[0] += 1
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("y", dist.Normal(loc + 0.1 * calls[0], 1.0), obs=y)

    with pytest.warns(SymhmmWarning, match="the captured step gives"):
        symhmm.compile(program, torch.tensor(1.0))


def test_nonfinite_sites_are_named():
    def program(y):
        rate = pyro.param("rate", torch.tensor([1.0, 2.0]), constraint=constraints.positive)
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("w", dist.Normal(0.0, 1.0), obs=y)
        with pyro.poutine.mask(mask=torch.tensor(True)):
            pyro.sample("y", dist.Exponential(rate[z.long()]), obs=y)

    density = symhmm.compile(program, torch.tensor(2.0))
    assert density.nonfinite_sites({"rate": torch.tensor([1.0, 2.0])}) == ()
    assert density.nonfinite_sites({"rate": torch.tensor([float("inf"), float("inf")])}) == ("y",)


def test_intractable_before_any_work():
    def program(y):
        with pyro.plate("row", 30, dim=-2):
            a = pyro.sample("a", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("column", 20, dim=-1):
            b = pyro.sample("b", dist.Categorical(torch.ones(3) / 3))
        with pyro.plate("row", 30, dim=-2), pyro.plate("column", 20, dim=-1):
            pyro.sample("y", dist.Normal((a + b).float(), 1.0), obs=y)

    with pytest.raises(IntractableError, match="joint states"):
        symhmm.compile(program, torch.zeros(30, 20))


def test_programs_without_weak_references_compile_each_time():
    class Slotted:
        __slots__ = ()

        def __call__(self, y):
            pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        density = symhmm.compile(Slotted(), torch.tensor(0.0))
    torch.testing.assert_close(density.log_prob({"loc": torch.tensor(0.0)}), torch.tensor(-0.9189385))
