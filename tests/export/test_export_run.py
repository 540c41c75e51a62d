"""What an export refuses, what it leaves behind when it fails, and the tool."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from r1p_dist.kinds.open_clip import open_clip_folder
from tests.export.fake_run import SMALL_MODEL, write_model, write_run

TOOL = Path(__file__).resolve().parents[2] / "tools" / "export.py"


def test_a_folder_with_content_is_left_alone_and_an_empty_one_is_filled(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    export_run(run, "open_clip", output)
    before = sorted(path.name for path in output.iterdir())
    with pytest.raises(InputError, match=f"--output {output}: is there already and not an empty folder"):
        export_run(run, "hf", output)
    assert sorted(path.name for path in output.iterdir()) == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is there already"):
        export_run(run, "hf", tmp_path / "file")


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(open_clip_folder, "write_card", full_disk)
    with pytest.raises(InputError, match="out: cannot be written: No space left on device"):
        export_run(run, "open_clip", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_what_an_export_that_was_killed_left_is_cleared_away(run: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").touch()
    export_run(run, "open_clip", tmp_path / "out")
    assert not left.exists() and not (tmp_path / "out" / "half").exists()


def test_tasks_that_are_not_there_are_refused_by_name(run: Path) -> None:
    with pytest.raises(InputError, match="--tasks birds: no finished task of .*; there are fashion, country_flags"):
        export_run(run, "open_clip", tasks=["fashion", "birds"])


def test_of_a_lora_kept_going_no_task_can_be_left_out(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", SMALL_MODEL)
    run = write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}", "method=lora"])
    with pytest.raises(InputError, match="--tasks country_flags: lora keeps one update .*: fashion, country_flags"):
        export_run(run, "open_clip", tasks=["country_flags"])


def test_with_base_is_for_peft_alone(run: Path) -> None:
    with pytest.raises(InputError, match="--with-base: --to hf holds the whole model already"):
        export_run(run, "hf", with_base=True)


def test_other_base_weights_than_the_run_was_trained_on_are_refused(run: Path) -> None:
    step = run / "checkpoints" / "01-country_flags" / "step-50"
    step.mkdir(parents=True)
    (step / "state.json").write_text(json.dumps({"facts": {"backbone": {"sha256": "0123"}}}))
    with pytest.raises(InputError, match="the run was trained on 0123; put that file back"):
        export_run(run, "open_clip")


def test_faults_of_a_run_folder_are_told_in_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no config.yaml there; give the folder of a run"):
        export_run(tmp_path / "base", "open_clip")
    file = run / "adapters" / "00-fashion" / "adapter.safetensors"
    whole = load_file(file)
    faults = (
        ({"image.0.q.A": torch.full((2, 32), torch.nan)}, "image.0.q holds a value that is not finite"),
        ({"image.0.q.A": torch.zeros(2, 31)}, "image.0.q has other shapes than this model's"),
        ({"image.7.q.A": torch.zeros(2, 32)}, "other layers than this model adapts, for example image.7.q.A"),
    )
    for fault, message in faults:
        save_file(whole | fault, file)
        with pytest.raises(InputError, match=message):
            export_run(run, "open_clip")
    file.with_name("adapter.json").unlink()
    with pytest.raises(InputError, match="task 00 is missing"):
        export_run(run, "open_clip")
    (run / "adapters").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="no finished task"):
        export_run(run, "open_clip")


def test_the_tool_writes_the_folder_and_tells_what_is_wrong(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, TOOL, run, "--output", tmp_path / "out", "--tasks", "fashion"]
    done = subprocess.run([*command, "--to", "hf", "--dtype", "bf16"], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["visual_projection.weight"].dtype == torch.bfloat16
    main = runpy.run_path(str(TOOL))["main"]
    assert main([str(run), "--to", "hf", "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --output {tmp_path / 'out'}: is there already")
