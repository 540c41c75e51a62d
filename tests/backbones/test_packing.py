"""Packed conversations: losses, gradients and votes of each are those that it has in a row of its own."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, MistralConfig, modeling_flash_attention_utils

from r1p_dist.adapters import AdaptedLinear, LoRALinear
from r1p_dist.backbones import LlavaBackbone
from r1p_dist.config import DataConfig
from r1p_dist.errors import InputError
from r1p_dist.kinds.llava.packing import unpackable
from r1p_dist.protocol import InputMoments
from r1p_dist.protocol.watchers import random_projection
from r1p_dist.recipes import load_config
from tests import small_llava, small_vlms
from tests.backbones.test_llava import FAMILIES as LLAVAS
from tests.backbones.test_llava import SAMPLES
from tests.backbones.test_vlms import LATER, TOWERS

PACKED = (*LLAVAS, *(family for family in small_vlms.FAMILIES if family not in ("gemma3", "paligemma")))
GUIDES = ("cls_image", "first", "last_prompt", "mean")
Found = dict[str, torch.Tensor]


def make_backbone(family: str, attention: str | None = None) -> LlavaBackbone:
    backbone = (small_llava if family in LLAVAS else small_vlms).make_backbone(family)
    if attention is not None:  # without the questions after a GPU
        backbone.family.decoder_module.config._attn_implementation = attention
    return backbone


def attend_densely(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """What flash attention's function of that signature computes, by a mask of all pairs: (T, heads, width)."""
    FLASH_CALLS.append((len(query), max_seqlen_q, len(cu_seqlens_q) - 1))
    assert dropout_p == 0 and causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    owner = torch.repeat_interleave(torch.arange(len(cu_seqlens_q) - 1), cu_seqlens_q.diff().long())
    order = torch.arange(len(query))
    seen = (owner[:, None] == owner) & (order[:, None] >= order)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (softmax_scale or query.shape[-1] ** -0.5)
    return torch.einsum("hqk,khd->qhd", F.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1), value)


FLASH_CALLS: list[tuple[int, int, int]] = []


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The package flash-attn, which needs a GPU, computed densely; tokens, longest and number of what it was given."""
    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.flash_attn_func = package.flash_attn_with_kvcache = lambda *inputs, **options: None
    package.flash_attn_varlen_func = attend_densely
    utils = modeling_flash_attention_utils
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, padding.__name__, padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    FLASH_CALLS.clear()
    return FLASH_CALLS


def training_batch(backbone: LlavaBackbone, is_packed: bool) -> dict:
    encoder = backbone.encoder(DataConfig(packing=is_packed))
    return backbone.prepare(encoder.collate([encoder.train(sample, torch.Generator()) for sample in (*SAMPLES, LATER)]))


def step(
    family: str, is_packed: bool, guide: str = "cls_image", attention: str | None = None, **options
) -> tuple[Found, list[torch.Tensor]]:
    """Returns losses, gradients and votes of a step, and the inputs of a language model's layer."""
    backbone = make_backbone(family, attention)
    torch.manual_seed(0)

    def make(slot, routing) -> AdaptedLinear:
        own = guide if slot.tower == "language" else "mean"
        adapter = AdaptedLinear(
            slot.linear, 4, active=2, merged=1, guide=own, rows=slot.rows, routing=routing, **options
        )
        torch.nn.init.normal_(adapter.B)
        return adapter

    adapters = backbone.attach(make, TOWERS, ("q", "v", "down", "fc1"))
    seen: list[torch.Tensor] = []
    adapters[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    losses, owners = backbone.train()(training_batch(backbone, is_packed))
    (losses * torch.linspace(1, 2, len(losses))).sum().backward()
    found = {"losses": losses.detach(), "owners": owners}
    for adapter in adapters:
        found[f"{adapter.name} votes"] = adapter.activation_counts
        found |= {f"{adapter.name} {name}": value.grad for name, value in adapter.trainable_parameters().items()}
    return found, seen


def assert_equal(packed: Found, plain: Found) -> None:
    assert packed.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-5 * max(1, value.abs().max()), msg=name)


@pytest.mark.parametrize("family", PACKED)
def test_packed_conversations_equal_those_in_rows_of_their_own(family: str) -> None:
    (packed, (row, *_)), (plain, (rows, *_)) = step(family, True), step(family, False)
    assert_equal(packed, plain)
    assert any(value.any() for name, value in plain.items() if name.startswith("language") and "votes" in name)
    assert row.shape[0] == 1 and row.shape[1] < rows.shape[:2].numel(), "nothing is saved"


