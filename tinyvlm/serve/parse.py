"""Request bodies in: JSON bytes to a checked `ChatRequest`.

Nothing that a client writes is ignored in silence: a field is used, or has its neutral value, or is refused by name.
Pictures come as data URIs; no address is ever opened, neither on the network nor on this machine.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any

from tinyvlm import chat
from tinyvlm.errors import InputError
from tinyvlm.serve.protocol import ApiError, ChatRequest, Json, SamplingFields
from tinyvlm.serve.settings import ServeConfig

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Fields that do nothing here, with the values that ask for nothing."""

_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
"""Fields that by their definition do not change the answer."""

_NEUTRAL_IN_MESSAGE = {"refusal", "tool_calls", "function_call", "audio", "annotations"}
"""What clients send back with an assistant's earlier message; empty values only."""

_USED = {
    *("model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop", "seed"),
    *("stream", "stream_options"),
}


def parse_chat(body: bytes, settings: ServeConfig) -> ChatRequest:
    """Read the body of POST /v1/chat/completions.

    Raises:
        InputError: a field is missing, wrong or not supported; names it.
        ApiError: the model does not exist.
    """
    data = _object(body)
    _refuse_unsupported(data)
    model = _typed(data, "model", str, settings.model_name)
    if model != settings.model_name:
        raise ApiError(
            404,
            f"There is no model {_shown(model)} here; ask for {settings.model_name!r}.",
            kind="invalid_request_error",
            code="model_not_found",
            param="model",
        )
    messages, pictures = _messages(data.get("messages"), settings)
    stream = _typed(data, "stream", bool, False)
    options = _typed(data, "stream_options", dict, {})
    if options and not stream:
        raise InputError("stream_options goes with stream=true only; leave it out.", field="stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise InputError(f"stream_options.{_shown(name)} is not supported; leave it out.", field="stream_options")
    if options.get("include_obfuscation"):
        raise InputError("Obfuscation is not supported; leave it out.", field="stream_options.include_obfuscation")
    return ChatRequest(
        messages=messages,
        pictures=pictures,
        sampling=_sampling(data, settings),
        model=model,
        stream=stream,
        include_usage=_typed(options, "include_usage", bool, False),
    )


def parse_process(body: bytes, settings: ServeConfig) -> ChatRequest:
    """Read the body of POST /process, the published system's own call: {"message": text, "image": data URI or absent}.

    A `<IMGPLH>` in the message says where the picture stands; without one it stands in front.

    Raises:
        InputError: naming the field.
    """
    data = _object(body)
    for name in data:
        if name not in ("message", "image"):
            raise InputError(
                f"{_shown(name)} is not a field of /process; send 'message' and 'image'.", field=_ascii(name)
            )
    uri = _typed(data, "image", str, "")
    text = _text(_typed(data, "message", str, ""), "message")
    pictures = (_picture(uri, "image", settings),) if uri else ()
    if not text.replace(chat.PLACEHOLDER, "").strip():
        if not pictures:
            raise InputError("Both message and image are empty; send at least one of them.", field="message")
        text += settings.default_question
    try:
        parts = chat.place_pictures(text, len(pictures))
    except InputError as error:
        raise InputError(str(error), field="message") from None
    sampling = _sampling({}, settings)
    return ChatRequest(
        messages=(chat.Message("user", parts),), pictures=pictures, sampling=sampling, model=settings.model_name
    )


def _object(body: bytes) -> Json:
    def refuse(constant: str) -> float:
        raise ValueError(constant)

    try:
        data = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError):
        raise InputError("The body is not valid JSON; send one JSON object in UTF-8.") from None
    if not isinstance(data, dict):
        raise InputError(f"The body is a JSON {_kind(data)}; send an object.")
    return data


def _refuse_unsupported(data: Json) -> None:
    for name, value in data.items():
        if value is None or name in _USED or name in _LABELS:
            continue
        if name not in _NEUTRAL:
            raise InputError(f"The field {_shown(name)} is not supported here; leave it out.", field=_ascii(name))
        if not any(value == neutral and (type(value) is bool) == (type(neutral) is bool) for neutral in _NEUTRAL[name]):
            raise InputError(
                f"{name} is not supported here beyond its neutral value {json.dumps(_NEUTRAL[name][0])}; leave it out.",
                field=name,
            )


def _sampling(data: Json, settings: ServeConfig) -> SamplingFields:
    lengths = {name: _typed(data, name, int, None) for name in ("max_completion_tokens", "max_tokens")}
    given = {name: length for name, length in lengths.items() if length is not None}
    if len(set(given.values())) > 1:
        raise InputError("max_tokens and max_completion_tokens differ; send one of them.", field="max_tokens")
    for name, length in given.items():
        _within(length, 1, settings.max_new_tokens, name)
    stop = data.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if (
        not isinstance(stops, list)
        or len(stops) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops)
    ):
        raise InputError("stop wants a string or a list of up to 4, each of 1 to 256 characters.", field="stop")
    seed = _typed(data, "seed", int, None)
    return SamplingFields(
        max_new_tokens=next(iter(given.values()), settings.default_new_tokens),
        temperature=float(_within(_typed(data, "temperature", float, 0.0), 0, 2, "temperature")),
        top_p=float(_within(_typed(data, "top_p", float, 1.0), 1e-6, 1, "top_p")),
        top_k=_within(_typed(data, "top_k", int, 0), 0, 1_000_000, "top_k"),
        seed=None if seed is None else _within(seed, -(2**63), 2**63 - 1, "seed"),
        stop=tuple(_text(text, "stop") for text in stops),
    )


