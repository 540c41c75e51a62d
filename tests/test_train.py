"""Whole runs on real tasks: what they leave, against plain open_clip, and what stops them before any training."""

import io
import json
import tarfile
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from r1p_dist.data import Stream, TrainLoader
from r1p_dist.data.stream import ASSETS
from r1p_dist.data.task_list import read_tasks
from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config
from tests.data.toy_task import write_tar

TASKS = ["playing_cards", "country_flags"]
SHORT = [f"tasks=[{', '.join(TASKS)}]", "train.iterations=4", "train.lr=2e-2", "log.every_steps=2"]


def run_stream(rank: int, world_size: int, overrides: list[str]) -> str:
    from r1p_dist.train import run

    return json.dumps(run(load_config("mini_mtil_dac", overrides)))


def read_metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text())


def plain_clip(folder: Path = ASSETS / "tiny") -> tuple[torch.nn.Module, Any, Any]:
    source = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(source)
    return model.eval(), preprocess, open_clip.get_tokenizer(source)


def add_adapters(model: torch.nn.Module, folder: Path) -> None:
    """Adds scaling * B A of every adapter.safetensors to a plain open_clip CLIP."""
    places = {"out": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
    weights = model.state_dict()
    for task in sorted(folder.iterdir()):
        tensors, facts = load_file(task / "adapter.safetensors"), json.loads((task / "adapter.json").read_text())
        for name, layer_facts in facts["layers"].items():
            tower, block, layer = name.split(".")
            prefix = "visual." if tower == "image" else ""
            place = places.get(layer, "attn.in_proj_weight")
            weight = weights[f"{prefix}transformer.resblocks.{block}.{place}"]
            delta = layer_facts["scaling"] * tensors[f"{name}.B"] @ tensors[f"{name}.A"]
            start = "qkv".find(layer) * len(delta) if layer in "qkv" else 0
            weight[start : start + len(delta)] += delta
    model.load_state_dict(weights)


@torch.no_grad()
def accuracy(
    model: torch.nn.Module, preprocess: Any, tokenizer: Any, task: str, stream: Path = ASSETS / "mini_mtil"
) -> float:
    folder = stream / task
    classes = (folder / "classnames.txt").read_text().splitlines()
    templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
    prompts = tokenizer([template.replace("{c}", name) for name in classes for template in templates])
    text = model.encode_text(prompts, normalize=True).view(len(classes), len(templates), -1).mean(1)
    text = text / text.norm(dim=1, keepdim=True)
    with tarfile.open(folder / "test-000000.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    labels = [int(content) for name, content in files.items() if name.endswith(".cls")]
    pictures = [Image.open(io.BytesIO(content)) for name, content in files.items() if name.endswith(".jpg")]
    image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]), normalize=True)
    return 100 * ((image @ text.T).argmax(1) == torch.tensor(labels)).float().mean().item()