@pytest.mark.parametrize("family", PACKED)
def test_flash_attention_is_told_of_each_conversation(family: str, flash: list[tuple[int, int, int]]) -> None:
    """Its kernels need a GPU; here it is what reaches them that counts."""
    (packed, (row, *_)), (plain, (rows, *_)) = step(family, True, attention="flash_attention_2"), step(family, False)
    assert_equal(packed, plain)
    padded, _ = step(family, False, attention="flash_attention_2")
    assert_equal(padded, plain)
    assert set(flash) == {(row.shape[1], rows.shape[1], rows.shape[0])}, "one call for all conversations"


@pytest.mark.parametrize("router_grad", ["none", "gated"])
@pytest.mark.parametrize("guide", GUIDES)
def test_each_packed_conversation_votes_by_its_own_guide(guide: str, router_grad: str) -> None:
    packed, plain = (step("llava", is_packed, guide, router_grad=router_grad)[0] for is_packed in (True, False))
    assert_equal(packed, plain)
    assert router_grad == "none" or any("router" in name for name in plain)


def test_moments_of_packed_conversations_are_those_of_rows_of_their_own() -> None:
    """And their gradients', as `steady` has them."""
    found = []
    for is_packed in (True, False):
        backbone = make_backbone("llava")
        adapters = backbone.attach(
            lambda slot, routing: LoRALinear(slot.linear, 2, rows=slot.rows), TOWERS, ("q", "v", "down", "fc1")
        )
        inputs = InputMoments(backbone, adapters, by_sensitivity=True, with_gradients=True)
        batch = training_batch(backbone, is_packed)
        with inputs.watch():
            random_projection(backbone.train().outputs(backbone, batch), 0).backward()
        found.append({**inputs.moments, **{f"{name} out": moment for name, moment in inputs.gradients.items()}})
        assert {name.partition(".")[0] for name, moment in inputs.moments.items() if moment.any()} >= {"language"}
    assert_equal(*found)


def test_checkpointed_blocks_attend_the_same_way_in_their_second_forward_and_vote_once(monkeypatch) -> None:
    """A second batch, of other lengths, has gone through the model by then, as with replay."""
    plain, _ = step("qwen2_5_vl", False)
    forward = LlavaBackbone.forward

    def checkpointed(self: LlavaBackbone, batch: dict) -> tuple[torch.Tensor, ...]:
        self.checkpoint_blocks()
        found = forward(self, batch)
        encoder = self.encoder(DataConfig(packing=True))
        with torch.no_grad():
            self.eval()
            forward(self, self.prepare(encoder.collate([encoder.train(SAMPLES[2], torch.Generator())] * 2)))
            self.train()
        return found

    monkeypatch.setattr(LlavaBackbone, "forward", checkpointed)
    packed, seen = step("qwen2_5_vl", True)
    assert len(seen) == 3, "the first block has not run again"
    assert_equal(packed, plain)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_answers_are_not_packed(family: str) -> None:
    plain, packing = make_backbone(family).eval(), make_backbone(family).eval()
    found = []
    for backbone, data in ((plain, DataConfig()), (packing, DataConfig(packing=True))):
        encoder = backbone.encoder(data)
        found.append(backbone.answer(backbone, encoder.collate([encoder.evaluate(sample) for sample in SAMPLES]), 5))
    assert found[0] == found[1] and any(text for text, _ in found[0])


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_families_that_cannot_be_packed_are_named(family: str) -> None:
    with pytest.raises(InputError, match=rf"data.packing=true: the decoder of this {family} is a gemma.*; set it to"):
        make_backbone(family).encoder(DataConfig(packing=True))


def test_sliding_windows_cannot_be_packed() -> None:
    decoder = torch.nn.Module()
    for config, reason in (
        (LlamaConfig(), None),
        (MistralConfig(sliding_window=None), None),
        (MistralConfig(sliding_window=16), "attends by a sliding window"),
        (
            LlamaConfig(attn_implementation="eager"),
            "attends eagerly (backbone.attn_implementation), by a mask of all pairs",
        ),
    ):
        decoder.config = config
        assert unpackable(decoder) == reason


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["data.packing=true"], "data.packing=true needs backbone.kind=llava, got open_clip"),
        (["data.packing=true", "backbone.kind=llava", "train.compile=true"], "set one of both to false"),
    ],
)
def test_what_packing_does_not_go_with_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config("mini_mtil_dac", overrides)
