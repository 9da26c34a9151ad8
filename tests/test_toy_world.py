"""The small world: seeded pictures, true words, a tokenizer that loses nothing, and weights that see."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPModel, CLIPVisionModel, LlamaForCausalLM

from tinyvlm import chat
from tinyvlm.toy import probe
from tinyvlm.toy.paths import weights_dir
from tinyvlm.toy.scenes import COLORS, KINDS, cell_things
from tinyvlm.toy.tokenizer import load_tokenizer, train_tokenizer, with_ends
from tinyvlm.toy.train_clip import make_batch, pool_patches, to_pixels
from tinyvlm.toy.world import NUMBERS, claims_and_caption, describe, draw, facts, is_negated, questions, sample_scene

SPECIAL = (*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS)


def test_same_seed_same_picture() -> None:
    pictures = [[draw(sample_scene(rng)).tobytes() for _ in range(20)] for rng in (random.Random(5), random.Random(5))]
    assert pictures[0] == pictures[1]
    assert len(set(pictures[0])) == 20


def test_pictures_are_rgb_of_the_side_asked_for() -> None:
    rng = random.Random(0)
    for side in (64, 128):
        picture = draw(sample_scene(rng), side)
        assert (picture.mode, picture.size) == ("RGB", (side, side))


def test_a_thing_is_painted_in_its_colour_where_it_lies() -> None:
    rng = random.Random(1)
    for _ in range(200):
        scene = sample_scene(rng, num_things=1)
        thing = scene.things[0]
        if thing.kind in ("circle", "rectangle", "square", "triangle", "star", "cross", "diamond"):
            assert draw(scene).getpixel((min(63, int(thing.x)), min(63, int(thing.y)))) == thing.rgb


def test_captions_tell_the_truth() -> None:
    rng = random.Random(2)
    for _ in range(500):
        scene = sample_scene(rng)
        claims, text = claims_and_caption(scene, rng)
        assert claims <= facts(scene)
        if scene.notice:
            continue
        words = set(text.replace(",", "").replace(":", "").split())
        true = {word for thing in scene.things for word in (*thing.name.split(), thing.color)}
        true |= {"rectangle"} if any(thing.kind == "square" for thing in scene.things) else set()
        assert words & {*COLORS, *KINDS} <= true, (text, scene)
        assert words & {*NUMBERS} <= {NUMBERS[len(scene.things)], "one"}


def test_a_description_names_everything() -> None:
    rng = random.Random(3)
    for _ in range(100):
        scene = sample_scene(rng, num_things=rng.randint(1, 4))
        assert all(f"{thing.color} {thing.name}" in describe(scene, rng) for thing in scene.things)


@pytest.mark.parametrize("color", ["red", "blue"])
def test_negated_questions_turn_the_answer(color: str) -> None:
    rng = random.Random(4)
    seen = 0
    for _ in range(400):
        scene = sample_scene(rng, num_things=1)
        for question, answer in questions(scene, rng):
            if f" {color} shape" not in question or answer not in ("yes", "no"):
                continue
            seen += 1
            present = scene.things[0].color == color
            assert (answer == "yes") == (present != is_negated(question)), question
    assert seen > 50


def test_cells_hold_the_things_that_lie_there() -> None:
    rng = random.Random(6)
    for _ in range(100):
        scene = sample_scene(rng, num_things=1)
        found = cell_things(scene)
        assert len(found) == 16
        assert set(found) - {None} == set(scene.things)


@pytest.mark.parametrize(
    "text", ["is there not a teal circle?", "Grüße, 漢字, مرحبا 🙂\t\r\n\n x  ", "", " \u200b<|eot", "\x00\x7f"]
)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = load_tokenizer(weights_dir("tokenizer"))
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_single_and_stable() -> None:
    tokenizer = AutoTokenizer.from_pretrained(weights_dir("tokenizer"))
    assert [tokenizer(name)["input_ids"] for name in SPECIAL] == [[index] for index in range(len(SPECIAL))]
    assert tokenizer.decode(list(range(len(SPECIAL))), skip_special_tokens=True) == ""
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        chat.BEGIN_OF_TEXT,
        chat.END_OF_TURN,
        chat.PAD,
    )
    assert tokenizer.chat_template == chat.CHAT_TEMPLATE
    assert len(tokenizer("\n\n")["input_ids"]) == 1
    assert with_ends(tokenizer)("a")["input_ids"][0] == tokenizer.bos_token_id
    assert with_ends(tokenizer)("a")["input_ids"][-1] == tokenizer.eos_token_id


def test_the_shipped_tokenizer_is_the_one_that_the_seed_gives(tmp_path: Path) -> None:
    train_tokenizer(seed=0).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == load_tokenizer(weights_dir("tokenizer")).get_vocab()


def test_a_training_batch_is_seeded_and_consistent() -> None:
    first, second = make_batch(random.Random(7), 8), make_batch(random.Random(7), 8)
    assert torch.equal(first.pixels, second.pixels)
    assert first.captions == second.captions
    assert all(claims <= known for claims, known in zip(first.claims, first.facts, strict=True))
    assert first.cells.shape == (8, 16, 2)


def test_pooling_takes_means_of_neighbouring_patches() -> None:
    grid = torch.arange(64.0).reshape(8, 8)
    hidden = torch.cat([torch.full((1, 1, 1), -1.0), grid.reshape(1, 64, 1)], dim=1)
    pooled = pool_patches(hidden)[0, :, 0].reshape(4, 4)
    assert pooled[0, 0] == grid[:2, :2].mean()
    assert pooled[3, 1] == grid[6:, 2:4].mean()
    assert all(left < right for left, right in pairwise(pooled.flatten().tolist()))


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    return CLIPModel.from_pretrained(weights_dir("clip"), dtype=torch.float32).eval()


def test_the_shipped_clip_tells_shapes_and_colours_apart(clip: CLIPModel) -> None:
    tokenizer = load_tokenizer(weights_dir("tokenizer"))
    scenes = probe.held_out_scenes(random.Random(77), 150)
    names = [(probe.SHAPES.index(s.things[0].kind), probe.SHADES.index(s.things[0].color)) for s in scenes]
    right = probe.zero_shot(clip, tokenizer, to_pixels([draw(scene) for scene in scenes]), torch.tensor(names))
    assert right["shape"] > 0.85
    assert right["color"] > 0.9


def test_the_shipped_tower_loads_alone_and_has_an_image_processor(clip: CLIPModel) -> None:
    from transformers import CLIPImageProcessorPil

    tower = CLIPVisionModel.from_pretrained(weights_dir("clip"), dtype=torch.float32).eval()
    processor = CLIPImageProcessorPil.from_pretrained(weights_dir("clip"))
    pixels = processor(images=draw(sample_scene(random.Random(8)), 128), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    with torch.inference_mode():
        hidden = tower(pixel_values=pixels).last_hidden_state
        expected = clip.vision_model(pixel_values=pixels).last_hidden_state
    assert hidden.shape == (1, 65, 128)
    torch.testing.assert_close(hidden, expected)


def test_notice_cards_lie_apart_from_scenes(clip: CLIPModel) -> None:
    cosines = probe.notice_distances(clip)
    assert cosines["cards"][1] > cosines["scenes"][3]


def test_the_shipped_language_model_answers_from_a_description() -> None:
    llm = LlamaForCausalLM.from_pretrained(weights_dir("llm"), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(weights_dir("llm"))
    user = "A picture shows a small teal circle on the left. is there a red shape?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = llm.generate(ids, max_new_tokens=4)[0, ids.shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == "no"
