"""The check of big models in its reduced form: bigG's widths with one block per tower, a whole run under ZeRO-3."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

TOOL = Path(__file__).resolve().parents[1] / "tools" / "big_model_check.py"


@pytest.mark.slow
def test_a_run_of_bigg_with_one_block_per_tower(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = importlib.util.spec_from_file_location("big_model_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    words = f"--model ViT-bigG-14 --depth 1 --steps 2 --folder {tmp_path}/big --json {tmp_path}/big.json"
    assert tool.main([*words.split(), "--limit-gb", "0.2"]) == 1, "two processes of torch alone need more than that"
    result = json.loads((tmp_path / "big.json").read_text())
    assert result["exit_code"] == 0 and 0.2 < result["peak_gb"] < 5
    phases = [phase["phase"] for phase in result["phases"]]
    assert phases[0] == "loading" and "fashion: step 1" in phases and phases[-1] in ("finished", "fashion: saving")
    assert all(phase["peak_gb"] <= result["peak_gb"] for phase in result["phases"])
    assert "ViT-bigG-14 on 2 ranks" in capsys.readouterr().out
    experts = load_file(tmp_path / "big/run/adapters/00-fashion/adapter.safetensors")
    assert experts["image.0.fc1.A"].shape == (4, 1664) and experts["text.0.fc2.B"].shape == (1280, 4)
    assert len(experts) == 2 * 6 * 2 and all(tensor.abs().max() > 0 for tensor in experts.values())
