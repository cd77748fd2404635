"""A contact sheet: pictures of a dataset in one HTML file that needs no other files."""

import base64
import html
import io

import numpy as np
from PIL import Image

from ns.core.errors import NsError
from ns.data.dataset import Dataset
from ns.data.loading.shard_reader import ImageSource
from ns.storage import Store

THUMBNAIL_PX = 128
POLICY = (
    """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
)
STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif }
body { margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem }
h2 { font-size: 1rem; margin: 1.5rem 0 .5rem }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem }
figure { margin: 0; overflow-wrap: anywhere; font-size: .75rem }
img { display: block; width: 100%; image-rendering: pixelated; border-radius: .25rem }
img.large { image-rendering: auto }
"""


def render_contact_sheet(store: Store, dataset: Dataset, image_count: int, seed: int) -> str:
    """HTML with about `image_count` images, drawn at random from at most 16 shards, equally many per class if there are classes.

    In place of an unreadable image, the reason is shown.
    """
    source = ImageSource(store, dataset)
    rng = np.random.default_rng(seed)
    groups: dict[str, list[tuple[int, int]]] = {}
    # A few shards are enough: the sheet of a large dataset should not read all of it.
    shards = sorted(rng.permutation(len(dataset.shards))[:16].tolist())
    for shard in shards:
        rows = rng.permutation(dataset.shards[shard].samples)
        class_ids = source.read_class_ids(shard, len(dataset.classes)) if dataset.classes else None
        for row in rows.tolist():
            name = dataset.classes[int(class_ids[row])] if class_ids is not None else ""
            groups.setdefault(name, []).append((shard, row))
    parts = [
        f"<p>{dataset.samples:,} images in {len(dataset.shards)} shards, {dataset.rejected:,} left out · {html.escape(dataset.digest)}</p>"
    ]
    per_class = max(1, image_count // max(1, len(groups)))
    for name in sorted(groups, key=lambda name: dataset.classes.index(name) if name else -1):
        locations = groups[name]
        shown = sorted(locations[at] for at in rng.permutation(len(locations))[:per_class])
        heading = f"<h2>{html.escape(name)}</h2>" if name else ""
        parts.append(f'{heading}<div class="sheet">{"".join(_render_figure(source, *location) for location in shown)}</div>')
    title = html.escape(dataset.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"{POLICY}<title>{title}</title><style>{STYLE}</style><h1>{title} <small>({dataset.role})</small></h1>{''.join(parts)}</html>"
    )


def encode_data_uri(image: Image.Image, largest_px: int) -> str:
    """The image as a `data:` URI: as PNG, or as JPEG, shrunk in place, if a side is longer than `largest_px`."""
    sink = io.BytesIO()
    if max(image.size) <= largest_px:
        image.save(sink, "PNG")
        kind = "png"
    else:
        image.thumbnail((largest_px, largest_px))
        image.save(sink, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def _render_figure(source: ImageSource, shard: int, row: int) -> str:
    key = html.escape(source.read_index(shard).keys[row])
    try:
        pixels = source.read_pixels(shard, row)
    except NsError as error:
        return f"<figure>{html.escape(str(error))}</figure>"
    picture = Image.fromarray(pixels)
    size = f"{picture.width} × {picture.height}"
    large = max(picture.size) > THUMBNAIL_PX
    img = f'<img alt="{key}" class="{"large" if large else "small"}" src="{encode_data_uri(picture, THUMBNAIL_PX)}">'
    return f"<figure>{img}<figcaption>{key}<br>{size}</figcaption></figure>"
