"""M3IT's rows, in the forms in which they lie about, become the same conversations."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub, serving
from PIL import Image
from tiny_model import picture

from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare
from tinyvlm.data.sources.m3it_files import SUBSETS, located
from tinyvlm.errors import ConfigError, DataError
from tinyvlm.images import PictureConfig
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32
FILES = (  # of the repository, one with training rows for each data set, where it has any
    "captioning/coco/train.jsonl",
    "captioning/textcap/train.jsonl",
    "captioning/image_paragraph_captioning/image_paragraph_captioning_train.jsonl",
    "classification/coco-goi/train.jsonl",
    "classification/coco-text/train.jsonl",
    "classification/imagenet/train.jsonl",
    "classification/itm/train.jsonl",
    "classification/snli-ve/esnlive_train.jsonl",
    "classification/mocheg/mocheg_train.jsonl",
    "classification/iqa/train.jsonl",
    "vqa/vqav2/train.jsonl",
    "vqa/shapes/train.large.jsonl",
    "vqa/docvqa/train.jsonl",
    "vqa/ocr-vqa/train_new.jsonl",
    "vqa/st-vqa/train.jsonl",
    "vqa/text-vqa/train.jsonl",
    "vqa/gqa/train.jsonl",
    "vqa/okvqa/train_v2.jsonl",
    "vqa/a-okvqa/train_v2.jsonl",
    "reasoning/science_qa/train.jsonl",
    "vqa/viquae/train.jsonl",
    "reasoning/clevr/train.jsonl",
    "reasoning/nlvr/train.jsonl",
    "reasoning/vcr/train.jsonl",
    "reasoning/visual_mrc/train.jsonl",
    "classification/winoground/winoground_test.jsonl",
    "generation/vist/train.jsonl",
    "generation/visual_dialog/train.jsonl",
    "generation/multi30k/train.jsonl",
)
PASSED_OVER = {
    "validation or test": (
        "captioning/coco/val.jsonl",
        "vqa/gqa/validation.jsonl",
        "vqa/text-vqa/validation_new.jsonl",
        "classification/mocheg/mocheg_test.jsonl",
        "classification/winoground/winoground_test.jsonl",
    ),
    "rephrased": (
        "vqa/shapes/train_2023-10-08.jsonl",
        "classification/snli-ve/train_2023-10-09.jsonl",
        "generation/visual_dialog/train_2023-10-09.jsonl",
    ),
    "older edition": ("vqa/ocr-vqa/train.jsonl", "vqa/okvqa/train.jsonl", "vqa/a-okvqa/train.jsonl"),
    "Chinese": ("captioning/coco-cn/train.jsonl", "generation/mmchat/train.jsonl"),
    "video": ("vqa/msvd-qa/train.jsonl", "captioning/msrvtt/train.jsonl"),
    "other": ("classification/vsr/train.jsonl",),
}


def jpeg(number: int, size: tuple[int, int] = (50, 40)) -> bytes:
    buffer = io.BytesIO()
    picture(number).resize(size).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(number: int) -> str:
    return base64.b64encode(jpeg(number)).decode()


def row(number: int = 0, **fields: Any) -> dict[str, Any]:
    """One of the form that the data set's own loader gives."""
    return {
        "instruction": f"Look at the picture and answer ({number}).",
        "inputs": f"What is number {number}?",
        "outputs": f"It is {number}.",
        "image_base64_str": [packed(number)],
        **fields,
    }


