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
from dataclasses import dataclass
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
from tinyvlm.data.feature_store import pack
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


@dataclass(frozen=True)
class Encoded:
    """What the tower says of B pictures, on the host."""

    features: NDArray[Any]
    """(B, K, D), as `feature_store.pack` stores them."""
    scale: NDArray[np.float32] | None
    """(B, K), None in half precision."""
    error: NDArray[np.float32]
    """(B,): relative L2 distance of stored features from those that came."""
    cosine: NDArray[np.float32]
    """(B,): cosine between the two."""
    similarity: NDArray[np.float32]
    """(B,): cosine of CLS with that of the nearest reference placeholder."""
    nearest: NDArray[np.int64]
    """(B,): which reference that is."""


class Running:
    """A batch on its way through the tower."""

    def __init__(self, results: Sequence[Tensor | None], done: Any, num_pictures: int) -> None:
        self._results, self._done, self._num_pictures = results, done, num_pictures

    def result(self) -> Encoded:
        """Wait for the device, if there is one."""
        if self._done is not None:
            self._done.synchronize()
        there = [None if t is None else t[: self._num_pictures].numpy() for t in self._results]
        return Encoded(*there)  # type: ignore[arg-type]  # None is the scale's alone


class Tower:
    """The vision tower and its reference placeholders.

    On a GPU a batch takes this road without the host ever waiting for the next one:

        pixels ──stage (pinned)──▶ submit: copy in · normalise · tower · pool · pack · copy out ──▶ Running.result

    In float32 on one kind of CPU, with one number of threads, a batch gives the same bits in whichever process it is
    encoded; batches of other sizes agree to 1e-5 of the features' length.

    Args:
        model: a vision tower in place of the one that the settings name.
    """

    def __init__(self, config: EncodeConfig, picture: PictureConfig, model: Any = None) -> None:
        self.config, self.picture = config, picture
        model = load_vision(config.vision) if model is None else model
        shape = model.config
        towers.check_width(shape.to_dict(), config.feature_width, "encode.vision")
        check = towers.check_patches if config.interpolate_positions else towers.check_size
        check(shape.to_dict(), picture, "encode.vision")
        check_grid(config.num_image_tokens, picture.tower_size // shape.patch_size)
        self.fingerprint = towers.encoder_fingerprint(model.state_dict(), picture, config.num_image_tokens)
        if picture.tower_size != shape.image_size:
            _interpolate_positions(model, picture.tower_size)
        model.set_attn_implementation("sdpa")
        self.model = model.to(getattr(torch, config.dtype))
        self.device, self._on_gpu = model.device, model.device.type == "cuda"
        if self._on_gpu:
            self.model = self.model.to(memory_format=torch.channels_last)
        self._forward = torch.compile(self._hidden, dynamic=False) if config.compile else self._hidden
        drawn = [self.pixels(image) for image in reference_pictures(config.references)]
        self.references = self._cls(drawn)

    def __call__(self, pixels: NDArray[np.uint8]) -> Encoded:
        """(B, S, S, 3) → features and similarity of B pictures."""
        return self.submit(self.stage(pixels)).result()

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """A picture as the tower reads it: (S, S, 3)."""
        return _pixels_of(image, self.picture)

    def similarity(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Cosine of each picture's CLS with that of the nearest reference: (len(images),)."""
        best = (self._cls([self.pixels(image) for image in images]) @ self.references.T).amax(dim=-1)
        return best.cpu().numpy()

    def stage(self, pixels: NDArray[np.uint8]) -> Tensor:
        """Where the device can fetch it by itself: page-locked memory.  Takes time, so call it from another thread."""
        staged = torch.from_numpy(pixels)
        return staged.pin_memory() if self._on_gpu else staged

    @torch.inference_mode()
    def submit(self, pixels: Tensor) -> Running:
        """Start on what `stage` gave, (B, S, S, 3); on a GPU this returns at once."""
        hidden = self._run(pixels)
        exact = pool_patches(hidden[:, 1:], self.config.num_image_tokens).float()
        stored, scale = pack(exact, self.config.feature_storage)
        error, cosine = _loss(exact, stored, scale)
        best = (_unit(hidden[:, 0]) @ self.references.T).max(dim=-1)
        results = (stored, scale, error, cosine, best.values, best.indices)
        if not self._on_gpu:
            return Running(results, None, len(pixels))
        on_host = [None if t is None else _to_host(t) for t in results]
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Running(on_host, done, len(pixels))

    def _run(self, pixels: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 on the host → last hidden state on the device."""
        missing = self.config.batch_size - len(pixels)
        if self.config.compile and missing > 0:  # another size would be compiled anew
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
        values = images.normalise(pixels.to(self.device, non_blocking=True)).to(self.model.dtype)
        layout = torch.channels_last if self._on_gpu else torch.contiguous_format
        return self._forward(values.contiguous(memory_format=layout))

    def _hidden(self, values: Tensor) -> Tensor:
        """(B, 3, S, S) → last hidden state (B, 1+P, D), before the final layer norm."""
        hidden: Tensor = self.model(pixel_values=values).last_hidden_state
        return hidden

    @torch.inference_mode()
    def _cls(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        """N pictures (S, S, 3) → CLS of unit length (N, D) on the device."""
        size = self.config.batch_size
        batches = [torch.from_numpy(np.stack(pixels[at : at + size])) for at in range(0, len(pixels), size)]
        return torch.cat([_unit(self._run(batch)[: len(batch), 0]) for batch in batches])


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


def load_vision(name: str) -> Any:
    """A vision tower in float32, which every checkpoint fits into exactly: fingerprints are of weights, not of a dtype.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    return _load(CLIPVisionModel, name, "float32", "encode.vision")


def _loss(exact: Tensor, stored: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """What storing costs each picture: relative L2 distance (B,) and cosine (B,), over all its K·D numbers."""
    kept = stored.view(torch.float8_e4m3fn).float() if stored.dtype == torch.uint8 else stored.float()
    kept = (kept if scale is None else kept * scale.unsqueeze(-1)).flatten(1)
    exact = exact.flatten(1)
    error = (kept - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-12)
    return error, torch.nn.functional.cosine_similarity(kept, exact, dim=-1)


def _to_host(values: Tensor) -> Tensor:
    """A copy into page-locked memory that is under way; wait for an event recorded after it."""
    place = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return place.copy_(values, non_blocking=True)


@torch.no_grad()
def _interpolate_positions(model: Any, side: int) -> None:
    """Let a tower read pictures of `side` px: its learned positions, stretched to the new grid (bicubic).

    As transformers does on every call with `interpolate_pos_encoding=True`, here once.
    """
    embeddings = model.embeddings
    num_patches = (side // embeddings.patch_size) ** 2
    shaped = embeddings.class_embedding.new_empty((1, 1 + num_patches, embeddings.embed_dim))
    positions = embeddings.interpolate_pos_encoding(shaped, side, side)[0]
    table = torch.nn.Embedding(len(positions), embeddings.embed_dim, device=positions.device)
    table.weight.copy_(positions)
    embeddings.position_embedding = table.requires_grad_(False)
    embeddings.position_ids = torch.arange(1 + num_patches, device=positions.device).expand((1, -1))
    embeddings.image_size, embeddings.num_patches, embeddings.num_positions = side, num_patches, 1 + num_patches
    model.config.image_size = side


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
