"""`capture`: what it gives back, what it leaves alone, and what it refuses by name."""

import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from symhmm.capture.program import capture
from symhmm.errors import DataError, ProgramError, ShapeError, StructureDependsOnInput, SymhmmWarning, ValuesError
from symhmm.graph import Recipe
from symhmm.testing import enumerate_joint

TRANSITION = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
LOC = torch.tensor([-1.0, 1.0])


def hmm(y, mask=None):
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
        with poutine.mask(mask=True if mask is None else mask[t]):
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t])


def total(graph):
    return enumerate_joint(graph)


def test_a_constant_transition_is_not_repeated_over_time() -> None:
    graph = capture(hmm, (torch.randn(9),))
    inputs = {f.name: f.inputs for f in graph.factors}
    assert inputs["z_{time}"] == {"z_{time}": 2, "z_{time-1}": 2}
    assert inputs["y_{time}"] == {"time": 8, "z_{time}": 2}
    (chain,) = graph.chains.values()
    assert (chain.length, chain.history, chain.first) == (8, 1, 1)
    assert chain.variables[0].initial == ("z_0",)
    assert chain.variables[0].steps == tuple(f"z_{t}" for t in range(1, 9))


def test_a_shared_transition_is_not_repeated_over_a_plate() -> None:
    def program(y, **how):
        with pyro.plate("animals", y.shape[0]):
            z = torch.tensor(0)
            for t in pyro.markov(range(y.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(**{k: v[z] for k, v in how.items()}))
                pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[:, t])

    y = torch.randn(3, 6)
    for how in ({"probs": TRANSITION}, {"logits": TRANSITION.log()}):
        factor = next(f for f in capture(program, (y,), how).factors if f.name == "z_{time}")
        assert factor.inputs == {"z_{time}": 2, "z_{time-1}": 2}
        assert set(factor.frames) == {"animals", "time"}


def test_repeated_data_are_not_taken_for_a_constant() -> None:
    def program(x):
        with pyro.plate("animals", len(x)):
            pyro.factor("f", x)

    (factor,) = capture(program, (torch.zeros(()).expand(4),)).factors
    assert factor.inputs == {"animals": 4}


def test_recipe_repeats_a_capture_and_a_trace_does_not_grow_with_time() -> None:
    def nodes(length):
        y = torch.randn(length)
        recipe = capture(hmm, (y,)).recipe
        traced = make_fx(lambda y: [f.term.data for f in capture(hmm, (y,), recipe=recipe).factors])(y)
        fresh = torch.randn(length)
        for a, f in zip(traced(fresh), capture(hmm, (fresh,)).factors, strict=True):
            assert_close(a, f.term.data)
        return len(traced.graph.nodes)

    assert nodes(10) == nodes(40)


def test_reading_an_input_while_tracing_says_which() -> None:
    def program(y, x):
        if x.sum() > 0:
            y = y + 1
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([3]).to_event(1), obs=y)

    def step(first, second):
        return capture(program, (first, second), recipe=Recipe()).factors[0].term.data

    with pytest.raises(StructureDependsOnInput) as caught:
        make_fx(step)(torch.zeros(3), torch.ones(2))
    assert caught.value.placeholder.startswith("second")


