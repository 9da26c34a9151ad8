"""Packed samples are worth what each is worth alone; what is read is what the processor makes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import ask, picture, tiny_model
from training_data import conversation, prepare_folder, rows

from tinyvlm.chat import Message
from tinyvlm.data.conversations import messages_of
from tinyvlm.errors import DataError
from tinyvlm.model import Sample, TinyVLMForConditionalGeneration, TinyVLMProcessor
from tinyvlm.train import plan
from tinyvlm.train.batch import IGNORED, Batch, assemble, group
from tinyvlm.train.data import Conversations, data_files, measure
from tinyvlm.train.reading import Window

torch.set_num_threads(1)

Parts = tuple[TinyVLMForConditionalGeneration, TinyVLMProcessor]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return tiny_model(tmp_path_factory.mktemp("parts"))


def samples(processor: TinyVLMProcessor) -> list[Sample]:
    """Of different lengths, with one, two and no pictures."""
    made = []
    for number, pictures in enumerate((1, 2, 0, 1, 1)):
        answer = Message("assistant", ("a red circle. " * (number + 1),))
        shown = [picture(10 * number + place) for place in range(pictures)]
        made.append(processor.encode([*ask(pictures=pictures), answer], shown))
    return made


def loss_of(model: TinyVLMForConditionalGeneration, batch: Batch) -> tuple[float, int]:
    with torch.no_grad():
        output = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            pixel_values=batch.pixel_values,
            loss_reduction="sum",
            use_cache=False,
        )
    assert output.loss is not None
    assert output.num_supervised is not None
    return float(output.loss), output.num_supervised


@pytest.mark.parametrize("layout", [[[0, 1, 2, 3, 4]], [[0, 1], [2, 3], [4]], [[4, 3], [2, 1, 0]], [[2], [0, 2], [3]]])
def test_a_pack_loses_what_its_samples_lose_alone(parts: Parts, layout: list[list[int]]) -> None:
    model, processor = parts
    each = samples(processor)
    alone = [loss_of(model, assemble([[sample]], processor.pad_id)) for sample in each]
    packed = loss_of(model, assemble([[each[n] for n in row] for row in layout], processor.pad_id))
    wanted = [alone[n] for row in layout for n in row]
    assert packed[1] == sum(count for _, count in wanted)
    assert packed[0] == pytest.approx(sum(loss for loss, _ in wanted), rel=1e-5)


CHANGES = {
    "its words": lambda made: ([*ask("is there a circle?", pictures=2), Message("assistant", ("no",))], [10, 11]),
    "its pictures": lambda made: (made, [98, 99]),
    "its length": lambda made: ([*made[:1], Message("assistant", ("a red circle. " * 9,))], [10, 11]),
    "everything": lambda made: ([*ask("why?", pictures=3), Message("assistant", ("blue",))], [97, 98, 99]),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("change", CHANGES)
def test_changing_one_sample_changes_no_logit_of_its_neighbours(parts: Parts, change: str, attention: str) -> None:
    """Neighbours before it, after it, and in the other row of the batch."""
    model, processor = parts
    model.language.set_attn_implementation(attention)
    first, _, text, last, other_row = samples(processor)
    words = [*ask(pictures=2), Message("assistant", ("a red circle. a red circle. ",))]
    changed, shown = CHANGES[change](words)

    def logits(messages: list[Message], seeds: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        middle = processor.encode(messages, [picture(seed) for seed in seeds])
        batch = assemble([[first, middle, text, last], [text, other_row]], processor.pad_id)
        with torch.no_grad():
            made = model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                pixel_values=batch.pixel_values,
                use_cache=False,
            ).logits
        assert made is not None
        start = len(first.input_ids)
        end = start + len(middle.input_ids)
        after = len(text.input_ids) + len(last.input_ids)
        second_row = len(text.input_ids) + len(other_row.input_ids)
        return [made[0, :start], made[0, end : end + after], made[1, :second_row]], made[0, start:end]

    before, own_before = logits(words, [10, 11])
    after, own_after = logits(changed, shown)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert own_before.shape != own_after.shape or not torch.allclose(own_before, own_after, atol=1e-3)
    model.language.set_attn_implementation("sdpa")


def test_batches_keep_to_packs_and_tokens() -> None:
    packs = [[plan.Item(0, 0, 0, 0, tokens, 0, 1)] for tokens in (100, 90, 60, 30, 30, 30, 30, 10)]
    by_tokens = [[pack[0].tokens for pack in batch] for batch in group(packs, 3, 200)]
    assert by_tokens == [[100, 90], [60, 30, 30], [30, 30, 10]]
    assert [len(batch) for batch in group(packs, 3, 0)] == [3, 3, 2]
    assert [len(batch) for batch in group(packs, 9, 1)] == [1] * 8


def test_pictures_stand_in_the_order_of_their_tokens(parts: Parts) -> None:
    model, processor = parts
    each = samples(processor)
    batch = assemble([[each[3]], [each[1], each[0]]], processor.pad_id)
    assert batch.pixel_values is not None
    wanted = np.concatenate([each[3].pixels, each[1].pixels, each[0].pixels])
    torch.testing.assert_close(batch.pixel_values, processor.collate([each[3], each[1], each[0]])["pixel_values"])
    assert batch.pixels is not None
    swapped = dataclasses.replace(batch, pixels=batch.pixels.flip(0))
    assert abs(loss_of(model, batch)[0] - loss_of(model, swapped)[0]) > 1e-3
    assert len(wanted) == len(batch.pixel_values)


def test_only_answers_carry_loss_and_padding_goes_on_counting(parts: Parts) -> None:
    _, processor = parts
    each = samples(processor)
    batch = assemble([[each[2]], [each[0], each[1]]], processor.pad_id)
    supervised = batch.input_ids[batch.labels != IGNORED]
    torch.testing.assert_close(batch.labels[batch.labels != IGNORED], supervised)
    assert len(supervised) == sum(int(each[n].supervised.sum()) for n in (0, 1, 2))
    end = len(each[2].input_ids)
    assert batch.position_ids[0, end:].tolist() == list(range(end, batch.input_ids.shape[1]))
    assert set(batch.input_ids[0, end:].tolist()) == {processor.pad_id}


def test_measured_lengths_are_those_of_the_encoded_samples(parts: Parts, tmp_path: Path) -> None:
    _, processor = parts
    made = rows(40)
    files = data_files([prepare_folder(tmp_path, [*made, conversation(1000, split="test")])])
    table = measure(dict(enumerate(files)), processor)
    assert sorted(table["key"].to_pylist()) == list(range(40)), "test conversations are none of training's business"
    by_key = {row["key"]: row for row in table.to_pylist()}
    assert by_key[0]["status"] == "no_picture"
    for row in made[1:]:
        sample = processor.encode(messages_of(row["messages"]), [image["bytes"] for image in row["images"]])
        measured = by_key[row["key"]]
        assert (measured["tokens"], measured["pictures"]) == (len(sample.input_ids), len(row["images"]))
        assert measured["supervised"] == sample.supervised.sum()


@pytest.mark.parametrize("cache_bytes", [0, 1 << 24])
def test_what_is_loaded_is_what_the_processor_makes(parts: Parts, tmp_path: Path, cache_bytes: int) -> None:
    _, processor = parts
    made = rows(24)
    files = data_files([prepare_folder(tmp_path, made)])
    table = measure(dict(enumerate(files)), processor)
    source = Conversations(files, processor, window=Window(2), cache_bytes=cache_bytes)
    for _ in range(2):
        for row in table.to_pylist()[1:]:
            item = plan.Item(*(row[name] for name in plan.Item._fields))
            wanted = made[row["key"]]
            sample = processor.encode(messages_of(wanted["messages"]), [image["bytes"] for image in wanted["images"]])
            [loaded] = source.load([item], 0)
            np.testing.assert_array_equal(loaded.input_ids, sample.input_ids)
            np.testing.assert_array_equal(loaded.supervised, sample.supervised)
            np.testing.assert_array_equal(loaded.pixels, sample.pixels)
    assert source.groups_read == (4 if cache_bytes else 8), "a remembered sample is not read again"


def test_a_damaged_picture_is_named(parts: Parts, tmp_path: Path) -> None:
    _, processor = parts
    made = [conversation(5), conversation(6)]
    made[1]["images"][0]["bytes"] = made[1]["images"][0]["bytes"][:100]
    files = data_files([prepare_folder(tmp_path, made, parts=1)])
    source = Conversations(files, processor, window=Window(1), cache_bytes=0)
    with pytest.raises(DataError, match="conversation 6"):
        source.load([plan.Item(6, 0, 0, 1, 0, 1, 0)], 0)
