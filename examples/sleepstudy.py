"""How much does a lack of sleep slow people down, and how much do they differ in that?  The limit without hidden states.

Eighteen people slept three hours a night for ten days, and their reaction times were measured (Belenky et al. 2003):

    y_{i,d} ~ Normal(a_i + b_i d, sd),   (a_i, b_i) ~ Normal((a, b), Sigma).

The intercepts and slopes of people are random effects, integrated exactly, as lme4 does for ``Reaction ~ Days + (Days |
Subject)``: its log-likelihood is -875.9697. Without --data people are simulated. Run as

    python examples/sleepstudy.py --data sleepstudy.csv
"""

import argparse

import torch

from symhmm.models import HierarchicalRegression
from symhmm.simulators import simulate_regression


def main(path: str, people: int) -> None:
    torch.set_default_dtype(torch.float64)
    if path:
        import pandas as pd

        table = pd.read_csv(path)
        model = HierarchicalRegression("Reaction ~ Days + (Days | Subject)")
    else:
        table, _ = simulate_regression(people, 10, torch.tensor([2.0, 0.5]), spread=torch.tensor([1.0, 0.3]), seed=1)
        model = HierarchicalRegression("y ~ x1 + (x1 | id)")
    print(model.program_source())

    fit = model.fit(table)
    print(fit.summary())
    effects = fit.random_effects()
    slopes = [row for row in effects.rows if not row[0].endswith("Intercept")]
    common = fit.fixed_effects()["estimate"][1]
    print(f"\nslope of each, {common:.2f} for a typical one: estimate and 95% interval")
    for name, estimate, _, low, high, *_ in sorted(slopes, key=lambda row: row[1]):
        print(f"{name:12s} {common + estimate:7.2f}   {common + low:7.2f} to {common + high:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="sleepstudy.csv; simulated people without it")
    parser.add_argument("--people", type=int, default=18, help="how many to simulate")
    parser.add_argument("--smoke", action="store_true", help="few people")
    options = parser.parse_args()
    main(options.data, 6 if options.smoke else options.people)
