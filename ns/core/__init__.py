"""What all other packages need: digests, errors, the log, processes, intervals, Prometheus metrics.
It imports nothing else of `ns`, and no library that takes long to load."""
