"""Training of the tiny CLIP pair of towers on drawn pictures and their captions.

    Scene ─┬─ draw ─ (often: enlarged, JPEG, shrunk) ─▶ vision tower ─┬─ CLS ──────────▶ contrastive loss ◀─ text tower
           │                                                         └─ patches, 4×4 ─▶ cell loss                 ▲
           └─ claims_and_caption ─▶ caption ──────────────────────────────────────────────────────────────────────╯

Two losses, added.  (1) The symmetric contrastive loss of CLIP with a learned temperature, where *every* caption that is
true of a picture counts as a match (a batch of 64 small scenes is full of captions that fit several pictures).  (2) A
cell loss: two linear heads, thrown away afterwards, read from each cell of the pooled last hidden state which kind of
thing and which colour lies there.  In plain CLIP the last layer's patch outputs get no gradient; these are what the
connector of the vision-language model reads, so without (2) they would be what chance left there.

Most of a small scene is empty.  The first four fifths of the steps therefore show the tower only the 24 busiest of the
64 patches (as FLIP, arXiv 2212.00794, does with random ones), which is three times faster; the rest show all of them.

Legend: B pictures, P = 64 patches, C = 16 cells, D = 128 width, L caption tokens.
"""

from __future__ import annotations

import copy
import io
import logging
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from tinyvlm.toy.scenes import COLORS, KINDS, SIDE, Scene, Thing, cell_things, draw, sample_scene
from tinyvlm.toy.tokenizer import with_ends
from tinyvlm.toy.world import Claim, claims_and_caption, facts

log = logging.getLogger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own normalisation (openai/clip-vit-large-patch14-336, preprocessor_config.json)."""

PATCH = 8
NUM_PATCHES = (SIDE // PATCH) ** 2
SPARSE = 24
"""Patches per picture in the first, cheaper part of the training."""

GRID = 4
"""Cells per side after pooling: 16 image tokens."""

CELL_KINDS = ("nothing", *(kind for kind in KINDS if kind != "square"), "notice")
CELL_COLORS = ("nothing", *COLORS)


@dataclass(frozen=True)
class ClipRun:
    """How long and how fast to train; the defaults made the shipped weights."""

    steps: int = 2400
    sparse_share: float = 0.8
    batch: int = 64
    learning_rate: float = 2.5e-3
    weight_decay: float = 0.05
    warmup: int = 100
    cell_weight: float = 1.0
    keep_every: int = 200
    seed: int = 0


@dataclass
class Batch:
    """pixels (B, 3, 64, 64) uint8 · captions, claims and facts, B each · cells (B, C, 2): kind and colour."""

    pixels: Tensor
    captions: list[str]
    claims: list[frozenset[Claim]]
    facts: list[frozenset[Claim]]
    cells: Tensor


def clip_config(tokenizer: PreTrainedTokenizerFast) -> CLIPConfig:
    """Vision: 4 layers of width 128 on 64 patches of 8×8; text: 2 layers of width 128; both project to 128."""
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 128, "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": SIDE, "patch_size": PATCH, "projection_dim": 128, "hidden_act": "quick_gelu",
    }  # fmt: skip
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)


def train_clip(
    tokenizer: PreTrainedTokenizerFast, run: ClipRun, keep: Callable[[CLIPModel], None] | None = None
) -> CLIPModel:
    """Train from nothing; the same run on the same machine and number of threads gives the same weights.

    `keep` is called with the unfinished model every `run.keep_every` steps.
    """
    torch.manual_seed(run.seed)
    rng = random.Random(run.seed)
    words = with_ends(tokenizer)
    model = CLIPModel(clip_config(tokenizer)).train()
    heads = nn.ModuleList(nn.Linear(128, len(names)) for names in (CELL_KINDS, CELL_COLORS))
    optimizer = _optimizer(nn.ModuleList([model, heads]), run)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, run))
    began = time.monotonic()
    for step in range(run.steps):
        batch = make_batch(rng, run.batch)
        num_patches = SPARSE if step < run.sparse_share * run.steps else NUM_PATCHES
        contrast, cell, hits = _losses(model, heads, words, batch, num_patches)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(contrast + run.cell_weight * cell)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 20 == 0 or step == run.steps - 1:
            log.info(
                "step %d contrast %.3f cell %.3f kind %.3f color %.3f scale %.1f time %.0f s",
                step, contrast.item(), cell.item(), *hits, model.logit_scale.exp().item(), time.monotonic() - began,
            )  # fmt: skip
        if keep and step % run.keep_every == run.keep_every - 1:
            keep(model)
    return model.eval()


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a whole CLIP folder: half-precision weights, tokenizer with both ends, image processor."""
    copy.deepcopy(model).half().save_pretrained(folder)
    with_ends(tokenizer).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)


