"""Caption scores: the published vectors, and what must hold for any BLEU."""

from __future__ import annotations

import pytest

from tinyvlm.eval.captions import cider, corpus_bleu, mean_published_bleu, published_bleu, rouge_l, tokenise


@pytest.mark.parametrize(
    ("prediction", "reference", "wanted"),
    [
        ("a cat on a mat", "the cat sits on the mat .", (0.402192, 0.082097, 0.053203, 0.047399)),
        ("a cat", "a cat sits on the mat .", (0.082085, 0.082085, 0.0381, 0.025958)),
        ("dogs bark", "a cat sits on the mat .", (0, 0, 0, 0)),
        ("", "a cat sits on the mat .", (0, 0, 0, 0)),
    ],
)
def test_published_vectors(prediction: str, reference: str, wanted: tuple[float, ...]) -> None:
    assert published_bleu(prediction, reference) == pytest.approx(wanted, abs=1e-6)


def test_tokens_are_cut_as_the_treebank_cuts_them() -> None:
    text = "It's a black-and-white U.S. photo (1950s); doesn't it cost $1,000.50, or 3/4?"
    assert " ".join(tokenise(text)) == (
        "it 's a black-and-white u.s. photo -lrb- 1950s -rrb- does n't it cost $ 1,000.50 or 3/4"
    )
    assert tokenise("A red circle.", punctuation=True) == ["a", "red", "circle", "."]


def test_equal_captions_score_one_and_foreign_ones_zero() -> None:
    captions = ["the image shows a red circle.", "there is a blue triangle in the image."]
    assert corpus_bleu(captions, [["another wording of it", caption] for caption in captions]) == pytest.approx(
        (1,) * 4
    )
    assert corpus_bleu(["dogs bark loudly at night"], [[captions[0]]]) == pytest.approx((0,) * 4, abs=1e-3)


def test_corpus_bleu_by_hand() -> None:
    # 5 of 6 words and 3 of 5 pairs are in a reference; the nearer of both lengths, 7, makes the penalty exp(1 - 7/6).
    prediction = "a red circle on green ground"
    references = ["a red circle is on pale ground", "one circle"]
    one, two, _, _ = corpus_bleu([prediction], [references])
    penalty = 0.846482
    assert one == pytest.approx(penalty * 5 / 6, abs=1e-5)
    assert two == pytest.approx(penalty * (5 / 6 * 2 / 5) ** 0.5, abs=1e-5)


def test_counts_are_summed_over_the_corpus_not_averaged() -> None:
    predictions, references = ["a b c d", "x"], [["a b c d"], ["y z w v"]]
    assert corpus_bleu(predictions, references)[0] == pytest.approx(4 / 5 * 0.548812, abs=1e-5)  # exp(1 - 8/5)
    assert mean_published_bleu(predictions, [reference for [reference] in references])[0] == pytest.approx(0.5)


def test_words_count_at_most_as_often_as_in_the_reference() -> None:
    assert corpus_bleu(["the the the the"], [["the cat and the dog"]])[0] == pytest.approx(0.5 * 0.778801, abs=1e-5)


def test_mismatched_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="1 predictions"):
        corpus_bleu(["a"], [])


def test_rouge_l_by_hand() -> None:
    # The common subsequence "a red on ground" has 4 of 5 and 4 of 6 words; the other reference shares one.
    score = rouge_l(["a red disc on ground"], [["a red circle is on ground", "ground"]])
    precision, recall = 4 / 5, 1.0
    assert score == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_cider_weighs_rare_words_and_is_zero_for_a_single_caption() -> None:
    captions = ["a red circle on the left", "a blue square in the middle", "a green star at the top"]
    references = [[caption] for caption in captions]
    assert cider(captions, references) == pytest.approx(10)
    assert cider(captions[:1], references[:1]) == 0
    only_common = ["a the", "a the", "a the"]
    assert cider(only_common, references) == pytest.approx(0)
    one_right = [captions[0], captions[2], captions[1]]
    assert 2 < cider(one_right, references) < 5
    assert cider(["red circle", *captions[1:]], references) < cider(captions, references)
