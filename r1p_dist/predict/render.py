"""Predictions as lines for people and as JSON."""

from collections.abc import Mapping
from typing import Any

from r1p_dist.predict.request import Classes, Request

Found = Mapping[str, Any]  # by the model's state: the probabilities of the request's classes, or an answer


def as_json(request: Request, found: Found, top: int) -> dict[str, Any]:
    """Returns {"classes": [{"task", "class", and for each state the probability}, ...]}, or each state's answer.

    The classes are the `top` most probable ones of the last state, and then that of each state before, if it is not
    among them. "task" is null for words of one's own.
    """
    if not isinstance(request, Classes):
        return dict(found)
    names, (*before, last) = request.names, list(found)

    def ranked(state: str) -> list[int]:
        return sorted(range(len(names)), key=lambda index: -found[state][index])

    shown = dict.fromkeys([*ranked(last)[:top], *(ranked(state)[0] for state in before)])
    return {
        "classes": [
            {"task": names[index][0] or None, "class": names[index][1]}
            | {state: found[state][index] for state in found}
            for index in shown
        ]
    }


def as_text(name: str, request: Request, found: Found, top: int) -> str:
    """Returns the lines for a picture; probabilities in percent."""
    entries, states = as_json(request, found, top), list(found)
    lines = [shown(name)]
    if not isinstance(request, Classes):
        return "\n".join([*lines, *(f"  {state}: {_indented(entries[state])}" for state in states)])
    lines.append("".join(f"{state:>9}" for state in states))
    for entry in entries["classes"]:
        values = "".join(f"{100 * entry[state]:7.1f} %" for state in states)
        task = f" ({shown(entry['task'])})" if len(request.tasks) > 1 else ""
        lines.append(f"{values}  {shown(entry['class'])}{task}")
    return "\n".join(lines)


def _indented(answer: str) -> str:
    return "\n    ".join(map(shown, answer.splitlines())) or "(nothing)"


def shown(text: str) -> str:
    """Returns a text without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
