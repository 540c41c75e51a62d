"""The pool in one's own loop: it trains what a run trains, on any model, and refuses what would go wrong silently."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import open_clip
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
)

import r1p_dist
from r1p_dist import attach_pool
from r1p_dist.distributed import rank, sum_over_ranks, world_size
from r1p_dist.engine import learning_rate
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava import own_loop
from r1p_dist.methods.dac import Dac
from r1p_dist.recipes import load_config
from tests import small_llava, small_vlms
from tests.backbones.test_llava import SAMPLES, plain_inputs, training_batch
from tests.small_clip import CONFIG, make_backbone, tokenize
from tests.test_parity import GLOBAL_BATCH, PROMPTS, STEPS, TASKS, global_batch, relative, train

POOL = {"rank": 6, "active": 3, "merged": 2, "alpha": 6.0}
IDS = torch.tensor([[58, 5, 9, 59, 0, 0], [58, 7, 3, 8, 4, 59], [58, 2, 59, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 0, 0, 0]])


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# What a run trains, by hand

LOOPS = [
    ([], {}),
    (
        ["train.gradient_accumulation_steps=2", "options.vote=lagged", "options.guide.text=eot"],
        {"vote": "lagged", "guide": {"text": "eot"}},
    ),
    (["options.ago.reduction=code_all"], {"ago_reduction": "code_all"}),
]


def train_by_hand(rank_: int, ranks: int, loops: list) -> list[dict[str, Any]]:
    return [_train_by_hand(*loop) for loop in loops]


def _train_by_hand(overrides: list[str], options: dict[str, Any]) -> dict[str, Any]:
    backbone = make_backbone()
    pool = attach_pool(backbone, **POOL, ago_weight=0.5, **options)
    model = DistributedDataParallel(backbone) if world_size() > 1 else backbone
    prepare = backbone.preparer(PROMPTS)
    config = load_config("mini_mtil_dac", [f"train.iterations={STEPS}", "train.lr=0.3", *overrides])
    micro_steps = config.train.gradient_accumulation_steps
    losses, agos, counts = [], [], []
    for task in range(TASKS):
        pool.begin_task(task)
        optimizer = torch.optim.SGD(pool.parameters())
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = learning_rate(step, config.train)
            for number in range(micro_steps):
                batch = global_batch(task, step * micro_steps + number, GLOBAL_BATCH // micro_steps)
                mine = {name: value.chunk(world_size())[rank()] for name, value in batch.items()}
                is_last = number == micro_steps - 1
                with nullcontext() if is_last or model is backbone else model.no_sync():
                    loss = backbone.loss(model, prepare(mine))
                    penalty = pool.penalty()
                    ((loss + penalty) / micro_steps).backward()
                losses.append(sum_over_ranks((loss + penalty).detach()) / world_size())
                agos.append(penalty.detach())
            optimizer.step()
            optimizer.zero_grad()
            pool.end_step()
            counts.append(torch.stack([adapter.activation_counts for adapter in pool.adapters]).clone())
        with pool.trained():
            pass
        pool.merge()
    delta = torch.cat([adapter.merged_delta().flatten() for adapter in pool.adapters])
    return {"loss": torch.stack(losses), "ago": torch.stack(agos), "counts": torch.stack(counts), "delta": delta}


def train_both(rank: int, world_size: int) -> list[list[dict[str, Any]]]:
    return [[train(0, "sgd", overrides, False) for overrides, _ in LOOPS], train_by_hand(rank, world_size, LOOPS)]


@pytest.mark.slow
def test_the_loop_trains_what_a_run_trains_alone_and_under_ddp(run_distributed) -> None:
    (runs, alone), *_ = run_distributed(train_both, 1)
    under_ddp = run_distributed(train_by_hand, 2, LOOPS)
    for found in (alone, *under_ddp):
        for (overrides, _), run, ours in zip(LOOPS, runs, found, strict=True):
            assert torch.equal(ours["counts"], run["counts"]), overrides
            assert run["ago"].max() > 0, "or there is no penalty to compare"
            for name in ("loss", "ago", "delta"):
                assert relative(ours[name], run[name]) <= 1e-5, (overrides, name)


FAMILIES = ("llava", "llava_next", "llava_onevision", *small_vlms.FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:__array(_wrap)?__ (implementation|must accept):DeprecationWarning")
def test_a_vlm_called_by_itself_learns_what_it_learns_in_a_run(family: str) -> None:
    """The model of transformers with its own forward and loss, against the backbone of a run."""
    small = small_llava if family.startswith("llava") else small_vlms
    samples = SAMPLES[:1] + SAMPLES[2:] if family == "paligemma" else SAMPLES
    backbone = small.make_backbone(family)
    batch = training_batch(backbone, samples)
    plain = small.make_model(family)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    given |= backbone.family.arguments(batch, backbone._lay_out(batch).per_sample)
    towers = ["language", "image"] if family == "gemma3" else ["language", "projector", "image"]
    results = []
    for model in (backbone, plain):
        pool = attach_pool(model, **POOL, towers=towers)
        pool.begin_task(0)
        generator = torch.Generator().manual_seed(1)
        for adapter in pool.adapters:
            nn.init.normal_(adapter.B, std=0.05, generator=generator)
        if model is backbone:
            prepared = [backbone.prepare(batch)]
            backbone.begin_step(prepared, load_config("mini_instruct").train)
            loss = backbone.loss(backbone, prepared[0])
        else:
            loss = plain(**given).loss
        loss.backward()
        counts = torch.stack([adapter.activation_counts for adapter in pool.adapters])
        results.append((loss.detach(), counts, [p.grad for p in pool.parameters()], [a.name for a in pool.adapters]))
        pool.merge()
        assert pool.detach() is (plain if model is plain else backbone.model)
    assert results[0][3] == results[1][3]
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(results[1][2], results[0][2], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def llava_inputs() -> dict[str, torch.Tensor]:
    return plain_inputs("llava", training_batch(small_llava.make_backbone()))


def test_padding_of_a_vlms_conversations_stands_on_either_side() -> None:
    given = llava_inputs()
    lengths = given["attention_mask"].sum(1)
    moved = {
        name: torch.stack(
            [row.roll(len(row) - length) for row, length in zip(given[name], lengths.tolist(), strict=True)]
        )
        for name in ("input_ids", "attention_mask", "labels")
    }
    assert len(set(lengths.tolist())) == 3
    found = []
    for inputs in (given, given | moved):
        model = small_llava.make_model()
        pool = attach_pool(model, **POOL)
        pool.begin_task(0)
        model(**inputs)
        found.append(torch.stack([adapter.activation_counts for adapter in pool.adapters]))
    assert torch.equal(*found) and (found[0].sum(1) >= 9).all()


def test_a_vlm_answers_with_a_pool_as_without_and_learns_from_texts(monkeypatch) -> None:
    model = small_llava.make_model().eval()
    given = llava_inputs()
    prompt = {name: given[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 3}
    expected = model.generate(**prompt, **options)
    pool = attach_pool(model, **POOL)
    assert torch.equal(model.generate(**prompt, **options), expected)
    pool.begin_task(0)
    text = {name: given[name][2:] for name in ("input_ids", "attention_mask", "labels")}
    model(**text).loss.backward()
    counts = {adapter.name: int(adapter.activation_counts.sum()) for adapter in pool.adapters}
    assert {count for name, count in counts.items() if name.startswith("language")} == {3}
    assert {count for name, count in counts.items() if name.startswith("projector")} == {0}
    with pytest.raises(InputError, match="call it with input_ids="):
        model(text["input_ids"])
    monkeypatch.setattr(own_loop, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"a batch without pictures while .* or use towers=\['language'\]"):
        model(**text)
    with pytest.raises(InputError, match="8 image tokens in 2 pieces: these are not the 3 pictures"):
        model(**given | {"input_ids": given["input_ids"].where(torch.arange(3)[:, None] != 0, 7)})


# Every kind of model


class Perceptron(nn.Module):
    """Without tokens: a sample is a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu())


