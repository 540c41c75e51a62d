"""`r1p predict` of a CLIP: the probabilities of plain open_clip, before and after, and what cannot be predicted."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from r1p_dist import cli
from r1p_dist.backbones import Placement, load_backbone
from r1p_dist.data import Stream
from r1p_dist.data.task_list import read_tasks
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.predict.model import PredictingModel
from r1p_dist.predict.request import make_request
from r1p_dist.predict.source import open_source
from r1p_dist.recipes import load_config
from tests.export.fake_run import TASKS, write_run

ROOT = Path(__file__).parents[2]
STREAM = Stream.load("mini_mtil", tasks=TASKS)
CANDIDATES = [(task.name, name) for task in STREAM.tasks for name in task.class_names]
ALL = len(CANDIDATES)
TOLERANCE = 1e-5


def seen(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.transpose(Image.Transpose.ROTATE_270) if path.name == "a.png" else image.convert("RGB")


@torch.no_grad()
def expected(folder: Path, paths: Sequence[Path], prompts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Returns (pictures, classes) of plain open_clip. prompts: of each class."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    means = [model.encode_text(tokenizer(texts), normalize=True).mean(0) for texts in prompts]
    text = torch.stack([mean / mean.norm() for mean in means])
    image = model.encode_image(torch.stack([preprocess(seen(path)) for path in paths]), normalize=True)
    return (model.logit_scale.exp() * image @ text.T).softmax(1)


def prompts_of(templates: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    return [[template.replace("{c}", name) for template in templates] for name in names]


def of_all_tasks() -> list[list[str]]:
    return [prompts for task in STREAM.tasks for prompts in prompts_of(task.templates, task.class_names)]


def predict(capfd: pytest.CaptureFixture[str], *words: object, code: int = 0) -> list[dict]:
    """Returns the pictures of `r1p predict … --json`, whose standard output is one document."""
    assert cli.main(["predict", *map(str, words), "--json"]) == code
    return json.loads(capfd.readouterr().out)["pictures"]


def probabilities(entry: dict, state: str, candidates: Sequence[tuple[str | None, str]]) -> torch.Tensor:
    found = {(line["task"], line["class"]): line[state] for line in entry["classes"]}
    assert len(found) == len(entry["classes"]) == len(candidates)
    return torch.tensor([found[candidate] for candidate in candidates])


def test_probabilities_over_all_tasks_are_those_of_plain_open_clip(
    run: Path, exported: Path, pictures: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    entries = predict(capfd, run, *pictures, "--top", ALL)
    assert [entry["picture"] for entry in entries] == list(map(str, pictures))
    both = {"before": run.parent / "base", "after": exported}
    wanted = {state: expected(folder, pictures, of_all_tasks()) for state, folder in both.items()}
    assert (wanted["before"] - wanted["after"]).abs().max() > 0.1
    for number, entry in enumerate(entries):
        for state in both:
            torch.testing.assert_close(
                probabilities(entry, state, CANDIDATES), wanted[state][number], atol=TOLERANCE, rtol=0
            )
        ranked = [line["after"] for line in entry["classes"]]
        assert ranked == sorted(ranked, reverse=True)


def test_an_export_alone_predicts_what_its_run_does_after_it(
    run: Path, exported: Path, pictures: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(exported, tmp_path / "elsewhere")
    before = sorted(path.name for path in moved.iterdir())
    (whole,) = predict(capfd, run, pictures[0], "--top", ALL)
    (alone,) = predict(capfd, moved, pictures[0], "--top", ALL)
    assert all(line.keys() == {"task", "class", "after"} for line in alone["classes"])
    torch.testing.assert_close(
        probabilities(alone, "after", CANDIDATES), probabilities(whole, "after", CANDIDATES), atol=TOLERANCE, rtol=0
    )
    assert sorted(path.name for path in moved.iterdir()) == before, "it is somebody's model"


def test_ones_own_words_stand_in_a_plain_template_or_in_a_tasks(
    run: Path, exported: Path, pictures: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["cat", "hot dog", "umbrella"]
    candidates = [(None, word) for word in words]
    for flags, templates in (
        ([], ["a photo of a {c}."]),
        (["--task", TASKS[0]], STREAM.tasks[0].templates),
    ):
        (entry,) = predict(capfd, run, pictures[1], "--classes", "cat, hot dog,umbrella", *flags)
        wanted = expected(exported, pictures[1:], prompts_of(templates, words))[0]
        torch.testing.assert_close(probabilities(entry, "after", candidates), wanted, atol=TOLERANCE, rtol=0)


def test_a_task_alone_has_its_own_classes_and_few_of_them_are_printed(
    run: Path, pictures: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    task = STREAM.tasks[1]
    (entry,) = predict(capfd, run, pictures[0], "--task", task.name, "--top", len(task.class_names))
    candidates = [(task.name, name) for name in task.class_names]
    assert probabilities(entry, "after", candidates).sum() == pytest.approx(1)
    (short,) = predict(capfd, run, pictures[0], "--task", task.name, "--top", 2)
    first = max(entry["classes"], key=lambda line: line["before"])
    assert short["classes"][:2] == entry["classes"][:2]
    # and the one that the model before took for it
    assert short["classes"][2:] == [line for line in [first] if line not in entry["classes"][:2]]
    assert cli.main(["predict", str(run), str(pictures[0]), "--task", task.name, "--top", "1"]) == 0
    name, head, line, *_ = capfd.readouterr().out.splitlines()
    assert name == str(pictures[0]) and head.split() == ["before", "after"]
    best = entry["classes"][0]
    assert line == f"{100 * best['before']:7.1f} %{100 * best['after']:7.1f} %  {best['class']}"


def test_what_is_no_picture_is_told_and_the_others_are_predicted(
    run: Path, pictures: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in pictures:
        shutil.copy(path, folder)
    (folder / "c.jpg").write_bytes(pictures[0].read_bytes()[:100])
    (folder / "._a.png").touch()
    (folder / "notes.txt").touch()
    assert cli.main(["predict", str(run), str(folder), str(tmp_path / "gone.jpg"), "--json"]) == 2
    out, err = capfd.readouterr()
    entries = json.loads(out)["pictures"]
    assert [Path(entry["picture"]).name for entry in entries] == ["a.png", "b.bmp", "c.jpg", "gone.jpg"]
    assert ["classes" in entry for entry in entries] == [True, True, False, False]
    first, second = err.splitlines()
    assert first.startswith(f"error: {folder / 'c.jpg'}: picture cannot be decoded: ")
    assert second == f"error: {tmp_path / 'gone.jpg'}: no such file"
    assert [entry["error"] for entry in entries[2:]] == [line.removeprefix("error: ") for line in (first, second)]


def test_names_are_printed_without_what_a_terminal_would_obey(
    run: Path, pictures: list[Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = shutil.copy(pictures[0], tmp_path / "a\x1b[2J\n.png")
    assert cli.main(["predict", str(run), str(odd), "--classes", "cat\x1b[31m,dog"]) == 0
    out = capfd.readouterr().out
    assert "\x1b" not in out and "a?[2J?.png" in out and "cat?[31m" in out


def test_the_commands_of_the_documentation_do_what_it_says(
    run: Path, exported: Path, pictures: list[Path], capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"runs/mini_mtil": run, "runs/mini_mtil/export/open_clip": exported}
    names |= {"photo.jpg": pictures[0], "photos": pictures[0].parent}
    lines = (ROOT / "docs/predict.md").read_text().splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith(".venv/bin/r1p predict")]
    assert [words for words in commands if "--ask" in words] == [commands.pop()]  # test_questions.py
    for words in commands:
        assert cli.main([str(names.get(word, word)) for word in words]) == 0
        assert capfd.readouterr().out.count(".png") == 1
    assert len(commands) == 4


@pytest.mark.parametrize("method", ["dac", "full"])
def test_the_weights_of_before_come_back_for_the_next_pictures(run: Path, tmp_path: Path, method: str) -> None:
    if method == "full":
        run = write_full_run(tmp_path / "run", run.parent / "base")
    source = open_source(run)
    model, request = PredictingModel(source), make_request(source, words=["cat", "dog"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    examples = [model.encode(request, picture)]
    found = [model.predict(request, examples) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    before, after = (torch.tensor(found[0][0][state]) for state in ("before", "after"))
    assert (before - after).abs().max() > 1e-3


def write_full_run(folder: Path, base: Path) -> Path:
    """Writes a run that trained every weight."""
    config = load_config("mini_mtil_dac", ["method=full", f"backbone.name=local-dir:{base}"])
    places = make_method(config, load_backbone(config.backbone, Placement(torch.device("cpu")))).update_places()
    at = folder / "adapters/00-fashion"
    at.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump())
    save_file(
        {f"{name}.value": 1.5 * weight.detach() for name, (weight, _) in places.items()}, at / "adapter.safetensors"
    )
    (at / "adapter.json").write_text("{}")
    return folder


def test_a_run_of_before_takes_its_classes_from_the_stream_or_says_that_it_cannot(run: Path, tmp_path: Path) -> None:
    old = shutil.copytree(run, tmp_path / "old", ignore=shutil.ignore_patterns("tasks.json", "export"))
    config = old / "config.yaml"
    with pytest.raises(InputError, match=r"old: has no tasks.json.*/gone/stream.yaml"):
        make_request(open_source(old))
    config.write_text(config.read_text().replace("stream: /gone/stream.yaml", "stream: mini_mtil"))
    assert [(task.class_names, task.templates) for task in open_source(old).tasks] == [
        (task.class_names, task.templates) for task in STREAM.tasks
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ('{"tasks": []}', "needs a list `tasks`"),
        ('{"tasks": [{"name": 1}]}', r"tasks\[0\]: needs a `name`"),
        (
            '{"tasks": [{"name": "a", "class_names": [1], "templates": ["{c}"]}]}',
            "class_names: must be a list of texts",
        ),
        ('{"tasks": [{"name": "a", "class_names": ["x"], "templates": ["x"]}]}', "'x' lacks {c}"),
        ('{"tasks": [{"name": "a", "metric": "luck"}]}', "metric: must be one of exact_match"),
    ],
)
def test_a_damaged_list_of_tasks_is_told_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(InputError, match=f"tasks.json.*{message}"):
        read_tasks(tmp_path / "tasks.json")


def test_what_merged_weights_do_not_make_is_refused(run: Path, tmp_path: Path) -> None:
    base, small = run.parent / "base", ["options.rank=8", "options.sub_rank=2"]
    ids = write_run(tmp_path / "ids", [f"backbone.name=local-dir:{base}", "method=lilora", *small])
    with pytest.raises(InputError, match="method=lilora needs the task of each sample at inference"):
        PredictingModel(open_source(ids))
    fresh = write_run(tmp_path / "fresh", [f"backbone.name=local-dir:{base}"], tasks=(), ranks=())
    with pytest.raises(InputError, match="adapters: no finished task; predict after the run's first"):
        PredictingModel(open_source(fresh))


def test_wrong_input_is_told_before_torch_is_imported(run: Path, pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    picture = str(pictures[0])
    cases = {
        (str(run),): "the following arguments are required: PICTURE",
        (str(tmp_path / "none"), picture): "none: no such folder; give that of a run or of an export",
        (str(tmp_path), picture): "neither the folder of a run, with a config.yaml, nor an export",
        (str(run.parent / "base"), picture): "has no tasks.json, so its tasks are not known; name classes: --classes",
        (
            str(run),
            picture,
            "--task",
            "fashions",
        ): f"--task fashions: no task of {run}, did you mean fashion?; there are ",
        (str(run), picture, "--classes", "cat,,dog"): "--classes: an empty class",
        (str(run), picture, "--classes", "cat,dog,cat"): "--classes: cat stands twice",
        (str(run), picture, "--ask", "What?"): "answers no questions; name classes: --classes a,b,c",
        (str(run), picture, "--top", "0"): "--top 0: must be a number from 1",
        (str(run), str(tmp_path / "empty")): "empty: no picture in this folder",
        (str(run), str(tmp_path / "gone.jpg")): "gone.jpg: no such file",
    }
    script = """
import json, sys
sys.modules["torch"] = None  # to import it is an ImportError now
from r1p_dist.cli import main
sys.exit(sum(main(["predict", *words]) != 2 for words in json.load(sys.stdin)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(list(cases)), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    for line, message in zip(done.stderr.splitlines(), cases.values(), strict=True):
        assert line.startswith("error: ") and message in line
