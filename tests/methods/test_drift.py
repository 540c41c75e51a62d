"""How far a stage moved the layers' outputs, against whole weights and the tokens that each layer really reads."""

import pytest
import torch

from r1p_dist import attach_pool
from r1p_dist.adapters import Factors
from r1p_dist.backbones import ClipBackbone
from r1p_dist.protocol import Drift, change_between, drift
from tests.small_clip import make_backbone, tokenize

PROMPTS = ["a", "plum", "a fig", "cherries"]
IMAGES = torch.randn(7, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def backbone() -> ClipBackbone:
    backbone = make_backbone()
    backbone.adapters = attach_pool(backbone, rank=2, active=2, merged=2).adapters
    return backbone


def random_updates(backbone: ClipBackbone, count: int) -> list[dict[str, Factors]]:
    torch.manual_seed(1)
    return [
        {a.name: Factors(torch.randn(2, a.in_features), torch.randn(a.out_features, 2), 0.1) for a in backbone.adapters}
        for _ in range(count)
    ]


@torch.no_grad()
def measured(backbone: ClipBackbone, change: dict[str, Factors]) -> dict[str, float]:
    found = Drift(backbone, backbone.adapters, change)
    backbone.eval()
    with found.watch():
        backbone(image=IMAGES[:4])
        backbone(image=IMAGES[4:])
        backbone(tokens=tokenize(PROMPTS))
    backbone(image=100 * IMAGES)  # nobody looks
    return found.by_layer()


@torch.no_grad()
def read_by_first_attention(backbone: ClipBackbone, tower: str) -> list[torch.Tensor]:
    """Returns what it reads in each of the passes of `measured`, without padding."""
    seen: list[torch.Tensor] = []
    model = backbone.model.visual if tower == "image" else backbone.model.text
    handle = model.transformer.resblocks[0].ln_1.register_forward_hook(lambda *call: seen.append(call[-1]))
    if tower == "image":
        backbone(image=IMAGES[:4])
        backbone(image=IMAGES[4:])
        found = [x.flatten(0, 1) for x in seen]
    else:
        backbone(tokens=tokenize(PROMPTS))
        found = [torch.cat([x[: len(prompt) + 2] for x, prompt in zip(seen[0], PROMPTS, strict=True)])]
    handle.remove()
    return found


def weight_of(backbone: ClipBackbone, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    (adapter,) = [adapter for adapter in backbone.adapters if adapter.name == name]
    return adapter.linear.weight[adapter.rows].detach().clone(), adapter.linear.bias[adapter.rows].detach()


@pytest.mark.parametrize("replaces", [False, True], ids=["an update is added", "an update takes another's place"])
def test_it_is_the_change_of_the_output_against_the_output_before(backbone: ClipBackbone, replaces: bool) -> None:
    one, other = random_updates(backbone, 2)
    names = ("image.0.q", "image.0.v", "text.0.k")
    for adapter in backbone.adapters:
        adapter.set_merged([one[adapter.name]])
    before = {name: weight_of(backbone, name) for name in names}
    for adapter in backbone.adapters:
        adapter.set_merged([other[adapter.name]] if replaces else [one[adapter.name], other[adapter.name]])
    found = measured(backbone, change_between([one] if replaces else [], [other]))
    assert set(found) == {adapter.name for adapter in backbone.adapters}
    for name in names:
        x = torch.cat(read_by_first_attention(backbone, name.partition(".")[0]))
        (old, bias), (new, _) = before[name], weight_of(backbone, name)
        expected = (x @ (new - old).T).norm() / (x @ old.T + bias).norm()
        assert found[name] == pytest.approx(expected.item(), rel=1e-4)


def test_of_many_tokens_every_nth_is_looked_at(backbone: ClipBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "TOKENS", 9)
    (update,) = random_updates(backbone, 1)
    for adapter in backbone.adapters:
        adapter.set_merged([update[adapter.name]])
    found = measured(backbone, update)
    tokens = read_by_first_attention(backbone, "image")
    assert [len(x) for x in tokens] == [20, 15]
    x = torch.cat([tokens[0][::3], tokens[1][::2]])
    new, bias = weight_of(backbone, "image.0.k")
    A, B, scaling, _ = update["image.0.k"]
    expected = (scaling * x @ A.T @ B.T).norm() / (x @ (new - scaling * B @ A).T + bias).norm()
    assert found["image.0.k"] == pytest.approx(expected.item(), rel=1e-4)


def test_without_anything_read_there_is_none(backbone: ClipBackbone) -> None:
    (update,) = random_updates(backbone, 1)
    assert Drift(backbone, backbone.adapters, update).by_layer() == {}
    assert Drift(backbone, [], {}).by_layer() == {}
    text = Drift(backbone, backbone.adapters, update)
    with text.watch(), torch.no_grad():
        backbone.eval()(tokens=tokenize(PROMPTS))
    assert text.by_layer() and all(name.startswith("text.") for name in text.by_layer())
