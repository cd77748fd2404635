"""The platform on a cluster: manifests for kustomize, and what deploys them (`python -m k8s`, which `make deploy` calls)."""