def test_nothing_is_left_behind() -> None:
    def program(y):
        loc = pyro.param("loc", lambda: torch.randn(2))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    pyro.clear_param_store()
    pyro.param("loc", torch.full((2,), 7.0))
    before, iterate = torch.get_rng_state(), pyro.poutine.markov_messenger.MarkovMessenger.__iter__
    first, second = (capture(program, (torch.zeros(3),)).params["loc"].value for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(first, second)
    assert pyro.param("loc")[0] == 7.0
    with pytest.raises(ZeroDivisionError):
        capture(lambda: next(1 / 0 for _ in pyro.markov(range(9))))
    assert pyro.poutine.markov_messenger.MarkovMessenger.__iter__ is iterate
    assert not pyro.poutine.runtime._PYRO_STACK
    pyro.clear_param_store()


def test_capture_inside_a_program_and_in_threads() -> None:
    y = torch.randn(6)
    expected = total(capture(hmm, (y,)))

    def outer():
        inner = capture(hmm, (y,))
        pyro.factor("inner", total(inner))

    assert_close(capture(outer).factors[0].term.data, expected)
    found = []
    threads = [threading.Thread(target=lambda: found.append(total(capture(hmm, (y,))))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found:
        assert_close(value, expected)


def test_exceptions_of_the_program_come_through() -> None:
    class Mine(Exception):
        pass

    def program(at):
        for t in pyro.markov(range(9)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.5))
            if t >= at:
                raise Mine("told you")
        return z

    for at in (0, 1, 5):
        with pytest.raises(Mine, match="told you"):
            capture(program, (at,))


def test_subsampled_plate() -> None:
    def program(y):
        spread = pyro.param("spread", torch.arange(1.0, 7.0), event_dim=0)
        with pyro.plate("animals", 6, subsample_size=2) as index:
            spread = pyro.param("own", torch.arange(1.0, 7.0), event_dim=0)
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(u, spread), obs=y[index])

    y, u = torch.randn(6), torch.randn(6)
    index = torch.tensor([4, 1])
    graph = capture(program, (y,), values={"u": u}, subsamples={"animals": index})
    assert (graph.plates["animals"].size, graph.plates["animals"].scale) == (2, 3.0)
    assert graph.latents["u"].value.shape == (6,)
    assert dict(graph.latents["u"].plates) == {"animals": -1}
    own = {f.name: f.term.data for f in graph.factors}
    assert_close(own["u"], dist.Normal(0.0, 1.0).log_prob(u[index]))
    assert_close(own["y"], dist.Normal(u[index], index + 1.0).log_prob(y[index]))
    assert all(f.scale == 1.0 for f in graph.factors)
    drawn = {tuple(capture(program, (y,)).subsamples["animals"].tolist()) for _ in range(8)}
    assert len(drawn) > 1
    assert capture(program, (y,)).latents["u"].value.shape == (6,)


def test_scale_is_kept_apart_from_the_term() -> None:
    def program(y):
        with poutine.scale(scale=0.25), pyro.plate("data", 8, subsample=torch.tensor([0, 3])) as index:
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[index])

    (factor,) = capture(program, (torch.zeros(8),)).factors
    assert factor.scale == 0.25
    assert_close(factor.term.data, dist.Normal(0.0, 1.0).log_prob(torch.zeros(2)))


@pytest.mark.parametrize(
    ("family", "bad"),
    [
        (lambda p: dist.Normal(p, 1.0), float("nan")),
        (lambda p: dist.LogNormal(p, 1.0), -3.0),
        (lambda p: dist.Poisson(p.exp()), -1.0),
        (lambda p: dist.Beta(p.exp(), 1.0), float("nan")),
        (lambda p: dist.Categorical(logits=torch.stack([p, -p])), 7.0),
        (lambda p: dist.Gamma(p.exp(), 1.0), 0.0),
        (lambda p: dist.MultivariateNormal(p.expand(2), torch.eye(2)), float("nan")),
    ],
)
def test_masked_observations_count_nothing(family, bad) -> None:
    good = family(torch.zeros(())).sample((6,))
    mask = torch.tensor([True, False, True, True, False, True])
    y = good.clone()
    y[~mask] = torch.tensor(bad).to(y.dtype)

    def program(y):
        p = pyro.param("p", torch.zeros(()))
        with pyro.plate("data", 6), poutine.mask(mask=mask):
            pyro.sample("y", family(p), obs=y)

    p = torch.tensor(0.3, requires_grad=True)
    (factor,) = capture(program, (y,), values={"p": p}).factors
    factor.term.data.sum().backward()
    q = torch.tensor(0.3, requires_grad=True)
    expected = family(q).log_prob(good)[mask].sum()
    expected.backward()
    assert_close(factor.term.data.sum(), expected)
    assert_close(p.grad, q.grad)


def test_initial_values() -> None:
    def program():
        pyro.sample("mean", dist.Normal(torch.tensor([3.0, 4.0]), 1.0).to_event(1))
        pyro.sample("none", dist.Cauchy(2.0, 1.0))
        pyro.sample("inside", dist.HalfCauchy(1.0))
        with pyro.plate("p", 3):
            pyro.sample("simplex", dist.Dirichlet(torch.ones(2)))

    latents = capture(program).latents
    assert_close(latents["mean"].value, torch.tensor([3.0, 4.0]))
    assert_close(latents["none"].value, torch.tensor(0.0))
    assert_close(latents["inside"].value, torch.tensor(1.0))
    assert_close(latents["simplex"].value, torch.full((3, 2), 0.5))


