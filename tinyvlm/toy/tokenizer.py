"""The tiny tokenizer: byte-level BPE over the sentences of the small world and `english.txt`.

    captions, descriptions, questions (seeded) + english.txt ──BPE, ≤ 1,500 entries──▶ weights/tokenizer/

It splits words as Llama 3 does, has no normaliser and falls back to bytes, so every text comes back unchanged.  Special
tokens are `chat.LLAMA_TOKENS` (ids 0-5) and `chat.IMAGE_TOKENS` (ids 6-8).  Nothing is added automatically: the chat
template writes `<|begin_of_text|>`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tinyvlm import chat
from tinyvlm.toy.world import caption, describe, questions, sample_scene

VOCAB_SIZE = 1500
MAX_LENGTH = 1024

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text into words before BPE (its tokenizer.json, `pre_tokenizer`)."""

WHOLE = ("\n\n", "\n")
"""Line ends that must be one token each; BPE learns them from the corpus below."""

CHAT_WORDS = (
    "You are a helpful assistant.", "Please answer yes or no.", "Answer with one word.", "Answer briefly.",
    "Answer the question using a single word or phrase.", "Yes", "No", "describe the image.", "write a caption.",
    "give a short description of the picture.", "A picture shows", "The image shows", "Describe the image.",
)  # fmt: skip
"""What every conversation is full of."""


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same seed gives the same file."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=[
            AddedToken(name, special=True, normalized=False) for name in (*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS)
        ],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_corpus(seed), trainer)
    return _wrap(core)


def with_ends(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same vocabulary for CLIP's text tower: every text becomes `<|begin_of_text|> … <|eot_id|>`."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ends = (chat.BEGIN_OF_TEXT, chat.END_OF_TURN)
    core.post_processor = processors.TemplateProcessing(
        single=f"{ends[0]} $A {ends[1]}", special_tokens=[(name, core.token_to_id(name)) for name in ends]
    )
    return _wrap(core, max_length=77)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Read a saved tokenizer."""
    return cast(PreTrainedTokenizerFast, PreTrainedTokenizerFast.from_pretrained(folder))


def _wrap(core: Tokenizer, max_length: int = MAX_LENGTH) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=chat.BEGIN_OF_TEXT,
        eos_token=chat.END_OF_TURN,
        pad_token=chat.PAD,
        additional_special_tokens=[
            name
            for name in (*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS)
            if name not in (chat.BEGIN_OF_TEXT, chat.END_OF_TURN, chat.PAD)
        ],
        chat_template=chat.CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        truncation_side="right",
    )


def _corpus(seed: int) -> Iterator[str]:
    """English first and often, so that the world's few words do not crowd it out; then the world itself."""
    english = resources.files("tinyvlm.toy").joinpath("english.txt").read_text(encoding="utf-8")
    for _ in range(10):
        yield from english.splitlines()
        yield english.lower()
    rng = random.Random(seed)
    for _ in range(4000):
        scene = sample_scene(rng)
        yield caption(scene, rng)
        yield describe(scene, rng) + "."
        for question, answer in questions(scene, rng):
            yield from (question, answer, f" {answer}")
            yield question[0].upper() + question[1:]
        yield from (*(f"user{mark}" for mark in WHOLE), "assistant", "system", *CHAT_WORDS)
