"""Questions about a picture, and their answers, made from nothing but its caption."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pretraining.pairs import without_tags

COLOURS = ("red", "green", "blue", "purple", "orange", "brown", "black", "white", "yellow", "pink", "gray")

# What a picture is, by the part of its key that names the source; sources of mixed pictures are left out.
_SOURCES = {
    "emoji": "emojione fluent-3d fluent-emoji fxemoji noto noto-v1 openmoji streamline-emojis twemoji",
    "icon": "covid fa6-solid flat-color-icons fluent-color game-icons gis healthicons icon-park lucide lucide-lab maki "
    "marketeq mdi medical-icon meteocons ph pixelarticons streamline-color streamline-cyber streamline-freehand-color "
    "streamline-kameleon-color streamline-pixel streamline-ultimate-color tabler temaki wi",
    "logo": "cib devicon logos simple-icons",
    "flag": "flag-icons iso-flags",
    "sign": "guidance",
    "3d rendering": "sweethome3d",
    "texture": "ufoai",
    "clipart": "openclipart",
    "wallpaper": "gnome-wallpaper mate-wallpaper plasma-wallpaper",
}
KINDS = {source: kind for kind, sources in _SOURCES.items() for source in sources.split()}
# What a picture is, where its caption says so and its source does not.
_SAID_KINDS = ("photo", "drawing", "flag", "painted portrait", "pixel art", "game sprite", "map tile")

_COLOUR = rf"(?P<colour>{'|'.join(COLOURS)})"
_STYLES = (
    r"(?:(?:glossy 3d|cartoon) )?emoji|(?:[a-z]+ ){0,2}icon|cartoon picture|drawing|(?:telescope )?photo|clipart|sign|"
    r"logo|flag(?: icon)?|3d rendering|game (?:sprite|picture|texture|item)|painted portrait|pixel art|map tile|"
    r"texture|picture|desktop background"
)
_COLOURED = re.compile(rf"^an? {_COLOUR} ")
_PREFIX = re.compile(rf"^(?:an? |the )(?:{_COLOUR} )?(?:{_STYLES}) (?:of|called) ")
_BEFORE_COMMA = re.compile(r"^(?:game terrain|a photo of stars in the night sky|part of a painting|a wallpaper), ")
_SUFFIX = re.compile(
    r" (?:(?:game|solid|line|outline|flat|colorful|map|medical|hand drawn|pixel art|cartoon|glossy|weather|simple|"
    r"round flat) )?(?:icon|emoji|logo|flag|sign|texture|on a plain background|seen from close by)$"
)
_ARTICLE = re.compile(r"^(?:an?|the) ")


class Facts(NamedTuple):
    """What a caption says: itself without and with its tags, the thing's name, the picture's kind, the ink's colour."""

    caption: str
    tagged: str
    name: str
    kind: str | None
    colour: str | None
    source: str


class Turn(NamedTuple):
    """A question and its answer; `skill` is what it asks for, `options` how many answers it names, 0 if none."""

    skill: str
    question: str
    answer: str
    options: int = 0


def read_facts(key: str, caption: str) -> Facts:
    """Returns what the caption of a pair says; everything is in lower case."""
    source = key.split("_")[1]
    tagged = caption.lower()
    plain = without_tags(tagged)
    colour = _COLOURED.match(plain)
    name = _SUFFIX.sub("", _BEFORE_COMMA.sub("", _PREFIX.sub("", plain)))
    name = name.partition(", ")[0]
    name = re.sub(rf"^{_COLOUR} (?=[a-z])", "", _ARTICLE.sub("", name)) if colour else name
    name = _ARTICLE.sub("", name).replace("_", " ")
    kind = KINDS.get(source) or next((said for said in _SAID_KINDS if re.search(rf"\b{said}\b", plain)), None)
    return Facts(plain, tagged, name or plain, kind, colour and colour["colour"], source)


