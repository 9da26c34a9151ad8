"""Stage folders on disk: the manifest, finding a folder, closing one, checking one.

    {root}/{stage}-{fingerprint[:12]}/
        data/part-00000.parquet …   temp + rename; one output part for each input part, its counts in its own footer
        stats.json, report.html     what a person looks at
        manifest.json               written last: its existence means finished
        lease-000001.json           who is writing (see lease.py)
    {root}/latest/{stage}.json      which of several folders of a stage the last command made or confirmed;
                                    of `prepare`, one for each source: prepare.llava.json

What runs a stage and fills its folder is in stage.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyvlm import config as settings
from tinyvlm import schema, storage
from tinyvlm.errors import DataError, StageError

MIN_FREE_BYTES = 256 * 1024**2
"""A stage does not start on a disk with less than this."""
FOOTER = b"tinyvlm"
"""Key of the JSON that each part carries in its Parquet footer: {"counts": {status: rows}, "rows_in": n}, of a retry
`made_of`, and `content` where rows were taken down (see `describe`)."""
WRITING: Mapping[str, Any] = {"compression": "zstd", "row_group_size": 1024, "write_batch_size": 32}
"""How parts are written.  Small pages: a few pictures out of a row group should not cost all of it."""

SHARED_PICTURES: Mapping[str, Any] = {"dictionary_pagesize_limit": 1 << 30}
"""More for parts whose rows share pictures: each is stored once for a row group, however large its pages get."""

log = logging.getLogger(__name__)
_PART = re.compile(r"part-(\d+)(?:\.g(\d+))?(?:\.[0-9a-f]{16})?\.parquet")


@dataclass(frozen=True)
class Part:
    """A piece of input that becomes one output file: `num_rows` rows from `offset` of `path`."""

    index: int
    path: str
    offset: int
    num_rows: int
    generation: int = 0
    """0, or which retry of some rows this is (see stage_run.py)."""
    previous: str = ""
    """Name of the data file that a retry starts from."""
    made_of: str = ""
    """Fingerprint of that file and of what is tried again: what another retry left behind does not count."""

    @property
    def file_name(self) -> str:
        generation = f".g{self.generation}" if self.generation else ""
        return f"part-{self.index:05d}{generation}.parquet"

    def name_in(self, folder: Path) -> str:
        """`file_name`; in an object store a new one each time, because a late writer cannot be held back there."""
        if not storage.is_object(folder):
            return self.file_name
        return f"{self.file_name.removesuffix('.parquet')}.{uuid.uuid4().hex[:16]}.parquet"


@dataclass(frozen=True)
class Input:
    """What a stage reads: its parts, their fingerprint, and where each folder that it reads is."""

    parts: tuple[Part, ...]
    fingerprint: str
    folders: Mapping[str, str]
    is_stage: bool
    """True: rows come from a stage folder and `Stage.select` chooses among them."""


@dataclass
class PartResult:
    """What one part came to."""

    index: int
    rows_in: int
    counts: dict[str, int]
    num_bytes: int
    seconds: float = 0.0
    name: str = ""
    """Name of the data file."""
    resumed: bool = False
    file: dict[str, Any] = field(default_factory=dict)
    """The data file's entry in the manifest; empty when an earlier run wrote it."""


@dataclass(frozen=True)
class Manifest:
    """The last file of a stage folder."""

    stage: str
    version: int
    fingerprint: str
    """Of what was asked: the stage, its settings and its input.  Names the folder."""
    settings: dict[str, Any]
    inputs: dict[str, Any]
    rows_in: int
    rows_out: int
    statuses: dict[str, int]
    files: dict[str, Any]
    """name → {"rows", "bytes", "sha256", "content"} of each data file (see `describe_part`); with a / in its name, a
    file elsewhere in the folder."""
    seconds: float
    created: str
    tinyvlm_version: str
    git_commit: str | None
    generation: int = 0
    """How often rows of some statuses were done again, or some taken down."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Fingerprint of what came out: a folder made anew with other rows is another input to the next stage.

        One from which rows were taken down is not: what was made of it stands, without those rows.
        """
        contents = [entry.get("content") or entry.get("sha256") for _, entry in sorted(self.files.items())]
        return settings.fingerprint([self.fingerprint, contents])

    @property
    def parts(self) -> dict[int, str]:
        """Index of each part → name of the data file that holds it."""
        return newest(self.files)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises StageError when `folder` is not a finished stage folder."""
        try:
            return cls(**json.loads(storage.read(folder / "manifest.json")))
        except (FileNotFoundError, NotADirectoryError):
            raise StageError(f"{folder} is not a finished stage folder: it has no manifest.json.") from None
        except OSError as error:
            raise StageError(f"{folder}/manifest.json cannot be read ({error.strerror or error}).") from None
        except (ValueError, TypeError) as error:
            raise StageError(
                f"{folder}/manifest.json cannot be read ({error}); remove the folder and run the stage again."
            ) from None


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file as a whole (see storage.py)."""
    storage.write_atomic(path, content)


