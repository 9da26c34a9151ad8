"""The engine: the same answers as `model.generate`, whoever else is in the batch."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tiny_model import ask, picture, tiny_model

from tinyvlm.errors import InputError
from tinyvlm.generation import Completion, Engine, Sampling
from tinyvlm.generation.sampling import Dice, Transcript, choose
from tinyvlm.model import Sample, TinyVLMProcessor

LENGTH = 10


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_model(tmp_path_factory.mktemp("engine"), seed=3)


@pytest.fixture
def engine(built: Any) -> Engine:
    return Engine(*built)


@pytest.fixture(scope="module")
def prompts(built: Any) -> list[Sample]:
    """Of unequal length, with none to two pictures."""
    asked = [("what " * (1 + 3 * row % 7) + "?", row % 3) for row in range(7)]
    return [
        built[1].encode(ask(text, pictures=count), [picture(row + i) for i in range(count)], open_answer=True)
        for row, (text, count) in enumerate(asked)
    ]


def by_transformers(engine: Engine, prompt: Sample, **options: Any) -> list[int]:
    batch = engine.processor.collate([prompt])
    out = engine.model.generate(**batch, max_new_tokens=LENGTH, **options)[0, len(prompt.input_ids) :].tolist()
    return [token for token in out if token not in engine.processor.end_ids]


def test_greedy_answers_are_those_of_generate(engine: Engine, prompts: list[Sample]) -> None:
    answers = engine.generate(prompts, Sampling(max_new_tokens=LENGTH))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert list(answer.token_ids) == by_transformers(engine, prompt)
        assert list(answer.token_ids) == by_transformers(engine, prompt, use_cache=False)
        assert (answer.num_prompt_tokens, answer.num_image_tokens) == (len(prompt.input_ids), 4 * len(prompt.pixels))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_an_answer_is_the_same_in_any_batch(engine: Engine, prompts: list[Sample], temperature: float) -> None:
    samplings = [
        Sampling(max_new_tokens=2 + row, temperature=temperature, seed=row, top_p=0.95) for row in range(len(prompts))
    ]
    alone = [engine.generate([prompt], sampling)[0] for prompt, sampling in zip(prompts, samplings, strict=True)]
    assert engine.generate(prompts, samplings) == alone
    engine.batch_size = 3
    assert engine.generate(prompts, samplings) == alone
    assert [len(answer.token_ids) for answer in alone] == [2 + row for row in range(len(prompts))]


def test_a_seed_repeats_an_answer(engine: Engine, prompts: list[Sample]) -> None:
    def sampled(seed: int | None, **options: Any) -> tuple[int, ...]:
        sampling = Sampling(max_new_tokens=LENGTH, temperature=1.5, seed=seed, **options)
        return engine.generate(prompts[:1], sampling)[0].token_ids

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in (1, 2, None, None)}) == 4
    greedy = engine.generate(prompts[:1], Sampling(max_new_tokens=LENGTH))[0].token_ids
    assert sampled(1, top_k=1) == greedy
    assert sampled(2, top_p=1e-6) == greedy


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 3.0, 0.0, 2.0]])
    count = 4000

    def frequencies(sampling: Sampling) -> list[float]:
        dice = [Dice(row) for row in range(count)]
        drawn = Counter(choose(logits.expand(count, 4), [sampling] * count, dice))
        return [drawn[token] / count for token in range(4)]

    expected = (logits[0] / 0.7).softmax(0).tolist()
    assert frequencies(Sampling(temperature=0.7)) == pytest.approx(expected, abs=0.03)
    top_2 = torch.tensor([-torch.inf, 3.0, -torch.inf, 2.0]).softmax(0).tolist()
    assert frequencies(Sampling(temperature=1.0, top_k=2)) == pytest.approx(top_2, abs=0.03)
    # The likeliest has 0.64, the next 0.24: both are needed for 0.7.
    assert frequencies(Sampling(temperature=1.0, top_p=0.7)) == pytest.approx(top_2, abs=0.03)
    assert frequencies(Sampling(temperature=1.0, top_p=0.6)) == [0, 1, 0, 0]


def test_the_model_ends_its_answer(engine: Engine, prompts: list[Sample]) -> None:
    """Made likely, the end-of-turn token ends the answer, and is no part of it."""
    free = engine.generate(prompts, Sampling(max_new_tokens=LENGTH))
    engine._ends = frozenset(answer.token_ids[3] for answer in free)
    for before, after in zip(free, engine.generate(prompts, Sampling(max_new_tokens=LENGTH)), strict=True):
        assert after.finish_reason == "stop"
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        assert len(after.token_ids) <= 3
    assert {answer.finish_reason for answer in free} == {"length"}


def test_stop_texts_cut_the_answer(engine: Engine, prompts: list[Sample]) -> None:
    whole = engine.generate(prompts[:1], Sampling(max_new_tokens=LENGTH))[0]
    stop = whole.text[3:6]
    cut = engine.generate(prompts[:1], Sampling(max_new_tokens=LENGTH, stop=("never said", stop)))[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    pieces = list(engine.stream(prompts[0], Sampling(max_new_tokens=LENGTH, stop=(stop,))))
    assert "".join(str(piece) for piece in pieces[:-1]) == cut.text


def test_streamed_pieces_make_the_answer(engine: Engine, prompts: list[Sample]) -> None:
    for prompt, answer in zip(prompts, engine.generate(prompts, Sampling(max_new_tokens=LENGTH)), strict=True):
        *pieces, last = engine.stream(prompt, Sampling(max_new_tokens=LENGTH))
        assert last == answer
        assert isinstance(last, Completion)
        assert all(isinstance(piece, str) and piece for piece in pieces)
        assert "".join(str(piece) for piece in pieces) == answer.text
        assert len(pieces) > 1


def test_pieces_are_whole_characters_and_never_taken_back(built: Any) -> None:
    processor: TinyVLMProcessor = built[1]
    text = "naïve 🦊 fox — END. more"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    decode = processor.tokenizer.backend_tokenizer.decode
    transcript = Transcript(decode)
    pieces = [transcript.push(token) for token in ids]
    assert "".join(pieces) == transcript.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    stopped = Transcript(decode, ("END", " 🦊 wolf"))
    shown = [stopped.push(token) for token in ids if not stopped.is_cut]
    assert "".join(shown) + stopped.flush() == stopped.text == "naïve 🦊 fox — "
    unfinished = Transcript(decode, ("more than this",))
    held = "".join(unfinished.push(token) for token in ids)
    assert held == "naïve 🦊 fox — END. "
    assert held + unfinished.flush() == text


def test_a_picture_is_encoded_once(engine: Engine, built: Any) -> None:
    asked = [
        built[1].encode(ask("what " * n, pictures=2), [picture(1), picture(n % 2)], open_answer=True)
        for n in range(1, 6)
    ]
    first = engine.generate(asked, Sampling(max_new_tokens=3))
    assert engine.num_pictures_encoded == 2
    assert engine.generate(asked, Sampling(max_new_tokens=3)) == first
    assert engine.num_pictures_encoded == 2
    forgetful = Engine(*built, feature_cache_bytes=0)
    assert forgetful.generate(asked, Sampling(max_new_tokens=3)) == first
    assert forgetful.generate(asked, Sampling(max_new_tokens=3)) == first
    assert forgetful.num_pictures_encoded == 4
    one = 4 * 32 * 4  # bytes of one picture's features
    small = Engine(*built, feature_cache_bytes=one)
    small.generate(asked, Sampling(max_new_tokens=3))
    assert len(small._features) == 1


def test_questions_about_one_picture_share_its_reading(engine: Engine, built: Any) -> None:
    """A batch with many questions for each picture answers as each question alone does."""
    asked = [
        built[1].encode(ask("what " * (1 + n % 4) + tail, pictures=1), [picture(n % 3)], open_answer=True)
        for n, tail in enumerate(["?", " shape", " is red?"] * 4)
    ]
    alone = [engine.generate([one], Sampling(max_new_tokens=LENGTH))[0] for one in asked]
    read: list[int] = []
    forward = engine.model.forward
    engine.model.forward = lambda **inputs: read.append(inputs["input_ids"].numel()) or forward(**inputs)
    try:
        assert engine.generate(asked, Sampling(max_new_tokens=LENGTH)) == alone
        same_length = [asked[0]] * 4
        assert engine.generate(same_length, Sampling(max_new_tokens=LENGTH)) == [alone[0]] * 4
    finally:
        del engine.model.forward
    beginning = asked[0].input_ids.tolist().index(built[1].image_token_id) + 4
    assert read[0] == 3 * beginning


def test_another_picture_gives_another_answer(engine: Engine, built: Any) -> None:
    asked = [built[1].encode(ask(), [picture(n)], open_answer=True) for n in range(4)]
    assert len({answer.token_ids for answer in engine.generate(asked, Sampling(max_new_tokens=LENGTH))}) > 1


def test_cancelling_one_answer_leaves_the_others(engine: Engine, prompts: list[Sample]) -> None:
    whole = engine.generate(prompts, Sampling(max_new_tokens=LENGTH))
    decoding = engine.start(prompts, [Sampling(max_new_tokens=LENGTH)] * len(prompts))
    finished: dict[int, Completion] = {}
    for step in range(LENGTH + 1):
        if step == 2:
            for index in (0, 2, 4, 5):
                decoding.cancel(index)
        for piece in decoding.step():
            if piece.completion is not None:
                finished[piece.index] = piece.completion
    assert decoding.is_done
    assert finished == {index: whole[index] for index in (1, 3, 6)}
    assert decoding.step() == []


def test_control_tokens_are_never_said(built: Any, prompts: list[Sample]) -> None:
    model, processor = copy.deepcopy(built[0]), built[1]
    with torch.no_grad():
        model.language.lm_head.weight = torch.nn.Parameter(model.language.lm_head.weight.clone())
        model.language.lm_head.weight[list(processor.silent_ids)] *= 50
    for answer in Engine(model, processor).generate(prompts, Sampling(max_new_tokens=30, temperature=1.0, seed=0)):
        assert not set(answer.token_ids) & set(processor.silent_ids)


def test_the_context_bounds_prompt_and_answer(engine: Engine, built: Any) -> None:
    room = engine.context_length
    near = built[1].encode(ask("a" + " b" * (room - 15), pictures=0), open_answer=True)
    left = room - len(near.input_ids)
    assert 0 < left < 20
    answer = engine.generate([near], Sampling(max_new_tokens=100))[0]
    assert len(answer.token_ids) <= left
    full = built[1].encode(ask("a" + " b" * room, pictures=0), open_answer=True)
    with pytest.raises(InputError, match=rf"prompt has {len(full.input_ids)} tokens, .* model's {room}") as caught:
        engine.generate([full])
    assert caught.value.field == "messages"


def test_no_samples_no_answers(engine: Engine, prompts: list[Sample]) -> None:
    assert engine.generate([]) == []
    with pytest.raises(InputError, match="7 samples but 1 samplings"):
        engine.generate(prompts, [Sampling()])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", 2.5),
        ("top_p", 0.0),
        ("top_k", -1),
        ("stop", ("",)),
    ],
)
def test_wrong_sampling_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{setting} is ") as caught:
        Sampling(**{setting: value})
    assert caught.value.field == setting
