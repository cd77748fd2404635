#!/usr/bin/env bash
# timm 1.0.31 and Pillow 13.0.0 disagree about posterizing to 0 bits.
#
# timm's RandAugment with "increasing" operations (the policies named rand-…-inc1, as in many published training recipes) maps a large
# magnitude to PIL.ImageOps.posterize(image, 0). Up to Pillow 12 that gives a black image. Pillow 13 raises
# "ValueError: bits must be between or equal to 1 and 8". With magnitude noise (mstd0.5) about one image in 650 of the
# policy rand-m9-mstd0.5-inc1 draws it, so a training ends in its first minutes, at a random image.
#
# Seen with: Python 3.11, timm 1.0.31, torch 2.14.1, torchvision 0.29.1; Pillow 12.3.0 and 13.0.0:
#   Pillow 12.3.0: 0 of 5000 images raise; posterize to 0 bits gives a black image
#   Pillow 13.0.0: 8 of 5000 images raise; bits must be between or equal to 1 and 8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check timm==1.0.31 torch==2.14.1 torchvision==0.29.1 numpy==2.4.6 pillow==12.3.0

cat >"$folder/count.py" <<'PY'
import random

import numpy as np
import PIL
from PIL import Image, ImageOps
from timm.data.auto_augment import rand_augment_transform

image = Image.fromarray(np.random.default_rng(0).integers(1, 256, (32, 32, 3), np.uint8))
random.seed(0)
np.random.seed(0)
transform = rand_augment_transform("rand-m9-mstd0.5-inc1", {})
raised = 0
for _ in range(5000):
    try:
        transform(image)
    except ValueError:
        raised += 1
try:
    extrema = np.asarray(ImageOps.posterize(image, 0)).max()
    posterized = "posterize to 0 bits gives a black image" if extrema == 0 else f"posterize to 0 bits keeps values up to {extrema}"
except ValueError as error:
    posterized = str(error)
print(f"Pillow {PIL.__version__}: {raised} of 5000 images raise; {posterized}")
PY

older=$("$folder/venv/bin/python" "$folder/count.py")
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
newer=$("$folder/venv/bin/python" "$folder/count.py")
printf '%s\n%s\n' "$older" "$newer"
[ "$older" = "Pillow 12.3.0: 0 of 5000 images raise; posterize to 0 bits gives a black image" ]
[ "$newer" = "Pillow 13.0.0: 8 of 5000 images raise; bits must be between or equal to 1 and 8" ]
