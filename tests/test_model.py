"""The model: the same numbers as transformers' own parts, pictures in their places, loss on the right words."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_model import NUM_IMAGE_TOKENS, PICTURE, SIDE, ask, picture, save_parts, tiny_model
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPModel,
    CLIPVisionModel,
    LlamaForCausalLM,
    StaticCache,
)

from tinyvlm import chat
from tinyvlm.chat import Message, Picture
from tinyvlm.errors import CheckpointError, ConfigError, InputError
from tinyvlm.images import PictureConfig, normalise
from tinyvlm.model import (
    ModelConfig,
    Sample,
    TinyVLMConfig,
    TinyVLMForConditionalGeneration,
    TinyVLMProcessor,
    build,
    load,
    modeling,
)
from tinyvlm.model.modeling import pool_patches

Built = tuple[TinyVLMForConditionalGeneration, TinyVLMProcessor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def built(folder: Path) -> Built:
    return tiny_model(folder)


@pytest.fixture
def samples(built: Built) -> list[Sample]:
    processor = built[1]
    talk = [
        Message("user", (Picture(0), "what shape?")),
        Message("assistant", ("a red circle.",)),
        Message("user", ("and this? ", Picture(1))),
        Message("assistant", ("yes",)),
    ]
    return [
        processor.encode(talk, [picture(1), picture(2)]),
        processor.encode([*ask("who are you?", pictures=0), Message("assistant", ("I am a small model.",))]),
        processor.encode([*ask(), Message("assistant", ("a triangle",))], [picture(3)]),
    ]


def labels_of(sample: Sample) -> Tensor:
    return torch.from_numpy(np.where(sample.supervised, sample.input_ids, -100).astype(np.int64))[None]


def inputs_of(sample: Sample) -> dict[str, Tensor]:
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
    return {"input_ids": ids, "pixel_values": normalise(sample.pixels)}


def packed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([inputs_of(sample)["input_ids"] for sample in samples], dim=1),
        "pixel_values": normalise(np.concatenate([sample.pixels for sample in samples])),
        "position_ids": torch.cat([torch.arange(len(sample.input_ids)) for sample in samples])[None],
        "labels": torch.cat([labels_of(sample) for sample in samples], dim=1),
    }


def gradients(model: TinyVLMForConditionalGeneration, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# -- pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_is_the_mean_of_each_block() -> None:
    grid = torch.randn(2, 6, 6, 5)
    pooled = pool_patches(grid.reshape(2, 36, 5), 9).reshape(2, 3, 3, 5)
    for row in range(3):
        for column in range(3):
            block = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(pooled[:, row, column], block.mean(dim=(1, 2)))
    same = torch.nn.functional.avg_pool2d(grid.permute(0, 3, 1, 2), 2, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pool_patches(grid.reshape(2, 36, 5), 9), same)


def test_the_grid_keeps_its_orientation(built: Built) -> None:
    """A tower whose patch embedding is the patch's brightness shows a gradient picture the right way round."""
    model = copy.deepcopy(built[0])
    tower = model.vision
    tower.pre_layrnorm, tower.encoder.layers = torch.nn.Identity(), torch.nn.ModuleList()
    with torch.no_grad():
        tower.embeddings.position_embedding.weight.zero_()
        tower.embeddings.patch_embedding.weight.fill_(1.0)
    down = torch.linspace(-1, 1, SIDE)[:, None].expand(SIDE, SIDE)
    side = int(NUM_IMAGE_TOKENS**0.5)
    for image, grows in ((down, "down"), (down.T, "right")):
        grid = model.encode_pictures(image.expand(1, 3, SIDE, SIDE))[0, :, 0].reshape(side, side)
        grid = grid if grows == "down" else grid.T
        along, across = grid.diff(dim=0), grid.diff(dim=1)
        assert (along > 0.1).all()
        torch.testing.assert_close(across, torch.zeros_like(across), atol=1e-4, rtol=0)


# -- parity with transformers' own classes ---------------------------------------------------------------------------


