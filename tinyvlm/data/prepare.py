"""The stage `prepare`: a dataset becomes conversations, one row each.

    finished pictures of the line ─┐                                    ┌▶ pictures finished (given_images.py)
    records of a dataset's files  ─┴ source (data/sources) ─▶ dialogues ┴▶ checked (conversations.py), told from the
                                                                           evaluation's (contamination.py) ─▶ rows

Each source has a folder of its own; training mixes them.  Nothing is thrown away in silence: what cannot be trained on
leaves a row with its reason.  Rows of a part lie by split, family and source, so that training reads few row groups
that it does not want, and a picture that many rows show is stored once for a row group.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from tinyvlm import images, schema
from tinyvlm.architecture import ModelConfig
from tinyvlm.chat import Message, Picture
from tinyvlm.config import speed
from tinyvlm.data import sources
from tinyvlm.data.contamination import Evaluated
from tinyvlm.data.conversations import check, to_columns
from tinyvlm.data.decoding import MAX_DETAIL, Decoded
from tinyvlm.data.given_images import GivenImages
from tinyvlm.data.picture_groups import TRAINED_ON
from tinyvlm.data.pictures.bodies import read_bodies
from tinyvlm.data.pictures.found import PicturesConfig
from tinyvlm.data.record_files import parse, read_records
from tinyvlm.data.rewriting import RewriteConfig
from tinyvlm.data.sources import Dialogue, FileSource, GivenImage, PictureSource, SourceRow, StoredImage, storable
from tinyvlm.data.sources.catalogue import SourceName, open_source
from tinyvlm.errors import CheckpointError, ConfigError, DataError, InputError
from tinyvlm.folders import SHARED_PICTURES, WRITING
from tinyvlm.stage import Stage
from tinyvlm.storage import address

if TYPE_CHECKING:
    from tinyvlm.model.processing import TinyVLMProcessor
    from tinyvlm.recipes import Recipe

KEYS_PER_ROW = 1000
"""How many conversations one input row may have; a conversation's key tells its row's."""
_DIALOGUES_AT_ONCE = 64
"""Conversations whose pictures are in memory together, as they came."""

AnswerForm = Literal["sentence", "short", "rewritten"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What is read, what is said about each picture, and what is held out."""

    source: SourceName = "captions"
    """`captions`: the link list's own words; `easy_vqa`: the questions of that package; `messages`, `sharegpt`:
    conversations of your own; `csv`: what `tinyvlm data export` wrote, or the published table; `folder`: pictures with
    captions beside them; `auto`: what the input looks like; others: the files of that dataset (docs/datasets.md)."""
    name: str = ""
    """What the rows and the mixtures call this source; "" means as `source`."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a picture's name in the records → the folder that has such pictures; "" stands for all others."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field that the source wants → what the files call it."""
    subsets: tuple[str, ...] = ()
    """Names of the parts of a source that are read ("coco", "vqa-v2"); none: its usual ones."""
    known: tuple[str, ...] = ()
    """Files of the same kind whose records count as duplicates: conversations that another source has already."""
    evaluation: tuple[str, ...] = ()
    """Places with pictures of evaluation sets (folders, tars, Parquet, datasets on the hub): no training on those."""
    limit: int | None = None
    """How many records are used at most, from the start; None: all."""
    rows_per_part: int = 2_000
    """Records that are worked on together, written together, and lost together in a crash."""
    max_tokens: int = 0
    """Longer conversations are set aside as `too_long`; 0: none are.  No answer is ever cut."""
    count_tokens: bool = True
    """Count each conversation's tokens with the recipe's tokenizer; False where that cannot be had."""
    captions_per_picture: int = 1
    singles_per_picture: int = 4
    """Training conversations of a single question; test pictures always get all of theirs."""
    turns_per_conversation: int = 5
    """Most questions in one multi-turn conversation; 0: no multi-turn conversations."""
    answer_form: AnswerForm = "sentence"
    """vqa_v2: `sentence`: answers made into sentences by rules; `short`: as the set has them; `rewritten`: sentences by
    the endpoint of `rewrite` for what is trained on, and by rules where it has none."""
    questions_per_conversation: int = 1
    """vqa_v2: of neighbouring questions about the same picture so many become one conversation in training."""
    train_on: tuple[str, ...] = ("train",)
    """vqa_v2: how the names of those parts begin that are trained on; other parts become test rows."""
    rewrite: RewriteConfig = field(default_factory=RewriteConfig)
    text_only_share: float = 0.1
    """Share of pictures about which one question is also asked in words alone, 0 … 1."""
    validation_share: float = 0.001
    """Share of training conversations held out, 0 … 1, by a hash of their pictures (or words, without any)."""
    seed: int = 0
    decode_processes: int = speed(1)
    """Decoder processes of each worker; as `download.decode_processes`."""
    decode_timeout_s: float = speed(20.0)

    def __post_init__(self) -> None:
        for name in ("captions_per_picture", "singles_per_picture", "turns_per_conversation"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}; it must lie between 0 and 100.")
        for name in ("text_only_share", "validation_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"prepare.{name} is {getattr(self, name)}; a share lies between 0 and 1.")
        if self.rows_per_part < 1 or self.max_tokens < 0 or (self.limit is not None and self.limit < 1):
            raise ConfigError(
                f"prepare.limit and prepare.rows_per_part want at least 1 and prepare.max_tokens at least 0, got "
                f"{self.limit}, {self.rows_per_part} and {self.max_tokens}."
            )
        asked = self.questions_per_conversation
        if not 1 <= asked <= 100:
            raise ConfigError(f"prepare.questions_per_conversation is {asked}; it must lie between 1 and 100.")
        if self.answer_form == "rewritten" and not self.rewrite.url:
            raise ConfigError("prepare.answer_form=rewritten wants an endpoint; give it as prepare.rewrite.url.")
        if self.max_tokens and not self.count_tokens:
            raise ConfigError("prepare.max_tokens wants tokens counted; set prepare.count_tokens=true.")
        if not self.called.replace("_", "").replace("-", "").isalnum():
            raise ConfigError(f"prepare.name is {self.name!r}; use letters, digits, - and _.")

    @property
    def called(self) -> str:
        """The source's name in rows, mixtures and pointers."""
        return self.name or self.source

    @property
    def listed(self) -> dict[str, Any]:
        """The settings that decide what the `records` folder holds."""
        names = ["source", "columns", "subsets", "known", "limit", "rows_per_part"]
        if self.source == "vqa_v2":
            names += ["questions_per_conversation", "train_on", "answer_form", "rewrite"]
        return {name: getattr(self, name) for name in names}


class Prepare(Stage):
    """Turns records and pictures into conversations.  `source` stands in for the configured reader in tests."""

    name = "prepare"
    version = 3
    fan_out = True
    bytes_per_row = 60_000
    writes = schema.CONVERSATIONS
    writing = SHARED_PICTURES

    def __init__(
        self,
        config: PrepareConfig,
        source: PictureSource | FileSource | None = None,
        *,
        picture: images.PictureConfig | None = None,
        limits: images.LimitConfig | None = None,
        model: ModelConfig | None = None,
        pictures: PicturesConfig | None = None,
    ) -> None:
        """`model`: whose tokens are counted; None: nobody's.  `pictures`: how a source's pictures and captions lie."""
        self.config = config
        pictures = pictures or PicturesConfig()
        self.pictures = pictures if config.limit is None else replace(pictures, limit=config.limit)
        self.source = source or open_source(config)
        self.picture, self.limits = picture or images.PictureConfig(), limits or images.LimitConfig()
        self.model = model if config.count_tokens else None
        self.pointer = f"{self.name}.{config.called}"
        self.reads = (self.source.reads,)
        counted = (self.model.tokenizer or self.model.language, self.model.num_image_tokens) if self.model else None
        self.settings = {"prepare": config, "tokens": counted}
        if self.source.reads != "encode":
            self.settings |= {"picture": self.picture.stored, "limits": self.limits, "resizer": images.resizer()}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Prepare:
        """The stage with a recipe's settings."""
        return cls(
            recipe.prepare, picture=recipe.picture, limits=recipe.limits, model=recipe.model, pictures=recipe.pictures
        )

    def reading(self, stage_name: str) -> Prepare:
        """The same stage over the pictures of another one: `preprocess`."""
        other = copy.copy(self)
        other.reads = (stage_name,)
        return other

    def check(self) -> None:
        """The source can be read, and so can the tokenizer."""
        if not isinstance(self.source, FileSource):
            self.source.num_questions()
        try:
            _ = self._processor
        except CheckpointError as error:
            raise CheckpointError(f"{error}  Or leave tokens uncounted: --set prepare.count_tokens=false.") from None

    def select(self, rows: pa.Table) -> pa.Table:
        """Of the line's pictures the usable ones; of a listing all, so that bad ones are seen in the outcome too."""
        return rows if "file" in rows.column_names else super().select(rows)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Map input rows to conversations."""
        images.quiet_pillow()
        if "record" in rows.column_names:
            given = self._of_records(rows)
        else:
            given = self._of_listing(rows) if "file" in rows.column_names else self._of_pictures(rows)
        made = [self._row(key, number, one, shown) for key, number, one, shown in given]
        made.sort(key=_order)
        return pa.Table.from_pylist(made, schema=self.writes)

    def row_groups(self, rows: pa.Table) -> list[int]:
        """Splits apart, and so are rows that were set aside: a few held-out rows cost no whole row group to read."""
        sides = zip(pc.equal(rows["status"], schema.OK).to_pylist(), rows["split"].to_pylist(), strict=True)
        runs = [len(list(run)) for _, run in itertools.groupby(sides)]
        most = int(WRITING["row_group_size"])
        return [min(most, run - start) for run in runs for start in range(0, run, most)]

    def statistics(self, folder: Path) -> dict[str, Any]:
        """Conversations by source, family and split, their lengths, what was set aside, and examples."""
        from tinyvlm.data.prepare_report import prepare_statistics

        in_source = {} if isinstance(self.source, FileSource) else self.source.num_questions()
        return prepare_statistics(folder, in_source, is_decontaminated=bool(self.config.evaluation))

    def close(self) -> None:
        """End the decoder processes."""
        running: GivenImages | None = self.__dict__.pop("_images", None)
        if running is not None:
            running.close()

    def __getstate__(self) -> dict[str, Any]:
        made = ("_images", "_processor", "_evaluated")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    @cached_property
    def _images(self) -> GivenImages:
        config = self.config
        return GivenImages(config.images, self.picture, self.limits, config.decode_processes, config.decode_timeout_s)

    @cached_property
    def _processor(self) -> TinyVLMProcessor | None:
        if self.model is None:
            return None
        from tinyvlm.model.build import build_processor

        return build_processor(self.model, self.picture)

    @cached_property
    def _evaluated(self) -> Evaluated:
        place = self.folders.get("evaluation")
        return Evaluated.read(address(place)) if place else Evaluated()

    def _of_pictures(self, rows: pa.Table) -> Iterator[tuple[int, int, Dialogue, list[Decoded]]]:
        """(input key, number, dialogue, its pictures) from rows of finished pictures."""
        assert not isinstance(self.source, FileSource)
        wanted = [name for name in ("key", "caption", "meta", "image", "sha256", "phash") if name in rows.column_names]
        for row in rows.select(wanted).to_pylist():
            said = self.source.dialogues(SourceRow(row["key"], row["caption"], parse(row["meta"] or "{}")))
            sha256 = row.get("sha256") or hashlib.sha256(row["image"]).hexdigest()
            picture = Decoded(status=schema.OK, image=row["image"], sha256=sha256, phash=row.get("phash"))
            for number, one in enumerate(_some(said)):
                shows = any(isinstance(part, Picture) for message in one.messages for part in message.parts)
                yield row["key"], number, check(one, int(shows)), [picture] if shows else []

    def _of_listing(self, rows: pa.Table) -> Iterator[tuple[int, int, Dialogue, list[Decoded]]]:
        """The same from pictures that lie elsewhere, a few in memory at a time."""
        assert not isinstance(self.source, FileSource)
        listed = rows.select(["key", "caption", "meta"]).to_pylist()
        pairs = zip(listed, read_bodies(rows, self.limits.max_bytes), strict=True)
        while chunk := list(itertools.islice(pairs, _DIALOGUES_AT_ONCE)):
            told = []
            for row, body in chunk:
                if body.data is None:
                    said = [Dialogue("caption", "train", (), status=body.status, detail=body.detail)]
                else:
                    said = _some(
                        self.source.dialogues(SourceRow(row["key"], row["caption"], parse(row["meta"] or "{}")))
                    )
                    said = [check(replace(one, images=(body.data,)), 1) for one in said]
                told += [(row["key"], number, one) for number, one in enumerate(said)]
            yield from self._with_pictures(told)

    def _of_records(self, rows: pa.Table) -> Iterator[tuple[int, int, Dialogue, list[Decoded]]]:
        """The same from records."""
        assert isinstance(self.source, FileSource)
        told: list[tuple[int, int, Dialogue]] = []
        listed = rows.select(["key", "status", "detail", "meta", "group"]).to_pylist()
        for row, record in zip(listed, read_records(rows, self.config.columns), strict=True):
            said = [_grouped(one, row["group"]) for one in _some(self._said(row, record))]
            told += [(row["key"], number, check(one, len(one.images))) for number, one in enumerate(said)]
        yield from self._with_pictures(told)

    def _with_pictures(
        self, told: Sequence[tuple[int, int, Dialogue]]
    ) -> Iterator[tuple[int, int, Dialogue, list[Decoded]]]:
        """With each dialogue's pictures; as many dialogues at a time as pictures' files may well be in memory."""
        finished: dict[GivenImage, Decoded] = {}
        for start in range(0, len(told), _DIALOGUES_AT_ONCE):
            chunk = told[start : start + _DIALOGUES_AT_ONCE]
            usable = {image: None for _, _, one in chunk if one.status == schema.OK for image in one.images}
            before = {image: finished[image] for image in usable if image in finished}  # equal pictures are neighbours
            finished = before | self._images.finish(image for image in usable if image not in before)
            for key, number, one in chunk:
                shown = [finished[image] for image in one.images] if one.status == schema.OK else _told(one)
                bad = next((image for image in shown if image.status != schema.OK), None)
                if bad is not None and one.status == schema.OK:
                    one = replace(one, status=bad.status, detail=bad.detail)
                yield key, number, one, shown

    def _said(self, row: Mapping[str, Any], record: Mapping[str, Any]) -> Sequence[Dialogue]:
        assert isinstance(self.source, FileSource)
        about = parse(row["meta"] or "{}")
        if row["status"] != schema.OK:
            family, split = about.get("family", "instruction"), about.get("split", "train")
            subset = about.get("subset", "")
            return [Dialogue(family, split, (), status=row["status"], detail=row["detail"], subset=subset)]
        try:
            return self.source.dialogues(record, about)
        except Exception as error:  # a reader that stumbles over somebody's record costs a row, not the run
            detail = f"{type(error).__name__}: {error}"[:200]
            return [Dialogue("instruction", "train", (), status="internal_error", detail=detail)]

    def _row(self, key: int, number: int, one: Dialogue, shown: list[Decoded]) -> dict[str, Any]:
        if not 0 <= key < 2**63 // KEYS_PER_ROW - 1:
            raise DataError(f"Row {key}: keys must lie between 0 and {2**63 // KEYS_PER_ROW - 1} to be talked about.")
        if one.status == schema.OK and one.split != "test":
            found = self._evaluated.find(shown)
            one = replace(one, status=found[0], detail=found[1]) if found else one
        num_tokens = None
        if one.status == schema.OK:
            one, num_tokens = self._measured(one)
        is_usable = one.status == schema.OK
        return {
            "key": key * KEYS_PER_ROW + number,
            "status": one.status,
            "detail": None if one.detail is None else storable(one.detail[:MAX_DETAIL]),
            "source_key": key,
            "source": f"{self.config.called}/{one.subset}" if one.subset else self.config.called,
            "family": one.family,
            "split": self._split(one, shown) if is_usable else one.split,
            "messages": to_columns(one.messages),
            "images": [
                {"bytes": image.image if is_usable else None, "sha256": image.sha256, "phash": image.phash}
                for image in shown
            ],
            "tokens": num_tokens,
            "meta": storable(json.dumps(one.meta, ensure_ascii=False, separators=(",", ":"), default=str)),
        }

    def _measured(self, one: Dialogue) -> tuple[Dialogue, int | None]:
        if self._processor is None:
            return one, None
        try:
            ids, _ = self._processor.tokens(one.messages, _num_pictures(one.messages))
        except InputError as error:
            return replace(one, status="bad_text", detail=str(error)), None
        if self.config.max_tokens and len(ids) > self.config.max_tokens:
            detail = f"{len(ids)} tokens, {self.config.max_tokens} allowed"
            return replace(one, status="too_long", detail=detail), len(ids)
        return one, len(ids)

    def _split(self, one: Dialogue, shown: Sequence[Decoded]) -> schema.Split:
        """Training conversations that are held out: by what they are about, so that no picture is on both sides."""
        if one.split != "train" or one.keeps_split:
            return one.split
        pictures = "".join(sorted(image.sha256 or "" for image in shown))
        by = one.held_out_by or pictures or "\n".join(message.text for message in one.messages)
        return "validation" if sources.share("held out", by) < self.config.validation_share else "train"


def _some(dialogues: Iterable[Dialogue]) -> list[Dialogue]:
    told = list(dialogues)[:KEYS_PER_ROW]
    return told or [Dialogue("caption", "train", (), status="bad_text", detail="the settings ask for no words")]


def _grouped(one: Dialogue, group: int | None) -> Dialogue:
    """Held out, or not, together with the conversations that share its pictures."""
    if group is None or one.split != "train":
        return one
    return replace(one, keeps_split=True) if group == TRAINED_ON else replace(one, held_out_by=f"group {group}")


def _told(one: Dialogue) -> list[Decoded]:
    """What is known, without looking, of the pictures of a conversation that cannot be used."""
    stored = [image for image in one.images if isinstance(image, StoredImage)]
    return [Decoded(status=one.status, sha256=image.sha256, phash=image.phash) for image in stored]


def _order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    picture = row["images"][0]["sha256"] or "" if row["images"] else ""
    return (
        row["status"] != schema.OK,
        schema.SPLITS.index(row["split"]),
        schema.FAMILIES.index(row["family"]),
        row["source"],
        picture,
        row["key"],
    )


def _num_pictures(messages: Sequence[Message]) -> int:
    return sum(isinstance(part, Picture) for message in messages for part in message.parts)
