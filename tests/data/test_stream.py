"""Stream files: what a good one gives, and what each fault says."""

import shutil
from pathlib import Path

import pytest
import yaml

from r1p_dist.data.stream import ASSETS, Stream
from r1p_dist.errors import InputError


def content() -> dict:
    tasks = [
        {
            "name": name,
            "train": [f"{name}/train-000000.tar"],
            "test": [f"{name}/test-000000.tar"],
            "class_names": f"{name}/classnames.txt",
            "templates": f"{name}/templates.txt",
        }
        for name in ("fruit", "tools", "birds")
    ]
    tasks[0] |= {"sizes": {"train": 3, "test": 2}, "domain": "seen", "validation": ["fruit/validation-000000.tar"]}
    return {"name": "toy", "tasks": tasks, "orders": {"reverse": ["birds", "tools", "fruit"]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("fruit", "tools", "birds"):
        (tmp_path / name).mkdir()
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}-000000.tar").touch()
        (tmp_path / name / "classnames.txt").write_text("red one\nblue {x}\n")
        (tmp_path / name / "templates.txt").write_text("a photo of a {c}.\na {c} in {braces}.\n")
    write(tmp_path, content())
    return tmp_path


def write(folder: Path, value: object) -> None:
    (folder / "stream.yaml").write_text(yaml.safe_dump(value))


def test_a_stream_file_gives_its_tasks_in_order(folder: Path):
    stream = Stream.load(folder / "stream.yaml")
    assert (stream.name, stream.path) == ("toy", folder / "stream.yaml")
    assert [task.name for task in stream.tasks] == ["fruit", "tools", "birds"]
    fruit, tools, _ = stream.tasks
    assert fruit.train == (folder / "fruit" / "train-000000.tar",)
    assert fruit.validation == (folder / "fruit" / "validation-000000.tar",)
    assert (fruit.sizes, fruit.domain) == ({"train": 3, "test": 2}, "seen")
    assert (tools.validation, tools.sizes, tools.domain) == ((), {}, None)
    assert fruit.prompt(0) == "a photo of a red one."
    assert fruit.prompts(1) == ["a photo of a blue {x}.", "a blue {x} in {braces}."]
    assert Stream.load(str(folder)) == stream


def test_order_and_tasks_choose_the_tasks(folder: Path):
    def names(**options) -> list[str]:
        return [task.name for task in Stream.load(folder, **options).tasks]

    assert names(order="reverse") == ["birds", "tools", "fruit"]
    assert names(tasks=["tools", "fruit"]) == ["tools", "fruit"]
    assert names(order="reverse", tasks=["tools", "birds"]) == ["tools", "birds"]


def test_names_in_the_configuration_may_be_of_tasks_not_chosen(folder: Path):
    stream = Stream.load(folder, tasks=["fruit"])
    stream.check_names(["tools", "birds"], "train.per_task")
    with pytest.raises(InputError, match=r"train.per_task: unknown task 'fruits' \(nearest: fruit\)"):
        stream.check_names(["fruits"], "train.per_task")


def test_only_the_chosen_tasks_need_their_files(folder: Path):
    shutil.rmtree(folder / "tools")
    assert len(Stream.load(folder, tasks=["fruit", "birds"]).tasks) == 2
    with pytest.raises(InputError, match="task tools.train: shard .*tools/train-000000.tar is missing"):
        Stream.load(folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": "revers"}, ["stream.yaml", "unknown order 'revers'", "nearest: reverse"]),
        ({"tasks": ["fruit", "bird"]}, ["stream.yaml", "unknown task 'bird'", "nearest: birds", "known: fruit, tools"]),
        ({"tasks": ["fruit", "fruit"]}, ["stream.yaml", "tasks", "once", "fruit"]),
        ({"tasks": []}, ["stream.yaml", "tasks", "[]"]),
    ],
)
def test_wrong_choice_names_the_nearest(folder: Path, options: dict, words: list[str]):
    check_message(lambda: Stream.load(folder, **options), words)


