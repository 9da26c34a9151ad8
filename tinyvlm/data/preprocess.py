"""Stage `preprocess`: pictures → square JPEG pictures of one size.

    originals of a download ─────────────────────────┐
    pictures that are already there (data/pictures) ─┴▶ decode ─▶ crop the centre, or pad with black ─▶ JPEG
    finished pictures of a download ──────────────────── passed on as they are ──────────────────────▶

By default the download workers do all this in the same pass (download.store=finished), and little is left to do here.
`sha256` stays that of the bytes as they came, so that a picture is known by it in every stage.
"""

from __future__ import annotations

import base64
import copy
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tinyvlm import images, schema
from tinyvlm.data.decoding import Decoded, Decoders
from tinyvlm.data.pictures.bodies import Body, read_bodies
from tinyvlm.errors import ConfigError
from tinyvlm.folders import Manifest, part_paths, read_rows, scan
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from tinyvlm.recipes import Recipe

RATIO_EDGES = [round(0.05 * step, 2) for step in range(1, 21)]
"""Edges of the 19 bins of shorter/longer side; the rule's 0.6 is one of them."""
NUM_SAMPLES = 24
AHEAD = 16
"""Pictures handed to the decoders before their turn."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """What comes out, and what is refused."""

    picture: images.PictureConfig = field(default_factory=images.PictureConfig)
    limits: images.LimitConfig = field(default_factory=images.LimitConfig)
    decode_processes: int = 1
    """Decoder processes of each worker; as `download.decode_processes`."""
    decode_timeout_s: float = 20.0
    """How long a decoder may take over one picture, s."""


class Preprocess(Stage):
    """Makes each picture square."""

    name = "preprocess"
    version = 3
    reads = ("download",)
    writes = schema.PREPROCESSED

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.settings = {
            "picture": config.picture.stored, "limits": config.limits, "resizer": images.resizer()
        }  # fmt: skip
        self.bytes_per_row = config.picture.size**2 // 4
        self._finished: bool | None = None
        self._running: Decoders | None = None

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Preprocess:
        """The stage with a recipe's settings."""
        download = recipe.download
        return cls(
            PreprocessConfig(
                picture=recipe.picture,
                limits=recipe.limits,
                decode_processes=download.decode_processes,
                decode_timeout_s=download.decode_timeout_s,
            )
        )

    def reading(self, stage_name: str) -> Preprocess:
        """The same stage for the folder of another one: `download` or `pictures`."""
        other = copy.copy(self)
        other.reads = (stage_name,)
        return other

    def select(self, rows: pa.Table) -> pa.Table:
        """Of a download what arrived; of a listing all, so that its damaged files are seen in the outcome too."""
        return rows if _is_listing(rows) else super().select(rows)

    def check(self) -> None:
        """Refuses finished pictures of other settings: they cannot be undone."""
        wanted, stored = self.config.picture.stored, self._stored()
        for name in stored:
            if stored[name] != wanted.get(name):
                raise ConfigError(
                    f"preprocess wants picture.{name}={wanted.get(name)}, but download stored finished pictures with "
                    f"{stored[name]}; download again, or with --set download.store=original."
                )

    def __call__(self, rows: pa.Table) -> pa.Table:
        images.quiet_pillow()
        columns: dict[str, Any] = {name: rows[name] for name in ("key", "url", "caption", "meta")}
        if _is_listing(rows):
            outcomes = list(self._decode(read_bodies(rows, self.config.limits.max_bytes)))
            columns |= {name: [getattr(outcome, name) for outcome in outcomes] for name in ("sha256", "phash")}
            for name in ("width", "height"):
                columns[f"original_{name}"] = [getattr(outcome, name) for outcome in outcomes]
            # An address of its own, as that of a link which redirects nowhere.
            columns["final_url"] = rows["url"]
        else:
            outcomes = list(self._of_download(rows))
            columns |= {name: rows[name] for name in ("sha256", "phash", "final_url")}
            columns |= {"original_width": rows["width"], "original_height": rows["height"]}
        for name in self.writes.names:
            if name not in columns:
                columns[name] = [getattr(outcome, name) for outcome in outcomes]
        return pa.table({name: columns[name] for name in self.writes.names}, schema=self.writes)

    def statistics(self, folder: Path) -> dict[str, Any]:
        """How many were cropped and padded, their shapes, and some to look at."""
        fits: Counter[str] = Counter()
        counts = np.zeros(len(RATIO_EDGES) - 1, np.int64)
        for table in scan(folder, ["fit", "original_width", "original_height"], only_ok=True):
            fits.update(table["fit"].to_pylist())
            sides = np.stack([table["original_width"].to_numpy(), table["original_height"].to_numpy()])
            ratios = sides.min(axis=0) / sides.max(axis=0)
            counts += np.histogram(np.clip(ratios, RATIO_EDGES[0], 1.0), bins=RATIO_EDGES)[0]
        threshold = self.config.picture.crop_ratio
        return {
            "cropped": fits["crop"],
            "padded": fits["pad"],
            "charts": [
                {
                    "kind": "bar",
                    "title": "How pictures became square",
                    "labels": ["centre cropped", "padded with black"],
                    "values": [fits["crop"], fits["pad"]],
                },
                {
                    "kind": "histogram",
                    "title": "Shorter ÷ longer side",
                    "mark": {"x": threshold, "label": f"cropped from {threshold:g} upwards"},
                    "edges": RATIO_EDGES,
                    "counts": counts.tolist(),
                    "x_label": "shorter ÷ longer side",
                },
            ],
            "pictures": {"title": "Finished pictures", "items": _samples(folder)},
        }

    def _stored(self) -> dict[str, Any]:
        """The picture settings with which `download` finished its pictures; empty when it kept originals."""
        if "download" not in self.folders:
            return {}
        made: dict[str, Any] = Manifest.read(address(self.folders["download"])).settings.get("picture", {})
        return made

    def _of_download(self, rows: pa.Table) -> Iterator[Decoded]:
        if self._finished is None:
            self._finished = bool(self._stored())
        if not self._finished:
            yield from self._decode(Body(data) for data in rows["image"].to_pylist())
            return
        for row in rows.select(["image", "width", "height"]).to_pylist():
            fit = images.fit_of(row["width"], row["height"], self.config.picture)
            yield Decoded(status=schema.OK, image=row["image"], fit=fit)

    def _decode(self, bodies: Iterable[Body]) -> Iterator[Decoded]:
        """The one place where bytes become pictures, or the reasons why not; in order, a few ahead."""
        coming: deque[Future[Decoded]] = deque()
        for body in bodies:
            coming.append(self._submit(body))
            if len(coming) > AHEAD:
                yield coming.popleft().result()
        yield from (future.result() for future in coming)

    def _submit(self, body: Body) -> Future[Decoded]:
        if body.data is not None:
            return self._decoders().submit(body.data)
        unread: Future[Decoded] = Future()
        unread.set_result(Decoded(status=body.status, detail=body.detail))
        return unread

    def _decoders(self) -> Decoders:
        if self._running is None:
            config = self.config
            self._running = Decoders(
                config.picture, config.limits, "finished", config.decode_processes, config.decode_timeout_s
            )
        return self._running

    def close(self) -> None:
        """End the decoder processes."""
        if self._running is not None:
            self._running.close()
        self._running = None


