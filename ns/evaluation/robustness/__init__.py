"""Accuracy under corruptions, perturbations and attacks, measured here or read from published sets.
It may import the rest of `evaluation`, and what is below it."""
