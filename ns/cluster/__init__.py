"""Kubernetes as its owner sees it: through `kubectl`, with the rights and the context that he has set up."""
