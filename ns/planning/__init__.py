"""What a run of an experiment will take: counts from its configuration, and a short measurement of this machine."""
