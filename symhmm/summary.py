"""Summary: a fit on one page, and the criteria that compare it with others."""

from dataclasses import dataclass
from math import isfinite, log

from symhmm.components import variance_components
from symhmm.effects import Fitted, fixed_effects
from symhmm.errors import FitError
from symhmm.tables.results import LOG_LIKELIHOOD


@dataclass(frozen=True)
class Summary:
    """A page of text."""

    text: str

    def __repr__(self) -> str:
        return self.text


def summary(fit: Fitted) -> Summary:
    """Status, objective, criteria, fixed effects and the spread of random effects on one page."""
    est, lines = fit.estimate, []
    error = f" +- {est.error:.2g}" if est.error else ""
    lines.append(f"method          {est.method}, {est.n_evaluations} gradients, {est.seconds:.2f} s")
    lines.append(f"status          {est.status}")
    lines.append(f"{est.objective_name}: {est.objective:.4f}{error} nats")
    if est.marginal is not None:
        what = "log-likelihood" if est.objective_name.endswith("log-likelihood)") else "log-evidence"
        lines.append(f"{what}, importance-weighted: {est.marginal[0]:.4f} +- {est.marginal[1]:.2g} nats")
    lines += _criteria(fit)
    lines += ["", repr(fixed_effects(fit))]
    found = fit.information
    if found is not None:
        lines.append("standard errors: observed information, by central differences of the exact gradient")
        if found.rank < len(found.flat):
            lost = len(found.flat) - found.rank
            lines.append(f"{lost} of {len(found.flat)} directions are flat; '-' marks what they touch")
    if any(e.plates for e in fit.density.layout.entries):
        lines += ["", repr(variance_components(fit))]
    if len(est.optima.objectives) > 1:
        lines += ["", repr(est.optima)]
    return Summary("\n".join(lines))


def criterion(fit: Fitted, penalty: float) -> float:
    """``penalty`` times the number of free values less twice the marginal log-likelihood, nats.

    Raises:
        FitError: the objective is a joint density.
    """
    found = evidence(fit)
    if found is None:
        raise FitError(
            f"there is no marginal likelihood after method={fit.estimate.method!r}, so no AIC or BIC.",
            details=[f"its objective is the {fit.estimate.objective_name}"],
            suggestion="method='mle', or 'svi' for a program with random effects and no priors",
        )
    return penalty * fit.estimate.n_parameters - 2 * found[0]


def evidence(fit: Fitted) -> tuple[float, str] | None:
    """What AIC and BIC may be made of, and a remark on it; None for a joint density, which is no likelihood."""
    est = fit.estimate
    prior = any(not e.is_param and not e.plates for e in fit.density.layout.entries)
    if not isfinite(est.objective) or prior or est.method in ("map", "nuts"):
        return None
    if est.objective_name == LOG_LIKELIHOOD:
        return est.objective, ""
    if est.marginal is not None:
        return est.marginal[0], f" (importance-weighted, +- {2 * est.marginal[1]:.2g})"
    return est.objective, " (of the ELBO: an upper bound of the true one)"


def _criteria(fit: Fitted) -> list[str]:
    est, n = fit.estimate, fit.n_observations
    counted = " + ".join(f"{name} {k}" for name, k in est.counts.items())
    lines = [f"free values     {est.n_parameters} = {counted}; {n} observations"]
    found = evidence(fit)
    if found is None:
        return lines
    (value, why), k = found, est.n_parameters
    lines.append(f"AIC {2 * k - 2 * value:.2f}, BIC {k * log(max(n, 1)) - 2 * value:.2f}{why}")
    if fit.information is not None and fit.information.rank < k:
        k = fit.information.rank
        lines.append(f"  with the {k} values that the data determine: AIC {2 * k - 2 * value:.2f}")
    return lines
