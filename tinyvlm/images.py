"""Bytes → RGB under limits → square picture → tensors: the one road of a picture, for training, evaluation and serving.

    bytes ──decode──▶ RGB ──square──▶ S×S picture ──to_jpeg──▶ stored bytes
      │                                    └─for_tower──▶ uint8 (s, s, 3) ──normalise──▶ float32 (N, 3, s, s)
      └───────────────────finish───────────────────────▶ stored bytes, size, fit, hash

`finish` is the short way for millions of pictures: the same steps by the same policy, with JPEGs decoded at a half, a
quarter or an eighth where that is still large enough, and a vectorised bicubic filter.  Its pictures differ from those
of the long way by what the eye does not see; `tests/test_images.py` states how much.

What a picture's bytes mean, once and for all:
- limits on bytes, format and pixels are checked from the header, before any pixel is decoded;
- the EXIF orientation is applied; colour profiles are not: numbers are taken as sRGB;
- CMYK, YCbCr, grey and palette pictures become RGB; transparent ones lie on white, the paper of the web;
- 16-bit samples keep their high byte; 32-bit grey (TIFF) is stretched from its own minimum…maximum to 0…255;
- of an animation, the first frame counts.

S: side of the stored picture, s: side that the vision tower reads, N: pictures.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL import __version__ as pillow_version

from tinyvlm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Fit = Literal["crop", "pad"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAPER = (255, 255, 255)
"""What shows through transparent pixels."""

_SIGNATURES: dict[str, tuple[tuple[int, bytes], ...]] = {
    "JPEG": ((0, b"\xff\xd8\xff"),),
    "PNG": ((0, b"\x89PNG\r\n\x1a\n"),),
    "WEBP": ((8, b"WEBP"),),
    "GIF": ((0, b"GIF87a"), (0, b"GIF89a")),
    "BMP": ((0, b"BM"),),
    "TIFF": ((0, b"II*\x00"), (0, b"MM\x00*"), (0, b"II+\x00"), (0, b"MM\x00+")),
    "AVIF": ((4, b"ftypavif"), (4, b"ftypavis"), (4, b"ftypmif1")),
}
SIGNATURE_BYTES = 16
"""How many first bytes `sniff` needs."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_LYING = (Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90)
"""The turns that swap width and height."""

_KNOWN_PILLOWS = range(11, 14)
"""Major versions of Pillow whose pixels in memory cykooz-resizer 4 reads; with others Pillow filters itself."""

_HASH_SIDE = 32
_HASH_WAVES = range(1, 9)
_HASH_FLOOR = 2.0
"""In grey levels, of a wave of length 1: what is weaker is JPEG noise on a flat area and no feature of the picture."""


class ImageError(DataError):
    """A picture cannot be used; `status` is one of `schema.STATUSES`, `detail` a few words."""

    def __init__(self, status: str, detail: str) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.detail = status, detail


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """The finished picture."""

    size: int = 448
    """Side of the stored square picture, px."""
    tower_size: int = 336
    """Side that the vision tower reads, px."""
    crop_ratio: float = 0.6
    """At this shorter/longer ratio and above the centre is cropped; below, the whole picture is padded with black."""
    jpeg_quality: int = 95
    """Quality of stored pictures, 1 to 95."""

    def __post_init__(self) -> None:
        if self.size < 1 or self.tower_size < 1:
            raise ConfigError(f"picture.size and .tower_size want at least 1, got {self.size} and {self.tower_size}.")
        if not 0.1 <= self.crop_ratio <= 1:  # below, a thin picture's long side would fill the memory before it is cut
            raise ConfigError(f"picture.crop_ratio wants 0.1 to 1, but got {self.crop_ratio}.")
        if not 1 <= self.jpeg_quality <= 95:
            raise ConfigError(f"picture.jpeg_quality wants 1 to 95, but got {self.jpeg_quality}.")

    @property
    def stored(self) -> dict[str, float]:
        """The settings that show in stored pictures; the tower's side does not."""
        return {"size": self.size, "crop_ratio": self.crop_ratio, "jpeg_quality": self.jpeg_quality}


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """What is refused before decoding."""

    max_bytes: int = 20_000_000
    """Largest file, bytes."""
    max_pixels: int = 64_000_000
    """Largest width × height; as RGB it takes three bytes a pixel."""
    min_side: int = 4
    """Smallest shorter side, px; tracking pixels are smaller."""
    formats: tuple[str, ...] = tuple(_SIGNATURES)
    """Pillow names of the allowed formats."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.formats if name not in _SIGNATURES]
        if unknown or not self.formats:
            raise ConfigError(f"limits.formats wants some of {', '.join(_SIGNATURES)}, but got {list(self.formats)}.")


@dataclass(frozen=True)
class Header:
    """What the first bytes of a picture say, before its orientation is applied."""

    format: str
    width: int
    height: int


@dataclass(frozen=True)
class Finished:
    """A picture ready to be stored, and what is known of the file it came from."""

    jpeg: bytes | None
    """The square picture; None if it was only to be checked."""
    format: str
    width: int
    """Of the whole picture, upright, px."""
    height: int
    fit: Fit
    phash: int
    """See `perceptual_hash`."""


def sniff(first_bytes: bytes) -> str | None:
    """The format that the signature in the first `SIGNATURE_BYTES` names, or None."""
    for name, signatures in _SIGNATURES.items():
        if any(first_bytes[at : at + len(mark)] == mark for at, mark in signatures):
            return name
    return None


def probe(data: bytes, limits: LimitConfig) -> Header:
    """Format and size from the header alone.

    Raises:
        ImageError: over a limit, or not a picture of an allowed format.
    """
    image = _open(data, limits)
    return Header(_format(image), image.width, image.height)


def decode(data: bytes, limits: LimitConfig) -> Image.Image:
    """The picture in RGB, upright.

    Raises:
        ImageError: over a limit, not a picture of an allowed format, or damaged.
    """
    return decode_as(data, limits)[1]


def decode_as(data: bytes, limits: LimitConfig) -> tuple[str, Image.Image]:
    """`decode`, and the name of the format that the bytes were in."""
    image = _open(data, limits)
    with _damage(image):
        image.load()
        return _format(image), as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as `decode` gives it: upright, in RGB."""
    turn = _turn(image)
    return _to_rgb(image if turn is None else image.transpose(turn))


