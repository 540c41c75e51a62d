"""The model that a run would train: on the meta device, with its adapters, traced for one micro step."""

import difflib
from dataclasses import dataclass

import open_clip
import torch
import torch.nn.functional as F

from r1p_dist.adapters import AdaptedLinear, LowRankLinear
from r1p_dist.backbones import ClipBackbone
from r1p_dist.backbones.open_clip import build_on_meta, explain_faults
from r1p_dist.backbones.weights import model_source
from r1p_dist.config import RunConfig
from r1p_dist.errors import InputError
from r1p_dist.methods import make_method
from r1p_dist.planner.trace import Trace, trace_step


@dataclass(frozen=True)
class Batch:
    """One rank's micro batch: pictures, distinct prompts among them, and the tokens of the longest of these."""

    pictures: int
    prompts: int
    prompt_tokens: int


@dataclass(frozen=True)
class Adapted:
    """One adapted linear. group: those of equal number share an input. merged: rank-1 experts that a task leaves.

    gate_bytes: of the mean routing probabilities that ranks sum where the router is trained, else 0.
    """

    name: str
    inputs: int
    outputs: int
    rank: int
    merged: int
    group: int
    gate_bytes: int


@dataclass
class ModelShape:
    """What the rest of the planner knows of a model. features: width of what is contrasted. vote: as pool.vote."""

    name: str
    dtype: torch.dtype
    trace: Trace
    adapted: list[Adapted]
    features: int
    vote: str | None
    is_checkpointed: bool

    def count(self, kind: str) -> int:
        """Returns the numbers in parameters of a kind: frozen, router or adapter."""
        return sum(parameter.numel for parameter in self.trace.parameters if parameter.kind == kind)

    @property
    def merged_numel(self) -> int:
        """Numbers in the factors that a finished task leaves."""
        return sum(adapted.merged * (adapted.inputs + adapted.outputs) for adapted in self.adapted)

    @property
    def pristine_numel(self) -> int:
        """Numbers in the weights that a merge changes, whose first values are kept."""
        return sum(adapted.inputs * adapted.outputs for adapted in self.adapted)


def describe_clip(config: RunConfig, batch: Batch, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of the run's backbone with the adapters of its method.

    InputError: a model that open_clip has not, or more prompt tokens than it reads.
    """
    name = config.backbone.name
    source = model_source(name)
    if ":" not in source and open_clip.get_model_config(name) is None:
        nearest = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise InputError(f"--model {name}: open_clip has no such model{hint}")
    with explain_faults(name, None):
        model = build_on_meta(source, None, config.backbone.force_quick_gelu)
    backbone = ClipBackbone(model, open_clip.tokenize, open_clip.get_model_preprocess_cfg(model))
    return describe_backbone(config, backbone, batch, dtype)


def describe_backbone(config: RunConfig, backbone: ClipBackbone, batch: Batch, dtype: torch.dtype) -> ModelShape:
    """Returns the shape of a CLIP backbone whose parameters are on the meta device; it gets the method's adapters."""
    clip = backbone.model
    context = clip.text.context_length
    if batch.prompt_tokens > context:
        raise InputError(
            f"--prompt-tokens {batch.prompt_tokens}: {config.backbone.name} reads {context}; use at most that"
        )
    adapters = make_method(config, backbone).adapters
    if not adapters:
        raise InputError(f"method={config.method}: trains nothing, so there is nothing to plan; use dac or lora")
    for adapter in adapters:
        adapter.dropout = 0.0  # its masks are drawn from a generator, which the meta device has not
    backbone.to(device="meta", dtype=dtype).train()
    if config.backbone.gradient_checkpointing:
        backbone.checkpoint_blocks()

    def forward() -> list[torch.Tensor]:
        size = clip.visual.image_size
        height, width = size if isinstance(size, tuple | list) else (size, size)
        image = clip.visual(torch.empty(batch.pictures, 3, height, width, dtype=dtype, device="meta"))
        tokens = torch.empty(batch.prompts, batch.prompt_tokens, dtype=torch.int64, device="meta")
        routing = backbone.routing["text"]
        routing.weights = routing.end = tokens[:, 0]
        routing.padding = tokens > 0
        return [F.normalize(features.float(), dim=-1) for features in (image, clip.text(tokens))]

    trace = trace_step(backbone, forward)
    return ModelShape(
        config.backbone.name,
        dtype,
        trace,
        _adapted(adapters),
        clip.visual.output_dim,
        config.pool.vote if isinstance(adapters[0], AdaptedLinear) else None,
        config.backbone.gradient_checkpointing,
    )


def _adapted(adapters: list[LowRankLinear]) -> list[Adapted]:
    groups: dict[int, int] = {}  # the parts of a fused projection share its linear and its input
    found = []
    for adapter in adapters:
        is_pool = isinstance(adapter, AdaptedLinear)
        rank = len(adapter.A)
        gates = rank * adapter.A.element_size() if is_pool and adapter.router_grad != "none" else 0
        found.append(
            Adapted(
                adapter.name,
                adapter.in_features,
                adapter.out_features,
                rank,
                adapter.merge_count if is_pool else rank,
                groups.setdefault(id(adapter.linear), len(groups)),
                # pictures have no counts, and those that stand for them are fp32
                gates and (rank * 4 if adapter.name.startswith("image") else gates),
            )
        )
    return found
