"""
How near generated captions come to the true ones: BLEU-4, ROUGE-L and CIDEr-D, with one reference for each hypothesis.

Words are lower-cased and punctuation is dropped. METEOR is left out: it needs WordNet and a program of its own.
"""

import math
import re
from collections import Counter

ORDERS = (1, 2, 3, 4)


def words(caption):
    """The words of a caption, in lower case and without punctuation, except inside a word such as t-shirt."""
    return re.findall(r"\w+(?:[-']\w+)*", caption.lower())


def ngrams(caption, n):
    """How often each sequence of n words stands in a list of words."""
    return Counter(tuple(caption[i : i + n]) for i in range(len(caption) - n + 1))


def pairs_of(references, hypotheses):
    """Both lists of captions as pairs of lists of words."""
    if len(references) != len(hypotheses):
        raise ValueError(f"captions: {len(hypotheses)} hypotheses need as many references, got {len(references)}")
    return [(words(reference), words(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]


def bleu4(references, hypotheses):
    """Papineni et al. 2002: geometric mean of the corpus's clipped precisions of 1 to 4 words; short captions pay."""
    pairs = pairs_of(references, hypotheses)
    logarithms = 0.0
    for n in ORDERS:
        found = total = 0
        for reference, hypothesis in pairs:
            counts = ngrams(hypothesis, n)
            found += (counts & ngrams(reference, n)).total()
            total += counts.total()
        if found == 0:
            return 0.0
        logarithms += math.log(found / total) / len(ORDERS)
    r = sum(len(reference) for reference, _ in pairs)
    c = sum(len(hypothesis) for _, hypothesis in pairs)
    return math.exp(logarithms + min(0.0, 1 - r / c))


def longest_common(a, b):
    """The length of the longest common subsequence of two lists."""
    lengths = [0] * (len(b) + 1)
    for x in a:
        previous = lengths
        lengths = [0]
        for j, y in enumerate(b):
            lengths.append(previous[j] + 1 if x == y else max(previous[j + 1], lengths[j]))
    return lengths[-1]


def rouge_l(references, hypotheses, beta=1.2):
    """Lin 2004: mean F-measure of the longest common subsequence."""
    pairs, total = pairs_of(references, hypotheses), 0.0
    for reference, hypothesis in pairs:
        common = longest_common(reference, hypothesis)
        if common:
            precision, recall = common / len(hypothesis), common / len(reference)
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / max(1, len(pairs))


def cider_d(references, hypotheses):
    """
    Vedantam et al. 2015: cosine of tf-idf vectors of 1 to 4 words, the hypothesis clipped to the reference, times a
    Gaussian of the difference in length, times 10. The idf is taken over the references.
    """
    pairs, total = pairs_of(references, hypotheses), 0.0
    for n in ORDERS:
        captions_with = Counter()
        for reference, _ in pairs:
            captions_with.update(ngrams(reference, n).keys())
        for reference, hypothesis in pairs:
            true = weighted(ngrams(reference, n), captions_with, len(pairs))
            said = weighted(ngrams(hypothesis, n), captions_with, len(pairs))
            product = sum(min(weight, true.get(ngram, 0)) * true.get(ngram, 0) for ngram, weight in said.items())
            lengths = math.hypot(*true.values()) * math.hypot(*said.values())
            if lengths:
                difference = len(hypothesis) - len(reference)
                total += product / lengths * math.exp(-(difference**2) / 72)
    return 10 * total / (len(ORDERS) * max(1, len(pairs)))


def weighted(counts, captions_with, captions):
    """tf-idf: {ngram: count log(captions / captions with it)}."""
    return {ngram: count * math.log(captions / max(1, captions_with[ngram])) for ngram, count in counts.items()}
