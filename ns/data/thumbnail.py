"""Pictures in a page: what a browser shows without fetching anything."""

import base64
import io

from PIL import Image


def encode_data_uri(image: Image.Image, largest_px: int) -> str:
    """Small images as they are, and without loss; those with a side above `largest_px` shrunk, in place."""
    sink = io.BytesIO()
    if max(image.size) <= largest_px:
        image.save(sink, "PNG")
        kind = "png"
    else:
        image.thumbnail((largest_px, largest_px))
        image.save(sink, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"
