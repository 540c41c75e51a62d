"""What a method can do to trained values: edit some of them, and run the model with other numbers for a while."""

import torch


def test_an_edit_can_be_of_some_parameters_only(stages_of) -> None:
    stages, _ = stages_of("lora")
    trainer = stages.begin(0)
    before = {name: value.detach().clone() for name, value in stages.method.trainable_parameters().items()}
    chosen = list(before)[::3]
    trainer.edit(lambda value: 2 * value + 1, only=chosen)
    for name, value in stages.method.trainable_parameters().items():
        torch.testing.assert_close(value.detach(), 2 * before[name] + 1 if name in chosen else before[name])
    stages.engine.close()


def test_a_teacher_has_a_columns_numbers_and_the_values_come_back(stages_of) -> None:
    stages, train = stages_of("lora")
    method, backbone = stages.method, stages.method.backbone
    method.columns = ("start",)
    trainer = stages.begin(0)
    trainer.edit_column("start", lambda column, value: value)
    batch = stages.scan_batches(0, 1)[0]
    with torch.no_grad():
        first = backbone.outputs(backbone, batch)
    train(0)
    with torch.no_grad():
        trained = backbone.outputs(backbone, batch)
        with trainer.weights("start"):
            teacher = backbone.outputs(backbone, batch)
        after = backbone.outputs(backbone, batch)
    assert all(torch.equal(one, other) for one, other in zip(teacher, first, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(after, trained, strict=True))
    assert not torch.equal(first[0], trained[0])
    stages.engine.close()
