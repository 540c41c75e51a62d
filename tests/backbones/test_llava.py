"""LLaVA-style models: loss and answers of transformers, the guide of each conversation, kept features, files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaImageProcessorPil

from r1p_dist.adapters import AdaptedLinear, Factors
from r1p_dist.backbones import LlavaBackbone, load_backbone, load_llava
from r1p_dist.backbones.conversations import IGNORED, ConversationEncoder
from r1p_dist.config import BackboneConfig, DataConfig, TrainConfig
from r1p_dist.data import Stream
from r1p_dist.data.samples import BadSampleError, Sample, Turn
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava import weights as llava_weights
from r1p_dist.kinds.llava.weights import read_config
from r1p_dist.methods import make_method
from r1p_dist.protocol import Drift, InputMoments
from r1p_dist.recipes import load_config
from tests.small_llava import TEXT, make_backbone, make_model, make_processor

FAMILIES = ("llava", "llava_next", "llava_onevision")


def picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    return tmp_path


def talk(*texts: str, pictures: tuple = (), number: int = 0) -> Sample:
    roles = ("user", "assistant") * len(texts)
    turns = tuple(Turn(role, text) for role, text in zip(roles, texts, strict=False))
    return Sample(f"key{number}", pictures, turns=turns, answers=(texts[-1],), number=number)


SAMPLES = (
    talk("<image>\nwhat is this?", "a cat", pictures=(picture(20, 20, 0),), number=1),
    talk(
        "<image>\n<image>\nwhich is it?",
        "the second one",
        "are you sure?",
        "yes",
        pictures=(picture(20, 40, 1), picture(40, 20, 2)),
        number=2,
    ),
    talk("two plus two", "four", number=3),
)


def encoder_of(backbone: LlavaBackbone, **options) -> ConversationEncoder:
    return backbone.encoder(DataConfig(**options))


def training_batch(backbone: LlavaBackbone, samples: tuple[Sample, ...] = SAMPLES) -> dict[str, torch.Tensor]:
    encoder = encoder_of(backbone)
    batch = encoder.collate([encoder.train(sample, torch.Generator()) for sample in samples])
    return backbone.prepare(batch | {"sample": torch.tensor([sample.number for sample in samples])})


def plain_inputs(family: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes", "labels")
              if name in batch}  # fmt: skip
    return inputs | ({"batch_num_images": torch.tensor([1, 2])} if family == "llava_onevision" else {})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mean_loss_is_that_of_transformers(family: str) -> None:
    backbone, plain = make_backbone(family).eval(), make_model(family).eval()
    batch = training_batch(backbone)
    losses, conversations = backbone(batch)
    torch.testing.assert_close(losses.mean(), plain(**plain_inputs(family, batch)).loss)
    answers = [" a cat</s>", " the second one</s> yes</s>", " four</s>"]
    # one token per letter, one for the end
    assert conversations.bincount().tolist() == [len(answer.replace("</s>", "E")) for answer in answers]
    decode = backbone.processor.tokenizer.decode
    assert [decode(row[row != IGNORED]) for row in batch["labels"]] == answers


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_a_batch_are_those_of_each_alone(family: str) -> None:
    backbone, plain = make_backbone(family).eval(), make_model(family).eval()
    encoder = encoder_of(backbone)
    together = backbone.answer(backbone, encoder.collate([encoder.evaluate(sample) for sample in SAMPLES]), 6)
    for sample, (text, is_finished) in zip(SAMPLES, together, strict=True):
        alone = encoder.collate([encoder.evaluate(sample)])
        inputs = {name: alone[name] for name in ("input_ids", "attention_mask")}
        if sample.images:
            inputs |= {name: alone[name] for name in ("pixel_values", "image_sizes") if name in alone}
            if family == "llava_onevision":
                inputs["batch_num_images"] = torch.tensor([len(sample.images)])
        ids = plain.generate(**inputs, do_sample=False, max_new_tokens=6)[0, alone["input_ids"].shape[1] :]
        assert text and text == backbone.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert is_finished == (2 in ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_drift_of_what_answers_read_leaves_padding_and_their_own_tokens_out(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1p_dist.protocol.drift.TOKENS", 10_000)
    backbone = make_backbone(family).eval()
    (adapter,) = [adapter for adapter in attach(backbone, "cls_image") if adapter.name == "language.0.q"]
    torch.manual_seed(0)
    change = Factors(torch.randn(2, adapter.in_features), torch.randn(adapter.out_features, 2), 0.1)
    adapter.set_merged([change])
    encoder, seen = encoder_of(backbone), []
    batch = encoder.collate([encoder.evaluate(sample) for sample in SAMPLES])
    assert not batch["attention_mask"].all()
    backbone(training_batch(backbone))  # which leaves a mask of its own
    drift = Drift(backbone, [adapter], {adapter.name: change})
    with drift.watch(), torch.no_grad():
        handle = adapter.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
        backbone.answer(backbone, batch, 4)
        handle.remove()
    (x, y), *later = seen
    assert x.shape[:2] == batch["attention_mask"].shape and len(later) == 3
    moved = 0.1 * x @ change.A.T @ change.B.T
    is_real = batch["attention_mask"].bool()
    expected = (moved[is_real].norm() / (y - moved)[is_real].norm()).item()
    assert drift.by_layer() == {"language.0.q": pytest.approx(expected, rel=1e-4)}


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_all_shapes_give_a_finite_loss(family: str) -> None:
    """The batch is as `collate` makes it, not prepared."""
    backbone = make_backbone(family)
    encoder = encoder_of(backbone)
    sizes = [(1, 1), (1, 40), (40, 1), (3, 3), (40, 3), (2, 500), (1, 3000), (3000, 1), (20_000, 1), (97, 131)]
    for number, size in enumerate(sizes):
        sample = talk("<image>\nq", "ab", pictures=(picture(*size, number),), number=number)
        batch = encoder.collate([encoder.train(sample, torch.Generator())]) | {"sample": torch.tensor([number])}
        with torch.no_grad():
            losses, _ = backbone(batch)
        assert losses.isfinite().all() and len(losses) == 4, size


@pytest.mark.parametrize("options", [{}, {"do_pad": True}])
def test_a_thin_picture_stays_small_before_a_centre_crop(options: dict[str, bool], monkeypatch) -> None:
    """A side of 336 would be resized to 336 x 6,720,000, or padded to 20,000 x 20,000."""
    processor = make_processor()
    processor.image_processor = LlavaImageProcessorPil(
        size={"shortest_edge": 336}, crop_size=dict.fromkeys(("height", "width"), 336), **options
    )
    made: list[tuple[int, ...]] = []
    call = LlavaImageProcessorPil.preprocess
    monkeypatch.setattr(
        LlavaImageProcessorPil,
        "preprocess",
        lambda self, images, **more: made.append(images[0][0].size) or call(self, images, **more),
    )
    encoder = ConversationEncoder(processor, processor.image_token_id, 10_000)
    for size in ((1, 20_000), (20_000, 300), (100, 90)):
        sample = talk("<image>\nq", "ab", pictures=(Image.new("RGB", size),))
        assert encoder.evaluate(sample)["pixel_values"].shape == (1, 3, 336, 336)
    widest = max(max(size) ** 2 if options.get("do_pad") else max(size) / min(size) * 336**2 for size in made)
    assert widest <= 4096**2 and made[-1] == (100, 90)


def attach(backbone: LlavaBackbone, guide: str, towers: tuple[str, ...] = ("language",)) -> list[AdaptedLinear]:
    def make(slot, routing) -> AdaptedLinear:
        return AdaptedLinear(slot.linear, rank=4, active=2, merged=1, guide=guide, routing=routing)

    return backbone.attach(make, towers, ("q", "v", "o", "gate", "up", "down", "fc1"))


def test_the_guide_is_the_pictures_cls_and_for_texts_the_mean_of_the_prompt() -> None:
    backbone = make_backbone()
    adapters = attach(backbone, "cls_image")
    batch = training_batch(backbone)
    backbone(batch)
    tower = make_model().model.vision_tower
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 0]
    expected = torch.zeros(3, 24 + 32)
    expected[0, :24], expected[1, :24] = states[0], (states[1] + states[2]) / 2
    prompt = backbone.model.get_input_embeddings()(batch["input_ids"][2, : batch["prompt_length"][2]])
    expected[2, 24:] = prompt.mean(0)
    torch.testing.assert_close(backbone.routing["language"].guide, expected)
    for adapter in adapters:
        ballots = (expected @ adapter.router.weight.T + adapter.router.bias).topk(2).indices
        assert torch.equal(adapter.activation_counts, ballots.flatten().bincount(minlength=4))


def test_each_guide_reads_its_token() -> None:
    for guide in ("first", "last_prompt", "mean"):
        backbone = make_backbone()
        adapter = attach(backbone, guide)[0]
        seen = []
        adapter.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        batch = training_batch(backbone)
        backbone(batch)
        lengths = batch["prompt_length"].tolist()
        expected = {
            "first": seen[0][:, 0],
            "last_prompt": torch.stack([row[length - 1] for row, length in zip(seen[0], lengths, strict=True)]),
            "mean": torch.stack([row[:length].mean(0) for row, length in zip(seen[0], lengths, strict=True)]),
        }[guide]
        torch.testing.assert_close(adapter.guide_vector(seen[0]), expected)
        # the answer begins behind the prompt
        assert all((batch["labels"][row, :length] == IGNORED).all() for row, length in enumerate(lengths))


def test_a_batch_without_pictures_has_gradients_everywhere_and_no_vote_of_the_blank_one() -> None:
    backbone = make_backbone()
    adapters = attach(backbone, "cls_image", ("language", "projector"))
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B)
    losses, _ = backbone(training_batch(backbone, SAMPLES[2:]))
    losses.sum().backward()
    by_tower = {tower: [a for a in adapters if a.name.startswith(tower)] for tower in ("language", "projector")}
    assert all(adapter.B.grad.abs().sum() > 0 for adapter in by_tower["language"])
    assert all(not adapter.B.grad.any() and not adapter.activation_counts.any() for adapter in by_tower["projector"])


def test_features_of_a_tower_without_adapters_are_computed_once() -> None:
    backbone, plain = make_backbone(cache_bytes=1 << 20).eval(), make_backbone().eval()
    looks = []
    backbone.model.model.vision_tower.pre_layrnorm.register_forward_hook(lambda *args: looks.append(len(args[1][0])))
    batch = training_batch(backbone)
    for _ in range(2):
        assert torch.equal(backbone(batch)[0], plain(batch)[0])
    assert looks == [3]
    # kept from a batch of another size, which some processors' kernels round in another order
    kept, anew = (model(training_batch(model, SAMPLES[1:]))[0] for model in (backbone, plain))
    torch.testing.assert_close(kept, anew)
    assert looks == [3]
    other = talk("<image>\nwhat?", "a dog", pictures=(picture(16, 16, 9),), number=9)
    backbone(training_batch(backbone, (*SAMPLES, other)))
    assert looks == [3, 1]


def test_the_cache_keeps_to_its_limit() -> None:
    one_picture = 5 * 24 * 4  # tokens, width, fp32
    backbone = make_backbone(cache_bytes=2 * one_picture).eval()
    backbone(training_batch(backbone))
    assert len(backbone._cache._kept) == 2 and backbone._cache._bytes == 2 * one_picture
    assert torch.equal(backbone(training_batch(backbone))[0], make_backbone().eval()(training_batch(backbone))[0])


def test_a_tower_with_adapters_is_looked_at_each_time_and_learns() -> None:
    backbone = make_backbone(cache_bytes=1 << 20)
    adapters = attach(backbone, "first", ("image",))
    assert {adapter.name.split(".")[1] for adapter in adapters} == {"0", "1"}, "the projector never sees the last block"
    for adapter in adapters:
        torch.nn.init.normal_(adapter.B)
    losses, _ = backbone(training_batch(backbone))
    losses.sum().backward()
    assert all(adapter.B.grad.abs().sum() > 0 for adapter in adapters) and not backbone._cache._kept


@pytest.mark.parametrize("is_on", [False, True])
def test_checkpointed_blocks_run_again_in_the_backward(is_on: bool, folder: Path) -> None:
    backbone = load_backbone(BackboneConfig(kind="llava", name=str(folder), gradient_checkpointing=is_on))
    attach(backbone, "first", ("language", "image"))
    runs = Counter()
    towers = {"language": backbone.model.model.language_model.layers, "image": backbone.family.seen_blocks}
    for tower, blocks in towers.items():
        for number, block in enumerate(blocks):
            block.mlp.register_forward_pre_hook(lambda *_, name=f"{tower}.{number}": runs.update([name]))
    losses, _ = backbone(training_batch(backbone))
    losses.sum().backward()
    assert set(runs.values()) == {2 if is_on else 1} and len(runs) == 4


@pytest.mark.parametrize("average_over", ["tokens", "samples"])
def test_the_loss_of_several_micro_batches_is_one_mean(average_over: str) -> None:
    backbone = make_backbone().eval()
    batches = [training_batch(backbone, SAMPLES[:1]), training_batch(backbone, SAMPLES[1:2])]
    backbone.begin_step(batches, TrainConfig(average_over=average_over))
    loss = sum(backbone.loss(backbone, batch) for batch in batches) / 2
    parts = [backbone(batch)[0] for batch in batches]
    expected = torch.cat(parts).mean() if average_over == "tokens" else sum(part.mean() for part in parts) / 2
    torch.testing.assert_close(loss, expected)


def test_the_loss_is_the_mean_of_the_conversations_parts() -> None:
    backbone = make_backbone().eval()
    batch = training_batch(backbone, SAMPLES)
    backbone.begin_step([batch], TrainConfig(average_over="samples"))
    losses, conversations = backbone(batch)
    expected = [losses[conversations == number].mean() for number in range(len(SAMPLES))]
    torch.testing.assert_close(backbone.sample_losses(backbone, batch), torch.stack(expected))
    backbone.begin_step([batch], TrainConfig())
    parts = backbone.sample_losses(backbone, batch)
    torch.testing.assert_close(parts.mean(), backbone.loss(backbone, batch))
    torch.testing.assert_close(parts.mean(), losses.mean())


def test_blind_runs_see_black_pictures() -> None:
    backbone = make_backbone()
    seen, blind = (encoder_of(backbone, blind=is_blind).evaluate(SAMPLES[0]) for is_blind in (False, True))
    assert torch.equal(seen["input_ids"], blind["input_ids"])
    assert blind["pixel_values"].flatten(2).std(-1).max() == 0 and seen["pixel_values"].flatten(2).std(-1).min() > 0
    with pytest.raises(InputError, match="data.blind=true needs backbone.kind=llava, got open_clip"):
        load_config("mini_mtil_dac", ["data.blind=true"])


@pytest.mark.parametrize("by_sensitivity", [False, True])
def test_a_decoders_moments_count_its_answers_and_no_padding(by_sensitivity: bool) -> None:
    """The last word of an answer says that it ends: what is to be kept must know it."""
    backbone = make_backbone()
    own = ["method=steady", "targets.towers=[language]", "targets.layers=[down]"]
    method = make_method(load_config("mini_instruct", own), backbone)
    batch, adapter = training_batch(backbone), method.adapters[0]
    inputs, seen = InputMoments(backbone, method.adapters, by_sensitivity), []

    def note(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append((args[0].detach(), output))

    adapter.register_forward_hook(note)
    backbone.train()
    with inputs.watch():
        (logits,) = backbone.outputs(backbone, batch)
        logits.sum().backward()
    ((x, output),) = seen
    real = batch["attention_mask"].bool()
    weights = output.grad.square().sum(-1) if by_sensitivity else real.float()
    assert not real.all() and (weights[~real] == 0).all()
    assert logits.shape == (len(batch["answers"]), TEXT["vocab_size"])
    assert (weights.flatten()[batch["answers"]] > 0).all(), "an answer's token does not count"
    expected = torch.einsum("nt,nti,ntj->ij", weights, x, x) / weights.sum()
    torch.testing.assert_close(inputs.moments[adapter.name], expected, rtol=1e-4, atol=1e-6)


def test_a_conversation_that_is_too_long_is_a_bad_sample() -> None:
    encoder = encoder_of(make_backbone())
    with pytest.raises(BadSampleError, match=r"key key5: its conversation has 3\d\d tokens, more than .* \(256\)"):
        encoder.train(talk("why? " * 60, "so", number=5), torch.Generator())


def test_routers_learn_in_the_language_model_alone() -> None:
    overrides = ["backbone.kind=llava", "options.router_grad=gated"]
    for towers in ("null", "[language, image]"):
        with pytest.raises(
            InputError, match=r"only for towers of a llava backbone .*; set targets.towers=\[language\]"
        ):
            load_config("mini_instruct", [*overrides, f"targets.towers={towers}"])
    assert load_config("mini_instruct", [*overrides, "targets.towers=[language]"]).targets.towers == ["language"]


def test_streams_of_classes_are_refused() -> None:
    with pytest.raises(InputError, match="has classes, backbone.kind=llava learns conversations"):
        make_backbone().check(Stream.load("mini_mtil"))


@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_read_as_transformers_reads_them(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB")  # by the names that were first published
    make_processor(family).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_is_as_read_by_transformers(load_llava(str(tmp_path)), tmp_path)


def assert_is_as_read_by_transformers(backbone: LlavaBackbone, folder: Path) -> None:
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    for (name, value), (_, expected) in zip(
        backbone.model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(value, expected), name
    for (name, value), (_, expected) in zip(backbone.model.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(value, expected), name


def set_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_wrong_folders_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(InputError, match="model.safetensors: not a safetensors file"):
        load_llava(str(folder))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"has pytorch_model.bin and no \*\.safetensors; pickles are never read"):
        load_llava(str(folder))
    weights.write_bytes(content)
    set_config(
        folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"vocab_size": 280}
    )
    with pytest.raises(InputError, match=r"has the shape \(272, 32\) in its file, \(280, 32\) by its config.json"):
        load_llava(str(folder))
    set_config(folder, model_type="mllama")
    with pytest.raises(InputError, match="is of type mllama; backbone.kind=llava takes llava, llava_next, llava_onev"):
        load_llava(str(folder))
    for family, key in (("llama4", "num_local_experts"), ("internvl", "num_experts")):
        set_config(folder, model_type=family, text_config={key: 4})
        with pytest.raises(InputError, match="its decoder is a mixture of experts, .* use a dense model"):
            load_llava(str(folder))
    with pytest.raises(InputError, match="nothing-there: neither a folder nor a model of the hub"):
        load_llava("nothing-there")


def test_a_gated_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__) -> None:
        error = GatedRepoError.__new__(GatedRepoError)
        error.args = ("403 Client Error.\n\nCannot access gated repo.\nVisit https://hub/a/gated to ask for access.",)
        raise error

    monkeypatch.setattr(llava_weights, "snapshot_download", refuse)
    with pytest.raises(
        InputError, match="backbone.name=a/gated: .* Visit https://hub/a/gated to ask for access"
    ) as told:
        load_llava("a/gated")
    assert "\n" not in str(told.value)


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    marker = folder / "was-run"
    for name in ("configuration_evil", "processing_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    set_config(folder, auto_map={"AutoConfig": "configuration_evil.Evil", "AutoModel": "configuration_evil.Evil"})
    for file in ("processor_config.json", "tokenizer_config.json"):
        path = folder / file
        maps = {"AutoProcessor": "processing_evil.Evil", "AutoTokenizer": ["tokenization_evil.Evil", None]}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": maps}))
    load_llava(str(folder))
    assert not marker.exists()


def test_shapes_have_the_size_of_the_published_models() -> None:
    from r1p_dist.kinds.llava.weights import build_on_meta

    for name, billions in (("llava-1.5-7b", 7.06), ("llava-1.5-13b", 13.35)):
        model = build_on_meta(read_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