def lay(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def prepare(
    place: Path | str | Sequence[Path], root: Path, **settings: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows in the order of the input, and what the listing says of itself."""
    config = PrepareConfig(source="m3it", count_tokens=False, **settings)
    stage = Prepare(config, picture=PictureConfig(size=SIZE, tower_size=SIZE))
    places = [place] if isinstance(place, (Path, str)) else place
    run = StageRun(stage, open_prepare(stage, [Path(one) for one in places], root), root)
    manifest = run_local(run)
    rows = [one for name in manifest.files for one in pq.read_table(run.folder / "data" / name).to_pylist()]
    listed = json.loads(next(root.glob("records-*/stats.json")).read_text())
    return sorted(rows, key=lambda one: one["key"]), listed


def words(one: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who says what; pictures by their number."""
    return [
        (m["role"], "".join(f"[{p['image']}]" if p["text"] is None else p["text"] for p in m["parts"]))
        for m in one["messages"]
    ]


def test_a_row_is_pictures_instruction_inputs_and_answer(tmp_path: Path) -> None:
    rows, _ = prepare(lay(tmp_path / "data/vqa/gqa/train.jsonl", [row(3)]), tmp_path / "out")
    assert words(rows[0]) == [
        ("user", "[0]Look at the picture and answer (3).\nWhat is number 3?"),
        ("assistant", "It is 3."),
    ]
    assert (rows[0]["source"], rows[0]["family"], rows[0]["split"]) == ("m3it/gqa", "vqa", "train")
    with Image.open(io.BytesIO(rows[0]["images"][0]["bytes"])) as image:
        assert image.size == (SIZE, SIZE)


def test_the_repository_has_every_data_set_under_a_name_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(map(lambda file: located(f"data/{file}").subset, FILES)) == list(SUBSETS)
    for number, file in enumerate(FILES[:25] + FILES[26:]):
        lay(tmp_path / "data" / file, [row(number)])
    for file in (file for files in PASSED_OVER.values() for file in files):
        lay(tmp_path / "data" / file, ["this would be a bad record"])
    (tmp_path / "data/captioning/coco/instructions.json").write_text('["Describe it."]')
    (tmp_path / "data/vqa/gqa/instruction.json").write_text('["Answer it."]')
    (tmp_path / "data/classification/imagenet/mapping.txt").write_text("n01440764 tench\n")
    with caplog.at_level(logging.WARNING):
        rows, listed = prepare(tmp_path / "data", tmp_path / "out")
    wanted = {f"m3it/{name}": family for name, family in SUBSETS.items() if name != "winoground"}
    assert {one["source"]: one["family"] for one in rows} == wanted
    assert {one["status"] for one in rows} == {"ok"}
    assert len(rows) == 28
    assert listed["rows_of"] == dict.fromkeys(sorted(set(SUBSETS) - {"winoground"}), 1)
    assert listed["files_passed_over"] == {reason: len(files) for reason, files in PASSED_OVER.items()}
    assert "5 validation or test" in caplog.text


def test_jsonl_and_parquet_tell_the_same(tmp_path: Path) -> None:
    subsets = ("coco", "coco-itm", "vqa-v2", "okvqa", "clevr", "visual-dialog")
    folders = dict(zip(subsets, ("captioning/coco", "classification/itm", "vqa/vqav2", "vqa/okvqa"), strict=False))
    folders |= {"clevr": "reasoning/clevr", "visual-dialog": "generation/visual_dialog"}
    told = [row(number, inputs=["", None, "Who?"][number % 3]) for number in range(6)]
    copied = []
    for subset, one in zip(subsets, told, strict=True):
        file = lay(tmp_path / "clone/data" / folders[subset] / "train.jsonl", [one])
        (file.parent / "instructions.json").write_text(json.dumps([one["instruction"], "Something common."]))
        picture_of = {"bytes": base64.b64decode(one["image_base64_str"][0]), "path": None}
        copied.append({**{name: one[name] for name in ("instruction", "inputs", "outputs")}, "image": picture_of})
    lay(tmp_path / "copy/data/train-00000-of-00002.parquet", copied[:3])
    lay(tmp_path / "copy/data/train-00001-of-00002.parquet", copied[3:])
    of_clone, _ = prepare(tmp_path / "clone", tmp_path / "one")
    lists = sorted((tmp_path / "clone").rglob("instructions.json"))
    of_copy, _ = prepare([tmp_path / "copy", *lists], tmp_path / "two")
    alone, _ = prepare(tmp_path / "copy", tmp_path / "three")
    said = [[(words(one), one["images"]) for one in sorted(rows, key=words)] for rows in (of_clone, of_copy, alone)]
    assert said[0] == said[1] == said[2]
    kinds = [[(one["source"], one["family"]) for one in sorted(rows, key=words)] for rows in (of_clone, of_copy, alone)]
    assert kinds[0] == kinds[1] == [(f"m3it/{subset}", SUBSETS[subset]) for subset in subsets]
    assert set(kinds[2]) == {("m3it", "instruction")}


def test_a_column_may_say_the_data_set(tmp_path: Path) -> None:
    plain = [{**row(number), "dataset": name} for number, name in enumerate(["vqa-v2", "visual_dialog", "mine"])]
    rows, _ = prepare(lay(tmp_path / "all.parquet", plain), tmp_path / "out")
    kinds = [(one["source"], one["family"]) for one in rows]
    assert kinds == [("m3it/vqa-v2", "vqa"), ("m3it/visual-dialog", "generation"), ("m3it", "instruction")]
    rows, _ = prepare(tmp_path / "all.parquet", tmp_path / "few", subsets=("vqa-v2",), limit=1)
    assert [one["source"] for one in rows] == ["m3it/vqa-v2"]
    with pytest.raises(DataError, match="does not say of which data set"):
        prepare(tmp_path / "all.parquet", tmp_path / "none", subsets=("vqa-v2",))


def test_pictures_are_all_kept_in_order(tmp_path: Path) -> None:
    several = [
        row(0, image_base64_str=[packed(n) for n in (3, 1, 2)]),
        row(1, image_base64_str=[packed(1), packed(1)]),
        row(2, image_base64_str=packed(2)),
        row(3, image_base64_str=[packed(1), packed(2)], inputs="Is <image>\nlike <image>?"),
        row(4, image_base64_str=[packed(1), packed(2)], inputs="What is <image> in HTML?"),
        row(5, image_base64_str=[]),
        row(6, image_base64_str=[None]),
        row(7, image_base64_str=[packed(1), None]),
    ]
    rows, _ = prepare(lay(tmp_path / "data/reasoning/nlvr/train.jsonl", several), tmp_path / "out")
    one, _ = prepare(lay(tmp_path / "one/gqa/train.jsonl", [row(n) for n in range(4)]), tmp_path / "single")
    known = {single["images"][0]["sha256"]: number for number, single in enumerate(one)}
    shown = [[known[image["sha256"]] for image in many["images"]] for many in rows]
    assert shown == [[3, 1, 2], [1, 1], [2], [1, 2], [1, 2], [], [], []]
    first = [words(many)[0][1].split("\n", 1) if words(many) else [] for many in rows]
    assert first[0] == ["[0][1][2]Look at the picture and answer (0).", "What is number 0?"]
    assert words(rows[3])[0][1] == "Look at the picture and answer (3).\nIs [0]like [1]?"
    assert words(rows[4])[0][1].startswith("[0][1]Look")
    assert "<image> in HTML" in words(rows[4])[0][1]
    assert [one["status"] for one in rows] == ["ok"] * 5 + ["no_picture"] * 3
    bare = lay(tmp_path / "bare/kvqa/science-qa/train.jsonl", [row(5, image_base64_str=[])])
    (words_alone,) = prepare(bare, tmp_path / "words")[0]
    assert (words_alone["status"], words_alone["family"]) == ("ok", "text")


def test_the_repository_s_own_fields(tmp_path: Path) -> None:
    data, image = tmp_path / "data", packed(1)
    lay(
        data / "captioning/coco/train.jsonl",
        [{"image": packed(0), "meta": {"targets": ["A dog.", "Two dogs.", "A dog."], "image_id": 7}}],
    )
    lay(
        data / "vqa/shapes/train.large.jsonl",
        [{"question": "is a red shape below", "answer": "true", "image_str": image}],
    )
    lay(data / "vqa/okvqa/train.jsonl", [{"question": "Who?", "answer": "a cook", "image_str": image}])
    lay(data / "vqa/gqa/train.jsonl", [{"input": "Which?", "output": "that.", "img_str": image}])
    lay(data / "reasoning/science_qa/train.jsonl", [{"input": "Why?", "outputs": "So.", "image_str": None, "meta": {}}])
    lay(
        data / "generation/vist/train.jsonl", [{"images": [packed(2), packed(3)], "sentences": ["We went.", "We ate."]}]
    )
    rephrased = {"instruction": "Reply.", "inputs": "Now?", "image_base64_str": [image], "split": "train"}
    lay(data / "generation/visual_dialog/train_2023-10-09.jsonl", [{"answer": "Yes, now.", "meta": rephrased}])
    for file in data.rglob("*.jsonl"):
        (file.parent / "instructions.json").write_text(json.dumps([f"Do {number}.\n" for number in range(9)]))
    rows, _ = prepare(data, tmp_path / "out")
    assert {one["status"] for one in rows} == {"ok"}
    said = {}
    for one in rows:
        (_, question), (_, answer) = words(one)
        instruction, _, rest = question.partition("\n")
        said.setdefault(one["source"].removeprefix("m3it/"), []).append((instruction.count("["), rest, answer))
        assert instruction.endswith(("Do 0.", *(f"Do {number}." for number in range(9)), "Reply."))
    assert said == {
        "coco": [(1, "", "A dog."), (1, "", "Two dogs.")],
        "shapes": [(1, "is a red shape below?", "The answer is yes.")],
        "okvqa": [(1, "Who?", "The answer is a cook.")],
        "gqa": [(1, "Which?", "that.")],
        "science-qa": [(0, "Why?", "So.")],
        "vist": [(2, "", "We went. We ate.")],
        "visual-dialog": [(1, "Now?", "Yes, now.")],
    }
    assert json.loads(rows[0]["meta"]) == {"image_id": 7}


def test_the_drawn_instruction_is_the_row_s(tmp_path: Path) -> None:
    raw = [{"question": f"What is {number}?", "answer": "it", "image_str": packed(number % 3)} for number in range(40)]
    for name, order in (("one", raw), ("two", raw[::-1])):
        folder = lay(tmp_path / name / "okvqa/train.jsonl", order).parent
        (folder / "instructions.json").write_text(json.dumps([f"Say {number}." for number in range(4)]))
    one, _ = prepare(tmp_path / "one", tmp_path / "out")
    two, _ = prepare(tmp_path / "two/okvqa/train.jsonl", tmp_path / "out2")  # the list is found beside the file
    assert sorted(words(row) for row in one) == sorted(words(row) for row in two)
    drawn = [words(row)[0][1].split("\n")[0] for row in one]
    assert all(4 <= drawn.count(f"[0]Say {number}.") <= 18 for number in range(4))


def test_quirks_of_the_rows(tmp_path: Path) -> None:
    text, nan = packed(1), float("nan")
    lines = [
        row(0, image_base64_str=["\n".join(text[n : n + 76] for n in range(0, len(text), 76))]),
        row(1, image_base64_str=[text.rstrip("=")]),
        row(2, image_base64_str=["data:image/jpeg;base64," + text]),
        row(3, inputs=nan),
        row(4, instruction=nan),
        row(5, outputs=7.0),
        row(6, outputs=["One.", "", None, "Two."]),
        row(7, outputs=nan),
        row(8, outputs=" "),
        row(9, instruction=None, inputs=""),
        row(10, image_base64_str=["!!!"]),
        row(11, image_base64_str=[base64.b64encode(b"no picture").decode()]),
        row(12, image_base64_str=[5]),
        row(0, image_base64_str=["\n".join(text[n : n + 76] for n in range(0, len(text), 76))]),
        "[]",
        '{"instruction": "torn',
    ]
    file = lay(tmp_path / "data/vqa/gqa/train.jsonl", lines)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().rstrip(b"\n"))
    rows, _ = prepare(file, tmp_path / "out")
    assert [one["status"] for one in rows] == [
        "ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "bad_text", "bad_text", "bad_text",
        "corrupt", "not_image", "bad_record", "duplicate", "bad_record", "bad_record",
    ]  # fmt: skip
    assert len({one["images"][0]["sha256"] for one in rows[:3]}) == 1
    assert words(rows[3])[0][1] == "[0]Look at the picture and answer (3)."
    assert words(rows[4])[0][1] == "[0]What is number 4?"
    assert [words(one)[1][1] for one in rows[5:8]] == ["7", "One.", "Two."]
    assert "nan" not in json.dumps([words(one) for one in rows[:8]]).lower()
    assert {(one["source"], one["family"]) for one in rows[:15]} == {("m3it/gqa", "vqa")}


def test_a_line_of_twenty_megabytes(tmp_path: Path) -> None:
    big = base64.b64encode(jpeg(1) + bytes(15_000_000)).decode()
    lines = [row(0), row(1, image_base64_str=[big]), row(2)]
    rows, _ = prepare(lay(tmp_path / "docvqa/train.jsonl", lines), tmp_path / "out")
    assert [one["status"] for one in rows] == ["ok"] * 3
    listed = pq.read_table(next((tmp_path / "out").glob("records-*/data/*.parquet"))).to_pylist()
    assert [one["record"] is None for one in listed] == [False, True, False]


def test_a_picture_of_five_captions_is_stored_once(tmp_path: Path) -> None:
    rows = [row(n % 60, outputs=f"Caption {n}.", image_base64_str=[packed(n % 60)]) for n in range(300)]
    _, listed = prepare(lay(tmp_path / "coco/train.jsonl", rows), tmp_path / "out", rows_per_part=50)
    parts = sorted((tmp_path / "out").glob("prepare-*/data/*.parquet"))
    shown = [{one[0]["sha256"] for one in pq.read_table(path)["images"].to_pylist()} for path in parts]
    assert len(parts) >= 5
    assert sum(map(len, shown)) == 60
    assert listed["rows_of"] == {"coco": 300}


def test_test_files_are_read_when_nothing_else_is_meant(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lay(data / "vqa/gqa/train.jsonl", [row(0)])
    test = lay(data / "vqa/gqa/validation.jsonl", [row(0), row(1)])
    lay(data / "classification/winoground/winoground_test.jsonl", [row(2)])
    rows, _ = prepare(data, tmp_path / "out/a")
    assert [one["split"] for one in rows] == ["train"]
    rows, _ = prepare(test, tmp_path / "out/b")
    assert [one["split"] for one in rows] == ["test", "test"]
    rows, _ = prepare(data, tmp_path / "out/c", subsets=("winoground",))
    assert [(one["source"], one["family"], one["split"]) for one in rows] == [("m3it/winoground", "reasoning", "test")]


def test_data_sets_are_chosen_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    for number, name in enumerate(("captioning/coco", "captioning/coco-cn", "vqa/vqav2", "vqa/my_own", "oddities")):
        lay(data / name / "train.jsonl", [row(number)])
    with caplog.at_level(logging.WARNING, "tinyvlm.data.sources.m3it"):
        rows, _ = prepare(data, tmp_path / "a")
    assert {one["source"]: one["family"] for one in rows} == {
        "m3it/coco": "caption", "m3it/vqa-v2": "vqa", "m3it/my-own": "vqa", "m3it": "instruction"
    }  # fmt: skip
    assert "family of its folder: my-own" in caplog.text
    rows, _ = prepare(data, tmp_path / "b", subsets=("coco-cn", "my-own"))
    assert {one["source"]: one["family"] for one in rows} == {"m3it/coco-cn": "caption", "m3it/my-own": "vqa"}
    with pytest.raises(ConfigError, match="there is no 'vqa2'; did you mean 'vqa-v2'"):
        prepare(data, tmp_path / "c", subsets=("vqa2",))
    with pytest.raises(DataError, match=r"no files of 'clevr'.*there are coco, "):
        prepare(data / "captioning", tmp_path / "d", subsets=("clevr",))
    with pytest.raises(DataError, match="1 Chinese"):
        prepare(data / "captioning/coco-cn", tmp_path / "e")


def test_what_is_not_understood_is_said_before_anything_is_read(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lay(data / "captioning/coco/train.jsonl", [row(0)])
    lay(data / "classification/imagenet/train.jsonl", [{"label": 3, "img_str": packed(1)}])
    lay(data / "reasoning/nlvr/train.jsonl", [{"sentence": "Both.", "answer": "True", "left": packed(1)}])
    (data / "vqa/gqa").mkdir(parents=True)
    (data / "vqa/gqa/train.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 16\n")
    with pytest.raises(DataError) as caught:
        prepare(data, tmp_path / "out")
    for part in (
        "imagenet/train.jsonl has no field instruction (nor is there an instructions.json beside it), outputs (",
        "it has label, img_str",
        "nlvr/train.jsonl has no field inputs (input, question), instruction (nor is there an instructions.json beside "
        "it), image_base64_str (",
        "gqa/train.jsonl is a pointer of Git LFS",
    ):
        assert part in str(caught.value)
    assert "coco" not in str(caught.value)
    assert not list(tmp_path.glob("out/*/manifest.json"))
    rows, _ = prepare(data, tmp_path / "few", subsets=("coco",))
    assert [one["status"] for one in rows] == ["ok"]
    (data / "captioning/coco/instructions.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="holds no instructions: is a pointer of Git LFS"):
        prepare(data, tmp_path / "lfs", subsets=("coco",))


def test_the_repository_is_read_where_it_lies_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = [{"question": "a red shape below a circle", "answer": "false", "image_str": packed(1)}]
    lay(tmp_path / "here/data/vqa/shapes/train.large.jsonl", raw)
    lay(tmp_path / "here/data/vqa/shapes/val.jsonl", raw)
    (tmp_path / "here/data/vqa/shapes/instructions.json").write_text('["Look."]')
    files = {str(path.relative_to(tmp_path / "here")): path.read_bytes() for path in tmp_path.rglob("*.json*")}
    files |= {"README.md": b"#", "M3IT.py": b"raise SystemExit"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Hub({"MMInstruction/M3IT": {"main": files}})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        huggingface_hub.close_session()
        rows, listed = prepare("MMInstruction/M3IT", tmp_path / "out")
    huggingface_hub.close_session()
    assert [words(one) for one in rows] == [
        [("user", "[0]Look.\na red shape below a circle?"), ("assistant", "The answer is no.")]
    ]
    assert listed["files_passed_over"] == {"validation or test": 1}
