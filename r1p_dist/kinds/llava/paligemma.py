"""PaliGemma: pictures, a question and one answer; what stands before the answer sees all of itself."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, PaliGemmaForConditionalGeneration, ProcessorMixin

from r1p_dist.backbones.conversations import Pictures
from r1p_dist.kinds.llava.family import Batch, Family

_TEMPLATE = (
    "{% if messages | selectattr('role', 'equalto', 'assistant') | list | length > 1 %}"
    "{{ raise_exception('this model takes one question and its answer') }}{% endif %}"
    "{% for message in messages %}{% for part in message.content %}"
    "{{ image_token if part.type == 'image' else '' }}{% endfor %}{% endfor %}{{ bos_token }}"
    "{% for message in messages %}{% for part in message.content %}"
    "{{ part.text if part.type == 'text' else '' }}{% endfor %}"
    "{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}"
)


class PaliGemma(Family):
    model_class = PaliGemmaForConditionalGeneration
    processors = ("PaliGemmaProcessor",)
    layers = {**Family.layers, "projector": {"fc1": "linear"}}
    is_causal = False

    @classmethod
    def processor(cls, processor: ProcessorMixin) -> "OneText":
        return OneText(processor)

    def pictures(self, processor: ProcessorMixin) -> Pictures:
        return Pictures(is_joined=True)

    def arguments(self, batch: Batch, counts: Sequence[int]) -> dict[str, Any]:
        ids = batch["input_ids"]
        types = torch.zeros_like(ids)
        if "labels" in batch:  # 1 from the answer on
            types = (torch.arange(ids.shape[1], device=ids.device) >= batch["prompt_length"][:, None]).long()
        return {"pixel_values": batch["pixel_values"], "token_type_ids": types}

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        # the second PaliGemma was trained so; transformers' own loss has it in newer versions alone
        cap = getattr(self.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * (logits / cap).tanh()


class OneText:
    """A PaliGemma's processor that takes question and answer as one text.

    transformers' own takes them apart, and puts the ends of both there by itself; it has no chat template.
    """

    def __init__(self, processor: ProcessorMixin):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        self.image_token: str = processor.image_token
        self.chat_template: str = processor.chat_template or _TEMPLATE
        self._processor, self._length = processor, processor.image_seq_length

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self._processor.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            image_token=self.image_token,
        )

    def __call__(self, text: list[str], images: list | None = None, **options: Any) -> BatchFeature:
        expanded = [one.replace(self.image_token, self.image_token * self._length) for one in text]
        pixels = self.image_processor(images[0], return_tensors="pt") if images else {}
        return BatchFeature({**self.tokenizer(expanded, **options), **pixels})
