"""SoRA's proximal step against the formula written out, the zeros that it leaves, and what pruning leaves out."""

import math

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import SVDLinear
from torch import nn

from r1p_dist.adapters import GatedLinear, shrink


def soft(value: float, threshold: float) -> float:
    return math.copysign(max(abs(value) - threshold, 0.0), value)


def one_after_the_other(value: float, threshold: float) -> float:
    """As the released code has it, where what a line found the next one tests."""
    if value > threshold:
        value -= threshold
    if value < -threshold:
        value += threshold
    return 0.0 if abs(value) < threshold else value


@pytest.mark.parametrize("is_doubled", [False, True])
def test_shrinking_is_the_soft_threshold_or_the_codes(is_doubled: bool) -> None:
    values = torch.linspace(-1, 1, 41) * 0.999
    expected = [(one_after_the_other if is_doubled else soft)(value, 0.2) for value in values.tolist()]
    torch.testing.assert_close(shrink(values, 0.2, is_doubled), torch.tensor(expected))
    if not is_doubled:
        torch.testing.assert_close(shrink(values, 0.2), torch.nn.functional.softshrink(values, 0.2))


def test_a_gated_layer_computes_and_learns_as_pefts_adalora_layer_which_has_gates_too() -> None:
    torch.manual_seed(0)
    ours = GatedLinear(nn.Linear(6, 5), rank=3, alpha=2.0)
    nn.init.normal_(ours.B)
    with torch.no_grad():
        ours.gate[1] = 0.0
    theirs = SVDLinear(nn.Linear(6, 5), "default", AdaLoraConfig(lora_dropout=0.0, total_step=1), r=3, lora_alpha=2)
    theirs.base_layer.load_state_dict(ours.linear.state_dict())
    with torch.no_grad():
        theirs.lora_A["default"].copy_(ours.A)
        theirs.lora_B["default"].copy_(ours.B)
        theirs.lora_E["default"].copy_(ours.gate[:, None])
    x, g = torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    y.backward(g)
    expected.backward(g)
    gradients = {"lora_A": ours.A.grad, "lora_B": ours.B.grad, "lora_E": ours.gate.grad[:, None]}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, getattr(theirs, name)["default"].grad, rtol=1e-4, atol=1e-5)
    update = ours.update()
    torch.testing.assert_close(update.scaling * update.B @ update.A, theirs.get_delta_weight("default").detach())


@pytest.mark.parametrize("proximal", ["paper", "code"])
def test_each_step_ends_with_the_proximal_one_on_gates_alone(stages_of, proximal: str) -> None:
    options = [f"options.proximal={proximal}", "options.sparsity=20", "options.threshold=0.1", "options.weight=3"]
    stages, train = stages_of("so_ra", *options, "train.weight_decay=0", "train.iterations=9")
    method = stages.method
    trainer = stages.begin(0)
    seen = []
    update = trainer.update

    def watched() -> None:
        lr = stages.engine.lr
        update()
        seen.append((lr, {name: value.detach().clone() for name, value in method.trainable_parameters().items()}))

    trainer.update = watched
    terms = train(0)
    lr, before = seen[-1]
    assert seen[0][0] == 1e-2 and trainer.lr == lr
    for name, value in method.trainable_parameters().items():
        if name.endswith(".gate"):
            if proximal == "paper":
                expected = [soft(number, 20 * lr) for number in before[name].tolist()]
            else:
                expected = [one_after_the_other(number, 0.1) for number in before[name].tolist()]
            torch.testing.assert_close(value.detach(), torch.tensor(expected))
        else:
            assert torch.equal(value, before[name])
    assert ("loss_sparse" in terms) == (proximal == "code")
    stages.engine.close()


def test_zeros_are_exact_and_survive_the_next_step_and_pruning_changes_nothing(stages_of) -> None:
    stages, train = stages_of("so_ra", "options.sparsity=20", "options.rank=8", "train.weight_decay=0")
    adapter = stages.method.adapters[0]
    stages.begin(0)
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor([0.1, -0.2, 2.0, -1.0, 0.15, 3.0, 0.05, -0.1]))
    train(0)  # two steps
    train(0)
    assert adapter.gate.ne(0).tolist() == [False, False, True, True, False, True, False, False]
    whole = adapter.scaling * adapter.B @ torch.diag(adapter.gate) @ adapter.A
    stages.end()
    update = stages.updates[0][adapter.name]
    assert update.A.shape[0] == update.B.shape[1] == 3
    torch.testing.assert_close(update.scaling * update.B @ update.A, whole.detach())
    with torch.no_grad():
        adapter.gate.zero_()
    assert not adapter.update().B.any() and len(adapter.update().A) == 1
    stages.engine.close()


def test_the_codes_loss_is_the_weighted_mean_of_all_gates(stages_of) -> None:
    stages, _ = stages_of("so_ra", "options.proximal=code", "options.weight=3")
    stages.begin(0)
    batch = stages.scan_batches(0, 1)[0]
    _, terms = stages.method.loss(stages.method.backbone, batch)
    gates = torch.cat([adapter.gate.detach() for adapter in stages.method.adapters])
    torch.testing.assert_close(terms["sparse"], 3 * gates.abs().mean())
    stages.engine.close()