def part_of(name: str) -> tuple[int, int] | None:
    """Index and generation that the name of a data file tells; None for other files."""
    found = _PART.fullmatch(name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def newest(names: Iterable[str]) -> dict[int, str]:
    """Index of each part → the data file of its newest generation."""
    known = [(part, name) for name in names if (part := part_of(name))]
    return {index: name for (index, _), name in sorted(known)}


def is_finished(folder: Path) -> bool:
    """It has a manifest."""
    return storage.is_file(folder / "manifest.json")


def find_folder(inputs: Sequence[Path], stage_name: str, reader: str) -> Path:
    """The finished folder of `stage_name` among `inputs`: stage folders themselves, or roots that hold some.

    Raises:
        StageError: there is none, naming it, or several and no pointer says which.
    """
    for given in inputs:
        if not storage.exists(given):
            raise StageError(f"{reader} was given --input {given}, which does not exist.")
        if is_finished(given) and Manifest.read(given).stage == stage_name:
            return given
    again = f"`python -m ray_jobs.{stage_name}`"
    for root in inputs:
        pointed = _pointed(root, stage_name) or _only_source(root, stage_name, reader)
        if pointed is not None:
            if is_finished(pointed):
                return pointed
            raise StageError(
                f"{reader} reads the folder of {stage_name!r}, but {pointed} is gone or unfinished; run {again} again."
            )
        names = (entry.name for entry in storage.entries(root) if entry.is_folder)
        found = [root / name for name in names if name.startswith(f"{stage_name}-") and is_finished(root / name)]
        if len(found) == 1:
            return found[0]
        if found:
            raise StageError(
                f"{reader} found several folders of {stage_name!r} in {root}; give one of them as --input."
            )
    places = ", ".join(str(path) for path in inputs) or "no --input"
    raise StageError(
        f"{reader} reads the folder of {stage_name!r}, but found none in {places}; "
        f"run {again} first, or give its folder as --input."
    )


def find_folders(inputs: Sequence[Path], stage_name: str, reader: str) -> list[Path]:
    """The finished folders of a stage that makes one for each of its sources, in the order of their sources' names.

    Args:
        inputs: stage folders themselves, or roots; of a root those count that its pointers name.

    Raises:
        StageError: as `find_folder`.
    """
    own = [path for path in inputs if is_finished(path) and Manifest.read(path).stage == stage_name]
    pointed = [
        folder
        for root in inputs
        if root not in own
        for name in sorted(storage.sizes(root / "latest"))
        if re.fullmatch(rf"{re.escape(stage_name)}(\.[^/]+)?\.json", name)
        and (folder := _pointed(root, name.removesuffix(".json"))) is not None
    ]
    for folder in pointed:
        if not is_finished(folder):
            again = f"`python -m ray_jobs.{stage_name}`"
            raise StageError(
                f"{reader} reads the folders of {stage_name!r}, but {folder} is gone or unfinished; run {again} again, "
                f"or remove what points at it in {folder.parent / 'latest'}."
            )
    return list(dict.fromkeys([*own, *pointed])) or [find_folder(inputs, stage_name, reader)]


def _pointed(root: Path, stage_name: str) -> Path | None:
    try:
        return root / str(json.loads(storage.read(root / "latest" / f"{stage_name}.json"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no pointer, or a damaged one: the folders themselves decide


def _only_source(root: Path, stage_name: str, reader: str) -> Path | None:
    """What the pointer of a stage that makes a folder for each source points at, if there is one."""
    names = [name.removesuffix(".json") for name in storage.sizes(root / "latest") if name.startswith(f"{stage_name}.")]
    sources = sorted(name for name in names if name != stage_name)
    if len(sources) > 1:
        raise StageError(
            f"{reader} reads one folder of {stage_name!r}, but {root} has {len(sources)} "
            f"({', '.join(name.removeprefix(f'{stage_name}.') for name in sources)}); give one of them as --input."
        )
    return _pointed(root, sources[0]) if sources else None


def point_latest(root: Path, stage_name: str, folder: Path) -> None:
    """Note that `folder` is what the last command for this stage (`prepare`, or `prepare.llava`) made or confirmed."""
    if _pointed(root, stage_name) != root / folder.name:
        write_atomic(root / "latest" / f"{stage_name}.json", json.dumps({"folder": folder.name}))


def close_folder(folder: Path, manifest: Manifest, statistics: dict[str, Any]) -> None:
    """Write what a person looks at, then the manifest; after this the folder is finished."""
    write_report(folder, statistics)
    write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """From now on the folder is what this manifest says."""
    storage.settle(folder / "data")
    write_atomic(folder / "manifest.json", json.dumps(settings.to_dict(manifest), indent=2))


def write_report(folder: Path, statistics: dict[str, Any]) -> None:
    """report.html and stats.json, which comes last: whoever finds it need not look whether the other is of its time."""
    from tinyvlm.report import stage_report

    write_atomic(folder / "report.html", stage_report(statistics))
    write_atomic(folder / "stats.json", json.dumps(statistics, indent=2))


def part_paths(folder: Path) -> list[Path]:
    """The data files of a stage folder in the order of their parts: those of the manifest, else all finished ones."""
    if is_finished(folder):
        return [folder / "data" / name for _, name in sorted(Manifest.read(folder).parts.items())]
    return [folder / "data" / name for _, name in sorted(newest(storage.sizes(folder / "data")).items())]


def require_space(root: Path, num_bytes: int, writer: str) -> None:
    """Raises DataError when `root` cannot be written, or has no room for about `num_bytes`.  Leaves nothing."""
    if storage.is_object(root):
        _require_writable(root, writer)
        return
    place = root.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise DataError(f"{writer} cannot write to {root}; give a folder as --output that it may write.")
    needed, free = max(MIN_FREE_BYTES, num_bytes), shutil.disk_usage(place).free
    if free < needed:
        raise DataError(
            f"{writer} will write about {needed / 1e9:.1f} GB to {root}, where {free / 1e9:.1f} GB are free; "
            "make room or give another --output."
        )


def _require_writable(root: Path, writer: str) -> None:
    probe = root / ".probe.tmp"
    try:
        storage.write_atomic(probe, b"")
        try:
            storage.create(probe, b"")
            log.warning("%s has no conditional put: see to it yourself that only one driver writes there", root)
        except FileExistsError:
            pass
        storage.remove(probe)
    except OSError as error:
        raise DataError(
            f"{writer} cannot write to {root} ({error.strerror or error}); the bucket must exist, and credentials and "
            "endpoint come from the environment."
        ) from error


def read_rows(path: str, offset: int, num_rows: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows [offset, offset + num_rows) of a Parquet file, touching only the row groups that hold them."""
    with pq.ParquetFile(storage.readable(storage.address(path)), memory_map=False) as file:
        groups: list[int] = []
        start = skip = 0
        for group in range(file.metadata.num_row_groups):
            length = file.metadata.row_group(group).num_rows
            if start < offset + num_rows and start + length > offset:
                if not groups:
                    skip = offset - start
                groups.append(group)
            start += length
        return file.read_row_groups(groups, columns=columns).slice(skip, num_rows)


def scan(folder: Path, columns: Sequence[str], *, only_ok: bool = False) -> Iterator[pa.Table]:
    """The named columns of each finished part of a stage folder, a table a part; `a.list.element.b` is a column too."""
    for path in part_paths(folder):
        # Not read_table, which knows no columns inside of lists.
        with pq.ParquetFile(storage.readable(path)) as file:
            table = file.read([*columns, *(["status"] if only_ok else [])])
        if only_ok:
            table = table.filter(pc.equal(table["status"], schema.OK))
        kept = dict.fromkeys(name.split(".")[0] for name in columns)
        yield table.select(list(kept))


def describe_part(path: Path) -> dict[str, Any]:
    """A data file's entry in the manifest (see `describe`)."""
    with storage.mapped(path) as content:
        return describe(content)


def describe(content: Any) -> dict[str, Any]:
    """The entry in the manifest of a data file with this content, a buffer.

    `sha256` is of the whole file.  `content` leaves out the measured columns, so two runs that differ in nothing else
    have it in common: it is taken over the stored bytes of the other columns, which depend on the rows alone.  A file
    from which rows were taken down says in its footer what it was before: the next stage starts nothing anew.
    """
    metadata = pq.read_metadata(pa.BufferReader(content))
    measured = schema.measured_columns(metadata.schema.to_arrow_schema())
    rows = hashlib.sha256()
    with memoryview(content) as view:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(index)
                if chunk.path_in_schema.split(".")[0] not in measured:
                    first = min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset)))
                    rows.update(view[first : first + chunk.total_compressed_size])
        whole = hashlib.sha256(view).hexdigest()
        made_as = footer_of(metadata).get("content", rows.hexdigest())
        return {"rows": metadata.num_rows, "bytes": len(view), "sha256": whole, "content": made_as}


def footer_of(metadata: Any) -> dict[str, Any]:
    """What a data file says of itself in `FOOTER`, given its Parquet metadata; nothing where it says nothing."""
    said: dict[str, Any] = json.loads((metadata.metadata or {}).get(FOOTER, b"{}"))
    return said


def git_commit() -> str | None:
    """The commit of the code that runs: of its checkout, or as `TINYVLM_GIT_COMMIT` says where only a copy runs."""
    package = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD", "--show-prefix"], cwd=package, capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        answer = None
    if answer is not None and answer.returncode == 0:
        commit, prefix = [*answer.stdout.splitlines(), ""][:2]
        # Installed into an environment inside somebody's checkout, the prefix would be .venv/lib/…/tinyvlm/.
        if prefix == f"{package.name}/":
            return commit
    return os.environ.get("TINYVLM_GIT_COMMIT") or None
