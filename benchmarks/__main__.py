"""All benchmarks, one after the other: what ``make bench`` runs."""

import torch

from benchmarks import chains, cold, mixed_effects, peers, strategies

chains.main(seconds=5.0, threads=torch.get_num_threads())
print()
peers.main(seconds=1.0, threads=torch.get_num_threads(), sizes=peers.SIZES)
print()
strategies.main(seconds=1.0, threads=1)
print()
mixed_effects.main(steps=300, animals=40, repeats=20, pyro_repeats=1, threads=torch.get_num_threads())
print()
cold.main(None)
