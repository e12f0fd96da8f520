"""The log-probability of whole chains against all hidden paths, one by one."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from random_chains import chains, every_path
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from symhmm.chains.operator import chain_evidence, chain_message
from symhmm.compiler.step import trace
from symhmm.errors import ShapeError, SymhmmError
from symhmm.semiring import LOG, MAX

STRATEGIES = ["kernel", "segments", "sequential", "scan"]


def gradients(evidence: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """With weights of both signs; what is impossible has no part in them."""
    weight = torch.linspace(-1, 2, evidence.numel(), dtype=evidence.dtype).reshape(evidence.shape)
    possible = evidence.isfinite()
    if not possible.any():
        return [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad((evidence[possible] * weight[possible]).sum(), inputs, materialize_grads=True)
    return list(found)


@pytest.mark.parametrize("semiring", [LOG, MAX])
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=25)
@given(chain=chains())
def test_equals_the_sum_over_all_paths(strategy, semiring, chain):
    inputs, length, history = chain
    seen = chain_evidence(*inputs, length=length, history=history, semiring=semiring, strategy=strategy)
    wanted = every_path(*inputs, length, history)[semiring]
    assert_close(seen, wanted, rtol=1e-10, atol=1e-10)
    if semiring == LOG:
        for g, w in zip(gradients(seen, inputs), gradients(wanted, inputs), strict=True):
            assert_close(g, w, rtol=1e-10, atol=1e-10)


def long_chain(batch, length, size, shared=True, dtype=torch.float64):
    inputs = [
        torch.randn(*(() if shared else batch), size).log_softmax(-1),
        torch.randn(1, size, size).log_softmax(-1),
        3 * torch.randn(*batch, length, size),
        torch.randn(size),
    ]
    return [x.to(dtype).requires_grad_() for x in inputs]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch, length, size", [((), 1000, 3), ((2, 9), 70, 5), ((17,), 33, 20), ((), 60, 50)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_chains_equal_the_reference(batch, length, size, shared, dtype):
    inputs = long_chain(batch, length, size, shared)
    inputs[1].data[0, 0, 1:] = -torch.inf  # from 48 states on a list of moves, if they are few
    if size == 50:
        inputs[1].data.masked_fill_(torch.ones(size, size).tril(-2).triu(-30).bool(), -torch.inf)
    wanted = chain_evidence(*inputs, strategy="sequential")
    own = [x.detach().to(dtype).requires_grad_() for x in inputs]
    seen, exact = chain_evidence(*own), dtype == torch.float64
    assert seen.dtype == dtype
    assert_close(seen.double(), wanted, rtol=1e-10 if exact else 2e-6, atol=0)
    for g, w in zip(gradients(seen, own), gradients(wanted, inputs), strict=True):
        assert_close(g.double(), w, rtol=1e-10 if exact else 2e-4, atol=1e-10 if exact else 2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (5,)])
def test_an_impossible_observation_is_minus_infinity_with_finite_gradients(dtype, batch):
    inputs = [x.detach() for x in long_chain(batch, 90, 3, dtype=dtype)]
    inputs[2][(2, 50) if batch else 50] = -torch.inf
    inputs = [x.requires_grad_() for x in inputs]
    evidence = chain_evidence(*inputs)
    assert evidence.isneginf().sum() == 1
    found = torch.autograd.grad(evidence.sum(), inputs)
    assert all(g.isfinite().all() for g in found)
    assert (found[2][evidence.isneginf()] == 0).all()


def test_numbers_that_are_none_and_infinite_ones_stay():
    initial = torch.tensor([[0.0, -torch.inf], [torch.nan, -torch.inf], [torch.inf, -torch.inf]])
    found = chain_evidence(initial, torch.zeros(1, 2, 2), torch.zeros(3, 4, 2))
    assert_close(found, torch.tensor([2.0**4, torch.nan, torch.inf]).log(), equal_nan=True)


def step(initial, transition, emission, terminal):
    inputs = [x.detach().requires_grad_() for x in (initial, transition, emission, terminal)]
    value = chain_evidence(*inputs).square().sum()
    return value, torch.autograd.grad(value, inputs)


def test_one_node_for_the_value_and_one_for_the_gradient():
    inputs = torch.randn(2), torch.randn(1, 2, 2), torch.randn(5, 40, 2), torch.randn(2)
    for mode in ("real", "fake"):
        graph = make_fx(step, tracing_mode=mode)(*inputs)
        calls = [str(n.target) for n in graph.graph.nodes if "symhmm" in str(n.target)]
        assert calls == ["symhmm.chain_evidence.default", "symhmm.chain_backward.default"]
        other = [torch.randn_like(x) for x in inputs]
        assert_close(graph(*other), step(*other))


def test_captured_and_compiled():
    def flat(*x):
        value, found = step(*x)
        return value.detach(), *found

    inputs, other = ([torch.randn(2), torch.randn(1, 2, 2), torch.randn(5, 40, 2), torch.randn(2)] for _ in range(2))
    captured = trace(flat, inputs, [], gradients=True)
    assert_close(captured.numbers(other, captured.constants([])), flat(*other))
    assert_close(torch.compile(chain_evidence, fullgraph=True, backend="aot_eager")(*inputs), chain_evidence(*inputs))


def test_what_torch_asks_of_an_operator():
    inputs = [
        x.detach().unsqueeze(0).requires_grad_() if i in (0, 3) else x for i, x in enumerate(long_chain((3,), 40, 2))
    ]
    inputs[1] = inputs[1].detach().unsqueeze(0).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.symhmm.chain_evidence.default, (*inputs, 40), test_utils=tests)


@pytest.mark.parametrize("length", [1, 40, 400])
@pytest.mark.parametrize("mapped", [m for m in itertools.product([False, True], repeat=4) if any(m)])
def test_vmap_equals_a_loop(length, mapped):
    plain = (
        torch.randn(2).double(),
        torch.randn(1, 2, 2).double(),
        torch.randn(3, length, 2).double(),
        torch.randn(2).double(),
    )
    many = [torch.randn(4, *x.shape).double() if m else x for x, m in zip(plain, mapped, strict=True)]
    dims = tuple(0 if m else None for m in mapped)
    one_by_one = [[x[i] if m else x for x, m in zip(many, mapped, strict=True)] for i in range(4)]
    assert_close(torch.func.vmap(chain_evidence, dims)(*many), torch.stack([chain_evidence(*x) for x in one_by_one]))
    value, found = torch.func.vmap(make_fx(step)(*plain), dims)(*many)
    for i, x in enumerate(one_by_one):
        wanted, grads = step(*x)
        assert_close(value[i], wanted)
        assert_close([g[i] for g in found], list(grads))


def test_many_cotangents_at_once():
    inputs = long_chain((3,), 400, 3)
    evidence = chain_evidence(*inputs)
    rows = torch.autograd.grad(evidence, inputs, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    for s in range(3):
        assert_close([r[s] for r in rows], list(torch.autograd.grad(evidence[s], inputs, retain_graph=True)))


def test_only_the_gradients_that_are_asked_for():
    initial, transition, emission, _ = (x.detach() for x in long_chain((3,), 40, 3))
    full = [x.clone().requires_grad_() for x in (initial, transition, emission)]
    wanted = torch.autograd.grad(chain_evidence(*full).sum(), full)
    for k in range(3):
        inputs = [x.clone().requires_grad_(i == k) for i, x in enumerate((initial, transition, emission))]
        assert_close(torch.autograd.grad(chain_evidence(*inputs).sum(), inputs[k])[0], wanted[k])


@pytest.mark.parametrize("which", range(3))
def test_a_second_derivative_of_the_kernel_names_the_strategies_that_have_one(which):
    inputs = [torch.zeros(2), torch.zeros(1, 2, 2), torch.randn(4, 2)]
    inputs[which].requires_grad_()
    (gradient,) = torch.autograd.grad(chain_evidence(*inputs).sum(), inputs[which], create_graph=True)
    with pytest.raises(SymhmmError, match="scan"):
        gradient.sum().backward()


def test_the_reference_has_second_derivatives():
    initial = torch.randn(2).double().requires_grad_()
    emission = torch.randn(4, 2).double().requires_grad_()

    def f(i, e):
        return chain_evidence(i, torch.eye(2).double().log_softmax(-1)[None], e, strategy="scan")

    assert torch.autograd.gradgradcheck(f, (initial, emission))


def test_initial_terms_that_differ_where_chains_do_not():
    initial, transition, emission = (
        torch.randn(4, 3).double(),
        torch.randn(1, 3, 3).double(),
        torch.randn(9, 3).double(),
    )
    seen = chain_evidence(initial, transition, emission)
    assert_close(seen, (initial + chain_message(transition, emission)).logsumexp(-1))


def test_sizes_that_do_not_fit():
    with pytest.raises(ShapeError, match="initial"):
        chain_evidence(torch.zeros(3), torch.zeros(1, 2, 2), torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="initial"):
        chain_evidence(torch.zeros(3, 2), torch.zeros(1, 2, 2), torch.zeros(2, 4, 2))
    with pytest.raises(SymhmmError, match="sequential"):
        chain_evidence(torch.zeros(2), torch.zeros(1, 2, 2), strategy="fastest")


def test_an_empty_batch():
    emission = torch.zeros(0, 4, 2, requires_grad=True)
    evidence = chain_evidence(torch.zeros(2), torch.zeros(1, 2, 2), emission)
    evidence.sum().backward()
    assert evidence.shape == (0,) and emission.grad.shape == (0, 4, 2)


def test_kernels_are_called_without_the_dispatcher_only_where_nobody_listens():
    inputs = [torch.randn(2), torch.randn(1, 2, 2), torch.randn(40, 2)]
    step, wanted = trace(chain_evidence, inputs, []), chain_evidence(*inputs)

    def body(*values):
        return step.body(*values, *step.constants([]))

    with torch.inference_mode():
        assert_close(body(*inputs), wanted)
        many = torch.func.vmap(body, (0, None, None))(torch.stack([inputs[0], inputs[0] + 1]), *inputs[1:])
        assert_close(many, torch.stack([wanted, wanted + 1]))
        nodes = make_fx(body)(*inputs).graph.nodes
    assert any(n.target is torch.ops.symhmm.chain_evidence.default for n in nodes)
    free = [x.clone().requires_grad_() for x in inputs]
    (seen,) = torch.autograd.grad(body(*free), free[0])
    assert_close(seen, torch.autograd.grad(chain_evidence(*free), free[0])[0])


def test_another_default_device_changes_nothing() -> None:
    """As `torch.set_default_device` of who has a device, while these chains are on the CPU."""
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((1, 3), (1, 1, 3, 3), (5, 9, 3), (1, 3))]
    wanted = torch.ops.symhmm.chain_evidence_gradient(*inputs, None, 9)
    step = trace(lambda *x: torch.ops.symhmm.chain_evidence_gradient(*x, None, 9), inputs, [])
    constants = step.constants([])
    with torch.device("meta"):
        assert_close(step.numbers(inputs, constants), tuple(wanted))


@pytest.mark.parametrize("count", [1, 16])
def test_a_large_total_does_not_drown_what_differs_between_states(count):
    # In single precision the sum over 1e5 steps, -3e5 nats, resolves no more than 1/32 of a nat.
    generator = torch.Generator().manual_seed(0)
    emission = torch.randn(count, 100_000, 2, generator=generator) - 3
    terms = [torch.tensor([0.3, 0.7]).log(), torch.tensor([[[0.9, 0.1], [0.4, 0.6]]]).log(), emission]
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype).requires_grad_() for x in terms]
        found.append(torch.autograd.grad(chain_evidence(*inputs).sum(), inputs[0])[0].double())
    assert_close(found[0], found[1], rtol=1e-4, atol=0)
