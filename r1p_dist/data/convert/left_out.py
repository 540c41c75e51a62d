"""What of an input is not written, counted by reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SYSTEM = "hidden, or made by an operating system or a tool"
NOT_CHOSEN = "not chosen by --max-samples or --shots"
UNREADABLE = "picture missing or not decoded"
FRAMES = "frames or pages behind the first one"
_NO_LOSS = (SYSTEM, NOT_CHOSEN)
_EXAMPLES = 3


class LeftOut:
    """Reason -> how many files, members, records or pictures, and the names of the first few."""

    def __init__(self, counted: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """counted: what `as_json` returned."""
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}
        self._merge(counted or {})

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count `count` of them, one of which has the name."""
        self._merge({reason: {"count": count, "examples": [name]}})

    def __iadd__(self, other: LeftOut) -> LeftOut:
        self._merge(other.as_json())
        return self

    def _merge(self, counted: Mapping[str, Mapping[str, Any]]) -> None:
        for reason, entry in counted.items():
            self._counts[reason] = self._counts.get(reason, 0) + entry["count"]
            examples = self._examples.setdefault(reason, [])
            examples += [printable(name) for name in entry["examples"]][: _EXAMPLES - len(examples)]

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Return reason -> {"count", "examples"}, in the order of the reasons' names."""
        reasons = sorted(self._counts)
        return {reason: {"count": self._counts[reason], "examples": self._examples[reason]} for reason in reasons}

    def lines(self, are_losses: bool = False) -> list[str]:
        """Return a line per reason, the most frequent first; are_losses: of those alone that count as a loss."""
        texts = []
        for reason, count in sorted(self._counts.items(), key=lambda entry: -entry[1]):
            if are_losses and reason in _NO_LOSS:
                continue
            examples = self._examples[reason]
            texts.append(f"{count} {reason}: {', '.join(examples)}{', ...' if count > len(examples) else ''}")
        return texts

    @property
    def total(self) -> int:
        """How many were counted."""
        return sum(self._counts.values())

    @property
    def losses(self) -> int:
        """How many were data that nobody asked to leave out."""
        return sum(count for reason, count in self._counts.items() if reason not in _NO_LOSS)


def printable(name: str) -> str:
    """Return a file's name as text that can be written, also where the file system has bytes that are no UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