def test_logits_are_those_of_the_parts_composed_by_hand(built: Built, folder: Path, samples: list[Sample]) -> None:
    model = built[0]
    clip = CLIPModel.from_pretrained(folder / "parts" / "clip").eval()
    language = LlamaForCausalLM.from_pretrained(folder / "parts" / "llm").eval()
    language.resize_token_embeddings(model.config.text_config.vocab_size, mean_resizing=False)
    language.load_state_dict(model.language.state_dict())
    inputs = inputs_of(samples[0])
    with torch.no_grad():
        patches = clip.vision_model(inputs["pixel_values"]).last_hidden_state[:, 1:]
        grid = patches.transpose(1, 2).unflatten(2, (8, 8))
        pooled = torch.nn.functional.avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
        c = model.connector
        rows = c.down_proj(torch.nn.functional.silu(c.gate_proj(pooled)) * c.up_proj(pooled))
        embeds = language.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"][0] == built[1].image_token_id).nonzero().flatten()
        embeds[0, places] = rows.flatten(0, 1)
        expected = language(inputs_embeds=embeds).logits
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_tower_is_clips_own(built: Built, folder: Path) -> None:
    pixels = normalise(built[1].pixels([picture()]))
    tower = CLIPVisionModel.from_pretrained(folder / "parts" / "clip").eval()
    with torch.no_grad():
        torch.testing.assert_close(built[0].vision(pixels).last_hidden_state, tower(pixels).last_hidden_state)


# -- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_land_in_order_at_their_tokens(built: Built, samples: list[Sample]) -> None:
    model, processor = built
    inputs = inputs_of(samples[0])
    embeds = model._embed(inputs["input_ids"], inputs["pixel_values"], None, None)[0]
    ids = inputs["input_ids"][0]
    rows = model.get_image_features(inputs["pixel_values"]).flatten(0, 1)
    torch.testing.assert_close(embeds[ids == processor.image_token_id], rows)
    words = ids != processor.image_token_id
    torch.testing.assert_close(embeds[words], model.get_input_embeddings()(ids)[words])
    first = ids.tolist().index(processor.tokenizer.convert_tokens_to_ids(chat.IMAGE))
    torch.testing.assert_close(embeds[first + 1 : first + 1 + NUM_IMAGE_TOKENS], rows[:NUM_IMAGE_TOKENS])


def test_another_picture_gives_other_logits(built: Built, samples: list[Sample]) -> None:
    model = built[0]
    inputs = inputs_of(samples[0])
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(0)}
    other = {**inputs, "pixel_values": normalise(built[1].pixels([picture(8), picture(9)]))}
    with torch.no_grad():
        logits = model(**inputs).logits
        assert (model(**swapped).logits[0, -1] - logits[0, -1]).abs().max() > 0.01
        assert (model(**other).logits[0, -1] - logits[0, -1]).abs().max() > 0.01


def test_stored_features_do_the_same_as_pictures(built: Built, samples: list[Sample]) -> None:
    model = built[0]
    inputs = inputs_of(samples[0])
    with torch.no_grad():
        features = model.encode_pictures(inputs["pixel_values"])
        stored = model(input_ids=inputs["input_ids"], image_features=features.half()).logits
        torch.testing.assert_close(stored, model(**inputs).logits, atol=0.1, rtol=0.1)
        same = model(input_ids=inputs["input_ids"], image_features=features).logits
        torch.testing.assert_close(same, model(**inputs).logits)
    with pytest.raises(InputError, match="not both"):
        model(**inputs, image_features=features)


def test_wrong_numbers_of_pictures_are_refused_with_both_numbers(built: Built, samples: list[Sample]) -> None:
    model, processor = built
    two = inputs_of(samples[0])
    with pytest.raises(InputError, match=r"has 8 image tokens but comes with 1 pictures, which take 4"):
        model(input_ids=two["input_ids"], pixel_values=two["pixel_values"][:1])
    with pytest.raises(InputError, match=r"has 8 image tokens but comes with 0 pictures"):
        model(input_ids=two["input_ids"])
    uneven = torch.zeros(2, 6, dtype=torch.long)
    uneven[0, :5] = uneven[1, :3] = processor.image_token_id
    with pytest.raises(InputError, match="Row 0 has 5 image tokens, which is no multiple of the 4"):
        model(input_ids=uneven, pixel_values=two["pixel_values"])
    with pytest.raises(InputError, match="neither"):
        model()


# -- loss ------------------------------------------------------------------------------------------------------------


