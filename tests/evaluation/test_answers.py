"""Scores of generated answers against values worked out by hand and those of the reference implementations."""

import subprocess
import sys
from itertools import combinations
from math import log

import pytest

from r1p_dist.data import stream
from r1p_dist.evaluation.answers import METRICS, SCALE, Answer, chosen, follows_instruction, score
from r1p_dist.evaluation.cider import tokenize

ANIMALS = ("cat", "dog", "a bird", "Écureuil")


def one(metric: str, text: str, *references: str, choices: tuple[str, ...] = ()) -> float:
    (value,) = score(metric, [Answer(text, references, choices)])
    return value


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_of_a_stream_has_a_scale_and_refuses_an_answer_without_reference(metric: str):
    assert set(stream.METRICS) == SCALE.keys() == METRICS.keys()
    assert score(metric, []) == []
    with pytest.raises(ValueError, match=f"answer 1: has no reference; {metric} needs"):
        score(metric, [Answer("cat", ("cat",), ANIMALS), Answer("cat", (), ANIMALS)])


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_answer_scores_nothing(metric: str):
    assert one(metric, "", "cat", choices=ANIMALS) == one(metric, " \n", "cat", choices=ANIMALS) == 0


def test_an_unknown_metric_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'bleu' is unknown; known: exact_match, vqa_accuracy, multiple_choice, rouge"):
        score("bleu", [Answer("cat", ("cat",))])


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ("  A\tBlack\n Cat. ", True),
        ("a black cat .", True),
        ("a black cat..", False),
        ("the black cat", False),
        ("a blackcat", False),
        ("E\u0301LAN", True),  # É as E and an accent
        ("elan", False),
    ],
)
def test_exact_match(text: str, is_right: bool):
    assert one("exact_match", text, "a dog", "a black cat", "élan") == 100 * is_right


@pytest.mark.parametrize("matches", range(11))
def test_vqa_accuracy_is_the_mean_over_the_sets_of_nine(matches: int):
    humans = ["yes"] * matches + [f"other {index}" for index in range(10 - matches)]
    expected = sum(min(nine.count("yes") / 3, 1) for nine in combinations(humans, 9)) / 10
    assert one("vqa_accuracy", "Yes.", *humans) == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("references", "expected"),
    [(["yes"], 100), (["yes", "no"], 50), (["yes", "yes", "no"], 200 / 3), (["yes"] * 3 + ["no"] * 6, 100)],
)
def test_vqa_accuracy_of_fewer_references(references: list[str], expected: float):
    assert one("vqa_accuracy", "yes", *references) == pytest.approx(expected)
    assert one("vqa_accuracy", "perhaps", *references) == 0


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("The cat's", "cat's"),
        ("two", "2"),
        ("none", "0"),
        ("ten of a kind", "10 of kind"),
        ("dont", "don't"),
        ("wouldnt've", "wouldn't've"),
        ("t-shirt", "t shirt"),
        ("red , blue", "red blue"),
        ("yes!\nno?", "yes no"),
        ("1,000", "1000"),
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
    ],
)
def test_vqa_accuracy_normalizes_as_the_official_evaluation(text: str, reference: str):
    assert one("vqa_accuracy", text, reference) == 100


@pytest.mark.parametrize(("text", "reference"), [("its", "it's"), ("3.5", "35"), ("well", "we'll"), ("eleven", "11")])
def test_vqa_accuracy_keeps_apart_what_the_official_evaluation_does(text: str, reference: str):
    assert one("vqa_accuracy", text, reference) == 0


@pytest.mark.parametrize(
    ("text", "index"),
    [
        *(("dog", 1), ("Dog.", 1), ("B", 1), ("b", 1), ("(B)", 1), ("B)", 1), ("B.", 1), ("B:", 1)),
        *(("B. dog", 1), ("(b) Dog.", 1), ("B: dog", 1), ("a bird", 2), ("C. a bird", 2), ("éCUREUIL", 3), ("D", 3)),
        *(("B. cat", None), ("B dog", None), ("E", None), ("dog or cat", None), ("", None), ("é", None)),
        *(("(B", None), ("BC", None), ("a dog", None)),
    ],
)
def test_multiple_choice(text: str, index: int | None):
    assert chosen(text, ANIMALS) == index
    for right, choice in enumerate(ANIMALS):
        for reference in (choice, "ABCD"[right]):
            assert one("multiple_choice", text, reference, choices=ANIMALS) == 100 * (index == right)


