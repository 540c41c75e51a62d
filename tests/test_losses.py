"""The losses against formulas written out sample by sample, and the contrastive loss over ranks against one process."""

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss

from r1p_dist.distributed import CollectiveCounter
from r1p_dist.losses import ago_loss, contrastive_loss, sigmoid_loss


def features(seed: int, n: int = 8, d: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)), dim=-1)


LABELS = torch.tensor([0, 1, 1, 2, 0, 0, 3, 1])


def expected_loss(image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    total = 0
    for a, b in ((image, text), (text, image)):
        for i in range(len(labels)):
            log_p = torch.stack([scale * a[i] @ b[j] for j in range(len(labels))]).log_softmax(0)
            positives = [j for j in range(len(labels)) if labels[j] == labels[i]]
            total = total - sum(log_p[j] for j in positives) / len(positives)
    return total / (2 * len(labels))


def test_contrastive_loss_with_equal_labels_as_positives() -> None:
    image, text = features(0), features(1)
    torch.testing.assert_close(contrastive_loss(image, text, LABELS, 14.0), expected_loss(image, text, LABELS, 14.0))


def test_contrastive_loss_with_distinct_labels_is_clips() -> None:
    image, text = features(0), features(1)
    logits = 14.0 * image @ text.T
    clip = (F.cross_entropy(logits, torch.arange(8)) + F.cross_entropy(logits.T, torch.arange(8))) / 2
    torch.testing.assert_close(contrastive_loss(image, text, torch.arange(8), 14.0), clip)


def expected_sigmoid_loss(
    image: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, scale: float, bias: float = -3.0
) -> torch.Tensor:
    total = 0
    for i in range(len(labels)):
        for j in range(len(labels)):
            p = 1 / (1 + torch.exp(-(scale * image[i] @ text[j] + bias)))
            total = total - torch.log(p if labels[i] == labels[j] else 1 - p)
    return total / len(labels)


def test_sigmoid_loss_with_equal_labels_as_positives() -> None:
    image, text = features(0), features(1)
    expected = expected_sigmoid_loss(image, text, LABELS, 14.0)
    torch.testing.assert_close(sigmoid_loss(image, text, LABELS, 14.0, -3.0), expected)


def test_sigmoid_loss_with_distinct_labels_is_open_clips() -> None:
    image, text = features(0), features(1)
    expected = SigLipLoss()(image, text, torch.tensor(14.0), torch.tensor(-3.0))
    torch.testing.assert_close(sigmoid_loss(image, text, torch.arange(8), 14.0, -3.0), expected)


LOSSES = {
    "contrastive": (contrastive_loss, (), expected_loss, 2),
    "sigmoid": (sigmoid_loss, (-3.0,), expected_sigmoid_loss, 1),
}


def losses_and_gradients(rank: int, world_size: int) -> dict[str, tuple]:
    """Of each loss: its value, the gradients of images and texts, and how often features were gathered."""
    found = {}
    for name, (loss, more, *_) in LOSSES.items():
        image, text = (features(seed).chunk(world_size)[rank].clone().requires_grad_() for seed in (0, 1))
        with CollectiveCounter() as counter:
            value = loss(image, text, LABELS.chunk(world_size)[rank], 14.0, *more)
        value.backward()
        gathers = counter.calls["allgather"] - 1  # the labels'
        found[name] = (value.detach(), image.grad, text.grad, gathers)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_mean_over_ranks_has_the_loss_and_gradient_of_the_global_batch(run_distributed, ranks: int) -> None:
    found = run_distributed(losses_and_gradients, ranks)
    for name, (_, _, expected, gathers) in LOSSES.items():
        results = [of_rank[name] for of_rank in found]
        image, text = features(0).requires_grad_(), features(1).requires_grad_()
        loss = expected(image, text, LABELS, 14.0)
        loss.backward()
        torch.testing.assert_close(torch.stack([result[0] for result in results]).mean(), loss.detach())
        # ZeRO averages over ranks, so a rank's gradient for its own samples is `ranks` times the global one
        torch.testing.assert_close(torch.cat([result[1] for result in results]) / ranks, image.grad)
        torch.testing.assert_close(torch.cat([result[2] for result in results]) / ranks, text.grad)
        assert {result[3] for result in results} == {gathers}


def test_ago_loss_is_the_mean_over_layers_of_all_absolute_products() -> None:
    generator = torch.Generator().manual_seed(0)
    current = [torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)]
    past = [torch.randn(5, 8, generator=generator), torch.randn(7, 8, generator=generator)]
    layers = []
    for now, before in zip(current, past, strict=True):
        layers.append(sum(abs(float(now[:, i] @ before[:, j])) for i in range(4) for j in range(8)))
    assert ago_loss(current, past).item() == pytest.approx(sum(layers) / 2, rel=1e-6)


def test_ago_loss_without_past_tasks_is_zero() -> None:
    assert ago_loss([torch.ones(5, 4)], [torch.empty(5, 0)]).item() == 0
