"""CLIP backbones against plain open_clip: untouched, with adapters, and merged."""

import copy
from collections import Counter

import open_clip
import pytest
import torch
import torch._inductor.config
from PIL import Image
from torch import nn

from r1p_dist import attach_pool, load_clip
from r1p_dist.adapters import AdaptedLinear
from r1p_dist.adapters.pool import share_votes
from r1p_dist.backbones import load_backbone
from r1p_dist.config import BackboneConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.open_clip import LAYERS, TOWERS
from r1p_dist.kinds.open_clip.backbone import ClipBackbone
from tests.small_clip import CONFIG, make_backbone, make_clip, tokenize

PROMPTS = ["cat", "a very long prompt", "tree"]


def images(n: int = 4, size: int = 16) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_features_equal_open_clips_before_and_after_attaching() -> None:
    plain, backbone = make_clip().eval(), make_backbone()
    expected = plain.encode_image(images(), normalize=True), plain.encode_text(tokenize(PROMPTS), normalize=True)
    torch.testing.assert_close(backbone.eval()(images(), tokenize(PROMPTS)), expected)
    attach_pool(backbone, rank=6, active=3, merged=2)
    torch.testing.assert_close(backbone.train()(images(), tokenize(PROMPTS)), expected)  # B = 0
    torch.testing.assert_close(backbone.eval()(images(), tokenize(PROMPTS)), expected)


def test_a_plain_open_clip_model_takes_a_pool() -> None:
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**CONFIG)
    expected = model.encode_image(images()), model.encode_text(tokenize(PROMPTS))
    adapted = attach_pool(model, rank=6, active=3, merged=2).adapters
    torch.testing.assert_close((model.encode_image(images()), model.encode_text(tokenize(PROMPTS))), expected)
    assert len(adapted) == 2 * 2 * 6 and all(a.activation_counts.sum() > 0 for a in adapted)


def test_merged_model_equals_open_clip_loaded_with_the_merged_weights() -> None:
    backbone = make_backbone()
    adapted = attach_pool(backbone, rank=6, alpha=6.0, active=3, merged=2).adapters
    for adapter in adapted:
        nn.init.normal_(adapter.B, std=0.1)
    before = backbone.eval()(images())[0]
    backbone.train()(images(), tokenize(PROMPTS))
    for adapter in adapted:
        adapter.merge()
    plain = make_clip()
    weights = plain.state_dict()
    for adapter in adapted:
        tower, block, layer = adapter.name.split(".")
        place = {"q": "attn.in_proj_weight", "k": "attn.in_proj_weight", "v": "attn.in_proj_weight"}
        place |= {"out": "attn.out_proj.weight", "fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
        prefix = "visual" if tower == "image" else "text"
        weights[f"{prefix}.transformer.resblocks.{block}.{place[layer]}"][adapter.rows] += adapter.merged_delta()
    plain.load_state_dict(weights)
    after = backbone.eval()(images(), tokenize(PROMPTS))
    expected = plain.encode_image(images(), normalize=True), plain.encode_text(tokenize(PROMPTS), normalize=True)
    torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-5)
    assert (after[0] - before).abs().max() > 1e-2, "the merge must change something for this to mean anything"


def test_every_projection_of_both_towers_gets_a_gradient() -> None:
    backbone = make_backbone()
    adapted = attach_pool(backbone, rank=6, active=3, merged=2).adapters
    for adapter in adapted:
        nn.init.normal_(adapter.B, std=0.1)
    prepare = backbone.preparer(PROMPTS)
    backbone.loss(backbone, prepare({"image": images(), "label": torch.tensor([0, 1, 2, 0])})).backward()
    for adapter in adapted:
        # keys of equal queries shift all scores alike, so a bias-free gradient can be small but not zero
        assert adapter.A.grad.abs().max() > 0 and adapter.B.grad.abs().max() > 0, adapter.name
    frozen = [name for name, parameter in backbone.named_parameters() if parameter.grad is not None]
    assert all(name.endswith((".A", ".B")) for name in frozen)


def test_vit_b_16_has_the_papers_number_of_trainable_numbers() -> None:
    with torch.device("meta"):
        model = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-16"))
    adapted = attach_pool(model).adapters
    assert len(adapted) == 144
    count = sum(p.numel() for a in adapted for p in (a.A, a.B, *a.router.parameters()))
    assert count == 4_978_368


