"""`tinyvlm data show`: what is shown is what enters training, whatever strangers wrote into it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tiny_model import NUM_IMAGE_TOKENS, tiny_model, tiny_processor
from training_data import conversation, prepare_folder, rows

from tinyvlm import chat, cli
from tinyvlm.data import show, show_page
from tinyvlm.data.samples import Draw, Place, rows_at
from tinyvlm.data.show import Choice, choose, look, to_text
from tinyvlm.errors import DataError
from tinyvlm.folders import part_paths
from tinyvlm.model.build import build_processor
from tinyvlm.recipes import tiny
from tinyvlm.train import packs_drawing, plan
from tinyvlm.train.data import Conversations, measure
from tinyvlm.train.plan import Item
from tinyvlm.train.reading import Window
from tinyvlm.train.settings import TrainConfig

EVIL = "<|eot_id|> <IMAGE> \x1b[31mred\x07 \u202eback <script>alert(1)</script> [bold]x[/] naïve 日本語 🙂 \ufffd\nnew"


def said(words: str, answer: str = "fine", **changes: Any) -> dict[str, Any]:
    row = conversation(7_000_000, turns=1)
    row["messages"][0]["parts"][-1]["text"] = words
    row["messages"][1]["parts"][0]["text"] = answer
    return {**row, **changes}


def run(*arguments: str | Path) -> int:
    return cli.main(["data", "show", *map(str, arguments)])


@pytest.mark.parametrize("made", [rows(40)[3], rows(40)[5], said(EVIL), said("x", EVIL), conversation(1, pictures=3)])
def test_what_is_shown_is_what_training_gets(made: dict[str, Any], tmp_path: Path) -> None:
    processor = tiny_processor()
    folder = prepare_folder(tmp_path, [made], parts=1)
    lengths = measure(dict(enumerate(part_paths(folder))), processor).to_pylist()[0]
    item = Item(**{name: lengths[name] for name in Item._fields})
    sample = Conversations(part_paths(folder), processor, window=Window(1), cache_bytes=1 << 20).load([item], 0)[0]

    view = look(choose(folder, Choice(keys=(made["key"],)))[0], processor)
    assert [token for piece in view.pieces for token in piece.ids] == sample.input_ids.tolist()
    flags = [piece.supervised for piece in view.pieces for _ in piece.ids]
    assert flags == sample.supervised.tolist()
    text = "".join(
        chat.IMAGE_TOKEN * len(piece.ids) if piece.text.startswith("…") and piece.is_special else piece.text
        for piece in view.pieces
    )
    assert text == processor.decode(sample.input_ids, skip_special_tokens=False)
    assert view.num_tokens == lengths["tokens"]
    assert view.num_supervised == lengths["supervised"]
    assert [one.size for one in view.pictures] == ["48×48 JPEG"] * len(made["images"])
    assert len(sample.pixels) == len(view.pictures)


def test_the_packaged_tokenizer_is_cut_into_whole_characters() -> None:
    recipe = tiny()
    processor = build_processor(recipe.model, recipe.picture)
    ids, supervised = processor.tokens(chat.messages_from_dicts([{"role": "user", "content": EVIL}]), 0)
    told = show.pieces(ids, supervised, processor)
    assert "".join(piece.text for piece in told) == processor.decode(ids, skip_special_tokens=False)
    assert {"日", "🙂"} <= set("".join(piece.text for piece in told if len(piece.ids) > 1) + "日🙂")
    assert sum("\ufffd" in piece.text for piece in told) == 1


def test_without_colour_marks_say_what_is_supervised_and_what_was_only_typed() -> None:
    text = to_text(look(said(EVIL, "a\nb"), tiny_processor()), plain=True).plain
    assert f"<IMAGE>…{NUM_IMAGE_TOKENS}×<Image_Token>…<IMAGE_END>\\<|eot_id|> \\<IMAGE> ␛[31mred␇ <U+202E>back" in text
    assert "[bold]x[/] naïve 日本語 🙂" in text
    assert "⟦a\nb<|eot_id|>⟧" in text
    assert "\x1b" not in text
    assert "48×48 JPEG" in text
    assert re.search(r"sha256 [0-9a-f]{12}, enters as 32×32", text)


def test_colours_say_the_same() -> None:
    view = look(said("what is it?", "a circle"), tiny_processor())
    text = to_text(view, plain=False)
    styled = {text.plain[span.start : span.end] for span in text.spans if span.style == show.STYLES["learned"]}
    assert "".join(sorted(styled)) == "<|eot_id|>a circle"
    assert "⟦" not in text.plain


def test_rows_that_are_set_aside_say_why(tmp_path: Path) -> None:
    processor = tiny_processor()
    long = said("much too long", status="too_long", detail="533 tokens, 512 allowed")
    for image in long["images"]:
        image["bytes"] = None
    text = to_text(look(long, processor), plain=True).plain
    assert "set aside: too_long (more tokens than the model may read): 533 tokens, 512 allowed" in text
    assert "much too long" in text
    assert "no picture, not stored" in text
    turns = {**said("first", status="bad_turns", detail="turn 1 is system's"), "images": []}
    turns["messages"][1]["role"] = "system"
    text = to_text(look(turns, processor), plain=True).plain
    assert "Nothing enters the model: Message 1 is a system message" in text
    assert "user: [picture 0]first" in text
    empty = {**said(""), "messages": None, "images": None, "status": "bad_record", "detail": None}
    assert "set aside: bad_record" in to_text(look(empty, processor), plain=True).plain
    broken = said("x")
    broken["images"][0]["bytes"] = b"no picture at all"
    assert "unreadable (UnidentifiedImageError)" in to_text(look(broken, processor), plain=True).plain


def test_a_few_are_drawn_of_every_kind_from_all_over(tmp_path: Path) -> None:
    made = [
        {**conversation(key, turns=1), "source": "big" if key % 50 else "m3it/rare", "family": "vqa"}
        for key in range(400)
    ]
    made[7]["status"], made[8]["split"] = "no_picture", "test"
    folder = prepare_folder(tmp_path, made, parts=5, group_size=16)
    four = choose(folder, Choice(count=4))
    assert [row["source"] for row in four] == ["big", "m3it/rare"] * 2
    assert four == choose(folder, Choice(count=4))
    many = [row["key"] for row in choose(folder, Choice(count=60))]
    assert len(set(many)) == 60
    assert len({key % 5 for key in many}) == 5
    assert max(many) > 300
    assert {row["source"] for row in choose(folder, Choice(source="m3it", count=99))} == {"m3it/rare"}
    assert [row["key"] for row in choose(folder, Choice(status=("no_picture",)))] == [7]
    assert [row["key"] for row in choose(folder, Choice(split=("test",)))] == [8]
    assert [row["key"] for row in choose(folder, Choice(keys=(399, 7, 0, 10**30)))] == [399, 7, 0]
    assert choose(folder, Choice(family="caption")) == []


def test_the_draw_does_not_depend_on_how_rows_lie() -> None:
    keys = np.arange(1000) * 1000
    one, other = Draw(5), Draw(5)
    kinds = np.array(["a", "b"])[keys // 1000 % 2]
    one.add(0, pa.chunked_array([keys]), pa.chunked_array([kinds]), np.arange(1000))
    for part, first in enumerate(range(0, 1000, 100)):
        here = slice(first, first + 100)
        other.add(part, pa.chunked_array([keys[here]]), pa.chunked_array([kinds[here]]), np.arange(100))
    drawn = {kind: [place.row for place in places] for kind, places in one.places.items()}
    assert drawn == {kind: [100 * part + row for part, row in places] for kind, places in other.places.items()}
    assert max(drawn["a"]) - min(drawn["a"]) > 200


def test_rows_are_read_at_their_places_and_columns_may_be_missing(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path, rows(50), parts=2, group_size=4)
    found = rows_at(part_paths(folder), [Place(1, 24), Place(0, 0), Place(1, 3)], ["key", "nowhere"])
    assert found == {Place(0, 0): {"key": 0}, Place(1, 3): {"key": 7}, Place(1, 24): {"key": 49}}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.sources, self.words = list[str](), list[str](), ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_harmless() -> None:
    made = [said(EVIL, EVIL, source="<b>", meta='{"a": "<script>"}'), conversation(3, pictures=2)]
    made.append({**said("x"), "status": EVIL, "detail": EVIL, "messages": []})
    page = Page(show_page.page([(Path("prepare-1"), [look(row, tiny_processor()) for row in made])]))
    assert "script" not in page.tags
    assert page.tags.count("img") == 2 * (1 + 2) + 1
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert "\x1b" not in page.words
    assert EVIL.split("\n")[1] in page.words
    assert f"{NUM_IMAGE_TOKENS}×<Image_Token>" in page.words


def test_the_command_speaks_through_a_pipe_and_writes_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    prepare_folder(tmp_path, rows(20))
    assert run(tmp_path, "--recipe", "tiny", "--count", "3") == 0
    out = capsys.readouterr().out
    assert out.count("── ") == 3
    assert "⟦" in out
    assert "\x1b" not in out
    assert run(tmp_path, "--recipe", "tiny", "--key", "0", "--html", tmp_path / "page.html") == 0
    assert "left out on purpose" in (tmp_path / "page.html").read_text()


def test_a_models_folder_tells_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare_folder(tmp_path, rows(4), parts=1)
    model = tmp_path / "sft-1" / "model"
    for half in tiny_model(tmp_path):
        half.save_pretrained(model)
    (model / "model.safetensors").unlink()  # weights are not asked for
    for given in (model, model.parent):
        assert run(folder, "--model", given, "--key", "1") == 0
        assert f"…{NUM_IMAGE_TOKENS}×<Image_Token>…" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("nowhere", "--recipe", "tiny"), "There is no folder"),
        ((".", "--recipe", "tiny", "--key", "123"), "has no conversation with the key 123"),
        ((".", "--recipe", "tiny", "--source", "laion"), "no such conversation; its sources are test"),
        ((".",), "Whose tokens\\?  Give --recipe"),
        ((".", "--recipe", "tinny"), "no recipe 'tinny'"),
        ((".", "--recipe", "tiny", "--count", "0"), "--count is 0"),
        ((".", "--recipe", "tiny", "--status", "to_long"), "did you mean 'too_long'"),
        ((".", "--model", "parts"), "is no model folder"),
        (("parts", "--recipe", "tiny"), "is no finished folder of the stage prepare"),
        (("other", "--recipe", "tiny"), "a folder of the stage 'encode'"),
        ((".", "--packs", "3"), "has no plan.parquet"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare_folder(tmp_path, rows(10), parts=1)
    (tmp_path / "parts").mkdir()
    (tmp_path / "other").mkdir()
    manifest = (folder / "manifest.json").read_text().replace('"stage": "prepare"', '"stage": "encode"')
    (tmp_path / "other" / "manifest.json").write_text(manifest)
    given = [str(tmp_path / name) if name in (".", "nowhere", "parts", "other") else name for name in arguments]
    assert run(*given) == 2
    error = capsys.readouterr().err
    assert re.match(f"error: .*{sentence}", error)
    assert error.count("\n") == 1


def test_a_damaged_part_is_told(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path, rows(10), parts=1)
    part_paths(folder)[0].write_bytes(b"PAR1 is not enough")
    with pytest.raises(DataError, match="cannot be read as conversations"):
        choose(folder, Choice())


def plan_folder(root: Path) -> tuple[Path, plan.Plan, TrainConfig]:
    """A training run's folder with its plan."""
    folder = prepare_folder(root, [{**row, "family": "caption"} for row in rows(60)], parts=2)
    lengths = measure(dict(enumerate(part_paths(folder))), tiny_processor())
    config = TrainConfig(pack_length=128, packs_per_step=4, samples_per_pack=0)
    made = plan.build(lengths, config)
    run_folder = root / "sft-1"
    run_folder.mkdir()
    made.save(run_folder / "plan.parquet")
    return run_folder, made, config