def test_a_choice_that_is_a_letter_goes_before_letters():
    assert [chosen(text, ("B", "A")) for text in ("A", "B.", "(A)")] == [1, 0, 0]


def test_multiple_choice_refuses_a_reference_that_is_no_choice():
    with pytest.raises(ValueError, match="reference 'horse' is none of the choices"):
        one("multiple_choice", "dog", "horse", choices=ANIMALS)


def test_rouge_l_is_the_f_measure_of_the_best_reference():
    # "the red chair" is common: precision 3/4, recall 3/6
    assert one("rouge_l", "The red, wooden chair", "a table", "there is the red chair here") == pytest.approx(60)
    assert one("rouge_l", "chairs", "chair") == 0
    assert one("rouge_l", "кошка и собака", "собака и кошка") == pytest.approx(100 / 3)


def test_rouge_l_is_imported_only_when_it_is_needed():
    script = "import sys, r1p_dist.evaluation.answers; assert not {'nltk', 'rouge_score'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


CAPTIONS = ["A red chair beside a table.", "a table", "a big red sofa in front of a window"]
REFERENCES = [
    ("A red chair next to a table.", "The red chair beside the wooden table!"),
    ("a wooden table", "a table, seen from above", "a small table"),
    ("a lamp",),
]


def test_cider_is_that_of_coco_caption():
    answers = [Answer(text, references) for text, references in zip(CAPTIONS, REFERENCES, strict=True)]
    # From pycocoevalcap 1.2: Cider().compute_score on the same words.
    expected = [3.1982844201809257, 1.1722096489386085, 0.0]
    assert score("cider", answers) == pytest.approx([100 * value for value in expected], abs=1e-9)


def test_cider_worked_out_by_hand():
    # "red" is in the references of one picture of three, "chair" in those of two, both words together in one.
    answers = [Answer("red chair", ("red chair",)), Answer("chair", ("chair sofa",)), Answer("lamp", ("bed",))]
    first = 10 * (1 + 1) / 4  # cosine 1 for one and for two words, none for three and four
    common, rare = log(3 / 2), log(3)
    # One word of two, and one bigram less.
    second = 10 * (common**2 / (common * (common**2 + rare**2) ** 0.5)) / 4 * 2.718281828459045 ** (-1 / 72)
    assert score("cider", answers) == pytest.approx([100 * first, 100 * second, 0])


def test_cider_of_one_picture_alone_is_nothing():
    assert one("cider", "a red chair", "a red chair") == 0


def test_words_are_those_of_the_ptb_tokenizer():
    # Right: CoreNLP 3.4.1's PTBTokenizer -lowerCase, less coco-caption's punctuation and the brackets.
    for caption, words in {
        "A two-door cabinet isn't near the man's chair, at 3.5 metres.": (
            "a two-door cabinet is n't near the man 's chair at 3.5 metres"
        ),
        '"Quoted" (in brackets) - a dash -- two; U.S. flag & 50% off!': (
            "quoted in brackets a dash two u.s. flag & 50 % off"
        ),
        "It's John's dogs' bed/table, we've café 1,000 o'clock e.g. this...": (
            "it 's john 's dogs bed/table we 've café 1,000 o'clock e.g. this"
        ),
    }.items():
        assert tokenize(caption) == words.split()


@pytest.mark.parametrize(
    ("answer", "format", "follows"),
    [
        (Answer(" Yes. ", ("no",)), r"(?i)(yes|no)\.?", True),
        (Answer("yes, it is", ("yes",)), r"(?i)(yes|no)\.?", False),
        (Answer("", ("yes",)), r"(?i)(yes|no)\.?", False),
        (Answer("(B)", ("cat",), ANIMALS), None, True),
        (Answer("a horse", ("cat",), ANIMALS), None, False),
        (Answer("a horse", ("cat",)), None, True),
        (Answer("a horse and", ("cat",), is_finished=False), None, False),
        (Answer(" ", ("cat",)), None, False),
    ],
)
def test_follows_instruction(answer: Answer, format: str | None, follows: bool):
    assert follows_instruction(answer, format) is follows
