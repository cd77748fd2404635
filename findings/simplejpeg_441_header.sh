#!/usr/bin/env bash
# simplejpeg 1.9.0 decodes a 4:4:1 JPEG, but cannot read its header.
#
# In a 4:4:1 JPEG one chroma sample stands for four rows and one column (sampling factors 1 × 4). decode_jpeg gives the same pixels as
# Pillow; decode_jpeg_header, which a data loader calls first to choose a scale, has no name for this subsampling and raises KeyError(6),
# where a broken file gives ValueError. So one valid photograph ends a loader that expects ValueError alone.
#
# Seen with: Python 3.11, simplejpeg 1.9.0, Pillow 13.0.0, numpy 2.4.6:
#   decode_jpeg: (32, 32, 3), differs from Pillow's by at most 0 of 255
#   decode_jpeg_header of 4:4:1: KeyError 6
#   decode_jpeg_header of broken: ValueError …
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check simplejpeg==1.9.0 pillow==13.0.0 numpy==2.4.6

cat >"$folder/read.py" <<'PY'
import io

import numpy as np
import simplejpeg
from PIL import Image

# No encoder at hand writes 4:4:1. At 32 × 32 px, a 4:1:1 file has as many blocks in the same order: only the two factors change places.
rows, columns = np.mgrid[:32, :32].astype(np.uint8)
pixels = np.ascontiguousarray(np.stack([rows * 7, columns * 7, 255 - rows * 4], axis=2))
jpeg = bytearray(simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="411"))
factors = jpeg.index(b"\xff\xc0") + 11
assert jpeg[factors] == 0x41
jpeg[factors] = 0x14
jpeg = bytes(jpeg)

decoded = simplejpeg.decode_jpeg(jpeg)
pillow = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
difference = int(np.abs(decoded.astype(int) - pillow.astype(int)).max())
print(f"decode_jpeg: {decoded.shape}, differs from Pillow's by at most {difference} of 255")
for name, data in (("4:4:1", jpeg), ("broken", b"no JPEG")):
    try:
        print(f"decode_jpeg_header of {name}:", simplejpeg.decode_jpeg_header(data))
    except Exception as error:
        print(f"decode_jpeg_header of {name}:", type(error).__name__, error)
PY

seen=$("$folder/venv/bin/python" "$folder/read.py")
printf '%s\n' "$seen"
grep -q "decode_jpeg_header of 4:4:1: KeyError 6" <<<"$seen"
grep -q "decode_jpeg_header of broken: ValueError" <<<"$seen"
grep -qE "decode_jpeg: \(32, 32, 3\), differs from Pillow's by at most 0 of 255" <<<"$seen"
