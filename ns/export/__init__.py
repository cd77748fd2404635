"""Models for other programs: timm checkpoints, ONNX, torch.export.
It may import `labeling`, `evaluation`, `modeling`, and what is below them; not `runs`."""
