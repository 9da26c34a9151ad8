"""Records that share pictures, and that the held-out split does not part them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from prepared import photo, prepared, write_lines

from tinyvlm.data import picture_groups
from tinyvlm.data.picture_groups import TRAINED_ON, PictureGroups
from tinyvlm.data.prepare import PrepareConfig


def test_a_group_is_the_same_in_whatever_order_its_records_came() -> None:
    records = [[3, 9], [9, 4], [4, 5, 6], [20, 21], [21, 22], [7], [8, 8]]
    for seed in range(20):
        random.Random(seed).shuffle(records)
        groups = PictureGroups()
        for record in records:
            groups.join(record)
        assert [groups.group(picture) for picture in (3, 9, 4, 5, 6)] == [3] * 5
        assert [groups.group(picture) for picture in (20, 21, 22)] == [20] * 3
        assert [groups.group(picture) for picture in (7, 8, 99, None)] == [None] * 4


def test_a_large_group_is_trained_on() -> None:
    groups = PictureGroups()
    for number in range(1, picture_groups.MOST_PICTURES):
        groups.join([number, number + 1])
    assert groups.group(7) == 1
    groups.join([1, 10_000])
    assert groups.group(7) == TRAINED_ON


def chained(folder: Path, num_chains: int, length: int) -> Path:
    """Talks about two pictures each, of which the next one shows the second again, and about each picture alone."""
    folder.mkdir()
    for number in range(num_chains * length):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    shown = [[f"{number}.jpg"] for number in range(num_chains * length)]
    for number in range(num_chains * length):
        if (number + 1) % length:
            shown.append([f"{number}.jpg", f"{number + 1}.jpg"])
    rows = [
        {
            "messages": [{"role": "user", "content": "<image>" * len(some)}, {"role": "assistant", "content": "Well."}],
            "images": some,
        }
        for some in shown
    ]
    return write_lines(folder / "data.jsonl", rows)


def test_no_picture_is_on_both_sides_also_where_conversations_show_several(tmp_path: Path) -> None:
    file = chained(tmp_path / "mine", num_chains=10, length=4)
    config = PrepareConfig(source="messages", count_tokens=False, validation_share=0.4)
    rows = prepared([file], tmp_path / "out", config)
    assert {row["status"] for row in rows} == {"ok"}
    sides = {
        split: {image["sha256"] for row in rows if row["split"] == split for image in row["images"]}
        for split in ("train", "validation")
    }
    assert len(sides["train"]) + len(sides["validation"]) == 40  # none is in both
    assert 4 <= len(sides["validation"]) <= 32


def test_a_dataset_that_hangs_together_is_not_held_out_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_groups, "MOST_PICTURES", 3)
    file = chained(tmp_path / "mine", num_chains=3, length=4)
    config = PrepareConfig(source="messages", count_tokens=False, validation_share=1.0)
    rows = prepared([file], tmp_path / "out", config)
    assert {(row["status"], row["split"]) for row in rows} == {("ok", "train")}
