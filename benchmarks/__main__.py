"""All benchmarks, one after the other: what ``make bench`` runs."""

import torch

from benchmarks import chains, mixed_effects

chains.main(seconds=5.0, threads=torch.get_num_threads())
print()
mixed_effects.main(steps=300, animals=40, repeats=20, pyro_repeats=1, threads=torch.get_num_threads())
