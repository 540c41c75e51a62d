"""The examples of docs/python_api.md run, with small models where they load published ones."""

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, CLIPModel, SiglipModel

from tests import small_llava
from tests.backbones.test_llava import SAMPLES, plain_inputs, training_batch
from tests.test_attached_pool import IDS, MASK, make_hf_clip, make_llama, make_timm, pictures

PAGE = Path(__file__).parents[1] / "docs/python_api.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x).relu())


def clip_batch() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "pixel_values": pictures()}


def llava_batch() -> dict[str, torch.Tensor]:
    return plain_inputs("llava", training_batch(small_llava.make_backbone(), SAMPLES[:2]))


def text_batch() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}


def tiny_clip(*args: Any, **options: Any) -> tuple:
    folder = resources.files("r1p_dist") / "assets/tiny"
    return open_clip.create_model(f"local-dir:{folder}"), None, None


# by a word of its block: what loads the model there, the small one in its place, and a batch
STAND_INS: dict[str, tuple[Any, str, Callable, Callable]] = {
    "create_model_and_transforms": (
        open_clip,
        "create_model_and_transforms",
        tiny_clip,
        lambda: (torch.randn(3, 3, 64, 64), torch.randint(1, 40, (3, 32))),
    ),
    "CLIPModel.": (CLIPModel, "from_pretrained", lambda name: make_hf_clip("clip"), clip_batch),
    "SiglipModel.": (SiglipModel, "from_pretrained", lambda name: make_hf_clip("siglip"), clip_batch),
    "AutoModelForImageTextToText.": (
        AutoModelForImageTextToText,
        "from_pretrained",
        lambda name: small_llava.make_model(),
        llava_batch,
    ),
    "timm.": (timm, "create_model", lambda name, pretrained: make_timm(), lambda: (pictures(), torch.arange(3))),
    "attach_pool(model, targets=[": (AutoModelForCausalLM, "from_pretrained", lambda name: make_llama(), text_batch),
    "R1PConfig": (
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name: make_llama(),
        lambda: {name: value[0] for name, value in text_batch().items()},
    ),
}


def first_line(block: str) -> str:
    return next(line for line in block.splitlines() if " = " in line).split(" = ")[1][:40]


@pytest.mark.parametrize("block", BLOCKS, ids=first_line)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # a Trainer's, without a GPU
def test_an_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"accuracy": lambda model: model.training, "Network": Network}
    for word, (owner, name, make, batch) in STAND_INS.items():
        if word in block:
            monkeypatch.setattr(owner, name, make)
            names["tasks"] = [[batch()], [batch()]]
    if "load_clip" in block:
        names["prompts"] = ["a photo of a cat.", "a photo of a dog."]
        names["tasks"] = [[{"image": torch.randn(2, 3, 64, 64), "label": torch.arange(2)}]] * 2
    if "Network" in block:
        names["tasks"] = [[(torch.randn(4, 8), torch.randn(4, 8))]] * 2
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        exec(compile(block, str(PAGE), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if "R1PConfig" in block:
        assert names["config"].tasks == 2 and (tmp_path / "adapter/adapter_model.safetensors").is_file()
        return
    pool = names["pool"]
    assert pool.merged_tasks == (0, 1)
    assert all(adapter.merged_delta().abs().max() > 0 for adapter in pool.adapters)
    if "again" in names:
        for ours, theirs in zip(names["again"].adapters, pool.adapters, strict=True):
            assert torch.equal(ours.linear.weight, theirs.linear.weight)
    elif "save_pretrained" in block:
        assert (tmp_path / "merged/model.safetensors").is_file()


def test_the_page_has_an_example_for_every_library() -> None:
    words = [*STAND_INS, "load_clip", "DistributedDataParallel"]
    assert [sum(word in block for block in BLOCKS) for word in words] == [1] * len(BLOCKS)
