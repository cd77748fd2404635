"""The platform on a cluster: manifests for kustomize, and the commands that deploy them (`python -m k8s`, as `make deploy` does)."""
