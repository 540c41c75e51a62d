"""Full fine-tuning trains every weight of its towers and nothing else, and gives the pristine model back."""

import torch


def test_all_weights_of_the_chosen_towers_learn(stages_of) -> None:
    stages, train = stages_of("full", "targets.towers=[image]")
    backbone = stages.method.backbone
    before = {name: parameter.detach().clone() for name, parameter in backbone.named_parameters()}
    assert stages.method.count_parameters() == sum(p.numel() for p in backbone.model.visual.parameters())
    stages.begin(0)
    train(0)
    stages.end()
    stages.engine.close()
    changed = {name for name, parameter in backbone.named_parameters() if not torch.equal(parameter, before[name])}
    image = {name for name in before if name.startswith("model.visual.")}
    assert changed <= image and len(changed) > 0.8 * len(image)  # the key's bias has no gradient
    assert stages.updates[0].keys() == image
    stages.method.set_merged([])
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.named_parameters())
