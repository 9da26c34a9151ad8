"""Alpaca: instruction and input are both asked, and rows that AlpacaDataCleaned found broken are set aside by rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_source_llava import prepare, run, said

from tinyvlm.data.prepare import PrepareConfig
from tinyvlm.data.sources.alpaca import Alpaca, what_is_wrong
from tinyvlm.errors import DataError


def row(instruction: Any, given: Any, output: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "input": given, "output": output, **more}


ROWS = [
    row("Name a colour.", "", "Red."),
    row("Find the noun.", "The apple fell.", "Apple"),
    row("Add the numbers.", 7, 14.0),
]


def test_the_question_is_the_instruction_and_its_input(tmp_path: Path) -> None:
    found = prepare(ROWS, tmp_path, source="alpaca")
    assert [row["status"] for row in found] == ["ok"] * 3
    assert {(row["family"], row["source"], row["split"]) for row in found} == {("text", "alpaca", "train")}
    assert said(found[0]) == [("user", "Name a colour."), ("assistant", "Red.")]
    assert said(found[1]) == [("user", "Find the noun.\n\nThe apple fell."), ("assistant", "Apple")]
    assert said(found[2]) == [("user", "Add the numbers.\n\n7"), ("assistant", "14")]
    assert [row["meta"] for row in found] == [{"input": False}, {"input": True}, {"input": True}]
    assert all(row["images"] == [] for row in found)


@pytest.mark.parametrize(
    "nothing",
    ["<noinput>", "<no input>", "No input", "noinput", "No Input.", "< noinput >", "`<noinput>`", "(no input)", "N/A",
     "[No input needed]", "  ", None, float("nan")],
)  # fmt: skip
def test_an_input_that_says_that_there_is_none_is_none(tmp_path: Path, nothing: Any) -> None:
    found = prepare([row("Name a colour.", nothing, "Red.")], tmp_path, source="alpaca")
    assert found[0]["status"] == "ok"
    assert said(found[0])[0] == ("user", "Name a colour.")


EMPTY, ABSENT_INPUT, ABSENT_OUTPUT = "the output is empty", "the input stands for", "the output stands for"
MERGED, LINK = "another instruction follows", "the input is a link whose page nobody has read"
BROKEN = [
    (row("Compute the area.", "4 cm x 5 cm", ""), EMPTY),
    (row("Compute the area.", "4 cm x 5 cm", None), EMPTY),
    (row("Freeze the yogurt.", "Yogurt", "<noinput>"), EMPTY),
    (row("Draw a logo.", "", "<No Output>"), EMPTY),
    (row("Draw a logo.", "", "nooutput"), EMPTY),
    (row("Fix the code.", "x = 1", "N/A"), EMPTY),
    (row("", "something", "Fine."), "the instruction is empty"),
    (row(float("nan"), "something", "Fine."), "the instruction is empty"),
    (row("Should I invest?", "", "It depends.\n##\n18. Instruction: Identify the noun.\n18. Input:\nx"), MERGED),
    (row("Should I invest?", "", "It depends.\n### Instruction: Identify the noun."), MERGED),
    (row("Should I invest?\nInstruction: Identify the noun.", "", "It depends."), MERGED),
    (row("Classify the shape.", "<Picture Attached>", "Triangle"), ABSENT_INPUT),
    (row("Describe it.", "[image of a beach]", "A beach."), ABSENT_INPUT),
    (row("Describe it.", "Picture attached.", "A beach."), ABSENT_INPUT),
    (row("Describe it.", "See the attached photo", "A beach."), ABSENT_INPUT),
    (row("Describe it.", "![beach](https://x.org/beach.jpg)", "A beach."), ABSENT_INPUT),
    (row("Design a logo.", "", "[Image of a logo]"), ABSENT_OUTPUT),
    (row("Summarize the given article.", "https://www.bbc.com/news/world-1", "There are protests."), LINK),
    (row("Write a headline for the news article.", "<www.news.example.com/a-1>", "NASA launches."), LINK),
    (row("Given a URL, explain the content of the page.", "https://a.org/1", "It is about cats."), LINK),
    (row("Compare both.", "https://a.org/1\nhttps://a.org/2", "The first is longer."), LINK),
]


@pytest.mark.parametrize(("bad", "why"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_broken_rows_are_set_aside_with_the_rule(tmp_path: Path, bad: dict[str, Any], why: str) -> None:
    found = prepare([bad, ROWS[0]], tmp_path, source="alpaca")
    assert [row["status"] for row in found] == ["bad_text", "ok"]
    assert found[0]["detail"].startswith(why)


@pytest.mark.parametrize(
    ("instruction", "given", "output"),
    [
        ("Print the domain of the URL.", "https://docs.google.com/document", "google.com"),
        ("Shorten this link.", "https://a.org/very/long", "https://a.org/v"),
        ("Write HTML of a button.", "Link to: https://example.com\nText: Click", "<button>…</button>"),
        ("Give the symbol of sodium.", "", "Na"),
        ("Filter the list.", "[]", "[]"),
        ("Which mark is missing?", "Who are you", "?"),
        ("Is it true?", "There are no birds.", "No"),
        ("Sort the animals.", "[dogs, cats, pigs]", "cats, dogs, pigs"),
        ("Sort the list.", "[4, 2]", "Here is the code.\n\nOutput:\n[2, 4]"),
        ("Find the tag.", "<p>Picture of a cat</p>", "p"),
        ("Name the parts of a recipe.", "", "Ingredients: what it takes.\nInstructions: what to do."),
        ("Rewrite: the picture is attached to the wall", "The picture is attached to the wall.", "It hangs there."),
    ],
)
def test_rows_that_only_look_broken_are_kept(instruction: str, given: str, output: str) -> None:
    assert what_is_wrong(instruction, given, output) is None
    (made,) = Alpaca(PrepareConfig(source="alpaca")).dialogues(row(instruction, given, output), {})
    assert [message.text for message in made.messages] == [f"{instruction}\n\n{given}".strip(), output]


def test_json_lines_and_parquet_of_the_hub_give_the_same_rows(tmp_path: Path) -> None:
    rows = [row(*map(str, one.values()), text="Below is an instruction …") for one in ROWS]
    wanted = prepare(rows, tmp_path / "a", source="alpaca")
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    for place in (tmp_path / "x.jsonl", tmp_path / "x.parquet"):
        assert run([place], tmp_path / place.suffix[1:], source="alpaca") == wanted


def test_the_same_row_twice_is_used_once_and_a_file_without_inputs_is_refused(tmp_path: Path) -> None:
    found = prepare([ROWS[1], ROWS[1], {**ROWS[1], "input": "A pear fell."}], tmp_path, source="alpaca")
    assert [row["status"] for row in found] == ["ok", "duplicate", "ok"]
    with pytest.raises(DataError, match="no field 'input'; it has instruction, context, output"):
        prepare([{"instruction": "a", "context": "b", "output": "c"}], tmp_path / "b", source="alpaca")
