"""The tool that cuts a stream's tasks into parts of their classes."""

import pytest

from r1p_dist.data.index import index_shard
from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import Stream
from tests.documents import imported_tool


@pytest.fixture(scope="module")
def tool():
    yield from imported_tool("split_stream")


def test_parts_have_all_classes_and_samples_once(tool, tmp_path) -> None:
    assert tool.main(["mini_mtil", str(tmp_path / "split"), "--parts", "3", "--seed", "4"]) == 0
    whole, split = Stream.load("mini_mtil"), Stream.load(tmp_path / "split")
    assert len(split.tasks) == 3 * len(whole.tasks)
    first_of = [task.name.rpartition("_")[0] for task in split.tasks[:11]]
    assert len(set(first_of)) > 4  # drawn, not task after task
    for task in whole.tasks:
        parts = [part for part in split.tasks if part.name.rpartition("_")[0] == task.name]
        names = [name for part in parts for name in part.class_names]
        assert sorted(names) == sorted(task.class_names) and names != list(task.class_names)
        assert {(part.templates, part.domain) for part in parts} == {(task.templates, task.domain)}
        for kind in ("train", "validation", "test"):
            assert classes_of([task], kind) == classes_of(parts, kind)


def classes_of(tasks, split: str) -> dict[str, str]:
    """Returns the class name of each sample by its key."""
    found: dict[str, str] = {}
    for task in tasks:
        labels = ShardDataset(getattr(task, split), task.class_names).labels
        keys = [sample.key for shard in getattr(task, split) for sample in index_shard(shard)]
        assert not set(keys) & set(found)
        found |= {key: task.class_names[label] for key, label in zip(keys, labels, strict=True)}
    return found


def test_a_seed_says_all_and_another_says_otherwise(tool, tmp_path) -> None:
    content = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        folder = tmp_path / name / "split"
        assert tool.main(["mini_mtil", str(folder), "--seed", str(seed)]) == 0
        content[name] = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
    assert content["a"] == content["b"] != content["c"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["mini_instruct", "OUTPUT"], "task name_object has instructions, and only classes can be split"),
        (["mini_mtil", "OUTPUT", "--parts", "1"], "--parts 1: must be from 2 to 5"),
        (["mini_mtil", "OUTPUT", "--parts", "6"], "--parts 6: must be from 2 to 5"),
        (["mini_mtil", "."], "exists already"),
    ],
)
def test_what_cannot_be_split_is_refused(tool, tmp_path, capsys, arguments: list[str], message: str) -> None:
    assert tool.main([str(tmp_path / "split") if word == "OUTPUT" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
