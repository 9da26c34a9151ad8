"""CLIP for the encode and explore stages: stored pictures → hidden states, similarities, label scores.

    stored JPEG ──decode──square──for_tower──▶ pixels (B, S, S, 3) uint8 ──normalise──▶ (B, 3, S, S) on the device
                                                                                            │
         Tower:    last hidden state ─┬─ patches, block means ──▶ features (B, K, D)        ├──▶ vision tower alone
                                      └─ CLS ──cosine──▶ nearest reference placeholder      │
         Labeller: projected, normed picture · projected, normed label texts ──softmax──▶ (B, C)  ◀── both towers

Shapes: B pictures, S side of the tower's input in pixels, P patches, K image tokens, D width of the tower, C labels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel
from transformers.utils import logging

from tinyvlm import images
from tinyvlm.data import towers
from tinyvlm.data.placeholder import reference_pictures
from tinyvlm.errors import CheckpointError, ConfigError
from tinyvlm.images import ImageError, LimitConfig, PictureConfig
from tinyvlm.model.configuration import check_grid
from tinyvlm.model.modeling import pool_patches

if TYPE_CHECKING:
    from tinyvlm.data.encode import EncodeConfig
    from tinyvlm.data.explore import ExploreConfig

TEXT_BATCH = 256
"""Label texts in one forward pass."""


class Tower:
    """The vision tower and its reference placeholders."""

    def __init__(self, config: EncodeConfig, picture: PictureConfig) -> None:
        self.config = config
        self.model = _load(CLIPVisionModel, config.vision, config.dtype, "encode.vision")
        shape = self.model.config
        towers.check_size(shape.to_dict(), picture, "encode.vision")
        towers.check_width(shape.to_dict(), config.feature_width, "encode.vision")
        check_grid(config.num_image_tokens, shape.image_size // shape.patch_size)
        drawn = [_pixels_of(image, picture) for image in reference_pictures(config.references)]
        self.references = _unit(self._hidden(np.stack(drawn))[:, 0])

    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.int64]]:
        """(B, S, S, 3) → features (B, K, D), similarity (B,), which reference is nearest (B,)."""
        hidden = self._hidden(pixels)
        features = pool_patches(hidden[:, 1:], self.config.num_image_tokens)
        best = (_unit(hidden[:, 0]) @ self.references.T).max(dim=-1)
        return features.to(torch.float16).cpu().numpy(), best.values.cpu().numpy(), best.indices.cpu().numpy()

    def _hidden(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(B, S, S, 3) → last hidden state (B, 1+P, D), before the final layer norm."""
        with torch.inference_mode():
            hidden: Tensor = self.model(pixel_values=_to_input(pixels, self.model)).last_hidden_state
        return hidden


class Labeller:
    """Both towers, with the label texts encoded once, by each worker when it starts.

    For ViT-L/14-336 the base file's texts are as much arithmetic as some fourteen pictures: nothing worth a cache.
    """

    def __init__(self, config: ExploreConfig, picture: PictureConfig, texts: Sequence[str]) -> None:
        self.model = _load(CLIPModel, config.model, config.dtype, "explore.model")
        towers.check_size(self.model.config.vision_config.to_dict(), picture, "explore.model")
        tokenizer = AutoTokenizer.from_pretrained(towers.place(config.model))
        batches = [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]
        with torch.inference_mode():
            self.texts = torch.cat([self._encode_texts(tokenizer, batch) for batch in batches])
            self.scale = self.model.logit_scale.float().exp()

    def __call__(self, pixels: NDArray[np.uint8], top_k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(B, S, S, 3) → the likeliest labels (B, k), best first, and their shares of the softmax (B, k)."""
        likeliest = self.probabilities(pixels).topk(min(top_k, len(self.texts)), dim=-1)
        return likeliest.indices.cpu().numpy(), likeliest.values.cpu().numpy()

    def probabilities(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(B, S, S, 3) → (B, C), what `CLIPModel` itself gives for these pictures and texts."""
        with torch.inference_mode():
            seen = self.model.get_image_features(pixel_values=_to_input(pixels, self.model)).pooler_output
            scores: Tensor = self.scale * (_unit(seen) @ self.texts.T)
        return scores.softmax(dim=-1)

    def _encode_texts(self, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        most = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(list(texts), padding=True, return_tensors="pt")
        if tokens["input_ids"].shape[1] > most:
            longest = max(texts, key=lambda text: len(tokenizer(text)["input_ids"]))
            raise ConfigError(
                f"explore.model reads {most} tokens of a text, but {longest!r} has more; shorten that label's "
                "description, or explore.template."
            )
        inputs = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _unit(self.model.get_text_features(**inputs).pooler_output)


def read_pixels(
    stored: Sequence[bytes | None], picture: PictureConfig
) -> tuple[NDArray[np.uint8], list[ImageError | None]]:
    """Stored pictures as pixels (B, S, S, 3); one that cannot be decoded is black and has its error beside it."""
    side = picture.tower_size
    pixels = np.zeros((len(stored), side, side, 3), np.uint8)
    problems: list[ImageError | None] = []
    for position, data in enumerate(stored):
        try:
            pixels[position] = _pixels_of(images.decode(data or b"", LimitConfig()), picture)
            problems.append(None)
        except ImageError as error:
            problems.append(error)
    return pixels, problems


def _pixels_of(image: Image.Image, picture: PictureConfig) -> NDArray[np.uint8]:
    """(S, S, 3), squared first unless the picture is finished already."""
    if image.size != (picture.size, picture.size):
        image, _ = images.square(image, picture)
    return images.for_tower(image, picture.tower_size)


def _to_input(pixels: NDArray[np.uint8], model: Any) -> Tensor:
    """(B, S, S, 3) → (B, 3, S, S), on the model's device in its precision."""
    return images.normalise(torch.from_numpy(pixels).to(model.device)).to(model.dtype)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


def _load(kind: Any, name: str, dtype: str, setting: str) -> Any:
    """A frozen CLIP model on the accelerator, or on the CPU where there is none.

    Raises:
        CheckpointError: it cannot be loaded or lacks weights.
    """
    try:
        with _quiet():
            model, report = kind.from_pretrained(
                towers.place(name), dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{setting} is {name!r}, which cannot be loaded as {kind.__name__} ({reason}); "
            "give a local folder, a hub id or toy:clip."
        ) from error
    if report["missing_keys"]:
        raise CheckpointError(
            f"{setting} is {name!r}, which lacks {len(report['missing_keys'])} weights of {kind.__name__}."
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.requires_grad_(False).eval().to(device)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its list of weights left out (the other tower's)."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
