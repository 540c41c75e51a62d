"""From a sample of an instruction task to a model's input: chat template, image tokens, which tokens are answers.

Legend: t tokens of one conversation, n conversations of a batch, m pictures of a batch.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import BaseImageProcessor, ProcessorMixin

from r1p_dist.data.pictures import LONGEST, trim_ends
from r1p_dist.data.samples import IMAGE_MARK, BadSampleError, Sample, Turn
from r1p_dist.errors import InputError

IGNORED = -100  # the label of a token that carries no loss
_PADDED = 4096  # pixels, the side of the largest square that a picture is padded to


@dataclass(frozen=True)
class Pictures:
    """How a family's processor gives pictures.

    beside: names of what it gives with the pixels. is_joined: pixels of several pictures, their crops or patches, are
    rows of one tensor; else each picture has a row. is_nested: all in one more dimension, the conversation.
    count_crops: height and width of a picture -> its crops, where the batch must have them.
    """

    beside: tuple[str, ...] = ()
    is_joined: bool = False
    is_nested: bool = False
    count_crops: Callable[[int, int], int] | None = None


class ConversationEncoder:
    """Encodes samples with a model's own processor and chat template.

    An example holds input_ids (t,), labels (t,) or None, prompt_length, pictures (how many), and pixel_values (pictures
    or their crops or patches, …), what comes beside them, and crops (pictures,) where `form` says so. Training examples
    hold the whole conversation; those for evaluation end where the last answer begins. image_token: its id; max_length:
    most tokens of an example; is_blind: every picture is black, which shows what the questions alone give away;
    has_digests: the example says what its pictures show, by picture_digests (pictures, 4), int64, a SHA-256 each;
    packs: training batches say "is_packed", which who prepares them reads.

    InputError: a processor that writes no image_token for a picture, or cuts it otherwise than it says.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        image_token: int,
        max_length: int,
        is_blind: bool = False,
        form: Pictures | None = None,
        has_digests: bool = False,
        packs: bool = False,
    ):
        self.processor, self.image_token, self.max_length = processor, image_token, max_length
        self.is_blind, self._form, self._has_digests = is_blind, form or Pictures(), has_digests
        self._packs = packs
        tokenizer = processor.tokenizer
        self._mark = tokenizer.convert_tokens_to_ids(processor.image_token)
        self._blank = self._encode(
            Sample("blank", (Image.new("RGB", (32, 32)),), turns=(Turn("user", IMAGE_MARK),)), None
        )
        if not (self._blank["input_ids"] == image_token).any():
            raise InputError(
                f"backbone: its processor writes no token {image_token}, image_token_id of config.json, for a picture; "
                "use the processor that belongs to the model, with its chat template"
            )

    def train(self, sample: Sample, generator: torch.Generator) -> dict[str, Any]:
        """Returns the example of a whole conversation. BadSampleError: too long, or none that the model takes."""
        return self._encode(sample, self._answers(sample))

    def evaluate(self, sample: Sample) -> dict[str, Any]:
        """Returns the example of a conversation up to its last answer. BadSampleError: as `train`."""
        return self._encode(sample, None)

    def blank(self) -> dict[str, Any]:
        """Returns an example that asks about an empty picture."""
        return self._blank

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Returns a batch: input_ids, attention_mask, labels (n, t), prompt_length and image_counts (n,), pixel_values
        (m pictures, or their crops or patches, …), what comes beside them, crops (m,) and picture_digests (m, 4), as
        examples have it.

        Training examples are padded on the right, those for evaluation (no labels) on the left. A batch without any
        picture has a blank one, which belongs to no conversation: the image tower runs on every rank or on none.
        """
        is_training = examples[0]["labels"] is not None
        length = max(len(example["input_ids"]) for example in examples)
        padding = self.processor.tokenizer.pad_token_id

        def pad(values: torch.Tensor, value: int) -> torch.Tensor:
            rest = length - len(values)
            return torch.nn.functional.pad(values, (0, rest) if is_training else (rest, 0), value=value)

        batch = {
            "input_ids": torch.stack([pad(example["input_ids"], padding) for example in examples]),
            "attention_mask": torch.stack([pad(torch.ones_like(example["input_ids"]), 0) for example in examples]),
            "prompt_length": torch.tensor([example["prompt_length"] for example in examples]),
            "image_counts": torch.tensor([example["pictures"] for example in examples]),
        }
        if is_training:
            batch["labels"] = torch.stack([pad(example["labels"], IGNORED) for example in examples])
            if self._packs:
                batch["is_packed"] = True
        seen = [example for example in examples if example["pictures"]] or [self._blank]
        pixels = [example["pixel_values"] for example in seen]
        batch["pixel_values"] = torch.cat(pixels) if self._form.is_joined else _stack_pictures(pixels)
        for name in (*self._form.beside, "crops", "picture_digests"):
            if name in self._blank:
                batch[name] = torch.cat([example[name] for example in seen])
        return batch

    def _encode(self, sample: Sample, answers: tuple[str, list[tuple[int, int]]] | None) -> dict[str, Any]:
        """answers: the conversation's text and where its answers stand; None: the text ends before the last one."""
        text, spans = answers or (self._render(sample, _without_last_answer(sample.turns), True), [])
        tokenizer = self.processor.tokenizer
        # a template may write the first token itself; of too many tokens the line below tells, and no warning besides
        is_begun = tokenizer.bos_token and text.startswith(tokenizer.bos_token)
        options = {"add_special_tokens": not is_begun, "verbose": False}
        pictures = [Image.new("RGB", picture.size) for picture in sample.images] if self.is_blind else sample.images
        pictures = [_bounded(picture, self.processor.image_processor) for picture in pictures]
        images = {"images": [pictures]} if pictures else {}
        encoded = self.processor(text=[text], **images, return_tensors="pt", **options)
        ids = encoded["input_ids"][0]
        if len(ids) > self.max_length:
            raise BadSampleError(
                f"key {sample.key}: its conversation has {len(ids)} tokens, more than the model takes "
                f"({self.max_length}); shorten it"
            )
        example = {"input_ids": ids, "labels": None, "prompt_length": len(ids), "pictures": len(pictures)}
        if pictures:
            for name in ("pixel_values", *self._form.beside):
                if name in encoded:
                    example[name] = encoded[name][0] if self._form.is_nested else encoded[name]
        if pictures and self._has_digests:
            example["picture_digests"] = torch.stack([_digest(picture) for picture in pictures])
        if pictures and self._form.count_crops is not None:
            example["crops"] = torch.tensor([self._form.count_crops(p.height, p.width) for p in pictures])
            if example["crops"].sum() != len(example["pixel_values"]):
                found, said = len(example["pixel_values"]), int(example["crops"].sum())
                raise InputError(
                    f"backbone: key {sample.key}: its processor cuts pictures into {found} crops and says {said}; use "
                    "the image processor that belongs to the model"
                )
        if answers is not None:
            is_answer = self._spread(ids, text, spans, options)
            example["labels"] = torch.where(is_answer, ids, IGNORED)
            example["prompt_length"] = int(is_answer.int().argmax())
        return example

    def _answers(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """Returns a conversation's text, and where each answer begins and ends in it, its end token included."""
        spans = []
        for number, turn in enumerate(sample.turns):
            if turn.role == "assistant":
                before = self._render(sample, sample.turns[:number], True)
                after = self._render(sample, sample.turns[: number + 1], False)
                if not after.startswith(before):
                    raise InputError(
                        "backbone: its chat template writes an answer elsewhere than behind the prompt for it; use "
                        "another chat_template.jinja"
                    )
                spans.append((len(before), len(after)))
        return after, spans

    def _render(self, sample: Sample, turns: Sequence[Turn], asks_for_answer: bool) -> str:
        messages = [{"role": turn.role, "content": _content(turn.text)} for turn in turns]
        try:
            return self.processor.apply_chat_template(messages, add_generation_prompt=asks_for_answer)
        except TemplateError as error:
            raise BadSampleError(
                f"key {sample.key}: the model's chat template refuses the conversation: {error}"
            ) from error

    def _spread(
        self, ids: torch.Tensor, text: str, spans: Sequence[tuple[int, int]], options: dict[str, bool]
    ) -> torch.Tensor:
        """Returns which of the tokens (t,) belong to answers.

        The processor writes each picture's mark as many tokens, and what stands beside it can become one token with
        them. So the text between marks is looked for from its first answer to its last, from the end backwards.
        """
        tokens = self.processor.tokenizer(text, return_offsets_mapping=True, **options)
        plain, written = tokens["input_ids"], ids.tolist()
        is_answer = [
            any(first <= start and stop <= last and start < stop for first, last in spans)
            for start, stop in tokens["offset_mapping"]
        ]
        found = torch.zeros(len(ids), dtype=torch.bool)
        end, stop = len(written), len(plain)
        while stop > 0:
            start = max((place + 1 for place in range(stop) if plain[place] == self._mark), default=0)
            places = [place for place in range(start, stop) if is_answer[place]]
            if places:
                # with the token before it, so that an answer is not found in a question
                first, last = max(start, places[0] - 1), places[-1] + 1
                end = _find_last(written[:end], plain[first:last])
                if end < 0:
                    raise InputError(
                        "backbone: its tokenizer writes an answer otherwise where there are pictures; use the "
                        "processor that belongs to the model"
                    )
                found[end : end + last - first] = torch.tensor(is_answer[first:last])
            stop = start - 1
        return found


def _find_last(tokens: list[int], wanted: list[int]) -> int:
    """Returns where the last occurrence of some tokens begins, -1 if there is none."""
    starts = range(len(tokens) - len(wanted), -1, -1)
    return next((start for start in starts if tokens[start : start + len(wanted)] == wanted), -1)


def _bounded(picture: Image.Image, processor: BaseImageProcessor) -> Image.Image:
    """Returns a picture that the processor makes nothing huge of, itself unless it is very long or thin."""
    if hasattr(processor, "image_grid_pinpoints"):
        return picture  # becomes crops of the grid
    if getattr(processor, "do_pad", False) and max(picture.size) > _PADDED:
        smaller = picture.copy()
        smaller.thumbnail((_PADDED, _PADDED), Image.Resampling.BICUBIC)
        return smaller
    return trim_ends(picture, LONGEST)  # its shorter side is resized, and the centre kept


def _digest(picture: Image.Image) -> torch.Tensor:
    """Returns the SHA-256 of a picture's pixels and size as four numbers."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return torch.from_numpy(np.frombuffer(digest.digest(), dtype=np.int64).copy())


def _without_last_answer(turns: Sequence[Turn]) -> Sequence[Turn]:
    return turns[:-1] if turns[-1].role == "assistant" else turns


def _content(text: str) -> list[dict[str, str]]:
    """Returns a turn as the chat templates take it: its pictures and texts, in their order."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return parts


def _stack_pictures(examples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stacks the pictures (3, H, W) or (crops, 3, H, W) of examples; fewer crops than others are filled with zeros."""
    pictures = [picture for example in examples for picture in example]
    if pictures[0].ndim == 3:
        return torch.stack(pictures)
    return torch.nn.utils.rnn.pad_sequence(pictures, batch_first=True)
