"""Settings of what a training run shows of itself; none of them changes the weights."""

from __future__ import annotations

from dataclasses import dataclass

from tinyvlm.errors import ConfigError

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Trackers, evaluation beside the training, and what power and time cost."""

    trackers: tuple[str, ...] = TRACKERS
    """Where numbers go besides metrics.jsonl; none switches them off.  One that is not installed is left out."""
    project: str = "tinyvlm"
    """Name of the project in wandb."""
    sources_every_steps: int = 10
    """The loss of each source is told every so many steps, over the steps since it was told last; 0 means never."""
    bleu_every_steps: int = 500
    """BLEU of the newest checkpoint, whenever it is at least so many steps past the last one measured.  0 means only of
    the finished model."""
    bleu_captions: int = 256
    """Held-out captions that BLEU is measured on; 0 means that it is not measured."""
    max_new_tokens: int = 64
    """Tokens after which an answer is cut."""
    sample_pictures: int = 12
    """Held-out pictures in the report, each with the truth and the finished model's answer."""
    watts: float = 0.0
    """Power of one worker's share of a machine, for the energy; 0 takes what NVML measures, if it is there."""
    price_per_hour: float = 0.0
    """Of one worker's share of a machine, in any currency; 0 means that no cost is told."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            raise ConfigError(f"show.trackers knows {', '.join(TRACKERS)}, but not {', '.join(unknown)}.")
        for name in ("sources_every_steps", "bleu_every_steps", "bleu_captions", "sample_pictures"):
            if getattr(self, name) < 0:
                raise ConfigError(f"show.{name} must not be negative, but is {getattr(self, name)}.")
        if self.max_new_tokens < 1 or min(self.watts, self.price_per_hour) < 0:
            raise ConfigError("show.max_new_tokens must be at least 1, and watts and price_per_hour not negative.")
