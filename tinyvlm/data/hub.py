"""Files of a dataset on the Hugging Face hub, by address: found once, pinned to a commit, read where they are needed.

    owner/name · owner/name@revision · owner/name:config/split · hf://datasets/owner/name@revision/folder/*.parquet
        └─ resolve ─▶ hf://datasets/owner/name@COMMIT/data/train-00000.parquet, …
                                  └─ open_file: bytes by range requests, no whole file is fetched first

`HF_ENDPOINT` and `HF_TOKEN` are taken from the environment, here and in every worker; the token is in no address, log
or fingerprint.  A dataset without Parquet files of its own is read as the hub has converted it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tinyvlm import storage
from tinyvlm.errors import DataError

SCHEME = "hf://"
CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps its own Parquet copy of a dataset, as {config}/{split}/0000.parquet."""
TIMEOUT_S = 30.0
_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[^:]+))?(?::(?P<config>[^/]+)(?:/(?P<split>[^/]+))?)?"
)


@dataclass(frozen=True)
class Asked:
    """What an address names."""

    repo: str
    revision: str | None = None
    path: str = ""
    config: str | None = None
    split: str | None = None


def is_address(text: str) -> bool:
    """Whether a text may name a dataset on the hub: `hf://…`, or `owner/name` with what may follow."""
    return text.startswith("hf:/") or _ID.fullmatch(text) is not None


def is_pinned(file: str | Path) -> bool:
    """Whether a file's address came from `resolve`; a Path made of it counts too."""
    return str(file).startswith("hf:/")


def as_typed(path: Path) -> str:
    """What was typed where a command line has made an absolute path of it: `owner/name` is no path."""
    if storage.is_object(path):
        return str(path)
    here = Path.cwd()
    return os.fspath(path.relative_to(here)) if path.is_relative_to(here) and not path.exists() else os.fspath(path)


def resolve(address: str, suffixes: Sequence[str] = (".parquet",)) -> list[str]:
    """The addresses of the files that `address` names, sorted, each with the commit that it names now.

    Raises:
        DataError: no such dataset, revision, configuration or file; it may not be seen, or the hub not be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    asked = parse(address)
    with speaking(address):
        api = HfApi(endpoint=_endpoint())
        info = api.dataset_info(asked.repo, revision=asked.revision, timeout=TIMEOUT_S)
        commit, files = info.sha, api.list_repo_files(asked.repo, revision=info.sha, repo_type="dataset")
        usable = [file for file in files if file.lower().endswith(tuple(suffixes))]
        configs = (info.card_data.get("configs") if info.card_data else None) or []
        chosen = _choose(asked, usable, configs)
        if not chosen and asked.revision is None and not asked.path:
            try:
                info = api.dataset_info(asked.repo, revision=CONVERTED, timeout=TIMEOUT_S)
                commit, files = info.sha, api.list_repo_files(asked.repo, revision=info.sha, repo_type="dataset")
                chosen = _choose(asked, [file for file in files if file.endswith(".parquet")], [])
            except RevisionNotFoundError:
                pass
    if not chosen:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        kinds = ", ".join(sorted({os.path.splitext(file)[1] or file for file in files})[:8])
        raise DataError(
            f"The dataset {address} has no {' or '.join(suffixes)} files for that (it has {kinds or 'no files'}"
            f"{f'; configurations: {names}' if names else ''}); other files are read after `hf download`."
        )
    return [f"{SCHEME}datasets/{asked.repo}@{commit}/{file}" for file in sorted(chosen)]


def open_file(file: str | Path) -> BinaryIO:
    """A file that `resolve` named; each read is one range request of just that length.

    Raises:
        OSError, httpx.HTTPError: use it inside `speaking`, which makes a sentence of them.
    """
    from huggingface_hub import HfFileSystem

    filesystem = HfFileSystem(endpoint=_endpoint())
    return cast(BinaryIO, filesystem.open(_unfolded(file), "rb", cache_type="none"))


@contextmanager
def speaking(address: str) -> Iterator[None]:
    """Makes one sentence of what the hub's library raises."""
    from huggingface_hub import constants, errors

    where = _endpoint() or constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise DataError(f"The dataset {address} is gated: ask for access on its page, and set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"There is no dataset {address} on {where}, or it is private and HF_TOKEN does not open it; "
            "if a folder or file is meant, there is none of that name here."
        ) from error
    except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise DataError(f"The dataset {address} has no such revision or file on {where}.") from error
    except (errors.HfUriError, errors.HFValidationError) as error:
        raise DataError(f"{address} is no address of a dataset: {_first_line(error)}") from error
    except errors.OfflineModeIsEnabled as error:
        raise DataError(f"{address} is on the hub, and HF_HUB_OFFLINE forbids to ask it.") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's, under that version's name
        raise DataError(
            f"{address} is no file here, and the hub {where} cannot be reached or does not answer well "
            f"({type(error).__name__}: {_first_line(error)}); check the name, the network and HF_ENDPOINT."
        ) from error


def parse(address: str) -> Asked:
    """Raises DataError when it is no address of a dataset."""
    if not address.startswith("hf:/"):
        match = _ID.fullmatch(address)
        if match is None:
            raise DataError(f"{address} is no dataset's name; it wants owner/name, or owner/name:config/split.")
        return Asked(match["repo"], match["revision"], "", match["config"], match["split"])
    from huggingface_hub import parse_hf_uri

    with speaking(address):
        uri = parse_hf_uri(_unfolded(address))
    if uri.type != "dataset":
        raise DataError(f"{address} names a {uri.type}; a dataset's address begins with hf://datasets/.")
    return Asked(uri.id, uri.revision, uri.path_in_repo)


def _choose(asked: Asked, files: list[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    if asked.path:
        return [file for file in files if file.startswith(f"{asked.path.rstrip('/')}/") or _fits(file, [asked.path])]
    by_name = {str(config.get("config_name")): config for config in configs}
    if asked.config is None and len(by_name) > 1:
        default = [name for name, config in by_name.items() if config.get("default") or name == "default"]
        if not default:
            raise DataError(
                f"The dataset {asked.repo} has several configurations ({', '.join(by_name)}); "
                f"name one, for example {asked.repo}:{next(iter(by_name))}."
            )
        config = by_name[default[0]]
    else:
        config = by_name.get(asked.config, {}) if asked.config else next(iter(by_name.values()), {})
    patterns = _patterns(config.get("data_files"), asked.split)
    if patterns:
        return [file for file in files if _fits(file, patterns)]
    return [file for file in files if all(_names(file, word) for word in (asked.config, asked.split) if word)]


def _patterns(data_files: Any, split: str | None) -> list[str]:
    """The patterns of a configuration in a dataset's card: text, a list of texts, or a list of {split, path}."""
    entries = data_files if isinstance(data_files, list) else [data_files] if data_files else []
    found: list[str] = []
    for entry in entries:
        if isinstance(entry, Mapping):
            paths = entry.get("path", [])
            if split in (None, entry.get("split")):
                found += paths if isinstance(paths, list) else [paths]
        elif split is None:
            found.append(str(entry))
    return found


def _fits(file: str, patterns: Sequence[str]) -> bool:
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    return any(re.fullmatch(glob_translate(pattern.removeprefix("./")), file) for pattern in patterns)


def _names(file: str, word: str) -> bool:
    """Whether a path has a word in it that stands by itself: `train` in data/train-00000.parquet."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", file) is not None


def _unfolded(address: str | Path) -> str:
    """With both slashes, of which a Path keeps one."""
    return re.sub(r"^hf:/+", SCHEME, str(address))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
