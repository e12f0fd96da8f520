"""Values and vectors: packing is the inverse of unpacking, and every mistake is named."""

from functools import partial

import pytest
import torch
from torch.distributions import StickBreakingTransform, constraints
from torch.testing import assert_close

from symhmm.compiler.layout import Sticks, layout
from symhmm.errors import ProgramError, ValuesError
from symhmm.graph import FactorGraph, Latent, Param


@pytest.fixture
def where():
    return layout(
        FactorGraph(
            (),
            params={
                "mu": Param(torch.zeros(2, 3, dtype=torch.float64)),
                "sd": Param(torch.tensor(2.0, dtype=torch.float64), constraints.positive),
                "p": Param(torch.full((2, 3), 1 / 3, dtype=torch.float64), constraints.simplex),
            },
            latents={
                "u": Latent(torch.zeros(5, 2, dtype=torch.float64), constraints.real_vector, 1, {"individual": -1}),
                "tau": Latent(torch.tensor(1.0, dtype=torch.float64), constraints.positive, 0),
            },
        )
    )


def test_round_trip(where):
    assert where.size == 6 + 1 + 4 + 10 + 1  # a simplex of 3 has 2 free numbers
    vector = torch.randn(where.size, dtype=torch.float64)
    values = where.unpack(vector)
    assert values["p"].shape == (2, 3) and torch.allclose(values["p"].sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(where.pack(values), vector, rtol=1e-10, atol=1e-10)


def test_roles(where):
    assert where["mu"].role == "fixed effect"
    assert where["u"].role == "random effect of individual"
    assert where["tau"].role == "fixed effect with a prior"


def test_jacobian_covers_latents_only(where):
    vector = torch.randn(where.size, dtype=torch.float64)
    # tau = exp(x): log |d tau / d x| = x; the other latent is unconstrained, parameters do not count.
    torch.testing.assert_close(where.log_abs_det_jacobian(vector), vector[-1])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"nu": torch.tensor(1.0)}, "unknown value 'nu'"),
        ({"sd": torch.ones(2)}, "seen (2,), wanted ()"),
        ({"sd": torch.tensor(-1.0, dtype=torch.float64)}, "'sd' is outside its support"),
    ],
)
def test_wrong_values_are_named(where, change, words):
    values = where.unpack(torch.zeros(where.size, dtype=torch.float64)) | change
    with pytest.raises(ValuesError) as error:
        where.pack(values)
    assert words in str(error.value)


def test_missing_value_is_named(where):
    values = where.unpack(torch.zeros(where.size, dtype=torch.float64))
    del values["mu"]
    with pytest.raises(ValuesError, match="missing value 'mu'"):
        where.pack(values)


def test_a_constraint_without_an_unconstrained_scale_is_refused_by_name():
    with pytest.raises(ProgramError, match="'kind' has no unconstrained scale") as caught:
        layout(FactorGraph((), params={"kind": Param(torch.tensor(1.0), constraints.nonnegative_integer)}))
    assert "Try:" in str(caught.value)


def test_matrices_are_parameters_but_have_no_volume():
    covariance = 2 * torch.eye(2, dtype=torch.float64)
    as_param = layout(FactorGraph((), params={"s": Param(covariance, constraints.positive_definite)}))
    vector = as_param.pack({"s": covariance})
    torch.testing.assert_close(as_param.unpack(vector)["s"], covariance)
    as_latent = layout(FactorGraph((), latents={"s": Latent(covariance, constraints.positive_definite, 2)}))
    with pytest.raises(ProgramError, match="'s' on an unconstrained scale is not known"):
        as_latent.log_abs_det_jacobian(vector)


def volume(transform, x):
    return transform.log_abs_det_jacobian(x, transform(x))


@pytest.mark.parametrize("size", [2, 3, 7])
def test_sticks_are_those_of_torch(size):
    # Torch goes by way of products; values, slopes and volume are the same, and far out no state is impossible.
    x = 3 * torch.randn(50, size - 1, dtype=torch.float64)
    seen, wanted = Sticks(), StickBreakingTransform()
    for f, g in ((seen, wanted), (partial(volume, seen), partial(volume, wanted))):
        assert_close(f(x), g(x), rtol=1e-12, atol=1e-14)
        slopes = [torch.func.vmap(torch.func.jacrev(h))(x) for h in (f, g)]
        assert_close(*slopes, rtol=1e-10, atol=1e-12)
    assert_close(seen.inv(seen(x)), x)
    far = seen(torch.tensor([[-900.0] * (size - 1), [900.0] * (size - 1)], dtype=torch.float64))
    assert (far > 0).all()
    assert_close(far.sum(-1), torch.ones(2, dtype=torch.float64))
