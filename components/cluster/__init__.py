"""What a component needs of the cluster itself, and `ns`, which knows no Kubernetes, cannot hold."""