def test_distinct_prompts_are_encoded_once_and_give_the_same_loss_votes_and_gradients() -> None:
    """Deduplicated and trimmed prompts against one full-length prompt per sample."""
    labels = torch.tensor([0, 2, 2, 0, 2, 1, 2, 2])
    fast = make_backbone()
    adapted = attach_pool(fast, rank=6, active=3, merged=2, guide={"text": "eot"}).adapters
    for adapter in adapted:
        nn.init.normal_(adapter.B, std=0.1, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(fast)
    prepare = fast.preparer(PROMPTS)
    loss = fast.loss(fast, prepare({"image": images(8), "label": labels}))
    loss.backward()

    tokens = tokenize(PROMPTS)[labels]
    plain.routing["text"].end = tokens.argmax(1)
    image = nn.functional.normalize(plain.model.visual(images(8)), dim=-1)
    text = nn.functional.normalize(plain.model.text(tokens), dim=-1)
    same = (labels[:, None] == labels[None]).float()
    targets = same / same.sum(1, keepdim=True)
    logits = plain.logit_scale * image @ text.T
    expected = (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2
    expected.backward()
    torch.testing.assert_close(loss, expected)
    theirs = [module for module in plain.modules() if isinstance(module, AdaptedLinear)]
    ours = [module for module in fast.modules() if isinstance(module, AdaptedLinear)]
    assert len(ours) == len(theirs) == 24
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.activation_counts, b.activation_counts) and a.activation_counts.sum() == 3 * 8
        torch.testing.assert_close(a.A.grad, b.A.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(a.B.grad, b.B.grad, atol=1e-6, rtol=1e-4)


def test_equal_prompts_are_one_label() -> None:
    backbone: ClipBackbone = make_backbone()
    prepare = backbone.preparer(["cat", "tree", "cat"])
    same = backbone.loss(backbone, prepare({"image": images(3), "label": torch.tensor([0, 1, 2])}))
    expected = backbone.loss(backbone, prepare({"image": images(3), "label": torch.tensor([0, 1, 0])}))
    assert torch.equal(same, expected)


def test_block_checkpointing_gives_the_same_gradients_and_counts() -> None:
    results = []
    for use_checkpointing in (False, True):
        backbone = make_backbone()
        if use_checkpointing:
            backbone.checkpoint_blocks()
        torch.manual_seed(0)
        adapted = attach_pool(backbone, rank=6, active=3, merged=2, dropout=0.2).adapters
        for adapter in adapted:
            nn.init.normal_(adapter.B, std=0.1)
        prepare = backbone.preparer(PROMPTS)
        torch.manual_seed(1)
        backbone.loss(backbone, prepare({"image": images(), "label": torch.tensor([0, 1, 2, 0])})).backward()
        results.append([(adapter.activation_counts, adapter.A.grad, adapter.B.grad) for adapter in adapted])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("is_on", [False, True])
def test_checkpointed_blocks_run_again_in_the_backward_and_keep_nothing_but_their_input(is_on: bool) -> None:
    backbone = load_backbone(BackboneConfig(name="tiny", gradient_checkpointing=is_on))
    attach_pool(backbone, rank=6, active=3, merged=2)
    blocks = [*backbone.model.visual.transformer.resblocks, *backbone.model.text.transformer.resblocks]
    runs: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        block.ln_2.register_forward_hook(lambda *_, number=number: runs.update([number]))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        prepare = backbone.preparer(["cat", "tree"])
        loss = backbone.loss(backbone, prepare({"image": images(4, 64), "label": torch.tensor([0, 1, 1, 0])}))
    per_block = sum(kept) / len(blocks)
    once = 4 * (8 * 8 + 1) * 192 * 4  # a block's input in the image tower, in bytes
    assert per_block < 2 * once if is_on else per_block > 4 * once
    loss.backward()
    assert runs == dict.fromkeys(range(len(blocks)), 2 if is_on else 1)


# inductor would draw the seeds of dropout masks from a generator of its own
@torch._inductor.config.patch(fallback_random=True)
def compare_compiled(rank: int, world_size: int, backend: str, vote: str, dropout: float) -> None:
    plain = make_backbone(layers=1)
    for adapter in attach_pool(plain, rank=6, active=3, merged=2, vote=vote, dropout=dropout).adapters:
        nn.init.normal_(adapter.B, std=0.1)
    ours = copy.deepcopy(plain)
    compiled = torch.compile(ours, backend=backend)
    results = []
    for backbone, model in ((plain, plain), (ours, compiled)):
        adapters = [module for module in backbone.modules() if isinstance(module, AdaptedLinear)]
        prepare = backbone.preparer(PROMPTS)
        torch.manual_seed(0)
        losses = []
        for label in ([0, 1, 2, 0], [2, 2, 1, 0]):
            loss = backbone.loss(model, prepare({"image": images(), "label": torch.tensor(label)}))
            loss.backward()
            share_votes(adapters)
            losses.append(loss.detach())
        gradients = [gradient for adapter in adapters for gradient in (adapter.A.grad, adapter.B.grad)]
        backbone.eval()
        with torch.no_grad():
            features = model(image=images())[0]
        results.append((losses, [adapter.activation_counts for adapter in adapters], gradients, features))
        backbone.train()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("backend", "vote", "dropout"),
    [
        pytest.param("aot_eager", "lagged", 0.3, marks=pytest.mark.slow),
        pytest.param("aot_eager", "global", 0.0, marks=pytest.mark.campaign),
        pytest.param("inductor", "lagged", 0.3, marks=pytest.mark.campaign),  # its C++ takes minutes to compile
    ],
)
def test_a_compiled_model_gives_the_same_losses_gradients_votes_and_features(
    run_distributed, backend: str, vote: str, dropout: float
) -> None:
    """In a process of its own: what the compiler has learnt of shapes before changes what it does."""
    run_distributed(compare_compiled, 1, backend, vote, dropout, timeout_s=1100)


def test_attaching_again_replaces_the_adapters() -> None:
    backbone = make_backbone()
    backbone.attach(lambda slot, _: AdaptedLinear(slot.linear, 12, rows=slot.rows), TOWERS, LAYERS)
    parameters = sum(1 for _ in backbone.parameters())
    again = backbone.attach(lambda slot, _: AdaptedLinear(slot.linear, 8, rows=slot.rows), TOWERS, LAYERS)
    assert all(isinstance(adapter.linear, nn.Linear) and adapter.rank == 8 for adapter in again)
    assert [module for module in backbone.modules() if isinstance(module, AdaptedLinear)] == again
    assert sum(1 for _ in backbone.parameters()) == parameters


def test_training_keeps_no_layer_norm_or_activation_output() -> None:
    """Of the inputs of adapted linears only attention's is kept, which autograd keeps anyway."""
    backbone = make_backbone()
    attach_pool(backbone, rank=6, active=3, merged=2)
    block = backbone.model.visual.transformer.resblocks[1]
    outputs, kept = [], []  # the tensors themselves, so that no address is used twice
    for module in (block.ln_1, block.ln_2, block.mlp.gelu):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    x = torch.randn(2, 5, 32, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x)
    addresses = {tensor.data_ptr() for tensor in kept}
    assert len(outputs) == 3 and not any(output.data_ptr() in addresses for output in outputs)


def test_tiny_loads_with_plain_open_clip() -> None:
    from importlib import resources

    folder = f"local-dir:{resources.files('r1p_dist') / 'assets' / 'tiny'}"
    plain, tokenizer = open_clip.create_model(folder).eval(), open_clip.get_tokenizer(folder)
    ours = load_clip("tiny").eval()
    tokens = tokenizer(["an emoji of a rabbit.", "letters of the Devanagari script."])
    assert torch.equal(ours.tokenize(["an emoji of a rabbit.", "letters of the Devanagari script."]), tokens)
    expected = plain.encode_image(images(2, 64), normalize=True), plain.encode_text(tokens, normalize=True)
    torch.testing.assert_close(ours(images(2, 64), tokens), expected)
    assert ours.preprocess["size"] == (64, 64) and isinstance(ours.logit_scale, float)
    picture = Image.fromarray(torch.randint(256, (90, 70, 3), dtype=torch.uint8).numpy())
    _, train, evaluate = open_clip.create_model_and_transforms(folder)
    assert torch.equal(ours.transform(picture), evaluate(picture))
    torch.manual_seed(0)
    expected = train(picture)
    torch.manual_seed(0)
    assert torch.equal(ours.train_transform(picture), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ViT-B-61",), "open_clip has no such model; nearest: ViT-B-16"),
        (("ViT-B-16", "opena"), "backbone.pretrained=opena: neither a file nor a tag of ViT-B-16; tags: openai"),
        (("ViT-B-16", "openai"), "trained with QuickGELU"),
        (("ViT-B-16-quickgelu", "laion2b_s34b_b88k"), "neither a file nor a tag"),
        (("tiny", "openai"), "the model tiny brings its own weights"),
        (("local-dir:nowhere",), "cannot load"),
    ],
)
def test_wrong_names_and_weights_are_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_clip(*arguments)


def test_weights_of_another_shape_are_refused(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({"logit_scale": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="backbone.name=ViT-S-32-alt|cannot load"):
        load_clip("ViT-S-32-alt", str(path))


def test_a_tower_without_linears_is_refused_and_the_other_one_serves() -> None:
    with torch.device("meta"):
        model = open_clip.create_model("RN50", device="meta")
    with pytest.raises(InputError, match="the image tower, a ModifiedResNet, has no linears q, k, v, .*r1p backbones"):
        attach_pool(model)
    pool = attach_pool(model, towers=["text"])
    assert len(pool.adapters) == 12 * 6
    pool.detach()
    with pytest.raises(InputError, match="the text tower, a CLIP, has no linears gate that"):
        attach_pool(model, towers=["text"], layers=["gate"])
