"""Label files: what the packaged ones promise, what is the same label, and growing a category."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tinyvlm import cli
from tinyvlm.data import towers
from tinyvlm.data.explore import ExploreConfig
from tinyvlm.endpoint import Endpoint
from tinyvlm.errors import ClusterError, ConfigError, DataError
from tinyvlm.labels import endpoint as asking
from tinyvlm.labels import load_labels
from tinyvlm.labels.endpoint import ask_for_labels
from tinyvlm.labels.grow import Growth, candidates_in_text, read_list, to_text
from tinyvlm.labels.rules import (
    CATEGORY_SIZES,
    MAX_DESCRIPTION_BYTES,
    Catalogue,
    clean_description,
    clean_name,
    key_of,
    review,
    words_of,
)

KEY = "sk-secret-1234567890"


# --- the packaged files ---------------------------------------------------------------------------------------------


def test_the_base_file_keeps_its_promises() -> None:
    base = load_labels("base")
    assert review(base) == ([], [])
    sizes = Counter(label.category for label in base.labels)
    assert len(sizes) >= 15
    assert all(CATEGORY_SIZES[0] <= size <= CATEGORY_SIZES[1] for size in sizes.values())
    assert len({key_of(label.name) for label in base.labels}) == len(base.labels)
    assert len({key_of(label.description) for label in base.labels}) == len(base.labels)


def test_the_base_files_descriptions_say_what_one_sees() -> None:
    """Three words that the name does not have, beside the little ones that say nothing."""
    little = set("of with in on and or to for at from by its it pair piece close under over".split())
    empty = [
        label.name
        for label in load_labels("base").labels
        if len(set(words_of(label.description)) - set(words_of(label.name)) - little) < 3
    ]
    assert empty == []


@pytest.mark.parametrize("name", ["base", "toy"])
def test_every_text_fits_clips_77_tokens(name: str) -> None:
    """Counted with the packaged tokenizer, whose small vocabulary cuts English into more pieces than OpenAI's."""
    tokenizer = AutoTokenizer.from_pretrained(towers.place("toy:clip"))
    texts = [ExploreConfig().text_of(label) for label in load_labels(name).labels]
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= 77


def test_packaged_files_are_written_as_the_command_writes_them() -> None:
    for name in ("base", "toy"):
        path = Path(asking.__file__).parent / f"{name}.json"
        assert path.read_text() == to_text(json.loads(path.read_text()))
        assert review(load_labels(name))[0] == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("not json", "cannot be used"),
        ('{"version": 1}', "categories"),
        ('{"version": 1, "categories": {}}', "no labels"),
        ('{"version": 1, "categories": {"a": {"x": "an x"}, "b": {"x": "an x"}}}', "'x' occurs twice"),
        ('{"version": 1, "categories": {"a": {"x": "an x", "x": "another"}}}', "'x' occurs twice"),
        ('{"version": 1, "categories": {"a": {"x": "an x"}, "a": {"y": "a y"}}}', "'a' occurs twice"),
        ('{"version": 1, "categories": {"a": {"x": " "}}}', "no description"),
        ('{"version": 1, "categories": {"a": {"x": 3}}}', "no description"),
        ('{"version": "new", "categories": {"a": {"x": "an x"}}}', "cannot be used"),
    ],
)
def test_bad_label_files_say_what_is_wrong(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        load_labels(str(tmp_path / "labels.json"))


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of base, toy"):
        load_labels("nowhere")


# --- what is the same label -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("Cat", "cats"), ("the cat", "a cat"), ("T-shirt", "t shirts"), ("hot-air  balloon", "hot air balloons")),
        *(("berry", "berries"), ("box", "boxes"), ("wolf", "wolves"), ("child's tricycle", "Childs tricycles")),
        *(("café", "Cafes"), ("tomato", "tomatoes"), ("church", "churches"), ("glass", "glass."), ("bus", "buses")),
        *(("mouse", "mice"), ("cookie", "cookies"), ("person reading", "people reading"), ("pie", "pies")),
        *(("bunch of grapes", "bunches of grapes"), ("leaf", "leaves"), ("canoe", "canoes"), ("lens", "lenses")),
    ],
)
def test_the_same_label_written_otherwise(one: str, other: str) -> None:
    assert key_of(one) == key_of(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cap", "cape"),
        ("kit", "kite"),
        ("star", "stars and stripes"),
        ("bus", "bush"),
        ("chess", "chest"),
        ("an", "ant"),
    ],
)
def test_other_labels_stay_other(one: str, other: str) -> None:
    assert key_of(one) != key_of(other)


