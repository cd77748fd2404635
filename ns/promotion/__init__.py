"""The model in use, as a file in git: which run it is from, why, and how to change it.
It may import `reporting`, `runs`, and what is below them."""
