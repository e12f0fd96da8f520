"""The recorder: the graph gives the function's numbers at other inputs, and nothing that depends on an input is baked in."""

import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import symhmm
from symhmm.chains import cpu
from symhmm.chains.operator import chain_evidence
from symhmm.errors import ProgramError, StructureDependsOnInput
from symhmm.recorder import record, require_constant, tracing, untraced

CONSTANT = torch.tensor([1.0, 2.0, 3.0])


def batched(v: Tensor, d: Tensor) -> Tensor:
    return torch.func.vmap(lambda a: (a * d).logsumexp(0))(v)


def with_gradient(v: Tensor, d: Tensor) -> Tensor:
    x = v.detach().requires_grad_()
    return torch.autograd.grad((x.exp() * d).sum() * x.sum(), x)[0]


def several_results(v: Tensor, d: Tensor) -> Tensor:
    values, order = v.sort(dim=-1)
    return values * order + d.max(0).values


def written(v: Tensor, d: Tensor) -> Tensor:
    out = torch.tensor([0.0, 0.0, 0.0])
    out += d
    return out * v


@pytest.mark.parametrize("f", [batched, with_gradient, several_results, written, lambda v, d: v @ CONSTANT + d])
def test_graphs_equal_the_function_at_other_inputs(f) -> None:
    module = record(lambda values, data: [f(values[0], data[0])], [torch.randn(3, 3)], [torch.randn(3)])
    for _ in range(2):
        v, d = torch.randn(3, 3), torch.randn(3)
        assert_close(module(v, d)[0], f(v, d))


def test_sparse_tensors_are_recorded_as_well() -> None:
    eye = torch.eye(3).to_sparse()
    module = record(lambda values, data: [torch.sparse.mm(eye, values[0])], [torch.ones(3, 2)], [])
    v = torch.randn(3, 2)
    assert_close(module(v)[0], v)


def test_the_same_tensor_given_twice_is_two_inputs() -> None:
    y = torch.ones(2)
    module = record(lambda values, data: [values[0] * data[0] - data[1]], [y], [y, y])
    v, a, b = torch.randn(3, 2).unbind()
    assert_close(module(v, a, b)[0], v * a - b)


def test_an_output_that_is_an_input_or_comes_from_outside() -> None:
    module = record(lambda values, data: [values[0], CONSTANT], [torch.ones(2)], [])
    v = torch.randn(2)
    assert_close(module(v), [v, CONSTANT])
    assert not hasattr(CONSTANT, "_symhmm_node")


@pytest.mark.parametrize(
    "read", [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: torch.equal(x, CONSTANT)]
)
def test_a_number_read_from_an_input_is_refused(read) -> None:
    with pytest.raises(StructureDependsOnInput, match="data_0") as caught:
        record(lambda values, data: [values[0] * read(2 * data[0])], [torch.ones(3)], [torch.ones(3)])
    assert caught.value.placeholder == "data_0"