def refused(program, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        capture(program, args)


def test_a_plate_that_opens_only_inside_another_after_a_state_was_summed() -> None:
    y = torch.randn(3, 4)

    def late(y):
        with pyro.plate("animal", 4, dim=-1):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
            with pyro.plate("session", 3, dim=-2):
                z = pyro.sample("z", dist.Categorical(TRANSITION[kind]))
                pyro.sample("y", dist.Normal(LOC[z], 1.0), obs=y)

    def in_its_own_code(y):
        with pyro.plate("animal", 4, dim=-1):
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
            with pyro.plate("session", 3, dim=-2):
                each = torch.stack([dist.Normal(LOC[k], 1.0).log_prob(y) for k in range(2)]).exp()
                row = TRANSITION[kind]
                pyro.factor("y", (row[..., 0] * each[0] + row[..., 1] * each[1]).log())

    by_kind = torch.stack([dist.Normal(LOC[k], 1.0).log_prob(y) for k in range(2)]).exp()
    each = torch.einsum("kz,zsn->ksn", TRANSITION, by_kind).log().sum(1)
    wanted = (each + torch.tensor([0.3, 0.7]).log()[:, None]).logsumexp(0).sum()
    assert_close(enumerate_joint(capture(late, (y,))), wanted)
    assert_close(enumerate_joint(capture(in_its_own_code, (y,))), wanted)


def test_plates_that_clash() -> None:
    def program():
        with pyro.plate("a", 2, dim=-1), pyro.plate("b", 3, dim=-1):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ShapeError, match="same dimension"):
        refused(program)


def test_mask_of_wrong_shape() -> None:
    def program():
        with pyro.plate("data", 4), poutine.mask(mask=torch.ones(3, dtype=torch.bool)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(4))

    with pytest.raises(ShapeError, match=r"mask of site 'y'(.|\n)*\(3,\)(.|\n)*\(4,\)"):
        refused(program)


def test_data_that_do_not_fit_their_plate() -> None:
    def program():
        with pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.zeros(3))

    with pytest.raises(ShapeError, match=r"'y' do not fit plate 'data'(.|\n)*seen size 3(.|\n)*wanted 4"):
        refused(program)


def test_infinite_support() -> None:
    with pytest.raises(ProgramError, match="'n' has infinitely many"):
        refused(lambda: pyro.sample("n", dist.Poisson(3.0)))


def test_nan_that_is_not_masked() -> None:
    y = torch.zeros(9)
    y[4] = y[6] = float("nan")
    with pytest.raises(DataError, match="2 unmasked NaN"):
        refused(hmm, y)
    capture(hmm, (y,), {"mask": ~y.isnan()})


def test_observation_outside_the_support() -> None:
    with pytest.raises(DataError, match="outside the support"):
        refused(lambda: pyro.sample("k", dist.Poisson(3.0), obs=torch.tensor(-1.0)))


def test_empty_sequence() -> None:
    with pytest.raises(DataError, match=r"test_program\.py:\d+ has no steps"):
        refused(hmm, torch.zeros(0))


def test_name_used_twice() -> None:
    def program():
        for _ in range(2):
            pyro.sample("z", dist.Bernoulli(0.5))

    with pytest.raises(ProgramError, match="two sites are called 'z'"):
        refused(program)


@pytest.mark.parametrize("infer", [{"enumerate": "sequential"}, {"enumerate": "parallel", "num_samples": 5}])
def test_sampling_of_discrete_latents(infer) -> None:
    with pytest.raises(ProgramError, match="'z' asks for"):
        refused(lambda: pyro.sample("z", dist.Bernoulli(0.5), infer=infer))


def test_undeclared_batch() -> None:
    with pytest.raises(ShapeError, match="'x' has a batch dimension that is not a plate"):
        refused(lambda: pyro.sample("x", dist.Normal(torch.zeros(3), 1.0), obs=torch.zeros(3)))


def test_mask_changed_in_place_after_use() -> None:
    def program(y):
        mask = torch.ones(3, dtype=torch.bool)
        with pyro.plate("data", 3):
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
            mask[0] = False

    with pytest.raises(ProgramError, match="site 'y' was changed in place"):
        refused(program, torch.zeros(3))


