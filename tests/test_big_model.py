"""The check of big models in its reduced form: the widths of bigG, LLaVA-1.5-7B and Qwen2.5-VL-3B with one block per
tower, each a whole run under ZeRO-3."""

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

TOOL = Path(__file__).resolve().parents[1] / "tools" / "dev" / "big_model_check.py"


def clip_block(width: int, hidden: int) -> dict[str, tuple[int, int]]:
    square = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    return square | {"fc1": (width, hidden), "fc2": (hidden, width)}


def llama_block(width: int, hidden: int, keys: int | None = None) -> dict[str, tuple[int, int]]:
    """keys: width of keys and values, as that of queries unless given."""
    attention = dict.fromkeys("qo", (width, width)) | dict.fromkeys("kv", (width, keys or width))
    return attention | {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}


# the most GB, the first task, its merged experts, and each layer's width of input and output
MODELS = {
    "ViT-bigG-14": (5, "fashion", 4, {"image.0": clip_block(1664, 8192), "text.0": clip_block(1280, 5120)}),
    "qwen2.5-vl-3b": (
        7,
        "yes_no",
        8,
        {"language.0": llama_block(2048, 11008, 256), "projector.0": {"fc1": (5120, 5120), "fc2": (5120, 2048)}},
    ),
    "llava-1.5-7b": (
        6,
        "yes_no",
        8,
        {"language.0": llama_block(4096, 11008), "projector.0": {"fc1": (1024, 4096), "fc2": (4096, 4096)}},
    ),
}


@pytest.mark.campaign  # 4 to 10 minutes on a CPU without bf16 arithmetic
@pytest.mark.parametrize("model", MODELS)
def test_a_run_with_one_block_per_tower(tmp_path: Path, capsys: pytest.CaptureFixture, model: str) -> None:
    spec = importlib.util.spec_from_file_location("big_model_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    most_gb, task, merged, layers = MODELS[model]
    words = f"--model {model} --depth 1 --steps 2 --plan --folder {tmp_path}/big --json {tmp_path}/big.json"
    assert tool.main([*words.split(), "--limit-gb", "0.2"]) == 1, "two processes of torch alone need more than that"
    result = json.loads((tmp_path / "big.json").read_text())
    assert result["exit_code"] == 0 and 0.2 < result["planned_gb"] < result["peak_gb"] < most_gb
    phases = [phase["phase"] for phase in result["phases"]]
    assert phases[0] == "loading" and f"{task}: step 1" in phases and phases[-1] in ("finished", f"{task}: saving")
    assert all(phase["peak_gb"] <= result["peak_gb"] for phase in result["phases"])
    assert f"{model} on 2 ranks" in capsys.readouterr().out
    experts = load_file(tmp_path / f"big/run/adapters/00-{task}/adapter.safetensors")
    shapes = {}
    for block, widths in layers.items():
        for layer, (inputs, outputs) in widths.items():
            name = f"{block}.{layer}"
            shapes |= {f"{name}.A": (merged, inputs), f"{name}.B": (outputs, merged), f"{name}.scaling": ()}
    assert {name: tuple(tensor.shape) for name, tensor in experts.items()} == shapes
    assert all(tensor.abs().max() > 0 for tensor in experts.values())