def test_a_number_that_depends_on_shapes_alone_is_read() -> None:
    def f(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        return [values[0] * (torch.ones_like(data[0]).sum().item() + CONSTANT.sum().item())]

    assert_close(record(f, [torch.ones(2)], [torch.zeros(5)])(torch.ones(2), torch.zeros(5))[0], torch.full((2,), 11.0))


def test_what_is_untraced_is_a_constant() -> None:
    def f(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        assert tracing()
        with untraced():
            assert not tracing()
            held = values[0] * 2
        return [values[0] + held]

    assert not tracing()
    assert_close(record(f, [torch.ones(2)], [])(torch.zeros(2))[0], torch.full((2,), 2.0))
    assert not tracing()


def evidence(emission: Tensor) -> Tensor:
    return chain_evidence(torch.zeros(3), torch.eye(3)[None], emission)


@pytest.mark.parametrize(
    "f",
    [
        lambda z: torch.linalg.cholesky(torch.diag(z.exp() + 1)),
        lambda z: CONSTANT[z.clamp(0, 1).long()],
    ],
)
def test_checks_of_numbers_do_not_meet_what_was_left_out(f) -> None:
    first, other = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    module = record(lambda values, data: [f(evidence(values[0]))], [first], [])
    assert_close(module(other)[0], f(evidence(other)))


def test_what_fails_with_numbers_fails() -> None:
    def f(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        return [torch.linalg.cholesky(-torch.diag(evidence(values[0]).exp()))]

    with pytest.raises(torch.linalg.LinAlgError):
        record(f, [torch.randn(4, 5, 3)], [])
    assert not tracing()


def test_a_trace_by_make_fx_within_sees_numbers() -> None:
    x = torch.randn(4, 5, 3)
    module = record(lambda values, data: [make_fx(evidence)(values[0])(values[0])], [x], [])
    assert_close(module(2 * x)[0], evidence(2 * x))


def test_checks_of_gradients_by_torch_do_not_stop_a_recording() -> None:
    def f(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        x = values[0].detach().requires_grad_()
        return [torch.autograd.grad(evidence(x).sum(), x)[0]]

    x = torch.randn(4, 5, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            module = record(f, [x], [])
            assert torch.is_anomaly_enabled()
    assert_close(module(x), f([x], []))


def test_the_inputs_of_make_fx_are_known_as_well() -> None:
    def f(x: Tensor) -> Tensor:
        assert tracing()
        require_constant("item", torch.ones(2))
        with pytest.raises(StructureDependsOnInput, match="item"):
            require_constant("item", x + 1)
        return x

    make_fx(f)(torch.ones(2))


def test_shapes_strides_and_dtypes_are_noted() -> None:
    module = record(lambda values, data: [(values[0].permute(1, 0) > 0).any(0)], [torch.ones(2, 3)], [])
    seen = {n.name: n.meta["val"] for n in module.graph.nodes if "val" in n.meta}
    assert (tuple(seen["permute"].shape), seen["permute"].stride()) == ((3, 2), (1, 3))
    assert list(seen.values())[-1].dtype == torch.bool


def test_the_first_gradient_imports_neither_the_compiler_of_torch_nor_sympy() -> None:
    code = """
import sys, torch, pyro, pyro.distributions as dist, symhmm
before = set(sys.modules)
def model(y):
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
    scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
    z = 0
    with pyro.plate("n", 4):
        for t in pyro.markov(range(5)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[t])
density = symhmm.compile(model, torch.randn(5, 4))
density.value_and_grad(density.pack(density.initial()))
print([m for m in ("torch._dynamo", "torch._inductor", "sympy") if m in set(sys.modules) - before])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


GENERATOR = torch.Generator()
DRAWS = {
    "randn": lambda: torch.randn(3, generator=GENERATOR),
    "rand": lambda: torch.rand(3, generator=GENERATOR, dtype=torch.float64),
    "in place": lambda: torch.empty(3).normal_(generator=GENERATOR),
    "bernoulli": lambda: torch.bernoulli(torch.full((3,), 0.5), generator=GENERATOR),
    "multinomial": lambda: torch.multinomial(torch.ones(3), 3, replacement=True, generator=GENERATOR),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_random_numbers_of_a_generator_are_refused_by_name(draw) -> None:
    def program(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("n", 3):
            pyro.sample("y", dist.Normal(loc + draw(), 1.0), obs=y)

    with pytest.raises(ProgramError, match="draws random numbers") as caught:
        symhmm.compile(program, torch.zeros(3))
    assert "Try: pass them as an argument" in str(caught.value)


def chained(v: Tensor, d: Tensor) -> list[Tensor]:
    values = [x.detach().requires_grad_() for x in (v, d)]
    total = chain_evidence(torch.zeros(2), values[0][None], values[1]).sum()
    return [total.detach(), *torch.autograd.grad(total, values)]


def test_chains_are_recorded_without_being_carried_out(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(cpu, "evidence", lambda *args: calls.append("value"))
    monkeypatch.setattr(cpu, "backward", lambda *args: calls.append("gradient"))
    inputs = [torch.randn(2, 2)], [torch.randn(3, 20, 2)]
    module = record(lambda values, data: chained(values[0], data[0]), *inputs)
    assert calls == []
    monkeypatch.undo()
    v, d = torch.randn(2, 2), torch.randn(3, 20, 2)
    assert_close(list(module(v, d)), chained(v, d))


def test_chains_of_constants_have_numbers_that_may_be_read() -> None:
    d = torch.randn(20, 2)

    def reads(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        size = chain_evidence(torch.zeros(2), torch.zeros(1, 2, 2), d)
        return [values[0] * size.item()]

    assert_close(record(reads, [torch.ones(2)], [])(torch.ones(2))[0], reads([torch.ones(2)], [])[0])
    with pytest.raises(StructureDependsOnInput, match="data_0"):
        record(lambda v, d: [v[0] * chained(v[0], d[0])[0].item()], [torch.randn(2, 2)], [torch.randn(3, 20, 2)])
