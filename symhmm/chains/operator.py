"""The chain operator: a batch of hidden Markov chains contracted to a message over their initial states."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import ceil, prod

import numpy as np
import torch
from torch import Tensor

from symhmm.chains import reference
from symhmm.chains.layout import DEVICE_STATES, common_batch
from symhmm.chains.registered import best, best_in_stages, chain, chain_in_segments, chain_in_stages, stages_in_segments
from symhmm.chains.registered_evidence import chain_evidence as evidence_operator
from symhmm.chains.stages import Stages, dense, joined
from symhmm.errors import ShapeError, SymhmmError
from symhmm.semiring import LOG, MAX, Semiring

STRATEGIES = ("auto", "kernel", "segments", "sequential", "scan")
BUDGET = 2**28  # bytes of messages that one segment may keep


def chain_message(
    transition: Tensor,
    emission: Tensor | None = None,
    terminal: Tensor | None = None,
    *,
    length: int | None = None,
    history: int = 1,
    semiring: Semiring = LOG,
    strategy: str = "auto",
) -> Tensor:
    """Sum (or maximise) over all hidden paths of a batch of chains, given the state before the first step.

    With s_t = (x_{t - history + 1}, .., x_t) the joint state after step t,

        message[s_0] = log sum over x_1..x_n of exp(terminal[s_n] + sum_t transition_t[s_{t-1}, x_t] + emission_t[x_t]),

    the backward recursion of a hidden Markov model. Messages compose: that of the second part of a chain is the
    ``terminal`` of the first. Cost n K^(history + 1) per chain.

    Args:
        transition: shape (*batch, n or 1, S, K), nats, S = K**history; entry [t, s, j] is the log-factor of state j at
            step t given the joint state s of the ``history`` steps before it, oldest first, row-major.
        emission: shape (*batch, n or 1, K), nats.
        terminal: shape (*batch, S), nats, log-factor of the joint state after the last step.
        length: n; needed only where neither ``transition`` nor ``emission`` varies over time.
        history: how many previous states a step looks at.
        semiring: `LOG` sums over the paths, `MAX` takes the best one.
        strategy: ``kernel`` is the fused operator with an analytic first derivative (the reference stands in where
            there is no kernel for the device, dtype or semiring); ``segments`` is the same with a third more work and
            memory for the messages of one segment at a time; ``sequential`` and ``scan`` are the reference, which can be
            differentiated any number of times; ``auto`` is the kernel.

    A size of 1 along time or along a batch dimension means constant: the entry is read many times and never expanded,
    and its gradient is the sum over what shares it. Batch dimensions broadcast against each other.

    Returns:
        shape (*batch, S), nats; ``-inf`` where no path is possible, with zero gradient there.

    Raises:
        ShapeError: sizes that do not fit, or a length that cannot be known.

    >>> stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()[None]              # constant over time
    >>> emission = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log()    # step 2 is seen to be in state 0
    >>> chain_message(stay, emission).exp()
    tensor([0.2075, 0.0850])
    """
    transition, emission, terminal, length = _align(transition, emission, terminal, length, history)
    return _message(transition, emission, terminal, length, history, semiring, strategy)


def chain_evidence(
    initial: Tensor,
    transition: Tensor,
    emission: Tensor | None = None,
    terminal: Tensor | None = None,
    *,
    length: int | None = None,
    history: int = 1,
    semiring: Semiring = LOG,
    strategy: str = "auto",
) -> Tensor:
    """Sum (or maximise) over all hidden paths of a batch of chains: the log-probability of what they have emitted.

    With s_0 the joint state before the first step, it is log sum over s_0 of exp(initial[s_0] + message[s_0]) with the
    message of `chain_message`. The kernel makes it and its gradient in one operation each, which is what short chains are
    made of; all else is as it is there.

    Args:
        initial: shape (*batch, S), nats, S = K**history: the log-factor of the joint state before the first step; a first
            observation that has no transition before it belongs here, too.
        transition, emission, terminal, length, history, semiring, strategy: as in `chain_message`.

    Returns:
        shape (*batch), nats; ``-inf`` where no path is possible, with zero gradient there.

    Raises:
        ShapeError: sizes that do not fit, or a length that cannot be known.

    >>> initial = torch.tensor([0.5, 0.5]).log()
    >>> stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()[None]              # constant over time
    >>> emission = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.5, 0.5]]).log()    # step 2 is seen to be in state 0
    >>> chain_evidence(initial, stay, emission).exp()
    tensor(0.1462)
    """
    if initial.dim() < 1 or initial.shape[-1] != transition.shape[-2:][0]:
        raise ShapeError(
            "initial terms do not fit the transition of a chain.",
            details=[f"initial seen {tuple(initial.shape)}, transition {tuple(transition.shape)}, wanted (*batch, S)"],
        )
    transition, emission, terminal, length = _align(transition, emission, terminal, length, history)
    own, batch = initial.shape[:-1], common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    # The operator has no chains of its own for initial terms that differ where chains do not.
    within = len(own) <= len(batch) and all(n in (1, m) for n, m in zip(reversed(own), reversed(batch), strict=False))
    fused = length > 0 and strategy in ("auto", "kernel") and within and initial.dtype == transition.dtype
    if fused and _kernel(transition, history, semiring) is chain:
        initial = initial[(None,) * (len(batch) - len(own))]
        evidence: Tensor = evidence_operator(initial, transition, emission, terminal, length)[0]
        return evidence
    message = _message(transition, emission, terminal, length, history, semiring, strategy)
    try:
        return semiring.reduce(initial + message, -1)
    except RuntimeError as error:
        raise ShapeError(
            "the batch of the initial terms does not broadcast against that of the chains.",
            details=[f"initial {tuple(own)}, chains {tuple(batch)}"],
        ) from error


def _message(
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    length: int,
    history: int,
    semiring: Semiring,
    strategy: str,
) -> Tensor:
    """`chain_message` of aligned terms."""
    if strategy not in STRATEGIES:
        raise SymhmmError(f"unknown chain strategy {strategy!r}.", suggestion=f"one of {', '.join(STRATEGIES)}")
    if length == 0:
        return reference.sequential(transition, emission, terminal, 0, history, semiring)
    if strategy in ("auto", "kernel", "segments"):
        kernel = _kernel(transition, history, semiring)
        if kernel:
            inputs = transition, emission, terminal, length
            message: Tensor
            if strategy == "segments" and semiring == LOG and transition.device.type == "cpu":
                message = chain_in_segments(*inputs, segment_count(*inputs))[0]
            else:
                message = kernel(*inputs)[0]
            return message
        strategy = "scan" if transition.shape[-2] <= 16 else "sequential"
    contract = reference.sequential if strategy == "sequential" else reference.scan
    return contract(transition, emission, terminal, length, history, semiring)


def staged_message(
    factors: Sequence[Tensor],
    emission: Tensor | None,
    length: int,
    stages: Stages,
    semiring: Semiring = LOG,
    *,
    segments: bool = False,
) -> Tensor:
    """The message of several chains whose transitions are factors of their own, over their joint state before the first step.

    Args:
        factors: of each stage (*batch, n or 1, entries), nats; sizes of 1 broadcast.
        emission: shape (*batch, n or 1, S), nats, on the joint state after a step.
        length: n.
        stages: in which order they are multiplied and summed out.
        semiring: `LOG` sums over the paths, `MAX` takes the best one.
        segments: keep the messages of one segment of the steps at a time, and make them again in the gradient.

    Returns:
        shape (*batch, S), nats.

    >>> from symhmm.chains.stages import arranged
    >>> some, _ = arranged((2, 2), [(0, 2), (1, 3)])
    >>> staged_message([torch.zeros(1, 4), torch.zeros(1, 4)], None, 3, some).exp()     # (2 x 2)**3 paths
    tensor([64., 64., 64., 64.])
    """
    transition = joined(factors)
    lead = [1] * (transition.dim() - 2)
    if emission is None:
        emission = transition.new_zeros(*lead, 1, stages.states)
    terminal = transition.new_zeros(*lead, stages.states)
    message: Tensor
    operator = {LOG: chain_in_stages, MAX: best_in_stages}.get(semiring)
    if operator and transition.device.type == "cpu" and transition.dtype in (torch.float32, torch.float64):
        inputs, code = (transition, emission, terminal, length), stages.encoded()
        if segments and semiring == LOG:
            rows = prod(common_batch(transition.shape[:-2], emission.shape[:-2]))
            count = _segments(rows * stages.states * transition.dtype.itemsize, length)
            message = stages_in_segments(*inputs, count, code)[0]
        else:
            message = operator(*inputs, code)[0]
        return message
    return chain_message(dense(transition, stages), emission, terminal, length=length, semiring=semiring)


def _kernel(transition: Tensor, history: int, semiring: Semiring) -> Callable[..., tuple[Tensor, ...]] | None:
    """The fused operator for these tensors, if there is one."""
    if transition.dtype not in (torch.float32, torch.float64):
        return None
    if transition.device.type == "cpu":
        return {LOG: chain, MAX: best}.get(semiring)
    on_device = transition.device.type == "cuda" and semiring == LOG and history == 1
    return chain if on_device and transition.shape[-1] <= DEVICE_STATES and find_spec("triton") else None


def segment_count(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> int:
    """Into how many segments a chain is cut so that the messages of each stay within `BUDGET`; at least 2 if it can be."""
    rows = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    return _segments(prod(rows) * transition.shape[-2] * transition.dtype.itemsize, length)


def _segments(step: int, length: int) -> int:
    """The same for messages of ``step`` bytes each."""
    return min(length, max(2, ceil(step * length / BUDGET)))


def _align(
    transition: Tensor, emission: Tensor | None, terminal: Tensor | None, length: int | None, history: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tensors with one dtype and the same number of batch dimensions, and the number of steps; or `ShapeError`."""
    if history < 1 or transition.dim() < 3 or transition.shape[-2] != transition.shape[-1] ** history:
        raise ShapeError(
            "the transition of a chain has the wrong shape.",
            details=[f"seen {tuple(transition.shape)}, wanted (*batch, n or 1, K**{history}, K)"],
        )
    states, size = transition.shape[-2:]
    emission = transition.new_zeros(1, size) if emission is None else emission
    terminal = transition.new_zeros(states) if terminal is None else terminal
    if emission.dim() < 2 or emission.shape[-1] != size or terminal.dim() < 1 or terminal.shape[-1] != states:
        raise ShapeError(
            "emission or terminal terms do not fit the transition of a chain.",
            details=[
                f"transition {tuple(transition.shape)}: K = {size}, S = {states}",
                f"emission seen {tuple(emission.shape)}, wanted (*batch, n or 1, {size})",
                f"terminal seen {tuple(terminal.shape)}, wanted (*batch, {states})",
            ],
        )
    steps = {n for n in (transition.shape[-3], emission.shape[-2], length) if n is not None and n != 1}
    if length is None:
        length = steps.pop() if len(steps) == 1 else 1
    if steps - {length}:
        raise ShapeError(
            "transition and emission terms of a chain disagree about the number of steps.",
            details=[f"transition {transition.shape[-3]}, emission {emission.shape[-2]}, length {length}"],
            suggestion="size 1 along time for what is constant, and length= for the number of steps",
        )
    batches = transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]
    try:
        rank = len(np.broadcast_shapes(*batches))
    except ValueError as error:
        raise ShapeError(
            "the batches of a chain do not broadcast.", details=[f"{' '.join(str(tuple(b)) for b in batches)}"]
        ) from error
    dtype = torch.promote_types(torch.promote_types(transition.dtype, emission.dtype), terminal.dtype)

    def aligned(x: Tensor, batch: Sequence[int]) -> Tensor:
        return x.to(dtype)[(None,) * (rank - len(batch))]

    return aligned(transition, batches[0]), aligned(emission, batches[1]), aligned(terminal, batches[2]), length
