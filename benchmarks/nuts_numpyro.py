"""The other side of `benchmarks.nuts`: the same posterior in NumPyro, with a hand-written forward pass. Needs no symhmm.

Non-centred effects, one jitted scan over the steps for all individuals, NumPyro's own defaults. Writes its draws and its
CPU seconds to a file.
"""

import argparse
import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.infer import MCMC, NUTS, init_to_value


def model(y):
    """Three states, random intercepts on all six transition logits; ``y`` has shape (individuals, steps)."""
    n = y.shape[0]
    loc = numpyro.sample("loc", dist.Normal(jnp.array([-2.0, 0.0, 2.0]), 2.0).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(jnp.zeros(3), 0.5).to_event(1))
    beta = numpyro.sample("beta", dist.Normal(-2 * jnp.ones(6), 1.5).to_event(1))
    sd = numpyro.sample("sd", dist.HalfNormal(jnp.ones(6)).to_event(1))
    with numpyro.plate("individual", n):
        eps = numpyro.sample("eps", dist.Normal(jnp.zeros(6), 1.0).to_event(1))
    b = numpyro.deterministic("b", beta + sd * eps)
    zero = jnp.zeros(n)
    rows = [[zero, b[:, 0], b[:, 1]], [b[:, 2], zero, b[:, 3]], [b[:, 4], b[:, 5], zero]]
    move = jax.nn.log_softmax(jnp.stack([jnp.stack(r, -1) for r in rows], -2), -1)
    emission = dist.Normal(loc, scale).log_prob(y[..., None])

    def forward(alpha, e):
        return logsumexp(alpha[:, :, None] + move, axis=1) + e, None

    alpha, _ = jax.lax.scan(forward, emission[:, 0] - jnp.log(3.0), emission[:, 1:].swapaxes(0, 1))
    numpyro.factor("y", logsumexp(alpha, -1).sum())


def main(data: str, out: str, chains: int, tune: int, draws: int, seed: int) -> None:
    """Run the chains one after the other on one core."""
    y = jnp.asarray(np.load(data))
    # Started in the middle of its priors, with the states apart, which is where symhmm's program starts too. From starts of
    # its own, some chains stay in a permutation of the states and no two can be compared.
    middle = {
        "loc": jnp.array([-2.0, 0.0, 2.0]), "scale": jnp.ones(3), "beta": -2 * jnp.ones(6), "sd": jnp.ones(6),
        "eps": jnp.zeros((len(y), 6)),
    }  # fmt: skip
    kernel = NUTS(model, init_strategy=init_to_value(values=middle))
    mcmc = MCMC(
        kernel, num_warmup=tune, num_samples=draws, num_chains=chains, chain_method="sequential", progress_bar=False
    )
    begun, wall = time.process_time(), time.perf_counter()
    mcmc.run(jax.random.PRNGKey(seed), y, extra_fields=("num_steps", "diverging"))
    samples = {k: np.asarray(v) for k, v in mcmc.get_samples(group_by_chain=True).items() if k != "eps"}
    seconds, wall = time.process_time() - begun, time.perf_counter() - wall
    extra = mcmc.get_extra_fields()
    np.savez(out, seconds=seconds, wall=wall, gradients=int(extra["num_steps"].sum()),
             diverging=int(extra["diverging"].sum()), **samples)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("data", "out"):
        parser.add_argument(name)
    for name, default in (("chains", 2), ("tune", 500), ("draws", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--x64", action="store_true")
    options = parser.parse_args()
    if options.x64:
        numpyro.enable_x64()
    main(options.data, options.out, options.chains, options.tune, options.draws, options.seed)
