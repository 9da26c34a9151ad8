"""Datasets of the Hugging Face hub, from a hub on this machine: found, pinned, and read no further than needed."""

from __future__ import annotations

import io
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Hub, serving
from test_pictures import BODIES, CAPTIONS, listed, prepared, rows_of

from ray_jobs import _cli
from ray_jobs import preprocess as job
from tinyvlm.data.hub import CONVERTED, Asked, as_typed, is_address, is_pinned, parse, resolve
from tinyvlm.errors import DataError


def table(first: int, last: int, **more: Any) -> bytes:
    images = [{"bytes": body, "path": None} for body in BODIES[first:last]]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images, "text": CAPTIONS[first:last], **more}), buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    datasets = {
        "some/pictures": {
            "main": {
                "README.md": b"#",
                "data/train-00000.parquet": table(0, 3),
                "data/train-00001.parquet": table(3, 7),
            },
            "old": {"data/train-00000.parquet": table(0, 2)},
        },
        "some/parts": {
            "main": {
                **{f"{name}/{split}-0.parquet": b"" for name in ("large", "small") for split in ("train", "test")},
                "small/trainer-0.parquet": b"",
            }
        },
        "some/words": {"main": {"train.csv": b"a\n"}, CONVERTED: {"default/train/0000.parquet": table(0, 7)}},
        "some/tars": {"main": {"00000.tar": b"", "00001.tar": b""}},
        "some/secret": {"main": {"a.parquet": table(0, 7)}},
    }
    data_files = [{"split": split, "path": f"large/{split}-*"} for split in ("train", "test")]
    configs = [
        {"config_name": "big", "data_files": data_files},
        {"config_name": "little", "data_files": "small/t*t-?.*"},
    ]
    # The library reads these when it is imported, which another test may have done.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with serving(Hub(datasets, {"some/parts": {"configs": configs}}, {"some/secret"})) as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        huggingface_hub.close_session()
        yield served
    huggingface_hub.close_session()


def names(address: str) -> list[str]:
    """Paths in the dataset, without the commit."""
    return [file.split("@", 1)[1].split("/", 1)[1] for file in resolve(address)]


def test_an_address_is_pinned_to_a_commit(hub: Hub) -> None:
    commit = hub.commit("main")
    wanted = [f"hf://datasets/some/pictures@{commit}/data/train-0000{n}.parquet" for n in range(2)]
    assert resolve("some/pictures") == wanted
    assert resolve("hf://datasets/some/pictures") == wanted
    assert resolve("hf:/datasets/some/pictures/data") == wanted  # as a path library folds it
    assert resolve("hf://datasets/some/pictures@main/data/*-00001.parquet") == wanted[1:]
    assert resolve("some/pictures@old") == [wanted[0].replace(commit, hub.commit("old"))]
    assert resolve(f"some/pictures@{commit}") == wanted
    assert resolve("some/pictures:data/train") == wanted


def test_configurations_and_splits(hub: Hub) -> None:
    assert names("some/parts:big") == ["large/test-0.parquet", "large/train-0.parquet"]
    assert names("some/parts:big/train") == ["large/train-0.parquet"]
    assert names("some/parts:little") == ["small/test-0.parquet"]
    assert names("some/parts:small/train") == ["small/train-0.parquet"]  # not in the card: by the words of the path
    with pytest.raises(DataError, match=r"several configurations \(big, little\).*some/parts:big"):
        resolve("some/parts")
    with pytest.raises(DataError, match=r"no \.parquet files for that.*configurations: big, little"):
        resolve("some/parts:medium")
    assert resolve("some/words") == [f"hf://datasets/some/words@{hub.commit(CONVERTED)}/default/train/0000.parquet"]


