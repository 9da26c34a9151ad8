"""LLaVAR: its files repeat LLaVA's rows, and its pictures have made-up names."""

from __future__ import annotations

import json
from pathlib import Path

from test_source_llava import image_bytes, pictures, prepare, said, statistics, talk

COCO, OWN = "000000033471.jpg", "100000012345.jpg"
LLAVAS = [talk("<image>\nWhat colour?", "Red.", image=COCO), talk("Why?\n<image>", "Paint.", image=COCO)]
OWNS = [
    talk("<image>\nWhat does it say?", "Exit.", "In which colour?", "Green.", image=OWN, id="100000012345"),
    talk("Identify any text visible in the image provided.\n<image>", "EXIT", image="GCC_train_100000012.jpg"),
]


def test_alone_its_rows_and_llavas_are_told_apart_by_the_pictures_numbers(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", COCO, OWN, "GCC_train_100000012.jpg", "GCC_train_002582585.jpg")
    caption = talk("<image>\nDescribe it.", "A bus.", image="GCC_train_002582585.jpg")
    rows = {"llava_instruct_150k_llavar_16k.json": [*LLAVAS, caption, *OWNS]}
    found = prepare(rows, tmp_path, source="llavar", images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok"] * 5
    assert [row["source"] for row in found] == ["llavar/llava"] * 3 + ["llavar"] * 2
    assert [row["family"] for row in found] == ["instruction"] * 3 + ["multi_turn", "instruction"]
    assert said(found[4])[0] == ("user", "Identify any text visible in the image provided.[0]")
    assert statistics(tmp_path / "out")["rows_of"] == {"llava": 3, "llavar": 2}


def test_with_llavas_file_known_only_its_own_rows_are_left(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", OWN, "GCC_train_100000012.jpg")
    known = tmp_path / "llava_instruct_150k.json"
    moved = [talk("What colour?\n<image>", "Red.", image=f"coco/train2017/{COCO}"), LLAVAS[1]]
    known.write_text(json.dumps(moved))
    rows = {"llava_instruct_150k_llavar_20k.json": [*LLAVAS, *OWNS]}
    found = prepare(rows, tmp_path, source="llavar", images={"": str(folder)}, known=(str(known),))
    assert [row["status"] for row in found] == ["duplicate", "duplicate", "ok", "ok"]
    assert found[0]["detail"] == "says the same as a record of prepare.known"
    assert statistics(tmp_path / "out")["rows_of"] == {"llava": 2, "llavar": 2}, "known records are not counted"


def test_given_with_its_longer_version_every_row_is_used_once(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "p", COCO, OWN, "GCC_train_100000012.jpg")
    rows = {"llava_instruct_150k_llavar_16k.json": [*LLAVAS, OWNS[0]],
            "llava_instruct_150k_llavar_20k.json": [*LLAVAS, *OWNS]}  # fmt: skip
    found = prepare(rows, tmp_path, source="llavar", images={"": str(folder)})
    assert [row["status"] for row in found] == ["ok"] * 3 + ["duplicate"] * 3 + ["ok"]


def test_its_pictures_have_a_folder_of_their_own(tmp_path: Path) -> None:
    coco, own = tmp_path / "train2017", tmp_path / "finetune"
    coco.mkdir(), own.mkdir()
    for folder, name, number in [(coco, COCO, 1), (coco, OWN, 2), (own, OWN, 3), (own, COCO, 4)]:
        (folder / name).write_bytes(image_bytes(number))
    places = {"": str(coco), "llavar": str(own)}
    found = prepare([LLAVAS[0], OWNS[0], OWNS[1]], tmp_path, source="llavar", images=places)
    assert [row["status"] for row in found] == ["ok", "ok", "no_picture"]
    assert found[2]["detail"].startswith("llavar/GCC_train_100000012.jpg is not in ")
    merged = prepare([LLAVAS[0], OWNS[0]], tmp_path / "merged", source="llavar", images={"": str(own)})
    assert found[1]["images"] == merged[1]["images"], "LLaVAR's from its own folder"
    assert found[0]["images"] != merged[0]["images"], "LLaVA's from COCO's"
