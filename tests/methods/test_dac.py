"""DAC's whole loss and its gradient against the formula written out, in every reading of the AGO loss."""

import pytest
import torch
from torch import nn

from r1p_dist.adapters import AdaptedLinear
from tests.test_losses import expected_loss

WEIGHT, MERGED = 0.3, 2
OPTIONS = ["options.rank=6", "options.active=3", f"options.merged={MERGED}", f"options.ago.weight={WEIGHT}"]


def most_counted(adapter: AdaptedLinear) -> list[int]:
    counts = adapter.activation_counts.tolist()
    return sorted(range(adapter.rank), key=lambda j: (-counts[j], j))[:MERGED]


def ago(adapter: AdaptedLinear, past: list[torch.Tensor], reduction: str) -> torch.Tensor:
    """The term of one layer: |b_now . b_past|, summed over the most counted experts now and the past columns."""
    pairs = [abs((adapter.B[:, j] * column).sum()) for j in most_counted(adapter) for column in past]
    return sum(pairs) / (len(pairs) if reduction == "paper_mean" else 1)


@pytest.mark.parametrize("reduction", ["sum_top", "paper_mean", "code_all"])
def test_the_loss_is_the_contrastive_one_plus_lambda_times_the_mean_of_the_layers_terms(stages_of, reduction) -> None:
    stages, _ = stages_of("dac", *OPTIONS, f"options.ago.reduction={reduction}")
    backbone, adapters = stages.method.backbone, stages.method.adapters
    past: dict[str, list[torch.Tensor]] = {adapter.name: [] for adapter in adapters}
    for task in range(3):
        stages.begin(task)
        generator = torch.Generator().manual_seed(task)
        for adapter in adapters:
            nn.init.normal_(adapter.B, std=0.1, generator=generator)
        Bs = [adapter.B for adapter in adapters]
        for batch in stages.scan_batches(task, 4):
            loss, terms = stages.method.loss(backbone, batch)
            ours = torch.autograd.grad(loss, Bs)
        # of the last batch, when three batches before it have been counted
        assert any(most_counted(adapter) != adapter._active[:MERGED].tolist() for adapter in adapters)
        for adapter in adapters:
            adapter.is_recorded = True  # the vote stands
        inputs = {name: batch[name] for name in ("image", "tokens", "counts", "end")}
        image, text = backbone(**inputs)
        expected = expected_loss(image, text[batch["place"]], batch["label"], backbone.logit_scale)
        if task:
            layers = [ago(adapter, past[adapter.name], reduction) for adapter in adapters]
            expected = expected + WEIGHT * sum(layers) / len(layers)
            torch.testing.assert_close(terms["ago"], WEIGHT * (sum(layers) / len(layers)).detach())
            assert terms["ago"] > 1e-3 * loss, "else the loss says little of it"
        else:
            assert set(terms) == {"data"}
        torch.testing.assert_close(loss, expected)
        theirs = torch.autograd.grad(expected, Bs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        for adapter in adapters:
            kept = range(adapter.rank) if reduction == "code_all" else most_counted(adapter)
            past[adapter.name] += [adapter.B[:, j].detach().clone() for j in kept]
        stages.end()
        stages.engine.close()