def put(path: str, value: object):
    """Return an edit of the stream's mapping; `path` like tasks.0.name, value ... deletes."""

    def edit(mapping: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            mapping = mapping[int(key) if key.isdigit() else key]
        if value is ...:
            del mapping[last]
        else:
            mapping[last] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (put("order", {}), ["unknown key 'order'", "nearest: orders", "allowed: name, tasks, orders"]),
        (put("name", ...), ["key 'name' is missing"]),
        (put("name", 7), ["name", "must be text", "7"]),
        (put("tasks", []), ["tasks must be a list", "[]"]),
        (put("tasks", ["fruit"]), ["tasks[0]", "mapping", "'fruit'"]),
        (put("tasks.1.trian", []), ["tasks[1]", "unknown key 'trian'", "nearest: train"]),
        (put("tasks.1.train", ...), ["tasks[1]", "key 'train' is missing"]),
        (put("tasks.1.train", "a.tar"), ["tools.train", "list", "'a.tar'"]),
        (put("tasks.1.train", []), ["tools.train", "list", "[]"]),
        (put("tasks.1.train", ["pipe:cat a.tar"]), ["tools.train", "pipe:cat a.tar", "commands are never run"]),
        (put("tasks.1.train", ["ftp://host/a.tar"]), ["tools.train", "ftp://host/a.tar", "no address of http"]),
        (put("tasks.1.train", ["tools/{0..9.tar"]), ["tools.train", "tools/{0..9.tar"]),
        (put("tasks.1.train", ["tools/{0..99999999}.tar"]), ["tools.train", "more than 100000 shards"]),
        (put("tasks.1.test", ["tools/test-000000.tar"] * 2), ["tools.test", "twice"]),
        (put("tasks.1.validation", []), ["tools.validation", "list"]),
        (put("tasks.1.name", "fruit"), ["tasks[1].name", "fruit", "twice"]),
        (put("tasks.1.name", "../x"), ["tasks[1].name", "../x", "folder"]),
        (put("tasks.1.name", 101), ["tasks[1].name", "text", "101"]),
        (put("tasks.1.class_names", "no.txt"), ["tools.class_names", "no.txt is missing"]),
        (put("tasks.1.sizes", {"trian": 3}), ["tools.sizes", "unknown key 'trian'", "nearest: train"]),
        (put("tasks.1.sizes", {"train": "3"}), ["tools.sizes.train", "'3'"]),
        (put("tasks.1.sizes", 3), ["tools.sizes", "3"]),
        (put("tasks.1.domain", "new"), ["tools.domain", "seen, unseen", "'new'"]),
        (put("orders", ["fruit"]), ["orders", "['fruit']"]),
        (put("orders.reverse", "fruit"), ["orders.reverse", "'fruit'"]),
        (put("orders.reverse", ["birds", "fruit"]), ["orders.reverse", "tools missing"]),
        (put("orders.reverse", ["birds", "tools", "fruit", "fruit"]), ["orders.reverse", "twice"]),
        (
            put("orders.reverse", ["birds", "tool", "fruit"]),
            ["orders.reverse", "unknown task 'tool'", "nearest: tools"],
        ),
    ],
)
def test_a_fault_in_the_file_names_file_key_and_value(folder: Path, edit, words: list[str]):
    mapping = content()
    edit(mapping)
    write(folder, mapping)
    check_message(lambda: Stream.load(folder), [str(folder / "stream.yaml"), *words])


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tools/templates.txt", "a photo of a {c}.\na photo.\n", ["line 2", "'a photo.'", "{c}"]),
        ("tools/templates.txt", "", ["empty"]),
        ("tools/classnames.txt", "\n\n", ["empty"]),
        ("tools/classnames.txt", "saw\n\nhammer\n", ["line 2", "empty"]),
        ("tools/classnames.txt", b"s\xe4ge\n", ["UTF-8"]),
        ("stream.yaml", "name: [", ["YAML"]),
        ("stream.yaml", "name: a\nname: b\n", ["line 2", "'name'", "twice"]),
        ("stream.yaml", b"name: s\xe4ge\n", ["UTF-8"]),
        ("stream.yaml", "- a", ["mapping"]),
        ("stream.yaml", "!!python/object/apply:os.getcwd []", ["YAML"]),
    ],
)
def test_a_fault_in_a_text_names_file_and_line(folder: Path, file: str, text: str | bytes, words: list[str]):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    check_message(lambda: Stream.load(folder), [str(folder / file), *words])


def test_a_missing_stream_names_those_shipped(tmp_path: Path):
    check_message(
        lambda: Stream.load("mini_mtill"), ["mini_mtill", "nearest: mini_mtil", "one of: mini_instruct, mini_mtil"]
    )
    check_message(lambda: Stream.load(tmp_path / "no.yaml"), [str(tmp_path / "no.yaml")])


def test_the_shipped_stream_is_found_by_name_and_by_path():
    by_name = Stream.load("mini_mtil")
    assert by_name == Stream.load(ASSETS / "mini_mtil" / "stream.yaml")
    assert by_name.name == "mini_mtil"


