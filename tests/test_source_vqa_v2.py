"""VQA v2: the official pair of files becomes conversations, and nothing of it gets lost unseen."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from test_records import jpeg

from tinyvlm.data.prepare import Prepare, PrepareConfig
from tinyvlm.data.prepare_input import open_prepare
from tinyvlm.data.rewriting import RewriteConfig, keeps, sentences_in
from tinyvlm.data.sources.sentences import to_sentence
from tinyvlm.data.sources.vqa_v2 import kind_and_part
from tinyvlm.errors import ClusterError, ConfigError, DataError
from tinyvlm.images import PictureConfig
from tinyvlm.stage_run import StageRun, run_local

SIZE = 32
TRAIN = [
    (9, "What color is the man's shirt?", "blue", "what color is the", "other"),
    (9, "Is there a cat?", "no", "is there a", "yes/no"),
    (9, "How many people are in the picture?", "2", "how many people are in", "number"),
    (9, "Why is she smiling?", "happy", "why is the", "other"),
    (25, "What is this?", "giraffe", "what is this", "other"),
]
VAL = [(42, "Is there a dog?", "yes", "is there a", "yes/no"), (42, "What is it?", "dog", "what is", "other")]


def questions_of(part: str, asked: list[tuple[int, str, str, str, str]]) -> dict[str, Any]:
    """The official layout."""
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "year": 2017},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_subtype": part,
        "questions": [
            {"image_id": image, "question": question, "question_id": image * 1000 + number}
            for number, (image, question, *_) in enumerate(asked)
        ],
    }


def annotations_of(part: str, asked: list[tuple[int, str, str, str, str]]) -> dict[str, Any]:
    return {
        "info": {"description": "This is v2.0 of the VQA dataset.", "year": 2017},
        "license": {"name": "Creative Commons Attribution 4.0 International License"},
        "data_subtype": part,
        "annotations": [
            {
                "question_type": question_type,
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer if n < 8 else "other", "answer_confidence": "yes", "answer_id": n + 1}
                    for n in range(10)
                ],
                "image_id": image,
                "answer_type": answer_type,
                "question_id": image * 1000 + number,
            }
            for number, (image, _, answer, question_type, answer_type) in enumerate(asked)
        ],
        "data_type": "mscoco",
    }


def names(part: str) -> tuple[str, str]:
    return f"v2_OpenEnded_mscoco_{part}_questions.json", f"v2_mscoco_{part}_annotations.json"


def official(root: Path) -> list[Path]:
    """The folder of the files, as the official site has them, and the pictures in `root`/pictures."""
    folder = root / "vqa"
    folder.mkdir(parents=True)
    for part, asked in (("train2014", TRAIN), ("val2014", VAL)):
        for name, content in zip(names(part), (questions_of(part, asked), annotations_of(part, asked)), strict=True):
            (folder / name).write_text(json.dumps(content))
        for image in {image for image, *_ in asked}:
            path = root / "pictures" / part / f"COCO_{part}_{image:012d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(image))
    return [folder]


def config(root: Path, **changes: Any) -> PrepareConfig:
    given = {"source": "vqa_v2", "count_tokens": False, "validation_share": 0.0, "images": {"": str(root / "pictures")}}
    return PrepareConfig(**{**given, **changes})


def prepare(places: list[Path], root: Path, settings: PrepareConfig) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows in the order of their keys, and what the listing says of the join."""
    stage = Prepare(settings, picture=PictureConfig(size=SIZE, tower_size=SIZE))
    source = open_prepare(stage, places, root)
    run = StageRun(stage, source, root)
    manifest = run_local(run)
    rows = [row for name in manifest.files for row in pq.read_table(run.folder / "data" / name).to_pylist()]
    listed = Path(source.parts[0].path).parent.parent
    account: dict[str, Any] = json.loads((listed / "stats.json").read_text())["vqa_v2"]
    return sorted(rows, key=lambda row: row["key"]), account


def words(row: dict[str, Any]) -> list[str]:
    return ["".join(part["text"] or "<image>" for part in message["parts"]) for message in row["messages"]]


