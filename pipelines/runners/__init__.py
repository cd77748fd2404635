"""Ways to run a pipeline without Kubeflow: as processes, or as containers, of this machine."""