def test_loss_is_transformers_loss_on_the_supervised_words(built: Built, samples: list[Sample]) -> None:
    model = built[0]
    inputs, labels = inputs_of(samples[0]), labels_of(samples[0])
    out = model(**inputs, labels=labels)
    logits = model(**inputs).logits
    expected = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    torch.testing.assert_close(out.loss, expected)
    assert out.logits is None
    assert out.num_supervised == samples[0].supervised.sum()
    summed = model(**inputs, labels=labels, loss_reduction="sum", return_logits=True)
    torch.testing.assert_close(summed.loss, expected * out.num_supervised)
    torch.testing.assert_close(summed.logits, logits)
    torch.testing.assert_close(model(**inputs, labels=labels, return_dict=False)[0], expected)


def test_loss_in_chunks_is_the_same(built: Built, samples: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = built[0], packed(samples)
    whole, whole_gradients = model(**batch).loss, gradients(model, **batch)
    monkeypatch.setattr(modeling, "LOSS_CHUNK", 3)
    torch.testing.assert_close(model(**batch).loss, whole)
    for name, gradient in gradients(model, **batch).items():
        torch.testing.assert_close(gradient, whole_gradients[name], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).loss, whole)


def test_packed_samples_do_not_see_each_other(built: Built, samples: list[Sample]) -> None:
    model = built[0]
    for order in (samples, samples[::-1]):
        with torch.no_grad():
            together = model(**packed(order), loss_reduction="sum", return_logits=True)
            alone = [
                model(**inputs_of(sample), labels=labels_of(sample), loss_reduction="sum", return_logits=True)
                for sample in order
            ]
        assert together.num_supervised == sum(one.num_supervised for one in alone)
        torch.testing.assert_close(together.loss, torch.stack([one.loss for one in alone]).sum(), atol=1e-4, rtol=1e-5)
        logits = torch.cat([one.logits for one in alone], dim=1)
        assert (together.logits - logits).abs().max() < 1e-5


def test_nothing_supervised_gives_a_loss_of_zero(built: Built, samples: list[Sample]) -> None:
    inputs = inputs_of(samples[1])
    out = built[0](**inputs, labels=torch.full_like(inputs["input_ids"], -100))
    out.loss.backward()
    assert (out.loss.item(), out.num_supervised) == (0.0, 0)
    built[0].zero_grad()


def test_every_weight_has_a_gradient_even_without_pictures(built: Built, samples: list[Sample]) -> None:
    model = copy.deepcopy(built[0]).train()
    names = {name for name, _ in model.named_parameters()}
    with_pictures = gradients(model, **inputs_of(samples[0]), labels=labels_of(samples[0]))
    assert set(with_pictures) == names
    assert all(with_pictures[name].abs().max() > 0 for name in names if not name.endswith("k_proj.bias"))
    text_only = gradients(model, **inputs_of(samples[1]), labels=labels_of(samples[1]))
    assert set(text_only) == names
    assert all((g == 0).all() for name, g in text_only.items() if name.startswith(("vision.", "connector.")))
    without = gradients(model, input_ids=inputs_of(samples[1])["input_ids"], labels=labels_of(samples[1]))
    for name, gradient in without.items():
        torch.testing.assert_close(gradient, text_only[name])


def test_gradient_checkpointing_changes_no_gradient(built: Built, samples: list[Sample]) -> None:
    model, batch = copy.deepcopy(built[0]).train(), packed(samples)
    plain = gradients(model, **batch)
    # The newer name where there is one: the older then warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert model.language.model.layers[0].gradient_checkpointing
    assert model.vision.encoder.layers[0].gradient_checkpointing
    for name, gradient in gradients(model, **batch).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-5, rtol=1e-4)


# -- generate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(built: Built) -> list[Sample]:
    asked = [("what?", 1), ("is there a circle in the image?", 0), ("describe", 2), ("red or blue?", 1)]
    pictures = [[picture(10 * row + i) for i in range(count)] for row, (_, count) in enumerate(asked)]
    return [
        built[1].encode(ask(text, pictures=count), images, open_answer=True)
        for (text, count), images in zip(asked, pictures, strict=True)
    ]


