"""A contact sheet: what a dataset looks like, as one HTML file that needs nothing else."""

import html

import numpy as np
from PIL import Image

from ns.core.errors import NsError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.data.thumbnail import data_uri
from ns.storage import Store

THUMBNAIL_PX = 128
STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem }
figure { margin: 0; overflow-wrap: anywhere; font-size: .75rem }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: .25rem }
img.large { image-rendering: auto }
"""


def write_sheet(folder: Store, data: Dataset, images: int, seed: int) -> str:
    """HTML with about `images` images, drawn at random from all shards; as many of each class where there are classes.

    An image that cannot be read is shown by its reason.
    """
    source = ImageSource(folder, data)
    rng = np.random.default_rng(seed)
    groups: dict[str, list[tuple[int, int]]] = {}
    # A few shards say enough, and a sheet of a large dataset should not read all of it.
    chosen = sorted(rng.permutation(len(data.shards))[: max(1, min(len(data.shards), 16))].tolist())
    for shard in chosen:
        rows = rng.permutation(data.shards[shard].samples)
        labels = source.labels(shard, len(data.classes)) if data.classes else None
        for row in rows.tolist():
            name = data.classes[int(labels[row])] if labels is not None else ""
            groups.setdefault(name, []).append((shard, row))
    parts = [
        f"<p>{data.samples:,} images in {len(data.shards)} shards, {data.rejected:,} left out · {html.escape(data.digest)}</p>"
    ]
    each = max(1, images // max(1, len(groups)))
    for name in sorted(groups, key=lambda name: data.classes.index(name) if name else -1):
        places = groups[name]
        # From all shards that were looked at, not from the first.
        shown = sorted(places[at] for at in rng.permutation(len(places))[:each])
        heading = f"<h2>{html.escape(name)}</h2>" if name else ""
        parts.append(f'{heading}<div class="sheet">{"".join(_figure(source, *place) for place in shown)}</div>')
    title = html.escape(data.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title} <small>({data.role})</small></h1>{''.join(parts)}</html>"
    )


def _figure(source: ImageSource, shard: int, row: int) -> str:
    key = html.escape(source.index(shard).keys[row])
    try:
        pixels = source.pixels(shard, row)
    except NsError as error:
        return f"<figure>{html.escape(str(error))}</figure>"
    picture = Image.fromarray(pixels)
    size = f"{picture.width} × {picture.height}"
    large = max(picture.size) > THUMBNAIL_PX
    shown = f'<img alt="{key}" class="{"large" if large else "small"}" src="{data_uri(picture, THUMBNAIL_PX)}">'
    return f"<figure>{shown}<figcaption>{key}<br>{size}</figcaption></figure>"
