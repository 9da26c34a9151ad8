"""Commands that die, or whose disk fails, at every single operation: repeated, they end as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faulty_disk import BROKE, DEADLY, DIED, FAILING, FINISHED, REFUSED, Case, Victims
from given_folders import given_folder, preprocessed
from test_download_resume import Web
from toy_stages import NUMBERS, Double, DoubleConfig, start, write_numbers

from tinyvlm import folders, stage_run, storage, upkeep
from tinyvlm.data import downloader, listing
from tinyvlm.data.download import Download, DownloadConfig
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.data.links import LinksConfig, open_links
from tinyvlm.errors import StageError
from tinyvlm.folders import Manifest, find_folder, part_paths, scan
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.journal import Journal
from tinyvlm.removal import take_down
from tinyvlm.report import stage_report
from tinyvlm.stage import Stage, open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.takedown import Takedown
from tinyvlm.toy.web_server import running
from tinyvlm.upkeep import clean, discard_damaged, verify


class Unsteady(Double):
    """As Double with a journal, one entry a row; rows fail for the moment where a file `bad_day` lies."""

    version = 2

    def __init__(self, is_bad_day: bool) -> None:
        super().__init__(DoubleConfig())
        self.is_bad_day = is_bad_day

    def map_part(self, rows: pa.Table, journal: Journal | None) -> pa.Table:
        assert journal is not None
        known = journal.read()
        keys = set(known["key"].to_pylist())
        for place in range(rows.num_rows):
            if rows["key"][place].as_py() not in keys:
                out = self(rows.slice(place, 1))
                journal.append(out)
                known = pa.concat_tables([known, out])
        return known.sort_by("key")

    def __call__(self, rows: pa.Table) -> pa.Table:
        out = super().__call__(rows).to_pylist()
        for row in out:
            if self.is_bad_day and row["key"] % 3 == 1:
                row["status"] = "throttled"
        return pa.Table.from_pylist(out, schema=self.writes)


class Seen(Stage):
    """Rows that are known by their keys alone."""

    name, reads, settings, writes = "seen", ("preprocess",), "seen", NUMBERS

    def __call__(self, rows: pa.Table) -> pa.Table:
        sizes = [len(picture) for picture in rows["image"].to_pylist()]
        some = rows.select(["key", "status", "detail"]).append_column("value", pa.array(sizes))
        return some.append_column(NUMBERS.field("milliseconds"), pa.nulls(some.num_rows, pa.float64()))


def unsteady(root: Path, retry: tuple[str, ...] = ()) -> StageRun:
    stage = Unsteady(is_bad_day=not retry)
    return StageRun(stage, open_input(stage, [root]), root, retry)


# --- commands: what a victim runs, and what is repeated after it


def run_double(root: Path) -> None:
    run_local(start(root, Double(DoubleConfig())))


def run_journalled(root: Path) -> None:
    run_local(unsteady(root))


def run_retry(root: Path) -> None:
    run_local(unsteady(root, ("throttled",)))


def run_clean(root: Path) -> None:
    clean(unsteady(root).folder)


def run_discard(root: Path) -> None:
    """`tinyvlm verify --discard`, and the stage again."""
    if (unsteady(root).folder / "manifest.json").is_file():
        discard_damaged(unsteady(root).folder)
    run_local(unsteady(root))


def run_takedown(root: Path) -> None:
    """`tinyvlm takedown`, of a row of a stage and the one that was made of it."""
    take_down(Takedown(links=frozenset(["x/1"])), [root])


def run_links(root: Path) -> None:
    open_links(root / "list.jsonl", LinksConfig(url_column="url", caption_column="caption", rows_per_part=3), root)


def run_download(root: Path) -> None:
    """Links, journal and pictures; one part at a time, a few outcomes kept together."""
    stage = Download(
        DownloadConfig(fetch=FetchConfig(allow_hosts=("127.0.0.1",)), parts_at_once=1),
        PictureConfig(size=32, tower_size=32),
        LimitConfig(),
    )
    config = LinksConfig(url_column="url", caption_column="caption", rows_per_part=6)
    run_local(StageRun(stage, open_links(root / "list.jsonl", config, root), root))


# --- what lies there before


def prepare_numbers(root: Path) -> None:
    write_numbers(root, num_parts=2)


def prepare_bad_day(root: Path) -> None:
    write_numbers(root, num_parts=2)
    run_local(unsteady(root))


def prepare_retried(root: Path) -> None:
    prepare_bad_day(root)
    run_retry(root)


def prepare_damaged(root: Path) -> None:
    prepare_retried(root)
    path = part_paths(unsteady(root).folder)[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def prepare_pictures(root: Path) -> None:
    """A stage whose rows have links, and one without: rows of a part of each are listed."""
    given_folder("preprocess", preprocessed([bytes([number] * 9) for number in range(4)]), root)
    (root / "preprocess.parquet").unlink()
    run_local(StageRun(Seen(), open_input(Seen(), [root]), root))


def prepare_list(root: Path) -> None:
    rows = [{"url": f"http://h{number % 5}/{number}", "caption": str(number)} for number in range(8)]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare_web(root: Path) -> None:
    base_url = os.environ["DRILL_SITE"]
    rows = [{"url": f"{base_url}/{number % 9}.jpg", "caption": str(number)} for number in range(10)]
    (root / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Drill:
    """A command on what was prepared, and the stage whose folder it leaves."""

    prepare: Callable[[Path], None]
    command: Callable[[Path], None]
    stage: str = "double"

    @property
    def name(self) -> str:
        return f"{self.prepare.__name__}:{self.command.__name__}:{self.stage}"


DRILLS = [
    Drill(prepare_numbers, run_double),
    Drill(prepare_numbers, run_journalled),
    Drill(prepare_bad_day, run_retry),
    Drill(prepare_retried, run_clean),
    Drill(prepare_damaged, run_discard),
    Drill(prepare_pictures, run_takedown, "preprocess"),
    Drill(prepare_pictures, run_takedown, "seen"),
    Drill(prepare_list, run_links, "links"),
    Drill(prepare_web, run_download, "download"),
]


@pytest.fixture(scope="module", autouse=True)
def site() -> Iterator[None]:
    """Where the links of `prepare_web` lead."""
    with running(Web().app) as base_url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRILL_SITE", base_url)
        yield


@pytest.fixture(scope="module")
def victims(object_store: None) -> Iterator[Victims]:
    with Victims([sys.executable, "-u"]) as victims:
        yield victims


def outcome(folder: Path) -> dict[str, Any]:
    """All that two folders have in common when they say the same."""
    manifest = Manifest.read(folder)
    names = {"links": ["key", "url"], "download": ["key", "status", "sha256", "image", "duplicate_of", "caption"]}
    names["preprocess"] = ["key", "status", "image", "caption", "detail"]
    columns = names.get(manifest.stage, ["key", "status", "value"])
    table = pa.concat_tables(scan(folder, columns)).sort_by("key")
    numbers = (manifest.identity, manifest.rows_in, manifest.rows_out, manifest.statuses, manifest.generation)
    shown = json.loads(storage.read(folder / "stats.json"))
    shown["seconds"] = 0
    for name, section in shown.get("sections", {}).items():
        if section.get("measured"):
            shown["sections"][name] = "measured"
    return {"rows": table.to_pylist(), "numbers": numbers, "shown": shown}


def everything(root: Path, under: str = "") -> set[str]:
    """The files and folders under `root`, but for the numbers of leases and what makes a name unique."""
    found = set[str]()
    for entry in storage.entries(root):
        if not entry.name.startswith("lease-"):
            found.add(under + re.sub(r"\.[0-9a-f]{16}\.parquet", ".parquet", entry.name))
        if entry.is_folder:
            found |= everything(root / entry.name, f"{under}{entry.name}/")
    return found


def clean_all(root: Path) -> None:
    for entry in storage.entries(root):
        if entry.is_folder and folders.is_finished(root / entry.name):
            clean(root / entry.name)


def copy_tree(old: Path, new: Path) -> None:
    for entry in storage.entries(old):
        if entry.is_folder:
            copy_tree(old / entry.name, new / entry.name)
        else:
            storage.write_atomic(new / entry.name, storage.read(old / entry.name))


def sweep(
    drill: Drill, victims: Victims, scratch: Path, place: Path, modes: Sequence[str], some: int | None
) -> dict[int, int]:
    """Run a drill under `place` with each fault, or with `some` of them; tells how many victims ended in which way."""
    given, straight = scratch / "given", place / "straight"
    given.mkdir()
    drill.prepare(given)
    before = find_state(given, drill)
    copy_tree(given, straight)
    log = scratch / "operations"
    command = f"test_faults:{drill.command.__name__}"
    assert victims.run(Case(command, str(straight), log=str(log))) == FINISHED
    folder = find_folder([straight], drill.stage, "a test")
    expected = outcome(folder)
    assert verify(folder) == []
    clean_all(straight)
    left = everything(straight)
    operations = log.read_text().splitlines()
    chosen = [(mode, at) for mode in modes for at in range(len(operations))]
    if some is not None:
        decisive = [(mode, at) for mode, at in chosen if mode == "after" and "manifest.json" in operations[at]]
        chosen = decisive + random.Random(0).sample(chosen, min(some, len(chosen)))
    ends: dict[int, int] = {}
    for mode, at in dict.fromkeys(chosen):
        root = place / f"{mode}-{at}"
        copy_tree(given, root)
        end = victims.run(Case(command, str(root), mode, at))
        case = f"{drill.name}, {mode} at operation {at} ({operations[at]})"
        assert end != BROKE, case
        ends[end] = ends.get(end, 0) + 1
        if drill.command is not run_discard:  # its folder was damaged before
            after = {name: expected[name] for name in ("rows", "numbers")}
            assert find_state(root, drill) in (before, after), f"{case}: it looks finished and is not"
        drill.command(root)
        folder = find_folder([root], drill.stage, "a test")
        assert outcome(folder) == expected, case
        assert verify(folder) == [], case
        shown = json.loads(storage.read(folder / "stats.json"))
        assert storage.read(folder / "report.html").decode() == stage_report(shown), f"{case}: the report is older"
        clean_all(root)
        assert everything(root) == left, case
        storage.remove_tree(root)
    return ends


def find_state(root: Path, drill: Drill) -> dict[str, Any] | None:
    """What a reader finds: nothing, or a whole folder."""
    for entry in storage.entries(root):
        folder = root / entry.name
        if entry.name.startswith(f"{drill.stage}-") and folders.is_finished(folder):
            if drill.prepare is prepare_damaged:
                return None
            assert verify(folder) == []
            state = outcome(folder)
            del state["shown"]  # of a retry the report comes after the manifest, at the latest with the same command
            return state
    return None


@pytest.fixture(autouse=True)
def quick_and_thorough() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch)
        yield


def make_quick(patch: pytest.MonkeyPatch | None = None) -> None:
    """Nothing is too young to be removed, no disk is waited for, and nobody asks git for the commit."""
    patch = patch or pytest.MonkeyPatch()
    patch.setattr(upkeep, "STALE_S", -1.0)
    patch.setattr(downloader, "KEEP_ROWS", 3)
    patch.setattr(storage.Disk, "sync", lambda self, path: None)
    for module in (listing, stage_run):
        patch.setattr(module, "git_commit", lambda: None)


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
def test_some_faults(drill: Drill, victims: Victims, tmp_path: Path) -> None:
    ends = sweep(drill, victims, tmp_path, tmp_path, (*DEADLY, *FAILING), some=16)
    assert ends[DIED] >= 8
    assert ends[REFUSED] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
def test_every_fault(drill: Drill, victims: Victims, tmp_path: Path) -> None:
    ends = sweep(drill, victims, tmp_path, tmp_path, (*DEADLY, *FAILING), some=None)
    assert ends[DIED] > ends[REFUSED] > 0


@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
def test_some_faults_in_an_object_store(drill: Drill, bucket: Path, victims: Victims, tmp_path: Path) -> None:
    ends = sweep(drill, victims, tmp_path, bucket, ("before", "after", "io"), some=6)
    assert ends[DIED] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("drill", DRILLS, ids=lambda drill: drill.name)
def test_every_fault_in_an_object_store(drill: Drill, bucket: Path, victims: Victims, tmp_path: Path) -> None:
    ends = sweep(drill, victims, tmp_path, bucket, ("before", "after", "io"), some=None)
    assert ends[DIED] > ends[REFUSED] > 0


# --- other settings in between, and two at once


@pytest.mark.parametrize("at", [4, 9, 12, 17])
def test_what_another_command_left_is_not_mixed_in(at: int, victims: Victims, tmp_path: Path) -> None:
    """A command is interrupted, the same stage runs with another setting and on other rows, then the first again."""
    write_numbers(tmp_path / "straight", num_parts=2)
    run_double(tmp_path / "straight")
    root = tmp_path / "mixed"
    write_numbers(root, num_parts=2)
    assert victims.run(Case("test_faults:run_double", str(root), "after", at)) == DIED
    tripled = run_local(start(root, Double(DoubleConfig(factor=3))))
    write_numbers(root, num_parts=2, first_value=100)
    run_double(root)
    others = outcome(find_folder([root], "double", "a test"))
    write_numbers(root, num_parts=2)
    run_double(root)
    doubled = outcome(find_folder([root], "double", "a test"))
    assert doubled == outcome(find_folder([tmp_path / "straight"], "double", "a test"))
    assert [row["value"] for row in others["rows"]] == [row["value"] + 200 for row in doubled["rows"]]
    assert len(list(root.glob("double-*"))) == 3
    assert tripled.identity not in (doubled["numbers"][0], others["numbers"][0])


def contend(place: str, signals: str, me: str, rounds: str) -> None:
    """One of two drivers: in each round both take up the same folder at the same moment."""
    for number in range(int(rounds)):
        root = storage.address(place) / str(number)
        run = start(root, Double(DoubleConfig(part_seconds=0.1)))
        (Path(signals) / f"{number}.{me}").touch()
        deadline = time.monotonic() + 60
        while not (Path(signals) / f"{number}.{1 - int(me)}").exists():
            assert time.monotonic() < deadline
        try:
            run_local(run)
            said = "done"
        except StageError as error:
            said = str(error)
        (Path(signals) / f"{number}.{me}.said").write_text(said)


@pytest.mark.parametrize("where", ["disk", "object store"])
def test_of_two_drivers_at_once_one_works(
    where: str, tmp_path: Path, python: list[str], request: pytest.FixtureRequest
) -> None:
    place = tmp_path if where == "disk" else request.getfixturevalue("bucket")
    signals, rounds = tmp_path / "signals", 6
    signals.mkdir()
    write_numbers(tmp_path / "given", num_parts=2)
    for number in range(rounds):
        copy_tree(tmp_path / "given", place / str(number))
    code = "import sys, test_faults; test_faults.contend(*sys.argv[1:])"
    drivers = [
        subprocess.Popen([*python, "-c", code, str(place), str(signals), str(me), str(rounds)]) for me in range(2)
    ]
    assert [driver.wait(120) for driver in drivers] == [0, 0]
    run_double(tmp_path / "given")
    expected = outcome(find_folder([tmp_path / "given"], "double", "a test"))
    for number in range(rounds):
        said = sorted((signals / f"{number}.{me}.said").read_text() for me in range(2))
        assert "done" in said
        other = next((text for text in said if text != "done"), "")
        assert "is in use by process" in other or "another driver at this moment" in other, said
        folder = find_folder([place / str(number)], "double", "a test")
        assert outcome(folder) == expected
        assert verify(folder) == []
        assert clean(folder) == []