def make_hf_clip(kind: str) -> nn.Module:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 60, "max_position_embeddings": 6, "eos_token_id": 59, "pad_token_id": 0}
    vision = tower | {"image_size": 16, "patch_size": 8}
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


def call_hf_clip(model: nn.Module) -> torch.Tensor:
    out = model(input_ids=IDS, pixel_values=pictures())
    return torch.cat([out.image_embeds, out.text_embeds])


def make_llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=8, **sizes))


def make_llama4() -> nn.Module:
    """Every layer is a mixture of experts, four that transformers keeps in one weight and one of plain linears."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}
    return Llama4ForCausalLM(Llama4TextConfig(vocab_size=60, pad_token_id=0, interleave_moe_layer_step=1, **sizes))


def make_switch() -> nn.Module:
    """Every layer is a mixture of four experts with linears of their own; the last of them gets no token."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_sparse_encoder_layers": 2}
    sizes |= {"num_experts": 4, "dropout_rate": 0.0, "router_jitter_noise": 0.0, "router_bias": True}
    model = SwitchTransformersEncoderModel(SwitchTransformersConfig(vocab_size=60, **sizes))
    for name, bias in model.named_parameters():
        if name.endswith("classifier.bias"):
            bias.data[-1] = -100.0
    return model


def make_bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=60, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