def finish(data: bytes, picture: PictureConfig, limits: LimitConfig, *, encode: bool = True) -> Finished:
    """The finished picture straight from the bytes; `encode=False` checks and measures only.

    Raises:
        ImageError: over a limit, not a picture of an allowed format, or damaged.
    """
    image = _open(data, limits)
    width, height = image.size
    # Scaled decoding reads all of the file too, so damage shows. Only JPEGs know it; the others decode whole.
    draft = image.draft(None, _scaled(width, height, picture))
    with _damage(image):
        image.load()
        turn, rgb = _turn(image), _to_rgb(image)
    if draft is None:
        width, height = image.size  # a TIFF has turned itself
    # In floats, because 1/8 of a width need not be whole; and turned last, because then there is little to turn.
    box = draft[1] if draft else (0, 0, width, height)
    small = _resized(rgb, _scaled(width, height, picture), box)
    if turn is not None:
        small = small.transpose(turn)
        width, height = (height, width) if turn in _LYING else (width, height)
    fit = fit_of(width, height, picture)
    jpeg = to_jpeg(_laid(small, fit, picture), picture.jpeg_quality) if encode else None
    return Finished(jpeg, _format(image), width, height, fit, perceptual_hash(small))


def is_finished(data: bytes, picture: PictureConfig) -> bool:
    """Whether a file that can be decoded is a finished picture already: a plain JPEG of just that size."""
    if sniff(data[:16]) != "JPEG":
        return False
    with Image.open(io.BytesIO(data)) as image:
        return image.size == (picture.size, picture.size) and image.mode == "RGB" and not image.getexif()


@functools.cache
def resizer() -> str:
    """What `finish` filters with: "cykooz-resizer", or "pillow" where that is missing or does not know this Pillow.

    The two differ by a few grey levels, so the bytes of finished pictures do: a stage that stores what `finish` made
    puts this word among its fingerprinted settings, or one folder could hold pictures of both kinds.
    """
    if int(pillow_version.partition(".")[0]) not in _KNOWN_PILLOWS:
        return "pillow"
    try:
        import cykooz_resizer  # noqa: F401
    except ImportError:
        return "pillow"
    return "cykooz-resizer"


def fit_of(width: int, height: int, picture: PictureConfig) -> Fit:
    """How a picture of this size becomes square."""
    return "crop" if min(width, height) / max(width, height) >= picture.crop_ratio else "pad"


def square(image: Image.Image, picture: PictureConfig) -> tuple[Image.Image, Fit]:
    """The S×S picture: shorter side to S and the centre cropped, or longer side to S and padded with black."""
    fit = fit_of(*image.size, picture)
    scaled = _scaled(*image.size, picture)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BICUBIC)
    return _laid(image, fit, picture), fit


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes, chroma halved in both directions as is usual, without any comment that the original carried."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, comment=b"")
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that nearly equal pictures nearly share, at whatever size: the signs of its 8×8 slowest cosine waves.

    Flat pictures give 0.  Compare with `hash_distance`.  Source: C. Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions", 2010, with signs instead of comparisons to the median, and a floor.
    """
    side = (_HASH_SIDE, _HASH_SIDE)
    grey = image.resize(side, Image.Resampling.BOX, reducing_gap=2.0).convert("L")
    waves = _cosines() @ np.asarray(grey, dtype=np.float64) @ _cosines().T
    return int.from_bytes(np.packbits(waves > _HASH_FLOOR).tobytes(), "big")


def hash_distance(first: int, second: int) -> int:
    """In how many of their 64 bits two perceptual hashes differ: copies in a few, strangers in about 32."""
    return (first ^ second).bit_count()


def for_tower(image: Image.Image, tower_size: int) -> NDArray[np.uint8]:
    """Pixels uint8 (s, s, 3) of a square picture, as the vision tower's processor wants them."""
    if image.width != image.height or image.mode != "RGB":
        raise ValueError(f"for_tower wants a square RGB picture, got {image.mode} {image.size}; call square() first.")
    if image.width != tower_size:
        image = image.resize((tower_size, tower_size), Image.Resampling.BICUBIC)
    return np.array(image)


