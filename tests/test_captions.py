"""Laws of extras/captions.py: the metrics of generated captions, against numbers made by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extras.captions import bleu4, cider_d, longest_common, rouge_l, words

METRICS = (bleu4, rouge_l, cider_d)
BEST = {bleu4: 1.0, rouge_l: 1.0, cider_d: 10.0}
WORDS = st.lists(st.sampled_from("red blue wool coat with long sleeve collar".split()), min_size=4, max_size=9)
CAPTIONS = st.lists(WORDS.map(" ".join), min_size=2, max_size=5, unique=True)


def test_words_are_in_lower_case_and_without_punctuation():
    assert words("A T-shirt, in RED (the buyer's).") == ["a", "t-shirt", "in", "red", "the", "buyer's"]


@settings(deadline=None, max_examples=30)
@given(CAPTIONS)
def test_the_reference_itself_is_best(captions):
    captions = [f"{caption} number{i}" for i, caption in enumerate(captions)]  # n-grams that no other caption has
    for metric in METRICS:
        assert metric(captions, captions) == pytest.approx(BEST[metric])


@settings(deadline=None, max_examples=30)
@given(CAPTIONS, st.randoms(use_true_random=False))
def test_every_score_lies_between_nothing_and_the_best_and_does_not_depend_on_the_order(captions, random):
    hypotheses = random.sample(captions, len(captions))
    order = random.sample(range(len(captions)), len(captions))
    for metric in METRICS:
        score = metric(captions, hypotheses)
        assert 0 <= score <= BEST[metric] + 1e-9
        reordered = metric([captions[i] for i in order], [hypotheses[i] for i in order])
        assert reordered == pytest.approx(score)


def test_what_shares_no_word_scores_nothing():
    for metric in METRICS:
        assert metric(["red wool coat with collar"] * 2, ["", "blue denim skirt in a box"]) == 0


def test_bleu4_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples; 6 words against 7
    score = bleu4(["a red coat of wool with buttons"], ["a red coat of silk buttons"])
    assert score == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25 * math.exp(1 - 7 / 6))
    # clipping: "the" counts twice at most; then no pair is shared
    assert bleu4(["the cat sat on the mat"], ["the the the the the the"]) == 0
    # precisions are those of the whole corpus: the second caption has the quadruples that the first lacks
    assert bleu4(["red coat", "a b c d e"], ["red coat", "a b c d e"]) == pytest.approx(1)


def test_rouge_l_by_hand():
    # the common subsequence "red coat wool": precision 3/4, recall 3/5
    p, r = 3 / 4, 3 / 5
    expected = (1 + 1.44) * p * r / (r + 1.44 * p)
    assert rouge_l(["a red coat of wool"], ["red silk coat wool"]) == pytest.approx(expected)
    assert rouge_l(["a red coat of wool", "x"], ["red silk coat wool", "y"]) == pytest.approx(expected / 2)


def test_cider_d_by_hand():
    # Two references. idf is log 2 for words of one of them and 0 for "coat", which stands in both.
    references, hypotheses = ["red coat", "blue coat"], ["red red coat", "green coat"]
    # n = 1: true (red 1), said (red 2), clipped to 1: 1 * 1 / (1 * 2); n = 2: true (red coat), said (red coat) and
    # (red red): 1 / sqrt(1 + 1), where an n-gram of no reference has idf log 2; lengths differ by 1.
    first = (1 / 2 + 1 / math.sqrt(2)) * math.exp(-1 / 72)
    assert cider_d(references, hypotheses) == pytest.approx(10 * first / 4 / 2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), max_size=7), st.lists(st.integers(0, 3), max_size=7))
def test_the_longest_common_subsequence_is_the_longest_of_all(a, b):
    def subsequences(items):
        found = {()}
        for item in items:
            found |= {chosen + (item,) for chosen in found}
        return found

    assert longest_common(a, b) == max(len(common) for common in subsequences(a) & subsequences(b))


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 hypotheses need as many references, got 1"):
        bleu4(["a"], ["a", "b"])