def normalise(pixels: Tensor) -> Tensor:
    """(B, 3, 64, 64) uint8 → float, as CLIP wants it."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def pool_patches(hidden: Tensor) -> Tensor:
    """Last hidden state (B, 1+P, D) with CLS first → cell features (B, C, D), row by row: means of 2×2 patches."""
    num, _, width = hidden.shape
    side = math.isqrt(hidden.shape[1] - 1)
    patches = hidden[:, 1:].reshape(num, GRID, side // GRID, GRID, side // GRID, width)
    return patches.mean(dim=(2, 4)).reshape(num, GRID * GRID, width)


def to_pixels(pictures: list[Image.Image]) -> Tensor:
    """64×64 RGB pictures → (B, 3, 64, 64) uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def make_batch(rng: random.Random, size: int) -> Batch:
    """Draw `size` scenes with a caption each; about 40 % of the pictures went through JPEG as stored ones do."""
    scenes = [sample_scene(rng) for _ in range(size)]
    spoken = [claims_and_caption(scene, rng) for scene in scenes]
    return Batch(
        pixels=to_pixels([as_stored(draw(scene), rng) for scene in scenes]),
        captions=[text for _, text in spoken],
        claims=[claims for claims, _ in spoken],
        facts=[facts(scene) for scene in scenes],
        cells=torch.tensor([cells(scene) for scene in scenes]),
    )


def as_stored(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Sometimes what storing does to a picture: enlarged, written as JPEG, and shrunk again."""
    if rng.random() > 0.4:
        return picture
    side = rng.choice((64, 128, 192))
    buffer = io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=rng.randint(70, 95))
    return Image.open(buffer).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def cells(scene: Scene) -> list[tuple[int, int]]:
    """For each of the 16 cells the indices in `CELL_KINDS` and `CELL_COLORS`; on a notice card every cell says so."""
    if scene.notice:
        return [(len(CELL_KINDS) - 1, 0)] * GRID**2
    return [_labels(thing) if thing else (0, 0) for thing in cell_things(scene, GRID)]


def _labels(thing: Thing) -> tuple[int, int]:
    kind = "rectangle" if thing.kind == "square" else thing.kind
    return CELL_KINDS.index(kind), CELL_COLORS.index(thing.color)


def busy_patches(pixels: Tensor, num: int) -> Tensor:
    """Indices (B, num) of the patches with most to see: edges first, then flat ones unlike the picture's median."""
    size, across = PATCH, SIDE // PATCH
    patches = pixels.float().unfold(2, size, size).unfold(3, size, size).reshape(len(pixels), 3, across**2, size**2)
    mean, spread = patches.mean(-1), patches.std(-1)
    unlike = (mean - mean.median(dim=2, keepdim=True).values).abs()
    score = (spread + 0.2 * unlike).sum(1)
    return (score + torch.rand_like(score)).topk(num, dim=1).indices


def look(model: CLIPModel, pixels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run the vision tower on the CLS and the `kept` patches (B, n) alone.

    Returns:
        The pooled CLS (B, D), the cell means of the kept patches (B, C, D), and how many were kept in each cell (B, C).
    """
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(normalise(pixels)))
    width = hidden.shape[-1]
    chosen = hidden[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, width))
    hidden = tower.encoder(inputs_embeds=torch.cat([hidden[:, :1], chosen], dim=1)).last_hidden_state
    across, fold = SIDE // PATCH, SIDE // PATCH // GRID
    cell = kept // across // fold * GRID + kept % across // fold
    sums = hidden.new_zeros(len(kept), GRID**2, width)
    sums = sums.scatter_add(1, cell.unsqueeze(-1).expand(-1, -1, width), hidden[:, 1:])
    counts = torch.zeros(len(kept), GRID**2).scatter_add(1, cell, torch.ones_like(cell, dtype=torch.float))
    return tower.post_layernorm(hidden[:, 0]), sums / counts.clamp(min=1).unsqueeze(-1), counts


def _losses(
    model: CLIPModel, heads: nn.ModuleList, words: PreTrainedTokenizerFast, batch: Batch, num_patches: int
) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Contrastive loss, cell loss, and the shares of occupied cells whose kind and colour are read rightly."""
    pooled, features, counts = look(model, batch.pixels, busy_patches(batch.pixels, num_patches))
    tokens = words(batch.captions, padding=True, return_tensors="pt")
    text = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    images_BD = F.normalize(model.visual_projection(pooled), dim=-1)
    texts_BD = F.normalize(model.text_projection(text.pooler_output), dim=-1)
    logits = model.logit_scale.exp() * images_BD @ texts_BD.T
    true = torch.tensor([[claim <= known for claim in batch.claims] for known in batch.facts]).float()
    contrast = (_soft_entropy(logits, true) + _soft_entropy(logits.T, true.T)) / 2
    loss, hits = features.new_zeros(()), []
    for index, head in enumerate(heads):
        guess, label = head(features).flatten(0, 1), batch.cells[..., index].flatten()
        weight = torch.where(label > 0, 1.0, 0.25) * (counts.flatten() > 0)  # most cells are empty
        loss = loss + (F.cross_entropy(guess, label, reduction="none") * weight).sum() / weight.sum()
        hits.append(float((guess.argmax(-1) == label)[label > 0].float().mean()))
    return contrast, loss, (hits[0], hits[1])


def _soft_entropy(logits: Tensor, true: Tensor) -> Tensor:
    """Cross entropy of each row against the uniform distribution over its true columns."""
    return F.cross_entropy(logits, true / true.sum(-1, keepdim=True))


def _optimizer(modules: nn.Module, run: ClipRun) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in modules.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in modules.parameters() if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": run.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=run.learning_rate, betas=(0.9, 0.98), eps=1e-6)


def _rate(step: int, run: ClipRun) -> float:
    """Linear warm-up, then half a cosine down to 2 %."""
    if step < run.warmup:
        return (step + 1) / run.warmup
    done = (step - run.warmup) / max(1, run.steps - run.warmup)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
