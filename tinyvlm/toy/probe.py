"""`python -m tinyvlm.toy.probe --weights DIR`: what the tiny weights can do on things they were not trained on.

* zero shot: which of three shape words, or of eight colour words, is nearest to a picture, on freshly drawn scenes and
  on easy-VQA's pictures (used here and nowhere in training; `pip install easy-vqa`, left out when absent);
* probe: a small network on the 16×128 pooled patch features, fitted on easy-VQA's training pictures, tested on its test
  pictures.  It tells what the connector can find there, and is thrown away;
* notices: cosine of the raw CLS feature with the mean CLS of drawn notice cards, for cards and for scenes;
* answers: share of whole answers that the language model gets right about described scenes.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, LlamaForCausalLM, PreTrainedTokenizerFast

from tinyvlm.toy.scenes import Scene, draw, sample_scene
from tinyvlm.toy.tokenizer import load_tokenizer, with_ends
from tinyvlm.toy.train_clip import normalise, pool_patches, to_pixels
from tinyvlm.toy.train_llm import WAYS, ask, converse, encode, guess

log = logging.getLogger(__name__)

SHAPES = ("circle", "rectangle", "triangle")
SHADES = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--out", type=Path, help="JSON file to write; the log otherwise")
    parser.add_argument("--only", choices=("clip", "llm"))
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = load_tokenizer(options.weights / "tokenizer")
    report: dict[str, Any] = {}
    if options.only != "llm":
        clip = CLIPModel.from_pretrained(options.weights / "clip", dtype=torch.float32).eval()
        report |= probe_clip(clip, tokenizer)
    if options.only != "clip":
        llm = LlamaForCausalLM.from_pretrained(options.weights / "llm", dtype=torch.float32).eval()
        report["answers"] = {way: probe_llm(llm, tokenizer, way) for way in WAYS}
    text = json.dumps(report, indent=1)
    log.info("%s", text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def probe_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Zero shot on both worlds, the probe, and the notice distances."""
    scenes = held_out_scenes(random.Random(1_000_003), 1000)
    drawn = to_pixels([draw(scene) for scene in scenes])
    labels = [(SHAPES.index(scene.things[0].kind), SHADES.index(scene.things[0].color)) for scene in scenes]
    report: dict[str, Any] = {
        "zero_shot_drawn": zero_shot(clip, tokenizer, drawn, torch.tensor(labels)),
        "notices": notice_distances(clip),
    }
    try:
        train, test = easy_vqa_pictures("train"), easy_vqa_pictures("test")
    except ImportError:
        return report
    report["zero_shot_easy_vqa"] = zero_shot(clip, tokenizer, *test)
    report["probe_easy_vqa"] = fit_probe(features(clip, train[0])[1], train[1], features(clip, test[0])[1], test[1])
    return report


def held_out_scenes(rng: random.Random, num: int) -> list[Scene]:
    """Single circles, rectangles and triangles in easy-VQA's eight colours; the seed is not a training seed."""
    scenes: list[Scene] = []
    while len(scenes) < num:
        scene = sample_scene(rng, num_things=1)
        if scene.things[0].kind in SHAPES and scene.things[0].color in SHADES:
            scenes.append(scene)
    return scenes


def easy_vqa_pictures(split: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) uint8 and labels (N, 2), shape and colour, read off the questions that name them."""
    import easy_vqa

    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    texts, answers, ids = easy_vqa.get_train_questions() if split == "train" else easy_vqa.get_test_questions()
    shapes: dict[int, int] = {}
    colors: dict[int, int] = {}
    for text, answer, picture in zip(texts, answers, ids, strict=True):
        negated = " not " in text or text.startswith("is no ")
        holds = (answer == "yes") != negated
        if text.startswith("what") and answer in SHAPES:
            shapes[picture] = SHAPES.index(answer)
        elif text.startswith("what"):
            colors[picture] = SHADES.index(answer)
        elif holds:
            shapes.update((picture, index) for index, shape in enumerate(SHAPES) if shape in text)
            colors.update((picture, index) for index, shade in enumerate(SHADES) if f" {shade} " in text)
    known = sorted(shapes.keys() & colors.keys())
    pixels = to_pixels([Image.open(paths[picture]).convert("RGB") for picture in known])
    return pixels, torch.tensor([(shapes[picture], colors[picture]) for picture in known])


@torch.inference_mode()
def features(clip: CLIPModel, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Raw CLS (N, D), pooled cells (N, C, D) and projected, normalised pictures (N, 128)."""
    cls, cells, projected = [], [], []
    for start in range(0, len(pixels), 256):
        output = clip.vision_model(pixel_values=normalise(pixels[start : start + 256]))
        cls.append(output.last_hidden_state[:, 0])
        cells.append(pool_patches(output.last_hidden_state))
        projected.append(F.normalize(clip.visual_projection(output.pooler_output), dim=-1))
    return torch.cat(cls), torch.cat(cells), torch.cat(projected)