def test_questions_and_answers_become_conversations(tmp_path: Path) -> None:
    rows, account = prepare(official(tmp_path), tmp_path / "out", config(tmp_path))
    assert [row["status"] for row in rows] == ["ok"] * 7
    assert [words(row) for row in rows] == [
        ["<image>What color is the man's shirt?", "The man's shirt is blue."],
        ["<image>Is there a cat?", "No, there is no cat."],
        ["<image>How many people are in the picture?", "There are 2 people in the picture."],
        ["<image>Why is she smiling?", "Happy."],
        ["<image>What is this?", "It's giraffe."],
        ["<image>Is there a dog?", "Yes, there is a dog."],
        ["<image>What is it?", "It's dog."],
    ]
    assert [(row["source"], row["split"], row["family"]) for row in rows] == [
        *[("vqa_v2/train2014", "train", "vqa")] * 5,
        *[("vqa_v2/val2014", "test", "vqa")] * 2,
    ]
    sent = [hashlib.sha256(jpeg(image)).hexdigest() for image, *_ in [*TRAIN, *VAL]]
    assert [row["images"][0]["sha256"] for row in rows] == sent
    assert json.loads(rows[0]["meta"]) == {
        "set": "train2014",
        "image_id": 9,
        "questions": [9000],
        "question_types": ["what color is the"],
        "answer_types": ["other"],
        "answer": "blue",
        "answers": ["blue"] * 8 + ["other"] * 2,
    }
    told = account["parts"]["train2014"]
    assert (told["questions"], told["annotations"], told["joined"], told["complete"]) == (5, 5, 5, True)
    for kind, name in zip(("questions", "annotations"), names("train2014"), strict=True):
        assert told[f"{kind}_sha256"] == hashlib.sha256((tmp_path / "vqa" / name).read_bytes()).hexdigest()
    assert told["questions_unmatched"] == told["annotations_unmatched"] == 0


def test_what_fits_nothing_is_counted_and_named(tmp_path: Path) -> None:
    (folder,) = official(tmp_path)
    for name in names("val2014"):
        (folder / name).unlink()
    asking, answering = (folder / name for name in names("train2014"))
    questions, annotations = json.loads(asking.read_text()), json.loads(answering.read_text())
    questions["questions"][0]["question_id"] = 77  # has no annotation now, and 9000 no question
    questions["questions"][1]["image_id"] = 10  # the same question about another picture is another one
    questions["questions"].append(questions["questions"][2])
    questions["questions"].append({"question": "?", "image_id": 9})
    annotations["annotations"].append({**annotations["annotations"][4], "question_id": 88})
    annotations["annotations"][3]["multiple_choice_answer"] = None
    asking.write_text(json.dumps(questions))
    answering.write_text(json.dumps(annotations))
    rows, account = prepare([folder], tmp_path / "out", config(tmp_path))
    told = account["parts"]["train2014"]
    assert (told["questions"], told["annotations"], told["joined"]) == (7, 6, 3)
    assert (told["questions_unmatched"], told["first_questions_unmatched"]) == (2, [77, 9001])
    assert (told["annotations_unmatched"], told["first_annotations_unmatched"]) == (3, [9000, 9001, 88])
    assert {row["detail"] for row in rows if row["status"] == "bad_record"} == {
        "question 77 about picture 9 has no annotation",
        "question 9001 about picture 10 has no annotation",
        "the question stands twice in its file",
        next(row["detail"] for row in rows if "without question_id" in (row["detail"] or "")),
    }
    assert sorted(row["status"] for row in rows) == ["bad_record"] * 4 + ["bad_text"] + ["ok"] * 2
    assert {row["family"] for row in rows} == {"vqa"}


def test_the_order_of_the_files_makes_no_difference(tmp_path: Path) -> None:
    (folder,) = official(tmp_path)
    rows, account = prepare([folder], tmp_path / "one", config(tmp_path))
    path = folder / names("train2014")[0]
    content = json.loads(path.read_text())
    content["questions"].reverse()
    path.write_text(json.dumps(content))
    again, told = prepare([folder / name for name in sorted(p.name for p in folder.iterdir())[::-1]], tmp_path / "two",
                          config(tmp_path))  # fmt: skip
    assert again == rows
    assert told["parts"]["train2014"]["joined_sha256"] == account["parts"]["train2014"]["joined_sha256"]


