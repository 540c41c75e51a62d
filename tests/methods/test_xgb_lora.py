"""XGBLoRA's merges change nothing that the model computes, and each booster begins anew (arXiv 2410.19694)."""

import torch

from r1p_dist.fit import train_step
from r1p_dist.optimizer_state import adam_steps, part_of

EVERY, LINEARS = 2, 5


def test_a_merge_changes_no_output_and_the_next_booster_is_fresh(stages_of) -> None:
    steps = ["train.iterations=7", f"options.every={EVERY}", f"options.linears={LINEARS}"]
    stages, _ = stages_of("xgb_lora", *steps)
    method, backbone = stages.method, stages.method.backbone
    trainer = stages.begin(0)
    batches = stages.scan_batches(0, 7)
    seen, after_step = [], method.after_step

    def watched(trainer) -> None:
        with torch.no_grad():
            before = torch.cat(backbone.outputs(backbone, batches[0]))
            chosen = {adapter.name for adapter in method.adapters if adapter.is_chosen}
            changed = {adapter.name for adapter in method.adapters if (adapter.is_chosen * adapter.B).any()}
            after_step(trainer)
            after = torch.cat(backbone.outputs(backbone, batches[0]))
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
        seen.append((chosen, changed, adam_steps(stages.engine.engine), before))

    method.after_step = watched
    for step, batch in enumerate(batches):
        train_step(method, trainer, [batch], stages.config.train)
        trainer.step_number = step + 1
    # boosters of steps 1-2, 3-4, 5-6 and 7, each with moments of its own
    assert [steps for _, _, steps, _ in seen] == [1, 0, 1, 0, 1, 0, 1]
    assert all(len(chosen) == LINEARS and changed == chosen for chosen, changed, _, _ in seen)
    assert seen[0][0] == seen[1][0] != seen[2][0] == seen[3][0] != seen[4][0] == seen[5][0] != seen[6][0]
    assert (seen[0][-1] - seen[-1][-1]).norm() > 1e-2, "it learns"
    stages.end()
    for adapter in method.adapters:
        times = sum(adapter.name in seen[step][0] for step in (1, 3, 5, 6))
        delta = stages.updates[0][adapter.name]
        assert torch.linalg.matrix_rank(delta.B @ delta.A) == times <= 4
    stages.engine.close()


def test_after_a_merge_values_and_moments_are_new(stages_of) -> None:
    stages, train = stages_of("xgb_lora", "train.iterations=3", "options.every=2")
    trainer = stages.begin(0)
    first = {name: value.detach().clone() for name, value in stages.method.trainable_parameters().items()}
    train_step(stages.method, trainer, stages.scan_batches(0, 1), stages.config.train)
    trainer.step_number = 1
    train_step(stages.method, trainer, stages.scan_batches(0, 1), stages.config.train)
    for name, value in stages.method.trainable_parameters().items():
        if name.endswith(".A"):
            assert (value - first[name]).abs().max() > 0.1 * first[name].abs().max()
        else:
            assert not value.any()
        part = part_of(stages.engine.engine, value)
        assert not part.columns["exp_avg"].any() and not part.columns["exp_avg_sq"].any()
    state = {name: value.clone() for name, value in stages.method.state().items()}
    before = torch.cat([adapter.linear.weight.flatten() for adapter in stages.method.adapters])
    stages.method.set_merged([])
    assert (torch.cat([adapter.linear.weight.flatten() for adapter in stages.method.adapters]) != before).any()
    stages.method.load_state(state)
    assert torch.equal(torch.cat([adapter.linear.weight.flatten() for adapter in stages.method.adapters]), before)
    assert all(torch.equal(value, state[name]) for name, value in stages.method.state().items())
    stages.engine.close()
