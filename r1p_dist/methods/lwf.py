"""LwF (arXiv 1606.09282) on a CLIP: the model of the task before teaches, on the new task's own data."""

from r1p_dist.protocol import DistilledMethod, Stage, Trainer


class Lwf(DistilledMethod):
    """LwF: full fine-tuning held to what the model before the task finds alike (arXiv 1606.09282).

    The loss adds weight * T^2 times the cross entropy of softmax(S' / T) and softmax(S / T), over the prompts for each
    picture and over the pictures for each prompt, S the model's similarities and S' its teacher's, T the temperature.

    As the code released with ZSCL (arXiv 2303.06628) runs it on a CLIP: the model of the task before is the teacher,
    for the first task the pretrained one; the batch's pictures and prompts are what it is compared on, in both
    directions, and the model's own pictures are compared with the teacher's prompts. LwF's paper has a classifier of
    past classes instead, which a CLIP has not.
    """

    paper = "arXiv 1606.09282"
    stores = "in training, the weights that the task began with"

    def begin(self, stage: Stage, trainer: Trainer) -> None:
        super().begin(stage, trainer)
        trainer.edit_column("teacher", lambda teacher, value: value)
