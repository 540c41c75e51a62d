"""The open_clip export: plain open_clip loads it and computes what the library's own merged model does."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from r1p_dist.adapters import LowRankLinear
from r1p_dist.export import export_run
from tests.export.fake_run import (
    PROMPTS,
    SMALL_MODEL,
    expected_logits,
    images,
    library_model,
    write_model,
    write_run,
)


@torch.no_grad()
def plain_logits(model: torch.nn.Module, tokenizer, pictures: torch.Tensor) -> torch.Tensor:
    image, text, scale = model.eval()(pictures, tokenizer(PROMPTS))
    return scale * image @ text.T


def test_open_clip_loads_the_folder_with_the_same_weights_tokens_preprocessing_and_logits(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    folder = export_run(run, "open_clip")
    assert folder == run / "export" / "open_clip"
    model = open_clip.create_model(f"local-dir:{folder}")
    tokenizer, ours = open_clip.get_tokenizer(f"local-dir:{folder}"), library_model(run, [0, 1])
    assert torch.equal(tokenizer(PROMPTS), ours.tokenize(PROMPTS))
    assert open_clip.get_model_preprocess_cfg(model) == ours.preprocess
    logits = plain_logits(model, tokenizer, images(ours))
    torch.testing.assert_close(logits, expected_logits(run, [0, 1]), atol=1e-4, rtol=0)
    weights = load_file(folder / "open_clip_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32} and weights["logit_scale"].shape == ()
    for module in ours.modules():
        if isinstance(module, LowRankLinear) and module.name.startswith("image.3."):
            part = {"out": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
            name = part.get(module.name.split(".")[2], "attn.in_proj_weight")
            ours_weight = module.weight[module.rows]
            assert torch.equal(weights[f"visual.transformer.resblocks.3.{name}"][module.rows], ours_weight)


@pytest.mark.parametrize("more", [{}, {"custom_text": True}, {"init_logit_bias": -10.0}])
def test_the_weights_file_alone_loads_by_the_models_name(tmp_path: Path, more: dict) -> None:
    name = f"small-{'-'.join(more) or 'plain'}"
    (tmp_path / f"{name}.json").write_text(json.dumps(SMALL_MODEL | more))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    base = write_model(tmp_path / "base", SMALL_MODEL | more) / "open_clip_model.safetensors"
    run = write_run(tmp_path / "run", [f"backbone.name={name}", f"backbone.pretrained={base}"])
    folder = export_run(run, "open_clip")
    file = folder / "open_clip_model.safetensors"
    assert load_file(file).keys() == load_file(base).keys()
    assert f'open_clip.create_model("{name}", pretrained="FOLDER/{file.name}")' in (folder / "README.md").read_text()
    expected, pictures = expected_logits(run, [0, 1]), images(library_model(run, []))
    for model in (open_clip.create_model(name, pretrained=str(file)), open_clip.create_model(f"local-dir:{folder}")):
        image, text = model.eval()(pictures, open_clip.get_tokenizer(name)(PROMPTS))[:2]
        torch.testing.assert_close(model.logit_scale.exp() * image @ text.T, expected, atol=1e-4, rtol=0)
        if "init_logit_bias" in more:
            assert model.logit_bias.item() == -10.0


def test_forced_quick_gelu_is_in_the_folders_configuration(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", SMALL_MODEL | {"quick_gelu": False})
    run = write_run(tmp_path / "run", [f"backbone.name=local-dir:{base}", "backbone.force_quick_gelu=true"])
    folder = export_run(run, "open_clip")
    model, tokenizer = open_clip.create_model(f"local-dir:{folder}"), open_clip.get_tokenizer(f"local-dir:{folder}")
    logits = plain_logits(model, tokenizer, images(library_model(run, [])))
    torch.testing.assert_close(logits, expected_logits(run, [0, 1]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["dac", "lora options.restart=true"])
def test_chosen_tasks_alone_are_merged(tmp_path: Path, method: str) -> None:
    run = write_run(tmp_path / "run", [f"method={method.split()[0]}", *method.split()[1:]])
    folder = export_run(run, "open_clip", tmp_path / "out", tasks=["country_flags"])
    logits = plain_logits(
        open_clip.create_model(f"local-dir:{folder}"),
        open_clip.get_tokenizer(f"local-dir:{folder}"),
        images(library_model(run, [])),
    )
    torch.testing.assert_close(logits, expected_logits(run, [1]), atol=1e-4, rtol=0)
    assert "this folder holds other updates" in (folder / "README.md").read_text()


def test_of_a_lora_kept_going_only_the_last_update_is_deployed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["method=lora"])
    for tasks, deployed in ((None, 1), (["fashion"], 0)):
        folder = export_run(run, "open_clip", tmp_path / str(deployed), tasks=tasks)
        logits = plain_logits(
            open_clip.create_model(f"local-dir:{folder}"),
            open_clip.get_tokenizer(f"local-dir:{folder}"),
            images(library_model(run, [])),
        )
        torch.testing.assert_close(logits, expected_logits(run, [deployed]), atol=1e-4, rtol=0)


def test_joint_training_is_one_update(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["method=joint"], tasks=["joint"], ranks=[3])
    folder = export_run(run, "open_clip")
    model, tokenizer = open_clip.create_model(f"local-dir:{folder}"), open_clip.get_tokenizer(f"local-dir:{folder}")
    logits = plain_logits(model, tokenizer, images(library_model(run, [])))
    torch.testing.assert_close(logits, expected_logits(run, [0]), atol=1e-4, rtol=0)


def test_zero_shot_and_random_weights_export_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "small-random.json").write_text(json.dumps(SMALL_MODEL))
    open_clip.add_model_config(tmp_path / "small-random.json")
    run = write_run(tmp_path / "run", ["method=zero_shot", "backbone.name=small-random"], tasks=(), ranks=())
    folder = export_run(run, "open_clip")
    model, tokenizer = open_clip.create_model(f"local-dir:{folder}"), open_clip.get_tokenizer("small-random")
    logits = plain_logits(model, tokenizer, images(library_model(run, [])))
    torch.testing.assert_close(logits, expected_logits(run, []), atol=1e-4, rtol=0)


def test_half_precision_is_rounded_once_and_keeps_the_temperature(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    exact = load_file(export_run(run, "open_clip", tmp_path / "fp32") / "open_clip_model.safetensors")
    half = load_file(export_run(run, "open_clip", tmp_path / "bf16", dtype="bf16") / "open_clip_model.safetensors")
    assert torch.equal(half.pop("logit_scale"), exact.pop("logit_scale"))
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)


def test_the_card_has_the_runs_figures_and_the_licence_goes_with_the_weights(tmp_path: Path) -> None:
    folder = export_run(write_run(tmp_path / "run"), "open_clip")
    card = (folder / "README.md").read_text()
    for words in (
        "| Transfer: tasks not trained yet | 19.0 |",
        "| Average: all tasks, all moments of the stream | – |",
        "| Last: all tasks after the last one | 45.0 |",
        "| fashion | accuracy, percent | 10.0 | 37.5 |",
        "| country_flags | accuracy, percent | 20.0 | 52.5 |",
        "holds the updates of fashion, country_flags.",
        "Measured in the run",
        'create_model_and_transforms("local-dir:FOLDER")',
        "method: dac",
        "391d066c140281e93aa4c1b46bfcc10169edbc99fff3c96d473fcae942514ef2",
        "NOTICE.md",
    ):
        assert words in card, words
    assert str(tmp_path) not in card
    assert "tiny: the small CLIP" in (folder / "NOTICE.md").read_text()
