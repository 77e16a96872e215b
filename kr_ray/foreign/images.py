"""Image files as uint8 pixels. Formats and depths that would need a choice
(a window, a background, a frame) are refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from kr_ray.foreign.files import decoding, decoding_bytes, shown

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Pillow knows forty more, some of which start other programs. MPO comes with JPEG."""
KINDS = ("png", "jpeg", "gif", "tiff", "webp")
"""BMP and the PPM family have signatures of one or two letters; what
is wrong with them is told as for other bytes."""
GREY_MODES = frozenset({"1", "L", "LA"})
COLOUR_MODES = frozenset({"RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "RGBX"})
MUST = "must be a readable image"
TIFF_BITS_PER_SAMPLE = 258
MOST_PIXELS = 2**27
"""Of one file: a small one can claim so many that decoding it takes all memory."""


def read_image(file: Path, error: type[Exception]) -> NDArray[np.uint8]:
    """One image, turned as its EXIF tag says: uint8 [H, W] or [H, W, 3].

    Raises:
        error: no image, or one that is not opaque, single and of 8 bits per channel.
    """
    with decoding(file, MUST, KINDS, error, "repair or remove the file"), file.open("rb") as opened:
        return _read(opened, f"`{shown(file)}`", error)


def read_image_bytes(data: bytes, origin: str, error: type[Exception]) -> NDArray[np.uint8]:
    """The same of a file's bytes that lie in something else; `origin` says where.

    Raises:
        error: see `read_image`.
    """
    with decoding_bytes(data, origin, MUST, error, "write it again"):
        return _read(io.BytesIO(data), origin, error)


def _read(opened: IO[bytes], name: str, error: type[Exception]) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        return _pixels(opened, name, error)
    except Image.DecompressionBombError as cause:  # of no base but Exception
        raise error(
            f"{name} must have at most {MOST_PIXELS:,} pixels, but claims many more; cut or shrink it"
        ) from cause


def _pixels(opened: IO[bytes], name: str, error: type[Exception]) -> NDArray[np.uint8]:
    from PIL import Image, ImageOps

    with Image.open(opened, formats=FORMATS) as image:
        _check_size(image.width, image.height, name, error)
        bits, mode = _bits_per_channel(image), image.mode
        if bits > 8 or mode not in GREY_MODES | COLOUR_MODES:
            # 16-bit and float images need a window (which values become black
            # and white), which is the user's to choose.
            found = f"{bits} bits" if mode in GREY_MODES | COLOUR_MODES else f"mode {mode}"
            raise error(
                f"{name} must have 8 bits per channel, grey or RGB, but got {found}; scale and convert it"
            )
        # Phones write .jpg files whose further frames (format MPO) are previews of the first.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        turned: Any = ImageOps.exif_transpose(image)
        has_alpha = mode in ("LA", "PA", "RGBA") or "transparency" in turned.info
        opaque = not has_alpha or turned.convert("RGBA").getextrema()[3][0] == 255
        pixels: NDArray[np.uint8] = np.array(turned.convert("L" if mode in GREY_MODES else "RGB"))
    if frames != 1 or not opaque:
        raise error(
            f"{name} must be one opaque image, but got {frames} "
            f"frame(s){'' if opaque else ', transparent'}; flatten or remove it"
        )
    return pixels


def _check_size(width: int, height: int, name: str, error: type[Exception]) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise error(
            f"{name} must have 1 to {MOST_PIXELS:,} pixels, but got {width} x {height}; cut or shrink it"
        )


def _bits_per_channel(image: Any) -> int:
    """As the file holds them. Pillow turns colour of 16 bits to 8 by
    leaving out the low byte, and says nothing."""
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(TIFF_BITS_PER_SAMPLE, (1,))))
    arguments = image.tile[0].args if image.tile else ""
    if image.format == "PPM":
        most = arguments[-1] if isinstance(arguments, tuple) and isinstance(arguments[-1], int) else 255
        return int(most).bit_length()
    return 16 if ";16" in str(arguments) else 8
