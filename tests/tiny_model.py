"""A model of a few thousand random weights, its tokenizer and processor, built in about a second without any file.

    from tiny_model import tiny_model, tiny_processor, picture, ask

The tokenizer cuts words as Llama 3's does and falls back to bytes, so every text survives it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyvlm import chat
from tinyvlm.chat import Message, Picture
from tinyvlm.images import PictureConfig
from tinyvlm.model import ModelConfig, TinyVLMForConditionalGeneration, TinyVLMProcessor, build

torch.set_num_threads(1)  # the tests share two cores, and these matrices are too small to be cut up

SIDE, PATCH, NUM_IMAGE_TOKENS = 32, 4, 4
PICTURE = PictureConfig(size=48, tower_size=SIDE)

WORDS = """what shape is in the image? what color is the shape? is there a circle in the image? a red circle. a blue
rectangle. a green triangle. yes no describe this picture in one sentence. who are you? I am a small model. user
assistant system the quick brown fox jumps over the lazy dog"""

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def _core(special: tuple[str, ...]) -> str:
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator([WORDS, "user\n\n", "assistant\n\n"] * 3, trainer)
    return core.to_str()


def tiny_tokenizer(*, with_image_tokens: bool = True) -> PreTrainedTokenizerFast:
    """Without the image tokens it looks like a language model's own, to which `build` adds them."""
    special = (*chat.LLAMA_TOKENS, "<|eom_id|>", "<|python_tag|>", *(chat.IMAGE_TOKENS if with_image_tokens else ()))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_core(special)),
        bos_token=chat.BEGIN_OF_TEXT,
        eos_token=chat.END_OF_TURN,
        pad_token=chat.PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_parts(folder: Path, *, tie: bool = True, with_image_tokens: bool = False, seed: int = 0) -> ModelConfig:
    """Write `clip/` and `llm/` (with tokenizer) as their makers would; say how to join them."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(with_image_tokens=with_image_tokens)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    tower = {**layers, "image_size": SIDE, "patch_size": PATCH, "projection_dim": 16}
    text = {**layers, "vocab_size": 64, "projection_dim": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    CLIPModel(CLIPConfig(vision_config=tower, text_config=text, projection_dim=16)).save_pretrained(folder / "clip")
    llama = LlamaConfig(
        **layers,
        num_key_value_heads=1,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=4,
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    return ModelConfig(
        vision=str(folder / "clip"),
        language=str(folder / "llm"),
        num_image_tokens=NUM_IMAGE_TOKENS,
        connector_width=48,
    )


def tiny_processor(**changes: Any) -> TinyVLMProcessor:
    """A processor for `tiny_model`."""
    settings: dict[str, Any] = {"picture": PICTURE, "num_image_tokens": NUM_IMAGE_TOKENS, **changes}
    return TinyVLMProcessor(tiny_tokenizer(), **settings)


def tiny_model(
    folder: Path, *, seed: int = 0, **changes: Any
) -> tuple[TinyVLMForConditionalGeneration, TinyVLMProcessor]:
    """A built model and its processor; `folder` takes the parts.  `changes` are fields of `ModelConfig`.

    Weights are larger than a fresh model's, so that pictures and words visibly move the logits.
    """
    config = dataclasses.replace(save_parts(folder / "parts", seed=seed), **changes)
    model, processor = build(config, PICTURE, seed)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.mul_(10)
    return model, processor


def picture(seed: int = 0, width: int = 48, height: int = 48) -> Image.Image:
    """A picture of coarse random blocks, unlike any other seed's."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def ask(question: str = "what shape is in the image?", *, pictures: int = 1) -> list[Message]:
    """A conversation of one user turn, pictures first."""
    return [Message("user", (*(Picture(index) for index in range(pictures)), question))]