def test_names_and_descriptions_are_tidied() -> None:
    assert clean_name('  "Sea   Otter." ') == "sea otter"
    assert clean_description(" A photo of a  sleek brown animal \n on its back. ") == "a sleek brown animal on its back"
    assert clean_description("The Eiffel tower") == "the Eiffel tower"
    assert clean_description("Ming vases") == "Ming vases"


def test_review_finds_what_a_hand_made_file_has_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    animals = {"cat": "a furry animal", "Cats": "whiskers and paws", "dog": "a dog", "cow": "x" * 121}
    path.write_text(json.dumps({"version": 1, "categories": {"animals": animals, "more": {"cub": "a furry animal"}}}))
    wrong, better = review(load_labels(str(path)))
    assert wrong == [
        "'Cats' in 'animals': the same as 'cat' in 'animals'.",
        f"'cow' in 'animals': its description has 121 bytes, {MAX_DESCRIPTION_BYTES} are allowed.",
        "'cub' in 'more': described just as 'cat' in 'animals'.",
    ]
    assert better[0] == "'dog' in 'animals': its description only repeats the name."
    assert len(better) == 3
    assert Catalogue().refusal("x\x00y", "a thing") == "it has unprintable characters"


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A label file of one's own, with a note that is none of ours."""
    path = tmp_path / "mine.json"
    animals = {"zebra": "a striped horse-like animal", "cat": "a furry animal with whiskers"}
    categories = {"animals": animals, "plants": {"oak": "a broad tree with acorns"}}
    path.write_text(json.dumps({"version": 4, "about": "Mine.", "owner": "me", "categories": categories}))
    return path


def tinyvlm(*arguments: object) -> int:
    return cli.main(["labels", *map(str, arguments)])


def test_a_list_grows_a_category(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "birds.txt"
    words.write_text(
        "# birds and others\n\n"
        "Owl: A round-faced bird with large eyes.\n"
        "the cats: pets on a sofa\n"
        "oaks: several broad trees\n"
        "eagle:\n"
        "heron\n"
        "Crow: a crow\n"
        "owls: birds of the night\n"
        f"stork: {'very ' * 30}long legs\n"
        "auk: a black and white seabird\n",
        encoding="utf-8-sig",
    )
    before = mine.stat().st_ino
    assert tinyvlm("expand", "--file", mine, "--category", "Animal", "--from", words) == 0
    said = capsys.readouterr().out
    content = json.loads(mine.read_text())
    assert list(content) == ["version", "about", "owner", "categories", "history"]
    assert content["version"] == 5
    assert list(content["categories"]["animals"].items()) == [
        ("zebra", "a striped horse-like animal"),
        ("cat", "a furry animal with whiskers"),
        ("auk", "a black and white seabird"),
        ("owl", "a round-faced bird with large eyes"),
    ]
    assert content["history"] == [
        {"version": 5, "category": "animals", "source": "list birds.txt", "added": ["auk", "owl"]}
    ]
    assert mine.read_text() == to_text(content)
    assert mine.stat().st_ino != before  # written beside and renamed
    assert not list(tmp_path.glob(".*"))
    for line in (
        "added    owl: a round-faced bird with large eyes",
        "dropped  'the cats': the same as 'cat' in 'animals'",
        "dropped  'oaks': the same as 'oak' in 'plants'",
        "dropped  'eagle': no description",
        "dropped  'heron': no description",
        "dropped  'crow': its description only repeats the name",
        "dropped  'owls': the same as 'owl' in 'animals'",
    ):
        assert line in said
    assert "dropped  'stork': its description has 159 bytes" in said
    assert "version 5: 2 labels added to the category 'animals', which has 4 now." in said

    assert tinyvlm("expand", "--file", mine, "--category", "animals", "--from", words) == 0
    assert "no file was written" in capsys.readouterr().out
    assert json.loads(mine.read_text()) == content


def test_a_count_and_another_output(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.json").write_text(
        json.dumps({"labels": [{"name": f"n{i}", "description": f"d{i} e"} for i in "abc"]})
    )
    before = mine.read_bytes()
    grown = tmp_path / "deep" / "grown.json"
    options = ("--file", mine, "--category", "Sea life", "--from", tmp_path / "list.json", "--count", 2)
    assert tinyvlm("expand", *options, "--output", grown) == 0
    assert mine.read_bytes() == before
    content = json.loads(grown.read_text())
    assert content["categories"]["sea life"] == {"na": "da e", "nb": "db e"}
    assert load_labels(str(grown)).version == 5
    said = capsys.readouterr().out
    assert "dropped  'nc': more than were asked for" in said
    assert "new category 'sea life'" in said


@pytest.mark.parametrize(
    "content",
    [
        {"owl": "a bird"},
        [{"label": "owl", "description": "a bird"}],
        {"labels": [{"name": "owl", "visual_description": "a bird"}]},
        {"version": 1, "categories": {"plants": {"fern": "green fronds"}, "Animals": {"owl": "a bird"}}},
    ],
)
def test_lists_in_json(tmp_path: Path, content: object) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    assert read_list(path, "animals") == [("owl", "a bird")]


def test_lists_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "other.json").write_text('{"categories": {"plants": {"fern": "green fronds"}}}')
    for name, complaint in (("broken.json", "cannot be read"), ("none.txt", "cannot be read")):
        with pytest.raises(DataError, match=complaint):
            read_list(tmp_path / name, "animals")
    for name in ("empty.txt", "other.json"):
        with pytest.raises(DataError, match="no labels for 'animals'"):
            read_list(tmp_path / name, "animals")


