"""Training of the tiny Llama on text: it learns to answer questions about scenes that it is told of, never shown.

A scene reaches it in one of three ways, all through `chat.render`:

    cells   <IMAGE>[.][.][small+teal+circle][.] … 16 slots …<IMAGE_END>is there a red shape?        → no
    words   <IMAGE>a small teal circle at the top right<IMAGE_END>is there a red shape?             → no
    plain   A picture shows a small teal circle at the top right. is there a red shape?             → no

In the first way each `<Image_Token>` slot stands for one cell of a 4×4 grid and its embedding is the *sum* of the
embeddings of the words that are true of that cell (the image token's own embedding where nothing lies).  So the model
can read a picture written out in its own word embeddings, and the connector of the vision-language model has to learn
no more than to write one.  No pixel is involved.  Loss: 1 on the assistant's words, 0.1 on a tenth of the others.

What it took.  Copying a colour out of a description was learned in 200 steps; seeing whether a word of the question
*occurs* in the description was not, in 1,800.  Two things changed that: keys that start equal to their queries, so that
equal words attend to each other from the first step (mimetic initialisation, arXiv 2305.09828), and lessons that begin
with one-word questions ("teal?").  Negated questions come last, because "present" and "negated" decide an answer only
together, which is the parity problem.

Legend: B conversations, T tokens, W = 4 words in one slot, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyvlm import chat
from tinyvlm.chat import Message, Picture
from tinyvlm.toy.scenes import Scene, Thing, cell_things, sample_scene
from tinyvlm.toy.world import checks, describe, is_negated, questions

log = logging.getLogger(__name__)

NUM_SLOTS = 16
NUM_WORDS = 4
WAYS = ("cells", "words", "plain")

_DESCRIBE = (
    "describe the image.", "describe the picture.", "what is in the picture?", "what do you see?", "write a caption.",
    "what does the image show?", "give a short description of the image.", "caption this image.",
    "tell me what you see.",
)  # fmt: skip
_TALK = (
    ("hello", "Hello! Show me a picture and ask a question about it."),
    ("hi!", "Hello! Show me a picture and ask a question about it."),
    ("who are you?", "I am a small language model that answers questions about simple pictures."),
    ("what can you do?", "I can see simple pictures and answer short questions about them."),
    ("thank you", "You are welcome."),
    ("what is the capital of france?", "I am sorry, I do not know the answer."),
)
_TELL = ("A picture shows {}. ", "The image shows {}.\n", "Picture: {}\n", "There is {} in the picture. ")
_SUFFIXES = (" Answer with one word.", " Answer the question using a single word or phrase.", "\nAnswer briefly.")


@dataclass(frozen=True)
class Lesson:
    """What is asked until a share of the steps is done.

    A share `drill` of the conversations are six `checks` of a level; the others have up to `max_turns` `questions`.
    """

    until: float
    drill: float
    level: int
    max_turns: int


LESSONS = (Lesson(0.16, 0.8, 0, 1), Lesson(0.36, 0.7, 1, 2), Lesson(0.55, 0.6, 2, 3), Lesson(1.0, 0.2, 2, 4))


@dataclass(frozen=True)
class LlmRun:
    """How long and how fast to train; the shipped weights: these defaults, seed 0, stopped at step 1,750 of 2,400."""

    steps: int = 3000
    batch: int = 24
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    keep_every: int = 250
    seed: int = 0


@dataclass
class Sample:
    """One conversation: words (T × up to W ids) and the weight of the loss on each token."""

    slots: list[list[int]]
    weights: list[float]


def llm_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """4 layers of width 128, 4 heads sharing 2 keys, tied embeddings, 1,024 positions."""
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
        rms_norm_eps=1e-5, initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def train_llm(
    tokenizer: PreTrainedTokenizerFast, run: LlmRun, keep: Callable[[LlamaForCausalLM], None] | None = None
) -> LlamaForCausalLM:
    """Train from nothing; the same run on the same machine and number of threads gives the same weights.

    `keep` is called with the unfinished model every `run.keep_every` steps.
    """
    torch.manual_seed(run.seed)
    rng = random.Random(run.seed)
    model = LlamaForCausalLM(llm_config(tokenizer)).train()
    _let_equals_attend(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.learning_rate, betas=(0.9, 0.98), weight_decay=run.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run))
    began = time.monotonic()
    lessons = iter(LESSONS)
    lesson = next(lessons)
    batches = _batches(rng, tokenizer, run.batch, lesson)
    for step in range(run.steps):
        if step >= lesson.until * run.steps:
            lesson = next(lessons)
            batches = _batches(rng, tokenizer, run.batch, lesson)
        samples = next(batches)
        loss, hits = _loss(model, samples)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == run.steps - 1:
            log.info("step %d loss %.3f right %.3f time %.0f s", step, loss.item(), hits, time.monotonic() - began)
        if keep and step % run.keep_every == run.keep_every - 1:
            keep(model)
    return model.eval()


@torch.no_grad()
def _let_equals_attend(model: LlamaForCausalLM) -> None:
    """Set every query head to its key head: the score of two tokens then starts as their likeness."""
    config = model.config
    for layer in model.model.layers:
        keys, queries = layer.self_attn.k_proj.weight, layer.self_attn.q_proj.weight
        keys.normal_(0, 0.09)
        heads = keys.view(config.num_key_value_heads, -1, config.hidden_size)
        queries.copy_(heads.repeat_interleave(config.num_attention_heads // len(heads), 0).reshape_as(queries))


def _batches(
    rng: random.Random, tokenizer: PreTrainedTokenizerFast, size: int, lesson: Lesson
) -> Iterator[list[Sample]]:
    """Endless batches of about equal lengths: eight are drawn at a time, sorted, and given out in random order."""
    while True:
        samples = [sample_conversation(rng, tokenizer, lesson) for _ in range(8 * size)]
        samples.sort(key=lambda sample: len(sample.slots))
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        rng.shuffle(batches)
        yield from batches


def save_llm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder in half precision, with the tokenizer beside the weights."""
    model.generation_config.do_sample = False
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample_conversation(rng: random.Random, tokenizer: PreTrainedTokenizerFast, lesson: Lesson = LESSONS[-1]) -> Sample:
    """A conversation of a few questions about a described scene; 2 % are small talk without one."""
    if rng.random() < 0.02:
        question, answer = rng.choice(_TALK)
        return encode([Message("user", (question,)), Message("assistant", (answer,))], None, "", tokenizer, rng)
    scene = sample_scene(rng)
    way = rng.choices(WAYS, (60, 20, 20))[0]
    if scene.things and rng.random() < lesson.drill:
        turns = checks(scene, rng, 6, lesson.level)
    else:
        turns = ask(scene, rng, rng.randint(1, lesson.max_turns), way, lesson.level == 2)
    return encode(converse(turns, scene, rng, way), scene, way, tokenizer, rng)


