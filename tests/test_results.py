import dataclasses

import pytest
import torch

from symhmm.tables.results import Normal, Optima, Posterior, Status, Table, label


def test_status_is_one_line():
    status = Status(False, "not converged", ("a", "b"), "restarts=8")
    assert repr(status) == "failed: not converged (a; b). Try: restarts=8"
    assert repr(Status(True, "converged")) == "ok: converged"
    with pytest.raises(dataclasses.FrozenInstanceError):
        status.ok = True


def test_optima_groups_what_is_close():
    optima = Optima((-10.0, -12.0, -10.004, float("-inf"), -11.999), (True, True, True, False, True))
    assert optima.table["found"] == (2, 2, 1)
    assert optima.table["starts"] == ("0, 2", "1, 4", "3*")
    assert "not converged" in repr(optima)
    assert len(Optima().table) == 0


def test_table_columns_and_missing_numbers():
    table = Table(("name", "sd"), (("a", 1.0), ("b", float("nan"))))
    assert table["name"] == ("a", "b")
    assert repr(table).splitlines()[2].endswith("-")
    assert "12345.6789" in repr(Table(("x",), ((12345.67891,),)))


def test_labels():
    assert label("x", ()) == ["x"]
    assert label("x", (2,)) == ["x[0]", "x[1]"]
    assert label("x", (1, 2)) == ["x[0, 0]", "x[0, 1]"]


def test_posterior_draws_have_its_moments():
    tril = torch.tensor([[[2.0, 0.0], [1.0, 0.5]]], dtype=torch.float64)
    block = Normal((), torch.tensor([[2, 0]]), torch.tensor([[5.0, -3.0]], dtype=torch.float64), tril)
    posterior = Posterior(torch.tensor([-3.0, 9.0, 5.0], dtype=torch.float64), (block,))
    draws = posterior.sample(40_000, seed=1)
    assert torch.equal(draws, posterior.sample(40_000, seed=1))
    assert (draws[:, 1] == 9.0).all()
    torch.testing.assert_close(draws.mean(0), posterior.vector, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(draws[:, [2, 0]].T), tril[0] @ tril[0].T, rtol=0.03, atol=0.03)
    torch.testing.assert_close(draws.std(0), posterior.sd, rtol=0.02, atol=1e-12)
