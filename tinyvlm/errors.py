"""Every exception that TinyVLM raises on purpose.

    TinyVLMError
    ├── ConfigError      a setting is wrong: nothing has been written yet
    ├── InputError       a request or a conversation is wrong (carries the field)
    ├── DataError        a dataset, folder or file cannot be used
    │   └── StageError   a stage folder breaks the contract (missing, in use, rows lost)
    ├── NetworkError     nothing answers any more: it is our network, not the links
    ├── CheckpointError  weights or a checkpoint do not fit
    ├── Interrupted      asked to stop (SIGTERM), and did: what was done is kept
    └── ClusterError     Ray is absent, unreachable or too small

A message says what was wanted, what came and what to do.  Entry points print it as one sentence and exit with 2.
"""

from __future__ import annotations


class TinyVLMError(Exception):
    """Base of all expected failures; `str(error)` is a sentence for the user."""


class ConfigError(TinyVLMError):
    """A setting is unknown, has the wrong type or contradicts another one."""


class InputError(TinyVLMError):
    """A request or conversation cannot be used; `field` names the offending part, as in OpenAI's `param`."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DataError(TinyVLMError):
    """A dataset, folder or file is missing, unreadable or inconsistent."""


class StageError(DataError):
    """A stage folder is missing, held by another driver, or does not account for all its rows."""


class NetworkError(TinyVLMError):
    """The network or the name server fails for every host; rows would be written down wrongly."""


class CheckpointError(TinyVLMError):
    """Weights or a training checkpoint are missing or do not fit the model."""


class Interrupted(TinyVLMError):
    """The run was asked to stop and did so cleanly; the same command continues."""


class ClusterError(TinyVLMError):
    """Ray is not installed, not reachable, or can never give what a stage needs."""
