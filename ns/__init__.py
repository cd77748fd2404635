"""Noisy Student self-training (Xie et al., arXiv:1911.04252) as a library: the method, the loop and the data path."""

__version__ = "0.1.0"
