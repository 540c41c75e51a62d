"""The shipped stream, and the tool that builds such streams."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from r1p_dist.data.index import index_shard
from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import ASSETS, Stream
from tests.data.toy_task import picture, read_webdataset, write_tar

TOOL = Path(__file__).resolve().parents[2] / "tools" / "dev" / "build_mini_stream.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("build_mini_stream", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shipped() -> Stream:
    return Stream.load("mini_mtil")


def test_shipped_sizes_are_as_the_file_says(shipped: Stream):
    assert len(shipped.tasks) == 11
    for task in shipped.tasks:
        classes = len(task.class_names)
        for split, per_class in [("train", 16), ("validation", 4), ("test", None)]:
            labels = ShardDataset(getattr(task, split), task.class_names).labels
            assert len(labels) == task.sizes[split]
            assert set(Counter(labels)) == set(range(classes))
            if per_class:
                assert Counter(labels) == dict.fromkeys(range(classes), per_class)


def test_shipped_splits_share_no_sample(shipped: Stream):
    for task in shipped.tasks:
        pictures: dict[str, set] = {}
        keys: dict[str, set] = {}
        for split in ("train", "validation", "test"):
            dataset = ShardDataset(getattr(task, split), task.class_names)
            keys[split] = {sample.key for shard in getattr(task, split) for sample in index_shard(shard)}
            pictures[split] = {dataset.read(index).images[0].tobytes() for index in range(len(dataset))}
        for first, second in [("train", "validation"), ("train", "test"), ("validation", "test")]:
            assert not keys[first] & keys[second]
            assert not pictures[first] & pictures[second]


def test_shipped_shards_are_plain_webdataset_with_source_and_licence(shipped: Stream):
    for task in shipped.tasks:
        samples = read_webdataset(task.test[0])
        dataset = ShardDataset(task.test, task.class_names)
        assert [int(sample["cls"]) for sample in samples] == dataset.labels
        for sample in samples:
            facts = json.loads(sample["json"])
            assert facts["class"] == task.class_names[int(sample["cls"])]
            assert facts["source"] and facts["license"]
        assert {dataset.read(0).images[0].size} == {(64, 64)}


def test_shipped_orders_and_domains(shipped: Stream):
    names = [task.name for task in shipped.tasks]
    second = [task.name for task in Stream.load("mini_mtil", order="second").tasks]
    assert names == sorted(names) == sorted(second) and second != names
    unseen = {
        "animal_silhouettes",
        "fashion",
        "handwritten_digits",
        "planet_surface",
        "playing_cards",
        "writing_scripts",
    }
    assert {task.name: task.domain for task in shipped.tasks} == {
        name: "unseen" if name in unseen else "seen" for name in names
    }


def test_shipped_files_are_small_and_noted(shipped: Stream):
    files = [path for path in (ASSETS / "mini_mtil").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25 * 2**20
    notice = (ASSETS / "NOTICE.md").read_text()
    assert [task.name for task in shipped.tasks if f"| {task.name} |" not in notice] == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two tasks of two classes; each class has 6 train samples from 3 sources and 2 test samples."""
    for offset, name in [(0, "fruit"), (100, "birds")]:
        folder = tmp_path / "source" / name
        for split, count in [("train", 12), ("test", 4)]:
            files = []
            for index in reversed(range(count)):
                key = f"{split}{index:02d}"
                number = offset + index + (50 if split == "test" else 0)
                facts = {"source": f"vendor {index // 2 % 3}", "license": "MIT"}
                files += [(f"{key}.json", json.dumps(facts).encode()), (f"{key}.png", picture(number))]
                files += [(f"{key}.cls", str(index % 2).encode())]
            write_tar(folder / f"{split}-000000.tar", files)
        (folder / "classnames.txt").write_text("one\ntwo\n")
        (folder / "templates.txt").write_text("a {c}.\n")
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_builder_gives_the_same_bytes(tool, source: Path, tmp_path: Path):
    options = ["--name", "toy", "--validation-per-class", "2", "--unseen", "birds", "--order", "back=fruit,birds"]
    for name in ("first", "second"):
        assert tool.main([str(source), str(tmp_path / name), *options]) == 0
    assert contents(tmp_path / "first") == contents(tmp_path / "second")

    stream = Stream.load(tmp_path / "first")
    assert [(task.name, task.domain) for task in stream.tasks] == [("birds", "unseen"), ("fruit", "seen")]
    assert [task.name for task in Stream.load(tmp_path / "first", order="back").tasks] == ["fruit", "birds"]
    assert stream.name == "toy" and stream.tasks[0].sizes == {"train": 8, "validation": 4, "test": 4}
    for task in stream.tasks:
        samples = {}
        for split in ("train", "validation", "test"):
            shard = getattr(task, split)[0]
            content = shard.read_bytes()
            for sample in index_shard(shard):
                samples[sample.key] = {suffix: content[at : at + size] for suffix, (at, size) in sample.files.items()}
        expected = {}
        for split in ("train", "test"):
            for plain in read_webdataset(source / task.name / f"{split}-000000.tar"):
                expected[plain["__key__"]] = {key: value for key, value in plain.items() if key[0] != "_"}
        assert samples == expected
        keys = [sample.key for sample in index_shard(task.train[0])]
        assert keys == sorted(keys)