def new_tokens(model: TinyVLMForConditionalGeneration, batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
    out = model.generate(**batch, **{"max_new_tokens": 8, **options})
    return [row[batch["input_ids"].shape[1] :].tolist() for row in out]


def test_cached_generation_equals_uncached(built: Built, prompts: list[Sample]) -> None:
    batch = built[1].collate(prompts)
    assert new_tokens(built[0], batch) == new_tokens(built[0], batch, use_cache=False)


def test_a_left_padded_batch_equals_each_alone(built: Built, prompts: list[Sample]) -> None:
    model, processor = built
    together = new_tokens(model, processor.collate(prompts))
    for row, prompt in zip(together, prompts, strict=True):
        alone = new_tokens(model, processor.collate([prompt]))[0]
        assert row[: len(alone)] == alone
        assert all(token == processor.pad_id for token in row[len(alone) :])
    batch = processor.collate(prompts)
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(**batch, position_ids=positions).logits[:, -1]
        for row, prompt in zip(logits, prompts, strict=True):
            torch.testing.assert_close(row, model(**inputs_of(prompt)).logits[0, -1], atol=1e-5, rtol=1e-5)


def test_static_cache_answers_alike(built: Built, prompts: list[Sample]) -> None:
    model, batch = built[0], built[1].collate(prompts)
    cache = StaticCache(config=model.config.text_config, max_cache_len=batch["input_ids"].shape[1] + 8)
    assert new_tokens(model, batch, past_key_values=cache) == new_tokens(model, batch)


def test_several_answers_keep_the_pictures_of_their_row(built: Built, prompts: list[Sample]) -> None:
    model, batch = built[0], built[1].collate(prompts)
    beams = new_tokens(model, batch, num_beams=2, num_return_sequences=2)
    for row, prompt in enumerate(prompts):
        alone = new_tokens(model, built[1].collate([prompt]), num_beams=2, num_return_sequences=2)
        for beam in range(2):
            length = len([token for token in alone[beam] if token != built[1].pad_id])
            assert beams[2 * row + beam][:length] == alone[beam][:length]


def test_answers_contain_no_control_tokens(built: Built, prompts: list[Sample]) -> None:
    model, processor = copy.deepcopy(built[0]), built[1]
    with torch.no_grad():  # make every control token the likeliest
        model.language.lm_head.weight = torch.nn.Parameter(model.language.lm_head.weight.clone())
        model.language.lm_head.weight[list(processor.silent_ids)] *= 50
    for row in new_tokens(model, processor.collate(prompts[:1]), max_new_tokens=20):
        assert not set(row) & set(processor.silent_ids)


def test_embeddings_may_take_the_place_of_tokens(built: Built, prompts: list[Sample]) -> None:
    model, batch = built[0], built[1].collate(prompts[1:2])  # without pictures
    embeds = model.get_input_embeddings()(batch["input_ids"])
    out = model.generate(inputs_embeds=embeds, attention_mask=batch["attention_mask"], max_new_tokens=8)
    assert out.tolist() == new_tokens(model, batch)


def test_eager_attention_gives_the_same(built: Built, samples: list[Sample]) -> None:
    model = copy.deepcopy(built[0])
    expected = model(**packed(samples)).loss
    model.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in (model, model.vision, model.language)} == {"eager"}
    torch.testing.assert_close(model(**packed(samples)).loss, expected)


