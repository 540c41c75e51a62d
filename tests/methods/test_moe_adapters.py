"""MoE-Adapters' block against the formula written out, what is frozen, and which router a task gets."""

from types import SimpleNamespace

import torch

from tests.small_clip import make_backbone

TASKS = tuple(SimpleNamespace(name=name) for name in ("first", "second", "third"))


def begin(stages, task: int):
    stages.method.stages(SimpleNamespace(tasks=TASKS))
    return stages.begin(task, TASKS)


def expected_addition(experts, x: torch.Tensor, top: int) -> torch.Tensor:
    rows = []
    for sample in x:
        scores = (sample[0] @ experts.router).detach()
        chosen = scores.argsort(descending=True)[:top].tolist()
        weights = [float(scores[i].exp()) for i in chosen]
        total = torch.zeros_like(sample)
        for i, weight in zip(chosen, weights, strict=True):
            hidden = (sample @ experts.down[i].T + experts.down_bias[i]).clamp(min=0)
            total += weight / sum(weights) * (hidden @ experts.up[i].T + experts.up_bias[i])
        rows.append(0.1 * total)
    return torch.stack(rows)


def test_two_of_twenty_two_experts_read_the_residual_before_the_second_layer_norm(stages_of) -> None:
    stages, _ = stages_of("moe_adapters", "options.experts=22")
    begin(stages, 0)
    backbone, generator = stages.method.backbone, torch.Generator().manual_seed(0)
    block = backbone.model.visual.transformer.resblocks[0]
    with torch.no_grad():
        for parameter in block.beside.parameters():
            parameter.normal_(generator=generator)
    seen = {}
    handles = [
        block.ln_2.register_forward_hook(lambda module, inputs, output: seen.update(residual=inputs[0])),
        block.register_forward_hook(lambda module, inputs, output: seen.update(output=output)),
    ]
    backbone(image=stages.scan_batches(0, 1)[0]["image"])
    with_experts, x = seen["output"], seen["residual"]
    block.beside.eval()  # which adds nothing where no router is selected
    backbone(image=stages.scan_batches(0, 1)[0]["image"])
    for handle in handles:
        handle.remove()
    found = with_experts - seen["output"]
    torch.testing.assert_close(found, expected_addition(block.beside, x, 2), rtol=1e-3, atol=1e-4)
    assert len({tuple(row) for row in (x[:, 0] @ block.beside.router).topk(2)[1].tolist()}) > 1
    stages.engine.close()


def test_the_most_used_experts_stay_bit_equal_and_the_others_learn(stages_of) -> None:
    stages, train = stages_of("moe_adapters", "train.weight_decay=0.1", "train.lr=0.05")
    module = stages.method._beside["image.1"]
    frozen, before, before_values = {}, [], {}
    for task in range(3):
        begin(stages, task)
        assert not module.router.any(), "a router of its own"
        assert module.counts.sum() == 0
        train(task)
        train(task)
        assert module.counts.sum() == 2 * 8 * 4  # two for each sample of four steps
        # of prompts, as often as they occur
        assert stages.method._beside["text.0"].counts.sum() == 2 * 8 * 4
        most = module.counts.argsort(descending=True, stable=True)[:2].tolist()
        stages.end()
        left = stages.memory[-1]
        chosen = left["image.1.frozen"].tolist()
        assert set(most) <= set(chosen) and len(chosen) <= 2 * (task + 1)
        now = {part: module.value(part, getattr(module, part).detach()).clone() for part in ("down", "up")}
        for expert, (task_before, values) in frozen.items():
            assert expert in chosen and task_before < task
            assert all(torch.equal(now[part][expert], value) for part, value in values.items())
        for expert in chosen:
            frozen.setdefault(expert, (task, {part: value[expert].clone() for part, value in now.items()}))
        if task:
            learnt = [i for i in most if i not in before]
            assert all(not torch.equal(now["up"][i], before_values["up"][i]) for i in learnt)
        before, before_values = chosen, now
        stages.engine.close()


def test_each_task_has_its_router_and_an_untrained_one_the_pretrained_model(stages_of) -> None:
    stages, train = stages_of("moe_adapters", "train.lr=0.05")
    backbone, pristine, outputs = stages.method.backbone, make_backbone().eval(), []
    batch = stages.scan_batches(0, 1)[0]
    for task in range(2):
        begin(stages, task)
        train(task)
        train(task)
        stages.end()
        stages.engine.close()
    backbone.eval()
    with torch.no_grad():
        for known in TASKS:
            with stages.method.select(known):
                routers = [module.selected for module in stages.method._beside.values()]
                outputs.append((routers[0], backbone(image=batch["image"])[0]))
        plain = pristine(image=batch["image"])[0]
        assert torch.equal(backbone(image=batch["image"])[0], plain)
    assert torch.equal(outputs[0][0], stages.memory[0]["image.0.router"])
    assert torch.equal(outputs[1][0], stages.method._beside["image.0"].router)
    assert torch.equal(outputs[2][1], plain) and outputs[2][0] is None
    assert (outputs[0][1] - plain).norm() > 1e-3 and (outputs[1][1] - outputs[0][1]).norm() > 1e-6


def test_without_task_ids_inference_needs_the_router_alone(stages_of) -> None:
    assert stages_of("moe_adapters", "options.task_ids=false")[0].method.inference == "routed"