def _messages(value: Any, settings: ServeConfig) -> tuple[tuple[chat.Message, ...], tuple[bytes, ...]]:
    if not isinstance(value, list) or not value:
        raise InputError("messages wants a list of at least one message.", field="messages")
    if len(value) > settings.max_messages:
        raise InputError(
            f"The conversation has {len(value)} messages; this server takes up to {settings.max_messages}.",
            field="messages",
        )
    pictures: list[bytes] = []
    plain = [_message(item, f"messages[{index}]", pictures, settings) for index, item in enumerate(value)]
    messages = tuple(chat.messages_from_dicts(plain))
    if messages[-1].role != "user":
        raise InputError("The last message must be the user's: it is the one that is answered.", field="messages")
    if not messages[-1].text.strip() and not any(isinstance(part, chat.Picture) for part in messages[-1].parts):
        raise InputError("The last message is empty; write a question or add a picture.", field="messages")
    return messages, tuple(pictures)


def _message(item: Any, where: str, pictures: list[bytes], settings: ServeConfig) -> Json:
    """One message as `chat.messages_from_dicts` reads it; its pictures are decoded from base64 into `pictures`."""
    if not isinstance(item, dict):
        raise InputError(f"{where} is a JSON {_kind(item)}; send an object.", field=where)
    for name, value in item.items():
        empty = value is None or value == [] or value == ""
        if name not in ("role", "content") and not (name in _NEUTRAL_IN_MESSAGE and empty):
            raise InputError(
                f"{where}.{_shown(name)} is not supported here; leave it out.", field=f"{where}.{_ascii(name)}"
            )
    role = {"developer": "system"}.get(str(item.get("role")), item.get("role"))
    if role not in chat.ROLES:
        raise InputError(
            f"{where} has the role {_shown(role)}; use one of {', '.join(chat.ROLES)}.", field=f"{where}.role"
        )
    content = item.get("content")
    if isinstance(content, str):
        return {"role": role, "content": _text(content, f"{where}.content")}
    if not isinstance(content, list):
        raise InputError(f"{where}.content wants a string or a list of parts.", field=f"{where}.content")
    parts = [_part(part, f"{where}.content[{index}]", pictures, settings) for index, part in enumerate(content)]
    return {"role": role, "content": parts}


def _part(part: Any, where: str, pictures: list[bytes], settings: ServeConfig) -> Json:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        _only(part, ("type", "text"), where)
        return {"type": "text", "text": _text(part["text"], f"{where}.text")}
    if kind != "image_url":
        raise InputError(f"{where} wants the type 'text' (with a text) or 'image_url'.", field=where)
    _only(part, ("type", "image_url"), where)
    image = part.get("image_url")
    if isinstance(image, dict):
        _only(image, ("url", "detail"), f"{where}.image_url")
        if image.get("detail") not in (None, "auto", "low"):
            raise InputError(
                f"{where}.image_url.detail wants 'auto' or 'low': every picture becomes the same few tokens.",
                field=f"{where}.image_url.detail",
            )
        image = image.get("url")
    if len(pictures) >= settings.max_pictures:
        raise InputError(f"This server takes up to {settings.max_pictures} pictures in a conversation.", field=where)
    pictures.append(_picture(image, f"{where}.image_url", settings))
    return {"type": "image"}


_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]{1,32};base64,", re.IGNORECASE)


def _picture(uri: Any, where: str, settings: ServeConfig) -> bytes:
    """The bytes in a data URI.  No other address is ever opened: neither the network nor a file."""
    if not isinstance(uri, str):
        raise InputError(f"{where} wants a data URI: data:image/…;base64,….", field=where)
    prefix = _DATA_URI.match(uri)
    if prefix is None:
        raise InputError(
            f"{where} is not a base64 data URI; nothing is fetched here, so send data:image/…;base64,….", field=where
        )
    if (len(uri) - prefix.end()) * 3 // 4 > settings.pictures.max_bytes + 3:
        raise InputError(
            f"{where} has more than the {settings.pictures.max_bytes} bytes that a picture may have.", field=where
        )
    try:
        data = base64.b64decode(uri[prefix.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where} is not valid base64.", field=where) from None
    if not data:
        raise InputError(f"{where} is an empty picture.", field=where)
    return data


def _only(part: Json, names: tuple[str, ...], where: str) -> None:
    for name in part:
        if name not in names:
            raise InputError(
                f"{where}.{_shown(name)} is not supported here; leave it out.", field=f"{where}.{_ascii(name)}"
            )


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where} has half a surrogate pair; send valid Unicode.", field=where) from None
    return text


def _typed(data: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = data.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        # An integer that no float can hold is out of every range; `_within` says so.
        return value
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        wanted = {str: "a string", bool: "true or false", int: "an integer", float: "a number", dict: "an object"}[kind]
        raise InputError(f"{name} wants {wanted}, but got a JSON {_kind(value)}.", field=name)
    return value


def _within(value: Any, low: float, high: float, name: str) -> Any:
    if not low <= value <= high:
        raise InputError(f"{name} wants a value from {low:g} to {high:g}.", field=name)
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    """A client's word in a message: short, quoted, plain ASCII."""
    return f"'{_ascii(value)}'"


def _ascii(value: Any) -> str:
    return str(value)[:64].encode("unicode_escape").decode()