# -- saving, loading, building ---------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_through_the_auto_classes(built: Built, samples: list[Sample], tmp_path: Path) -> None:
    model, processor = built
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not any("/parts/" in path.read_text() for path in tmp_path.glob("*.json"))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is TinyVLMConfig
    assert (config.num_image_tokens, config.image_token_id) == (NUM_IMAGE_TOKENS, processor.image_token_id)
    inputs = inputs_of(samples[0])
    for again in (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path),
        load(tmp_path)[0],
    ):
        assert type(again) is TinyVLMForConditionalGeneration
        assert again.language.lm_head.weight is again.language.get_input_embeddings().weight
        assert again.generation_config.eos_token_id == list(processor.end_ids)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    half, _ = load(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(**inputs).logits.isfinite().all()


def test_building_adds_the_image_tokens_as_means(folder: Path, tmp_path: Path) -> None:
    config = save_parts(tmp_path, tie=False)
    model, processor = build(config, PICTURE)
    old = LlamaForCausalLM.from_pretrained(config.language)
    vocabulary = old.config.vocab_size
    assert model.config.text_config.vocab_size == vocabulary + 3 == len(processor.tokenizer)
    for new, before in (
        (model.get_input_embeddings(), old.get_input_embeddings()),
        (model.get_output_embeddings(), old.get_output_embeddings()),
    ):
        torch.testing.assert_close(new.weight[:vocabulary], before.weight)
        torch.testing.assert_close(new.weight[vocabulary:], before.weight.mean(dim=0).expand(3, -1))
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    own = save_parts(tmp_path / "own", with_image_tokens=True)
    again, processor = build(own, PICTURE)
    assert again.config.text_config.vocab_size == LlamaForCausalLM.from_pretrained(own.language).config.vocab_size
    assert again.config.text_config.vocab_size == len(processor.tokenizer)


def test_the_seed_decides_the_connector(folder: Path, tmp_path: Path) -> None:
    config = save_parts(tmp_path)
    one, same, other = (build(config, PICTURE, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one.connector.up_proj.weight, same.connector.up_proj.weight)
    assert not torch.equal(one.connector.up_proj.weight, other.connector.up_proj.weight)
    weights = torch.cat([p.flatten() for p in one.connector.parameters()])
    assert weights.std().item() == pytest.approx(modeling.CONNECTOR_STD, rel=0.05)
    assert all(parameter.requires_grad for parameter in one.parameters())
    assert one.connector.up_proj.bias is None


def test_the_plain_connector_has_two_layers(tmp_path: Path) -> None:
    model, processor = tiny_model(tmp_path, connector="mlp")
    features = torch.randn(1, NUM_IMAGE_TOKENS, 32)
    c = model.connector
    expected = c.down_proj(torch.nn.functional.gelu(c.up_proj(features)))
    torch.testing.assert_close(c(features), expected)
    names = {name for name, _ in c.named_parameters()}
    assert names == {"down_proj.bias", "down_proj.weight", "up_proj.bias", "up_proj.weight"}
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    assert torch.equal(load(tmp_path / "m")[0].connector(features), c(features))


def test_a_fresh_model_has_a_fresh_connector() -> None:
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = TinyVLMConfig(vision_config=tower, text_config=text, num_image_tokens=4, connector_width=512)
    model = TinyVLMForConditionalGeneration(config)
    assert model.connector.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_more_tokens_can_be_added(built: Built) -> None:
    model = copy.deepcopy(built[0])
    size = model.config.text_config.vocab_size
    model.resize_token_embeddings(size + 5, mean_resizing=False)
    assert model.config.text_config.vocab_size == size + 5
    assert model(input_ids=torch.tensor([[size + 4, 20]])).logits.shape == (1, 2, size + 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_image_tokens": 5}, "no square number; use for example 4"),
        ({"num_image_tokens": 0}, "no square number"),
        ({"connector_width": 0}, "connector_width is 0"),
    ],
)
def test_wrong_settings_are_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**change)


def test_parts_that_do_not_fit_are_refused(tmp_path: Path, folder: Path) -> None:
    config = save_parts(tmp_path)
    with pytest.raises(ConfigError, match=r"tower_size is 64, .* reads 32×32; set picture.tower_size=32"):
        build(config, PictureConfig(size=48, tower_size=64))
    with pytest.raises(ConfigError, match=r"is 9, but the vision tower has 8×8 patches; use one of 1, 4, 16, 64"):
        build(dataclasses.replace(config, num_image_tokens=9), PICTURE)
    for part, what in (("vision", "vision tower"), ("language", "language model"), ("tokenizer", "tokenizer")):
        with pytest.raises(CheckpointError, match=rf"The {what} .*nowhere.* cannot be loaded .*HF_TOKEN"):
            build(dataclasses.replace(config, **{part: str(tmp_path / "nowhere")}), PICTURE)
    with pytest.raises(CheckpointError, match=r"vision tower .* (lacks|cannot be loaded)"):
        build(dataclasses.replace(config, vision=config.language), PICTURE)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="holds a model of type 'llama'"):
        load(save_parts(tmp_path).language)
    model, processor = tiny_model(tmp_path / "good")
    model.save_pretrained(tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"model .* cannot be loaded"):
        load(tmp_path / "broken")