@torch.inference_mode()
def embed_texts(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Texts → (N, 128), normalised."""
    tokens = with_ends(tokenizer)(texts, padding=True, return_tensors="pt")
    output = clip.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return F.normalize(clip.text_projection(output.pooler_output), dim=-1)


def zero_shot(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, pixels: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy of the nearest caption among three shapes and among eight colours."""
    projected = features(clip, pixels)[2]
    shapes = embed_texts(clip, tokenizer, [f"a picture of a {shape}" for shape in SHAPES])
    shades = embed_texts(clip, tokenizer, [f"a picture of a {shade} shape" for shade in SHADES])
    return {
        "shape": _share((projected @ shapes.T).argmax(-1) == labels[:, 0]),
        "color": _share((projected @ shades.T).argmax(-1) == labels[:, 1]),
    }


def fit_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> dict[str, float]:
    """Accuracy on the test pictures of an MLP (one hidden layer of 256) over all 16 cells."""
    torch.manual_seed(0)
    mean, std = train_x.mean((0, 1)), train_x.std((0, 1))
    train_x, test_x = (((x - mean) / std).flatten(1) for x in (train_x, test_x))
    probe = nn.Sequential(nn.Linear(train_x.shape[1], 256), nn.GELU(), nn.Linear(256, len(SHAPES) + len(SHADES)))
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.05)
    for _ in range(20):
        order = torch.randperm(len(train_x))
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            output = probe(train_x[rows])
            shape, color = output[:, : len(SHAPES)], output[:, len(SHAPES) :]
            loss = F.cross_entropy(shape, train_y[rows, 0]) + F.cross_entropy(color, train_y[rows, 1])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    with torch.inference_mode():
        output = probe(test_x)
        shape, color = output[:, : len(SHAPES)], output[:, len(SHAPES) :]
    return {"shape": _share(shape.argmax(-1) == test_y[:, 0]), "color": _share(color.argmax(-1) == test_y[:, 1])}


def notice_distances(clip: CLIPModel) -> dict[str, list[float]]:
    """Quantiles (0, 1, 50, 99, 100 %) of the cosine with the mean of 200 notice cards: other cards, and scenes."""
    rng = random.Random(2_000_003)
    groups = [(200, True), (300, True), (1000, False)]
    drawn = [
        to_pixels([draw(sample_scene(rng, None if notice else rng.randint(1, 4), notice)) for _ in range(num)])
        for num, notice in groups
    ]
    reference, cards, scenes = (features(clip, pixels)[0] for pixels in drawn)
    center = F.normalize(F.normalize(reference, dim=-1).mean(0), dim=-1)
    steps = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.0])
    return {
        name: [round(float(value), 3) for value in (F.normalize(group, dim=-1) @ center).quantile(steps)]
        for name, group in (("cards", cards), ("scenes", scenes))
    }


@torch.inference_mode()
def probe_llm(llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, way: str, num: int = 512) -> dict[str, float]:
    """Share of answers that are right from the first to the last token, over all and by kind of answer."""
    rng = random.Random(3_000_003)
    right: dict[str, list[bool]] = {}
    for _ in range(num // 64):
        scenes = [sample_scene(rng, num_things=rng.choice((1, 1, 1, 2, 3))) for _ in range(64)]
        turns = [ask(scene, rng, 1, way) for scene in scenes]
        samples = [
            encode(converse(turn, scene, rng, way), scene, way, tokenizer, rng)
            for turn, scene in zip(turns, scenes, strict=True)
        ]
        logits, wanted, weights, rows = guess(llm, samples)
        wrong = (logits.argmax(-1) != wanted) & (weights == 1)
        hits = torch.bincount(rows[wrong], minlength=len(samples)) == 0
        for turn, hit in zip(turns, hits.tolist(), strict=True):
            answer = turn[0][1]
            kind = "yes/no" if answer in ("yes", "no") else "word" if " " not in answer else "phrase"
            right.setdefault(kind, []).append(hit)
            right.setdefault("all", []).append(hit)
    return {kind: round(sum(hits) / len(hits), 4) for kind, hits in sorted(right.items())}


def _share(hits: Tensor) -> float:
    return round(float(hits.float().mean()), 4)


if __name__ == "__main__":
    main()