def test_pictures_of_a_dataset_are_those_of_its_files(hub: Hub, tmp_path: Path) -> None:
    for name, data in hub.datasets["some/pictures"]["main"].items():
        (tmp_path / Path(name).name).write_bytes(data)
    here = rows_of(prepared(tmp_path / "here", tmp_path / "train-0000*.parquet", rows_per_part=2))
    there = rows_of(prepared(tmp_path / "there", "some/pictures", rows_per_part=2))
    apart = {"url", "final_url"}
    assert [{k: v for k, v in row.items() if k not in apart} for row in there] == [
        {k: v for k, v in row.items() if k not in apart} for row in here
    ]
    assert there[3]["url"] == f"{resolve('some/pictures')[1]}#row=0"
    hub.datasets["some/pictures"]["main"] = {}
    hub.datasets["some/pictures"]["next"] = {"data/train-00000.parquet": table(0, 3)}
    one, two = (prepared(tmp_path / "there", f"some/pictures@{revision}") for revision in ("old", "next"))
    assert one.folder != two.folder


def test_only_needed_bytes_are_read(hub: Hub, tmp_path: Path) -> None:
    weight = ["x" * 997 + f"{n:03}" for n in range(400)]
    buffer = io.BytesIO()
    columns = {"text": ["a"] * 400, "image": [{"bytes": BODIES[0]}] * 400, "other": weight}
    pq.write_table(pa.table(columns), buffer, row_group_size=20, compression="none", use_dictionary=False)
    hub.datasets["some/big"] = {"main": {"a.parquet": buffer.getvalue()}}
    size = len(buffer.getvalue())
    assert size > 2_000_000
    assert len(listed(tmp_path, "some/big")) == 400
    assert hub.bytes_read() < 200_000  # footers and the words
    run = prepared(tmp_path, "some/big", rows_per_part=20)
    before = hub.bytes_read()
    run.work(run.source.parts[3])
    image_bytes = 20 * len(BODIES[0])
    assert image_bytes < hub.bytes_read() - before < image_bytes + 80_000


def test_the_token_opens_and_is_told_to_nobody(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(DataError, match="or it is private and HF_TOKEN does not open it"):
        resolve("some/secret")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = prepared(tmp_path, "some/secret")
    assert [row["status"] for row in rows_of(run)] == ["ok"] * 7
    assert {token for _, _, token in hub.asked if token} == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_what_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(address: str) -> str:
        with pytest.raises(DataError) as caught:
            listed(tmp_path, address)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return str(caught.value)

    assert "no dataset some/absent" in refused("some/absent")
    assert "none of that name here" in refused("some/absent")
    assert "no such revision" in refused("some/pictures@absent")
    assert "it has .tar" in refused("some/tars")
    assert "names a model" in refused("hf://some/model")
    hub.datasets["some/pictures"]["main"]["data/train-00001.parquet"] = b"PAR1 but not really"
    assert "train-00001.parquet cannot be read as Parquet" in refused("some/pictures")
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    assert "cannot be reached" in refused("some/pictures")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    assert "HF_HUB_OFFLINE" in refused("some/pictures")


def test_the_command_takes_a_dataset(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("some/pictures", "hf://datasets/some/pictures/data"):
        job.run(_cli.parse("preprocess", ["--recipe", "tiny", "--input", address, "--output", "out", "--dry-run"]))
        assert json.loads(capsys.readouterr().out)["plan"]["rows"] == 7
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "pictures").mkdir()
    assert as_typed(tmp_path / "some" / "pictures") == f"{tmp_path}/some/pictures"  # what is here comes first


def test_what_is_an_address() -> None:
    for text in ("BAAI/CapsFusion-120M", "a/b@main", "a/b:c/d", "hf://datasets/a/b/c.parquet", "a.b/c_d"):
        assert is_address(text)
    for text in ("name", "/a/b", "./a/b", "../a/b", "a/b/c", "a/b/", "a b/c", "shards/x-{0..9}.tar"):
        assert not is_address(text)
    assert parse("a/b@r:c/s") == Asked("a/b", "r", "", "c", "s")
    assert parse("hf://datasets/a/b@r/c/d.parquet") == Asked("a/b", "r", "c/d.parquet")
    assert not is_pinned("file:///a/b.parquet")
    assert is_pinned(Path("hf://datasets/a/b@c/d.parquet"))
