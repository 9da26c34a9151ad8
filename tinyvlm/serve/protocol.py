"""OpenAI's chat completions as data: what is asked, what is answered, what is refused.  No sockets, no model.

body ── parse_chat ──▶ ChatRequest ── (backend) ──▶ pieces of text, Finish ── completion │ Chunks ──▶ JSON, SSE
          ╰── InputError(field) / ApiError ──────────────────────────── error_object ──▶ {"error": …}
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from tinyvlm import chat
from tinyvlm.errors import InputError, TinyVLMError
from tinyvlm.serve.settings import ServeConfig

Json = dict[str, Any]


class ApiError(TinyVLMError):
    """A refusal that is not about the request's fields; knows its HTTP status and OpenAI's words for it."""

    def __init__(
        self, status: int, message: str, *, kind: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param


class SamplingFields(TypedDict):
    """The fields of `generation.Sampling`, checked.  Not the class itself, which brings torch along."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One question, checked: everything that preprocessing and generation need to know."""

    messages: tuple[chat.Message, ...]
    pictures: tuple[bytes, ...]
    """Encoded pictures (JPEG, PNG, …) as they came, in the order of their marks in `messages`."""
    sampling: SamplingFields
    model: str
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True, eq=False)
class Encoded:
    """A request as tensors: what preprocessing hands to generation.  Unlike `Sample`, it travels without torch."""

    input_ids: NDArray[np.int32]
    """(T,)"""
    pixels: NDArray[np.uint8]
    """(N,S,S,3)"""


@dataclass(frozen=True)
class Finish:
    """How an answer ended, and what it cost."""

    reason: Literal["stop", "length"]
    num_prompt_tokens: int
    num_image_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    finish: Finish


def usage(finish: Finish) -> Json:
    """OpenAI's `usage`, with the share of the prompt that is pictures."""
    return {
        "prompt_tokens": finish.num_prompt_tokens,
        "completion_tokens": finish.num_answer_tokens,
        "total_tokens": finish.num_prompt_tokens + finish.num_answer_tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": finish.num_image_tokens},
    }


def completion(request: ChatRequest, answer: Answer) -> Json:
    """The body of an answer that is not streamed."""
    message = {"role": "assistant", "content": answer.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish.reason}
    return {
        "id": new_id(),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [choice],
        "usage": usage(answer.finish),
    }


class Chunks:
    """The events of one streamed answer: `start`, `text` …, `end`; each gives bytes for the socket."""

    def __init__(self, request: ChatRequest) -> None:
        self.include_usage = request.include_usage
        self._head = {
            "id": new_id(),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": request.model,
        }

    def start(self) -> bytes:
        """The first event carries the role."""
        return self._delta({"role": "assistant", "content": ""})

    def text(self, piece: str) -> bytes:
        """Some of the answer."""
        return self._delta({"content": piece})

    def end(self, finish: Finish) -> Iterator[bytes]:
        """Why it ended, the usage when asked for, and the mark that closes every stream."""
        yield self._delta({}, finish.reason)
        if self.include_usage:
            yield sse({**self._head, "choices": [], "usage": usage(finish)})
        yield DONE

    def _delta(self, delta: Json, reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return sse({**self._head, "choices": [choice], **({"usage": None} if self.include_usage else {})})


DONE = b"data: [DONE]\n\n"


def sse(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def new_id() -> str:
    """A name for one answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def models(settings: ServeConfig, created: int) -> Json:
    """The body of GET /v1/models; clients look for the modalities here."""
    model = {
        "id": settings.model_name,
        "object": "model",
        "created": created,
        "owned_by": "tinyvlm",
        "architecture": {"input_modalities": ["text", "image"], "output_modalities": ["text"]},
    }
    return {"object": "list", "data": [model]}


def error_object(error: BaseException) -> tuple[int, Json]:
    """HTTP status and OpenAI's error object.  Unexpected exceptions say nothing of themselves."""
    if isinstance(error, ApiError):
        return error.status, _error(str(error), error.kind, error.param, error.code)
    if isinstance(error, InputError):
        return 400, _error(str(error), "invalid_request_error", error.field, None)
    return 500, _error(
        "The server failed on this request; its log has the reason.", "server_error", None, "internal_error"
    )


def _error(message: str, kind: str, param: str | None, code: str | None) -> Json:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
