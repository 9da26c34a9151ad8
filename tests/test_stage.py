"""The stage contract, carried out in one process."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from toy_stages import Double, DoubleConfig, Spread, rows_of, start, write_numbers

from tinyvlm import folders, lease, schema
from tinyvlm.errors import ConfigError, DataError, StageError
from tinyvlm.folders import Input, Manifest, PartResult, find_folder, scan
from tinyvlm.lease import Lease
from tinyvlm.stage import open_input
from tinyvlm.stage_run import StageRun, run_local
from tinyvlm.upkeep import verify


def double(**settings: object) -> Double:
    return Double(DoubleConfig(**settings))  # type: ignore[arg-type]


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file under `root`."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_every_input_row_gets_one_outcome_row(tmp_path: Path) -> None:
    write_numbers(tmp_path, num_parts=3, first_value=480)
    run = start(tmp_path, double())
    seen: list[PartResult] = []
    manifest = run_local(run, seen.append)

    rows = rows_of(run)
    assert [row["key"] for row in rows] == [key for key in range(15) if key % 5 != 4], "rejected rows stay behind"
    assert [row["value"] for row in rows] == [2 * (480 + row["key"]) for row in rows]
    assert manifest.statuses == {"ok": 12} == json.loads((run.folder / "stats.json").read_text())["statuses"]
    assert manifest.rows_in == manifest.rows_out == 12 == sum(result.rows_in for result in seen)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "data", "lease-000001.json", "manifest.json", "report.html", "stats.json",
    ]  # fmt: skip
    assert "&lt;toy&gt;" in (run.folder / "report.html").read_text()
    assert verify(run.folder) == []
    assert find_folder([tmp_path], "double", "a test") == run.folder
    assert schema.measured_columns(pq.read_schema(run.folder / "data" / "part-00000.parquet")) == {"milliseconds"}
    assert sum(table.num_rows for table in scan(run.folder, ["key"], only_ok=True)) == 12


def test_the_same_command_again_changes_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_numbers(tmp_path)
    first = run_local(start(tmp_path, double()))
    before = snapshot(tmp_path)
    with caplog.at_level(logging.INFO):
        again = run_local(start(tmp_path, double(part_seconds=0.001)))
    assert again == first
    assert snapshot(tmp_path) == before
    assert "double is finished already, nothing to do" in caplog.text


def test_a_run_killed_in_the_middle_and_repeated_equals_one_that_was_not(tmp_path: Path, python: list[str]) -> None:
    write_numbers(tmp_path / "killed", num_parts=8)
    shutil.copytree(tmp_path / "killed", tmp_path / "straight")
    code = f"import toy_stages; toy_stages.main({str(tmp_path / 'killed')!r}, '0.15')"
    process = subprocess.Popen([*python, "-c", code])
    data = start(tmp_path / "killed", double()).folder / "data"
    deadline = time.monotonic() + 60
    while len(list(data.glob("part-*.parquet"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (data / ".part-00007.parquet.0.tmp").write_bytes(b"half a part")
    assert not (data.parent / "manifest.json").exists()

    done: list[PartResult] = []
    run = start(tmp_path / "killed", double())
    kept = {path.name: path.stat().st_mtime_ns for path in data.glob("part-*.parquet")}
    resumed = run_local(run, done.append)
    straight = run_local(start(tmp_path / "straight", double()))

    assert 0 < len(done) <= 5, "parts that were done are not done again"
    assert {name: (data / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(run.folder.rglob(".*")), "nothing of the killed run is left"
    assert resumed.identity == straight.identity
    assert rows_of(run) == rows_of(start(tmp_path / "straight", double()))


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("lose", "lost keys [5]"),
        ("invent", "new keys [999]"),
        ("repeat", "same key to several rows"),
        ("move", "another order"),
        ("status", "'splendid'"),
        ("empty", "a status empty"),
        ("columns", "other columns"),
        ("type", "value is double instead of int64"),
        ("raise", "RuntimeError: the toy broke"),
    ],
)
def test_a_stage_that_breaks_the_contract_is_refused_and_its_good_parts_stay(
    tmp_path: Path, fault: str, complaint: str
) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double(fault=fault, fault_key=5))
    with pytest.raises(StageError, match="part 1") as caught:
        run_local(run)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run.folder / "data").iterdir()] == ["part-00000.parquet"]
    assert not run.is_finished


def test_a_stage_that_raised_continues_where_it_stopped(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    settings = {"fault": "raise", "fault_key": 12, "once": str(tmp_path / "broke")}
    with pytest.raises(StageError):
        run_local(start(tmp_path, double(**settings)))
    done: list[PartResult] = []
    manifest = run_local(start(tmp_path, double(**settings)), done.append)
    assert [result.index for result in done] == [2, 3]
    assert manifest.rows_out == 16


def test_a_damaged_part_is_done_again(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    run_local(run)
    (run.folder / "manifest.json").unlink()
    (run.folder / "data" / "part-00002.parquet").write_bytes(b"PAR1 no more")
    done: list[PartResult] = []
    run_local(run, done.append)
    assert [result.index for result in done] == [2]
    assert verify(run.folder) == []


def test_fan_out(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    manifest = run_local(start(tmp_path, Spread(DoubleConfig())))
    assert (manifest.rows_in, manifest.rows_out) == (16, 32)
    for fault, complaint in (("lose", "lost keys"), ("repeat", "same key"), ("across", "different parts")):
        with pytest.raises(StageError, match=complaint):
            run_local(start(tmp_path, Spread(DoubleConfig(fault=fault))))


def test_what_changes_the_bytes_changes_the_folder(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    assert start(tmp_path, double(part_seconds=9.0)).folder == run.folder, "speed is not in the fingerprint"
    assert start(tmp_path, double(factor=3)).folder != run.folder

    stage = double()
    stage.version = 2
    assert start(tmp_path, stage).folder != run.folder
    # The same numbers, measured at another time: the same input.  Other numbers under the same settings: another.
    write_numbers(tmp_path)
    assert start(tmp_path, double()).folder == run.folder
    write_numbers(tmp_path, first_value=1)
    assert start(tmp_path, double()).folder != run.folder


def test_one_stage_object_runs_on_two_inputs(tmp_path: Path) -> None:
    stage = double()
    runs = []
    for name in ("a", "b"):
        write_numbers(tmp_path / name, first_value=len(name))
        runs.append(start(tmp_path / name, stage))
    assert [Path(run.stage.folders["numbers"]).parent.name for run in runs] == ["a", "b"]


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = write_numbers(tmp_path)
    run_local(start(tmp_path, double()))
    saved = (folder / "data" / "part-00001.parquet").read_bytes()
    (folder / "data" / "part-00001.parquet").write_bytes(saved + b"x")
    with pytest.raises(StageError, match=r"part-00001.parquet, which is missing or not as 'numbers' left it"):
        start(tmp_path, double())
    shutil.rmtree(folder)
    with pytest.raises(StageError, match=r"reads the folder of 'numbers'.*is gone.*ray_jobs\.numbers"):
        start(tmp_path, double())
    shutil.rmtree(tmp_path / "latest")
    with pytest.raises(StageError, match="reads the folder of 'numbers', but found none in"):
        start(tmp_path, double())
    with pytest.raises(StageError, match="does not exist"):
        start(tmp_path / "nowhere", double())


def test_which_of_several_folders_is_read(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    for factor in (2, 3, 2):
        last = start(tmp_path, double(factor=factor))
        run_local(last)
    assert find_folder([tmp_path], "double", "a test") == last.folder, "the one of the last command"
    (tmp_path / "latest" / "double.json").write_text("{")
    with pytest.raises(StageError, match="several folders of 'double'"):
        find_folder([tmp_path], "double", "a test")
    assert find_folder([tmp_path, last.folder], "double", "a test") == last.folder, "a folder named outright"


def test_nothing_is_written_when_it_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbers(tmp_path / "in")
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"double\.fault"):
        run_local(start(tmp_path / "in", double(fault="check"), output))
    empty = Input((), "0", {}, is_stage=False)
    with pytest.raises(DataError, match="holds no rows"):
        run_local(StageRun(double(), empty, output))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage._replace(free=10**7))
    with pytest.raises(DataError, match=r"0\.3 GB .* 0\.0 GB are free"):
        run_local(start(tmp_path / "in", double(), output))
    assert not output.exists()
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(DataError, match="cannot write"):
        run_local(start(tmp_path / "in", double(), file / "out"))


def test_a_file_that_changed_is_found(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    run_local(run)
    (run.folder / "data" / "part-00000.parquet").unlink()
    with (run.folder / "data" / "part-00001.parquet").open("ab") as file:
        file.write(b"x")
    assert verify(run.folder) == ["part-00000.parquet is missing", "part-00001.parquet has changed"]
    with pytest.raises(StageError, match=r"no manifest\.json"):
        Manifest.read(tmp_path)


def test_rows_that_went_missing_end_the_run(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    results = [run.work(part) for part in run.source.parts]
    with pytest.raises(StageError, match=r"no result for parts \[3\]"):
        run.finish(results[:3], 0.0)
    results[2].counts = {"ok": 3}
    with pytest.raises(StageError, match="read 4 rows in part 2 and counted 3"):
        run.finish(results, 0.0)
    assert not run.is_finished


# --- the lease


def test_a_second_driver_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with Lease.take(tmp_path) as held:
        with pytest.raises(StageError, match=f"in use by process {os.getpid()} "):
            Lease.take(tmp_path)
        assert held.number == 1
    with Lease.take(tmp_path) as next_one:
        assert next_one.number == 2, "given back, and numbered on"


def test_of_many_drivers_at_once_one_gets_the_lease(tmp_path: Path) -> None:
    barrier, taken, refused = threading.Barrier(16), [], []

    def take() -> None:
        barrier.wait()
        try:
            taken.append(Lease.take(tmp_path))
        except StageError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, 15)


def test_the_lease_of_a_dead_process_is_taken_over_at_once(tmp_path: Path, python: list[str]) -> None:
    code = (
        "import os, pathlib, tinyvlm.lease as lease\n"
        f"lease.Lease.take(pathlib.Path({str(tmp_path)!r})).__enter__()\n"
        "os._exit(1)"
    )
    subprocess.run([*python, "-c", code], check=False)
    assert Lease.take(tmp_path).number == 2


def test_a_stale_lease_is_taken_over_and_its_old_holder_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_numbers(tmp_path)
    run = start(tmp_path, double())
    old = Lease.take(run.folder)
    run.work(run.source.parts[0], old.number)
    monkeypatch.setattr(lease, "STALE_S", 0.05)
    time.sleep(0.1)
    new = Lease.take(run.folder)
    # The old holder wakes up and renews, as its thread does: the successor stays.
    old._write(free=False)
    with pytest.raises(StageError, match=r"belongs to another driver \(lease 2, ours was 1\)"):
        run.work(run.source.parts[1], old.number)
    run.work(run.source.parts[1], new.number)
    assert sorted(path.name for path in (run.folder / "data").iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    results = [run.work(part, new.number) for part in run.source.parts]
    with pytest.raises(StageError, match="another driver"):
        run.finish(results, 0.0, lease_number=old.number)
    assert not run.is_finished
    run.finish(results, 0.0, lease_number=new.number)


def test_a_lease_that_is_renewed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    monkeypatch.setattr(lease, "STALE_S", 0.5)
    with Lease.take(tmp_path):
        time.sleep(1.0)
        with pytest.raises(StageError, match="in use"):
            Lease.take(tmp_path)


def test_open_input_reads_every_folder_that_a_stage_needs(tmp_path: Path) -> None:
    write_numbers(tmp_path)
    run_local(start(tmp_path, double()))

    class Both(Double):
        reads = ("numbers", "double")

    source = open_input(Both(DoubleConfig()), [tmp_path])
    assert sorted(source.folders) == ["double", "numbers"]
    assert len(source.parts) == 4
    assert source.fingerprint != open_input(double(), [tmp_path]).fingerprint