def ask(scene: Scene, rng: random.Random, num_turns: int, way: str, negated: bool = True) -> list[tuple[str, str]]:
    """Questions with answers; what a notice says is asked only where the words are given."""
    turns = questions(scene, rng)
    if scene.notice and way == "cells":
        turns = [turn for turn in turns if turn[1] != scene.notice.text]
    if not negated:
        turns = [turn for turn in turns if not is_negated(turn[0])]
    turns = [(_vary(question, answer, rng), answer) for question, answer in turns[:num_turns]]
    if rng.random() < 0.12:
        told = "a gray notice card" if scene.notice and way == "cells" else describe(scene, rng, in_order=True)
        turns[rng.randrange(len(turns))] = (rng.choice(_DESCRIBE), told)
    return turns


def converse(turns: list[tuple[str, str]], scene: Scene, rng: random.Random, way: str) -> list[Message]:
    """Turns as messages; the scene stands before (or, a tenth of the time, after) the first question."""
    messages = [Message("system", ("You are a helpful assistant.",))] if rng.random() < 0.1 else []
    for index, (question, answer) in enumerate(turns):
        if index:
            parts: tuple[chat.Part, ...] = (question,)
        elif way == "plain":
            parts = (rng.choice(_TELL).format(describe(scene, rng)) + question,)
        else:
            gap = rng.choice(("", "", "\n"))
            parts = (Picture(0), gap + question) if rng.random() < 0.9 else (question + gap, Picture(0))
        messages += [Message("user", parts), Message("assistant", (answer,))]
    return messages


