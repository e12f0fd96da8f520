"""The chain kernels as torch operators: one node each for a tracer, with gradients and batching rules.

Value and gradient are operators of their own, so that a traced gradient is one node too. ``transition``, ``emission``
and ``terminal`` have the shapes of `symhmm.chains.operator.chain_message`, all with the same number of batch dimensions,
and at least one step.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack

from symhmm.chains.layout import common_batch, device_sizes, layout_of
from symhmm.chains.stages import Stages
from symhmm.errors import SymhmmError
from symhmm.memory import LARGE
from symhmm.recorder import BLANK

# numba takes a second to import and is of no use before the first chain: the kernels are imported when they are called.

_LIBRARY = torch.library.Library("symhmm", "FRAGMENT")


# Of every operator a function that does the same, without torch's dispatcher where nobody listens.
DIRECT: dict[Any, Callable[..., Any]] = {}


def cpu_operator(function: Callable[..., Any]) -> Any:
    """The operator ``symhmm::<name of the function>`` with the function as its kernel for CPU.

    `custom_op` would wrap the kernel so that torch's compiler leaves it alone, and import that compiler at the first call.
    """
    made = torch.library.custom_op(f"symhmm::{function.__name__}", function, mutates_args=(), device_types=())
    _LIBRARY.impl(function.__name__, function, "CPU")
    operator = made._opoverload

    @wraps(function)
    def direct(*args: Any) -> Any:
        # Neither derivatives, nor transforms, nor tracers: a call through the dispatcher takes as long as a pass over 100 steps.
        # Nor a default device, on which a kernel would be given its memory.
        alone = (
            torch.is_inference_mode_enabled()
            and peek_interpreter_stack() is None
            and not _len_torch_dispatch_stack()
            and not _len_torch_function_stack()
        )
        return function(*args) if alone and args[0].is_cpu else operator(*args)

    DIRECT[operator] = direct
    return made


def shaped(made: Any) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., tuple[Tensor, ...]]]:
    """Tell torch's compiler and our recorder what an operator makes of inputs without their numbers."""

    def register(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        made.register_fake(function)
        BLANK[made._opoverload] = lambda *args: tuple(map(_unknown, function(*args)))
        return function

    return register


def _unknown(x: Tensor) -> Tensor:
    """No numbers, so that nobody takes them for some; what is large stays memory that nobody has touched."""
    return x.fill_(torch.nan) if x.is_floating_point() and x.numel() * x.itemsize < LARGE else x


@cpu_operator
def chain(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The message, and what the gradient needs: `Layout.messages`, `Layout.scales` and `Layout.links`."""
    from symhmm.chains import cpu

    return cpu.forward(transition, emission, terminal, length)


@cpu_operator
def chain_backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    scales: Tensor,
    links: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    from symhmm.chains import cpu

    return cpu.backward(weight, transition, emission, terminal, messages, scales, links, length)


@cpu_operator
def chain_in_segments(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, segments: int
) -> tuple[Tensor, Tensor]:
    """The message, and the messages (*batch, segments, S) from which the gradient makes the others again."""
    from symhmm.chains import segments as cpu

    return cpu.forward(transition, emission, terminal, length, segments)


@cpu_operator
def chain_in_segments_backward(
    weight: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, ends: Tensor, length: int, segments: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    from symhmm.chains import segments as cpu

    return cpu.backward(weight, transition, emission, terminal, ends, length, segments)


@cpu_operator
def chain_in_stages(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, stages: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The message of several chains that move one at a time, and what the gradient needs; see `symhmm.chains.staged`."""
    from symhmm.chains import staged

    return staged.forward(transition, emission, terminal, length, stages)


@cpu_operator
def chain_in_stages_backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    scales: Tensor,
    length: int,
    stages: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    from symhmm.chains import staged

    return staged.backward(weight, transition, emission, terminal, messages, scales, length, stages)


@cpu_operator
def stages_in_segments(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, segments: int, stages: list[int]
) -> tuple[Tensor, Tensor]:
    """The message of `chain_in_stages`, and what `chain_in_segments` keeps for the gradient."""
    from symhmm.chains import segments as cpu

    return cpu.forward(transition, emission, terminal, length, segments, stages)


@cpu_operator
def stages_in_segments_backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    ends: Tensor,
    length: int,
    segments: int,
    stages: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    from symhmm.chains import segments as cpu

    return cpu.backward(weight, transition, emission, terminal, ends, length, segments, stages)


@cpu_operator
def best_in_stages(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, stages: list[int]
) -> tuple[Tensor, Tensor]:
    """The message of chains that move one at a time in the max semiring, and the best term of every sum of all stages."""
    from symhmm.chains import staged_best

    return staged_best.forward(transition, emission, terminal, length, stages)


@cpu_operator
def best_in_stages_backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    choices: Tensor,
    length: int,
    stages: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()``: the weights along the best paths, in the shapes of the inputs."""
    from symhmm.chains import staged_best

    return staged_best.backward(weight, transition, emission, terminal, choices, length, stages)


@cpu_operator
def best(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The message in the max semiring, and the best next state (*batch, n, S) at every step, -1 where there is none."""
    from symhmm.chains import cpu_best

    return cpu_best.forward(transition, emission, terminal, length)


@cpu_operator
def best_backward(
    weight: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, choices: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()``: the weights along the best paths, in the shapes of the inputs."""
    from symhmm.chains import cpu_best

    return cpu_best.backward(weight, transition, emission, terminal, choices, length)


@chain.register_kernel("cuda")
def _(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from symhmm.chains import cuda

    return cuda.forward(transition, emission, terminal, length)


@chain_backward.register_kernel("cuda")
def _(
    weight: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor,
    messages: Tensor, between: Tensor, products: Tensor, length: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from symhmm.chains import cuda

    return cuda.backward(weight, transition, emission, terminal, messages, between, products, length)


@shaped(chain)
def like_chain(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, ...]:
    """What `chain` returns, without numbers."""
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    if transition.device.type == "cuda":
        return tuple(transition.new_empty(size) for size in device_sizes(batch, length, transition.shape[-2]))
    layout = layout_of(batch, length, transition.shape[-2], transition.dtype)
    message = transition.new_empty([*batch, layout.states])
    return message, layout.messages(transition), layout.scales(transition), layout.links(transition)


@shaped(chain_in_segments)
def _(transition: Tensor, emission: Tensor, terminal: Tensor, length: int, segments: int) -> tuple[Tensor, ...]:
    batch, states = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]), transition.shape[-2]
    return transition.new_empty([*batch, states]), transition.new_empty([*batch, segments, states])


@shaped(chain_in_stages)
def _(transition: Tensor, emission: Tensor, terminal: Tensor, length: int, stages: list[int]) -> tuple[Tensor, ...]:
    batch = common_batch(transition.shape[:-2], emission.shape[:-2], terminal.shape[:-1])
    layout = layout_of(batch, length, emission.shape[-1], transition.dtype, blocks=1)
    message = transition.new_empty([*batch, layout.states])
    return message, layout.messages(transition), layout.scales(transition)


@shaped(stages_in_segments)
def _(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, segments: int, stages: list[int]
) -> tuple[Tensor, ...]:
    batch, states = common_batch(transition.shape[:-2], emission.shape[:-2], terminal.shape[:-1]), emission.shape[-1]
    return transition.new_empty([*batch, states]), transition.new_empty([*batch, segments, states])


@shaped(best_in_stages)
def _(transition: Tensor, emission: Tensor, terminal: Tensor, length: int, stages: list[int]) -> tuple[Tensor, ...]:
    batch = common_batch(transition.shape[:-2], emission.shape[:-2], terminal.shape[:-1])
    sums, states = Stages.decoded(stages).sums, emission.shape[-1]
    return transition.new_empty([*batch, states]), transition.new_empty([*batch, length, sum(sums)], dtype=torch.int16)


@shaped(best)
def _(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, ...]:
    batch, states = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]), transition.shape[-2]
    return transition.new_empty([*batch, states]), transition.new_empty([*batch, length, states], dtype=torch.int16)


def _fake_gradients(weight: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in inputs[:3])


def fake_chain_gradients(weight: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Gradients of chains, without numbers."""
    transition, emission, terminal = _fake_gradients(weight, *inputs)
    # On the CPU the largest of the three lies in memory as its input does, so that neither side transposes it.
    return transition, torch.empty_like(inputs[1]) if emission.device.type == "cpu" else emission, terminal


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.counts = inputs[3:]
    # Only the message is a result; without this zeros as large as the saved messages would be made for the others.
    ctx.set_materialize_grads(False)


def no_second_gradient(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
    """Refuse to differentiate a gradient."""
    raise SymhmmError(
        "the chain kernel has no second derivative.",
        suggestion="strategy='scan' (or 'sequential'), which can be differentiated any number of times",
    )


def leading(x: Tensor, dim: int | None) -> Tensor:
    """The vmapped dimension in front, of size 1 where there is none."""
    return x.unsqueeze(0) if dim is None else x.movedim(dim, 0)


def every(info: Any, x: Tensor, dim: int | None) -> Tensor:
    """The same expanded, at no cost: every member gets its own gradient, also of an input that they share."""
    return leading(x, dim).expand(info.batch_size, *[-1] * (x.dim() - (dim is not None)))


def _register(forward: Any, backward: Any, outputs: int, fake: Any = _fake_gradients) -> None:
    """Tie a chain operator to the operator of its gradient, and fold `torch.func.vmap` into the batch of both."""

    def gradient(ctx: Any, weight: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
        if weight is None:
            return (None,) * (3 + len(ctx.counts))
        return (*backward(weight, *ctx.saved_tensors, *ctx.counts), *(None for _ in ctx.counts))

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        inputs = [leading(x, d) for x, d in zip(args[:3], in_dims[:3], strict=True)]
        return forward(*inputs, *args[3:]), (0,) * outputs

    def batched_gradient(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        tensors = [x for x in args if isinstance(x, Tensor)]
        inputs = [every(info, x, d) for x, d in zip(tensors, in_dims, strict=False)]
        return backward(*inputs, *args[len(tensors) :]), (0, 0, 0)

    shaped(backward)(fake)
    forward.register_autograd(gradient, setup_context=_setup)
    backward.register_autograd(no_second_gradient)
    forward.register_vmap(batched)
    backward.register_vmap(batched_gradient)


_register(chain, chain_backward, outputs=4, fake=fake_chain_gradients)
_register(chain_in_segments, chain_in_segments_backward, outputs=2, fake=fake_chain_gradients)
_register(chain_in_stages, chain_in_stages_backward, outputs=3)
_register(stages_in_segments, stages_in_segments_backward, outputs=2, fake=fake_chain_gradients)
_register(best_in_stages, best_in_stages_backward, outputs=2)
_register(best, best_backward, outputs=2)
