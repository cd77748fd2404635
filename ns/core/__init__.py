"""What all other rooms need: digests, errors, the log, processes, intervals, Prometheus metrics.
It imports nothing else of `ns`, and no library that takes long to load."""