def test_answers_may_stay_short_and_val_may_be_trained_on(tmp_path: Path) -> None:
    settings = config(tmp_path, answer_form="short", train_on=("train", "val"))
    rows, _ = prepare(official(tmp_path), tmp_path / "out", settings)
    assert [words(row)[1] for row in rows] == ["blue", "no", "2", "happy", "giraffe", "yes", "dog"]
    assert {row["split"] for row in rows} == {"train"}


def test_questions_about_one_picture_may_be_asked_together(tmp_path: Path) -> None:
    rows, _ = prepare(official(tmp_path), tmp_path / "out", config(tmp_path, questions_per_conversation=3))
    assert [(row["family"], row["split"], len(row["messages"]) // 2) for row in rows] == [
        ("multi_turn", "train", 3),
        ("vqa", "train", 1),
        ("vqa", "train", 1),
        ("vqa", "test", 1),
        ("vqa", "test", 1),
    ]
    assert words(rows[0])[:3] == [
        "<image>What color is the man's shirt?",
        "The man's shirt is blue.",
        "Is there a cat?",
    ]
    meta = json.loads(rows[0]["meta"])
    assert meta["answer"] == ["blue", "no", "2"]
    assert [len(answers) for answers in meta["answers"]] == [10, 10, 10]


def test_an_answer_that_is_missing_spoils_no_neighbour(tmp_path: Path) -> None:
    (folder,) = official(tmp_path)
    path = folder / names("train2014")[1]
    content = json.loads(path.read_text())
    content["annotations"][1]["multiple_choice_answer"] = ""
    path.write_text(json.dumps(content))
    rows, _ = prepare([folder], tmp_path / "out", config(tmp_path, questions_per_conversation=5))
    assert [(row["status"], len(row["messages"]) // 2) for row in rows][:4] == [
        ("ok", 1), ("bad_text", 1), ("ok", 2), ("ok", 1)
    ]  # fmt: skip


def test_files_are_told_apart_by_name_or_by_what_they_hold(tmp_path: Path) -> None:
    (folder,) = official(tmp_path)
    asking, answering = names("train2014")
    (folder / asking).rename(folder / "a.json")
    (folder / answering).rename(folder / "b.json")
    (folder / "v2_mscoco_train2014_complementary_pairs.json").write_text("[[1, 2]]")
    test = "v2_OpenEnded_mscoco_test-dev2015_questions.json"
    (folder / test).write_text(json.dumps(questions_of("test-dev2015", VAL)))
    assert kind_and_part(str(folder / "a.json")) == ("questions", "train2014")
    assert kind_and_part(str(folder / "b.json")) == ("annotations", "train2014")
    assert kind_and_part(str(folder / test)) == ("questions", "test-dev2015")
    rows, account = prepare([folder], tmp_path / "out", config(tmp_path))
    assert len(rows) == 7
    assert {Path(file).name: why for file, why in account["passed_over"].items()} == {
        "v2_mscoco_train2014_complementary_pairs.json": "neither questions nor annotations",
        test: "questions without answers",
    }


def test_files_that_do_not_fit_are_refused_with_the_reason(tmp_path: Path) -> None:
    (folder,) = official(tmp_path)
    asking, answering = (folder / name for name in names("train2014"))
    content = json.loads(answering.read_text())
    with pytest.raises(DataError, match="annotations of train2014 are not"):
        prepare([asking], tmp_path / "out", config(tmp_path))
    (folder / "annotations.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="both hold the annotations of train2014"):
        prepare([folder], tmp_path / "out", config(tmp_path))
    (folder / "annotations.json").unlink()
    for annotation in content["annotations"]:
        annotation["best"] = annotation.pop("multiple_choice_answer")
    answering.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no field 'multiple_choice_answer'; it has .*best"):
        prepare([folder], tmp_path / "out", config(tmp_path))
    renamed = config(tmp_path, columns={"multiple_choice_answer": "best"})
    assert len(prepare([folder], tmp_path / "out", renamed)[0]) == 7
    answering.write_text(json.dumps(content)[:-500])
    with pytest.raises(DataError, match="cannot be read as json"):
        prepare([folder], tmp_path / "out", renamed)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="wants v2_OpenEnded"):
        prepare([tmp_path / "other"], tmp_path / "out", config(tmp_path))


def test_a_limit_reads_no_further_and_says_so(tmp_path: Path) -> None:
    rows, account = prepare(official(tmp_path), tmp_path / "out", config(tmp_path, limit=2))
    assert len(rows) == 2
    assert account["parts"] == {"train2014": {"complete": False}}


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        ("Is there a dog in the picture?", "yes", "Yes, there is a dog in the picture."),
        ("Is there an apple?", "no", "No, there is no apple."),
        ("Are there any people on the beach?", "yes", "Yes, there are people on the beach."),
        ("Are there any people on the beach?", "no", "No, there are no people on the beach."),
        ("Are there people?", "no", "No."),
        ("Is there water?", "yes", "Yes, there is water."),
        ("Is there anyone here?", "yes", "Yes."),
        ("Is there a lot of snow?", "no", "No."),
        ("Is there a cat or a dog?", "yes", "Yes."),
        ("Is there a dog and a cat?", "no", "No."),
        ("Are there more than 3 birds?", "no", "No."),
        ("Is this a train station?", "no", "No, this is not a train station."),
        ("Is this photo taken outside?", "yes", "Yes."),
        ("Is it raining?", "yes", "Yes, it is raining."),
        ("Is he wearing anything on his head?", "yes", "Yes."),
        ("Can they swim?", "no", "No, they cannot swim."),
        ("Isn't it cold?", "yes", "Yes."),
        ("Does the man have a hat?", "yes", "Yes."),
        ("What color is the bus?", "red and white", "The bus is red and white."),
        ("What color are the flowers in the vase", "pink", "The flowers in the vase are pink."),
        ("What color is the man wearing?", "red", "It's red."),
        ("What color hair does she have?", "brown", "Brown."),
        ("How many cats are there?", "2", "There are 2 cats."),
        ("How many cats are there?", "1", "1."),
        ("How many dogs are visible in the photo?", "3", "There are 3 dogs visible in the photo."),
        ("How many people are there?", "lot", "Lot."),
        ("How many of the cats are black?", "2", "2."),
        ("How many cows are eating?", "4", "4."),
        ("What is the man doing?", "skateboarding", "Skateboarding."),
        ("What sport is this?", "tennis", "It's tennis."),
        ("What number is on the bus?", "52", "52."),
        ("Where is the dog?", "on bed", "On bed."),
        ("What is this?", "it's a cat!", "It's a cat!"),
        ("What time is it?", "", ""),
        ("", "yes", "Yes."),
    ],
)
def test_sentences_by_rules(question: str, answer: str, sentence: str) -> None:
    assert to_sentence(question, answer) == sentence
    assert keeps(answer, sentence) or not answer


