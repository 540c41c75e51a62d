"""What a report makes of a run's shards, updates and checkpoints: classes, pictures, layers and experts."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from r1p_dist.data.shards import ShardDataset
from r1p_dist.data.stream import Stream
from r1p_dist.page.parts import Columns, Fold, Gallery, Heat, Table
from r1p_dist.report import classes, experts
from r1p_dist.report.run import RunFiles

TASKS = ["fashion", "country_flags"]


def write_run(folder: Path, marks: dict[tuple[int, str], str], confusions: dict | None = None, **config) -> RunFiles:
    """Writes a run of two shipped tasks. marks: of correct.jsonl, by (row, task)."""
    folder.mkdir(exist_ok=True)
    rows = [[100 * marks[row, task].count("1") / len(marks[row, task]) for task in TASKS] for row in range(3)]
    (folder / "metrics.json").write_text(json.dumps({"tasks": TASKS, "accuracy": rows}))
    (folder / "config.yaml").write_text(json.dumps({"stream": "mini_mtil", "tasks": TASKS, **config}))
    lines = [
        {"row": row, "task": task, "correct": text, "confusions": (confusions or {}).get((row, task), [])}
        for (row, task), text in marks.items()
    ]
    (folder / "correct.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFiles.read(folder)


def labels_of(task: str) -> tuple[list[int], tuple[str, ...]]:
    (found,) = Stream.load("mini_mtil", tasks=[task]).tasks
    return ShardDataset(found.test, found.class_names).labels, found.class_names


@pytest.fixture
def run(tmp_path: Path) -> RunFiles:
    """In the end everything of fashion but its class 0 is right, which is taken for class 1; before, nothing was."""
    labels, _ = labels_of("fashion")
    flags = len(labels_of("country_flags")[0])
    marks = {(row, task): "0" * (len(labels) if task == "fashion" else flags) for row in range(3) for task in TASKS}
    marks[2, "fashion"] = "".join("0" if label == 0 else "1" for label in labels)
    confusions = {(2, "fashion"): [[0, 1, labels.count(0), labels.index(0)]]}
    return write_run(tmp_path / "run", marks, confusions)


def test_classes_are_counted_by_the_labels_of_the_shards(run: RunFiles) -> None:
    labels, names = labels_of("fashion")
    fold, flags = classes.classes(classes.judged(run))
    assert isinstance(fold, Fold) and fold.summary == "fashion: 10 classes" and isinstance(flags, Fold)
    (columns,) = fold.parts
    assert isinstance(columns, Columns)
    heat, table = columns.parts
    assert isinstance(heat, Heat) and isinstance(table, Table)
    rows = {name: [cell.text for cell in cells] for name, cells in heat.rows}
    assert rows[names[0]] == ["0.0", "0.0", "+0.0", str(labels.count(0))]
    assert rows[names[3]] == ["0.0", "100.0", "+100.0", str(labels.count(3))]
    assert heat.rows[0][0] == names[0] and len(rows) == 10
    assert table.rows == [[names[0], names[1], str(labels.count(0)), "–"]]


def test_pictures_are_those_of_the_samples_that_the_marks_are_of(run: RunFiles) -> None:
    labels, names = labels_of("fashion")
    (task,) = Stream.load("mini_mtil", tasks=["fashion"]).tasks
    (columns,) = classes.examples(classes.judged(run))
    assert isinstance(columns, Columns)
    gallery, _ = columns.parts
    assert isinstance(gallery, Gallery) and gallery.title == "fashion"
    learnt, never = gallery.pictures
    first = next(at for at, label in enumerate(labels) if label)
    assert learnt.lines == [names[labels[first]], "before: wrong", "after: right"]
    # of the wrong ones, that whose wrong class is known
    assert never.lines == [names[0], "before: wrong", f"after: {names[1]}"]
    data = ShardDataset(task.test, task.class_names)
    for picture, at in ((learnt, first), (never, labels.index(0))):
        shown = Image.open(io.BytesIO(picture.jpeg))
        meant = data.read(at).images[0]
        meant.thumbnail((112, 112))
        assert shown.size == meant.size
        # JPEG loses a little
        assert np.abs(np.asarray(shown, dtype=float) - np.asarray(meant, dtype=float)).mean() < 8


def test_without_the_shards_or_with_other_ones_there_are_no_classes(run: RunFiles) -> None:
    (run.folder / "config.yaml").write_text(json.dumps({"stream": "/gone/stream.yaml"}))
    gone = RunFiles.read(run.folder)
    judged = classes.judged(gone)
    assert classes.classes(judged) == [] == classes.examples(judged)
    # a sample that could not be read has no mark: nobody knows whose the others are
    marks = {key: text[1:] for key, text in run.results("correct").items()}
    assert classes.classes(classes.judged(write_run(run.folder, marks))) == []


def write_stage(
    run: RunFiles, index: int, factors: dict[str, tuple[np.ndarray, np.ndarray]], votes=None, drift=None
) -> None:
    name = f"{index:02d}-{TASKS[index]}"
    folder = run.folder / "adapters" / name
    folder.mkdir(parents=True)
    tensors = {}
    for layer, (A, B) in factors.items():
        tensors |= {f"{layer}.A": A, f"{layer}.B": B, f"{layer}.scaling": np.array(0.5)}
    save_file(tensors, folder / "adapter.safetensors")
    layers = {layer: {"rank": 2, **({"drift": drift[layer]} if drift else {})} for layer in factors}
    (folder / "adapter.json").write_text(json.dumps({"layers": layers}))
    if votes:
        there = run.folder / "checkpoints" / name / "step-50"
        there.mkdir(parents=True)
        save_file(
            {f"{layer}.activation_counts": np.array(v) for layer, v in votes.items()}, there / "method.safetensors"
        )


def test_layers_show_sizes_drift_overlaps_and_votes(run: RunFiles) -> None:
    random = np.random.default_rng(0)
    one, other = (
        {f"image.{n}.q": (random.normal(size=(2, 6)), random.normal(size=(8, 2))) for n in (2, 10)} for _ in "ab"
    )
    write_stage(run, 0, one, {"image.2.q": [5, 0, 9, 9], "image.10.q": [0, 0, 0, 0]})
    write_stage(run, 1, other, drift={"image.2.q": 0.25, "image.10.q": 0.001})
    (run.folder / "config.yaml").write_text(json.dumps({"options": {"merged": 2}}))
    columns, _, fold = experts.layers(RunFiles.read(run.folder))
    assert isinstance(columns, Columns) and isinstance(fold, Fold)
    sizes, drifts, overlaps = columns.parts
    assert isinstance(sizes, Heat) and isinstance(drifts, Heat) and isinstance(overlaps, Heat)
    assert drifts.columns == TASKS[1:]  # of the first task there is none
    cells = {name: (cell.text, cell.shade) for name, (cell,) in drifts.rows}
    assert cells == {"image.2.q": ("25.0", -1), "image.10.q": ("0.1", pytest.approx(-0.004))}
    assert [name for name, _ in sizes.rows] == ["image.2.q", "image.10.q"]
    norms = [[np.linalg.norm(0.5 * B @ A) for A, B in (task[name] for task in (one, other))] for name in one]
    assert [[cell.text for cell in cells] for _, cells in sizes.rows] == [[f"{n:.2f}" for n in row] for row in norms]
    cosines = []
    for name in one:
        a, b = one[name][1], other[name][1]
        cosines += [
            abs(a[:, i] @ b[:, j]) / np.linalg.norm(a[:, i]) / np.linalg.norm(b[:, j]) for i in (0, 1) for j in (0, 1)
        ]
    assert [cell.text for cell in overlaps.rows[0][1]] == ["·", f"{np.mean(cosines):.3f}"]
    (votes,) = fold.parts
    assert isinstance(votes, Heat) and fold.summary == "fashion"
    ((layer, cells),) = votes.rows  # nobody voted in the other layer
    assert layer == "image.2.q" and [cell.text for cell in cells] == ["22", "0", "39", "39"]
    assert [cell.is_framed for cell in cells] == [False, False, True, True]


def test_of_many_layers_some_stand_for_all(run: RunFiles) -> None:
    factors = {f"image.{n}.q": (np.ones((1, 2)), np.ones((2, 1))) for n in range(3 * experts.LAYERS)}
    write_stage(run, 0, factors)
    (columns,) = experts.layers(run)
    assert isinstance(columns, Columns)
    (sizes,) = columns.parts  # there is no second task to overlap with
    assert isinstance(sizes, Heat)
    assert [name for name, _ in sizes.rows] == [f"image.{n}.q" for n in range(0, 3 * experts.LAYERS, 3)]


def test_a_method_without_low_rank_updates_has_no_layers(run: RunFiles) -> None:
    assert experts.layers(run) == []
    folder = run.folder / "adapters" / "00-fashion"
    folder.mkdir(parents=True)
    save_file({"image.0.q.value": np.ones((2, 2))}, folder / "adapter.safetensors")
    (folder / "adapter.json").write_text("{}")
    assert experts.layers(run) == []
