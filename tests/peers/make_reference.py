"""Make ``reference.json``: what Dynamax and hmmlearn say about three hidden Markov models, in double precision.

Run in an environment with both of them, which the tests do not need:

    pip install dynamax hmmlearn
    python tests/peers/make_reference.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
from dynamax.hidden_markov_model import inference  # noqa: E402
from hmmlearn.hmm import CategoricalHMM, GaussianHMM  # noqa: E402

random = np.random.default_rng(0)


def rows(*shape: int) -> np.ndarray:
    """Probabilities along the last dimension."""
    return random.dirichlet(np.ones(shape[-1]), shape[:-1])


def dynamax(initial: np.ndarray, transition: np.ndarray, log_likelihood: np.ndarray) -> dict[str, object]:
    """Filter, one-step predictions, smoothing, pairs of states and the best path."""
    arrays = [jnp.asarray(x) for x in (initial, transition, log_likelihood)]
    forward, both = inference.hmm_filter(*arrays), inference.hmm_two_filter_smoother(*arrays)
    matrices = np.broadcast_to(transition, (len(log_likelihood) - 1, *transition.shape[-2:]))
    # p(z_t, z_{t+1} | y) from filtered, predicted and smoothed probabilities (Murphy 2012, eq. 17.67).
    filtered, predicted, smoothed = (
        np.asarray(x) for x in (forward.filtered_probs, forward.predicted_probs, both.smoothed_probs)
    )
    pairs = filtered[:-1, :, None] * matrices * (smoothed[1:] / predicted[1:])[:, None, :]
    return {
        "log_likelihood": float(forward.marginal_loglik),
        "filtered": filtered.tolist(),
        "predicted": predicted.tolist(),
        "smoothed": smoothed.tolist(),
        "pairs": pairs.tolist(),
        "best": np.asarray(inference.hmm_posterior_mode(*arrays)).tolist(),
    }


def gaussian(steps: int, states: int, varying: bool) -> dict[str, object]:
    """Normal observations; the transition matrix of each step its own if ``varying``, which hmmlearn does not have."""
    mean, sd = np.linspace(-1.5, 1.5, states), random.uniform(0.5, 1.5, states)
    initial = rows(states)
    transition = rows(steps - 1, states, states) if varying else rows(states, states)
    y = random.normal(mean[random.integers(states, size=steps)], 1.0)
    terms = -0.5 * ((y[:, None] - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)
    case = {"mean": mean.tolist(), "sd": sd.tolist(), "initial": initial.tolist(), "transition": transition.tolist(),
            "y": y.tolist(), "dynamax": dynamax(initial, transition, terms)}  # fmt: skip
    if not varying:
        peer = GaussianHMM(states, "diag")
        peer.startprob_, peer.transmat_, peer.means_, peer.covars_ = (
            initial,
            transition,
            mean[:, None],
            sd[:, None] ** 2,
        )
        case["hmmlearn"] = hmmlearn(peer, y[:, None])
    return case


def categorical(steps: int, states: int, symbols: int) -> dict[str, object]:
    """Counted observations."""
    emission, initial, transition = rows(states, symbols), rows(states), rows(states, states)
    y = random.integers(symbols, size=steps)
    peer = CategoricalHMM(states)
    peer.startprob_, peer.transmat_, peer.emissionprob_ = initial, transition, emission
    return {"emission": emission.tolist(), "initial": initial.tolist(), "transition": transition.tolist(), "y": y.tolist(),
            "dynamax": dynamax(initial, transition, np.log(emission[:, y].T)),
            "hmmlearn": hmmlearn(peer, y[:, None])}  # fmt: skip


def hmmlearn(peer: object, y: np.ndarray) -> dict[str, object]:
    """Log-likelihood, smoothing and the best path with its score."""
    score, best = peer.decode(y)
    return {"log_likelihood": float(peer.score(y)), "smoothed": peer.predict_proba(y).tolist(),
            "best": best.tolist(), "best_score": float(score)}  # fmt: skip


if __name__ == "__main__":
    found = {
        "made_with": {n: version(n) for n in ("dynamax", "jax", "hmmlearn")},
        "normal": gaussian(40, 3, varying=False),
        "normal, transitions of each step": gaussian(25, 4, varying=True),
        "categorical": categorical(30, 2, 5),
    }
    Path(__file__).with_name("reference.json").write_text(json.dumps(found) + "\n")
