"""Verdict: how a run ended, in one `Status` with the likely causes by name."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from symhmm.infer.bound import Bound, corrected
from symhmm.infer.importance import RELIABLE
from symhmm.infer.information import at_edge, endless
from symhmm.infer.lbfgs import Ascent
from symhmm.infer.objective import AnyGuide
from symhmm.infer.occupied import unused_states
from symhmm.infer.target import Target
from symhmm.tables.results import Drawable, Estimate, Optima, Status, label

COLLAPSED = 1e-4  # standard deviation on the unconstrained scale
NARROW = 0.9  # share of a standard deviation below which a guide is said to be too narrow
LATELY = 10  # evaluations or iterations over which a rise is reported
NOTHING = 0.05  # share of an effect's variance between members below which its spread counts as near zero
JOINT = "a joint mode with random effects: their spreads are biased towards zero, method='svi' integrates them"
CONTINUE = "the same call with the same checkpoint= continues"
STOPPED = "stopped by Ctrl-C"
BEFORE = "before the first step: values are the best of the warm start, with the random effects held alike"
STOPPED_WARM = Status(False, STOPPED, (BEFORE,), "the same call begins again")


def of_ascent(
    goal: Target,
    best: Ascent,
    vector: Tensor,
    values: Mapping[str, Tensor],
    allowed: int,
    stopped: bool,
    unit: str = "evaluations",
) -> Status:
    """The end of a climb; ``allowed`` is the largest number of ``unit``, evaluations or iterations."""
    if stopped:
        return Status(False, STOPPED, ("the best point so far",), CONTINUE)
    if not np.isfinite(best.value):
        return not_finite(goal, values)
    if set(best.trace) == {best.value} and not best.gradient.any():
        return Status(
            False, "the density is flat", ("it does not depend on the free values",), "check what is observed"
        )
    edges = at_edge(goal, vector)
    joint = any(e.plates for e in goal.entries) and any(e.is_param for e in goal.entries)
    remarks = (*((JOINT,) if joint else ()), *unused_states(goal.density, values))
    if lost := endless(goal, best.x, best.gradient):
        collapsed = f"the log-density rises without end as {', '.join(lost)} goes to zero"
        alone = () if joint else ("a state has collapsed onto observations that are all alike",)
        try_ = "method='laplace'" if joint else f"a prior or a lower bound for {lost[0]}, or more restarts="
        return Status(False, collapsed, (*alone, *remarks), try_)
    measured = f"largest gradient {np.abs(best.gradient).max():.2g}{_gain(best, unit)}"
    if not best.converged:
        causes = (measured, *(f"at the edge: {e}" for e in edges), *remarks)
        if len(best.trace) >= allowed:
            used = f"all {allowed} {unit} used"
            return Status(False, "not converged", (used, *causes), f"max_{unit}=, restarts=")
        return Status(False, "not converged: the line search found no further rise", causes, "restarts=")
    where = " at the edge of the support" if edges else ""
    return Status(True, f"converged{where}: {measured}", (*edges, *remarks))


def _gain(best: Ascent, unit: str) -> str:
    """What another step promises, or where nobody has worked that out, what the last ones have gained."""
    if np.isfinite(best.gain):
        return f", next step gains {best.gain:.2g} nats"
    heights = np.maximum.accumulate(np.where(np.isfinite(best.trace), best.trace, -np.inf))
    last = min(LATELY, len(heights) - 1)
    gained = best.value - heights[-1 - last]
    if not last or not np.isfinite(gained):
        return ""
    return f", the last {last} {unit} gained {gained:.2g} nats"


def of_guide(
    goal: Target,
    guide: AnyGuide,
    posterior: Drawable,
    trace: Tensor,
    *,
    found: Bound,
    cooling: int,
    plateau: bool,
    stopped: bool,
) -> Status:
    """The end of a variational fit: ``plateau`` says that the bound had stopped rising at step ``cooling``."""
    if stopped:
        return Status(False, STOPPED, (f"after {len(trace)} steps",), CONTINUE)
    bad = int((~trace.isfinite()).sum())
    lost = (f"{bad} of {len(trace)} draws had a density that is not finite",) if bad else ()
    if not np.isfinite(found.bound) or bad > 0.1 * len(trace):
        sites = goal.density.nonfinite_sites(goal.values(posterior.vector))
        causes = (*lost, *(f"site {s!r}" for s in sites))
        return Status(False, "the bound is not finite", causes, "lr=0.01, or a parameterisation without edges")
    remarks = (
        *lost,
        *_collapsed(goal, guide, posterior),
        *at_edge(goal, posterior.vector),
        *_narrow(goal, guide, posterior, found),
    )
    if not plateau:
        return Status(False, "not converged: the bound still rose when the rate began to fall", remarks, "steps=")
    return Status(True, f"converged: no rise beyond noise after {cooling} steps", remarks)


def _narrow(goal: Target, guide: AnyGuide, posterior: Drawable, found: Bound) -> list[str]:
    """How far the guide is from the posterior, by the weights that correct its draws."""
    weights = found.importance
    if weights is None:
        return []
    weighted, shape = corrected(posterior, found), f"k-hat {weights.k:.2f}"
    if weighted is posterior:
        if not weights.k >= RELIABLE:
            return []
        where = "" if found.member is None else f" of member {found.member} of {', '.join(guide.blocks[0].plates)}"
        return [f"the guide{where} is not wide enough to be corrected by weights ({shape}): intervals may be too short"]
    out = [f"draws of the guide weighted by the posterior: worth {weights.effective:.0f} draws, {shape}"]
    sd, wide = posterior.sd, weighted.sd
    for e in (e for e in goal.entries if not e.plates and not e.is_param):
        for i, which in enumerate(label(e.name, e.free_shape), e.start):
            if sd[i] < NARROW * wide[i]:
                out.append(f"of {which} the guide alone had {float(sd[i] / wide[i]):.0%} of the standard deviation")
    return out


def not_finite(goal: Target, values: Mapping[str, Tensor]) -> Status:
    """No start could be used."""
    sites = tuple(f"site {s!r}" for s in goal.density.nonfinite_sites(values))
    causes = sites or ("each site alone is finite: their sum or its gradient is not",)
    return Status(
        False, "the density is not finite at any start", causes, "other starting values, or check the data there"
    )


def without_start(
    goal: Target,
    method: str,
    objective_name: str,
    seconds: float,
    *,
    evaluations: int = 0,
    optima: Optima | None = None,
    status: Status | None = None,
) -> Estimate:
    """What a driver returns that could not begin: the start, and ``status``, or where the density is not finite there."""
    values = goal.values(goal.start)
    return Estimate(
        method=method,
        values=values,
        vector=goal.start,
        objective=-np.inf,
        objective_name=objective_name,
        trace=torch.zeros(0),
        status=status or not_finite(goal, values),
        n_evaluations=evaluations,
        seconds=seconds,
        counts={e.name: e.stop - e.start for e in goal.entries if not e.plates},
        optima=optima or Optima(),
        fixed=tuple(goal.fixed),
    )


def _collapsed(goal: Target, guide: AnyGuide, posterior: Drawable) -> list[str]:
    """Where the guide has shrunk to a point, and which effects do not differ between members."""
    remarks, sd, layout = [], posterior.sd, goal.density.layout
    for name in (n for b in guide.blocks for n in b.names):
        e = layout[name]
        narrow = int((sd[e.start : e.stop] < COLLAPSED).sum())
        if narrow:
            remarks.append(f"the guide of {name!r} collapsed to a point in {narrow} of {e.stop - e.start} coordinates")
    for b in (b for b in guide.blocks if b.plates and b.index.shape[0] > 2):
        between = posterior.vector[b.index].var(0)
        share = between / (between + sd[b.index].square().mean(0))
        for d in (share < NOTHING).nonzero()[:, 0].tolist():
            first = int(b.index[0, d])
            e = next(e for e in layout.entries if e.start <= first < e.stop)
            which = label(e.name, e.free_shape)[first - e.start]
            plate = ", ".join(b.plates)
            remarks.append(f"spread at or near zero: the data do not tell the members of {plate} apart in {which}")
    return remarks