@pytest.fixture(scope="module")
def on_two_ranks(
    run_distributed, toy: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """A run folder, of the small model on whole tasks, and what `run` returned on each rank."""
    run_dir = tmp_path_factory.mktemp("run")
    overrides = [*SHORT, toy[1], f"run_dir={run_dir}", "deepspeed.config=zero3", "log.trackers=[tensorboard]"]
    return run_dir, [json.loads(text) for text in run_distributed(run_stream, 2, overrides)]


def test_a_run_on_two_ranks_leaves_what_plain_open_clip_reproduces(on_two_ranks, toy: list[str]) -> None:
    run_dir, (first, second) = on_two_ranks
    metrics = read_metrics(run_dir)
    assert first == metrics and {**second, "wall_seconds": 0} == {**metrics, "wall_seconds": 0}

    model, preprocess, tokenizer = plain_clip(Path(toy[1].partition(":")[2]))
    expected = [accuracy(model, preprocess, tokenizer, task) for task in TASKS]
    assert metrics["accuracy"][0] == pytest.approx(expected)
    add_adapters(model, run_dir / "adapters")
    expected = [accuracy(model, preprocess, tokenizer, task) for task in TASKS]
    # fp32 sums in another order may turn a picture that is a tie
    assert metrics["accuracy"][-1] == pytest.approx(expected, abs=0.7)
    assert metrics["accuracy"][-1] != metrics["accuracy"][0] != metrics["accuracy"][1]


def test_the_files_of_a_run_agree_with_each_other(on_two_ranks) -> None:
    run_dir, _ = on_two_ranks
    metrics = read_metrics(run_dir)
    folders = sorted((run_dir / "adapters").iterdir())
    layers = [json.loads((folder / "adapter.json").read_text())["layers"].values() for folder in folders]
    drifts = [[layer.get("drift") for layer in of_task] for of_task in layers]
    assert set(drifts[0]) == {None} and all(0 < drift < 1 for of_task in drifts[1:] for drift in of_task)
    assert metrics["tasks"] == TASKS and len(metrics["accuracy"]) == 1 + len(TASKS)
    asked = [(task.name, task.class_names, task.templates) for task in Stream.load("mini_mtil", tasks=TASKS).tasks]
    assert [(task.name, task.class_names, task.templates) for task in read_tasks(run_dir / "tasks.json")] == asked
    facts = [metrics[key] for key in ("world_size", "zero_stage", "method", "seed")]
    assert facts == [2, 3, "dac", 0]
    # 12 experts per linear: 4 linears of 192 by 192 and two of 192 by 768 in each of 5 blocks, without the routers
    assert metrics["trainable_parameters"] == 12 * 5 * (4 * 384 + 2 * 960)
    assert metrics["inference"] == "merged"
    features = 32 * 192 * 4  # of a global batch, fp32; those of image and text and the labels are gathered
    assert metrics["collectives_per_step"]["allgather"] == {"calls": 3, "bytes": 2 * features + 32 * 8}
    for line in (run_dir / "correct.jsonl").read_text().splitlines():
        record = json.loads(line)
        matrix_entry = metrics["accuracy"][record["row"]][TASKS.index(record["task"])]
        assert 100 * record["correct"].count("1") / len(record["correct"]) == pytest.approx(matrix_entry)
    steps = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [(step["task"], step["step"]) for step in steps] == [(task, step) for task in TASKS for step in (2, 4)]
    assert [step.get("loss_ago", 0) > 0 for step in steps] == [False, False, True, True]
    for step in steps[2:]:  # the terms are all of the loss
        assert step["loss"] == pytest.approx(step["loss_data"] + step["loss_ago"])
    assert all(step.keys() >= {"loss", "lr", "samples_per_second", "data_wait"} for step in steps)
    assert load_config(run_dir / "config.yaml").train.iterations == 4
    assert (run_dir / "report.html").is_file() and list((run_dir / "tensorboard").iterdir())
    assert [value is not None for value in metrics["before_merge"]] == [True, True]
    _, (own, later), (kept, last) = metrics["accuracy"]
    assert metrics["transfer"] == later and metrics["last"] == pytest.approx((kept + last) / 2)
    assert metrics["bwt"] == pytest.approx(kept - own) and metrics["average"] == pytest.approx(
        (own + later + kept + last) / 4
    )


def metrics_of(rows: list[list[float]], stages: int) -> dict[str, Any]:
    """What a run of three tasks writes that has found these rows."""
    from r1p_dist.scores import make_metrics
    from r1p_dist.session import Progress

    tasks = [SimpleNamespace(name=name, metric="accuracy", domain=None) for name in "abc"]
    session = SimpleNamespace(
        config=load_config("mini_mtil_dac"),
        progress=Progress(rows=rows),
        method=SimpleNamespace(count_parameters=lambda: 7, inference="merged"),
        stages=[None] * stages,
        facts={"versions": {}},
        seconds=12.34,
    )
    return make_metrics(SimpleNamespace(tasks=tasks), session)


def test_figures_of_a_run_by_hand() -> None:
    zero_shot, *trained = [[10.0, 20.0, 30.0], [50.0, 24.0, 32.0], [46.0, 60.0, 26.0], [40.0, 51.0, 80.0]]
    found = metrics_of([zero_shot, *trained], stages=3)
    assert found["transfer"] == (24 + (32 + 26) / 2) / 2 and found["last"] == (40 + 51 + 80) / 3
    assert found["bwt"] == ((40 - 50) + (51 - 60)) / 2 and found["mft"] == pytest.approx((50 + 60 + 80) / 3)
    # in the middle of the stream: no row is taken for the last one, and none for joint training's
    for count in (0, 1, 2):
        partial = metrics_of([zero_shot, *trained[:count]], stages=3)
        assert partial["last"] is partial["bwt"] is partial["average"] is None
        assert partial["transfer"] == (26.5 if count == 2 else None)
    joint = metrics_of([zero_shot, trained[2]], stages=1)
    assert joint["last"] == 57.0 and joint["transfer"] is joint["average"] is None


def test_zero_shot_repeats_its_row_and_has_the_identities(run_distributed, toy: list[str], tmp_path: Path) -> None:
    run_distributed(run_stream, 1, [*SHORT, *toy, "method=zero_shot", f"run_dir={tmp_path}"])
    metrics = read_metrics(tmp_path)
    row = metrics["accuracy"][0]
    assert metrics["accuracy"] == [row] * 3 and metrics["trainable_parameters"] == 0
    assert metrics["transfer"] == pytest.approx(row[1])
    assert metrics["average"] == metrics["last"] == pytest.approx(fmean(row))
    assert metrics["bwt"] == metrics["forgetting"] == 0 and metrics["before_merge"] == [None, None]


def test_joint_has_one_trained_row(run_distributed, toy: list[str], tmp_path: Path) -> None:
    run_distributed(run_stream, 1, [*SHORT, *toy, "method=joint", f"run_dir={tmp_path}"])
    metrics = read_metrics(tmp_path)
    assert len(metrics["accuracy"]) == 2 and metrics["last"] == pytest.approx(fmean(metrics["accuracy"][1]))
    assert metrics["transfer"] is None and metrics["bwt"] is None
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 8  # as many as the tasks have together


def test_lora_kept_going_and_restarted_differ_after_the_first_task(
    run_distributed, toy: list[str], tmp_path: Path
) -> None:
    rows = {}
    for restart in ("false", "true"):
        folder = tmp_path / restart
        overrides = [*SHORT, *toy, "train.lr=5e-2", "method=lora", f"options.restart={restart}", f"run_dir={folder}"]
        run_distributed(run_stream, 1, overrides)
        rows[restart] = read_metrics(folder)["accuracy"]
    assert rows["false"][:2] == rows["true"][:2] and rows["false"][2] != rows["true"][2]
    assert rows["false"][0] != rows["false"][1]


def fail_for(rank: int, world_size: int, cases: list[list[str]]) -> list[str]:
    from r1p_dist.train import run

    messages = []
    for overrides in cases:
        try:
            run(load_config("mini_mtil_dac", overrides))
        except InputError as error:
            messages.append(str(error))
        else:
            messages.append("no error")
    return messages


def write_stream(folder: Path, train: list[tuple[str, bytes]]) -> Path:
    """Writes a stream of one task whose train shard has these files and returns its file."""
    write_tar(folder / "train.tar", train)
    write_tar(folder / "test.tar", [("a.cls", b"0"), ("a.png", b"")])
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "templates.txt").write_text("a {c}\n")
    (folder / "stream.yaml").write_text(
        "name: toy\ntasks:\n- {name: pets, train: [train.tar], test: [test.tar], class_names: classes.txt, "
        "templates: templates.txt}\n"
    )
    return folder / "stream.yaml"


