"""What everything else stands on: digests, errors, the log, processes, intervals, metrics of Prometheus.
It may import nothing of `ns`, and no library that takes a while to load."""
