"""The model in use, as a file in git: which run it is from, why, and how to change it."""
