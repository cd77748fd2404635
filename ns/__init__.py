"""Noisy Student self-training (Xie et al., arXiv:1911.04252) as a library: the method, the loop and the data path."""

import os

__version__ = "0.1.0"

# OpenMP's threads spin while they wait. With a data loader, a second task, or a neighbor on the same cores that costs a
# factor of ten (measured: 72 s for 8.5 s of training). Has to be said before torch is loaded; the user's word goes first.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
