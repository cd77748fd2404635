"""Networks: built from timm, kept as safetensors with a manifest, run over images in a precision, by one process or several.
It may import `data`, `config`, `storage` and `core`."""