def test_param_without_a_value() -> None:
    with pytest.raises(ProgramError, match="'p' has no initial value"):
        refused(lambda: pyro.param("p"))
    with pytest.raises(ValuesError, match="'p' lies outside"):
        refused(lambda: pyro.param("p", torch.tensor(-1.0), constraint=dist.constraints.positive))


def brute(y, after):
    """Log-density of the chain with a last observation of its final state, by summing over all paths."""
    out = []
    for path in range(2 ** len(y)):
        states = [path >> t & 1 for t in range(len(y))]
        p, last = torch.zeros(()), 0
        for t, s in enumerate(states):
            p = p + TRANSITION[last, s].log() + dist.Normal(LOC[s], 1.0).log_prob(y[t])
            last = s
        out.append(p + after(states))
    return torch.stack(out).logsumexp(0)


@pytest.mark.parametrize("length", [2, 7])
def test_last_state_read_after_the_loop_is_exact(length) -> None:
    def program(y):
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t])
        w = pyro.sample("w", dist.Categorical(TRANSITION[z]))
        pyro.sample("after", dist.Normal(LOC[w] + LOC[z], 2.0), obs=torch.tensor(0.5))

    def after(states):
        final = states[-1]
        seen = dist.Normal(LOC + LOC[final], 2.0).log_prob(torch.tensor(0.5))
        return (TRANSITION[final].log() + seen).logsumexp(0)

    y = torch.randn(length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        graph = capture(program, (y,))
    assert_close(total(graph), brute(y, after))


def test_state_from_further_back_than_the_history_is_exact() -> None:
    def program(y):
        states = [torch.tensor(0), torch.tensor(0)]
        for t in pyro.markov(range(len(y))):
            probs = 0.5 * TRANSITION[states[-1]] + 0.5 * TRANSITION[states[-2]]
            states.append(pyro.sample(f"z_{t}", dist.Categorical(probs)))
            pyro.sample(f"y_{t}", dist.Normal(LOC[states[-1]], 1.0), obs=y[t])

    y = torch.randn(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        graph = capture(program, (y,))
    out = []
    for path in range(2**7):
        s = [0, 0, *(path >> t & 1 for t in range(7))]
        p = torch.zeros(())
        for t in range(7):
            mixed = 0.5 * TRANSITION[s[t + 1]] + 0.5 * TRANSITION[s[t]]
            p = p + mixed[s[t + 2]].log() + dist.Normal(LOC[s[t + 2]], 1.0).log_prob(y[t])
        out.append(p)
    assert_close(total(graph), torch.stack(out).logsumexp(0))


def test_states_that_share_a_dimension_are_never_mixed_up() -> None:
    def program(y):
        states = [torch.tensor(0)] * 3
        for t in pyro.markov(range(len(y))):
            states.append(pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[states[-1]])))
            pyro.sample(f"y_{t}", dist.Normal(LOC[states[-1]] + LOC[states[-3]], 1.0), obs=y[t])

    with pytest.raises(ProgramError, match=r"site 'y_\d' reads discrete latent 'z_\d', which is out of its sight"):
        refused(program, torch.randn(7))


def test_one_warning_names_the_line_and_the_reason() -> None:
    def program(y):
        z = 0
        for t in pyro.markov(range(len(y))):
            scale = 1.0 if t % 2 else 2.0
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], scale), obs=y[t])

    with pytest.warns(SymhmmWarning, match=r"test_program\.py:\d+.*stacked over time.*truth value") as caught:
        graph = capture(program, (torch.randn(8),))
    assert len(caught) == 1
    assert graph.loops["time"].tier == "stacked"
    assert graph.recipe.tier == "stacked"


def test_a_branch_on_the_first_steps_is_peeled() -> None:
    def program(y):
        z = 0
        for t in pyro.markov(range(len(y))):
            scale = 1.0 if t < 4 else 2.0
            z = pyro.sample(f"z_{t}", dist.Categorical(TRANSITION[z]))
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], scale), obs=y[t])

    y = torch.randn(10)
    graph = capture(program, (y,))
    assert graph.loops["time"].tier == "vector" and graph.recipe.peel > 0
    assert_close(total(graph), total(capture(program, (y,), recipe=Recipe("unrolled"))))
