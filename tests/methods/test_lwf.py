"""LwF's teacher is the model that the task began with, and its loss the one that ZSCL's code has, written out."""

import pytest
import torch

from r1p_dist.errors import InputError
from r1p_dist.recipes import load_config

T, WEIGHT = 3.0, 0.5


def similarities(images: torch.Tensor, texts: torch.Tensor, scale: float) -> list[list[torch.Tensor]]:
    return [[scale * (image * text).sum() for text in texts] for image in images]


def cross_entropy(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> torch.Tensor:
    taught = [value.exp() for value in (torch.stack(teacher) / T)]
    student = torch.stack(student) / T
    log_total = student.exp().sum().log()
    return -sum(p / sum(taught) * (value - log_total) for p, value in zip(taught, student, strict=True))


def written_out(image, teacher_image, teacher_text, scale: float) -> torch.Tensor:
    """T^2 times the mean over pictures and the mean over prompts of the cross entropies of what T softens."""
    taught, found = similarities(teacher_image, teacher_text, scale), similarities(image, teacher_text, scale)
    by_text = [list(column) for column in zip(*taught, strict=True)], [list(c) for c in zip(*found, strict=True)]
    rows = [cross_entropy(*pair) for pair in zip(taught, found, strict=True)]
    columns = [cross_entropy(*pair) for pair in zip(*by_text, strict=True)]
    return T**2 * (sum(rows) / len(rows) + sum(columns) / len(columns))


def test_the_loss_is_the_contrastive_one_plus_the_distillation_from_the_model_before(stages_of) -> None:
    stages, train = stages_of("lwf", f"options.weight={WEIGHT}", f"options.temperature={T}")
    backbone = stages.method.backbone
    for task in range(2):
        stages.begin(task)
        batch = stages.scan_batches(task, 1)[0]
        with torch.no_grad():
            teacher_image, teacher_text = backbone.outputs(backbone, batch)
        terms = train(task)
        assert set(terms) == {"loss", "loss_data", "loss_distilled"}
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        loss, _ = stages.method.loss(backbone, batch)
        ours = torch.autograd.grad(loss, parameters, allow_unused=True)
        image, _ = backbone.outputs(backbone, batch)
        assert (image - teacher_image).norm() > 1e-2, "it has moved away from its teacher"
        distilled = written_out(image, teacher_image, teacher_text[batch["place"]], backbone.logit_scale)
        expected = backbone.loss(backbone, batch) + WEIGHT * distilled
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-3, atol=1e-5)
        stages.end()
        stages.engine.close()


def test_a_model_that_answers_has_no_similarities_to_distill() -> None:
    with pytest.raises(InputError, match="method=lwf compares pictures with prompts"):
        load_config("mini_instruct", ["method=lwf"])
