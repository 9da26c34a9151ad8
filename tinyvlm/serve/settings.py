"""Settings of the endpoint: where it listens, what one request may ask for, and how its deployments scale."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tinyvlm.errors import ConfigError
from tinyvlm.images import LimitConfig


@dataclass(frozen=True, kw_only=True)
class ReplicaConfig:
    """How many copies of a deployment run, and what each of them gets."""

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 4.0
    """Another replica is started when a replica has more requests than this, on average."""
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 60.0
    num_cpus: float = 0.25
    """Logical CPUs that Ray sets aside for one replica."""
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"Replicas want 1 ≤ min_replicas ≤ max_replicas, but got {self.min_replicas} and {self.max_replicas}."
            )


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The endpoint.  The defaults are closed and small: this machine only, one replica of everything."""

    host: str = "127.0.0.1"
    """0.0.0.0 opens the endpoint to the network; it asks nobody for a key."""
    port: int = 8000
    model_name: str = "tinyvlm"
    """The name that clients write in `model`."""
    default_question: str = "Describe this image."
    """Asked by the page and by `/process` when the question is empty and there is a picture."""

    default_new_tokens: int = 128
    max_new_tokens: int = 512
    max_prompt_tokens: int = 4096
    """Of the whole conversation, pictures included; the model's own context may be shorter."""
    max_messages: int = 64
    max_pictures: int = 8
    pictures: LimitConfig = field(
        default_factory=lambda: LimitConfig(
            max_bytes=10 * 1024**2, max_pixels=25_000_000, formats=("JPEG", "PNG", "WEBP", "GIF")
        )
    )
    """What one picture may be."""
    max_request_bytes: int = 32 * 1024**2
    max_queue: int = 64
    """Requests that one ingress holds, waiting or running; one more is answered 429."""
    retry_after_s: int = 1
    request_timeout_s: float = 120.0
    """From the first byte of the request to the last of the answer."""
    body_timeout_s: float = 20.0
    """For the request's body to arrive."""

    max_batch: int = 8
    """Requests that the model works on at once."""
    threads: int = 1
    """CPU threads of the model in one replica."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    drain_timeout_s: float = 20.0
    """How long a replica that is replaced may go on with the requests it has."""
    surge_percent: int = 100
    """When the model is replaced: how many new replicas may start before old ones stop.  0 where there is no room for
    both (one GPU): then requests wait while the new one starts."""

    ingress: ReplicaConfig = field(
        default_factory=lambda: ReplicaConfig(num_cpus=0.1, max_replicas=2, target_ongoing_requests=32.0)
    )
    preprocess: ReplicaConfig = field(default_factory=lambda: ReplicaConfig(num_cpus=0.2, max_replicas=2))
    generate: ReplicaConfig = field(default_factory=lambda: ReplicaConfig(num_cpus=0.5, max_replicas=2))

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(f"serve.port wants a number from 1 to 65535, but got {self.port}.")
        if not 0 < self.default_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                "serve wants 0 < default_new_tokens ≤ max_new_tokens, but got "
                f"{self.default_new_tokens} and {self.max_new_tokens}."
            )
        if not 0 <= self.surge_percent <= 100:
            raise ConfigError(f"serve.surge_percent wants a number from 0 to 100, but got {self.surge_percent}.")
        for name in ("max_pictures", "max_request_bytes", "max_queue", "max_batch", "threads", "max_messages"):
            if getattr(self, name) < (0 if name == "max_pictures" else 1):
                raise ConfigError(f"serve.{name} wants a positive number, but got {getattr(self, name)}.")