class FakeEndpoint:
    """Says sentences about what it is asked; some of them not as it should."""

    def __init__(self, url: str) -> None:
        self.url, self.asked, self.mood = url, [], "good"  # type: ignore[var-annotated]

    def answer(self, body: dict[str, Any]) -> tuple[int, str]:
        lines = [
            json.loads(line) for line in re.findall(r"^\{\"number.*$", body["messages"][1]["content"], re.MULTILINE)
        ]
        self.asked.append([(line["question"], line["answer"]) for line in lines])
        if self.mood == "away":
            return 500, "away"
        said = {
            str(line["number"]): "I cannot tell." if line["answer"] == "happy" else f"{line['answer']} it is, surely."
            for line in lines
        }
        if self.mood == "forgets" and len(lines) > 1:
            said.popitem()
        return 200, "Sure!\n```json\n" + json.dumps({"sentences": said}) + "\n```"


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = fake.answer(body)
            data = json.dumps({"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text})
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data.encode())

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake = FakeEndpoint(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield fake
    server.shutdown()
    server.server_close()


def rewriting(root: Path, endpoint: FakeEndpoint, **changes: Any) -> PrepareConfig:
    given = {"url": endpoint.url, "model": "m", "cache": str(root / "said.sqlite"), "pairs_per_request": 2}
    return config(root, answer_form="rewritten", rewrite=RewriteConfig(**{**given, **changes}))


@pytest.mark.parametrize("mood", ["good", "forgets"])
def test_an_endpoint_may_write_the_sentences(tmp_path: Path, endpoint: FakeEndpoint, mood: str) -> None:
    endpoint.mood = mood
    folder = official(tmp_path)
    rows, account = prepare(folder, tmp_path / "out", rewriting(tmp_path, endpoint))
    assert [words(row)[1] for row in rows] == [
        "blue it is, surely.",
        "no it is, surely.",
        "2 it is, surely.",
        "Happy.",  # refused: it did not say what was to be said
        "giraffe it is, surely.",
        "Yes, there is a dog.",  # test rows stay independent of the model
        "It's dog.",
    ]
    assert account["parts"]["rewritten"] == {"asked": 5, "rewritten": 4, "refused": 1}
    assert json.loads(rows[0]["meta"])["answer"] == "blue"
    num_asked = len(endpoint.asked)
    again, told = prepare(folder, tmp_path / "again", rewriting(tmp_path, endpoint, num_requests=1, timeout_s=9.0))
    assert again == rows
    assert len(endpoint.asked) == num_asked
    assert told["parts"]["rewritten"] == {"rewritten": 4, "refused": 1}


def test_equal_questions_are_asked_once(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    (folder,) = official(tmp_path)
    for part in ("train2014", "val2014"):
        for name in names(part):
            (folder / name).unlink()
    asked = [(image, "Is there a cat?", "no", "is there a", "yes/no") for image in (9, 25, 9, 25)]
    asking, answering = names("train2014")
    (folder / asking).write_text(json.dumps(questions_of("train2014", asked)))
    (folder / answering).write_text(json.dumps(annotations_of("train2014", asked)))
    _, account = prepare([folder], tmp_path / "out", rewriting(tmp_path, endpoint))
    assert endpoint.asked == [[("Is there a cat?", "no")]]
    assert account["parts"]["rewritten"] == {"asked": 1, "rewritten": 4, "refused": 0}


def test_an_endpoint_that_goes_away_costs_only_what_it_had_not_said(
    tmp_path: Path, endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyvlm.endpoint.asyncio.sleep", _no_sleep)
    folder, good = official(tmp_path), endpoint.answer

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        endpoint.mood = "good" if not endpoint.asked else "away"
        return good(body)

    endpoint.answer = answer  # type: ignore[method-assign]
    settings = rewriting(tmp_path, endpoint, num_requests=1)
    with pytest.raises(ClusterError, match=r"prepare\.rewrite\.url"):
        prepare(folder, tmp_path / "out", settings)
    assert not list((tmp_path / "out").glob("*/manifest.json"))
    first = endpoint.asked[0]
    endpoint.asked, endpoint.answer = [], good  # type: ignore[method-assign]
    endpoint.mood = "good"
    prepare(folder, tmp_path / "out", settings)
    assert set(first).isdisjoint(pair for pairs in endpoint.asked for pair in pairs)


async def _no_sleep(delay_s: float) -> None:
    return None


def test_settings_of_rewriting_are_wanted_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewrite\.url"):
        PrepareConfig(source="vqa_v2", answer_form="rewritten")
    with pytest.raises(ConfigError, match=r"rewrite\.cache"):
        RewriteConfig(url="http://x", model="m")
    (tmp_path / "cache").write_text("this is no database, and it is long enough to be looked at " * 50)
    settings = config(
        tmp_path,
        answer_form="rewritten",
        rewrite=RewriteConfig(url="http://127.0.0.1:9", model="m", cache=str(tmp_path / "cache")),
    )
    with pytest.raises(DataError, match=r"rewrite\.cache"):
        prepare(official(tmp_path), tmp_path / "out", settings)


@pytest.mark.parametrize(
    ("answer", "sentence", "kept"),
    [
        ("red and white", "The bus is Red and, mostly, white.", True),
        ("red and white", "It is white and red.", False),
        ("no", "No, there is none.", True),
        ("no", "There is no dog.", False),
        ("yes", "Yes", True),
        ("2", "There are two.", False),
        ("2", "There are 22.", False),
        ("dog", "dog " * 100, False),
        ("!!", "!!", False),
    ],
)
def test_a_sentence_keeps_the_answers_words(answer: str, sentence: str, kept: bool) -> None:
    assert keeps(answer, sentence) is kept


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"sentences": {"1": "a"}}', {"1": "a"}),
        ('Of course: {"1": "a", "2": 7}', {"1": "a"}),
        ('{"sentences": ["a", "b"]}', {"1": "a", "2": "b"}),
        ("nothing", {}),
        ("{[", {}),
        ('{"sentences": "a"}', {}),
    ],
)
def test_sentences_are_found_in_what_a_model_says(text: str, found: dict[str, str]) -> None:
    assert sentences_in(text) == found
