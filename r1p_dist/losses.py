"""The losses: contrastive and sigmoid with label-equality targets, a teacher's similarities, and the activation-guided
orthogonal (AGO) loss."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from r1p_dist.distributed import StartedGather, gather, gather_with_gradient


def contrastive_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor | float,
    image_gather: StartedGather | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Returns this rank's part of CLIP's symmetric loss over the global batch; samples of equal label are positives.

    image, text: unit-norm features (n, d) of this rank's samples; labels (n,); logit_scale: the multiplier itself;
    image_gather: the gather of `image`, if it was started already. reduction: `mean`, or `none` for each sample's part
    (n,), that of its picture among all texts and of its text among all pictures.
    Each rank forms its n rows against all N columns, so memory grows with n * N, and the mean over ranks is the loss
    of the global batch.
    Source: DAC's released code (lrbmutil.py): target_ij = 1[y_i = y_j] / row sum.
    """
    all_labels = gather(labels)
    targets = (labels[:, None] == all_labels[None]).to(image.dtype)  # (n, N)
    targets = targets / targets.sum(1, keepdim=True)
    # Each gather stands before its own product: so the backward has one side's gradient of all features at a time.
    all_text = gather_with_gradient(text)
    image_to_text = F.cross_entropy(logit_scale * image @ all_text.T, targets, reduction=reduction)
    all_image = gather_with_gradient(image, image_gather)
    text_to_image = F.cross_entropy(logit_scale * text @ all_image.T, targets, reduction=reduction)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float,
    image_gather: StartedGather | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """Returns this rank's part of SigLIP's loss over the global batch; samples of equal label are positives.

    The loss of the global batch is 1/N times the sum over all pairs of image i and text j of
    -log sigmoid(z_ij (logit_scale x_i y_j + logit_bias)), z_ij = 1 for positives, else -1. Each rank forms the pairs of
    its n texts with all N images, each pair of the batch so on one rank, and the mean over ranks is the loss.
    Arguments as of `contrastive_loss`; a sample's part is that of its text. Source: arXiv 2303.15343, algorithm 1.
    """
    signs = torch.where(labels[:, None] == gather(labels)[None], 1.0, -1.0)  # (n, N)
    all_image = gather_with_gradient(image, image_gather)
    logits = logit_scale * text @ all_image.T + logit_bias
    parts = -F.logsigmoid(signs * logits).sum(1)
    return parts if reduction == "none" else parts.mean()


def distillation_loss(
    image: torch.Tensor,
    teacher_image: torch.Tensor,
    teacher_text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    temperature: float,
) -> torch.Tensor:
    """Returns this rank's part of ZSCL's distillation over the global batch: T^2 times the cross entropy between the
    teacher's similarities, softened by T, and the model's, over all texts for each image and over all images for each
    text.

    image (n, d): unit-norm features with gradient; teacher_image, teacher_text (n, d): the teacher's, of this rank's
    samples. The mean over ranks is the loss of the global batch.
    Source: ZSCL's released code, where the model's images too are compared with the teacher's texts.
    """

    def soft_cross_entropy(taught: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        scale = logit_scale / temperature
        return temperature**2 * F.cross_entropy(scale * found, (scale * taught).softmax(1))

    all_text, all_teacher_image = gather(teacher_text), gather(teacher_image)
    of_images = soft_cross_entropy(teacher_image @ all_text.T, image @ all_text.T)
    all_image = gather_with_gradient(image)
    return of_images + soft_cross_entropy(teacher_text @ all_teacher_image.T, teacher_text @ all_image.T)


def ago_term(current: torch.Tensor, past: torch.Tensor) -> torch.Tensor:
    """Returns sum |current^T past| of one adapted linear: columns of B, current (out, m) and past (out, n).

    Source: DAC's released code (alora.py); the paper's L_orth divides by m n.
    """
    return (current.T @ past).abs().sum()


def ago_loss(current: Sequence[torch.Tensor], past: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the AGO loss, without lambda: the mean over adapted linears of `ago_term`.

    current: per adapted linear the columns (out, m) of its most counted experts; past: (out, n) of all past tasks, n
    may be 0.
    """
    return torch.stack([ago_term(now, before) for now, before in zip(current, past, strict=True)]).mean()