def encode(
    messages: list[Message], scene: Scene | None, way: str, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Sample:
    """Render, put the scene where the picture would be, tokenise, and choose which other words carry a little loss."""
    slots: list[list[int]] = []
    weights: list[float] = []
    slot_id = tokenizer.convert_tokens_to_ids(chat.IMAGE_TOKEN)
    cells = iter(_cells(scene, rng, tokenizer)) if scene and way == "cells" else iter(())
    for segment in chat.render(messages, NUM_SLOTS if way == "cells" else 0):
        text = segment.text
        if scene and way == "words":
            text = text.replace(chat.IMAGE, chat.IMAGE + describe(scene, rng), 1)
        for token in tokenizer(text)["input_ids"]:
            is_slot = token == slot_id
            slots.append(next(cells) if is_slot else [token])
            other = 0.1 if not is_slot and rng.random() < 0.1 else 0.0
            weights.append(1.0 if segment.supervised else other)
    return Sample(slots, weights)


def _cells(scene: Scene, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """What lies in each cell, as word ids: size, colour, kind, letter; the first cell of a thing says
    everything, later ones leave a word out now and then."""
    empty = [tokenizer.convert_tokens_to_ids(chat.IMAGE_TOKEN)]
    if scene.notice:
        return [_words("notice card", tokenizer) for _ in range(NUM_SLOTS)]
    cells = []
    told: set[Thing] = set()
    for thing in cell_things(scene):
        words = (thing.size, thing.color, thing.kind, thing.text) if thing else ()
        kept = " ".join(word for word in words if word and (thing not in told or rng.random() < 0.85))
        told.update((thing,) if thing else ())
        cells.append(_words(kept, tokenizer) if kept else empty)
    return cells


def _words(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    ids: list[int] = tokenizer(f" {text}")["input_ids"]
    return ids[:NUM_WORDS]


def _vary(question: str, answer: str, rng: random.Random) -> str:
    """Capitals, missing question marks and the instructions that benchmarks append."""
    if rng.random() < 0.25:
        question = question[0].upper() + question[1:]
    if rng.random() < 0.05:
        question = question.rstrip("?.")
    if answer in ("yes", "no") and rng.random() < 0.1:
        return question + " Please answer yes or no."
    return question + rng.choice(_SUFFIXES) if rng.random() < 0.1 else question


def guess(model: LlamaForCausalLM, samples: list[Sample]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run a batch, and the vocabulary layer only where a token carries loss: N tokens in all.

    Padding stands on the right, where causal attention cannot see it, so no mask is needed.

    Returns:
        logits (N, V), the tokens they should give (N), the loss weights (N) and the conversation of each (N).
    """
    longest = max(len(sample.slots) for sample in samples)
    ids_BTW = torch.full((len(samples), longest, NUM_WORDS), -1)
    weights_BT = torch.zeros(len(samples), longest)
    for row, sample in enumerate(samples):
        padded = [slot + [-1] * (NUM_WORDS - len(slot)) for slot in sample.slots]
        ids_BTW[row, : len(padded)] = torch.tensor(padded)
        weights_BT[row, : len(padded)] = torch.tensor(sample.weights)
    words = model.get_input_embeddings()(ids_BTW.clamp(min=0)) * (ids_BTW >= 0).unsqueeze(-1)
    hidden = model.model(inputs_embeds=words.sum(2), use_cache=False).last_hidden_state
    rows, columns = (weights_BT[:, 1:] > 0).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, columns])
    return logits, ids_BTW[rows, columns + 1, 0], weights_BT[rows, columns + 1], rows


def _loss(model: LlamaForCausalLM, samples: list[Sample]) -> tuple[Tensor, float]:
    """Weighted mean of the token losses, and the share of supervised tokens that are guessed rightly."""
    logits, wanted, weights, _ = guess(model, samples)
    losses = F.cross_entropy(logits, wanted, reduction="none")
    right = (logits.argmax(-1) == wanted)[weights == 1].float().mean()
    return (losses * weights).sum() / weights.sum(), float(right)


def _rate(step: int, run: LlmRun) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    done = (step - run.warmup) / max(1, run.steps - run.warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
