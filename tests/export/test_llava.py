"""The exports of a LLaVA run: plain transformers and PEFT compute, and answer, what the run's own merged model does."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, LlavaForConditionalGeneration

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.config import DataConfig
from r1p_dist.data.samples import Sample, Turn
from r1p_dist.errors import InputError
from r1p_dist.export import export_run
from tests.export.fake_run import library_model, write_run
from tests.small_llava import make_model, make_processor

NEW_TOKENS = 8
TOLERANCE = 1e-5  # of the largest logit
QUESTION = "what is this?"
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
ALL_TOWERS = "targets.towers=[language,projector,image]"

# of PEFT's own call of transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def write_base(folder: Path, model: torch.nn.Module | None = None, family: str = "llava") -> Path:
    """Writes a model with random weights in several files, and its processor; returns the folder."""
    model = model or make_model(family)
    model.save_pretrained(folder, max_shard_size="40KB")
    make_processor(family).save_pretrained(folder)
    return folder


def write_llava_run(tmp_path: Path, overrides: Sequence[str] = (), base: Path | None = None, **options) -> Path:
    base = base or write_base(tmp_path / "base")
    return write_run(tmp_path / "run", ["backbone.kind=llava", f"backbone.name={base}", *overrides], **options)


def load(folder: Path) -> torch.nn.Module:
    model, found = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def inputs(folder: Path) -> BatchFeature:
    """Returns a question about a picture, encoded by the folder's own processor and chat template."""
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=text, images=PICTURE, return_tensors="pt")


@torch.no_grad()
def computed(model: torch.nn.Module, batch: BatchFeature) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the logits (new tokens, vocabulary) and ids (new tokens,) that a model of transformers answers with."""
    options = {"output_logits": True, "return_dict_in_generate": True}
    answer = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, **options)
    return torch.cat(answer.logits), answer.sequences[0, batch["input_ids"].shape[1] :]


@torch.no_grad()
def expected(run: Path, tasks: Sequence[int], batch: BatchFeature) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same of the library's own merged model, its answer by the library's own way."""
    backbone: LlavaBackbone = library_model(run, tasks)
    encoder = backbone.encoder(DataConfig())
    own = encoder.collate([encoder.evaluate(Sample("0", (PICTURE,), turns=(Turn("user", f"<image>\n{QUESTION}"),)))])
    assert torch.equal(own["input_ids"], batch["input_ids"])
    logits: list[torch.Tensor] = []
    hook = backbone.model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    ids = backbone(own, max_new_tokens=NEW_TOKENS)[0]
    hook.remove()
    if tasks:
        change = (logits[0] - expected(run, [], batch)[0][:1]).abs().max()
        assert change > 0.1 * logits[0].abs().max(), "the updates change too little"
    return torch.cat(logits), ids


def assert_same(found: tuple[torch.Tensor, torch.Tensor], ours: tuple[torch.Tensor, torch.Tensor]) -> None:
    difference, largest = (found[0] - ours[0]).abs().max(), ours[0].abs().max()
    assert difference <= TOLERANCE * largest
    assert torch.equal(found[1], ours[1])


def tied_model() -> torch.nn.Module:
    config = make_model().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = LlavaForConditionalGeneration(config)
    model.load_state_dict(make_model().state_dict())
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "tied"])
def test_transformers_loads_the_folder_and_answers_as_the_run_does(tmp_path: Path, family: str) -> None:
    is_tied = family == "tied"
    base = write_base(tmp_path / "base", tied_model()) if is_tied else write_base(tmp_path / "base", family=family)
    run = write_llava_run(tmp_path, [ALL_TOWERS], base)
    folder = export_run(run, "hf")
    batch = inputs(folder)
    assert_same(computed(load(folder), batch), expected(run, [0, 1], batch))


def test_the_files_and_the_names_in_them_are_those_of_the_base_model(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path)
    base, folder = tmp_path / "base", export_run(run, "hf")
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in folder.iterdir()} == names | {"README.md", "tasks.json"}
    changed = set()
    for name in names:
        if name.endswith(".safetensors"):
            before, after = load_file(base / name), load_file(folder / name)
            assert after.keys() == before.keys()
            changed |= {key for key in before if not torch.equal(after[key], before[key])}
        elif name != "model.safetensors.index.json":
            assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert len(changed) == 2 * 7 + 2 and not any(key.startswith("vision_tower") for key in changed)
    old, new = (json.loads((at / "model.safetensors.index.json").read_text()) for at in (base, folder))
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == old["metadata"]["total_size"]


def test_weights_are_of_the_type_of_the_base_models_files_or_of_the_chosen_one(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path, base=write_base(tmp_path / "base", make_model().to(torch.bfloat16)))
    kept, exact = (load(export_run(run, "hf", tmp_path / f"{dtype}", dtype=dtype)) for dtype in (None, "fp32"))
    assert kept.dtype == torch.bfloat16 and exact.dtype == exact.config.text_config.dtype == torch.float32
    ours = dict(library_model(run, [0, 1]).model.named_parameters())
    for name, weight in exact.named_parameters():
        head, _, tail = name.rpartition(".")
        assert torch.equal(weight, ours[name if name in ours else f"{head}.linear.{tail}"]), name
        assert torch.equal(kept.get_parameter(name), weight.bfloat16()), name


