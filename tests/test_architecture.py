"""The rooms of the package stay in their order, and nothing in it executes data."""

import ast
import re
from pathlib import Path

import pytest

from r1p_dist.kinds import kind_names

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "r1p_dist"

# A module imports only from its own room and from rooms before it.
ROOMS = (
    "lazy errors output arguments host_waits files run_files shipped safe_yaml tables storage_meter ds_config kinds "
    "key_words places recipe_files config precision distributed host_copy interrupts data losses adapters backbones "
    "evaluation figures moments protocol memory_faults methods recipes trackers checks optimizer optimizer_state "
    "rendezvous engine runlog run_folder checkpoint stage_data step_meter trainer session fit scores page report "
    "export predict serve train dry_run attached_pool peft forget measuring doctor config_reference config_command "
    "method_list backbone_list planner local_ranks compare cluster watch run_commands completion cli __main__"
).split()

# The rooms of what the folder of a kind of backbone holds; its facts are in `kinds`, before them all.
PARTS = {
    "shapes": "kinds",
    "files": "checks",
    **dict.fromkeys(["backbone", "catalogue", "weights", "feature_cache", "feature_files"], "backbones"),
    **dict.fromkeys(["towers", "own_loop", "packing", "token_losses", "random_models"], "backbones"),
    **dict.fromkeys(["family", "families", "qwen", "paligemma"], "backbones"),
    "evaluation": "evaluation",
    **dict.fromkeys(["export", "frozen_weights", "hf", "hf_folder", "open_clip_folder"], "export"),
    "planner": "planner",
    "predict": "predict",
}

SOURCES = PACKAGE / "data/convert/records.py"  # what is converted has kinds of its own

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

EXECUTES_DATA = {
    "pickle": r"\bpickle\b",
    "yaml.load": r"\byaml\.(load|full_load|unsafe_load)\b",
    "trust_remote_code": r"\btrust_remote_code\b(?!=False)",
    "extractall": r"\bextractall\b",
    "shell": r"\bos\.(system|popen)\b|shell=True",
}


def _room(module: str) -> str:
    room, *rest = module.split(".")[1:]
    return PARTS[rest[1]] if room == "kinds" and len(rest) > 1 else room


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, wherever in it the import stands, or exports lazily."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("r1p_dist."):
            found.update([node.value] if _is_module(node.value) else [])
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import with the package's name"
            found.update(
                f"{node.module}.{alias.name}" if _is_module(f"{node.module}.{alias.name}") else node.module
                for alias in node.names
            )
    return {name for name in found if name.split(".")[0] == "r1p_dist"}


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_module_imports_only_from_its_own_and_earlier_rooms(path: Path) -> None:
    room = _room(_name(path))
    assert room in ROOMS, f"{path}: give the room {room} its place in ROOMS"
    for imported in _imports(path):
        assert imported != "r1p_dist", f"{path} imports the package itself: import from the room"
        assert ROOMS.index(_room(imported)) <= ROOMS.index(room), f"{path} reaches forward to {imported}"


def test_nothing_else_knows_a_kind_of_backbone() -> None:
    """A further kind is a further folder; lazy exports of the package's own names are the exception."""
    for path in MODULES:
        if path.parent.name in kind_names() or path in (PACKAGE / "backbones/__init__.py", SOURCES):
            continue
        text = path.read_text(encoding="utf-8")
        for name in kind_names():
            assert not re.search(rf"kinds\.{name}\b|\.kind (==|!=|in) .*[\"']{name}[\"']", text), f"{path} knows {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {_name(path): _imports(path) - {_name(path)} for path in MODULES}
    while free := [name for name, imports in graph.items() if not imports & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"in or behind a circle: {graph}"


@pytest.mark.parametrize("folder", ["r1p_dist", "launchers", "tools"])
def test_nothing_executes_data(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for what, pattern in EXECUTES_DATA.items():
            assert not re.search(pattern, text), f"{path}: {what} can execute data"
        for call in re.finditer(r"\btorch\.load\((.*)", text):
            assert "weights_only=True" in call[1], f"{path}: torch.load without weights_only=True"
