"""CIDEr-D of captions (arXiv 1411.5726): TF-IDF weighted n-grams against several reference captions.

The numbers are those of coco-caption's Cider class on the same tokens (tests/evaluation/test_answers.py). Its package,
pycocoevalcap, is not used: 104 MB of Java archives, without a release since 2020.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import exp, log, sqrt

_LONGEST = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # width of the penalty on a difference in length
# As the PTB tokenizer of coco-caption: clitics apart, abbreviations and marks inside a word kept.
_TOKEN = re.compile(
    r"(?:[^\W\d_]\.){2,}|\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|\w+(?:[-/.,'](?!(?:s|m|d|re|ve|ll)\b)\w+)*|[^\w\s]"
)
_PUNCTUATION = frozenset("'`\"“”‘’.?!,:;-–—…()[]{}")

_Weights = list[dict[tuple[str, ...], float]]  # per length of n-gram


def tokenize(caption: str) -> list[str]:
    """Return the lower-case words of a caption without punctuation, in place of coco-caption's Java tokenizer.

    Brackets are dropped as well, which coco-caption means to but, in lower case, does not.
    """
    return [token for token in _TOKEN.findall(caption.lower()) if token not in _PUNCTUATION]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the CIDEr-D of each caption, from 0 to 10; the corpus' value is their mean.

    references: per caption. An n-gram weighs the less, the more pictures have it in their references, and nothing where
    all have it: so a caption's score depends on the other pictures, and with one picture alone it is 0.
    """
    counted = [[_ngrams(reference) for reference in of_one] for of_one in references]
    pictures_with = Counter(ngram for of_one in counted for ngram in set().union(*of_one))

    def weigh(ngrams: Counter) -> _Weights:
        weights: _Weights = [{} for _ in range(_LONGEST)]
        for ngram, count in ngrams.items():
            weights[len(ngram) - 1][ngram] = count * (log(len(references)) - log(max(1, pictures_with[ngram])))
        return weights

    scores = []
    for caption, of_one in zip(captions, counted, strict=True):
        ngrams = _ngrams(caption)
        weights = weigh(ngrams)
        similarities = [
            exp(-((_length(ngrams) - _length(other)) ** 2) / (2 * _SIGMA**2)) * _similarity(weights, weigh(other))
            for other in of_one
        ]
        scores.append(10 * sum(similarities) / len(similarities))
    return scores


def _ngrams(caption: str) -> Counter:
    words = tokenize(caption)
    return Counter(
        tuple(words[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1)
    )


def _length(ngrams: Counter) -> int:
    # In bigrams, as coco-caption has it.
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def _similarity(caption: _Weights, reference: _Weights) -> float:
    """Return the cosine, mean over the lengths of n-grams; the caption's weights are clipped to the reference's."""
    cosines = []
    for mine, theirs in zip(caption, reference, strict=True):
        product = sum(min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0) for ngram, weight in mine.items())
        cosines.append(product / (_norm(mine) * _norm(theirs)) if product else 0.0)
    return sum(cosines) / _LONGEST


def _norm(weights: dict[tuple[str, ...], float]) -> float:
    return sqrt(sum(weight**2 for weight in weights.values()))
