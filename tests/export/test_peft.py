"""The PEFT export: each adapter on the pristine CLIPModel computes what the library's merged model does."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from tests.export.fake_run import PROMPTS, SMALL_MODEL, expected_logits, images, library_model, write_model, write_run

# of PEFT's own call of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def small_run(tmp_path: Path, overrides: Sequence[str] = (), **options) -> Path:
    base = write_model(tmp_path / "base", SMALL_MODEL)
    return write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}", *overrides], **options)


def tiny_run(tmp_path: Path, **options) -> Path:
    return write_run(tmp_path / "run", **options)


@torch.no_grad()
def logits_of(run: Path, adapter: Path) -> torch.Tensor:
    base = CLIPModel.from_pretrained(adapter.parent / "base")
    ours = library_model(run, [])
    model = PeftModel.from_pretrained(base, adapter).eval()
    return model(input_ids=ours.tokenize(PROMPTS), pixel_values=images(ours)).logits_per_image


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_every_task_and_all_of_them_give_the_logits_of_the_merged_model(tmp_path: Path, name: str) -> None:
    make_run = small_run if name == "small" else tiny_run
    run = make_run(tmp_path, ranks=(4, 4))
    folder = export_run(run, "peft", with_base=True)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "00-fashion",
        "01-country_flags",
        "all",
        "base",
    ]
    for adapter, tasks in (("00-fashion", [0]), ("01-country_flags", [1]), ("all", [0, 1])):
        torch.testing.assert_close(
            logits_of(run, folder / adapter), expected_logits(run, tasks), atol=2e-4, rtol=0, msg=adapter
        )
        config = json.loads((folder / adapter / "adapter_config.json").read_text())
        assert config["r"] == 4 * len(tasks)
        assert config["lora_alpha"] / config["r"] == pytest.approx(1 / 12)
        assert "PeftModel.from_pretrained" in (folder / adapter / "README.md").read_text()
    torch.testing.assert_close(
        CLIPModel.from_pretrained(folder / "base").logit_scale.exp().item(), library_model(run, []).logit_scale
    )


def test_tasks_of_other_ranks_and_scalings_join(tmp_path: Path) -> None:
    run = small_run(tmp_path, ranks=(3, 2))
    folder = export_run(run, "peft", with_base=True)
    before = logits_of(run, folder / "all")
    torch.testing.assert_close(before, expected_logits(run, [0, 1]), atol=2e-4, rtol=0)
    file = run / "adapters" / "01-country_flags" / "adapter.safetensors"
    tensors = load_file(file)
    save_file({name: t / 2 if name.endswith(".scaling") else t for name, t in tensors.items()}, file)
    other = export_run(run, "peft", tmp_path / "other", with_base=True)
    twice = logits_of(run, other / "all")
    assert (twice - before).abs().max() > 0.1
    merged = export_run(run, "hf")
    expected = CLIPModel.from_pretrained(merged).eval()
    ours = library_model(run, [])
    with torch.no_grad():
        expected = expected(input_ids=ours.tokenize(PROMPTS), pixel_values=images(ours)).logits_per_image
    torch.testing.assert_close(twice, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(logits_of(run, other / "00-fashion"), expected_logits(run, [0]), atol=2e-4, rtol=0)


def test_layers_of_other_ranks_and_scalings_get_their_own(tmp_path: Path) -> None:
    run = small_run(tmp_path, ranks=(3, 2))
    for file in run.glob("adapters/*/adapter.safetensors"):
        tensors = load_file(file)
        tensors["image.1.fc2.A"], tensors["image.1.fc2.B"] = (
            tensors["image.1.fc2.A"][:1],
            tensors["image.1.fc2.B"][:, :1],
        )
        tensors["text.0.v.scaling"] *= 3
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    folder = export_run(run, "peft", with_base=True)
    for adapter, tasks in (("01-country_flags", [1]), ("all", [0, 1])):
        torch.testing.assert_close(logits_of(run, folder / adapter), expected_logits(run, tasks), atol=2e-4, rtol=0)
    config = json.loads((folder / "all" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"vision_model.encoder.layers.1.mlp.fc2": 2}
    assert len(config["alpha_pattern"]) == 2  # of that layer, and of the one with a scaling of its own


def test_only_the_adapted_layers_are_named(tmp_path: Path) -> None:
    run = small_run(tmp_path, ["targets.towers=[image]", "targets.layers=[v,fc2]"])
    folder = export_run(run, "peft", with_base=True)
    targets = json.loads((folder / "all" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(
        f"vision_model.encoder.layers.{block}.{layer}"
        for block in range(2)
        for layer in ("self_attn.v_proj", "mlp.fc2")
    )
    torch.testing.assert_close(logits_of(run, folder / "all"), expected_logits(run, [0, 1]), atol=2e-4, rtol=0)


def test_all_of_a_lora_kept_going_is_its_last_update(tmp_path: Path) -> None:
    run = small_run(tmp_path, ["method=lora"])
    folder = export_run(run, "peft", with_base=True)
    for adapter, tasks in (("00-fashion", [0]), ("01-country_flags", [1]), ("all", [1])):
        torch.testing.assert_close(logits_of(run, folder / adapter), expected_logits(run, tasks), atol=2e-4, rtol=0)
    assert "keeps one update" in (folder / "README.md").read_text()


def test_a_run_that_trained_nothing_has_no_adapters(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["method=zero_shot"], tasks=(), ranks=())
    with pytest.raises(InputError, match="method=zero_shot trained nothing"):
        export_run(run, "peft")
    assert not (run / "export" / "peft").exists()
