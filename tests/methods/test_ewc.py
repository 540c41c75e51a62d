"""EWC's penalty, and the Fisher and anchor that it takes from task to task (arXiv 1612.00796)."""

import re
from pathlib import Path
from textwrap import indent

import pytest
import torch
from torch import nn

from r1p_dist.adapters import Factors
from r1p_dist.methods.ewc import EwcLinear

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_code_that_is_shipped() -> None:
    page = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    code = (ROOT / "r1p_dist/methods/ewc.py").read_text(encoding="utf-8")
    # ruff formats the page's blocks, each as if it were a file
    blocks = [block.replace("\n\n\n", "\n\n") for block in re.findall(r"```python\n(.*?)```", page, re.S)]
    assert len(blocks) > 4 and all(block in code or indent(block, "    ") in code for block in blocks)


def test_the_penalty_is_quadratic_around_the_anchor() -> None:
    adapter = EwcLinear(nn.Linear(4, 3), rank=2)
    factors = Factors(torch.randn(2, 4), torch.randn(3, 2), 0.5)
    assert adapter.penalty(factors) == {}
    adapter.fisher = {"A": torch.rand(2, 4), "B": torch.rand(3, 2)}
    adapter.anchor = {"A": torch.randn(2, 4), "B": torch.randn(3, 2)}
    adapter.weight_of_penalty = 10.0
    expected = 0.0
    for name, value in (("A", factors.A), ("B", factors.B)):
        for fisher, anchor, now in zip(
            adapter.fisher[name].flatten(), adapter.anchor[name].flatten(), value.flatten(), strict=True
        ):
            expected += 10.0 / 2 * fisher * (now - anchor) ** 2
    torch.testing.assert_close(adapter.penalty(factors)["ewc"], torch.as_tensor(expected))
    at_anchor = Factors(adapter.anchor["A"].requires_grad_(), adapter.anchor["B"].requires_grad_(), 0.5)
    penalty = adapter.penalty(at_anchor)["ewc"]
    assert penalty == 0 and not any(g.any() for g in torch.autograd.grad(penalty, [at_anchor.A, at_anchor.B]))


def parts_of_samples(backbone, batch: dict) -> list[torch.Tensor]:
    """Each sample's part of the contrastive loss: its picture among the texts, and its text among the pictures."""
    image, text = backbone(**{name: batch[name] for name in ("image", "tokens", "counts", "end")})
    text, labels, parts = text[batch["place"]], batch["label"], []
    for own, label in enumerate(labels):
        log_p = [(backbone.logit_scale * a[own] @ b.T).log_softmax(0) for a, b in ((image, text), (text, image))]
        parts.append(-sum(values[labels == label].mean() for values in log_p) / 2)
    return parts


@pytest.mark.parametrize("fisher", ["sample", "batch"])
def test_the_fisher_is_the_mean_of_squared_gradients_and_decays(stages_of, fisher: str) -> None:
    stages, train = stages_of("ewc", "options.decay=0.5", "options.batches=2", f"options.fisher={fisher}")
    expected: dict[str, torch.Tensor] = {}
    for task in range(2):
        stages.begin(task)
        train(task)
        method, backbone = stages.method, stages.method.backbone
        backbone.train()
        for adapter in method.adapters:
            adapter.is_recorded = True
        parameters = method.trainable_parameters()
        squares = {name: torch.zeros(p.shape) for name, p in parameters.items()}
        for batch in stages.scan_batches(task, 2):
            parts = parts_of_samples(backbone, batch)
            torch.testing.assert_close(sum(parts) / len(parts), backbone.loss(backbone, batch))
            for part in parts if fisher == "sample" else [backbone.loss(backbone, batch)]:
                found = torch.autograd.grad(part, list(parameters.values()), retain_graph=True)
                for name, gradient in zip(parameters, found, strict=True):
                    squares[name] += gradient**2 / (2 * (len(parts) if fisher == "sample" else 1))
        stages.end()
        for name in parameters:
            expected[name] = 0.5 * expected.get(name, torch.zeros(())) + squares[name]
            torch.testing.assert_close(stages.memory[-1][f"{name}.fisher"], expected[name], rtol=1e-4, atol=1e-9)
            assert torch.equal(stages.memory[-1][f"{name}.anchor"], parameters[name])
        stages.engine.close()
