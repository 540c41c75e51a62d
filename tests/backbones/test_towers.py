"""Towers of timm and transformers, a CoCa, and models with a sigmoid loss: against open_clip with the same weights."""

from pathlib import Path

import pytest
import torch
from torch import nn

from r1p_dist import attach_pool
from tests.small_clip import tokenize
from tests.small_towers import FAMILIES, make_backbone, make_model, pictures

PROMPTS = ["cat", "a very long prompt", "tree"]
POOL = {"rank": 6, "alpha": 6.0, "active": 3, "merged": 2}
# of each tower: which layers, and what the guide `auto` is
EXPECTED = {
    "siglip": ("q k v out fc1 fc2", "mean", "eot"),
    "eva01": ("q k v out fc1 fc2", "first", "eot"),
    "eva02": ("q k v out gate fc1 fc2", "first", "eot"),
    "pe": ("q k v out fc1 fc2", "first", "eot"),
    "vitamin": ("q k v out gate fc1 fc2", "mean", "eot"),
    "convnext": ("fc1 fc2", "mean", "eot"),
    "mobile": ("q k v out", "mean", "eot"),
    "roberta": ("q k v out fc1 fc2", "first", "mean"),
    "bert": ("q k v out fc1 fc2", "first", "first"),
    "mt5": ("q k v out gate fc1 fc2", "first", "mean"),
    "m2m_100": ("q k v out fc1 fc2", "first", "first"),
    "coca": ("q k v out fc1 fc2", "first", "eot"),
}


def features(model: nn.Module, family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """open_clip's own."""
    with torch.no_grad():
        image = model.encode_image(pictures(family, 4), normalize=True)
        return image, model.encode_text(tokenize(PROMPTS), normalize=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_equal_open_clips_untouched_with_adapters_and_merged(family: str, tmp_path: Path) -> None:
    plain = make_model(family, tmp_path).eval()
    expected = features(plain, family)
    backbone = make_backbone(family, tmp_path)
    torch.testing.assert_close(backbone.eval()(pictures(family, 4), tokenize(PROMPTS)), expected)
    adapters = attach_pool(backbone, guide="auto", **POOL).adapters
    layers, image_guide, text_guide = EXPECTED[family]
    tower = "text" if family in ("roberta", "bert", "mt5", "m2m_100") else "image"
    found = [adapter.name.split(".")[2] for adapter in adapters if adapter.name.startswith(f"{tower}.0.")]
    assert found == layers.split(), "of a block, in the order of all towers"
    guides = {adapter.name.partition(".")[0]: adapter.guide for adapter in adapters}
    assert guides == {"image": image_guide, "text": text_guide}
    # B = 0: in training, too, a frozen tower gives what it gives, without dropout and without statistics of the batch
    torch.testing.assert_close(backbone.train()(pictures(family, 4), tokenize(PROMPTS)), expected)
    assert all(adapter.activation_counts.sum() == 3 * (4 if "image" in adapter.name else 3) for adapter in adapters)

    for adapter in adapters:
        nn.init.normal_(adapter.B, std=0.3)
    weights = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    names = {id(parameter): name for name, parameter in make_names(backbone).items()}
    for adapter in adapters:
        adapter.merge()
        weights[names[id(adapter.linear.weight)]][adapter.rows] += adapter.merged_delta()
    plain.load_state_dict(weights)
    merged = backbone.eval()(pictures(family, 4), tokenize(PROMPTS))
    torch.testing.assert_close(merged, features(plain, family), atol=1e-5, rtol=1e-4)
    assert all((now - before).abs().max() > 1e-3 for now, before in zip(merged, expected, strict=True))


def make_names(backbone: nn.Module) -> dict[str, nn.Parameter]:
    """The backbone's weights by open_clip's names, found a second way: adapters and projections are looked through."""
    found = {}
    for name, parameter in backbone.model.named_parameters():
        parts = [part for part in name.split(".") if part not in ("linear", "parts")]
        if parts[-1] in ("weight", "bias") and parts[-2] == "in_proj":
            parts[-2:] = [f"in_proj_{parts[-1]}"]
        found[".".join(parts)] = parameter
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_a_low_rank_update_of_plain_weights(family: str, tmp_path: Path) -> None:
    """The model with its weights replaced by W + scaling B A, by torch.func, against the adapters."""
    backbone = make_backbone(family, tmp_path)
    adapters = attach_pool(backbone, guide="auto", **POOL | {"active": 6, "merged": 6}).adapters
    for adapter in adapters:
        nn.init.normal_(adapter.B, std=0.1)
    plain = make_model(family, tmp_path).eval().requires_grad_(False)
    names = {id(parameter): name for name, parameter in make_names(backbone).items()}
    prepare = backbone.preparer(PROMPTS)
    label = torch.tensor([0, 2, 2, 1])
    loss = backbone.loss(backbone, prepare({"image": pictures(family, 4), "label": label}))
    loss.backward()

    factors = [(a.A.detach().clone().requires_grad_(), a.B.detach().clone().requires_grad_()) for a in adapters]
    weights = dict(plain.state_dict())
    for adapter, (A, B) in zip(adapters, factors, strict=True):
        name = names[id(adapter.linear.weight)]
        rows = torch.zeros(len(weights[name]), len(B)).index_fill(0, torch.arange(0), 0)
        rows[adapter.rows] = torch.eye(len(B))
        weights[name] = weights[name] + adapter.scaling * rows @ B @ A
    expected = plain_loss(plain, weights, family, label)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for adapter, (A, B) in zip(adapters, factors, strict=True):
        torch.testing.assert_close(adapter.A.grad, A.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(adapter.B.grad, B.grad, atol=1e-5, rtol=1e-3)
    assert any(adapter.A.grad.abs().max() > 1e-4 for adapter in adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_bf16_are_those_in_fp32_to_rounding(family: str, tmp_path: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = make_backbone(family, tmp_path)
        # all experts are active: a vote can turn over with a rounding
        adapters = attach_pool(backbone, guide="auto", **POOL | {"active": 6, "merged": 6}).adapters
        torch.manual_seed(1)
        for adapter in adapters:
            nn.init.normal_(adapter.B, std=0.1)
        backbone.to(dtype)
        batch = {"image": pictures(family, 4), "label": torch.tensor([0, 2, 2, 1])}
        backbone.loss(backbone, backbone.preparer(PROMPTS)(batch)).backward()
        found.append(torch.cat([value.grad.flatten().float() for a in adapters for value in (a.A, a.B)]))
    assert (found[1] - found[0]).norm() < 5 * torch.finfo(torch.bfloat16).eps * found[0].norm()


def plain_loss(model: nn.Module, weights: dict, family: str, label: torch.Tensor) -> torch.Tensor:
    """The loss as its paper writes it, over one full-length prompt per sample."""
    call = torch.func.functional_call
    prefixed = {f"model.{name}": tensor for name, tensor in weights.items()}
    image, text = call(_Encoders(model), prefixed, (pictures(family, 4), tokenize(PROMPTS)[label]))
    logits = weights["logit_scale"].exp() * image @ text.T
    same = (label[:, None] == label[None]).float()
    if "logit_bias" in weights:
        logits = logits + weights["logit_bias"]
        pairs = [
            same[i, j] * logits[i, j].sigmoid() + (1 - same[i, j]) * (1 - logits[i, j].double().sigmoid())
            for i in range(len(label))
            for j in range(len(label))
        ]
        return -torch.stack(pairs).log().sum().float() / len(label)
    targets = same / same.sum(1, keepdim=True)
    return (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2


class _Encoders(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.encode_image(image, normalize=True), self.model.encode_text(text, normalize=True)