def test_each_stage_mixes_in_the_tasks_before_it_and_the_reference(monkeypatch, toy: list[str], tmp_path: Path) -> None:
    import r1p_dist.train

    found: list[TrainLoader] = []
    monkeypatch.setattr(r1p_dist.train, "train_stages", lambda data, *rest: found.extend(d.train for d in data) or {})
    reference = write_stream(tmp_path / "reference", [("a.cls", b"1"), ("a.png", b"")])
    shares = ["data.replay_share=0.25", "data.reference_share=0.125", f"data.reference={reference}"]
    config = load_config("mini_mtil_dac", [*SHORT, *toy, *shares, f"run_dir={tmp_path}/run", "deepspeed.config=zero0"])
    r1p_dist.train.run(config)
    cards, flags = (
        [task.prompt(label) for label in range(8)] for task in Stream.load(config.stream, None, TASKS).tasks
    )
    others = ["a cat", "a dog"]
    assert [loader.prompts for loader in found] == [[*cards, *others], [*flags, *cards, *others]]


def test_bad_input_is_one_line_that_names_it_before_any_training(run_distributed, tmp_path: Path) -> None:
    unknown_class = write_stream(tmp_path / "unknown_class", [("a.cls", b"2"), ("a.png", b"")])
    empty_shard = write_stream(tmp_path / "empty", [])
    cases = {
        "backbone.name=ViT-B-61": "backbone.name=ViT-B-61: open_clip has no such model; nearest: ViT-B-16",
        "backbone.pretrained=openai": "backbone.pretrained=openai: the model tiny brings its own weights",
        "method=dca": "method=dca: no such method; did you mean dac?",
        "options.rank=200": "options.rank=200 is larger than a layer of 192 by 192",
        "stream=mini_mtli": "stream=mini_mtli: no such stream file",
        f"stream={unknown_class}": "train.tar: key a: label 2 is outside the class list, 2 classes from 0",
        f"stream={empty_shard}": "train.tar: empty shard",
        "train.per_task.fashoin.lr=1e-3": "train.per_task: unknown task 'fashoin' (nearest: fashion)",
        "tasks=[fashoin]": "unknown task 'fashoin' (nearest: fashion)",
    }
    run_dir = tmp_path / "run"
    overrides = [[case, f"run_dir={run_dir}"] for case in cases]
    messages = run_distributed(fail_for, 1, overrides)[0]
    for message, expected in zip(messages, cases.values(), strict=True):
        assert expected in message and "\n" not in message
    assert not run_dir.exists()
