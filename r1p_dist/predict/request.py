"""What is asked of pictures: which of some classes they show, or a question."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from r1p_dist.data.samples import IMAGE_MARK, Sample, Turn
from r1p_dist.data.stream import Task
from r1p_dist.errors import InputError
from r1p_dist.predict.source import Source

PLAIN_TEMPLATE = "a photo of a {c}."


@dataclass(frozen=True)
class Classes:
    """Which of the classes of these tasks, all set against each other; own words are a task without a name."""

    tasks: tuple[Task, ...]

    @property
    def names(self) -> list[tuple[str, str]]:
        """Task and class of every candidate."""
        return [(task.name, name) for task in self.tasks for name in task.class_names]

    def sample(self, picture: Image.Image) -> Sample:
        return Sample("", (picture,))


@dataclass(frozen=True)
class Question:
    """A question about each picture, and the longest answer in tokens."""

    text: str
    max_new_tokens: int

    def sample(self, picture: Image.Image) -> Sample:
        return Sample("--ask", (picture,), turns=(Turn("user", f"{IMAGE_MARK}\n{self.text}"),))


Request = Classes | Question


def make_request(
    source: Source, tasks: Sequence[str] | None = None, words: Sequence[str] | None = None, question: str | None = None
) -> Request:
    """Returns the request for tasks by name (None: all), one's own words as classes, or a question.

    Words are put into the templates of `tasks`, without any into `a photo of a {c}.`. InputError: what the model cannot
    be asked, an unknown task, words that are empty or stand twice.
    """
    if source.kind.has_answers:
        if question is None or not question.strip():
            raise InputError(f'{source.folder}: its model answers questions; give --ask "What is this?"')
        if words is not None:
            raise InputError("--classes: the model answers in words of its own; name the choices in the question")
        if IMAGE_MARK in question:
            raise InputError(
                f"--ask: {IMAGE_MARK} stands for the picture, which goes before the question; leave it out"
            )
        longest = max(task.max_new_tokens for task in _chosen(source, tasks))
        return Question(question.strip(), longest)
    if question is not None:
        raise InputError(f"--ask: the model of {source.folder} answers no questions; name classes: --classes a,b,c")
    if words is None:
        return Classes(tuple(_chosen(source, tasks)))
    templates = [PLAIN_TEMPLATE] if tasks is None else [t for task in _chosen(source, tasks) for t in task.templates]
    return Classes((_own_task(words, templates),))


def _chosen(source: Source, names: Sequence[str] | None) -> list[Task]:
    known = {task.name: task for task in source.tasks}
    for name in names or ():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            raise InputError(f"--task {name}: no task of {source.folder}{hint}; there are {', '.join(known)}")
    return list(known.values()) if names is None else [known[name] for name in dict.fromkeys(names)]


def _own_task(words: Sequence[str], templates: Sequence[str]) -> Task:
    words = [word.strip() for word in words]
    if "" in words:
        raise InputError("--classes: an empty class; separate the names by single commas")
    if twice := [word for word in words if words.count(word) > 1]:
        raise InputError(f"--classes: {twice[0]} stands twice")
    return Task("", (), (), (), tuple(words), tuple(dict.fromkeys(templates)), sizes={}, domain=None)
