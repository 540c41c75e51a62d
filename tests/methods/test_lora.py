"""Sequential LoRA against PEFT's (arXiv 2106.09685): one kept going, and one merged after each task and begun anew."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn

import r1p_dist.engine
from r1p_dist.config import TrainConfig
from r1p_dist.fit import train_step
from tests.small_clip import make_clip
from tests.test_losses import expected_loss

LAYERS = {"fc1": "c_fc", "fc2": "c_proj"}
OPTIONS = ["options.rank=4", "options.alpha=6", f"targets.layers=[{','.join(LAYERS)}]", "train.lr=0.5"]
CONFIG = LoraConfig(r=4, lora_alpha=6, target_modules=[*LAYERS.values()], lora_dropout=0.0)


def sgd(parameters: list[nn.Parameter], train: TrainConfig) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=train.lr)


def layers_of(model: nn.Module) -> dict[str, Linear]:
    """Returns PEFT's layers by our names of them."""
    return {
        f"{tower}.{number}.{ours}": getattr(block.mlp, theirs)
        for tower, transformer in (("image", model.visual.transformer), ("text", model.text.transformer))
        for number, block in enumerate(transformer.resblocks)
        for ours, theirs in LAYERS.items()
    }


def learn(model: nn.Module, batches: list[dict], lrs: list[float], scale: float) -> None:
    """Trains what PEFT says is to be trained."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for batch, lr in zip(batches, lrs, strict=True):
        image = F.normalize(model.encode_image(batch["image"]), dim=-1)
        text = F.normalize(model.encode_text(batch["tokens"]), dim=-1)[batch["place"]]
        gradients = torch.autograd.grad(expected_loss(image, text, batch["label"], scale), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient


@pytest.mark.parametrize("restart", [False, True], ids=["kept going", "begun anew"])
def test_two_tasks_end_as_with_pefts_lora(stages_of, monkeypatch: pytest.MonkeyPatch, restart: bool) -> None:
    monkeypatch.setattr(r1p_dist.engine, "make_optimizer", sgd)
    without_clipping = "deepspeed.overrides.gradient_clipping=0.0"
    stages, _ = stages_of("lora", *OPTIONS, without_clipping, f"options.restart={str(restart).lower()}")
    method, theirs = stages.method, make_clip()
    for task in range(2):
        trainer, lrs = stages.begin(task), []
        if restart or not task:
            theirs = get_peft_model(theirs, CONFIG)
            with torch.no_grad():
                for adapter in method.adapters:
                    layers_of(theirs)[adapter.name].lora_A["default"].weight.copy_(adapter.A)
        batches = stages.scan_batches(task, 2)
        for batch in batches:
            train_step(method, trainer, [batch], stages.config.train)
            lrs.append(trainer.lr)
        learn(theirs, batches, lrs, method.backbone.logit_scale)
        for adapter in method.adapters:
            layer = layers_of(theirs)[adapter.name]
            assert adapter.B.norm() > 1e-3
            for ours, name in ((adapter.A, "lora_A"), (adapter.B, "lora_B")):
                torch.testing.assert_close(ours, getattr(layer, name)["default"].weight, rtol=1e-3, atol=1e-6)
        stages.end()
        stages.engine.close()
        if restart:
            theirs = theirs.merge_and_unload()
        for adapter in method.adapters:
            layer = layers_of(theirs)[adapter.name]
            merged = layer.weight if restart else layer.get_base_layer().weight + layer.get_delta_weight("default")
            torch.testing.assert_close(adapter.linear.weight, merged, rtol=1e-4, atol=1e-6)
        assert method.deployed(task + 1) == ([*range(task + 1)] if restart else [task])
