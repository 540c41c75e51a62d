"""Families of vision-language models beside LLaVA: losses and answers of transformers, guides, kept features, files."""

from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessorPil, CLIPProcessor

from r1p_dist.adapters import AdaptedLinear
from r1p_dist.backbones import LlavaBackbone, load_llava
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.backbones.weights import Placement
from r1p_dist.data.samples import BadSampleError, Sample
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava import KIND, weights
from r1p_dist.kinds.llava.paligemma import OneText
from r1p_dist.recipes import load_config
from tests.backbones.test_llava import (
    SAMPLES,
    assert_is_as_read_by_transformers,
    encoder_of,
    picture,
    talk,
    training_batch,
)
from tests.small_vlms import FAMILIES, make_backbone, make_model, make_processor, make_tokenizer

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
OTHER = talk("<image>\nwhat?", "a dog", pictures=(picture(16, 16, 9),), number=9)
ALL = (*SAMPLES, LATER)
TWO = talk("<image>\n<image>\nwhich is it?", "the second one", pictures=SAMPLES[1].images, number=2)


def samples_of(family: str) -> tuple[Sample, ...]:
    """Returns conversations with pictures and, the third, without; PaliGemma takes one question and one answer."""
    return (SAMPLES[0], TWO, SAMPLES[2]) if family == "paligemma" else ALL


TOWERS = ("language", "projector", "image")


@cache
def plain_model(family: str) -> torch.nn.Module:
    return make_model(family).eval()


def plain_inputs(backbone: LlavaBackbone, sample: Sample, is_training: bool) -> dict[str, torch.Tensor]:
    """Returns what the family's own processor makes of a conversation, by its own chat template."""
    turns = sample.turns if is_training else sample.turns[:-1]
    images = {"images": [list(sample.images)]} if sample.images else {}
    if isinstance(backbone.processor, OneText):
        question, *answer = (turn.text.replace("<image>\n", "<image>").replace("<image>", "") for turn in turns)
        if not images:
            text = f"<s>{question}\n"
            ids = backbone.processor.tokenizer([text, *(f"{one}</s>" for one in answer)])["input_ids"]
            types = [number for number, part in enumerate(ids) for _ in part]
            return {"input_ids": torch.tensor([sum(ids, [])]), "token_type_ids": torch.tensor([types])}
        marks = "<image>" * len(sample.images)
        suffix = {"suffix": answer} if answer else {}
        made = make_processor("paligemma")(text=[marks + question], return_tensors="pt", **images, **suffix)
        made.pop("labels", None)
        return dict(made)
    text = encoder_of(backbone)._render(sample, turns, not is_training)
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
            before = "\n" if isinstance(backbone.processor, OneText) else "ASSISTANT: "
            wanted = backbone.processor.tokenizer(f"{before}{answer}</s>", add_special_tokens=False)["input_ids"]
            starts = [i for i in range(place, len(ids)) if ids[i : i + len(wanted)].tolist() == wanted]
            place = starts[0] + len(wanted)
            first = starts[0] + len(before.rstrip(" "))
            labels[0, first:place] = ids[first:place]
        found = (labels != IGNORED).sum()
        loss = plain_model(family)(**inputs, labels=labels).loss
        total, count = total + loss * found, count + found
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_loss_is_that_of_transformers(family: str) -> None:
    samples = samples_of(family)
    backbone = make_backbone(family).eval()
    with torch.no_grad():
        losses, _ = backbone(training_batch(backbone, samples))
        torch.testing.assert_close(losses.mean(), mean_loss(family, backbone, samples))
        losses, _ = backbone(training_batch(backbone, samples[2:3]))  # no picture at all
        torch.testing.assert_close(losses.mean(), mean_loss(family, backbone, samples[2:3]))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_each_alone(family: str) -> None:
    samples = samples_of(family)
    backbone = make_backbone(family).eval()
    encoder = encoder_of(backbone)
    together = backbone(encoder.collate([encoder.evaluate(sample) for sample in samples]), max_new_tokens=6)
    (text_alone,) = backbone(encoder.collate([encoder.evaluate(samples[2])]), max_new_tokens=6)  # no picture at all
    assert torch.equal(text_alone, together[2][: len(text_alone)])
    options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0}
    for sample, row in zip(samples, together, strict=True):
        inputs = plain_inputs(backbone, sample, is_training=False)
        ids = plain_model(family).generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(row[: len(ids)], ids) and not row[len(ids) :].any()


