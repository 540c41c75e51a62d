"""ZSCL: the teacher is the pretrained model in every task, and a task leaves the plain mean of its snapshots."""

import torch
from torch.optim.swa_utils import AveragedModel

from r1p_dist.fit import train_step
from r1p_dist.optimizer_state import part_of
from tests.methods.test_conformance import Loader
from tests.methods.test_lwf import WEIGHT, T, written_out
from tests.small_clip import make_backbone

OPTIONS = [f"options.weight={WEIGHT}", f"options.temperature={T}"]


def values(stages) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in stages.method.trainable_parameters().items()}


def test_the_teacher_is_the_pretrained_model_and_a_task_leaves_the_mean_of_snapshots(stages_of) -> None:
    stages, _ = stages_of("zscl", *OPTIONS, "options.every=2", "options.l2=0", "train.iterations=5")
    method, backbone, pristine = stages.method, stages.method.backbone, make_backbone()
    for task in range(2):
        trainer = stages.begin(task)
        trained = torch.nn.ParameterList(method.trainable_parameters().values())
        average = AveragedModel(trained)  # torch's own: the plain mean of what it is shown
        average.update_parameters(trained)
        for step, batch in enumerate(stages.scan_batches(task, 5)):
            train_step(method, trainer, [batch], stages.config.train)
            trainer.step_number = step + 1
            if step in (0, 2, 4):
                average.update_parameters(trained)
        with torch.no_grad():
            teacher_image, teacher_text = pristine.outputs(pristine, batch)
            image, _ = backbone.outputs(backbone, batch)
        text = teacher_text[batch["place"]]
        expected = WEIGHT * written_out(image, teacher_image, text, backbone.logit_scale)
        _, terms = method.loss(backbone, batch)
        torch.testing.assert_close(terms["distilled"], expected, rtol=1e-4, atol=0)
        assert (image - teacher_image).norm() > 1e-2
        stages.end()
        left = values(stages)
        assert average.n_averaged == 4
        for (name, value), mean in zip(left.items(), average.module, strict=True):
            torch.testing.assert_close(value, mean.detach(), rtol=1e-4, atol=1e-6)
            assert torch.equal(stages.updates[task][name].value, value)
        stages.engine.close()
    assert set(stages.memory[0]) == set(left) and not stages.memory[1], "the pretrained weights are kept once"


def test_the_distance_from_the_start_pulls_back(stages_of) -> None:
    stages, _ = stages_of("zscl", "options.l2=0.5", "options.every=100", "train.weight_decay=0")
    method, backbone = stages.method, stages.method.backbone
    trainer = stages.begin(0)
    start = values(stages)
    batches = stages.scan_batches(0, 2)
    train_step(method, trainer, batches[:1], stages.config.train)
    trainer.step_number = 1
    before = values(stages)
    parameters = method.trainable_parameters()
    loss, _ = method.loss(backbone, batches[1])
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    taken = []
    backward = trainer.backward_gradients
    trainer.backward_gradients = lambda found: (taken.append(found), backward(found))
    train_step(method, trainer, batches[1:], stages.config.train)
    for (name, value), gradient in zip(before.items(), gradients, strict=True):
        expected = (0 if gradient is None else gradient) + 2 * 0.5 * (value - start[name])
        torch.testing.assert_close(taken[0][name], expected, rtol=1e-3, atol=1e-5)
    assert part_of(stages.engine.engine, parameters[name]).columns["exp_avg"].any()
    stages.engine.close()


def test_a_reference_stream_is_what_both_are_compared_on(stages_of) -> None:
    stages, train = stages_of("zscl", *OPTIONS, "options.reference=mini_mtil", "options.l2=0")
    method, backbone = stages.method, stages.method.backbone
    request = method.further_data(None, ())["reference"]
    assert len(request.tasks) > 1
    trainer = stages.begin(0)
    trainer.add_stream("reference", Loader(3, 4, 1))
    train(0)
    new, other = stages.scan_batches(0, 1)[0], stages.scan_batches(3, 3)[2]
    method._references = iter(trainer.next_batches("reference"))
    _, terms = method.loss(backbone, new)
    pristine = make_backbone()
    with torch.no_grad():
        teacher_image, teacher_text = pristine.outputs(pristine, other)
        image, _ = backbone.outputs(backbone, other)
    expected = WEIGHT * written_out(image, teacher_image, teacher_text[other["place"]], backbone.logit_scale)
    torch.testing.assert_close(terms["data"], backbone.loss(backbone, new).detach())
    torch.testing.assert_close(terms["distilled"], expected, rtol=1e-4, atol=0)
    stages.engine.close()