def test_validation_takes_whole_sources(tool, source: Path, tmp_path: Path):
    assert tool.main([str(source), str(tmp_path / "built"), "--validation-per-class", "2"]) == 0
    (entry, _) = yaml.safe_load((tmp_path / "built" / "stream.yaml").read_text())["tasks"]
    assert "domain" not in entry
    vendors = {
        split: {
            json.loads(sample["json"])["source"] for sample in read_webdataset(tmp_path / "built" / entry[split][0])
        }
        for split in ("train", "validation")
    }
    assert len(vendors["validation"]) == 1 and not vendors["train"] & vendors["validation"]


def test_without_validation_there_is_no_such_split(tool, source: Path, tmp_path: Path):
    assert tool.main([str(source), str(tmp_path / "built"), "--validation-per-class", "0"]) == 0
    task = Stream.load(tmp_path / "built").tasks[0]
    assert (task.validation, task.sizes) == ((), {"train": 12, "test": 4})


def bad_picture(source: Path) -> None:
    write_tar(source / "fruit" / "test-000000.tar", [("k.png", b"no picture"), ("k.cls", b"0")])


def bad_json(source: Path) -> None:
    write_tar(source / "fruit" / "test-000000.tar", [("k.png", picture(0)), ("k.cls", b"0"), ("k.json", b"[1]")])


def same_key(source: Path) -> None:
    write_tar(source / "fruit" / "test-000000.tar", [("train03.png", picture(0)), ("train03.cls", b"0")])


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (lambda source: (source / "fruit" / "templates.txt").unlink(), [], ["fruit/templates.txt is missing"]),
        (lambda source: (source / "fruit" / "templates.txt").write_text("a\n"), [], ["fruit/templates.txt", "{c}"]),
        (lambda source: (source / "fruit" / "classnames.txt").write_text("one\n"), [], ["label 1", "1 classes"]),
        (lambda source: (source / "fruit" / "test-000000.tar").unlink(), [], ["fruit", "test-*.tar"]),
        (bad_picture, [], ["fruit/test-000000.tar", "key k", "cannot be decoded"]),
        (bad_json, [], ["fruit/test-000000.tar", "key k", "JSON"]),
        (same_key, [], ["fruit", "key train03 stands twice"]),
        (lambda source: None, ["--validation-per-class", "6"], ["'one' has 6 samples", "--validation-per-class=6"]),
        (lambda source: None, ["--unseen", "cars"], ["--unseen cars", "birds, fruit"]),
        (lambda source: None, ["--order", "back=fruit"], ["orders.back", "birds missing"]),
    ],
)
def test_the_builder_refuses_bad_input_with_one_line(
    tool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, spoil, options: list[str], words: list[str]
):
    spoil(source)
    assert tool.main([str(source), str(tmp_path / "built"), *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert [word for word in words if word not in message] == [], message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_the_builder_writes_over_nothing(tool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert tool.main([str(source), str(source)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "no"), str(tmp_path / "built")]) == 2
    assert "is not a folder" in capsys.readouterr().err
