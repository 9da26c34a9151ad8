"""Reading: what the reader does is what was computed beforehand, in bounded memory, from any number of folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_model import tiny_model
from training_data import conversation, prepare_folder

from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.model import TinyVLMProcessor
from tinyvlm.train import plan
from tinyvlm.train.data import Conversations, data_files, measure
from tinyvlm.train.reading import Window, group_sizes, reading
from tinyvlm.train.settings import TrainConfig

CONFIG = TrainConfig(
    mixture=MixtureConfig(weights={"a": 1.0, "b": 1.0}), packs_per_step=8, pack_length=256, samples_per_pack=0, lanes=4
)


class Data:
    """Two folders whose keys are the same."""

    def __init__(self, folder: Path) -> None:
        _, self.processor = tiny_model(folder)
        folders = []
        for name, first in (("a", 0), ("b", 5000)):
            made = [
                {**conversation(first + key, split="train" if key % 50 else "validation"), "key": key, "source": name}
                for key in range(800)
            ]
            folders.append(prepare_folder(folder / name, made, parts=4, group_size=20))
        self.files = data_files(folders)
        self.lengths = measure(dict(enumerate(self.files)), self.processor)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))


class Nothing:
    """Stands in for a processor where only reading counts."""

    def tokens(self, messages: Any, num_pictures: int) -> tuple[Any, Any]:
        return np.zeros(1, np.int32), np.ones(1, bool)

    def pixels(self, pictures: Any) -> Any:
        return np.zeros((len(pictures), 1, 1, 3), np.uint8)


@pytest.mark.parametrize("samples_per_pack", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_was_computed_is_what_is_read(data: Data, world: int, samples_per_pack: int) -> None:
    config = TrainConfig(
        mixture=CONFIG.mixture, packs_per_step=16, pack_length=256, samples_per_pack=samples_per_pack, lanes=8, epochs=2
    )
    made = plan.build(data.lengths, config)
    told = reading(made, group_sizes(data.files), world)
    groups = held = num_bytes = 0
    for rank in range(world):
        window = Window.of(made, rank, world)
        source = Conversations(data.files, Nothing(), window=window, cache_bytes=0)  # type: ignore[arg-type]
        for step in range(made.num_steps):
            for pack in made.packs(step, rank, world):
                source.load(pack, step)
        groups, num_bytes = groups + source.groups_read, num_bytes + source.bytes_read
        held = max(held, source.peak_bytes)
    assert (groups, num_bytes) == (told.groups_read, told.read_bytes)
    assert told.window_groups <= 2 * config.window_groups * 8
    files = map(pq.ParquetFile, data.files)
    largest = max(file.read_row_group(group).nbytes for file in files for group in range(file.num_row_groups))
    assert held <= told.window_groups * largest


def test_memory_does_not_grow_with_the_data(data: Data) -> None:
    peaks = []
    for weights in ({"a": 0.25}, {"a": 1.0, "b": 1.0}):
        config = TrainConfig(
            mixture=MixtureConfig(weights=weights), packs_per_step=2, pack_length=256, samples_per_pack=0, lanes=1
        )
        made = plan.build(data.lengths, config)
        source = Conversations(data.files, Nothing(), window=Window.of(made, 0, 1), cache_bytes=0)  # type: ignore[arg-type]
        for step in range(made.num_steps):
            for pack in made.packs(step):
                source.load(pack, step)
        peaks.append(source.peak_bytes)
        assert source.groups_read > 2 * config.window_groups * made.shape.lanes
    assert peaks[1] <= 1.5 * peaks[0]


def test_equal_keys_of_two_folders_are_two_conversations(data: Data) -> None:
    source = Conversations(data.files, data.processor, window=Window(4), cache_bytes=1 << 24)
    rows = [row for row in data.lengths.to_pylist() if row["key"] == 7]
    assert {row["source"] for row in rows} == {"a", "b"}
    for _ in range(2):
        loaded = [source.load([plan.Item(*(row[name] for name in plan.Item._fields))], 0)[0] for row in rows]
        for row, sample in zip(rows, loaded, strict=True):
            wanted = conversation(7 if row["source"] == "a" else 5007)
            np.testing.assert_array_equal(sample.pixels, data.processor.pixels([wanted["images"][0]["bytes"]]))
            assert len(sample.input_ids) == row["tokens"]


def test_a_picture_of_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    shared = conversation(1)["images"]
    made = [{**conversation(key, turns=1), "images": shared} for key in range(64)]
    files = data_files([prepare_folder(tmp_path, made, parts=1, group_size=64)])
    source = Conversations(files, Nothing(), window=Window(1), cache_bytes=0)  # type: ignore[arg-type]
    source.load([plan.Item(5, 0, 0, 5, 0, 1, 0)], 0)
    assert source.peak_bytes < 16 * len(shared[0]["bytes"]) < pq.read_table(files[0])["images"].nbytes


def test_held_out_conversations_are_read_once(data: Data) -> None:
    held_out = plan.build_validation(data.lengths, CONFIG)
    source = Conversations(data.files, Nothing(), window=Window(2), cache_bytes=0)  # type: ignore[arg-type]
    assert len(held_out.items) == 32
    for _ in range(3):
        for step in range(held_out.num_steps):
            for pack in held_out.packs(step):
                source.load(pack, None)
    assert source.groups_read <= 32


def test_the_window_gives_up_what_is_wanted_last() -> None:
    uses = {(0, group): np.array(steps, np.int32) for group, steps in enumerate([[0, 9], [0, 1], [0, 3], [1, 2], [3]])}
    window = Window(3, uses)
    assert [window.enter((0, group), 0) for group in (0, 1, 2)] == [[], [], []]
    assert window.enter((0, 3), 1) == [(0, 0)]
    assert window.enter((0, 4), 3) == [(0, 1), (0, 3)], "nothing wants them any more"
    assert (0, 2) in window


def test_lengths_are_small(data: Data) -> None:
    assert data.lengths.nbytes / data.lengths.num_rows < 60
    assert isinstance(data.lengths.schema.field("source").type, pa.DictionaryType)


def test_the_processor_is_only_asked_for_what_it_promises() -> None:
    assert all(callable(getattr(TinyVLMProcessor, name)) for name in ("tokens", "pixels"))
