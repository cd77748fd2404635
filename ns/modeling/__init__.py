"""Networks: how they are built from timm, kept as safetensors with a manifest, and run over images by one process or several.
It may import `data`, `config`, `storage` and `core`."""
