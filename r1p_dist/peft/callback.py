"""What a Trainer of transformers does not know of a stream."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from r1p_dist.peft.model import R1PModel


class R1PCallback(TrainerCallback):
    """Makes every `Trainer.train()` a task of a stream: at its end the most counted experts stay, fresh ones begin.

    It also weights the AGO term right where the Trainer divides the loss by the tokens of all micro steps and ranks.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # such a loss is neither divided by the micro steps nor, with that option, by the ranks
        ranks = args.world_size if args.average_tokens_across_devices else 1
        tuner = _tuner(model)
        tuner.penalty_share = 1 / (args.gradient_accumulation_steps * ranks)
        tuner.gradient_share = 1 / args.gradient_accumulation_steps
        tuner.has_scaled_loss = args.fp16

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        _tuner(model).next_task()


def _tuner(model: Any) -> R1PModel:
    return getattr(model, "module", model).base_model