def attach(backbone: LlavaBackbone, guide: str, towers: tuple[str, ...]) -> list[AdaptedLinear]:
    def make(slot, routing) -> AdaptedLinear:
        adapter = AdaptedLinear(slot.linear, rank=4, active=2, merged=1, guide=guide, rows=slot.rows, routing=routing)
        torch.nn.init.normal_(adapter.B)
        return adapter

    return backbone.attach(make, towers, KIND.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_in_bf16_are_those_in_fp32_to_rounding(family: str) -> None:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone = make_backbone(family).train()
        torch.manual_seed(1)
        adapters = attach(backbone, "mean", TOWERS)
        for adapter in adapters:
            adapter.active = len(adapter.A)  # a vote can turn over with a rounding
        losses, _ = backbone.to(dtype)(training_batch(backbone, samples_of(family)))
        losses.mean().backward()
        found.append(torch.cat([value.grad.flatten().float() for a in adapters for value in (a.A, a.B)]))
    assert (found[1] - found[0]).norm() < 5 * torch.finfo(torch.bfloat16).eps * found[0].norm()


def picture_vector(family: str, backbone: LlavaBackbone, image: Image.Image) -> torch.Tensor:
    """Returns the mean of what the image tower of transformers says of one whole picture, or its [CLS]."""
    plain = plain_model(family)
    inputs = plain_inputs(backbone, talk("<image>q", "a", pictures=(image,)), is_training=True)
    pixels = inputs["pixel_values"]
    if "qwen" in family:
        seen = []
        hook = plain.model.visual.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2]))
        plain.model.visual(pixels, grid_thw=inputs["image_grid_thw"])
        hook.remove()
        return seen[0].mean(0)
    if family in ("idefics3", "smolvlm"):
        return plain.model.vision_model(pixels[0, -1:]).last_hidden_state[0].mean(0)
    states = plain.model.vision_tower(pixels[-1:]).last_hidden_state[0]
    return states[0] if family == "internvl" else states.mean(0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_guide_is_that_of_the_whole_pictures(family: str) -> None:
    samples = samples_of(family)
    backbone = make_backbone(family)
    adapters = attach(backbone, "cls_image", ("language", "projector"))
    batch = training_batch(backbone, samples)
    backbone(batch)
    vectors = [[picture_vector(family, backbone, image) for image in sample.images] for sample in samples]
    width = backbone.tower_width
    guide = backbone.routing["language"].guide
    for row, found in zip(guide, vectors, strict=True):
        expected = torch.stack(found).mean(0) if found else torch.zeros(width)
        torch.testing.assert_close(row[:width], expected, rtol=1e-4, atol=1e-5)
        assert bool(row[width:].any()) == (not found)
    for adapter in adapters:
        of_pictures = adapter.name.startswith("projector")
        votes = adapter.activation_counts.sum() / 2
        assert votes == (len(backbone.routing["projector"].guide) if of_pictures else len(samples)), adapter.name


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_every_tower_learn_and_a_blank_picture_teaches_nothing(family: str) -> None:
    samples = samples_of(family)
    backbone = make_backbone(family, cache_bytes=1 << 20)
    adapters = attach(backbone, "mean", TOWERS)
    layers = {tower: {a.name.split(".")[2] for a in adapters if a.name.startswith(tower)} for tower in TOWERS}
    assert layers["language"] == {"q", "k", "v", "o", "gate", "up", "down"} and {"q", "k", "v", "o"} < layers["image"]
    assert bool(layers["projector"]) == (family != "gemma3")  # its projector has no linear
    backbone(training_batch(backbone, samples))[0].sum().backward()
    assert all(adapter.B.grad.abs().sum() > 0 for adapter in adapters) and not backbone._cache._kept
    counts = [adapter.activation_counts.clone() for adapter in adapters]
    backbone.zero_grad()
    backbone(training_batch(backbone, samples[2:3]))[0].sum().backward()
    for adapter, before in zip(adapters, counts, strict=True):
        is_language = adapter.name.startswith("language")
        assert bool(adapter.B.grad.any()) == is_language
        assert bool((adapter.activation_counts > before).any()) == is_language


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_features_of_a_tower_without_adapters_are_computed_once(family: str) -> None:
    samples = samples_of(family)
    backbone, plain = make_backbone(family, cache_bytes=1 << 20).eval(), make_backbone(family).eval()
    looks = []
    backbone.family.tower_blocks[0].register_forward_hook(lambda *args: looks.append(args[1][0].numel()))
    for chosen, runs in ((samples, 1), (samples, 1), (samples[1:], 1), ((*samples, OTHER), 2)):
        found, anew = (model(training_batch(model, chosen))[0] for model in (backbone, plain))
        torch.testing.assert_close(found, anew)
        assert len(looks) == runs
    assert looks[1] < looks[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_all_shapes_give_a_finite_loss(family: str) -> None:
    backbone = make_backbone(family)
    encoder = encoder_of(backbone)
    for number, size in enumerate([(1, 1), (1, 40), (40, 3), (3000, 1), (20_000, 1), (97, 131)]):
        example = encoder.train(talk("<image>\nq", "ab", pictures=(picture(*size, number),)), torch.Generator())
        with torch.no_grad():
            losses, _ = backbone(encoder.collate([example]))
        assert losses.isfinite().all() and len(losses) >= 3, size


def published(family: str, name: str) -> str:
    """Returns how the first files of a family that were published call a weight."""
    if family in ("qwen2_vl", "qwen2_5_vl"):
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    if family in ("internvl", "gemma3"):
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        return name.removeprefix("model.")
    return name


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    make_processor(family).save_pretrained(tmp_path)
    if family in ("qwen2_vl", "internvl"):
        save_file({published(family, k): v for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    backbone = load_llava(str(tmp_path))
    assert_is_as_read_by_transformers(backbone, tmp_path)
    assert backbone.processor.chat_template and backbone.processor.tokenizer.get_vocab()["<s>"] == 1


def test_processors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_model("gemma3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its processor cannot be used"):
        load_llava(str(tmp_path))
    CLIPProcessor(CLIPImageProcessorPil(), make_tokenizer("gemma3")).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its processor, a CLIPProcessor, has no image_token"):
        load_llava(str(tmp_path))
    make_processor("internvl").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="its processor is a InternVLProcessor, a gemma3 takes a Gemma3Processor; its"):
        load_llava(str(tmp_path))
    processor = make_processor("gemma3")
    processor.image_processor.do_pan_and_scan = True
    processor.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"its processor cuts pictures \(do_pan_and_scan\), which is not served"):
        load_llava(str(tmp_path))
    backbone = make_backbone("gemma3")
    backbone.config.image_token_id = 9
    with pytest.raises(InputError, match="its processor writes no token 9, image_token_id of config.json"):
        encoder_of(backbone)
    backbone = make_backbone("paligemma")
    backbone.processor.image_processor.size = {"height": 8, "width": 8}
    with pytest.raises(InputError, match="its processor makes pictures of 8 x 8 pixels, its image tower takes 16 x 16"):
        encoder_of(backbone)
    backbone = make_backbone("qwen3_vl")
    backbone.processor.image_processor.patch_size = 5
    with pytest.raises(InputError, match="its processor makes patches of 150 numbers, its image tower takes 96; use"):
        encoder_of(backbone)


def test_a_processor_that_writes_too_few_tokens_is_named() -> None:
    backbone = make_backbone("internvl").eval()
    backbone.processor.image_seq_length = 3
    with pytest.raises(InputError, match="its processor does not fit its image tower: .*; use the processor that bel"):
        backbone(training_batch(backbone, SAMPLES[:1]))
    batch = encoder_of(backbone).collate([encoder_of(backbone).evaluate(SAMPLES[0])])
    with pytest.raises(InputError, match="its processor does not fit its image tower"):
        backbone(batch, max_new_tokens=1)


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl", "gemma3"])
def test_all_towers_attend_as_the_configuration_says(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    make_processor(family).save_pretrained(tmp_path)
    losses = []
    for implementation in (None, "eager"):
        backbone = load_llava(str(tmp_path), attn_implementation=implementation).eval()
        parts = (backbone.model, backbone.family.decoder_module, backbone.family.tower_module)
        assert {part.config._attn_implementation for part in parts} == {implementation or "sdpa"}
        with torch.no_grad():
            losses.append(backbone(training_batch(backbone, samples_of(family)))[0])
    torch.testing.assert_close(*losses)


def test_attention_that_cannot_be_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="attn_implementation=eager: not for backbone.kind=open_clip; its towers atte"):
        load_config("mini_mtil", ["backbone.attn_implementation=eager"])
    flash, half = "flash_attention_2", Placement(dtype=torch.bfloat16)
    with pytest.raises(InputError, match="=flash_attention_2: needs an accelerator with the package flash-attn; or l"):
        load_llava("tiny", attn_implementation=flash, placement=half)
    monkeypatch.setattr(weights, "is_flash_attn_2_available", lambda: True)
    with pytest.raises(InputError, match="=flash_attention_2: needs weights in bf16; set train.precision=bf16, or l"):
        load_llava("tiny", attn_implementation=flash)
    with pytest.raises(InputError, match="=flash_attention_2: FlashAttention2 has been toggled on, .*; leave it out"):
        load_llava("tiny", attn_implementation=flash, placement=half)  # transformers' own words
    for family in ("gemma3", "paligemma"):
        make_model(family).save_pretrained(tmp_path / family)
        make_processor(family).save_pretrained(tmp_path / family)
        with pytest.raises(
            InputError, match=f"=flash_attention_2: has no mask for the tokens of a {family}, which see"
        ):
            load_llava(str(tmp_path / family), attn_implementation=flash, placement=half)


def test_paligemma_takes_one_question_and_its_answer() -> None:
    encoder = encoder_of(make_backbone("paligemma"))
    with pytest.raises(BadSampleError, match="key key2: .* refuses the conversation: this model takes one question"):
        encoder.train(SAMPLES[1], torch.Generator())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_blocks_vote_once_and_give_the_same_gradients(family: str) -> None:
    found = []
    for is_checkpointed in (False, True):
        backbone = make_backbone(family)
        torch.manual_seed(0)
        adapters = attach(backbone, "first", TOWERS)
        if is_checkpointed:
            backbone.checkpoint_blocks()
        backbone.train()(training_batch(backbone, samples_of(family)))[0].sum().backward()
        found.append(adapters)
    for plain, checkpointed in zip(*found, strict=True):
        assert torch.equal(checkpointed.activation_counts, plain.activation_counts), plain.name
        torch.testing.assert_close(checkpointed.A.grad, plain.A.grad, msg=plain.name)
    assert any(adapter.activation_counts.any() for adapter in found[0])