def _is_listing(rows: pa.Table) -> bool:
    """Whether rows say where pictures are, and do not hold them."""
    return "file" in rows.column_names


def _samples(folder: Path) -> list[dict[str, str]]:
    """About two dozen finished pictures, from parts all over the folder, cropped and padded in turn."""
    paths = part_paths(folder)
    num_chosen = min(NUM_SAMPLES, len(paths))
    chosen = [paths[index * len(paths) // num_chosen] for index in range(num_chosen)]
    each = -(-NUM_SAMPLES // max(1, num_chosen))
    items: list[dict[str, str]] = []
    for path in chosen:
        # Images lie in one column chunk for each row group: a small slice reads no more than that.
        rows = read_rows(str(path), 0, 8 * NUM_SAMPLES, ["status", "fit", "image", "original_width", "original_height"])
        usable = [row for row in rows.to_pylist() if row["status"] == schema.OK]
        by_fit = [[row for row in usable if row["fit"] == fit] for fit in ("crop", "pad")]
        in_turn = [row for pair in itertools.zip_longest(*by_fit) for row in pair if row]
        for row in in_turn[:each]:
            caption = f"{row['original_width']}×{row['original_height']} {row['fit']}"
            items.append({"caption": caption, "jpeg_base64": base64.b64encode(row["image"]).decode()})
    return items[:NUM_SAMPLES]
