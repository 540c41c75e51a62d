"""Ortho-LoRA's projection against the rule written out (arXiv 2601.09684, after PCGrad)."""

import itertools

import torch

from r1p_dist.methods.ortho_lora import project


def by_hand(gradients: list[torch.Tensor], orders: list[list[int]]) -> torch.Tensor:
    found = []
    for number, order in enumerate(orders):
        own = gradients[number]
        for other in order:
            if other == number:
                continue
            overlap = float((own * gradients[other]).sum())
            if overlap < 0:
                own = own - overlap / float((gradients[other] ** 2).sum()) * gradients[other]
        found.append(own)
    return sum(found) / len(found)


def test_conflicts_are_projected_away_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 3, generator=generator) for _ in range(3)]
    gradients[1] -= 2 * gradients[0]
    assert any((a * b).sum() < 0 for a, b in itertools.combinations(gradients, 2))
    drawn = torch.Generator().manual_seed(5)
    orders = [torch.randperm(3, generator=drawn).tolist() for _ in range(3)]
    found = project(gradients, torch.Generator().manual_seed(5))
    torch.testing.assert_close(found, by_hand(gradients, orders))
    alike = [gradients[0], 2 * gradients[0], 3 * gradients[0]]
    torch.testing.assert_close(project(alike, torch.Generator()), 2 * gradients[0])


def test_the_projected_gradient_conflicts_with_no_task_of_two() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    found = project([first, second], torch.Generator())
    assert (found @ first) >= 0 and (found @ second) >= 0
