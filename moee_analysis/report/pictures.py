"""Pictures of pages and panels: small enough to carry, and in an address."""

import base64
import io
from typing import Any

from PIL import Image


def shrink(image: Image.Image, side: int, **options: Any) -> bytes:
    """``image`` in a file, with no side above ``side`` pixels; ``options`` are Pillow's."""
    buffer = io.BytesIO()
    image.thumbnail((side, side))
    image.save(buffer, **options)
    return buffer.getvalue()


def data_uri(picture: bytes, kind: str = "png") -> str:
    """``picture`` as an address that carries it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