# --- what models say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('{"labels": [{"name": "owl", "description": "a bird"}]}', ["owl"]),
        ('Sure! [here you go]\n```json\n[{"label": "owl", "description": "a bird"}]\n```\nEnjoy {them}.', ["owl"]),
        ('{"owl": "a bird", "crow": "a black bird"}', ["owl", "crow"]),
        ('{"category": "animals", "animals": {"owl": "a bird"}}', ["owl"]),
        ('{"labels": [{"name": "owl", "description": "a bird"}, {"name": "crow", "descr', ["owl"]),
        ('{"error": "I cannot do that"}', []),
        ("I am sorry, I only speak verse.", []),
        ("[" * 5000, []),
        ('{"labels": null, "n": 3}', []),
        ("", []),
    ],
)
def test_labels_are_found_in_what_models_say(said: str, found: list[str]) -> None:
    assert [name for name, _ in candidates_in_text(said)] == found


Answer = tuple[int, Any, dict[str, str]]


class FakeEndpoint:
    """Answers with what it is told, the last answer again and again, and remembers what it was asked."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.answers: list[Answer] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def say(self, *contents: str) -> None:
        self.answers = [(200, {"choices": [{"message": {"content": content}}]}, {}) for content in contents]

    @property
    def questions(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, _, body in self.asked]


@pytest.fixture
def fake() -> Iterator[FakeEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            endpoint.asked.append((self.path, dict(self.headers), body))
            status, content, headers = endpoint.answers[0] if len(endpoint.answers) == 1 else endpoint.answers.pop(0)
            data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint = FakeEndpoint(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield endpoint
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def labels(*names: str) -> str:
    return json.dumps(
        {"labels": [{"name": name, "description": f"looks like {name} does, with wings"} for name in names]}
    )


def growth(mine: Path, count: int = 3) -> Growth:
    return Growth(load_labels(str(mine)), "animals", count)


def quick(fake: FakeEndpoint, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": fake.url, "model": "m", "first_wait_s": 0.01, "timeout_s": 5.0, **changes})


def test_an_endpoint_grows_a_category_in_rounds_although_it_begins_with_nonsense(
    mine: Path, fake: FakeEndpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    fake.say("Roses are red.", "Here: " + labels("Owl", "cats", "oak"), labels("owls", "crow", "auk", "tern", "jay"))
    options = ("--url", f"{fake.url}/v1/", "--model", "bird-lover", "--key-env", "MY_KEY", "--count", 4)
    assert tinyvlm("expand", "--file", mine, "--category", "animals", *options) == 0
    said = capsys.readouterr()
    content = json.loads(mine.read_text())
    assert list(content["categories"]["animals"])[2:] == ["auk", "crow", "owl", "tern"]
    assert content["history"][0]["source"] == f"model bird-lover at {fake.url}/v1/"
    assert "round 1: 0 labels came, 0 of them new" in said.err
    assert "dropped  'oak': the same as 'oak' in 'plants'" in said.out
    assert "dropped  'jay': more than were asked for" in said.out
    path, headers, body = fake.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "bird-lover"
    assert body["response_format"] == {"type": "json_object"}
    assert len(fake.asked) == 3
    # What is there, was added or stands elsewhere is not to come again.
    known = re.search(r"synonyms: (.*)\.\n", fake.questions[2])
    assert known is not None
    assert known[1] == "zebra, cat, owl, cats, oak"
    assert KEY not in said.out + said.err + mine.read_text()


def test_the_asking_ends_when_nothing_new_comes(mine: Path, fake: FakeEndpoint) -> None:
    fake.say(labels("owl"), labels("owl", "cat"))
    grown = growth(mine, 30)
    rounds: list[str] = []
    ask_for_labels(quick(fake), grown, rounds.append)
    assert list(grown.added) == ["owl"]
    assert grown.missing == 29
    assert len(rounds) == 1 + asking.MAX_IDLE_ROUNDS == len(fake.asked)


def test_an_endpoint_that_only_talks_nonsense_is_an_error(mine: Path, fake: FakeEndpoint) -> None:
    before = mine.read_bytes()
    for answer in (
        (200, "<html>hello</html>", {}),
        (200, {"choices": []}, {}),
        (200, {"choices": [{"message": None}]}, {}),
    ):
        fake.answers = [answer]
        with pytest.raises(DataError, match="answered 3 times, but never with labels"):
            ask_for_labels(quick(fake), growth(mine))
    fake.say("no")
    assert tinyvlm("expand", "--file", mine, "--category", "animals", "--url", fake.url, "--model", "m") == 2
    assert mine.read_bytes() == before


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_and_failing_endpoints_are_asked_again(mine: Path, fake: FakeEndpoint, status: int) -> None:
    fake.say(labels("owl", "auk", "jay"))
    fake.answers[:0] = [(status, "busy", {"Retry-After": "0"}), (status, {"error": {"message": "busy"}}, {})]
    grown = growth(mine)
    ask_for_labels(quick(fake), grown)
    assert list(grown.added) == ["owl", "auk", "jay"]
    assert len(fake.asked) == 3


def test_an_endpoint_that_stays_busy_is_given_up(mine: Path, fake: FakeEndpoint) -> None:
    fake.answers = [(503, {"error": {"message": "overloaded"}}, {})]
    with pytest.raises(ClusterError, match=r"no answer in 4 tries \(HTTP 503: overloaded\)"):
        ask_for_labels(quick(fake), growth(mine))
    assert len(fake.asked) == 4


def test_what_came_before_the_trouble_is_kept(
    mine: Path, fake: FakeEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.say(labels("owl"))
    fake.answers.append((404, {"error": {"message": "no such model"}}, {}))
    assert tinyvlm("expand", "--file", mine, "--category", "animals", "--url", fake.url, "--model", "m") == 0
    said = capsys.readouterr()
    assert "stopped early, what came before is kept" in said.err
    assert "no such model" in said.err
    assert "(19 fewer than asked for)" in said.out
    assert "owl" in json.loads(mine.read_text())["categories"]["animals"]


def test_a_server_that_knows_no_response_format_is_asked_without(mine: Path, fake: FakeEndpoint) -> None:
    fake.say(labels("owl"), labels("auk", "jay"))
    fake.answers.insert(0, (400, {"error": {"message": "response_format is unknown"}}, {}))
    grown = growth(mine)
    ask_for_labels(quick(fake), grown)
    assert len(grown.added) == 3
    assert ["response_format" in body for _, _, body in fake.asked] == [True, False, False]


def test_refusals_are_told_without_the_key(mine: Path, fake: FakeEndpoint) -> None:
    fake.answers = [(401, {"error": {"message": f"bad key {KEY}"}}, {})]
    with pytest.raises(DataError, match=r"HTTP 401: bad key …\); put its key into the variable") as caught:
        ask_for_labels(quick(fake, key=KEY), growth(mine))
    assert KEY not in str(caught.value) + repr(quick(fake, key=KEY))
    assert len(fake.asked) == 1


def test_redirects_do_not_take_the_key_along(mine: Path, fake: FakeEndpoint) -> None:
    fake.answers = [(307, "", {"Location": f"{fake.url}/elsewhere"})]
    with pytest.raises(DataError, match="redirects to as --url"):
        ask_for_labels(quick(fake, key=KEY), growth(mine))
    assert [path for path, _, _ in fake.asked] == ["/v1/chat/completions"]


def test_a_dead_endpoint_is_one_sentence(mine: Path, fake: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ClusterError, match=r"127\.0\.0\.1:1/v1/chat/completions gave no answer in 2 tries"):
        ask_for_labels(quick(fake, url="http://127.0.0.1:1", num_tries=2), growth(mine))
    assert tinyvlm("expand", "--file", mine, "--category", "x", "--url", "ftp://there", "--model", "m") == 2
    assert "wants http(s)://host" in capsys.readouterr().err


def test_a_silent_endpoint_runs_out_of_time(mine: Path, fake: FakeEndpoint) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"no answer in 2 tries \(no answer in 0.2 s\)"):
            ask_for_labels(quick(fake, url=url, timeout_s=0.2, num_tries=2), growth(mine))


def test_an_answer_that_breaks_off_is_asked_for_again(mine: Path, fake: FakeEndpoint) -> None:
    fake.say(labels("owl", "auk", "jay"))
    fake.answers.insert(0, (200, "{", {"Content-Length": "100"}))
    grown = growth(mine)
    ask_for_labels(quick(fake), grown)
    assert len(grown.added) == 3


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--file", "base", "--from", "x.txt"), "is a packaged file; say with --output"),
        (("--file", "MINE", "--url", "http://127.0.0.1:1"), "--url wants --model"),
        (
            ("--file", "MINE", "--url", "http://u:p@127.0.0.1:1", "--model", "m"),
            "no password, got 'http://127.0.0.1:1'",
        ),
        (("--file", "MINE", "--url", "http://x/v1?key=1", "--model", "m"), "got 'http://x/v1?…'"),
        (("--file", "MINE", "--from", "x.txt", "--count", "0"), "--count is 0"),
        (("--file", "nowhere.json", "--from", "x.txt"), "neither a file nor one of"),
    ],
)
def test_wrong_options_are_one_sentence(
    mine: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    filled = [str(mine) if option == "MINE" else option for option in options]
    assert tinyvlm("expand", "--category", "animals", *filled) == 2
    assert complaint in capsys.readouterr().err


def test_list_and_check(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tinyvlm("list") == 0
    assert re.search(r"^base\tversion \d+\t\d+ labels\t", capsys.readouterr().out)
    assert tinyvlm("list", mine) == 0
    assert capsys.readouterr().out == "animals\t2\nplants\t1\n"
    assert tinyvlm("list", mine, "--category", "Plant") == 0
    assert capsys.readouterr().out == "oak: a broad tree with acorns\n"
    assert tinyvlm("list", mine, "--category", "stones") == 2
    assert "it has animals, plants" in capsys.readouterr().err
    assert tinyvlm("check", mine) == 0
    assert "note: 'plants' has 1 labels; 50 to 100 are usual." in capsys.readouterr().out
    mine.write_text('{"version": 1, "categories": {"a": {"cat": "a pet", "cats": "pets at home"}}}')
    assert tinyvlm("check", mine) == 2
    said = capsys.readouterr()
    assert "wrong: 'cats' in 'a': the same as 'cat' in 'a'." in said.out
    assert "1 labels that are doubled" in said.err
