"""`r1p predict --ask`: the answers of plain transformers, before and after."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from transformers import AutoProcessor

from r1p_dist import cli
from r1p_dist.data.stream import Task
from r1p_dist.data.task_list import read_tasks, write_tasks
from r1p_dist.export import export_run
from r1p_dist.predict.model import PredictingModel
from r1p_dist.predict.source import open_source
from tests.export.test_llava import ALL_TOWERS, NEW_TOKENS, PICTURE, QUESTION, computed, inputs, load, write_llava_run
from tests.predict.test_serve import ask, served
from tests.small_vlms import make_model, make_processor


def answer(folder: Path) -> str:
    _, ids = computed(load(folder), inputs(folder))
    return AutoProcessor.from_pretrained(folder).tokenizer.decode(ids, skip_special_tokens=True).strip()


def task(name: str, max_new_tokens: int) -> Task:
    answers = {"metric": "exact_match", "sizes": {}, "domain": None, "class_names": (), "templates": ()}
    return Task(name, (), (), (), max_new_tokens=max_new_tokens, **answers)


def test_a_question_is_answered_as_transformers_answers_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_llava_run(tmp_path, [ALL_TOWERS])
    tasks = [task("a", 2), task("b", NEW_TOKENS)]
    write_tasks(run, tasks)
    assert list(read_tasks(run / "tasks.json")) == tasks
    exported = export_run(run, "hf")
    wanted = {"before": answer(tmp_path / "base"), "after": answer(exported)}
    assert wanted["before"] != wanted["after"]
    picture = tmp_path / "picture.png"
    PICTURE.save(picture)
    capfd.readouterr()

    assert cli.main(["predict", str(run), str(picture), "--ask", QUESTION, "--json"]) == 0
    (entry,) = json.loads(capfd.readouterr().out)["pictures"]
    assert entry == {"picture": str(picture), **wanted}
    assert cli.main(["predict", str(exported), str(picture), "--ask", QUESTION, "--json"]) == 0
    (entry,) = json.loads(capfd.readouterr().out)["pictures"]
    assert entry == {"picture": str(picture), "after": wanted["after"]}

    with served(PredictingModel(open_source(run))) as port:
        status, text = ask(port, "POST", f"/predict?ask={quote(QUESTION)}", picture.read_bytes())
    assert (status, json.loads(text)) == (200, wanted)

    for words, message in (
        ([], 'its model answers questions; give --ask "What is this?"'),
        (["--ask", "<image> what?"], "--ask: <image> stands for the picture"),
        (["--ask", "what?", "--classes", "cat,dog"], "--classes: the model answers in words of its own"),
        (["--ask", "what?" * 1000], "key --ask: its conversation has"),
    ):
        assert cli.main(["predict", str(run), str(picture), *words]) == 2
        assert message in capfd.readouterr().err


def test_an_export_of_another_family_answers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, picture = tmp_path / "qwen", tmp_path / "picture.png"
    make_model("qwen2_5_vl").save_pretrained(folder)
    make_processor("qwen2_5_vl").save_pretrained(folder)
    write_tasks(folder, [task("a", NEW_TOKENS)])
    PICTURE.save(picture)
    capfd.readouterr()
    assert cli.main(["predict", str(folder), str(picture), "--ask", QUESTION, "--json"]) == 0
    (entry,) = json.loads(capfd.readouterr().out)["pictures"]
    assert entry["after"] == answer(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"qwen2_5_vl"', '"qwen3"'))
    assert cli.main(["predict", str(folder), str(picture), "--ask", QUESTION]) == 2
    assert "neither the folder of a run" in capfd.readouterr().err