def check_message(call, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


INSTRUCTION = {"name": "charts", "train": ["fruit/train-000000.tar"], "test": ["fruit/test-000000.tar"]}
INSTRUCTION |= {"metric": "vqa_accuracy"}


def write_instructions(folder: Path, *tasks: dict) -> None:
    write(folder, {"name": "toy", "tasks": list(tasks or [INSTRUCTION])})


def test_a_task_of_instructions_has_a_metric_in_the_place_of_classes(folder: Path):
    own = {"name": "own", "max_new_tokens": 5, "format": "[0-9]+|yes|no", "sizes": {"test": 2}, "domain": "unseen"}
    write_instructions(folder, INSTRUCTION, INSTRUCTION | own)
    charts, named = Stream.load(folder).tasks
    assert charts.is_instruction and (charts.class_names, charts.templates) == ((), ())
    assert (charts.metric, charts.max_new_tokens, charts.format) == ("vqa_accuracy", 64, None)
    assert (named.max_new_tokens, named.format) == (5, "[0-9]+|yes|no")
    assert (named.sizes, named.domain) == ({"test": 2}, "unseen")
    write(folder, content())
    fruit = Stream.load(folder).tasks[0]
    assert not fruit.is_instruction and fruit.metric == "accuracy"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "accuracy"}, "charts.metric: must be one of exact_match, vqa_accuracy, multiple_choice, rouge_l, "),
        ({"metric": ["cider"]}, r"charts.metric: must be one of .*, got \['cider'\]"),
        ({"metric": None}, r"tasks\[0\]: key 'class_names' is missing; a task of conversations needs 'metric' instead"),
        ({"class_names": "c.txt"}, r"tasks\[0\]: has both 'class_names' and 'metric'; leave out 'class_names' if its"),
        ({"templates": "t.txt"}, r"tasks\[0\]: has both 'templates' and 'metric'"),
        ({"max_new_tokens": 0}, "charts.max_new_tokens: must be a number of tokens from 1 to 4096, got 0"),
        ({"max_new_tokens": 4097}, "charts.max_new_tokens: .* got 4097"),
        ({"max_new_tokens": True}, "charts.max_new_tokens: .* got True"),
        ({"max_new_tokens": "64"}, "charts.max_new_tokens: .* got '64'"),
        ({"format": "(a"}, r"charts.format: '\(a' is no regular expression: missing \)"),
        ({"format": 7}, "charts.format: must be text"),
    ],
)
def test_a_fault_in_a_task_of_instructions(folder: Path, fields: dict, message: str):
    write_instructions(folder, INSTRUCTION | fields)
    with pytest.raises(InputError, match=message) as caught:
        Stream.load(folder)
    assert str(caught.value).startswith(str(folder / "stream.yaml")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["max_new_tokens", "format"])
def test_keys_of_answers_are_not_for_classes(folder: Path, key: str):
    mapping = content()
    mapping["tasks"][1][key] = 7
    write(folder, mapping)
    with pytest.raises(InputError, match=rf"tasks\[1\]: '{key}' is for tasks of conversations, which have a 'metric'"):
        Stream.load(folder)


def test_all_tasks_of_a_stream_are_of_one_kind(folder: Path, tmp_path: Path):
    mapping = content()
    mapping["tasks"].append(INSTRUCTION)
    del mapping["orders"]
    write(folder, mapping)
    fault = "task fruit has classes and task charts conversations; the tasks of a run must be of one kind"
    with pytest.raises(InputError, match=f"stream.yaml: {fault}"):
        Stream.load(folder)
    assert [task.name for task in Stream.load(folder, tasks=["charts"]).tasks] == ["charts"]
    with pytest.raises(InputError, match=f"extend: .*:charts: {fault}"):
        Stream.load(folder, tasks=["fruit"]).extended([f"{folder}:charts"])
    with pytest.raises(InputError, match=f"extend: .*:fruit: {fault}"):
        Stream.load(folder, tasks=["charts"]).extended([f"{folder}:fruit"])


def test_shards_may_be_remote_and_braces_count(folder: Path):
    (folder / "fruit/train-000001.tar").touch()
    mapping = content()
    mapping["tasks"][0]["train"] = ["fruit/train-{000000..000001}.tar"]
    mapping["tasks"][0]["test"] = ["s3://bucket/fruit/{a,b}-{08..10}.tar", "https://host/x.tar"]
    write(folder, mapping)
    task = Stream.load(folder).tasks[0]
    assert task.train == (folder / "fruit/train-000000.tar", folder / "fruit/train-000001.tar")
    assert task.test == (
        *(f"s3://bucket/fruit/{letter}-{number}.tar" for letter in "ab" for number in ("08", "09", "10")),
        "https://host/x.tar",
    )
