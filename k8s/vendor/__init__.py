"""Manifests of other projects, rendered once and kept here, so that a deployment fetches nothing but images (README.md)."""
