"""Pictures: the crop and pad rule, limits before decoding, and the written policy for odd formats."""

from __future__ import annotations

import dataclasses
import functools
import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


@functools.cache
def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Clouds of every size, sharp edges and grain: as hard to scale as a photo.  Not to be changed: it is shared."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 128.0, np.float32)
    for octave in range(8):
        grid = (2 ** (octave + 1), 2 ** (octave + 1))
        for band in range(3):
            cloud = Image.fromarray(rng.standard_normal(grid).astype(np.float32))
            pixels[..., band] += 50 * 0.6**octave * np.asarray(cloud.resize((width, height), Image.Resampling.BILINEAR))
    for _ in range(6):
        left, top = rng.integers(0, width), rng.integers(0, height)
        pixels[top : top + height // 4, left : left + width // 5] += rng.integers(-60, 60)
    pixels += 14 * rng.standard_normal((height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def the_long_way(data: bytes) -> images.Finished:
    form, image = images.decode_as(data, LIMITS)
    result, fit = images.square(image, PICTURE)
    jpeg = images.to_jpeg(result, PICTURE.jpeg_quality)
    return images.Finished(jpeg, form, *image.size, fit, images.perceptual_hash(image))


def assert_agree(data: bytes, max_mean: float, min_psnr: float) -> None:
    """`finish` gives what decode, square and to_jpeg do: pixels within a mean distance and a noise ratio (dB)."""
    fast, slow = images.finish(data, PICTURE, LIMITS), the_long_way(data)
    assert (fast.format, fast.width, fast.height, fast.fit) == (slow.format, slow.width, slow.height, slow.fit)
    assert images.hash_distance(fast.phash, slow.phash) <= 6
    assert fast.jpeg
    assert slow.jpeg
    first, second = (np.array(images.decode(jpeg, LIMITS)).astype(float) for jpeg in (fast.jpeg, slow.jpeg))
    assert first.shape == (PICTURE.size, PICTURE.size, 3)
    error = np.abs(first - second)
    assert error.mean() <= max_mean
    assert 10 * np.log10(255**2 / max((error**2).mean(), 1e-9)) >= min_psnr
    # Same place as well: were one of them shifted by a pixel, it would lie nearer to the other's neighbour.
    shifts = [np.abs(first - np.roll(second, shift, axis)).mean() for shift in (-1, 1) for axis in (0, 1)]
    assert min(shifts) >= error.mean()


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
    image.paste((0, 0, 255), (0, 0, 4, 4))
    # Orientation → size upright, and where then the red spot and the blue one above it (as stored) lie.
    places = [
        (1, (16, 8), (1, 6), (1, 1)),
        (2, (16, 8), (14, 6), (14, 1)),
        (3, (16, 8), (14, 1), (14, 6)),
        (4, (16, 8), (1, 1), (1, 6)),
        (5, (8, 16), (6, 1), (1, 1)),
        (6, (8, 16), (1, 1), (6, 1)),
        (7, (8, 16), (1, 14), (6, 14)),
        (8, (8, 16), (6, 14), (1, 14)),
    ]
    for orientation, size, red_at, blue_at in places:
        for form in ("PNG", "TIFF", "WEBP"):
            options = {"lossless": True} if form == "WEBP" else {}
            upright = images.decode(encode(image, form, exif=turned(orientation), **options), LIMITS)
            assert upright.size == size, (form, orientation)
            assert upright.getpixel(red_at) == (255, 0, 0), (form, orientation)
            assert upright.getpixel(blue_at) == (0, 0, 255), (form, orientation)


# How far a finished picture may lie from Pillow's antialiased bicubic filter.  Most of it is what JPEG, which comes
# after, makes of differences of one grey level; where the JPEG was decoded at a fraction, that filter keeps more grain.
SAME_DECODING = (1.6, 41.0)
SCALED_DECODING = (3.5, 35.0)


@pytest.mark.parametrize("filtered_by", ["cykooz-resizer", "pillow"])
@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((300, 200), SAME_DECODING),
        ((120, 500), SAME_DECODING),
        ((448, 448), SAME_DECODING),
        ((640, 427), SAME_DECODING),
        ((895, 1200), SAME_DECODING),
        ((859, 500), SAME_DECODING),
        ((1079, 640), SCALED_DECODING),
        ((897, 1301), SCALED_DECODING),
        ((1403, 1001), SCALED_DECODING),
        ((1999, 800), SCALED_DECODING),
        ((2401, 1801), SCALED_DECODING),
    ],
)
def test_the_short_way_agrees_with_the_long_way(
    size: tuple[int, int], limits: tuple[float, float], filtered_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filtered_by == "cykooz-resizer":
        pytest.importorskip("cykooz_resizer")
    monkeypatch.setattr(images, "resizer", lambda: filtered_by)
    assert_agree(encode(photo(*size), "JPEG", quality=90), *limits)


@pytest.mark.parametrize("side", [257, 264, 271])
def test_a_fraction_of_a_width_that_is_not_whole_shifts_nothing(side: int) -> None:
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, side).astype(np.uint8), (side, 1)))
    finished = images.finish(encode(ramp, "JPEG", quality=95), PictureConfig(size=32), LIMITS)
    assert finished.jpeg
    across = np.array(images.decode(finished.jpeg, LIMITS)).astype(float).mean(axis=(0, 2))
    assert np.abs(across - (np.arange(32) + 0.5) * 255 / 32)[1:-1].max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("size", "limits"), [((401, 300), SAME_DECODING), ((1203, 900), SCALED_DECODING)])
