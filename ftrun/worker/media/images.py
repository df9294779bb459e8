"""Images, through Pillow."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
"""What is opened: pictures of pixels. Pillow would hand some other formats to programs outside it."""

_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""Values of the EXIF tag for orientation that turn an image by a quarter."""


def size(source: str | bytes) -> tuple[int, int]:
    """Return the height and width of an image as it is seen, from its header alone.

    Raises:
        ValueError: It is no image.
    """
    with _opened(source) as image:
        width, height = image.size
        return (width, height) if image.getexif().get(_ORIENTATION) in _LYING else (height, width)


def load(source: str | bytes) -> Image:
    """Return an image in RGB, turned as its camera says.

    Raises:
        ValueError: It is no image, or not a whole one.
    """
    from PIL import ImageOps

    with _opened(source) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@contextmanager
def _opened(source: str | bytes) -> Iterator[Any]:
    """Open an image; whatever Pillow says against it then or later becomes a ValueError."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError("images need the package pillow: pip install pillow") from None
    name = source if isinstance(source, str) else f"{len(source)} bytes"
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            known = [form for form in _FORMATS if form in Image.OPEN]
            opened = Image.open(source if isinstance(source, str) else io.BytesIO(source), formats=known)
            with opened:
                yield opened
    except UnidentifiedImageError:
        raise ValueError(f"no image of a known format ({name})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{error} ({name})") from None
