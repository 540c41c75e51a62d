"""Build the shipped stream of instruction tasks, r1p_dist/assets/mini_instruct, from the pictures of mini_mtil.

    python tools/dev/build_mini_instruct.py OUTPUT
    python tools/dev/build_mini_instruct.py --choosing OUTPUT
    python tools/dev/build_mini_instruct.py --baselines mini_instruct

OUTPUT becomes a folder with `stream.yaml` and, per task, train, validation and test shards of `KEY.jpg` and `KEY.json`
(a conversation of one question and one answer, with the picture's source and licence). The pictures keep their keys and
their splits, each is stored once per task; the test asks in words that no other sample has (a final run trains on the
validation split as well). Everything that is chosen is chosen by place or hash, so the bytes are the same each time.
`--choosing` makes a stream to choose settings on, whose validation also asks in words that no training sample has: four
of the six wordings train, validation and test ask in the other two, and none is the test's own. `--baselines` prints
what each task scores without any model, when every answer is the most frequent one in training.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import yaml
from build_mini_stream import Sample, read_samples, write_shard

from r1p_dist.data.stream import SPLITS, Stream
from r1p_dist.errors import InputError, report_errors

MOST_TEST_SAMPLES = 140  # per task: keeps the package small
CHOICES = 4
ONE_WORD = r"(?i)[a-z]+\.?"


@dataclass(frozen=True)
class Question:
    """What is asked about one picture. slots: what stands in the wording, by name; answers: all right ones, if many."""

    answer: str
    slots: dict[str, str] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instruction:
    """One task: `ask(sample, place, class_names)` makes the question about a picture of the task `pictures`.

    place: the picture's number in its class and split. held_out: the wordings of the splits in `unseen`.
    """

    name: str
    pictures: str
    metric: str
    max_new_tokens: int
    ask: Callable[[Sample, int, Sequence[str]], Question]
    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    format: str | None = None
    unseen: tuple[str, ...] = ("test",)


def ask_name(sample: Sample, place: int, class_names: Sequence[str]) -> Question:
    """Ask for the class."""
    return Question(class_names[sample.label])


def ask_yes_or_no(sample: Sample, place: int, class_names: Sequence[str]) -> Question:
    """Ask for the picture's class and for another one in turn.

    The other one moves on by a class each time, so every class is asked about as often with yes as with no, and the
    question alone gives nothing away.
    """
    if place % 2 == 0:
        return Question("yes", {"thing": with_article(class_names[sample.label])})
    step = 1 + place // 2 % (len(class_names) - 1)
    return Question("no", {"thing": with_article(class_names[(sample.label + step) % len(class_names)])})


def ask_choice(sample: Sample, place: int, class_names: Sequence[str]) -> Question:
    """Offer the class among three others; its place goes round, so that none is more frequent.

    The names stand in lower case, and the answer is a name, not a letter: the small LLaVA has seen neither capitals nor
    single letters in answers, and its embedding stays frozen.
    """
    others = [name for label, name in enumerate(class_names) if label != sample.label]
    choices = sorted(others, key=lambda name: hashed(sample.key, name))[: CHOICES - 1]
    choices.insert((sample.label + place) % CHOICES, class_names[sample.label])
    choices = [name.lower() for name in choices]
    options = f"{', '.join(choices[:-1])} or {choices[-1]}"
    return Question(class_names[sample.label].lower(), {"options": options}, choices=tuple(choices))


def ask_caption(sample: Sample, place: int, class_names: Sequence[str]) -> Question:
    """Ask for a sentence; of a furniture_3d picture is known that it is a drawn 3D model of a class and of a name."""
    thing = with_article(class_names[sample.label])
    answer = f"a rendered picture of {thing} on a plain background"
    model = sample.source.partition(".sh3f ")[2].lower()  # its source: package, library.sh3f, the model's name
    return Question(
        answer,
        answers=(
            answer,
            f"{thing}, drawn by a computer in front of one plain colour",
            f"the 3d model of {thing}: {model}",
        ),
    )


def with_article(name: str) -> str:
    """Return "a dress", "an ankle boot", "trousers"."""
    if name.endswith("s") and not name.endswith("ss"):
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


TASKS = (
    Instruction(
        name="name_object",
        pictures="object_photos",
        metric="exact_match",
        max_new_tokens=12,
        ask=ask_name,
        format=r"(?i)[a-z]+( [a-z]+)?\.?",
        wordings=(
            "What kind of thing is this? Answer with its name only.",
            "Name the kind of object in the picture, nothing else.",
            "Which kind of thing does the photo show? Just name it.",
            "What do you see here? Give the name of its kind only.",
            "Look at the photo and say in one or two words what kind of thing it shows.",
            "To which kind does the object in this photo belong? Answer briefly.",
        ),
        held_out=(
            "What sort of thing has been photographed? Reply with its name alone.",
            "Tell me what kind of object this is, in a word or two.",
            "Say what the photo shows. Only the name of the kind, please.",
        ),
    ),
    Instruction(
        name="read_digit",
        pictures="handwritten_digits",
        metric="exact_match",
        max_new_tokens=8,
        ask=ask_name,
        format=ONE_WORD,
        wordings=(
            "Which digit is written here? Answer with a word.",
            "Read the handwritten digit and write it as a word.",
            "What digit does the picture show? Spell it out.",
            "Someone wrote a digit. Which one is it, in letters?",
            "Spell out the digit in this picture.",
            "What is the handwritten number from zero to nine? Use a word.",
        ),
        held_out=(
            "Tell me, as a word, which digit was written by hand.",
            "Name the digit that you can read here, in letters and not as a figure.",
            "Which number between zero and nine is this? Reply with its word.",
        ),
    ),
    Instruction(
        name="read_card",
        pictures="playing_cards",
        metric="exact_match",
        max_new_tokens=8,
        ask=ask_name,
        format=ONE_WORD,
        wordings=(
            "What is the rank of this playing card? Answer with one word, without the suit.",
            "Read the rank of the card and write it as a word.",
            "Which rank does the playing card have, ace to king? One word.",
            "Say the rank of this card in one word; leave out its suit.",
            "What card is this? Give only the rank, as a word.",
            "Name the rank of the playing card in the picture. No suit.",
        ),
        held_out=(
            "Tell me only the rank of the card that lies here, as a word.",
            "How high is this playing card? Reply with the word for its rank.",
            "In one word: the rank of the card, not its suit.",
        ),
    ),
    Instruction(
        name="yes_no",
        pictures="fashion",
        metric="exact_match",
        max_new_tokens=4,
        ask=ask_yes_or_no,
        format=r"(?i)(yes|no)\.?",
        wordings=(
            "Is this {thing}? Answer yes or no.",
            "Does the picture show {thing}? Say yes or no.",
            "Can you see {thing} here? Yes or no.",
            "Yes or no: is the piece in the picture {thing}?",
            "Would you call this {thing}? Answer with yes or no only.",
            "Decide whether this is {thing}, with yes or no.",
        ),
        held_out=(
            "Is it {thing} that the picture shows? Reply yes or no.",
            "{thing}, yes or no?",
            "Say yes if this is {thing}, otherwise say no.",
        ),
    ),
    Instruction(
        name="which_flag",
        pictures="country_flags",
        metric="multiple_choice",
        max_new_tokens=12,
        ask=ask_choice,
        wordings=(
            "Which of these countries has this flag: {options}? Answer with its name.",
            "Whose flag is this: {options}? Give the name only.",
            "Choose the country to which the flag belongs: {options}.",
            "The picture shows the flag of {options}. Of which one? Name it.",
            "Pick the right country for this flag from this list and write its name: {options}.",
            "{options}: which of these countries flies the flag in the picture? Only the name.",
        ),
        held_out=(
            "Find the country of this flag in the list and reply with its name: {options}.",
            "From which of these countries does the flag come: {options}? Reply with a name alone.",
            "{options}. One of these has the flag shown here. Tell me which one.",
        ),
    ),
    Instruction(
        name="caption",
        pictures="furniture_3d",
        metric="cider",
        max_new_tokens=32,
        ask=ask_caption,
        wordings=(
            "Describe the picture in one sentence.",
            "Write a caption for this picture.",
            "What does the picture show? Answer with a full sentence.",
            "Give a short description of the image.",
            "Caption the image.",
            "Say in one sentence what can be seen and how the picture was made.",
        ),
        held_out=(
            "Tell me in a sentence what this image shows.",
            "Provide a brief caption.",
            "How would you describe this picture in one line?",
        ),
    ),
)


def for_choosing(task: Instruction) -> Instruction:
    """Return the task without its second and fourth wording in training, and asked in these by validation and test."""
    first, second, third, fourth, *others = task.wordings
    return replace(task, wordings=(first, third, *others), held_out=(second, fourth), unseen=("validation", "test"))


CHOOSING = tuple(for_choosing(task) for task in TASKS)


def hashed(*words: str) -> bytes:
    """Return bytes that depend on the words alone, for choices that look random and never change."""
    return hashlib.sha256("\0".join(words).encode()).digest()


def by_class(samples: Sequence[Sample], most: int | None, classes: int) -> Iterator[tuple[Sample, int]]:
    """Yield the samples by key with their places in their classes; `most` limits the samples, equally many a class."""
    places = Counter()
    for sample in samples:
        place = places[sample.label]
        places[sample.label] += 1
        if most is None or place < most // classes:
            yield sample, place


def conversation(task: Instruction, split: str, sample: Sample, question: Question) -> dict[str, bytes]:
    """Return the files of a sample: its picture as it was, and its conversation in LLaVA's form."""
    wordings = task.held_out if split in task.unseen else task.wordings
    text = wordings[int.from_bytes(hashed(task.name, sample.key)[:4], "big") % len(wordings)]
    for name, value in question.slots.items():
        text = text.replace(f"{{{name}}}", value)
    facts = json.loads(sample.files["json"])
    record = {
        "id": sample.key,
        "conversations": [
            {"from": "human", "value": f"<image>\n{text}"},
            {"from": "gpt", "value": question.answer},
        ],
        **({"choices": question.choices} if question.choices else {}),
        **({"answers": question.answers} if question.answers else {}),
        "source": facts["source"],
        "license": facts["license"],
    }
    return {"jpg": sample.files["jpg"], "json": json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()}


