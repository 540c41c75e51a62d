"""Class names as folders, tables and other libraries have them: one name for what is one class, none for nothing."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from r1p_dist.errors import InputError

_MISSING = ("", "nan", "NaN", "<NA>", "NaT")  # what tables write for nothing; "None" and "NA" can be classes
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")


def class_name(value: Any, where: str) -> str:
    """Returns a class name on one line: white space as single blanks, composed Unicode, no byte order mark.

    So names that look the same are the same, and a list of them is read back as it was written. InputError: nothing, or
    a name that no text file can hold.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise InputError(f"{where}: has no class; fill it in or remove the record")
    name = " ".join(unicodedata.normalize("NFC", str(value).replace("\ufeff", "")).split())
    if name in _MISSING:
        raise InputError(f"{where}: class {str(value)!r} stands for none; fill it in or remove the record")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise InputError(f"{where}: class {ascii(name)} has characters that are no text; rename it")
    return name


def classes_among(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Returns the classes in alphabetical order, numbers in their own and first.

    InputError: two of them are one number, such as 1 and 1.0.
    """

    def order(name: str) -> tuple:
        return (False, int(name), name) if name.isdecimal() else (True, 0, name)

    classes = tuple(sorted(set(names), key=order))
    numbers: dict[float, str] = {}
    for name in classes:
        if _NUMBER.fullmatch(name) and numbers.setdefault(float(name), name) != name:
            raise InputError(f"{where}: classes {numbers[float(name)]!r} and {name!r} are one number; write it one way")
    return classes


def class_numbers(names: Iterable[str], classes: Sequence[str]) -> list[int]:
    """Returns the place of each name among the classes."""
    number = {name: index for index, name in enumerate(classes)}
    return [number[name] for name in names]


def named_classes(values: Iterable[Any], where: str) -> tuple[str, ...]:
    """Returns a list of classes that has its own order, as a data set brings it along.

    Names may stand twice there, as in ImageNet's lists; two that only become the same here are refused.
    """
    given = [str(value) for value in values]
    names = tuple(class_name(value, f"{where}: class {number}") for number, value in enumerate(given))
    if len(set(names)) != len(set(given)):
        raise InputError(f"{where}: classes {_first_merged(given, names)} differ in white space alone; rename one")
    return names


def _first_merged(given: Collection[str], names: Sequence[str]) -> str:
    first: dict[str, str] = {}
    for value, name in zip(given, names, strict=True):
        if first.setdefault(name, value) != value:
            return f"{first[name]!r} and {value!r}"
    raise AssertionError(given)
