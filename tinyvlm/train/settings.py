"""Settings of one training stage.  The defaults are the published numbers of the first stage (captions, frozen LLM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyvlm.config import speed
from tinyvlm.data.mixture import MixtureConfig
from tinyvlm.errors import ConfigError
from tinyvlm.train.shown import ShowConfig


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rate of each module; 0 freezes the module, and its weights come out bit-identical."""

    vision: float = 2e-5
    connector: float = 2e-5
    language: float = 0.0
    new_tokens: float = 0.0
    """Embedding rows of the three image tokens while `language` is frozen; a hot language model has them hot anyway."""

    def __post_init__(self) -> None:
        rates = (self.vision, self.connector, self.language, self.new_tokens)
        if min(rates) < 0:
            raise ConfigError(f"Learning rates must be 0 (frozen) or positive, but are {rates}.")
        if not any(rates):
            raise ConfigError("All learning rates are 0, so nothing would learn; set at least rates.connector.")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of the language model (adapters.py); its own weights are frozen then."""

    rank: int = 0
    """0: no adapters."""
    alpha: float = 16.0
    """Adapters count alpha ÷ rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get one."""

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0 or (self.rank and not self.targets):
            raise ConfigError(f"lora wants a rank of 0 or more, an alpha above 0 and some targets, not {self}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is learned from, in which order, by which rule."""

    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    init: str = ""
    """Model folder to start from; "" means the model of the stage before, or for the first stage a newly built one."""
    rates: Rates = field(default_factory=Rates)
    features: Literal["live", "stored"] = "live"
    """live: pictures themselves; stored: what the stage `encode` made of them, for a frozen tower (stored.py)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 150
    epochs: int = 1
    steps: int = 0
    """Stop after this many steps; 0 means when the epochs are over.  More steps than the epochs give is refused."""
    packs_per_step: int = 128
    pack_length: int = 512
    """Tokens in one pack, image tokens included; longer conversations are left out and counted as too_long."""
    samples_per_pack: int = 1
    """1 is the published padded batch; 0 means as many as fit."""
    pictures_per_pack: int = 0
    """Most pictures in one pack; 0 means half as many again as a pack of average samples has."""
    lanes: int = 16
    """Stretches of the data that a step draws from; each worker reads its own, so at least as many as workers."""
    window_groups: int = 2
    """Row groups of a lane that samples are shuffled across; a worker holds its lanes', and at most as many more."""
    steps_of_one_length: int = 32
    """With one sample a pack: so many steps' samples are sorted by length, and each step gets similar ones; 1: none."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest norm of the gradient; 0 means no limit."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 is mixed precision: weights, gradients and optimizer state stay fp32."""
    on_bad_loss: Literal["stop", "skip"] = "stop"
    """Of a step whose loss or gradient is no finite number: end the run, or leave the weights as they are and go on."""
    on_bad_picture: Literal["stop", "skip"] = "stop"
    """Of a picture that cannot be decoded any more: end the run, or leave its conversation out of its pack."""
    ema_decay: float = 0.0
    """Above 0: held-out losses and the saved model are those of a moving average of the weights that keeps so much of
    itself in each step; 0: of the weights themselves."""
    seed: int = 42
    max_validation: int = 2048
    """Conversations of the validation split that the held-out loss is measured on."""

    checkpoint_every_steps: int = speed(500)
    """0 means never: an interrupted run starts again."""
    keep_checkpoints: int = speed(2)
    """So many of the newest."""
    keep_best_checkpoints: int = speed(0)
    """And so many of those with the smallest held-out loss, where it was measured at the same step."""
    checkpoints_in_background: bool = speed(True)
    """Written while training goes on, from a copy in main memory; false saves that memory, and waits."""
    checkpoints_at: str = speed("")
    """A folder or the address of an object store, in which they lie under the run's name; "" means in its folder."""
    ledger: bool = speed(False)
    """Note a digest of all that enters the model, before each step, in `ledger/`: the proof of an exact resume."""
    eval_every_steps: int = speed(500)
    """Held-out loss every so many steps; it is always measured at the end.  0 means only then."""
    packs_per_batch: int = speed(8)
    """Most packs that go through the model at once on one worker."""
    tokens_per_batch: int = speed(0)
    """Most tokens, padding included, that go through the model at once; 0 means no limit."""
    cache_mib: int = speed(256)
    """Memory of each worker for encoded samples."""
    parallel: Literal["ddp", "fsdp"] = speed("ddp")
    """ddp: every worker holds all weights; fsdp: weights, gradients and optimizer state are sharded (sharding.py)."""
    attention: Literal["auto", "packed", "masked"] = speed("auto")
    """packed: no mask and no padding (attention.py); masked: what transformers does; auto: packed where it runs."""
    compile: Literal["auto", "on", "off"] = speed("auto")
    """torch.compile for each layer; auto: on a GPU.  The last bits of results may change."""
    gradient_checkpointing: bool = speed(False)
    """Compute layers again in the backward pass, which takes a third more time and much less memory."""
    feature_cache_mib: int = speed(0)
    """Memory of each worker for what a frozen vision tower made of pictures; they come again if epochs are many."""
    show: ShowConfig = speed(ShowConfig())  # noqa: RUF009 (frozen)
    """What the run shows of itself, and where."""
    stored_features_mib: int = speed(1024)
    """Memory of each worker for row groups of stored features."""

    def __post_init__(self) -> None:
        at_least_one = (
            "epochs",
            "packs_per_step",
            "pack_length",
            "lanes",
            "window_groups",
            "steps_of_one_length",
            "keep_checkpoints",
            "packs_per_batch",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        not_negative = (
            *(
                "warmup_steps",
                "steps",
                "samples_per_pack",
                "pictures_per_pack",
                "weight_decay",
                "clip",
                "max_validation",
                "cache_mib",
            ),
            *(
                "tokens_per_batch",
                "feature_cache_mib",
                "stored_features_mib",
                "checkpoint_every_steps",
                "eval_every_steps",
                "keep_best_checkpoints",
            ),
        )
        for name in not_negative:
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, but is {getattr(self, name)}.")
        if self.parallel == "fsdp" and self.optimizer == "adamw8bit":
            raise ConfigError(
                "optimizer='adamw8bit' cannot work on the shards of parallel='fsdp' (bitsandbytes refuses DTensors); "
                "set parallel='ddp', or optimizer='adamw', whose state fsdp shards."
            )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be at least 0 (off) and below 1, but is {self.ema_decay}.")
        if self.lora.rank and not self.rates.language:
            raise ConfigError("lora.rank is set while rates.language is 0, so the adapters would not learn; set one.")
        if self.features == "stored" and self.rates.vision:
            raise ConfigError(
                "features='stored' wants a frozen tower: a hot one makes other features after every step. "
                "Set rates.vision=0, or features='live'."
            )
