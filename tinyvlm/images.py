"""Bytes → RGB under limits → square picture → tensors: the one road of a picture, for training, evaluation and serving.

    bytes ──decode──▶ RGB ──square──▶ S×S picture ──to_jpeg──▶ stored bytes
                                           └─for_tower──▶ uint8 (s, s, 3) ──normalise──▶ float32 (N, 3, s, s)

What a picture's bytes mean, once and for all:
- limits on bytes, format and pixels are checked from the header, before any pixel is decoded;
- the EXIF orientation is applied; colour profiles are not: numbers are taken as sRGB;
- CMYK, YCbCr, grey and palette pictures become RGB; transparent ones lie on white, the paper of the web;
- 16-bit samples keep their high byte; 32-bit grey (TIFF) is stretched from its own minimum…maximum to 0…255;
- of an animation, the first frame counts.

S: side of the stored picture, s: side that the vision tower reads, N: pictures.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

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
        if not 0 <= self.crop_ratio <= 1:
            raise ConfigError(f"picture.crop_ratio wants 0 to 1, but got {self.crop_ratio}.")
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
    form = _format(image)
    try:
        image.load()
        return form, as_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        raise ImageError("corrupt", f"{form}: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as `decode` gives it: upright, in RGB."""
    return _to_rgb(_upright(image))


def fit_of(width: int, height: int, picture: PictureConfig) -> Fit:
    """How a picture of this size becomes square."""
    return "crop" if min(width, height) / max(width, height) >= picture.crop_ratio else "pad"


def square(image: Image.Image, picture: PictureConfig) -> tuple[Image.Image, Fit]:
    """The S×S picture: shorter side to S and the centre cropped, or longer side to S and padded with black."""
    size, (width, height) = picture.size, image.size
    fit = fit_of(width, height, picture)
    reference = min(width, height) if fit == "crop" else max(width, height)
    new_width, new_height = max(1, size * width // reference), max(1, size * height // reference)
    if (new_width, new_height) != (width, height):
        image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
    if fit == "crop":
        # Halves are rounded to even, as torchvision's CenterCrop does, so that published pictures are matched.
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        return image.crop((left, top, left + size, top + size)), fit
    canvas = Image.new("RGB", (size, size))
    canvas.paste(image, ((size - new_width) // 2, (size - new_height) // 2))
    return canvas, fit


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """JPEG bytes, chroma halved in both directions as is usual."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def perceptual_hash(image: Image.Image) -> int:
    """64 bits that nearly equal pictures nearly share: whether brightness rises from left to right (dHash, 9×8 cells).

    Source: N. Krawetz, "Kind of Like That", 2013.
    """
    cells = np.asarray(image.resize((9, 8), Image.Resampling.BOX).convert("L")).astype(np.int16)
    return int.from_bytes(np.packbits(cells[:, 1:] > cells[:, :-1]).tobytes(), "big")


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


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


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
    return image.convert("RGB")