def build_task(task: Instruction, pictures: Stream, target: Path) -> dict:
    """Write one task's shards; return its entry for stream.yaml."""
    source = next(known for known in pictures.tasks if known.name == task.pictures)
    folder = target / task.name
    folder.mkdir()
    entry: dict = {"name": task.name}
    sizes = {}
    for split in SPLITS:
        samples = read_samples(getattr(source, split), source.class_names)
        most = MOST_TEST_SAMPLES if split == "test" else None
        built = [
            Sample(sample.key, sample.label, sample.source, conversation(task, split, sample, question))
            for sample, place in by_class(samples, most, len(source.class_names))
            for question in [task.ask(sample, place, source.class_names)]
        ]
        write_shard(folder / f"{split}-000000.tar", built)
        entry[split] = [f"{task.name}/{split}-000000.tar"]
        sizes[split] = len(built)
    entry |= {"metric": task.metric, "max_new_tokens": task.max_new_tokens}
    if task.format is not None:
        entry["format"] = task.format
    return {**entry, "sizes": sizes, "domain": source.domain}


def build_stream(target: Path, tasks: Sequence[Instruction] = TASKS) -> Stream:
    """Build the stream in `target`, which must not exist; returns it, loaded again as a check."""
    if target.exists():
        raise InputError(f"{target} exists already; remove it or name another folder")
    pictures = Stream.load("mini_mtil")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Nothing half-written under the final name.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as unfinished:
        root = Path(unfinished) / target.name
        root.mkdir()
        content = {"name": target.name, "tasks": [build_task(task, pictures, root) for task in tasks]}
        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        (root / "stream.yaml").write_text(text, encoding="utf-8")
        os.rename(root, target)
    return Stream.load(target)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("output", type=Path, nargs="?", help="folder to write; must not exist")
    action.add_argument("--choosing", type=Path, metavar="OUTPUT", help="the stream to choose settings on")
    action.add_argument("--baselines", metavar="STREAM", help="print each task's score without a model")
    options = parser.parse_args(arguments)
    return report_errors(partial(_build if options.baselines is None else _print_baselines, options))


def _build(options: argparse.Namespace) -> int:
    made = build_stream(options.output) if options.choosing is None else build_stream(options.choosing, CHOOSING)
    for task in made.tasks:
        print(f"{task.name}: {task.metric}, {task.sizes}")
    return 0


def _print_baselines(options: argparse.Namespace) -> int:
    from r1p_dist.evaluation.majority import majority_baselines  # here, so that --help imports nothing heavy

    stream = Stream.load(options.baselines)
    baselines = majority_baselines(stream)
    for task in stream.tasks:
        answer, value = baselines[task.name]
        print(f"{task.name}: {task.metric} {value:.1f} with {answer!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
