"""LiLoRA's update, its loss on the base and its selection, each written out (arXiv 2508.06202)."""

from types import SimpleNamespace

import pytest
import torch

TASKS = tuple(SimpleNamespace(name=name) for name in ("first", "second", "third"))


def sigmoid(value: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + torch.exp(-value))


def by_hand(A, B, own: dict[str, torch.Tensor], scaling: float) -> torch.Tensor:
    share = sigmoid(own["fusion"])
    return scaling * (share * B + (1 - share) * own["Eb"] @ own["Ea"]) @ A


def own_parts(adapter) -> dict[str, torch.Tensor]:
    return {name: getattr(adapter, name).detach().clone() for name in ("Ea", "Eb", "fusion")}


def begin(stages, task: int):
    stages.method.stages(SimpleNamespace(tasks=TASKS))
    return stages.begin(task, TASKS)


def test_a_task_is_its_own_part_fused_with_the_base_and_is_chosen_by_its_id(stages_of) -> None:
    stages, train = stages_of("lilora", "options.rank=6", "options.sub_rank=2", "options.alpha=3", "train.lr=0.05")
    adapter = next(adapter for adapter in stages.method.adapters if adapter.name == "image.0.fc1")
    pristine = adapter.linear.weight.detach().clone()
    owns = []
    for task in range(2):
        begin(stages, task)
        assert not adapter.Eb.any()
        train(task)
        train(task)
        owns.append(own_parts(adapter))
        numbers = sum(value.numel() for value in owns[-1].values())
        assert numbers == 2 * 6 + 2 * adapter.out_features + 1
        expected = by_hand(adapter.A, adapter.B, owns[-1], 0.5).detach()
        update = adapter.update()
        torch.testing.assert_close(update.scaling * update.B @ update.A, expected)
        assert expected.norm() > 1e-2
        stages.end()
        stages.engine.close()
        torch.testing.assert_close(adapter.linear.weight, pristine + expected, rtol=1e-4, atol=1e-6)
        left = adapter.linear.weight.detach().clone()
        for number, known in enumerate(TASKS):
            with stages.method.select(known):
                found = adapter.linear.weight.detach() - pristine
            own = owns[number] if number < len(owns) else None
            chosen = torch.zeros_like(found) if own is None else by_hand(adapter.A, adapter.B, own, 0.5).detach()
            torch.testing.assert_close(found, chosen, rtol=1e-4, atol=1e-6)
            assert torch.equal(adapter.linear.weight, left), "the last task's again"
    assert (owns[0]["fusion"] - owns[1]["fusion"]).abs() > 1e-3


def test_the_base_is_held_where_tasks_are_unlike(stages_of) -> None:
    stages, train = stages_of("lilora", "options.rank=6", "options.weight=0.7", "train.lr=0.05")
    adapters, before = stages.method.adapters, {}
    for task in range(2):
        begin(stages, task)
        assert set(train(task)) == ({"loss", "loss_data", "loss_base"} if task else {"loss"})
        if task:
            expected = 0.0
            for adapter in adapters:
                base, product = before[adapter.name]
                now = (adapter.Eb @ adapter.Ea).detach()
                alike = (now * product).sum() / (now.norm() * product.norm())
                expected += 0.7 * (1 - alike) * (adapter.B.detach() - base).square().sum()
            _, terms = stages.method.loss(stages.method.backbone, stages.scan_batches(1, 1)[0])
            torch.testing.assert_close(terms["base"], expected, rtol=1e-4, atol=0)
            assert expected > 0
        before = {a.name: (a.B.detach().clone(), (a.Eb @ a.Ea).detach()) for a in adapters}
        stages.end()
        stages.engine.close()


def test_the_codes_base_is_frozen_after_the_first_task(stages_of) -> None:
    stages, train = stages_of("lilora", "options.base=frozen", "train.weight_decay=0.5")
    adapter, bases = stages.method.adapters[0], []
    for task in range(3):
        begin(stages, task)
        A = adapter.A.detach().clone()
        assert set(train(task)) == {"loss"}
        assert not torch.equal(adapter.A, A), "A trains on"
        stages.end()
        bases.append(stages.memory[-1][f"{adapter.name}.base"])
        stages.engine.close()
    assert bases[0].any() and torch.equal(bases[0], bases[1]) and torch.equal(bases[1], bases[2])


@pytest.mark.parametrize("known", [True, False])
def test_without_ids_every_task_gets_the_last_ones_model_which_can_be_exported(stages_of, known: bool) -> None:
    stages, train = stages_of("lilora", f"options.task_ids={known}".lower())
    adapter = stages.method.adapters[0]
    assert stages.method.inference == ("task_id" if known else "merged")
    begin(stages, 0)
    train(0)
    stages.end()
    stages.engine.close()
    weight = adapter.linear.weight.detach().clone()
    with stages.method.select(TASKS[1]):
        assert torch.equal(adapter.linear.weight, weight) == (not known)
