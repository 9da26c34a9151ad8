"""Put a model together from a vision tower and a language model, or load one that was saved.

    CLIP checkpoint ───────▶ vision ───┐
    seed ──────────────────▶ connector ├──▶ model, processor
    Llama checkpoint ──────▶ language ─┘        (tokenizer + three image tokens, picture settings)

What is asked for, `ModelConfig`, is in architecture.py.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import AddedToken
from transformers import AutoTokenizer, CLIPVisionModel, GenerationConfig, LlamaForCausalLM, PretrainedConfig
from transformers.utils import logging as transformers_logging

from tinyvlm import chat
from tinyvlm.architecture import ModelConfig
from tinyvlm.errors import CheckpointError, ConfigError
from tinyvlm.images import PictureConfig
from tinyvlm.model.configuration import TinyVLMConfig, check_grid
from tinyvlm.model.modeling import CONNECTOR_STD, Connector, TinyVLMForConditionalGeneration
from tinyvlm.model.processing import TinyVLMProcessor


def build(
    config: ModelConfig, picture: PictureConfig, seed: int = 0
) -> tuple[TinyVLMForConditionalGeneration, TinyVLMProcessor]:
    """Join pretrained parts with a fresh connector, in float32.

    Args:
        config: where the parts come from.
        picture: how pictures are prepared; its `tower_size` must be what the tower reads.
        seed: of the connector's weights, N(0, 0.02).

    Raises:
        CheckpointError: a part cannot be loaded, lacks weights or does not fit.
        ConfigError: `picture` or `num_image_tokens` do not fit the tower.
    """
    vision = _load_part(CLIPVisionModel, config.vision, "vision tower")
    language = _load_part(LlamaForCausalLM, config.language, "language model")
    _check_tower(vision.config, picture, config.num_image_tokens)
    processor = build_processor(config, picture)
    _fit_vocabulary(language, len(processor.tokenizer))
    whole = TinyVLMConfig(
        vision_config=vision.config,
        text_config=language.config,
        num_image_tokens=config.num_image_tokens,
        connector=config.connector,
        connector_width=config.connector_width,
        image_token_id=processor.image_token_id,
    )
    _set_special_ids(whole, processor)
    with torch.device("meta"):
        model = TinyVLMForConditionalGeneration(whole)
    vision.post_layernorm = torch.nn.Identity()
    model.vision, model.language = vision, language
    model.connector = _new_connector(whole, seed)
    model.generation_config = _generation_config(processor)
    whole.dtype = torch.float32
    return model.eval(), processor


def build_processor(config: ModelConfig, picture: PictureConfig) -> TinyVLMProcessor:
    """The processor of such a model; reads the tokenizer alone.

    Raises:
        CheckpointError: the tokenizer cannot be loaded.
    """
    return TinyVLMProcessor(_load_tokenizer(config.tokenizer or config.language), picture, config.num_image_tokens)


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32
) -> tuple[TinyVLMForConditionalGeneration, TinyVLMProcessor]:
    """Load a saved model and its processor; `folder` is a local folder or a hub id.

    Raises:
        CheckpointError: it is not there, is no TinyVLM, or lacks weights.
    """
    name = str(folder)
    processor = load_processor(name)
    return _from_pretrained(TinyVLMForConditionalGeneration, name, "model", dtype).eval(), processor


def load_processor(folder: str | Path) -> TinyVLMProcessor:
    """The processor of a saved model, without its weights.

    Raises:
        CheckpointError: as `load`.
    """
    name = str(folder)
    if (Path(name).is_absolute() or name.startswith(".")) and not (Path(name) / "config.json").is_file():
        raise CheckpointError(f"{name} is no model folder: it has no config.json. Give one that training has written.")
    kind = _guard("model", name, lambda: PretrainedConfig.get_config_dict(name)[0]).get("model_type")
    if kind != TinyVLMConfig.model_type:
        raise CheckpointError(
            f"{name} holds a model of type {kind!r}, not 'tinyvlm'; give one that training or tinyvlm.model.build made."
        )
    processor: TinyVLMProcessor = _guard("processor", name, lambda: TinyVLMProcessor.from_pretrained(name))
    return processor


def _load_part(kind: Any, name: str, what: str) -> Any:
    return _from_pretrained(kind, _place(name), what, torch.float32)


def _place(name: str) -> str:
    """A local folder or hub id; "toy:…" names packaged weights."""
    if not name.startswith("toy:"):
        return name
    from tinyvlm.toy.paths import resolve

    return str(resolve(name))


def _load_tokenizer(name: str) -> Any:
    path = _place(name)
    tokenizer = _guard("tokenizer", path, lambda: AutoTokenizer.from_pretrained(path))
    image_tokens = [AddedToken(token, special=True, normalized=False) for token in chat.IMAGE_TOKENS]
    tokenizer.add_tokens(image_tokens, special_tokens=True)
    if tokenizer.convert_tokens_to_ids(chat.PAD) not in (None, tokenizer.unk_token_id):
        tokenizer.pad_token = chat.PAD
    tokenizer.eos_token = chat.END_OF_TURN
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = chat.CHAT_TEMPLATE
    return tokenizer


def _from_pretrained(kind: Any, name: str, what: str, dtype: torch.dtype) -> Any:
    with _quiet():
        model, report = _guard(what, name, lambda: kind.from_pretrained(name, dtype=dtype, output_loading_info=True))
    model.config._name_or_path = ""  # else a path of this machine is saved with the model
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report.get("mismatched_keys", ()))
    if missing:
        raise CheckpointError(
            f"The {what} {name!r} lacks {len(missing)} weights of {kind.__name__} (first: {missing[0]}); "
            "give a checkpoint of that kind."
        )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its list of weights left out; missing ones are refused here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _guard(what: str, name: str, read: Any) -> Any:
    """Turn what transformers raises on bad checkpoints into one sentence."""
    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = re.split(r"\n|(?<=\.) ", str(error).strip())[0]
        raise CheckpointError(
            f"The {what} {name!r} cannot be loaded ({type(error).__name__}: {reason}). Give a local folder or a hub "
            "id; for gated weights such as Meta's Llama, accept the licence on the hub and set HF_TOKEN."
        ) from error


def _check_tower(tower: Any, picture: PictureConfig, num_image_tokens: int) -> None:
    if picture.tower_size != tower.image_size:
        raise ConfigError(
            f"picture.tower_size is {picture.tower_size}, but the vision tower reads {tower.image_size}×"
            f"{tower.image_size}; set picture.tower_size={tower.image_size}."
        )
    check_grid(num_image_tokens, tower.image_size // tower.patch_size)


def _fit_vocabulary(language: Any, num_tokens: int) -> None:
    """Give new tokens rows: the mean of the old ones."""
    old = language.get_input_embeddings().weight.shape[0]
    if num_tokens <= old:
        return
    language.resize_token_embeddings(num_tokens, mean_resizing=False)
    with torch.no_grad():
        for embedding in (language.get_input_embeddings(), language.get_output_embeddings()):
            embedding.weight[old:] = embedding.weight[:old].mean(dim=0)


def _set_special_ids(config: TinyVLMConfig, processor: TinyVLMProcessor) -> None:
    text = config.text_config
    text.bos_token_id = processor.tokenizer.convert_tokens_to_ids(chat.BEGIN_OF_TEXT)
    text.eos_token_id = list(processor.end_ids)


def _generation_config(processor: TinyVLMProcessor) -> GenerationConfig:
    """Greedy, ending where answers end, without control tokens: `model.generate` then does what the engine does."""
    return GenerationConfig(
        bos_token_id=processor.tokenizer.convert_tokens_to_ids(chat.BEGIN_OF_TEXT),
        eos_token_id=list(processor.end_ids),
        pad_token_id=processor.pad_id,
        suppress_tokens=list(processor.silent_ids),
        do_sample=False,
    )


def _new_connector(config: TinyVLMConfig, seed: int) -> Connector:
    connector = Connector(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in connector.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=CONNECTOR_STD, generator=generator)
    return connector
