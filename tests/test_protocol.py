"""Request bodies in, OpenAI's shapes out."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from typing import Any

import pytest

from tinyvlm.chat import Picture
from tinyvlm.errors import ConfigError, InputError
from tinyvlm.serve import protocol
from tinyvlm.serve.parse import parse_chat, parse_process
from tinyvlm.serve.protocol import Answer, ApiError, ChatRequest, Finish
from tinyvlm.serve.settings import ReplicaConfig, ServeConfig

SETTINGS = ServeConfig()
USER = {"role": "user", "content": "what shape is it?"}
URI = "data:image/png;base64," + base64.b64encode(b"picture bytes").decode()
FINISH = Finish("stop", num_prompt_tokens=80, num_image_tokens=64, num_answer_tokens=3)


def chat(messages: Any = None, **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "tinyvlm", "messages": messages or [USER], **fields}).encode(), SETTINGS)


def picture(url: Any = URI, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_a_full_conversation_keeps_order_and_pictures() -> None:
    other = "data:image/JPEG;base64," + base64.b64encode(b"other").decode()
    request = chat(
        [
            {"role": "developer", "content": "be short"},
            {"role": "user", "content": [picture(), {"type": "text", "text": "and "}, picture(other, detail="auto")]},
            {"role": "assistant", "content": "two circles", "refusal": None, "tool_calls": []},
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": URI}, {"type": "text", "text": "<IMGPLH>?"}],
            },
        ]
    )
    assert [message.role for message in request.messages] == ["system", "user", "assistant", "user"]
    assert request.messages[1].parts == (Picture(0), "and ", Picture(1))
    assert request.messages[3].parts == (Picture(2), "<IMGPLH>?")
    assert request.pictures == (b"picture bytes", b"other", b"picture bytes")


def test_sampling_fields_and_their_defaults() -> None:
    plain = chat()
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": None, "stop": ()}
    assert plain.sampling == {"max_new_tokens": SETTINGS.default_new_tokens, **defaults}
    assert not plain.stream
    wishes = {"temperature": 1, "top_p": 0.5, "top_k": 3, "seed": -4}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    request = chat(max_completion_tokens=7, stop="end", **wishes, **options)
    assert request.sampling == {"max_new_tokens": 7, "stop": ("end",), **wishes}
    assert request.stream
    assert request.include_usage
    assert chat(max_tokens=9).sampling["max_new_tokens"] == 9
    assert chat(max_tokens=9, max_completion_tokens=9, stop=["a", "b"]).sampling["stop"] == ("a", "b")


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logprobs": False, "logit_bias": {}, "tools": []},
        {
            "response_format": {"type": "text"},
            "tool_choice": "none",
            "store": False,
            "user": "me",
            "metadata": {"a": "b"},
        },
        {"temperature": None, "stop": None, "stream": None, "stream_options": None, "seed": None, "max_tokens": None},
        {"nonsense": None, "min_p": 0, "repetition_penalty": 1.0, "service_tier": "auto", "modalities": ["text"]},
    ],
)
def test_neutral_values_and_nulls_are_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).sampling == chat().sampling


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"),
    ({"n": True}, "n"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"),
    ({"repetition_penalty": 1.2}, "repetition_penalty"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"chat_template": "x"}, "chat_template"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": 10**400}, "temperature"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"surprise": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
    ({"model": 5}, "model"),
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": {"0": USER}}, "messages"),
    ({"messages": [USER] * 65}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": []}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "messages[0].name"),
    ({"messages": [USER, {"role": "assistant", "content": "no"}]}, "messages"),
    ({"messages": [USER, {"role": "system", "content": "be good"}, USER]}, "messages"),
    ({"messages": [{"role": "assistant", "content": [picture()]}, USER]}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": user("hi")}, "messages[0].content[0]"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0]"),
    ({"messages": user({"type": "text", "text": 5})}, "messages[0].content[0]"),
    ({"messages": user({"type": "text", "text": "a", "cache_control": {}})}, "messages[0].content[0].cache_control"),
    ({"messages": user({"type": "input_audio", "input_audio": {}})}, "messages[0].content[0]"),
    ({"messages": user({"type": ["text"], "text": "a"})}, "messages[0].content[0]"),
    ({"messages": user({"type": "image_url"})}, "messages[0].content[0].image_url"),
    ({"messages": user(picture(5))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("https://example.com/a.png"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("http://169.254.169.254/latest/meta-data"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("file:///etc/passwd"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("/etc/passwd"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:text/html;base64,aGk="))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:image/svg+xml,<svg/>"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:image/png;base64,"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:image/png;base64,@@@@"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:image/png;base64,QUJ"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9"))}, "messages[0].content[0].image_url"),
    ({"messages": user(picture(detail="high"))}, "messages[0].content[0].image_url.detail"),
    ({"messages": user(picture(size=5))}, "messages[0].content[0].image_url.size"),
    ({"messages": user(*[picture()] * 9)}, "messages[0].content[8]"),
]


@pytest.mark.parametrize(
    ("fields", "param"), BAD_FIELDS, ids=[f"{index}-{p}" for index, (_, p) in enumerate(BAD_FIELDS)]
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "tinyvlm", "messages": [USER], **fields}).encode()
    with pytest.raises(InputError) as caught:
        parse_chat(body, SETTINGS)
    assert caught.value.field == param
    status, error = protocol.error_object(caught.value)
    assert status == 400
    assert error["error"]["type"] == "invalid_request_error"
    assert error["error"]["param"] == param
    assert len(error["error"]["message"]) < 300, "a message must not carry the request back"
    json.dumps(error, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b"null", b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000, b"1" * 5000]
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InputError):
        parse_chat(body, SETTINGS)


def test_hostile_names_come_back_harmless() -> None:
    with pytest.raises(InputError) as caught:
        chat(**{"\ud800\x1b[31m" + "x" * 5000: 1})
    status, error = protocol.error_object(caught.value)
    assert status == 400
    assert error["error"]["param"].isascii()
    assert len(json.dumps(error)) < 400


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded() -> None:
    big = "data:image/png;base64," + "A" * (SETTINGS.pictures.max_bytes // 3 * 4 + 400)
    with pytest.raises(InputError, match="bytes"):
        chat(user(picture(big)))


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        chat(model="gpt-4o")
    status, error = protocol.error_object(caught.value)
    assert (status, error["error"]["code"], error["error"]["param"]) == (404, "model_not_found", "model")


def test_process_reads_the_published_call() -> None:
    def parse(**fields: Any) -> ChatRequest:
        return parse_process(json.dumps(fields).encode(), SETTINGS)

    assert parse(message="what?", image=URI).messages[0].parts == (Picture(0), "what?")
    assert parse(message="see <IMGPLH> here", image=URI).messages[0].parts == ("see ", Picture(0), " here")
    assert parse(message="", image=URI).messages[0].parts == (Picture(0), SETTINGS.default_question)
    assert parse(message="no picture", image=None).pictures == ()
    for fields, field in [
        ({"message": "", "image": ""}, "message"),
        ({"message": "<IMGPLH><IMGPLH>", "image": URI}, "message"),
        ({"message": "a <IMGPLH>"}, "message"),
        ({"message": "a", "image": "nonsense"}, "image"),
        ({"message": 5, "image": URI}, "message"),
        ({"message": "a", "picture": URI}, "picture"),
    ]:
        with pytest.raises(InputError) as caught:
            parse(**fields)
        assert caught.value.field == field


def test_a_completion_has_openais_shape() -> None:
    body = protocol.completion(chat(), Answer("a circle", FINISH))
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "a circle", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 83
    assert body["usage"]["prompt_tokens_details"]["image_tokens"] == 64


@pytest.mark.parametrize("include_usage", [False, True])
def test_chunks_add_up_to_the_answer(include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = protocol.Chunks(chat(stream=True, **options))
    raw = b"".join([chunks.start(), chunks.text("a "), chunks.text("círcle\n\ndata: x"), *chunks.end(FINISH)])
    events = raw.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len({event["id"] for event in parsed}) == 1
    with_choice = [event["choices"][0] for event in parsed if event["choices"]]
    assert with_choice[0]["delta"]["role"] == "assistant"
    assert "".join(choice["delta"].get("content", "") for choice in with_choice) == "a círcle\n\ndata: x"
    assert [choice["finish_reason"] for choice in with_choice] == [None, None, None, "stop"]
    assert [event["usage"]["completion_tokens"] for event in parsed if event.get("usage")] == [3] * include_usage


def test_unexpected_errors_say_nothing_of_themselves() -> None:
    status, error = protocol.error_object(ValueError("<_io.BytesIO object at 0x7f0001020304> in /home/x"))
    assert status == 500
    assert "0x7f" not in json.dumps(error)
    assert error["error"]["type"] == "server_error"


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"port": 0}, {"max_new_tokens": 0}, {"default_new_tokens": 600}, {"max_queue": 0}):
        with pytest.raises(ConfigError):
            ServeConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError):
        ReplicaConfig(min_replicas=3, max_replicas=2)


def test_the_web_app_needs_neither_torch_nor_ray() -> None:
    script = "import sys, tinyvlm.serve.app, tinyvlm.serve.scheduler; print({'torch', 'ray'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"