class Questioner:
    """Draws questions about pictures; what is not in a picture comes from the captions of other pictures.

    facts: of all pictures that others may be drawn from.
    """

    def __init__(self, facts: Sequence[Facts]):
        self._names = sorted({fact.name for fact in facts})
        self._kinds = sorted({fact.kind for fact in facts if fact.kind})
        by_source: dict[str, set[str]] = {}
        for fact in facts:
            by_source.setdefault(fact.source, set()).add(fact.name)
        self._names_by_source = {source: sorted(names) for source, names in by_source.items()}

    def draw(self, fact: Facts, rng: random.Random) -> list[Turn]:
        """Returns one question of each skill that the facts allow."""
        asks: list[Callable[[Facts, random.Random], Turn]] = [self._describe, self._name, self._is_there, self._choose]
        if fact.kind:
            asks.append(rng.choice((self._kind, self._is_kind)))
        if fact.colour:
            asks.append(rng.choice((self._colour, self._is_colour)))
        return [ask(fact, rng) for ask in asks]

    def _describe(self, fact: Facts, rng: random.Random) -> Turn:
        if fact.tagged != fact.caption and rng.random() < 0.5:
            return Turn("describe", rng.choice(_DESCRIBE_TAGGED), fact.tagged)
        return Turn("describe", rng.choice(_DESCRIBE), fact.caption)

    def _name(self, fact: Facts, rng: random.Random) -> Turn:
        return Turn("name", rng.choice(_NAME), fact.name)

    def _is_there(self, fact: Facts, rng: random.Random) -> Turn:
        is_there = rng.random() < 0.5
        name = fact.name if is_there else self._others(fact, 1, rng)[0]
        return Turn(
            "yes or no", _fill(rng.choice(_IS_THERE), name) + rng.choice(_YES_NO), "yes" if is_there else "no", 2
        )

    def _choose(self, fact: Facts, rng: random.Random) -> Turn:
        options = [fact.name, *self._others(fact, rng.choice((1, 2, 2, 3, 4)), rng)]
        rng.shuffle(options)
        return Turn("choose", rng.choice(_CHOOSE).format(_list(options, rng)), fact.name, len(options))

    def _kind(self, fact: Facts, rng: random.Random) -> Turn:
        if rng.random() < 0.5:
            return Turn("kind", rng.choice(_KIND), fact.kind)
        options = [fact.kind, *rng.sample([kind for kind in self._kinds if kind != fact.kind], rng.choice((1, 2, 3)))]
        rng.shuffle(options)
        return Turn("kind", rng.choice(_CHOOSE_KIND).format(_list(options, rng)), fact.kind)

    def _is_kind(self, fact: Facts, rng: random.Random) -> Turn:
        is_kind = rng.random() < 0.5
        kind = fact.kind if is_kind else rng.choice([kind for kind in self._kinds if kind != fact.kind])
        return Turn(
            "is it that kind", _fill(rng.choice(_IS), kind) + rng.choice(_YES_NO), "yes" if is_kind else "no", 2
        )

    def _colour(self, fact: Facts, rng: random.Random) -> Turn:
        return Turn("colour", rng.choice(_COLOUR_QUESTIONS), fact.colour)

    def _is_colour(self, fact: Facts, rng: random.Random) -> Turn:
        is_colour = rng.random() < 0.5
        colour = fact.colour if is_colour else rng.choice([colour for colour in COLOURS[:8] if colour != fact.colour])
        question = rng.choice(_IS_COLOUR).format(colour) + rng.choice(_YES_NO)
        return Turn("is it that colour", question, "yes" if is_colour else "no", 2)

    def _others(self, fact: Facts, count: int, rng: random.Random) -> list[str]:
        """Draws names that share no word with the fact's or each other; a half from pictures of the same source."""
        names = self._names_by_source[fact.source] if rng.random() < 0.5 else self._names
        taken, others = set(fact.name.split()), []
        for _ in range(100):
            name = rng.choice(names)
            if taken.isdisjoint(name.split()):
                others.append(name)
                taken.update(name.split())
            elif rng.random() < 0.1:
                names = self._names  # a source of few names may have no other
            if len(others) == count:
                return others
        raise RuntimeError(f"no {count} names unlike {fact.name!r}")


def _fill(template: str, name: str) -> str:
    return template.format(name=name, a="an" if name[0] in "aeiou" else "a")


def _list(options: list[str], rng: random.Random) -> str:
    """Returns `a, b or c`, `a, b, c` or `a or b or c`."""
    form = rng.random()
    if form < 0.5:
        return f"{', '.join(options[:-1])} or {options[-1]}"
    return (", " if form < 0.9 else " or ").join(options)


_DESCRIBE = (
    "Describe the picture.",
    "Describe this image in a few words.",
    "What does the picture show?",
    "Write a caption for this picture.",
    "Give a short caption.",
    "What do you see?",
)
_DESCRIBE_TAGGED = (
    "Describe the picture with keywords.",
    "Write a caption with tags.",
    "Describe this image and name related words.",
)
_NAME = (
    "What is this? Answer with one word or phrase.",
    "What is this?",
    "What is in the picture? Answer with a single word or phrase.",
    "Name the thing in the picture.",
    "Which object is shown? Answer briefly.",
    "What is shown here? Give its name only.",
    "Identify the subject of this image.",
    "Classify the picture. Answer with the name of the class.",
)
_IS_THERE = (
    "Is there {a} {name} in the picture?",
    "Is this {a} {name}?",
    "Does the picture show {name}?",
    "Do you see {a} {name} here?",
    "Is it {name}?",
    "Can this be called {a} {name}?",
)
_IS = ("Is this {a} {name}?", "Is the picture {a} {name}?", "Is it {a} {name}?")
_YES_NO = (" Answer yes or no.", " Yes or no?", "", " Answer with yes or no only.")
_CHOOSE = (
    "Which of these is it: {}?",
    "What is this: {}?",
    "Is this {}?",
    "Choose what the picture shows: {}.",
    "What is in the picture? Options: {}.",
    "Pick the right name from this list: {}.",
    "Which one is shown? Choose from: {}.",
    "What is this? Answer with one of: {}.",
)
_KIND = (
    "What kind of picture is it?",
    "What type of image is this? Answer with one word or phrase.",
    "Is it an icon, a photo or something else?",
    "In which style is it made?",
)
_CHOOSE_KIND = (
    "What kind of picture is it: {}?",
    "Which type of image is this? Options: {}.",
    "Choose the kind of the picture: {}.",
)
_COLOUR_QUESTIONS = (
    "Which colour is it?",
    "What color is it? Answer with one word.",
    "What is the main colour of the picture?",
    "Name the colour.",
)
_IS_COLOUR = ("Is it {}?", "Is the thing in the picture {}?", "Is its colour {}?", "Is the main color {}?")