def test_an_answer_ends_where_the_runs_answers_end(tmp_path: Path) -> None:
    model = make_model()
    for config in (model.config.text_config, model.generation_config):
        config.eos_token_id = None
    run = write_llava_run(tmp_path, base=write_base(tmp_path / "base", model))
    assert load(export_run(run, "hf")).generation_config.eos_token_id == make_processor().tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_every_adapter_gives_the_logits_and_answers_of_the_merged_model(tmp_path: Path, family: str) -> None:
    run = write_llava_run(tmp_path, [ALL_TOWERS], write_base(tmp_path / "base", family=family), ranks=(4, 3))
    folder = export_run(run, "peft", with_base=True)
    batch = inputs(folder / "base")
    for adapter, tasks, rank in (("00-fashion", [0], 4), ("01-country_flags", [1], 3), ("all", [0, 1], 7)):
        model = PeftModel.from_pretrained(load(folder / "base"), folder / adapter).eval()
        assert_same(computed(model, batch), expected(run, tasks, batch))
        config = json.loads((folder / adapter / "adapter_config.json").read_text())
        assert config["r"] == rank and config["lora_alpha"] / rank == pytest.approx(1 / 12)


def test_only_the_adapted_layers_are_named_as_transformers_does(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path, ["targets.towers=[projector,image]", "targets.layers=[o,fc1]"])
    folder = export_run(run, "peft")
    targets = json.loads((folder / "all" / "adapter_config.json").read_text())["target_modules"]
    layers = [
        f"model.vision_tower.encoder.layers.{block}.{layer}"
        for block in range(2)  # of three: the projector reads the output of the second
        for layer in ("self_attn.out_proj", "mlp.fc1")
    ]
    assert sorted(targets) == sorted(["model.multi_modal_projector.linear_1", *layers])
    assert "AutoModelForImageTextToText" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("method", "deployed"), [("lora", [1]), ("lora options.restart=true", [0, 1])], ids=["kept going", "restart"]
)
def test_lora_is_exported_as_it_is_deployed(tmp_path: Path, method: str, deployed: list[int]) -> None:
    name, *more = method.split()
    run = write_llava_run(tmp_path, [f"method={name}", *more])
    batch, adapters = inputs(tmp_path / "base"), export_run(run, "peft")
    ours = expected(run, deployed, batch)
    assert_same(computed(load(export_run(run, "hf")), batch), ours)
    assert_same(computed(PeftModel.from_pretrained(load(tmp_path / "base"), adapters / "all").eval(), batch), ours)


def test_a_run_that_trained_nothing_is_the_base_model(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path, ["method=zero_shot"], tasks=(), ranks=())
    folder = export_run(run, "hf")
    for file in folder.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "base" / file.name).keys()
    batch = inputs(folder)
    assert_same(computed(load(folder), batch), computed(load(tmp_path / "base"), batch))


def test_names_as_first_published_are_kept_and_files_without_an_index_get_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    for file in base.glob("*.safetensors"):
        weights = {name.replace("tower.", "tower.vision_model."): tensor for name, tensor in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    (base / "model.safetensors.index.json").unlink()
    run = write_llava_run(tmp_path, [ALL_TOWERS], base)
    folder = export_run(run, "hf")
    for file in base.glob("*.safetensors"):
        assert load_file(folder / file.name).keys() == load_file(file).keys()
    batch = inputs(folder)
    assert_same(computed(load(folder), batch), expected(run, [0, 1], batch))


def test_the_card_names_each_tasks_metric_and_its_scale(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | {"metric": ["exact_match", "cider"]}))
    card = (export_run(run, "hf") / "README.md").read_text()
    for words in (
        "pipeline_tag: image-text-to-text",
        "# base with dac on mini_mtil",
        "from a vision-language model of transformers",
        "| fashion | exact_match, percent | 10.0 | 37.5 |",
        "| country_flags | cider, CIDEr x 100, can exceed 100 | 20.0 | 52.5 |",
        'AutoModelForImageTextToText.from_pretrained("FOLDER")',
        "keep the licence of the base model",
    ):
        assert words in card, words
    assert str(tmp_path) not in card


def test_what_cannot_be_exported_is_told_in_one_line(tmp_path: Path) -> None:
    run = write_llava_run(tmp_path)
    with pytest.raises(InputError, match="^backbone.kind=llava: open_clip has no such model; export it with --to hf"):
        export_run(run, "open_clip")
    file = next((tmp_path / "base").glob("*.safetensors"))
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match="is of type torch.float64 in its file; choose one of --dtype fp32, bf16"):
        export_run(run, "hf")
    assert not (run / "export" / "hf").exists()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"name: {tmp_path / 'base'}", "name: llava-1.5-7b"))
    with pytest.raises(InputError, match="name=llava-1.5-7b: is a shape with random weights, there is nothing to"):
        export_run(run, "hf")