def test_the_short_way_turns_pictures_upright(
    orientation: int, size: tuple[int, int], limits: tuple[float, float]
) -> None:
    data = encode(photo(*size), "JPEG", quality=90, exif=turned(orientation))
    assert_agree(data, *limits)
    finished = images.finish(data, PICTURE, LIMITS)
    assert (finished.width, finished.height) == (size if orientation < 5 else size[::-1])


def odd_picture(kind: str) -> bytes:
    large, image, more = photo(1001, 1003), photo(400, 300), [photo(400, 300, seed=1)]
    see_through = image.convert("RGBA")
    see_through.putalpha(image.getchannel("R"))
    grey = np.asarray(image.convert("L"))
    match kind:
        case "grey JPEG":
            return encode(large.convert("L"), "JPEG", quality=90)
        case "CMYK JPEG":
            return encode(large.convert("CMYK"), "JPEG", quality=90)
        case "progressive JPEG":
            return encode(large, "JPEG", quality=90, progressive=True)
        case "JPEG with full colour":
            return encode(large, "JPEG", quality=90, subsampling=0)
        case "several JPEGs in one":
            return encode(large, "MPO", quality=90, save_all=True, append_images=more)
        case "transparent PNG":
            return encode(see_through, "PNG")
        case "grey transparent PNG":
            return encode(see_through.convert("LA"), "PNG")
        case "16-bit PNG":
            return encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG")
        case "32-bit TIFF":
            return encode(Image.fromarray(grey.astype(np.float32)), "TIFF")
        case "turned TIFF":
            return encode(image, "TIFF", exif=turned(6))
        case "turned PNG":
            return encode(image, "PNG", exif=turned(5))
        case "palette GIF":
            return encode(image.convert("P"), "GIF")
        case "animated WEBP":
            return encode(image, "WEBP", save_all=True, append_images=more, lossless=True)
    assert kind == "two colours"
    return encode(image.resize((8, 6)).resize(image.size).convert("1", dither=Image.Dither.NONE), "BMP")


ODD_JPEGS = ["grey JPEG", "CMYK JPEG", "progressive JPEG", "JPEG with full colour", "several JPEGs in one"]
ODD_PICTURES = ["transparent PNG", "grey transparent PNG", "16-bit PNG", "32-bit TIFF", "turned TIFF", "turned PNG"]
ODD_PICTURES += ["palette GIF", "animated WEBP", "two colours"]


@pytest.mark.parametrize("kind", [*ODD_JPEGS, *ODD_PICTURES])
def test_the_short_way_keeps_the_policy_for_odd_pictures(kind: str) -> None:
    assert_agree(odd_picture(kind), *(SCALED_DECODING if kind in ODD_JPEGS else SAME_DECODING))


