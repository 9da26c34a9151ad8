"""Pictures: the crop and pad rule, limits before decoding, and the written policy for odd formats."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tinyvlm import images, schema
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.images import ImageError, LimitConfig, PictureConfig

LIMITS = LimitConfig()
PICTURE = PictureConfig()


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A real, tiny PNG file whose header promises width × height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 99)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def status_of(data: bytes, limits: LimitConfig = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        images.decode(data, limits)
    assert isinstance(caught.value, DataError)
    assert caught.value.status in schema.STATUSES
    return caught.value.status


# The published rule: (width, height) → fit, size of the scaled picture, where it lies (crop: cut off; pad: offset).
VECTORS = [
    ((500, 500), "crop", (448, 448), (0, 0)),
    ((1000, 600), "crop", (746, 448), (149, 0)),
    ((1000, 599), "pad", (448, 268), (0, 90)),
    ((600, 1000), "crop", (448, 746), (0, 149)),
    ((640, 427), "crop", (671, 448), (112, 0)),
    ((1920, 1080), "pad", (448, 252), (0, 98)),
    ((1080, 1920), "pad", (252, 448), (98, 0)),
    ((400, 100), "pad", (448, 112), (0, 168)),
    ((333, 517), "crop", (448, 695), (0, 124)),
    ((1, 1), "crop", (448, 448), (0, 0)),
]


@pytest.mark.parametrize(("source", "fit", "scaled", "offset"), VECTORS)
def test_square_follows_the_published_rule(
    source: tuple[int, int], fit: str, scaled: tuple[int, int], offset: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(1, 256, (source[1], source[0], 3), dtype=np.uint8))
    result, how = images.square(image, PICTURE)
    whole = image.resize(scaled, Image.Resampling.BICUBIC)
    if fit == "crop":
        expected = whole.crop((offset[0], offset[1], offset[0] + 448, offset[1] + 448))
    else:
        expected = Image.new("RGB", (448, 448))
        expected.paste(whole, offset)
    assert (how, result.size) == (fit, (448, 448))
    assert np.array_equal(np.array(result), np.array(expected))


@pytest.mark.parametrize("size", [(3000, 4), (4, 3000), (3000, 1)])
def test_very_thin_pictures_become_a_line_on_black(size: tuple[int, int]) -> None:
    result, how = images.square(Image.new("RGB", size, "white"), PICTURE)
    pixels = np.array(result)
    assert how == "pad"
    assert (pixels == 255).all(axis=2).sum() == 448
    assert (pixels == 0).all(axis=2).sum() == 448 * 447


def test_a_thin_file_is_no_error() -> None:
    assert images.decode(encode(Image.new("RGB", (3000, 4)), "PNG"), LIMITS).size == (3000, 4)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(form: str) -> None:
    data = encode(Image.new("RGB", (20, 10), (200, 40, 40)), form)
    assert images.probe(data, LIMITS) == images.Header(form, 20, 10)
    name, image = images.decode_as(data, LIMITS)
    assert (name, image.mode, image.size) == (form, "RGB", (20, 10))
    assert np.abs(np.array(image).astype(int) - (200, 40, 40)).max() <= 6


def test_limits_are_checked_before_decoding() -> None:
    picture = encode(Image.new("RGB", (40, 30)), "PNG")
    assert status_of(png_header(50_000, 50_000)) == "bomb"
    assert status_of(png_header(9_000, 9_000)) == "bomb"
    assert status_of(picture, LimitConfig(max_pixels=1199)) == "bomb"
    assert status_of(picture, LimitConfig(max_bytes=len(picture) - 1)) == "too_large"
    assert status_of(picture, LimitConfig(min_side=31)) == "too_small"
    assert status_of(picture, LimitConfig(formats=("JPEG",))) == "not_image"
    assert images.decode(picture, LimitConfig(max_pixels=1200, max_bytes=len(picture), min_side=30)).size == (40, 30)


def test_bytes_that_are_no_picture_differ_from_damaged_pictures() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    jpeg = encode(Image.fromarray(noise), "JPEG")
    for data in (b"", b"<!doctype html><title>gone</title>", b"%PDF-1.7 and so on", b"%!PS-Adobe-3.0 EPSF-3.0"):
        assert status_of(data) == "not_image"
    assert status_of(jpeg[: len(jpeg) // 2]) == "corrupt"
    assert status_of(jpeg[:30]) == "corrupt"
    assert status_of(b"GIF89a" + b"\xff" * 40) == "corrupt"
    assert status_of(png_header(40, 40)) == "corrupt"


def test_transparent_pixels_show_white_paper() -> None:
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    rgba.putpixel((0, 0), (0, 0, 255, 255))
    rgba.putpixel((1, 0), (0, 0, 0, 128))
    pixels = np.array(images.decode(encode(rgba, "PNG"), LIMITS))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[0, 1].tolist() == [127, 127, 127]
    assert pixels[5, 5].tolist() == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    pixels = np.array(images.decode(encode(palette, "GIF", transparency=1), LIMITS))
    assert (pixels[0, 0].tolist(), pixels[5, 5].tolist()) == ([10, 20, 30], [255, 255, 255])
    grey = encode(Image.new("LA", (8, 8), (0, 0)), "PNG")
    assert np.array(images.decode(grey, LIMITS)).min() == 255


def test_orientation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "white")
    image.paste((255, 0, 0), (0, 0, 4, 8))
    turned = [(1, (16, 8), (1, 4)), (6, (8, 16), (4, 1)), (8, (8, 16), (4, 14)), (3, (16, 8), (14, 4))]
    for orientation, size, red_at in turned:
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if form == "WEBP" else {}
            upright = images.decode(encode(image, form, exif=exif, **options), LIMITS)
            assert upright.size == size, (form, orientation)
            assert upright.getpixel(red_at) == (255, 0, 0), (form, orientation)


def test_deep_and_odd_colour_modes() -> None:
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    deep = images.decode(encode(Image.fromarray(ramp), "PNG"), LIMITS)
    assert np.array_equal(np.array(deep)[..., 0], (ramp >> 8).astype(np.uint8))
    floats = Image.fromarray(np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16))
    stretched = np.array(images.decode(encode(floats, "TIFF"), LIMITS))[..., 0]
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert (np.diff(stretched.ravel().astype(int)) >= 0).all()
    cmyk = images.decode(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), LIMITS)
    assert np.abs(np.array(cmyk)[4, 4].astype(int) - (255, 0, 0)).max() <= 8
    one_bit = images.decode(encode(Image.new("1", (8, 8), 1), "PNG"), LIMITS)
    assert np.array(one_bit).min() == 255


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for form, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        data = encode(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert images.decode(data, LIMITS).getpixel((4, 4)) == (255, 0, 0)


def test_tower_pixels_and_normalisation() -> None:
    torch = pytest.importorskip("torch")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8))
    pixels = np.stack([images.for_tower(image, 448), np.zeros((448, 448, 3), np.uint8)])
    values = images.normalise(pixels)
    assert (values.dtype, tuple(values.shape)) == (torch.float32, (2, 3, 448, 448))
    expected = (np.array(image)[7, 9] / 255 - np.array(images.CLIP_MEAN)) / np.array(images.CLIP_STD)
    assert np.allclose(values[0, :, 7, 9].numpy(), expected, atol=1e-6)
    assert images.for_tower(image, 336).shape == (336, 336, 3)
    with pytest.raises(ValueError, match="square"):
        images.for_tower(Image.new("RGB", (4, 5)), 4)


def test_the_same_picture_gives_the_same_bytes() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 70, 3), dtype=np.uint8))
    first, second = (images.to_jpeg(images.square(image, PICTURE)[0], 95) for _ in range(2))
    assert first == second
    assert images.probe(first, LIMITS) == images.Header("JPEG", 448, 448)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="EPS"):
        LimitConfig(formats=("EPS",))
    with pytest.raises(ConfigError, match=r"crop_ratio.*1\.5"):
        PictureConfig(crop_ratio=1.5)


def test_importing_images_does_not_import_torch() -> None:
    code = "import sys, tinyvlm.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
