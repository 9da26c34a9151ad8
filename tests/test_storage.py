"""Folders in an object store hold what folders on a disk hold."""

from __future__ import annotations

import errno
import logging
import pickle
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_download_resume import LINKS, ROWS, Web, write_list
from toy_stages import Double, DoubleConfig, start, write_numbers

from ray_jobs import _cli
from ray_jobs._cluster import StageResources
from ray_jobs._run_stage import run_stage
from tinyvlm import cli, folders, schema, storage
from tinyvlm.data import downloader
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.data.links import open_links
from tinyvlm.data.preprocess import Preprocess, PreprocessConfig
from tinyvlm.data.repeats import find_repeats
from tinyvlm.data.samples import rows_by_key
from tinyvlm.errors import ConfigError, DataError, StageError
from tinyvlm.folders import Manifest, find_folder, part_paths, scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.lease import Lease
from tinyvlm.object_store import ObjectStore
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.storage import address
from tinyvlm.toy.web_server import running
from tinyvlm.train.run import open_run
from tinyvlm.train.settings import TrainConfig
from tinyvlm.upkeep import clean, discard_damaged, verify

PICTURE = PictureConfig(size=32, tower_size=32)


def download(root: Path, links: Path, retry: tuple[str, ...] = ()) -> StageRun:
    fetch = FetchConfig(allow_hosts=("127.0.0.1",), concurrency=16, concurrency_per_host=16, rate_per_host=0)
    stage = Download(DownloadConfig(fetch=fetch, parts_at_once=3), PICTURE, LimitConfig())
    return StageRun(stage, open_links(links, LINKS, root), root, retry)


def preprocess(root: Path) -> StageRun:
    stage = Preprocess(PreprocessConfig(picture=PICTURE))
    return StageRun(stage, open_input(stage, [root]), root)


def rows_of(run: StageRun) -> pa.Table:
    table = pa.concat_tables(scan(run.folder, run.stage.writes.names)).sort_by("key")
    return table.drop_columns(sorted(schema.measured_columns(run.stage.writes)))


def main(root: str, links: str) -> None:
    """What a test kills."""
    downloader.KEEP_ROWS, downloader.KEEP_S = 8, 0.2
    run_local(download(address(root), address(links)))


