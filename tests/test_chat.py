"""The prompt's layout, and what may stand in a conversation."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2 import Environment
from transformers.utils.chat_template_utils import render_jinja_template

from tinyvlm import chat
from tinyvlm.chat import Message, Picture, messages_from_dicts, neutralise, place_pictures, render
from tinyvlm.errors import InputError

K = 3
EXPANDED = "<IMAGE>" + "<Image_Token>" * K + "<IMAGE_END>"

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one question": [{"role": "user", "content": "what?"}],
    "two turns": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what shape?"}]},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "what color?"},
        {"role": "assistant", "content": "red"},
    ],
    "system and several pictures": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "  compare "},
                {"type": "image"},
                {"type": "text", "text": " with "},
                {"type": "image_url", "image_url": {"url": "data:"}},
            ],
        },
        {"role": "assistant", "content": "\n They differ. \n"},
    ],
    "white space, braces and an empty answer": [
        {"role": "user", "content": " \t {{ 7 * 7 }} {% for %} \u2003"},
        {"role": "assistant", "content": ""},
    ],
    "texts in pieces": [
        {
            "role": "user",
            "content": [{"type": "text", "text": " "}, {"type": "text", "text": " a "}, {"type": "text", "text": "b"}],
        },
    ],
}


def text_of(messages: list[Message], **options: Any) -> str:
    return "".join(segment.text for segment in render(messages, K, **options))


def test_layout_is_llama_3s() -> None:
    messages = [Message("user", (Picture(0), "what shape?")), Message("assistant", ("circle",))]
    assert text_of(messages) == (
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{EXPANDED}what shape?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\ncircle<|eot_id|>"
    )
    opened = text_of(messages[:1], open_answer=True)
    assert opened.endswith("what shape?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


def test_supervision_covers_the_answers_and_their_ends() -> None:
    segments = render(messages_from_dicts(CONVERSATIONS["two turns"]), K)
    assert "".join(s.text for s in segments if s.supervised) == "a circle<|eot_id|>red<|eot_id|>"
    assert [s.text for s in segments if not s.is_layout] == ["what shape?", "a circle", "what color?", "red"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("open_answer", [False, True])
def test_jinja_template_writes_the_same(name: str, open_answer: bool) -> None:
    rendered, _ = render_jinja_template(
        [CONVERSATIONS[name]], chat_template=chat.CHAT_TEMPLATE, add_generation_prompt=open_answer
    )
    ours = text_of(messages_from_dicts(CONVERSATIONS[name]), open_answer=open_answer)
    assert rendered[0].replace(chat.PLACEHOLDER, EXPANDED) == ours


def test_jinja_template_marks_the_supervised_words() -> None:
    conversation = CONVERSATIONS["system and several pictures"]
    rendered, spans = render_jinja_template(
        [conversation], chat_template=chat.CHAT_TEMPLATE, return_assistant_tokens_mask=True
    )
    assert [rendered[0][start:end] for start, end in spans[0]] == ["They differ.<|eot_id|>"]


def test_jinja_template_needs_only_jinja_and_the_generation_tag() -> None:
    plain = chat.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    text = Environment().from_string(plain).render(messages=CONVERSATIONS["two turns"], add_generation_prompt=False)
    assert text.replace(chat.PLACEHOLDER, EXPANDED) == text_of(messages_from_dicts(CONVERSATIONS["two turns"]))


def test_a_mark_says_where_the_picture_goes() -> None:
    assert place_pictures("see <IMGPLH> here", 1) == ("see ", Picture(0), " here")
    assert place_pictures("<IMGPLH><IMGPLH>both", 2) == (Picture(0), Picture(1), "both")
    assert place_pictures("no mark", 1) == (Picture(0), "no mark")
    assert place_pictures("words only", 0) == ("words only",)


@pytest.mark.parametrize(("text", "num_pictures"), [("none", 2), ("<IMGPLH>", 0), ("<IMGPLH> <IMGPLH>", 1)])
def test_marks_and_pictures_must_agree(text: str, num_pictures: int) -> None:
    marks = text.count("<IMGPLH>")
    with pytest.raises(InputError, match=f"has {marks} <IMGPLH> and comes with {num_pictures} pictures"):
        place_pictures(text, num_pictures)


@pytest.mark.parametrize(
    ("parts", "num_pictures", "message"),
    [
        ((Picture(0), "a"), 2, r"refers to 1 pictures \(numbers \[0\]\) but comes with 2"),
        (("a",), 1, "refers to 0 pictures .* comes with 1"),
        ((Picture(1), Picture(0)), 2, r"numbers \[1, 0\]"),
        ((Picture(0), Picture(0)), 1, "refers to 2 pictures .* comes with 1"),
    ],
)
def test_pictures_stand_once_and_in_order(parts: tuple[chat.Part, ...], num_pictures: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        chat.check_pictures([Message("user", parts)], num_pictures)


@pytest.mark.parametrize(
    ("dicts", "message"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "hi"}], "Message 0 has the role 'robot'"),
        ([{"content": "hi"}], "Message 0 has the role ''"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "Message 1 is a system message"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], r"Message 0 \(assistant\) has a picture"),
        ([{"role": "user", "content": None}], "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part of type 'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part without a string 'text'"),
        ([{"role": "user", "content": ["words"]}], "part of type 'str'"),
        (["hello"], "Message 0 is a str"),
    ],
)
def test_wrong_conversations_are_refused_by_name(dicts: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        messages_from_dicts(dicts)
    assert caught.value.field == "messages"


def test_developer_is_a_system_message() -> None:
    assert messages_from_dicts([{"role": "developer", "content": "x"}])[0].role == "system"


def test_neutralise_breaks_every_control_name_and_nothing_else() -> None:
    names = (*chat.LLAMA_TOKENS, *chat.IMAGE_TOKENS, "<|python_tag|>", "<|reserved_special_token_17|>")
    broken = neutralise(" ".join(names))
    assert not any(name in broken for name in names)
    assert broken.replace("\u200b", "") == " ".join(names)
    innocent = "a < b, <b>bold</b> <|> x <IMGPLH> <|not a name|>"
    assert neutralise(innocent) == innocent
