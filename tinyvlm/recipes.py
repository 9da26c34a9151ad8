"""Whole runs as functions.  A recipe says what is done; where and how fast is the business of the cluster.

| recipe     | for                                                                                            |
|------------|------------------------------------------------------------------------------------------------|
| `tiny()`   | a laptop: the packaged small towers, easy-VQA's pictures, minutes                              |
| `base()`   | the published table: CLIP ViT-L/14-336, Llama-3.2-1B-Instruct, 64 image tokens                 |
| `cached()` | the published text's other variant: the tower frozen throughout, its features read from `encode` |
| `tuned()`  | `base()` with the settings we believe in: connector warm-up, a rate per module, packing        |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from tinyvlm import config
from tinyvlm.architecture import ModelConfig
from tinyvlm.data.download import DownloadConfig
from tinyvlm.data.encode import EncodeConfig
from tinyvlm.data.explore import ExploreConfig
from tinyvlm.data.fetch import FetchConfig
from tinyvlm.data.links import LinksConfig
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.data.pictures import PicturesConfig
from tinyvlm.data.prepare import PrepareConfig
from tinyvlm.errors import ConfigError
from tinyvlm.eval.answers import EvaluateConfig
from tinyvlm.images import LimitConfig, PictureConfig
from tinyvlm.serve.settings import ServeConfig
from tinyvlm.train.settings import Rates, TrainConfig
from tinyvlm.train.shown import ShowConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of every stage of one run."""

    name: str
    picture: PictureConfig = field(default_factory=PictureConfig)
    """The finished picture, the same in every stage and in serving."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """What a downloaded picture may be."""
    links: LinksConfig = field(default_factory=LinksConfig)
    pictures: PicturesConfig = field(default_factory=PicturesConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    explore: ExploreConfig = field(default_factory=ExploreConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    pretrain: TrainConfig = field(default_factory=TrainConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    instruct: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)

    def __post_init__(self) -> None:
        if self.encode.num_image_tokens != self.model.num_image_tokens:
            raise ConfigError(
                f"encode.num_image_tokens is {self.encode.num_image_tokens} but model.num_image_tokens is "
                f"{self.model.num_image_tokens}; features of one size cannot feed a model of another."
            )


def base() -> Recipe:
    """The published system: 3.75 M captions with the language model frozen, then 1.02 M samples with everything hot.

    Steps follow from samples.  The third stage was never published; its settings are ours.
    """
    return Recipe(
        name="base",
        pretrain=TrainConfig(mixture=MixtureConfig(weights={"captions": 1.0}, samples=3_750_000), packs_per_step=128),
        sft=TrainConfig(
            mixture=MixtureConfig(weights={"m3it": 1.0}, samples=1_020_000),
            rates=Rates(vision=1e-5, connector=1e-5, language=1e-5),
            packs_per_step=64,
            packs_per_batch=4,
            optimizer="adamw8bit",
        ),
        instruct=TrainConfig(
            mixture=MixtureConfig(weights={"llava": 1.0, "llavar": 1.0, "alpaca": 1.0}),
            rates=Rates(vision=0.0, connector=1e-5, language=1e-5),
            packs_per_step=64,
            packs_per_batch=4,
        ),
    )


def cached() -> Recipe:
    """`base()` with the tower frozen in every stage, which read the features that `encode` has stored.

    A stage's loss is that of live pictures within `train.stored.LOSS_TOLERANCE`.
    """
    recipe = base()

    def stored(stage: TrainConfig, rates: Rates) -> TrainConfig:
        return replace(stage, rates=replace(rates, vision=0.0), features="stored")

    return replace(
        recipe,
        name="cached",
        pretrain=stored(recipe.pretrain, replace(recipe.pretrain.rates, language=2e-5)),
        sft=stored(recipe.sft, recipe.sft.rates),
        instruct=stored(recipe.instruct, recipe.instruct.rates),
    )


def tuned() -> Recipe:
    """`base()` with a connector warm-up at 1e-3, a rate for each module, the new tokens learned early, and packing."""
    recipe = base()

    def packed(stage: TrainConfig, rates: Rates, packs_per_step: int) -> TrainConfig:
        return replace(
            stage, rates=rates, packs_per_step=packs_per_step, samples_per_pack=0, pack_length=2048, packs_per_batch=2
        )

    warm_up = Rates(vision=0.0, connector=1e-3, language=0.0, new_tokens=1e-3)
    return replace(
        recipe,
        name="tuned",
        pretrain=packed(recipe.pretrain, warm_up, 32),
        sft=packed(recipe.sft, Rates(vision=2e-6, connector=2e-5, language=2e-5), 16),
        instruct=packed(recipe.instruct, Rates(vision=0.0, connector=1e-5, language=1e-5), 16),
    )


def tiny() -> Recipe:
    """The laptop's run over the links of `tinyvlm.toy.links`; every weight it starts from is packaged."""
    picture = PictureConfig(size=64, tower_size=64)
    small = TrainConfig(
        precision="fp32",
        samples_per_pack=0,
        pack_length=256,
        packs_per_batch=8,
        warmup_steps=20,
        betas=(0.9, 0.98),
        checkpoint_every_steps=100,
        eval_every_steps=0,
        max_validation=256,
        show=ShowConfig(bleu_every_steps=100, bleu_captions=128),
    )
    return Recipe(
        name="tiny",
        picture=picture,
        limits=LimitConfig(max_bytes=1_000_000),
        links=LinksConfig(
            caption_column="caption",
            key_column="key",
            meta_columns=("split", "image_id", "kind"),
            rows_per_part=2000,
        ),
        download=DownloadConfig(
            store="original",
            fetch=FetchConfig(
                # The demo's server is this machine, and answers at once or never.
                allow_hosts=("127.0.0.1", "localhost"),
                connect_timeout_s=2.0,
                read_timeout_s=1.5,
                total_timeout_s=2.0,
                backoff_s=0.1,
                concurrency=64,
                concurrency_per_host=64,
                rate_per_host=0,
            ),
        ),
        explore=ExploreConfig(model="toy:clip", labels="toy", template="{description}", dtype="float32"),
        encode=EncodeConfig(
            vision="toy:clip",
            num_image_tokens=16,
            feature_width=128,
            dtype="float32",
            # To this small tower icons without words look like plain shapes: references with words, and few links
            # (benchmarks/placeholder.md).
            references=("no_image", "error_number", "removed", "question_mark", "coming_soon"),
            repeated_links=3,
            similar_links=12,
        ),
        prepare=PrepareConfig(source="easy_vqa", validation_share=0.05),
        model=ModelConfig(
            vision="toy:clip", language="toy:llm", tokenizer="toy:tokenizer", num_image_tokens=16, connector_width=512
        ),
        # The language model can look words up in a description; a frozen one teaches the connector too slowly, and one
        # that meets the skewed yes/no questions before it reads pictures forgets how to compare.  So all but the tower
        # is hot from the start, and single questions come first.
        pretrain=replace(
            small,
            mixture=MixtureConfig(weights={"caption": 0.25, "vqa": 1.0}),
            rates=Rates(vision=0.0, connector=1e-3, language=5e-4),
            steps=80,
            packs_per_step=8,
        ),
        sft=replace(
            small,
            mixture=MixtureConfig(weights={"caption": 0.25, "vqa": 0.5, "multi_turn": 1.0}),
            rates=Rates(vision=0.0, connector=1e-3, language=1e-3),
            steps=250,
            packs_per_step=12,
        ),
        instruct=replace(
            small,
            mixture=MixtureConfig(weights={"caption": 0.25, "vqa": 0.25, "multi_turn": 0.5, "text": 1.0}),
            rates=Rates(vision=0.0, connector=3e-4, language=3e-4),
            steps=60,
            packs_per_step=12,
        ),
        evaluate=EvaluateConfig(),
        serve=ServeConfig(model_name="tinyvlm-tiny"),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny, "base": base, "cached": cached, "tuned": tuned}


def load(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name, or from a JSON file as `tinyvlm recipe` prints it, with `a.b=value` overrides applied.

    Raises:
        ConfigError: no such recipe or file, or a setting that is unknown, of the wrong type or refused.
    """
    if name_or_path in RECIPES:
        recipe = RECIPES[name_or_path]()
    elif name_or_path.endswith(".json"):
        recipe = _read(Path(name_or_path))
    else:
        raise ConfigError(
            f"There is no recipe {name_or_path!r}; choose one of {', '.join(RECIPES)}, or give a .json file."
        )
    return config.override(recipe, overrides)


def _read(path: Path) -> Recipe:
    try:
        return config.from_dict(Recipe, json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError(f"There is no recipe file {path}; make one with `tinyvlm recipe tiny > {path}`.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"The recipe file {path} is no JSON: {error}.") from None