def test_the_line_in_an_object_store_equals_the_line_on_a_disk(bucket: Path, tmp_path: Path) -> None:
    with running(Web().app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        there = bucket / "lists" / "links.jsonl"
        storage.write_atomic(there, links.read_bytes())
        for name, root, listed in (("disk", tmp_path / "out", links), ("store", bucket / "out", there)):
            manifest = run_local(download(root, listed))
            assert manifest.rows_out == ROWS, name
            run_local(preprocess(root))
        pairs = [(make(tmp_path / "out"), make(bucket / "out")) for make in (preprocess, lambda r: download(r, links))]
        for on_disk, in_store in pairs:
            assert in_store.is_finished
            assert in_store.folder.name == on_disk.folder.name, "where it lies is not in the fingerprint"
            assert rows_of(in_store).equals(rows_of(on_disk))
            here, there = Manifest.read(on_disk.folder), Manifest.read(in_store.folder)
            assert (here.identity, here.statuses) == (there.identity, there.statuses)
            assert verify(in_store.folder) == []
            assert clean(in_store.folder) == [], "nothing is left over"
            names = {entry.name for entry in storage.entries(in_store.folder) if not entry.name.startswith("lease-")}
            assert names == {"data", "manifest.json", "report.html", "stats.json"}
    on_disk, in_store = pairs[0]
    assert rows_by_key(in_store.folder, [1, 5], ["image"]) == rows_by_key(on_disk.folder, [1, 5], ["image"])
    both_found = [
        find_repeats(run.folder, repeated_links=2, similar_links=0, redirect_links=0) for run in (on_disk, in_store)
    ]
    assert both_found[0].hashes == both_found[1].hashes != frozenset()
    both = (
        find_folder([address(str(in_store.folder))], "preprocess", "a test"),
        find_folder([bucket / "out"], "links", ""),
    )
    assert [folder.name.split("-")[0] for folder in both] == ["preprocess", "links"]


def test_killed_and_repeated_in_an_object_store(bucket: Path, tmp_path: Path, python: list[str]) -> None:
    site = Web()
    with running(site.app) as base_url:
        links = write_list(tmp_path / "links.jsonl", base_url)
        run_local(download(tmp_path / "straight", links))
        site.asked.clear()
        code = f"import test_storage as t; t.main({str(bucket / 'killed')!r}, {str(links)!r})"
        kills = 0
        while True:
            asked = site.asked.total()
            process = subprocess.Popen([*python, "-c", code])
            while process.poll() is None and site.asked.total() < asked + 200:
                time.sleep(0.01)
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        assert process.returncode == 0
        assert kills >= 2
        repeated, straight = download(bucket / "killed", links), download(tmp_path / "straight", links)
    assert repeated.is_finished
    assert rows_of(repeated).equals(rows_of(straight))
    assert verify(repeated.folder) == []
    clean(repeated.folder)
    assert set(storage.sizes(repeated.folder / "data")) == set(Manifest.read(repeated.folder).files)
    again = site.asked.total() - len(site.asked)
    # Each try was killed after 200 links: on a busy machine much of that is lost, but never all of it.
    assert again < kills * 200, f"{again} links were asked for twice in {kills} kills"


def test_a_worker_that_comes_late_changes_nothing_that_counts(bucket: Path, tmp_path: Path) -> None:
    """It was past its check of the lease when another driver took over and finished."""
    root = bucket / "late"
    write_numbers(tmp_path, num_parts=2)
    run = start(tmp_path, Double(DoubleConfig()), root)
    manifest = run_local(run)
    run.work(run.source.parts[0])
    assert len(storage.sizes(run.folder / "data")) == 3
    assert verify(run.folder) == []
    assert sum(table.num_rows for table in scan(run.folder, ["key"])) == manifest.rows_out
    assert len(clean(run.folder)) == 1
    assert set(storage.sizes(run.folder / "data")) == set(manifest.files)


def test_what_earlier_tries_left_is_taken_up_and_damage_done_again(bucket: Path, tmp_path: Path) -> None:
    write_numbers(tmp_path, num_parts=4)
    run = start(tmp_path, Double(DoubleConfig()), bucket)
    run.work(run.source.parts[0])
    run.work(run.source.parts[0])
    run.work(run.source.parts[2])
    storage.write_atomic(run.folder / "data" / f"part-00001.{'0' * 16}.parquet", b"PAR1 half")
    done: list[int] = []
    manifest = run_local(run, lambda result: done.append(result.index))
    assert done == [1, 3]
    assert set(storage.sizes(run.folder / "data")) == set(manifest.files), "of each part one file"
    path = part_paths(run.folder)[2]
    storage.write_atomic(path, b"PAR1 other")
    assert verify(run.folder) == [f"{path.name} has changed"]
    assert discard_damaged(run.folder) == [path.name]
    again = run_local(run, lambda result: done.append(result.index))
    assert done == [1, 3, 2]
    assert again.identity == manifest.identity


def test_the_command_line_looks_after_folders_there(
    bucket: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, Double(DoubleConfig()), bucket / "runs")
    run_local(run)
    assert cli.main(["verify", str(run.folder)]) == 0
    run.work(run.source.parts[0])
    assert cli.main(["clean", str(run.folder)]) == 0
    assert f"{run.folder}: removed 1 of" in capsys.readouterr().out


def test_a_lease_there_is_one_drivers_and_goes_on(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bucket / "folder"
    with Lease.take(folder) as first:
        with pytest.raises(StageError, match="in use by process"):
            Lease.take(folder)
        monkeypatch.setattr("tinyvlm.lease.STALE_S", -2.0)
        second = Lease.take(folder)
        first._write(free=False)  # wakes up late, and pushes nobody out
        with pytest.raises(StageError, match=r"belongs to another driver \(lease 2, ours was 1\)"):
            Lease.check(folder, first.number)
        Lease.check(folder, second.number)


def test_no_secret_is_written_or_sent(bucket: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, Double(DoubleConfig()), bucket)
    with caplog.at_level(logging.DEBUG, "tinyvlm"):
        run_local(run)
    told = [pickle.dumps(run.for_worker(2)), caplog.text.encode()]
    told += [storage.read(run.folder / name) for name in storage.sizes(run.folder)]
    assert not [text for text in told if b"the-tests-" in text]
    assert pickle.loads(told[0]).folder == run.folder


def test_what_cannot_work_is_told_in_a_sentence(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path)
    nowhere = address("s3://there-is-no-such-bucket/runs")
    with pytest.raises(DataError, match=r"double cannot write to s3://there-is-no-such-bucket/runs \(.*bucket"):
        run_local(start(tmp_path, Double(DoubleConfig()), nowhere))
    with pytest.raises(StageError, match=r"--input s3://test-.*/none, which does not exist"):
        find_folder([bucket / "none"], "double", "a test")
    with pytest.raises(ConfigError, match=r"nosuch://x cannot be used here .* fsspec's package"):
        address("nosuch://x")
    with pytest.raises(ConfigError, match=r"pretrain works on disks alone, and s3://test-.* copy the folder to a disk"):
        open_run("pretrain", TrainConfig(), {}, [tmp_path], bucket / "models")
    client: Any = bucket
    monkeypatch.setattr(client.fs, "info", lambda path: 1 / 0)
    with pytest.raises(OSError, match="ZeroDivisionError") as caught:
        storage.is_file(bucket / "manifest.json")
    assert caught.value.errno == errno.EIO, "not an answer, so not a no"


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path if request.param == "disk" else request.getfixturevalue("bucket")


def test_files_are_whole_or_not_there(place: Path) -> None:
    path = place / "a" / "b.txt"
    assert not storage.is_file(path)
    assert storage.entries(place / "a") == []
    with pytest.raises(FileNotFoundError):
        storage.read(path)
    with storage.draft(path) as draft:
        draft.write("never published")
    assert storage.sizes(place / "a") == {}
    storage.create(path, "one")
    with pytest.raises(FileExistsError):
        storage.create(path, "two")
    assert storage.read(path) == b"one"
    storage.write_atomic(path, b"three")
    assert (storage.sizes(place / "a"), storage.read(path)) == ({"b.txt": 5}, b"three")
    assert [entry[0::2] for entry in storage.entries(place)] == [("a", True)]
    storage.touch(place / "a" / "empty")
    with pytest.raises(FileExistsError):
        storage.touch(place / "a" / "empty")
    assert abs(storage.modified(path) - time.time()) < 60
    assert (storage.exists(place / "a"), storage.exists(path), storage.exists(place / "z")) == (True, True, False)
    for _ in range(2):
        storage.remove(path)
        storage.remove_tree(place / "a")
    assert storage.entries(place) == []


def test_tables_are_read_in_part(place: Path) -> None:
    path = place / "t.parquet"
    with storage.draft(path) as draft:
        draft.write_table(pa.table({"key": range(100), "text": ["x"] * 100}), row_group_size=10)
        draft.publish()
    assert pq.read_metadata(storage.readable(path)).num_row_groups == 10
    found = pq.read_table(storage.readable(path), columns=["key"], filters=[("key", "in", [3, 77])])
    assert found.to_pydict() == {"key": [3, 77]}
    with storage.mapped(path) as content:
        assert bytes(content[:4]) == b"PAR1"
    assert len(storage.sha256(path)) == 64


def test_names_that_exist_are_left_alone_where_there_are_no_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(self: storage.Disk, old: Path, new: Path) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(storage.Disk, "link", link)
    storage.create(tmp_path / "a", "one")
    with pytest.raises(FileExistsError):
        storage.create(tmp_path / "a", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "one"


def test_a_store_without_conditional_puts_is_warned_of(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    # Other tests set logging up as a command does.
    monkeypatch.setattr(folders.log, "warning", lambda text, *words: warned.append(text % words))
    write_numbers(tmp_path, num_parts=1)
    run_local(start(tmp_path, Double(DoubleConfig()), bucket / "with"))
    assert warned == []
    put = ObjectStore.put
    monkeypatch.setattr(ObjectStore, "put", lambda self, path, content, new=False: put(self, path, content))
    run_local(start(tmp_path, Double(DoubleConfig()), bucket / "without"))
    assert any(f"{bucket / 'without'} has no conditional put" in text for text in warned)


def test_addresses() -> None:
    job = _cli.parse("double", ["--recipe", "tiny", "--input", "s3://b/in", "--input", "x", "--output", "s3://b/out"])
    assert job.inputs == (address("s3://b/in"), Path("x").absolute())
    assert job.output == address("s3://b/out")
    assert address("runs/a") == Path("runs/a")
    assert address("file:///tmp/a") == Path("/tmp/a")
    assert str(address("s3://bucket/a") / "b.json") == "s3://bucket/a/b.json"
    assert storage.is_object(address("s3://bucket/a"))
    assert not storage.is_object(Path("a"))


@pytest.mark.ray
def test_ray_leaves_the_same_folder_there(bucket: Path, tmp_path: Path, local_ray: Any) -> None:
    write_numbers(tmp_path)
    straight = run_local(start(tmp_path, Double(DoubleConfig())))
    run = start(tmp_path, Double(DoubleConfig()), bucket)
    manifest = run_stage(run, 2, StageResources(num_cpus=0.5))
    assert manifest.identity == straight.identity
    assert verify(run.folder) == []
    assert clean(run.folder) == []
    assert run_stage(run, 2, StageResources(num_cpus=0.5)) == manifest, "finished already"