def test_packs_are_drawn_to_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder, made, config = plan_folder(tmp_path)
    limits = packs_drawing.Limits(config.pack_length, 0)
    for drawn in packs_drawing.choose(made, limits, 0, 100):
        assert drawn.items == made.packs(drawn.step)[drawn.number - 4 * drawn.step]
        caption, bar, lengths, _ = packs_drawing.to_text(drawn, NUM_IMAGE_TOKENS, 128).plain.split("\n")
        assert f"{drawn.tokens} of 128 positions" in caption
        assert len(bar) == 128
        assert bar.count("·") == 128 - drawn.tokens
        assert bar.count("|") == len(drawn.items)
        assert lengths.split() == [str(item.tokens) for item in drawn.items]
        wanted = sum(item.pictures * NUM_IMAGE_TOKENS for item in drawn.items)
        assert bar.count("░") == wanted - sum(item.pictures > 0 for item in drawn.items)
    assert run(run_folder, "--packs", "2", "--step", "1") == 0
    out = capsys.readouterr().out
    assert "step 1 · pack 4 ·" in out
    assert "step 1 · pack 5 ·" in out
    assert "pictures are among the words" in out
    assert run(run_folder / "plan.parquet", "--packs", "2", "--recipe", "tiny", "--html", tmp_path / "p.html") == 0
    page = Page((tmp_path / "p.html").read_text())
    assert page.words.count("positions") >= 2
    assert run(run_folder, "--packs", "2", "--step", "99") == 2
    assert "it has no step 99" in capsys.readouterr().err


def test_padded_samples_are_drawn_against_the_longest_of_their_step(tmp_path: Path) -> None:
    _, made, _ = plan_folder(tmp_path)
    alone = packs_drawing.choose(made, packs_drawing.Limits(128, 1), 0, 4)
    assert {drawn.length for drawn in alone} == {max(drawn.tokens for drawn in alone)}
