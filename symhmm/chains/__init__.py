"""The chain operator and its kernels: hidden Markov chains contracted to messages."""
