"""The stage `encode`: one forward pass of the vision tower gives features for training and a placeholder test.

    whole input ──repeats.py──▶ what stands behind many links (once, by the driver; the workers get it)
                                                     │
    448² JPEG ─┬─ known hash, look, target; one colour? ────▶ "placeholder.repeated", ".redirect", ".similar", ".plain"
               └▶ tower ─┬─ CLS of the last hidden state ──cosine──▶ similarity to the nearest reference placeholder
                         │                                           at or above the threshold: "placeholder.clip"
                         └─ patches of it ──block means──▶ features (K, D), as `feature_storage` says

Features and CLS are taken before the final layer norm.  Similarity and features are stored for placeholders too, so
that another threshold is tried without encoding: a run that differs from a finished one in its threshold alone takes
everything else from there.  Without a threshold in the settings one is measured for the tower (calibrate.py), once, and
kept beside the data.  Pooling is the model's own (`tinyvlm.model.modeling.pool_patches`): cached and live features are
the same numbers.

Shapes: N pictures, S side of the tower's input, P patches, K image tokens, D width of the tower, R references.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tinyvlm import config as settings_of
from tinyvlm import schema, storage
from tinyvlm.data import calibrate, encode_report, towers
from tinyvlm.data.calibrate import Calibration
from tinyvlm.data.placeholder import DESIGNS, is_plain, without_padding
from tinyvlm.data.prefetch import prefetch
from tinyvlm.data.rejudge import EarlierRows, judge
from tinyvlm.data.repeats import Repeats, find_repeats
from tinyvlm.errors import ConfigError, StageError
from tinyvlm.folders import Input, Manifest
from tinyvlm.images import ImageError, LimitConfig, PictureConfig, decode
from tinyvlm.schema import FeatureStorage
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from torch import Tensor

    from tinyvlm.data.clip import Encoded, Tower
    from tinyvlm.recipes import Recipe

Dtype = Literal["float32", "bfloat16", "float16"]

BATCHES_AHEAD = 3
"""How many decoded batches wait for the tower at most."""

_TOWER_IN_USE = threading.Lock()
"""Parts go through a process's tower one after the other; while one is written, the next is encoded."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Which tower, how many tokens for a picture, and what counts as a placeholder."""

    vision: str = "openai/clip-vit-large-patch14-336"
    """A CLIP checkpoint: local folder, hub id or toy:clip; a text tower in it is left out."""
    num_image_tokens: int = 64
    """Tokens that stand for one picture: a square number whose root divides the patch grid."""
    feature_width: int = 1024
    """Width of the tower's hidden states; it fixes the columns of the output, and is checked against the tower."""
    interpolate_positions: bool = False
    """Let picture.tower_size be another multiple of the patch than the tower was trained at, as 448 for 336."""
    feature_storage: FeatureStorage = "float16"
    """Half precision, or eight bits (int8, fp8) with a scale for each token; what that loses is in the statistics."""
    placeholder_threshold: float | None = None
    """Cosine similarity to a reference from which a picture counts as a placeholder; above 1: none does; none: measured
    for the tower.  The published system had 0.3, which fits its own reference and tower alone."""
    calibration_pictures: int = 400
    """Drawn placeholders, drawn scenes, and pictures of the input, so many of each, to measure the threshold with."""
    references: tuple[str, ...] = tuple(DESIGNS)
    """Reference placeholders: names of drawn designs (placeholder.py) and picture files of one's own."""
    repeated_links: int = 50
    """A picture whose very bytes stand behind so many different links counts as a placeholder; 0: not looked at."""
    similar_links: int = 100
    """So does one that, but for small differences, stands behind so many links; 0: not looked at."""
    redirect_links: int = 20
    """So does what so many different links were redirected to; 0: not looked at."""
    plain_levels: float = 4.0
    """So does a picture that stays so near to one colour, in levels of 0 … 255 (`placeholder.spread`); 0: not looked
    at."""
    dtype: Dtype = "float16"
    """Precision of the tower."""
    compile: bool = False
    """Let torch.compile fuse the tower, which wants a C compiler; the last bits of features may change."""
    batch_size: int = settings_of.speed(64)
    """Pictures in one forward pass."""
    decode_threads: int = settings_of.speed(4)
    """Threads that decode pictures ahead of the tower."""

    def __post_init__(self) -> None:
        threshold = self.placeholder_threshold
        if threshold is not None and not -1 <= threshold <= 2:
            raise ConfigError(f"encode.placeholder_threshold is {threshold}; a cosine lies in -1 to 1.")
        for name in ("batch_size", "decode_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"encode.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("repeated_links", "similar_links", "redirect_links"):
            if getattr(self, name) < 0 or getattr(self, name) == 1:
                raise ConfigError(f"encode.{name} is {getattr(self, name)}; use 0 (off), or 2 and more.")
        if not 0 <= self.plain_levels <= 255:
            raise ConfigError(f"encode.plain_levels is {self.plain_levels}; use 0 (off) to 255.")
        if self.calibration_pictures < 20:
            raise ConfigError(f"encode.calibration_pictures is {self.calibration_pictures}; it takes 20 at least.")
        if not self.references:
            raise ConfigError(f"encode.references is empty; name some of {', '.join(DESIGNS)}, or picture files.")


@dataclass(frozen=True)
class Looked:
    """A batch as it was decoded: for each of B pictures a problem, a sign, or neither."""

    pixels: Tensor
    """(B, S, S, 3) uint8; a picture with a problem is black."""
    problems: list[ImageError | None]
    signs: list[tuple[str, str] | None]
    """Status and detail that cheap signs give."""


class Encode(Stage):
    """Features and placeholder similarity of finished pictures."""

    name = "encode"
    version = 4
    reads = ("preprocess",)
    parts_at_once = 2
    """One is encoded while another is written."""

    earlier: Path | None = None
    """A finished folder that differs in its threshold alone (`find_earlier`): nothing is encoded again."""

    def __init__(self, config: EncodeConfig, picture: PictureConfig) -> None:
        self.config, self.picture = config, picture
        self.settings = {"encode": config, "picture": picture}
        self.writes = schema.encoded(config.num_image_tokens, config.feature_width, config.feature_storage)
        bytes_per_number = 2 if config.feature_storage == "float16" else 1
        self.bytes_per_row = 60_000 + bytes_per_number * config.num_image_tokens * config.feature_width

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Encode:
        """The stage with a recipe's settings."""
        return cls(recipe.encode, recipe.picture)

    def check(self) -> None:
        """The tower fits the settings, as far as can be known without loading it; and the input is looked through."""
        shape = towers.local_shape(self.config.vision, "encode.vision")
        if shape is not None:
            check = towers.check_patches if self.config.interpolate_positions else towers.check_size
            check(shape, self.picture, "encode.vision")
            towers.check_width(shape, self.config.feature_width, "encode.vision")
        if self.earlier is None:
            _ = self.repeats  # here in the driver, so that no worker does it again

    def find_earlier(self, root: Path, source: Input) -> Path | None:
        """A finished folder in `root` made of the same input with the same settings but for the threshold."""

        def apart_from_threshold(config: EncodeConfig) -> str:
            kept = dataclasses.replace(config, placeholder_threshold=None)
            return settings_of.fingerprint({"encode": kept, "picture": self.picture})

        for path in sorted(root.glob(f"{self.name}-*/manifest.json")):
            try:
                manifest = Manifest.read(path.parent)
                config = settings_of.from_dict(EncodeConfig, manifest.settings["encode"])
                picture = settings_of.from_dict(PictureConfig, manifest.settings["picture"])
            except (StageError, ConfigError, KeyError):
                continue  # of another version
            same_input = manifest.version == self.version and manifest.inputs["fingerprint"] == source.fingerprint
            same_settings = apart_from_threshold(config) == apart_from_threshold(self.config)
            if same_input and same_settings and picture == self.picture:
                return path.parent
        return None

    @cached_property
    def tower(self) -> Tower:
        """Loaded when the first rows come (so are torch and transformers)."""
        from tinyvlm.data.clip import Tower

        return Tower(self.config, self.picture)

    @cached_property
    def repeats(self) -> Repeats:
        """What stands behind many links of the whole input."""
        source, config = self.folders.get("preprocess"), self.config
        if source is None:
            return Repeats()
        return find_repeats(
            address(source),
            repeated_links=config.repeated_links,
            similar_links=config.similar_links,
            redirect_links=config.redirect_links,
        )

    @cached_property
    def calibration(self) -> Calibration:
        """Measured by the first worker that needs it; the others, and a run that continues, read its file.

        Raises:
            StageError: the file was measured with other weights.
        """
        if self.folder is None:
            return self._calibrate()
        path = self.folder / encode_report.CALIBRATION_FILE
        if not storage.is_file(path):
            with suppress(FileExistsError):  # another worker was faster: its file stands
                storage.create(path, json.dumps(dataclasses.asdict(self._calibrate())))
        found = Calibration(**json.loads(storage.read(path)))
        if found.encoder != self.tower.fingerprint:
            raise StageError(
                f"{path} was measured with the encoder {found.encoder}, but encode.vision is {self.config.vision!r}, "
                f"which is now {self.tower.fingerprint}: its weights changed; remove {self.folder} and encode again."
            )
        return found

    @property
    def threshold(self) -> float:
        """The similarity from which a picture counts as a placeholder."""
        given = self.config.placeholder_threshold
        return self.calibration.threshold if given is None else given

    def __getstate__(self) -> dict[str, Any]:
        # What was found in the whole input travels to the workers; the tower is loaded where it works.
        stays = ("tower", "calibration", "_earlier_rows")
        return {name: value for name, value in self.__dict__.items() if name not in stays}

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map pictures to features; one that cannot be decoded any more says so."""
        if not rows.num_rows:
            return self.writes.empty_table()
        with _TOWER_IN_USE:
            return self._rejudged(rows) if self.earlier is not None else self._encode(rows)

    def _encode(self, rows: pa.Table) -> pa.Table:
        size = self.config.batch_size
        batches = [rows.slice(start, size) for start in range(0, rows.num_rows, size)]
        threshold = self.threshold
        parts = [self._table(batch, looked, found, threshold) for batch, looked, found in self._encoded(batches)]
        return pa.concat_tables(parts).combine_chunks()

    def _encoded(self, batches: Sequence[pa.Table]) -> Iterator[tuple[pa.Table, Looked, Encoded]]:
        """Threads decode ahead of the tower, and a GPU works on the next batch while one's results are used."""
        tower, _ = self.tower, self.repeats  # before the threads want them
        ahead = prefetch(self._look, batches, self.config.decode_threads, BATCHES_AHEAD)
        waiting = None
        for batch, looked in zip(batches, ahead, strict=True):
            started = (batch, looked, tower.submit(looked.pixels))
            if waiting is not None:
                yield *waiting[:2], waiting[2].result()
            waiting = started
        if waiting is not None:
            yield *waiting[:2], waiting[2].result()

    def _look(self, rows: pa.Table) -> Looked:
        """Decode, and notice what needs no tower; runs in a thread."""
        from tinyvlm.data.clip import read_pixels

        pixels, problems = read_pixels(rows["image"].to_pylist(), self.picture)
        light = rows.drop_columns(["image", "caption", "meta"]).to_pylist()
        signs = [
            None if problem else self._sign(row, some)
            for row, some, problem in zip(light, pixels, problems, strict=True)
        ]
        return Looked(self.tower.stage(pixels), problems, signs)

    def _sign(self, row: dict[str, Any], pixels: NDArray[np.uint8]) -> tuple[str, str] | None:
        """Status and detail of a picture (S, S, 3) that a cheap sign gives away."""
        config = self.config
        if row["sha256"] in self.repeats.hashes:
            return "placeholder.repeated", f"the same picture stands behind {config.repeated_links} links or more"
        if self.repeats.is_target(row["url"], row["final_url"]):
            return "placeholder.redirect", f"{config.redirect_links} links or more were redirected to its address"
        if self.repeats.is_look(row["phash"], pixels):
            return "placeholder.similar", f"nearly the same picture stands behind {config.similar_links} links or more"
        if config.plain_levels:
            padded = row["fit"] == "pad" and row["original_width"] and row["original_height"]
            shown = without_padding(pixels, row["original_width"], row["original_height"]) if padded else pixels
            if is_plain(shown, config.plain_levels):
                return "placeholder.plain", "nearly one colour"
        return None

    def _table(self, rows: pa.Table, looked: Looked, found: Encoded, threshold: float) -> pa.Table:
        given = [
            (problem.status, problem.detail) if problem else sign or (schema.OK, None)
            for problem, sign in zip(looked.problems, looked.signs, strict=True)
        ]
        is_missing = np.array([problem is not None for problem in looked.problems])
        references = [
            None if problem else self.config.references[n]
            for problem, n in zip(looked.problems, found.nearest, strict=True)
        ]
        statuses, details = judge(
            [status for status, _ in given], [detail for _, detail in given], found.similarity, references, threshold
        )
        columns = {
            **{name: rows[name] for name in ("key", "url", "caption", "meta", "image", "sha256", "phash")},
            "status": statuses,
            "detail": details,
            "similarity": pa.array(found.similarity, mask=is_missing),
            "reference": pa.array(references, pa.string()),
            "encoder": pa.array([self.tower.fingerprint] * rows.num_rows, pa.string()),
            "features": self._feature_column(found.features, is_missing),
        }
        if found.scale is not None:
            flat = pa.array(found.scale.reshape(-1))
            columns["feature_scale"] = pa.FixedSizeListArray.from_arrays(
                flat, self.config.num_image_tokens, mask=pa.array(is_missing)
            )
            columns["feature_error"] = pa.array(found.error, mask=is_missing)
            columns["feature_cosine"] = pa.array(found.cosine, mask=is_missing)
        return pa.table([columns[name] for name in self.writes.names], schema=self.writes)

    def _feature_column(self, features: NDArray[Any], is_missing: NDArray[np.bool_]) -> pa.Array:
        kind = self.writes.field("features").type
        size = self.config.num_image_tokens * self.config.feature_width
        flat = pa.array(features.reshape(-1))
        return pa.ExtensionArray.from_storage(
            kind, pa.FixedSizeListArray.from_arrays(flat, size, mask=pa.array(is_missing))
        )

    def _rejudged(self, rows: pa.Table) -> pa.Table:
        """The earlier folder's rows with this run's threshold."""
        found = self._earlier_rows.like(rows["key"].to_pylist())
        statuses, details = judge(
            found["status"].to_pylist(),
            found["detail"].to_pylist(),
            found["similarity"].to_numpy(),
            found["reference"].to_pylist(),
            self.threshold,
        )
        columns = {name: found[name] for name in self.writes.names} | {"status": statuses, "detail": details}
        return pa.table([columns[name] for name in self.writes.names], schema=self.writes)

    @cached_property
    def _earlier_rows(self) -> EarlierRows:
        assert self.earlier is not None
        return EarlierRows(self.earlier)

    def _calibrate(self) -> Calibration:
        source, count = self.folders.get("preprocess"), self.config.calibration_pictures
        rows = calibrate.sample_pictures(address(source), count) if source else []
        sample = []
        for row in rows:
            try:
                image = decode(row["image"] or b"", LimitConfig())
            except ImageError:
                continue
            if self._sign(row, self.tower.pixels(image)) is None:
                sample.append(image)
        found = calibrate.calibrate(self.tower.similarity, self.tower.fingerprint, count, sample, self.picture)
        _log.info(
            "encode: a picture counts as a placeholder from a similarity of %g (precision %.3f, recall %.3f)",
            found.threshold,
            found.precision,
            found.recall,
        )
        return found

    def statistics(self, folder: Path) -> dict[str, Any]:
        """How similarities are spread, how many placeholders there are, and the pictures around the threshold."""
        calibration = encode_report.read_calibration([folder, *([self.earlier] if self.earlier else [])])
        given = self.config.placeholder_threshold
        if given is None and calibration is None:
            calibration = self.calibration
        threshold = calibration.threshold if given is None and calibration is not None else given
        assert threshold is not None
        return encode_report.statistics(
            folder,
            threshold,
            calibration,
            is_measured=given is None,
            is_packed=self.config.feature_storage != "float16",
        )