def normalise(pixels: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
    """uint8 (N, s, s, 3) → float32 (N, 3, s, s) with CLIP's mean and deviation, on the device of `pixels`."""
    import torch  # here, so that a download worker does not load torch

    values = torch.as_tensor(pixels).permute(0, 3, 1, 2).to(torch.float32).div(255.0)
    mean = torch.tensor(CLIP_MEAN, device=values.device).view(1, 3, 1, 1)
    std = torch.tensor(CLIP_STD, device=values.device).view(1, 3, 1, 1)
    return ((values - mean) / std).contiguous()


def quiet_pillow() -> None:
    """Silence Pillow's warnings about odd files in this process; here they become row statuses."""
    warnings.filterwarnings("ignore", module=r"PIL\..*")


def _open(data: bytes, limits: LimitConfig) -> Image.Image:
    """Open lazily, with every limit checked."""
    if len(data) > limits.max_bytes:
        raise ImageError("too_large", f"{len(data)} bytes, {limits.max_bytes} allowed")
    form = sniff(data[:SIGNATURE_BYTES])
    if form is None:
        raise ImageError("not_image", f"begins with {data[:SIGNATURE_BYTES]!r}")
    if form not in limits.formats:
        raise ImageError("not_image", f"{form} is not allowed")
    try:
        image = Image.open(io.BytesIO(data), formats=[form])
    except Image.DecompressionBombError as error:
        raise ImageError("bomb", str(error).split(",")[0]) from error
    except UnidentifiedImageError as error:
        raise ImageError("corrupt", f"{form}: damaged header") from error
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise ImageError("corrupt", f"{form}: {error}") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise ImageError("bomb", f"{width}×{height}, {limits.max_pixels} pixels allowed")
    if min(width, height) < limits.min_side:
        raise ImageError("too_small", f"{width}×{height}, {limits.min_side} wanted on the shorter side")
    return image


def _format(image: Image.Image) -> str:
    # MPO is a JPEG with more JPEGs behind it.
    return "JPEG" if image.format == "MPO" else str(image.format)


@contextmanager
def _damage(image: Image.Image) -> Iterator[None]:
    """Whatever goes wrong while pixels are decoded is the file's fault."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise ImageError("corrupt", f"{_format(image)}: {error}") from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the picture upright."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        span = max(float(values.max() - values.min()), 1e-9)
        image = Image.fromarray(((values - values.min()) * (255 / span)).round().astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (*PAPER, 255)), layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(width: int, height: int, picture: PictureConfig) -> tuple[int, int]:
    """Size of the whole picture before it is cropped or padded."""
    reference = min(width, height) if fit_of(width, height, picture) == "crop" else max(width, height)
    return max(1, picture.size * width // reference), max(1, picture.size * height // reference)


def _laid(image: Image.Image, fit: Fit, picture: PictureConfig) -> Image.Image:
    """A scaled picture cropped to the square, or laid on it."""
    size, (width, height) = picture.size, image.size
    if fit == "crop":
        # Halves are rounded to even, as torchvision's CenterCrop does, so that published pictures are matched.
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))
    canvas = Image.new("RGB", (size, size))
    canvas.paste(image, ((size - width) // 2, (size - height) // 2))
    return canvas


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[int, int, float, float]) -> Image.Image:
    """`box` of an RGB picture at `size`, by the antialiased bicubic filter, as fast as this machine can."""
    if size == image.size:
        return image
    if resizer() == "pillow":
        return image.resize(size, Image.Resampling.BICUBIC, box)
    import cykooz_resizer as fast  # here, because it may be missing

    options = fast.ResizeOptions(
        fast.ResizeAlg.convolution(fast.FilterType.catmull_rom),  # the bicubic filter under its other name
        use_alpha=False,
        crop_box=fast.CropBox(*box),
    )
    scaled = Image.new("RGB", size)
    fast.Resizer().resize_pil(image, scaled, options)
    return scaled


@functools.cache
def _cosines() -> NDArray[np.float64]:
    """Rows of the orthonormal DCT-II matrix for the waves of the hash: (8, 32)."""
    places, waves = np.arange(_HASH_SIDE), np.array(_HASH_WAVES)[:, None]
    matrix: NDArray[np.float64] = np.cos(math.pi * waves * (2 * places + 1) / (2 * _HASH_SIDE))
    return matrix * math.sqrt(2 / _HASH_SIDE)
