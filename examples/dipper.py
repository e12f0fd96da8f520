"""Do dippers survive floods, and how many of them are overlooked?  Survival of marked birds that are not always seen.

A bird that was alive at occasion t is alive at t + 1 with probability phi_t, and seen then with probability p_{t+1}:

    alive_{t+1} ~ Bernoulli(phi_t alive_t),   seen_{t+1} ~ Bernoulli(p_{t+1} alive_{t+1}),

from its first capture on (Cormack, Jolly and Seber). Whether a bird that is not seen any more is dead or was overlooked is
summed out. Four models let phi and p change or not, and AIC compares them. Without --data the histories are simulated, with
lower survival over two of six intervals. Data: 294 European dippers, 1981-1987 (Lebreton et al. 1992). Run as

    python examples/dipper.py --data dipper.csv
"""

import argparse

import torch

import symhmm
from symhmm.models import CormackJollySeber
from symhmm.simulators import simulate_captures
from symhmm.tables.data import SequenceData


def load(path: str) -> tuple[SequenceData, list[str]]:
    import pandas as pd

    table = pd.read_csv(path)
    years = [c for c in table.columns if c.startswith("y19")]
    data = SequenceData.from_tensors(
        {"seen": torch.tensor(table[years].to_numpy().T, dtype=torch.float64)}, ids=table["id"]
    )
    return data, [y[1:] for y in years]


def fit_all(data: SequenceData) -> dict[str, symhmm.Fit]:
    fits = {}
    for survival in ("constant", "time"):
        for capture in ("constant", "time"):
            name = f"phi({'t' if survival == 'time' else '.'}) p({'t' if capture == 'time' else '.'})"
            fits[name] = CormackJollySeber(survival, capture).fit(data, restarts=1)
    return fits


def main(path: str, birds: int) -> None:
    torch.set_default_dtype(torch.float64)
    if path:
        data, years = load(path)
    else:
        floods = torch.tensor([0.6, 0.3, 0.3, 0.6, 0.6, 0.6])
        data, years = simulate_captures(birds, 7, floods, 0.9, seed=1)[0], [f"year {t}" for t in range(7)]
    print(CormackJollySeber().program_source())

    fits = fit_all(data)
    best = min(f.aic for f in fits.values())
    print("model          log-likelihood     AIC   difference")
    for name, fit in sorted(fits.items(), key=lambda item: item[1].aic):
        print(f"{name:14s} {fit.objective:14.4f} {fit.aic:7.2f} {fit.aic - best:12.2f}")

    print("\nsurvival from              estimate   95% interval")
    for row, a, b in zip(fits["phi(t) p(.)"].fixed_effects().rows, years, years[1:], strict=False):
        print(f"{a} to {b:17s} {row[1]:9.3f}   {row[3]:.3f} to {row[4]:.3f}")
    seen = fits["phi(.) p(.)"].fixed_effects().rows[1]
    print(f"\nA living bird is seen with probability {seen[1]:.3f} ({seen[3]:.3f} to {seen[4]:.3f}).")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="dipper.csv; simulated birds without it")
    parser.add_argument("--birds", type=int, default=300, help="how many to simulate")
    parser.add_argument("--smoke", action="store_true", help="few birds")
    options = parser.parse_args()
    main(options.data, 100 if options.smoke else options.birds)