@pytest.mark.parametrize("size", [(400, 300), (1200, 900)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_was_cut_off_is_corrupt_and_not_half_grey(size: tuple[int, int], progressive: bool) -> None:
    data = encode(photo(*size), "JPEG", quality=90, progressive=progressive)
    for kept in (0.1, 0.5, 0.9, 0.99):
        for do in (images.decode_as, lambda cut, limits: images.finish(cut, PICTURE, limits)):
            with pytest.raises(ImageError) as caught:
                do(data[: int(kept * len(data))], LIMITS)
            assert caught.value.status == "corrupt"


def test_the_short_way_has_the_same_limits() -> None:
    picture = encode(Image.new("RGB", (40, 30)), "PNG")
    cases: list[tuple[bytes, LimitConfig]] = [
        (png_header(50_000, 50_000), LIMITS),
        (picture, LimitConfig(max_pixels=1199)),
        (picture, LimitConfig(max_bytes=len(picture) - 1)),
        (picture, LimitConfig(min_side=31)),
        (b"<!doctype html>", LIMITS),
        (png_header(40, 40), LIMITS),
    ]
    for data, limits in cases:
        with pytest.raises(ImageError) as caught:
            images.finish(data, PICTURE, limits)
        assert caught.value.status == status_of(data, limits)


def test_checking_alone_measures_the_same() -> None:
    data = encode(photo(1200, 900), "JPEG", quality=90, exif=turned(6))
    finished, checked = (images.finish(data, PICTURE, LIMITS, encode=encoded) for encoded in (True, False))
    assert checked.jpeg is None
    assert dataclasses.replace(finished, jpeg=None) == checked


def test_the_same_bytes_come_out_of_any_number_of_threads() -> None:
    sent = [encode(photo(*size), "JPEG", quality=90) for size in ((300, 200), (700, 500), (1000, 950), (500, 500))]
    alone = [images.finish(data, PICTURE, LIMITS) for data in sent]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda data: images.finish(data, PICTURE, LIMITS), sent * 4))
    assert together == alone * 4


def test_pillow_filters_where_the_fast_resizer_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cykooz_resizer")
    find: Callable[[], str] = images.resizer.__wrapped__
    assert find() == "cykooz-resizer"
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "cykooz_resizer", None)
        assert find() == "pillow"
    monkeypatch.setattr(images, "pillow_version", "99.1.0")
    assert find() == "pillow"


def test_finished_pictures_carry_nothing_but_pixels() -> None:
    data = encode(photo(448, 448), "JPEG", comment=b"by somebody", exif=turned(1), icc_profile=b"profile")
    for finished in (images.finish(data, PICTURE, LIMITS), the_long_way(data)):
        assert finished.jpeg
        assert all(word not in finished.jpeg for word in (b"somebody", b"Exif", b"profile"))


def test_perceptual_hashes_of_copies_are_near_and_of_strangers_far() -> None:
    pictures = [photo(640, 480, seed) for seed in range(12)]
    hashes = [images.perceptual_hash(image) for image in pictures]
    for image, hashed in zip(pictures, hashes, strict=True):
        copies = [
            images.decode(encode(image, "JPEG", quality=40), LIMITS),
            image.resize((576, 432), Image.Resampling.BICUBIC),
            image.resize((200, 150), Image.Resampling.BILINEAR),
            images.decode(encode(image.resize((320, 240)), "WEBP", quality=60), LIMITS),
        ]
        assert max(images.hash_distance(hashed, images.perceptual_hash(copy)) for copy in copies) <= 6
    apart = [images.hash_distance(a, b) for index, a in enumerate(hashes) for b in hashes[:index]]
    assert min(apart) >= 14
    for grey in (0, 127, 255):
        noisy = np.random.default_rng(grey).normal(grey, 2, (300, 400, 3)).clip(0, 255).astype(np.uint8)
        assert images.perceptual_hash(Image.fromarray(noisy)) == 0


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
