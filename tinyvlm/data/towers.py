"""Where a CLIP checkpoint lies and what shape its vision tower has, without loading weights (or torch).

The stages check their settings with this before anything is written; hub ids are known only when they are loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyvlm import config as settings
from tinyvlm.errors import CheckpointError, ConfigError
from tinyvlm.images import CLIP_MEAN, CLIP_STD, PictureConfig

if TYPE_CHECKING:
    from torch import Tensor


def place(name: str) -> str:
    """A local folder or hub id; "toy:…" names packaged weights."""
    if not name.startswith("toy:"):
        return name
    from tinyvlm.toy.paths import resolve

    return str(resolve(name))


def local_shape(name: str, setting: str) -> Mapping[str, Any] | None:
    """The vision part of a local checkpoint's config.json; None for a hub id.

    Raises:
        CheckpointError: a local folder was meant, and there is none.
    """
    folder = Path(place(name))
    try:
        shape: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        if folder.is_absolute() or folder.exists() or name.startswith((".", "toy:")):
            raise CheckpointError(
                f"{setting} is {name!r}, but {folder} is no folder of CLIP weights ({error}); "
                "give a local folder, a hub id or toy:clip."
            ) from None
        return None
    vision: Mapping[str, Any] = shape.get("vision_config", shape)
    return vision


def check_size(shape: Mapping[str, Any], picture: PictureConfig, setting: str) -> None:
    """Refuse a tower that reads another size than pictures are brought to.

    Raises:
        ConfigError: naming both sizes.
    """
    reads = shape.get("image_size", 224)
    if reads != picture.tower_size:
        raise ConfigError(
            f"picture.tower_size is {picture.tower_size}, but {setting} reads {reads} px; "
            f"set picture.tower_size={reads}."
        )


def check_patches(shape: Mapping[str, Any], picture: PictureConfig, setting: str) -> None:
    """Refuse a size that is no multiple of the patch: positions can be interpolated, parts of patches cannot.

    Raises:
        ConfigError: naming the nearest size that fits.
    """
    patch = int(shape.get("patch_size", 32))
    if picture.tower_size % patch:
        near = max(1, round(picture.tower_size / patch)) * patch
        raise ConfigError(
            f"picture.tower_size is {picture.tower_size}, which is no multiple of the {patch} px patches of {setting}; "
            f"set picture.tower_size={near}."
        )


def encoder_fingerprint(weights: Mapping[str, Tensor], picture: PictureConfig, num_image_tokens: int) -> str:
    """16 hex digits that name what makes features: the vision tower's weights, the preprocessing and the pooling.

    `weights` is the tower's `state_dict`, before positions are interpolated.  They are taken as float32, so that a
    checkpoint has one fingerprint whatever precision it is loaded in, as long as loading loses nothing; the final layer
    norm plays no part in features and is left out.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        if "post_layernorm" not in name:
            values = weights[name].detach().float().cpu().contiguous()
            digest.update(f"{name} {tuple(values.shape)} ".encode())
            digest.update(values.numpy().data)
    pixels = {"picture": settings.to_dict(picture), "mean": CLIP_MEAN, "deviation": CLIP_STD}
    return settings.fingerprint([digest.hexdigest(), pixels, num_image_tokens])[:16]


def check_width(shape: Mapping[str, Any], feature_width: int, setting: str) -> None:
    """Refuse a tower whose hidden states are not as wide as the column that takes them.

    Raises:
        ConfigError: naming both widths.
    """
    width = shape.get("hidden_size", 768)
    if width != feature_width:
        raise ConfigError(
            f"encode.feature_width is {feature_width}, but {setting} is {width} wide; set encode.feature_width={width}."
        )
