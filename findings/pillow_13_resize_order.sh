#!/usr/bin/env bash
# Pillow 13.0.0 resizes tall images by their height first; up to 12.3.0 the width always came first.
#
# A resize is two passes, and the first one rounds to 8 bits. So the same tall image gives other pixels after an update of Pillow, and
# evaluations, embeddings and checksums of resized images that were made by one version cannot be compared with the other's to the last
# digit; with one call for the width and one for the height, they can.
#
# Seen with: Python 3.11, numpy 2.4.6, bicubic, 208 × 309 px → 299 × 299 px:
#   tall noise: at most 21 of 255, in 31 % of the values
#   wide noise: at most 0 of 255, in 0 % of the values
#   width first: at most 0 of 255, in 0 % of the values      (13.0.0 in two calls, the width in the first one)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 12.3.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check pillow==$version numpy==2.4.6
done

cat >"$folder/resize.py" <<'PY'
import sys

import numpy as np
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, (309, 208, 3), np.uint8)
tall, wide = Image.fromarray(noise), Image.fromarray(np.ascontiguousarray(noise.transpose(1, 0, 2)))
bicubic = Image.Resampling.BICUBIC
np.savez(
    sys.argv[1],
    tall=np.asarray(tall.resize((299, 299), bicubic)),
    wide=np.asarray(wide.resize((299, 299), bicubic)),
    across=np.asarray(tall.resize((299, 309), bicubic).resize((299, 299), bicubic)),
)
PY
cat >"$folder/compare.py" <<'PY'
import sys

import numpy as np

before, after = (np.load(path) for path in sys.argv[1:])
for title, old, new in (("tall noise", "tall", "tall"), ("wide noise", "wide", "wide"), ("width first", "tall", "across")):
    difference = np.abs(before[old].astype(int) - after[new].astype(int))
    print(f"{title}: at most {difference.max()} of 255, in {100 * (difference > 0).mean():.0f} % of the values")
PY
for version in 12.3.0 13.0.0; do "$folder/$version/bin/python" "$folder/resize.py" "$folder/$version.npz"; done
seen=$("$folder/13.0.0/bin/python" "$folder/compare.py" "$folder/12.3.0.npz" "$folder/13.0.0.npz")
printf '%s\n' "$seen"
grep -qE "tall noise: at most [1-9]" <<<"$seen"
grep -qF "wide noise: at most 0 of 255" <<<"$seen"
grep -qF "width first: at most 0 of 255" <<<"$seen"
