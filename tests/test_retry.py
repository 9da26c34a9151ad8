"""Trying rows of some statuses again in a finished folder, and keeping folders whole and tidy."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from toy_stages import Double, DoubleConfig, Spread, rows_of, start, write_numbers

from tinyvlm import cli, schema
from tinyvlm.errors import ConfigError, StageError
from tinyvlm.folders import Manifest, PartResult, part_paths, scan
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.upkeep import clean, discard_damaged, verify


class Moody(Double):
    """As Double, but keys that a file names fail for the moment; what was asked is remembered."""

    def __init__(self, moods: Path, asked: list[int]) -> None:
        super().__init__(DoubleConfig())
        self.moods, self.asked = moods, asked

    def __call__(self, rows: pa.Table) -> pa.Table:
        moods: dict[str, str] = json.loads(self.moods.read_text())
        out = super().__call__(rows).to_pylist()
        for row in out:
            self.asked.append(row["key"])
            if moods.get(str(row["key"])) == "raise":
                raise RuntimeError("a bad day")
            row["status"] = moods.get(str(row["key"]), row["status"])
        return pa.Table.from_pylist(out, schema=self.writes)


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    write_numbers(tmp_path)
    return tmp_path / "moods.json"


def moody(root: Path, moods: Path, failing: dict[int, str], retry: tuple[str, ...] = ()) -> tuple[StageRun, list[int]]:
    asked: list[int] = []
    moods.write_text(json.dumps(failing))
    stage = Moody(moods, asked)
    return StageRun(stage, open_input(stage, [root]), root, retry), asked


def current_rows(run: StageRun) -> list[dict[str, Any]]:
    table = pa.concat_tables(scan(run.folder, ["key", "status", "value"]))
    return sorted(table.to_pylist(), key=lambda row: int(row["key"]))


def test_only_rows_of_those_statuses_are_done_again(tmp_path: Path, moods: Path) -> None:
    failing = {1: "timeout.read", 2: "dead.http404", 6: "timeout.total", 7: "timeout.total", 13: "too_large"}
    run, _ = moody(tmp_path, moods, failing)
    first = run_local(run)
    before = {path.name: path.read_bytes() for path in part_paths(run.folder)}

    run, asked = moody(tmp_path, moods, {6: "corrupt", 7: "timeout.read"}, retry=("timeout",))
    second = run_local(run)
    assert sorted(asked) == [1, 6, 7]
    assert second.statuses == {"ok": 12, "dead.http404": 1, "corrupt": 1, "timeout.read": 1, "too_large": 1}
    assert (first.generation, second.generation) == (0, 1)
    assert sorted(second.files) == [
        "part-00000.g1.parquet", "part-00001.g1.parquet", "part-00002.parquet", "part-00003.parquet",
    ]  # fmt: skip
    assert all((run.folder / "data" / name).read_bytes() == content for name, content in before.items())
    assert second.fingerprint == first.fingerprint
    assert second.identity != first.identity, "the next stage sees another input"
    assert [row["key"] for row in current_rows(run)] == [key for key in range(20) if key % 5 != 4]
    statistics = json.loads((run.folder / "stats.json").read_text())
    assert (statistics["generation"], statistics["statuses"]) == (1, second.statuses)

    run, asked = moody(tmp_path, moods, {}, retry=("timeout", "corrupt"))
    third = run_local(run)
    assert sorted(asked) == [6, 7]
    assert third.generation == 2
    assert third.files["part-00001.g2.parquet"]["rows"] == 4
    assert "part-00000.g1.parquet" in third.files
    assert verify(run.folder) == []
    assert len(clean(run.folder)) == 3, "part 0 and part 1 of the first run, part 1 of the second"
    assert verify(run.folder) == []
    assert sorted(path.name for path in (run.folder / "data").iterdir()) == sorted(third.files)


def test_a_retry_that_brings_the_same_is_the_same_to_the_next_stage(tmp_path: Path, moods: Path) -> None:
    first = run_local(moody(tmp_path, moods, {1: "timeout.read"})[0])
    second = run_local(moody(tmp_path, moods, {1: "timeout.read"}, retry=("transient",))[0])
    assert (second.generation, second.identity) == (1, first.identity)


def test_an_interrupted_retry_continues_and_the_folder_stays_whole(tmp_path: Path, moods: Path) -> None:
    failing = {key: "throttled" for key in (0, 6, 12)}
    run, _ = moody(tmp_path, moods, failing)
    first = run_local(run)
    before = current_rows(run)
    run, _ = moody(tmp_path, moods, {12: "raise"}, retry=("throttled",))
    with pytest.raises(StageError, match="a bad day"):
        run_local(run)
    assert Manifest.read(run.folder) == first
    assert current_rows(run) == before, "what is half done does not show"

    run, asked = moody(tmp_path, moods, {}, retry=("throttled",))
    done: list[PartResult] = []
    second = run_local(run, done.append)
    assert asked == [12]
    assert [result.index for result in done] == [2]
    assert second.statuses == {"ok": 16}


def test_a_report_that_a_crash_left_behind_is_made_again(tmp_path: Path, moods: Path) -> None:
    run_local(moody(tmp_path, moods, {1: "throttled"})[0])
    run, _ = moody(tmp_path, moods, {}, retry=("throttled",))
    stale = (run.folder / "stats.json").read_text()
    run_local(run)
    fresh = (run.folder / "stats.json").read_text()
    (run.folder / "stats.json").write_text(stale)
    run_local(moody(tmp_path, moods, {})[0])
    assert (run.folder / "stats.json").read_text() == fresh


def test_nothing_to_retry_changes_nothing_and_says_so(
    tmp_path: Path, moods: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run_local(moody(tmp_path, moods, {})[0])
    run, asked = moody(tmp_path, moods, {}, retry=("failed",))
    with caplog.at_level(logging.INFO):
        assert run_local(run) == first
    assert asked == []
    assert "nothing to do" in caplog.text


def test_a_retry_of_what_was_never_run_is_a_run(tmp_path: Path, moods: Path) -> None:
    manifest = run_local(moody(tmp_path, moods, {}, retry=("timeout",))[0])
    assert (manifest.generation, manifest.statuses) == (0, {"ok": 16})


def test_names_of_statuses() -> None:
    assert schema.statuses_of(["timeout"]) == ("timeout.connect", "timeout.read", "timeout.total")
    assert schema.statuses_of(["timeout.read", "bomb"]) == ("timeout.read", "bomb")
    assert "ok" not in schema.statuses_of(["failed"])
    assert set(schema.STATUSES) - set(schema.statuses_of(["failed"])) == {"ok", schema.TAKEN_DOWN}
    assert schema.TAKEN_DOWN not in schema.statuses_of(["optout"])
    assert schema.statuses_of([schema.TAKEN_DOWN]) == (schema.TAKEN_DOWN,)
    assert {"throttled", "timeout.total", "broken.reset"} <= set(schema.statuses_of(["transient"]))
    assert not {"dead.http404", "blocked.403"} & set(schema.statuses_of(["transient"]))
    with pytest.raises(ConfigError, match=r"no status 'timeouts'; did you mean 'timeout'\?"):
        schema.statuses_of(["timeouts"])


def test_stages_that_make_several_rows_of_one_cannot_retry(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    stage = Spread(DoubleConfig())
    with pytest.raises(ConfigError, match="cannot be tried again"):
        StageRun(stage, open_input(stage, [tmp_path]), tmp_path, ("timeout",))


def test_discarding_keeps_what_a_retry_brought(tmp_path: Path, moods: Path) -> None:
    run_local(moody(tmp_path, moods, {1: "throttled", 6: "throttled"})[0])
    run, _ = moody(tmp_path, moods, {}, retry=("throttled",))
    retried = run_local(run)
    rows = current_rows(run)
    (run.folder / "data" / "part-00001.g1.parquet").write_bytes(b"gone bad")
    assert discard_damaged(run.folder) == ["part-00001.g1.parquet"]
    run, asked = moody(tmp_path, moods, {})
    again = run_local(run)
    assert sorted(asked) == [5, 6, 7, 8]
    assert (current_rows(run), again.statuses) == (rows, retried.statuses)


def test_what_another_retry_left_is_not_taken_for_this_ones(tmp_path: Path, moods: Path) -> None:
    run_local(moody(tmp_path, moods, {1: "throttled", 2: "timeout.read", 6: "throttled"})[0])
    run, _ = moody(tmp_path, moods, {}, retry=("timeout",))
    run.work(run.todo()[0][0])  # and then it is killed
    run, asked = moody(tmp_path, moods, {}, retry=("throttled",))
    assert run_local(run).statuses == {"ok": 15, "timeout.read": 1}
    assert sorted(asked) == [1, 6]
    run, asked = moody(tmp_path, moods, {}, retry=("throttled", "timeout"))
    assert run_local(run).statuses == {"ok": 16}
    assert asked == [2]


def test_after_discarding_a_retry_does_not_fall_back_to_older_outcomes(tmp_path: Path, moods: Path) -> None:
    run_local(moody(tmp_path, moods, {1: "throttled", 2: "timeout.read", 6: "throttled"})[0])
    for retry in (("throttled",), ("timeout",)):
        run_local(moody(tmp_path, moods, {}, retry=retry)[0])
    run, _ = moody(tmp_path, moods, {})
    (run.folder / "data" / "part-00003.parquet").unlink()
    assert discard_damaged(run.folder) == ["part-00003.parquet"]
    run, asked = moody(tmp_path, moods, {16: "throttled"})
    manifest = run_local(run)
    assert asked == [15, 16, 17, 18]
    assert (manifest.generation, manifest.parts[0]) == (2, "part-00000.g2.parquet")
    assert manifest.statuses == {"ok": 15, "throttled": 1}
    retried = run_local(moody(tmp_path, moods, {}, retry=("throttled",))[0])
    assert (retried.generation, retried.parts[3]) == (3, "part-00003.g3.parquet")
    assert retried.statuses == {"ok": 16}
    assert verify(run.folder) == []


def test_a_damaged_file_is_named_discarded_and_done_again(
    tmp_path: Path, moods: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, Double(DoubleConfig()))
    first, rows = run_local(run), rows_of(run)
    path = run.folder / "data" / "part-00002.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert cli.main(["verify", str(run.folder)]) == 2
    assert "part-00002.parquet has changed; add --discard" in capsys.readouterr().err
    assert cli.main(["verify", str(run.folder), "--discard"]) == 2
    assert "removed 1" in capsys.readouterr().err
    done: list[PartResult] = []
    again = run_local(run, done.append)
    assert [result.index for result in done] == [2]
    assert (again.identity, rows_of(run)) == (first.identity, rows)
    assert cli.main(["verify", str(run.folder)]) == 0
    (run.folder / "data" / ".part-00001.parquet.journal").mkdir()
    assert cli.main(["clean", str(run.folder)]) == 0
    assert "removed 1 of" in capsys.readouterr().out
