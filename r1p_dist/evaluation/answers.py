"""Scores of generated answers, one per sample in percent; the value of a task is their mean."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from r1p_dist.evaluation.cider import cider_d


@dataclass(frozen=True)
class Answer:
    """What a model answered to one sample.

    references: the right answers. choices: what the instruction offers, in the order of the letters A, B, …
    is_finished: the model ended by itself, within the limit of new tokens.
    """

    text: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    is_finished: bool = True


def score(metric: str, answers: Sequence[Answer]) -> list[float]:
    """Return one score per answer, in the scale that SCALE names. ValueError: unknown metric, no reference."""
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is unknown; known: {', '.join(METRICS)}")
    for index, answer in enumerate(answers):
        if not answer.references:
            raise ValueError(f"answer {index}: has no reference; {metric} needs one right answer at least")
    return METRICS[metric](answers)


def follows_instruction(answer: Answer, format: str | None) -> bool:
    """Return whether an answer, right or wrong, has the form that was asked for.

    format: a regular expression for the whole answer, without white space at its ends. None: one of the choices; where
    there are none, any text that the model ended by itself.
    """
    text = answer.text.strip()
    if format is not None:
        return re.fullmatch(format, text) is not None
    if answer.choices:
        return chosen(text, answer.choices) is not None
    return answer.is_finished and bool(text)


# exact_match, multiple_choice


def normalized(text: str) -> str:
    """Return a text in lower case, white space collapsed, without one full stop at its end; composed Unicode (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split()).removesuffix(".").rstrip()


def _exact_match(answer: Answer) -> float:
    return 100.0 * (normalized(answer.text) in map(normalized, answer.references))


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """Return which choice an answer picks, None for none of them.

    It is the text of a choice, or a choice's letter: B, (B), B), B. or B:. Behind a letter with such a mark the text of
    the same choice may follow: "B. cat". Upper and lower case, white space and a last full stop do not matter. Where a
    choice is a letter itself, its text goes first.
    """
    texts = [normalized(choice) for choice in choices]
    text = normalized(text)
    if text in texts:
        return texts.index(text)
    parts = re.fullmatch(r"(?:\(([a-z])\)|([a-z])[).:]?)|(?:\(([a-z])\)|([a-z])[).:]) ?(.+)", text)
    if parts is None:
        return None
    letter = next(group for group in parts.groups()[:4] if group)
    index = string.ascii_lowercase.index(letter)
    if index >= len(choices) or parts[5] not in (None, texts[index]):
        return None
    return index


def _multiple_choice(answer: Answer) -> float:
    """100 for picking the choice that references[0] names by text or letter."""
    right = chosen(answer.references[0], answer.choices)
    if right is None:
        raise ValueError(f"reference {answer.references[0]!r} is none of the choices {list(answer.choices)}")
    return 100.0 * (chosen(answer.text, answer.choices) == right)


# vqa_accuracy

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("none", "zero", *"one two three four five six seven eight nine ten".split())
_NUMBER_WORDS = {word: str(max(0, value)) for value, word in enumerate(_NUMBERS, -1)}
_ARTICLES = ("a", "an", "the")
# The contractions of the official evaluation; words that differ from others by the apostrophe alone are not among them.
_CONTRACTIONS = {
    form.replace("'", ""): form
    for form in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
        "needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
        "you'll you're you've"
    ).split()
}


def _vqa_normalized(text: str) -> str:
    """Return a text in the form in which the VQA evaluation compares answers (visualqa.org/evaluation.html).

    A punctuation mark becomes a space; where it stands beside a space somewhere, or the text has a comma between two
    digits, it goes without one. Full stops go unless a digit follows. Number words up to ten become digits ("none" is
    0), articles go, contractions get their apostrophe.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    has_number = re.search(r"\d,\d", text) is not None
    without = text
    for mark in _MARKS:
        is_beside_space = f"{mark} " in text or f" {mark}" in text
        without = without.replace(mark, "" if is_beside_space or has_number else " ")
    words = re.sub(r"\.(?!\d)", "", without).lower().split()
    words = [_NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word.replace("'", ""), word) for word in words if word not in _ARTICLES)


def _vqa_accuracy(answer: Answer) -> float:
    """Full marks for an answer that three humans gave.

    10 references or more, the official rule: the mean of min(matches / 3, 1) over all sets with one reference left out.
    Fewer: min(matches / min(3, references), 1), so that a single reference asks for that answer. Normalised always, as
    TextVQA's evaluation does; VQAv2's own leaves answers as they are where all ten humans agree.
    """
    references = len(answer.references)
    matches = [_vqa_normalized(reference) for reference in answer.references].count(_vqa_normalized(answer.text))
    if references < 10:
        return 100 * min(matches / min(3, references), 1)
    # Leaving out one of the matches happens `matches` times, leaving out another one the other times.
    shares = matches * min((matches - 1) / 3, 1) + (references - matches) * min(matches / 3, 1)
    return 100 * shares / references


# rouge_l, cider


class _Words:
    """The words of rouge-score, runs of letters and digits in lower case, of every alphabet and not of ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", text.lower())


def _rouge_l(answers: Sequence[Answer]) -> list[float]:
    """ROUGE-L of google's rouge-score: F-measure of the longest common subsequence, no stemming, best reference."""
    from rouge_score.rouge_scorer import RougeScorer  # it imports the whole of nltk

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [100 * scorer.score_multi(answer.references, answer.text)["rougeL"].fmeasure for answer in answers]


def _cider(answers: Sequence[Answer]) -> list[float]:
    scores = cider_d([answer.text for answer in answers], [answer.references for answer in answers])
    return [100 * value for value in scores]


def _each(of_one: Callable[[Answer], float]) -> Callable[[Sequence[Answer]], list[float]]:
    return lambda answers: [of_one(answer) for answer in answers]


METRICS: dict[str, Callable[[Sequence[Answer]], list[float]]] = {
    "exact_match": _each(_exact_match),
    "vqa_accuracy": _each(_vqa_accuracy),
    "multiple_choice": _each(_multiple_choice),
    "rouge_l": _rouge_l,
    "cider": _cider,
}
SCALE = {
    "exact_match": "percent",
    "vqa_accuracy": "percent",
    "multiple_choice": "percent",
    "rouge_l": "percent",
    "cider": "CIDEr x 100, can exceed 100",
}
