#!/usr/bin/env bash
# torch 2.14.1: of two networks that each only ever see one size of images, torch.compile makes the second one for any size.
#
# torch.compile fixes the sizes of what a network sees first, and makes code for any size once the same network sees another one. But it
# remembers sizes by the code that runs, and two networks of one class, such as torch.nn.Sequential, run the same code. So in a process that
# uses two networks (a teacher and a student, members of an ensemble) at different resolutions, the second one gets code for any size, though
# its own never changes. Measured with ResNet-18 (64 px, bfloat16, two cores): its fused loops take a fifth longer, a pass 3 %. dynamic=False
# gives both fixed sizes.
#
# Seen with: Python 3.11, torch 2.14.1, Linux:
#   default: the first network has fixed sizes, the second any
#   dynamic=False: the first network has fixed sizes, the second fixed
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.4.6

cat >"$folder/compile_two.py" <<'PY'
import torch
from torch import nn


def describe_sizes(pixels, **options):
    """How the graph of a new network treats the size of its only images."""
    found = []

    def backend(graph, inputs):
        found.append("any" if any(isinstance(value, torch.SymInt) for value in inputs) else "fixed")
        return graph

    network = torch.compile(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), backend=backend, **options)
    with torch.inference_mode():
        for _ in range(3):
            network(torch.rand(4, 3, pixels, pixels))
    return " and ".join(found)


for name, options in (("default", {}), ("dynamic=False", {"dynamic": False})):
    torch.compiler.reset()
    first, second = describe_sizes(16, **options), describe_sizes(24, **options)
    print(f"{name}: the first network has {first} sizes, the second {second}")
PY

seen=$("$folder/venv/bin/python" "$folder/compile_two.py")
printf '%s\n' "$seen"
[ "$seen" = "default: the first network has fixed sizes, the second any
dynamic=False: the first network has fixed sizes, the second fixed" ]
