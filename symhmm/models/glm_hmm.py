"""`GLMHMM`: hidden Markov models whose states are regressions of what is done on what is seen (Ashwood et al. 2022)."""

from collections.abc import Sequence

from symhmm.errors import SpecError
from symhmm.models.mixed_hmm import MixedHMM
from symhmm.models.model_fit import ModelFit
from symhmm.models.spec import Formulas
from symhmm.tables.results import Table

# The parameter that is linear in the inputs.
REGRESSED = {
    "bernoulli": "prob",
    "categorical": "prob",
    "gaussian": "mean",
    "poisson": "rate",
    "negative_binomial": "mean",
}


def GLMHMM(
    states: int | Sequence[str],
    response: str,
    inputs: str,
    *,
    family: str = "bernoulli",
    transitions: Formulas = None,
    initial: str | Sequence[float] = "free",
    order_by: str | None = None,
) -> MixedHMM:
    """A `MixedHMM` in whose states the response is a generalised linear model of the inputs.

    Each state has weights of its own: ``logit p(y_t = 1) = x_t . w_k`` for two outcomes, logits relative to the first
    level for several, means for a Gaussian and log-rates for counts (Ashwood et al. 2022, *Nature Neuroscience* 25, eq. 1-3).

    Args:
        states: K, or names.
        response: the stream.
        inputs: formula of the inputs, ``~ stimulus + previous``; an intercept is the bias. It may have random parts.
        family: ``bernoulli``, ``categorical``, ``gaussian``, ``poisson`` or ``negative_binomial``.
        transitions: formula of the transition logits, for inputs that drive the switching too.
        initial: as for `MixedHMM`; free by default.
        order_by: what puts the states in order; the response's linear predictor at the mean inputs by default.

    Raises:
        SpecError: another family, or as for `MixedHMM`.

    >>> GLMHMM(3, "choice", "~ stimulus")
    3 states: 0, 1, 2
    choice ~ bernoulli(prob)
    choice.prob ~ stimulus
    initial: free; covariates drive the step into their row
    """
    if family not in REGRESSED:
        raise SpecError(
            f"a GLM-HMM has no {family!r} family.",
            details=[f"families: {', '.join(REGRESSED)}"],
            suggestion="MixedHMM, which has formulas on every parameter of every family",
        )
    return MixedHMM(
        states,
        {response: family},
        transitions=transitions,
        initial=initial,
        formulas={f"{response}.{REGRESSED[family]}": inputs},
        order_by=order_by,
    )


def weights(fit: ModelFit) -> Table:
    """Weights of a `GLMHMM`: a row for each state (and level), a column for each input, on the scale of the link.

    Raises:
        SpecError: the fit is of a model without a formula on its only stream's parameter.
    """
    found = [p for p in fit.bound.spec.parameters if not p.plain]
    if len(found) != 1:
        raise SpecError(
            "these weights are those of one formula.", details=[f"formulas: {len(found)}"], suggestion="GLMHMM"
        )
    (block,) = fit.bound.blocks[found[0].name]
    assert block.design is not None
    values = fit.values[block.name].reshape(len(block.cells), -1)
    rows = tuple((cell, *row) for cell, row in zip(block.cells, values.tolist(), strict=True))
    return Table(("state", *block.design.columns), rows)
