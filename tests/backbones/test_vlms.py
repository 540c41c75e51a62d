"""Families of vision-language models beside LLaVA: losses and answers of transformers, guides, kept features, files."""

from functools import cache

import pytest
import torch

from r1p_dist.backbones import LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.data.samples import Sample
from tests.backbones.test_llava import SAMPLES, encoder_of, picture, talk, training_batch
from tests.small_vlms import FAMILIES, make_backbone, make_model

LATER = talk(
    "one \n\n",
    "a cat",
    "<image>\n\nand this, a cat?",
    "a cat",
    "<image>no",
    "a dog",
    pictures=(picture(30, 14, 5), picture(8, 30, 6)),
    number=4,
)
ALL = (*SAMPLES, LATER)
TOWERS = ("language", "projector", "image")


@cache
def plain_model(family: str) -> torch.nn.Module:
    return make_model(family).eval()


def plain_inputs(backbone: LlavaBackbone, sample: Sample, is_training: bool) -> dict[str, torch.Tensor]:
    """Returns what the family's own processor makes of a conversation, by its own chat template."""
    encoder = encoder_of(backbone)
    turns = sample.turns if is_training else sample.turns[:-1]
    text = encoder._render(turns, not is_training)
    images = {"images": [list(sample.images)]} if sample.images else {}
    special = {"add_special_tokens": True}
    return dict(backbone.processor(text=[text], return_tensors="pt", **images, **special))


def mean_loss(family: str, backbone: LlavaBackbone, samples: tuple[Sample, ...]) -> torch.Tensor:
    """Returns the mean over all answer tokens by transformers' own model, one conversation at a time.

    Answers are found in the tokens by their text alone.
    """
    total, count = torch.zeros(()), 0
    for sample in samples:
        inputs = plain_inputs(backbone, sample, is_training=True)
        ids, labels = inputs["input_ids"][0], torch.full_like(inputs["input_ids"], IGNORED)
        answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
        place = 0
        for answer in answers:
            wanted = backbone.processor.tokenizer(f"ASSISTANT: {answer}</s>", add_special_tokens=False)["input_ids"]
            starts = [i for i in range(place, len(ids)) if ids[i : i + len(wanted)].tolist() == wanted]
            place = starts[0] + len(wanted)
            first = starts[0] + len("ASSISTANT:")
            labels[0, first:place] = ids[first:place]
        found = (labels != IGNORED).sum()
        loss = plain_model(family)(**inputs, labels=labels).loss
        total, count = total + loss * found, count + found
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_loss_is_that_of_transformers(family: str) -> None:
    backbone = make_backbone(family).eval()
    with torch.no_grad():
        losses, _ = backbone(training_batch(backbone, ALL))
        torch.testing.assert_close(losses.mean(), mean_loss(family, backbone, ALL))
        losses, _ = backbone(training_batch(backbone, ALL[2:3]))  # no picture at all
        torch.testing.assert_close(losses.mean(), mean_loss(family, backbone, ALL[2:3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_each_alone(family: str) -> None:
    backbone = make_backbone(family).eval()
    encoder = encoder_of(backbone)
    together = backbone(encoder.collate([encoder.evaluate(sample) for sample in ALL]), max_new_tokens=6)
    (text_alone,) = backbone(encoder.collate([encoder.evaluate(ALL[2])]), max_new_tokens=6)  # no picture at all
    assert torch.equal(text_alone, together[2][: len(text_alone)])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0}
    for sample, row in zip(ALL, together, strict=True):
        inputs = plain_inputs(backbone, sample, is_training=False)
        ids = plain_model(family).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(row[: len(ids)], ids) and not row[len(ids) :].any()
