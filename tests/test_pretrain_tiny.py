"""The pretraining of the small models: what captions become, how questions are packed, and the shipped small LLaVA."""

import importlib
import json
import random
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

ROOT = Path(__file__).resolve().parents[1]
CLIP, LLAVA = ROOT / "r1p_dist/assets/tiny", ROOT / "r1p_dist/assets/tiny_llava"


@pytest.fixture(scope="module")
def conversations() -> ModuleType:
    return _import("conversations")


@pytest.fixture(scope="module")
def llava() -> ModuleType:
    return _import("llava")


def _import(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "tools" / "dev"))
    try:
        return importlib.import_module(f"pretraining.{name}")
    finally:
        sys.path.remove(str(ROOT / "tools" / "dev"))


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return AutoProcessor.from_pretrained(LLAVA)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return LlavaForConditionalGeneration.from_pretrained(LLAVA, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize(
    ("key", "caption", "name", "kind", "colour"),
    [
        ("pairs_lucide_00001", "an orange outline icon of a blender", "blender", "icon", "orange"),
        ("extra_noto-v1_00047", "a tornado (whirlwind, weather)", "tornado", "emoji", None),
        ("extra_fluent-emoji_00667", "open book: novels, fantasy", "open book", "emoji", None),
        ("pairs_kgeography_00218", "the flag of innlandet, norway", "innlandet", "flag", None),
        ("pairs_gcompris_00112", "a photo of petra, a monument", "petra", "photo", None),
        ("pairs_devicon_00152", "newrelic logo", "newrelic", "logo", None),
        ("pairs_tuxpaint_01013", "Anthurium", "anthurium", None, None),
    ],
)
def test_what_a_caption_says(
    conversations: ModuleType, key: str, caption: str, name: str, kind: str | None, colour: str | None
) -> None:
    facts = conversations.read_facts(key, caption)
    assert (facts.name, facts.kind, facts.colour) == (name, kind, colour)


def test_questions_give_no_answer_away(conversations: ModuleType) -> None:
    read_facts = conversations.read_facts
    facts = [read_facts(f"pairs_mdi_{i}", f"a red icon of a thing{i} part{i}") for i in range(40)]
    others = [read_facts(f"pairs_{source}_0", "oak") for source in ("noto", "logos", "iso-flags", "ufoai")]
    questioner, rng = conversations.Questioner([*facts, *others]), random.Random(0)
    turns = [turn for _ in range(10) for fact in facts for turn in questioner.draw(fact, rng)]
    for skill in ("yes or no", "is it that kind", "is it that colour"):
        answers = [turn.answer for turn in turns if turn.skill == skill]
        assert 0.4 < answers.count("yes") / len(answers) < 0.6, skill
    for turn in turns:
        if turn.skill == "choose":
            named = len(re.findall(r"thing\d+ part\d+|oak", turn.question))
            assert turn.answer in turn.question and named == turn.options >= 2


def test_image_tower_is_the_shipped_clips(model: LlavaForConditionalGeneration) -> None:
    clip = open_clip.create_model(f"local-dir:{CLIP}").eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    hidden = []
    clip.visual.transformer.resblocks[-2].register_forward_hook(lambda _, inputs, output: hidden.append(output))
    with torch.no_grad():
        features = clip.encode_image(images)
        mine = model.model.vision_tower(images, output_hidden_states=True)
    torch.testing.assert_close(mine.hidden_states[-2], hidden[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(mine.pooler_output @ clip.visual.proj, features, rtol=0, atol=1e-4)


def tokens_of(processor: LlavaProcessor, messages: list[dict], **options: bool) -> dict[str, torch.Tensor]:
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


def test_packed_questions_equal_conversations_of_their_own(
    conversations: ModuleType,
    llava: ModuleType,
    processor: LlavaProcessor,
    model: LlavaForConditionalGeneration,
    picture: Image.Image,
) -> None:
    turns = [
        conversations.Turn("name", "What is this?", "a tent"),
        conversations.Turn("yes or no", "Is it 12 drums? Answer yes or no.", "no"),
        conversations.Turn("colour", "Which colour is it?", "red"),
    ]
    parts = [turns[:1], turns[1:]]  # one conversation of one turn and one of two
    packer = llava.Packer(processor.tokenizer)
    batch = packer.pack([[packer.branch(part) for part in parts]])
    expected = []
    for part in parts:
        messages = []
        for turn in part:
            image = [] if messages else [{"type": "image", "image": picture}]
            messages += [
                {"role": "user", "content": [*image, {"type": "text", "text": turn.question}]},
                {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]},
            ]
        inputs = tokens_of(processor, messages)
        is_answer = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
        for i in range(1, len(messages), 2):  # by lengths: transformers 5.17 marks no answers beside pictures
            start = tokens_of(processor, messages[:i], add_generation_prompt=True)["input_ids"].shape[1]
            is_answer[start : tokens_of(processor, messages[: i + 1])["input_ids"].shape[1]] = True
        with torch.no_grad():
            expected.append(model(**inputs).logits[0, :-1][is_answer[1:]])
    with torch.no_grad():
        hidden = model.model(
            input_ids=batch.tokens,
            pixel_values=inputs["pixel_values"],
            attention_mask=batch.attention_mask(),
            position_ids=batch.positions,
        ).last_hidden_state
    packed = model.lm_head(hidden[:, :-1][batch.labels[:, 1:] != llava.IGNORED])
    torch.testing.assert_close(packed, torch.cat(expected), rtol=0, atol=1e-4)


def test_shipped_llava_answers_in_batches_as_alone(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration, picture: Image.Image
) -> None:
    questions = ["Is it red?", "What is this? Answer with one word or phrase."]
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for question in questions
    ]

    def answer(messages: list, **padding: bool) -> list[str]:
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=padding,
        )
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)

    alone = [answer([conversation])[0] for conversation in conversations]
    assert answer(conversations, padding=True) == alone
    assert alone[0].strip() in ("yes", "no")


def test_tokenizer_keeps_every_text(processor: LlavaProcessor) -> None:
    text = "Ünïcode \u2603 12345\t \x00 <b> USER:"
    assert processor.tokenizer.decode(processor.tokenizer(text, add_special_tokens=False).input_ids) == text


def test_shipped_llava_is_small() -> None:
    assert (LLAVA / "model.safetensors").stat().st_size <= 20e6
    config = json.loads((LLAVA / "config.json").read_text())
    assert config["model_type"] == "llava" and config["image_seq_length"] == 65