def make_timm() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=5)


# what makes the model, what calls it, further arguments of attach_pool, how many adapters
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.Tensor], dict[str, Any], int]] = {
    "open_clip": (
        lambda: open_clip.model.CLIP(**CONFIG),
        lambda model: torch.cat([model.encode_image(pictures()), model.encode_text(tokenize(PROMPTS[:3]))]),
        {"guide": {"text": "eot"}},
        24,
    ),
    "CLIPModel": (lambda: make_hf_clip("clip"), call_hf_clip, {"guide": {"text": "mean"}}, 24),
    "SiglipModel": (lambda: make_hf_clip("siglip"), call_hf_clip, {"guide": {"text": "auto"}}, 24),
    "timm": (make_timm, lambda model: model(pictures()), {}, 12),
    "llama": (
        make_llama,
        lambda model: model(input_ids=IDS, attention_mask=MASK).logits,
        {"targets": ["q_proj", "v_proj", "model.layers.1.mlp.down_proj"], "guide": "last_prompt"},
        5,
    ),
    "a mixture of experts": (
        make_llama4,
        lambda model: model(input_ids=IDS, attention_mask=MASK).logits,
        {"targets": ["q_proj", "shared_expert.up_proj"], "guide": "last_prompt"},
        4,
    ),
    "bert": (
        make_bert,
        lambda model: model(input_ids=IDS, attention_mask=MASK).last_hidden_state,
        {"targets": r"encoder\.layer\.\d+\.(attention.*(query|value)|output\.dense)"},
        6,
    ),
    "perceptron": (
        Perceptron,
        lambda model: model(torch.linspace(-1, 1, 24).view(3, 8)),
        {"targets": ["first", "second"]},
        2,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_trains_merges_and_is_plain_again(kind: str) -> None:
    make, call, options, count = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    model.requires_grad_(True)
    untouched = call(model).detach()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made_of = [type(module) for module in model.modules()]
    pool = attach_pool(model, **POOL, **options)
    assert len(pool.adapters) == count
    torch.testing.assert_close(call(model), untouched)
    pool.begin_task(0)
    torch.testing.assert_close(call(model).detach(), untouched)  # B = 0
    for adapter in pool.adapters:
        assert adapter.activation_counts.sum() == 3 * 3, "each of three samples has three votes"
        nn.init.normal_(adapter.B, std=0.3)
    call(model).square().sum().backward()
    assert all(adapter.A.grad.abs().max() > 0 for adapter in pool.adapters)
    assert {id(p) for p in model.parameters() if p.grad is not None} <= {id(p) for p in pool.parameters()}
    pool.merge()
    merged = call(model).detach()
    assert (merged - untouched).abs().max() > 1e-2
    deltas = [(adapter.linear.weight, adapter.rows, adapter.merged_delta()) for adapter in pool.adapters]
    plain = pool.detach()
    assert plain is model and [type(module) for module in plain.modules()] == made_of
    assert list(plain.state_dict()) == list(before) and all(p.requires_grad for p in plain.parameters())
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    expected = dict(before)
    for weight, rows, delta in deltas:
        name = names[id(weight)]
        expected[name] = expected[name].clone()
        expected[name][rows] += delta
    torch.testing.assert_close(dict(plain.state_dict()), expected)
    fresh = make().eval()
    fresh.load_state_dict(expected)
    torch.testing.assert_close(call(fresh).detach(), merged, atol=1e-5, rtol=1e-4)


def test_padding_and_answers_do_not_vote() -> None:
    """The router's vector is the mean of the prompt, wherever it stands."""
    model = make_llama()
    pool = attach_pool(model, targets=["q_proj"], **POOL)
    pool.begin_task(0)
    router = pool.adapters[0].router
    labels = torch.tensor(
        [[-100, -100, 9, 59, -100, -100], [-100, -100, -100, 8, 4, 59], [58, 2, 59, -100, -100, -100]]
    )
    expected = []
    router.register_forward_hook(lambda module, inputs, output: expected.append(inputs[0]))
    seen: list[torch.Tensor] = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(input_ids=IDS, attention_mask=MASK, labels=labels)
    prompts = [seen[0][0, :2], seen[0][1, :3], seen[0][2, :3]]
    torch.testing.assert_close(expected[0], torch.stack([prompt.mean(0) for prompt in prompts]))
    moved = IDS.roll(2, 1), MASK.roll(2, 1), labels.roll(2, 1)
    model(input_ids=moved[0][:1], attention_mask=moved[1][:1], labels=moved[2][:1])
    torch.testing.assert_close(expected[1], seen[1][:, 2:4].mean(1))


def test_each_token_that_reaches_an_expert_of_its_own_linears_votes_there() -> None:
    torch.manual_seed(0)
    model = make_switch()
    pool = attach_pool(model, targets=r".*\.experts\.expert_\d\.(wi|wo)", **POOL)
    pool.begin_task(0)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def learn(adapter: nn.Module, inputs: tuple) -> None:
        nn.init.normal_(adapter.B, std=0.3)

    for adapter in pool.adapters:
        adapter.register_forward_pre_hook(learn)
        adapter.register_forward_hook(lambda module, inputs, output: seen.update({module.name: (inputs[0], output)}))
    model(input_ids=IDS, attention_mask=MASK).last_hidden_state.sum().backward()
    assert len(pool.adapters) == 2 * 4 * 2 and not any("expert_3" in name for name in seen)
    assert sum(len(x) for name, (x, _) in seen.items() if name.endswith("wi")) == 2 * IDS.numel()
    weights, deltas = {a.name: a.linear.weight.clone() for a in pool.adapters}, {}
    for adapter in pool.adapters:
        if adapter.name not in seen:
            assert not adapter.activation_counts.any() and adapter.A.grad is None
            continue
        x, y = seen[adapter.name]
        counts = adapter.router(x).topk(3).indices.flatten().bincount(minlength=6)
        assert torch.equal(adapter.activation_counts, counts)
        order = counts.sort(descending=True, stable=True).indices
        update = [adapter.scaling * adapter.B[:, order[:n]] @ adapter.A[order[:n]] for n in (3, 2)]
        torch.testing.assert_close(y, x @ (weights[adapter.name] + update[0]).T)
        deltas[adapter.name] = update[1].detach()
    pool.merge()
    plain = dict(pool.detach().named_parameters())
    for name, weight in weights.items():
        torch.testing.assert_close(plain[f"{name}.weight"], weight + deltas.get(name, 0))


def test_linears_of_an_image_tower_vote_by_its_own_tokens_whatever_the_prompts_are() -> None:
    model = small_llava.make_model()
    pool = attach_pool(model, targets=["q_proj"], guide="last_prompt", **POOL)
    pool.begin_task(0)
    seen: dict[str, torch.Tensor] = {}
    for adapter in pool.adapters:
        adapter.router.register_forward_hook(lambda _, x, __, name=adapter.name: seen.update({name: x[0]}))
    tower = model.model.vision_tower.encoder.layers[0]
    tower.layer_norm1.register_forward_hook(lambda _, __, output: seen.update(tower=output))
    model(**llava_inputs())
    first = next(adapter.name for adapter in pool.adapters if "vision_tower" in adapter.name)
    assert torch.equal(seen[first], seen["tower"][:, -1]) and len(seen[first]) == 3, "three pictures"


def test_the_guide_of_a_text_tower_is_the_token_that_it_pools_at() -> None:
    for kind, ends in (("clip", [3, 5, 2]), ("siglip", [5, 5, 5])):
        model = make_hf_clip(kind)
        pool = attach_pool(model, **POOL, guide="auto")
        pool.begin_task(0)
        call_hf_clip(model)
        assert pool.adapters[-1].routing.end.tolist() == ends
        assert {adapter.guide for adapter in pool.adapters[12:]} == {"eot"}


# What a task leaves


def trained_perceptron(tasks: int = 1, **options) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Perceptron()
    pool = attach_pool(model, targets=["first", "second"], **POOL, **options)
    for task in range(tasks):
        pool.begin_task(task)
        step(model, pool, task)
        pool.merge()
    return model, pool


def step(model: nn.Module, pool: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(pool.parameters(), lr=0.5)
    for _ in range(2):
        loss = model(torch.randn(5, 8, generator=generator)).square().sum() + pool.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pool.end_step()


def test_what_was_trained_can_be_evaluated_before_the_merge() -> None:
    model, pool = trained_perceptron(0)
    x = torch.randn(4, 8)
    pool.begin_task(0)
    step(model, pool, 0)
    weights = [adapter.linear.weight.clone() for adapter in pool.adapters]
    trained = []
    for adapter, weight in zip(pool.adapters, weights, strict=True):
        chosen = adapter.activation_counts.sort(descending=True, stable=True).indices[:3]
        trained.append(weight + adapter.scaling * adapter.B[:, chosen] @ adapter.A[chosen])
    hidden = nn.functional.linear(x, trained[0], model.first.linear.bias).relu()
    expected = model.head(nn.functional.linear(hidden, trained[1], model.second.linear.bias).relu())
    with pytest.raises(RuntimeError, match="of the evaluation"), pool.trained() as shown:
        assert shown is model and not model.training
        model.eval()  # as an evaluation does
        torch.testing.assert_close(model(x), expected)
        raise RuntimeError("of the evaluation")
    assert model.training and all(torch.equal(a.linear.weight, w) for a, w in zip(pool.adapters, weights, strict=True))


def test_a_task_can_be_taken_out_again() -> None:
    model, pool = trained_perceptron(3)
    _, shorter = trained_perceptron(2)
    first = [adapter.merged[0] for adapter in pool.adapters]
    pool.unmerge(2)
    assert pool.merged_tasks == (0, 1)
    for adapter, other in zip(pool.adapters, shorter.adapters, strict=True):
        assert torch.equal(adapter.linear.weight, other.linear.weight)
    pool.unmerge(0)
    torch.manual_seed(0)
    plain = Perceptron()
    delta = pool.adapters[0].merged_delta()
    torch.testing.assert_close(model.first.linear.weight, plain.first.weight + delta)
    assert not torch.equal(delta, first[0].scaling * first[0].B @ first[0].A)
    pool.begin_task(3)
    assert model.training, "a task that follows has its own number"


@pytest.mark.parametrize("options", [{}, {"vote": "lagged", "ago_reduction": "code_all", "router_grad": "gated"}])
def test_a_saved_pool_goes_on_where_it_was(options: dict, tmp_path) -> None:
    _, whole = trained_perceptron(2, **options)
    whole.begin_task(2)
    step(whole.model, whole, 2)
    whole.save(tmp_path / "pool.safetensors")
    torch.manual_seed(0)
    again = attach_pool(Perceptron(), targets=["first", "second"], **POOL, **options)
    again.load(tmp_path / "pool.safetensors")
    assert again.task == 2 and again.merged_tasks == (0, 1) and again.model.training
    for pool in (whole, again):
        step(pool.model, pool, 7)
        pool.merge()
    for ours, theirs in zip(again.adapters, whole.adapters, strict=True):
        assert torch.equal(ours.activation_counts, theirs.activation_counts)
        assert torch.equal(ours.linear.weight, theirs.linear.weight)
    again.save(tmp_path / "pool.safetensors")
    torch.manual_seed(0)
    last = attach_pool(Perceptron(), targets=["first", "second"], **POOL, **options)
    last.load(tmp_path / "pool.safetensors")
    x = torch.randn(3, 8)
    assert not last.model.training and torch.equal(last.detach()(x), whole.detach()(x))


def test_a_saved_pool_is_not_taken_for_another(tmp_path) -> None:
    _, pool = trained_perceptron(1)
    path = tmp_path / "pool.safetensors"
    pool.save(path)
    for options, message in (
        ({"merged": 3}, "saved with merged=2, this pool has 3"),
        ({"guide": "first"}, "saved with guide={'model': 'mean'}, this pool has {'model': 'first'}"),
        ({"targets": ["second"]}, "other layers"),
    ):
        other = attach_pool(Perceptron(), **{"targets": ["first", "second"], **POOL} | options)
        with pytest.raises(InputError, match=message):
            other.load(path)
    with pytest.raises(InputError, match="has begun a task"):
        pool.load(path)
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        attach_pool(Perceptron(), targets=["first"], **POOL | {"rank": 4}).load(tmp_path / "other.safetensors")


# What is refused

ORDERS = [
    ("begin eval", r"model.eval\(\): task 0 is not in the weights yet; evaluate inside `with pool.trained\(\):`"),
    ("begin step merge merge", r"merge\(\): no task is open; call pool.begin_task\(1\) first"),
    ("begin step merge train", r"model.train\(\): task 0 is merged, .* call pool.begin_task\(1\) first"),
    ("begin begin", r"begin_task\(1\): task 0 is open; call pool.merge\(\) first"),
    ("merge", r"merge\(\): no task is open; call pool.begin_task\(0\) first"),
    ("penalty", r"penalty\(\): no task is open"),
    ("end_step", r"end_step\(\): no task is open"),
    ("trained", r"trained\(\): no task is open"),
    ("begin merge", r"merge\(\): task 0 made no training step"),
    ("begin step detach", r"detach\(\): task 0 is not merged"),
    ("begin step merge detach begin", r"begin_task\(\): the pool is detached"),
    ("begin step merge begin penalty", r"penalty\(\): the model made no training forward"),
    ("begin step unmerge", r"unmerge\(0\): task 0 is open"),
    ("unmerge", r"unmerge\(0\): that task is not merged; merged are none"),
]


@pytest.mark.parametrize("order, message", ORDERS, ids=[order for order, _ in ORDERS])
def test_wrong_orders_are_refused(order: str, message: str) -> None:
    model, pool = trained_perceptron(0)
    begun = 0

    def begin() -> None:
        nonlocal begun
        pool.begin_task(begun)
        begun += 1

    calls = {"begin": begin, "step": lambda: step(model, pool, 0), "eval": model.eval, "train": model.train}
    calls |= {"unmerge": lambda: pool.unmerge(0), "trained": lambda: pool.trained().__enter__()}
    *first, last = order.split()
    for name in first:
        calls.get(name, getattr(pool, name, None))()
    with pytest.raises(InputError, match=message):
        calls.get(last, getattr(pool, last, None))()


def test_votes_that_are_not_counted_are_no_merge() -> None:
    model, pool = trained_perceptron(0, vote="local")
    pool.begin_task(0)
    model(torch.randn(2, 8)).sum().backward()
    with pytest.raises(InputError, match=r"call pool.end_step\(\) after every step"):
        pool.merge()
    with pytest.raises(InputError, match="tasks are begun one after another; the next one is 0"):
        trained_perceptron(0)[1].begin_task(1)


def tied() -> nn.Module:
    model = Perceptron()
    model.second = nn.Linear(16, 16)
    model.head = nn.Linear(16, 16)
    model.head.weight = model.second.weight
    return model


REFUSED = [
    (Perceptron, {"targets": ["secnd"]}, "no linear is named 'secnd'; did you mean 'second'"),
    (
        Perceptron,
        {"targets": "secon"},
        "targets='secon': matches the whole name of no linear; the model has first, sec",
    ),
    (Perceptron, {"targets": "sec(ond"}, "not a regular expression"),
    (Perceptron, {"targets": []}, "targets: names no linear"),
    (Perceptron, {}, r"a Perceptron is of no kind that is known; name its linears, for example targets="),
    (Perceptron, {"targets": ["head"]}, "rank=12 is larger than a layer of 16 by 4"),
    (Perceptron, {"targets": ["first"], "towers": ["image"]}, "targets names linears of any model"),
    (Perceptron, {"targets": ["first"], "guide": "maen"}, "guide='maen': not for the tower model, did you mean 'mean'"),
    (Perceptron, {"targets": ["first"], "vote": "globl"}, "vote='globl': Input should be .*did you mean 'global'"),
    (Perceptron, {"targets": ["first"], "merged": 9}, "merged=9 must not be larger than active=8"),
    (Perceptron, {"targets": ["first"], "ago_weight": -1.0}, "ago_weight=-1.0: Input should be greater than or"),
    (tied, {"targets": ["second"], "rank": 4, "active": 2, "merged": 1}, "second shares its weight with another"),
    (make_llama4, {}, "a Llama4ForCausalLM is of no kind that is known; name its linears"),
    (make_llama4, {"targets": ["experts"]}, "'experts' is a Llama4TextExperts, not a linear"),
    (make_llama4, {"targets": ["gate_up_proj"]}, "'gate_up_proj' is a weight of a Llama4TextExperts itself, not a lin"),
    (make_llama4, {"targets": ["router"]}, "feed_forward.router is a Llama4Router, which computes more than a linear"),
    (make_timm, {"layers": ["query"]}, "layers: the model has no 'query'; it has q, k"),
    (make_timm, {"towers": ["imag"]}, "towers: the model has no 'imag', did you mean 'image'"),
    (make_timm, {"layers": ["gate"]}, "the image tower, a VisionTransformer, has no linears gate"),
    (make_timm, {"targets": ["patch_embed.proj"]}, "'patch_embed.proj' is a Conv2d, not a linear"),
    (
        lambda: nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}),
        {"targets": ["out_proj"]},
        "a.out_proj is never called",
    ),
    (lambda: make_hf_clip("clip"), {"guide": {"txt": "eot"}}, "guide: the model has no 'txt', did you mean 'text'"),
    (lambda: make_hf_clip("clip"), {"guide": "cls_image"}, "guide='cls_image': not for the tower image"),
    (small_llava.make_model, {"router_grad": "gated"}, r"router_grad=gated: .* set towers=\['language'\]"),
]


@pytest.mark.parametrize("make, options, message", REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_wrong_names_and_values_are_refused_and_leave_the_model_alone(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = make()
    made_of, trained = [type(module) for module in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        attach_pool(model, **options)
    assert [type(module) for module in model.modules()] == made_of
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("make", [r1p_dist.load_clip, r1p_dist.load_llava, lambda name: make_timm()])
def test_a_pool_goes_on_a_model_after_an_error(make: Callable[[str], nn.Module]) -> None:
    model = make("tiny")
    for options in ({"layers": ["query"]}, {"rank": 10_000}, {"guide": "foo"}):
        with pytest.raises(InputError):
            attach_pool(model, **options)
    fresh = make("tiny")
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
    adapters = attach_pool(model).adapters
    assert [adapter.name for adapter in adapters] == [adapter.name for adapter in attach_pool(fresh).adapters]
    assert set(adapters) <= set(model.modules()), "some are not called"


@pytest.mark.parametrize("load", [r1p_dist.load_clip, r1p_dist.load_llava])
def test_what_was_detached_takes_the_next_pool(load: Callable[[str], nn.Module]) -> None:
    loaded = load("tiny")
    plain = attach_pool(loaded).detach()
    with pytest.raises(InputError, match=r"was detached; put the next one on what detach\(\) returned"):
        attach_pool(loaded)
    assert set(attach_pool(plain).adapters) <= set(plain.modules())


def test_a_second_pool_and_a_wrapped_model_are_refused() -> None:
    model, _ = trained_perceptron(1)
    with pytest.raises(InputError, match="has adapters already"):
        attach_pool(model, targets=["first"])
    with pytest.raises(InputError, match="takes the model itself; wrap it by DistributedDataParallel afterwards"):
        attach_pool(DistributedDataParallel.__new__(DistributedDataParallel))


def test_defaults_are_a_runs_and_names_show_in_an_editor() -> None:
    given = {name: parameter.default for name, parameter in inspect.signature(attach_pool).parameters.items()}
    options = Dac.Options()
    expected = options.model_dump(exclude={"guide", "ago"})
    expected |= {"ago_weight": options.ago.weight, "ago_reduction": options.ago.reduction}
    assert {name: given[name] for name in expected} == expected
    model = make_hf_clip("clip")
    guides = {adapter.name.split(".")[0]: adapter.guide for adapter in attach_pool(model).adapters}
    assert guides == {"image": "first", "text": options.guide.text}
    assert {"attach_pool", "AttachedPool", "load_clip", "load_config"} <= set(dir(r1p_dist))
    assert all(getattr(r1p_dist, name) is not None for name in dir(r1p_dist))
