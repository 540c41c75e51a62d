"""What each method says of itself, which `r1p methods` prints: read from its source, which needs no torch."""

import ast
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from r1p_dist.arguments import Parser
from r1p_dist.methods import INFERENCE_NEEDS, installed_methods, shipped_methods

_PACKAGE = "r1p_dist"


@dataclass
class Option:
    """One key of a method's options: its default as it is written, and what it means."""

    name: str
    default: str
    meaning: str


@dataclass
class Description:
    """A method in words. docstring: of its class; module: where that is."""

    name: str
    module: str
    docstring: str
    paper: str = ""
    stores: str = "nothing"
    inference: str = "merged"
    options: list[Option] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.docstring.partition("\n")[0]

    @property
    def inference_needs(self) -> str:
        return INFERENCE_NEEDS[self.inference]

    def lines(self) -> Iterator[str]:
        yield f"{self.name}  {self.summary}"
        yield f"    paper: {self.paper or 'none'}; stores {self.stores}; inference needs {self.inference_needs}"
        for option in self.options:
            yield f"    options.{option.name}={option.default}  {option.meaning}"


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints each method with its options."""
    Parser(prog=prog, description="List the methods.").parse_args(argv)
    print("\n".join(line for description in describe_all() for line in description.lines()))
    return 0


def describe_all() -> list[Description]:
    """Returns the shipped methods, then those of installed packages."""
    found = [_describe(name, f"r1p_dist.methods.{name}", None) for name in shipped_methods()]
    return found + [_describe(name, point.module, point.attr) for name, point in sorted(installed_methods().items())]


class _Source:
    """The classes of a module, as they are written, and where the names that it imports come from."""

    def __init__(self, module: str) -> None:
        tree = ast.parse(_file_of(module).read_text(encoding="utf-8"))
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._imported = {
            alias.asname or alias.name: (node.module, alias.name)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def find(self, name: str) -> "tuple[_Source, ast.ClassDef] | None":
        """Returns a class of this module or one that it imports, and its source; None where it is of another kind."""
        if name in self.classes:
            return self, self.classes[name]
        if name in self._imported and self._imported[name][0].split(".")[0] == _PACKAGE:
            module, original = self._imported[name]
            return _source_of(module).find(original)
        return None

    def is_method(self, node: ast.ClassDef) -> bool:
        return any(base.name == "Method" for _, base in _lineage(self, node))


@functools.cache
def _source_of(module: str) -> _Source:
    return _Source(module)


def _file_of(module: str) -> Path:
    """Returns a module's file; of this package without importing those that it stands in."""
    own, *rest = module.split(".")
    if own != _PACKAGE:
        return Path(importlib.util.find_spec(module).origin)
    place = Path(__file__).parent.joinpath(*rest)
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _describe(name: str, module: str, attribute: str | None) -> Description:
    source = _source_of(module)
    node = source.classes[attribute] if attribute else next(filter(source.is_method, source.classes.values()))
    description = Description(name, module, ast.get_docstring(node) or "")
    for owner, base in reversed(list(_lineage(source, node))):
        for key, value in _assignments(base):
            if key in ("paper", "stores", "inference") and isinstance(value, ast.Constant):
                setattr(description, key, value.value)
            if key == "Options" and isinstance(value, ast.Name) and (found := owner.find(value.id)):
                description.options = _last_of_each(_options(*found, ""))
        for inner in base.body:
            if isinstance(inner, ast.ClassDef) and inner.name == "Options":
                description.options = _last_of_each(_options(owner, inner, ""))
    return description


def _lineage(source: _Source, node: ast.ClassDef) -> Iterator[tuple[_Source, ast.ClassDef]]:
    yield source, node
    for base in node.bases:
        if isinstance(base, ast.Name) and (found := source.find(base.id)):
            yield from _lineage(*found)


def _assignments(node: ast.ClassDef) -> Iterator[tuple[str, ast.expr]]:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            yield statement.targets[0].id, statement.value
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            yield statement.target.id, statement.value


def _last_of_each(options: Iterable[Option]) -> list[Option]:
    """Returns the options without those that a later one of the same name, of a class derived, takes the place of."""
    return list({option.name: option for option in options}.values())


def _options(source: _Source, node: ast.ClassDef, prefix: str) -> Iterator[Option]:
    for owner, base in reversed(list(_lineage(source, node))):
        for statement, after in zip(base.body, [*base.body[1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            name = prefix + statement.target.id
            if isinstance(statement.value, ast.Call) and (found := owner.find(statement.value.func.id)):
                yield from _options(*found, f"{name}.")
                continue
            is_meant = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            shown = ast.unparse(statement.value).strip("'")
            shown = {"True": "true", "False": "false", "None": "null"}.get(shown, shown)
            yield Option(name, shown, after.value.value if is_meant else "")
