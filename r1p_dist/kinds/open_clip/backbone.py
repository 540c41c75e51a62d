"""CLIP models of open_clip: loading, features, the contrastive training loss, and where adapters go.

The towers stay the modules of open_clip, timm or transformers, called as modules, so that ZeRO-3's hooks see every
parameter; what is replaced in them for adapters is in towers.py.
"""

import difflib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from r1p_dist.adapters import LowRankLinear, Routing
from r1p_dist.backbones.backbone import Batch
from r1p_dist.backbones.compiling import compile_blocks
from r1p_dist.backbones.recompute import checkpoint_forward
from r1p_dist.backbones.slots import Slot, fill
from r1p_dist.backbones.weights import Placement, draw, place
from r1p_dist.config import BackboneConfig, DataConfig, TrainConfig
from r1p_dist.data import Encoder, PictureEncoder, Stream
from r1p_dist.data.transforms import evaluation_transform, train_transform
from r1p_dist.distributed import StartedGather, start_gather
from r1p_dist.errors import InputError, one_line
from r1p_dist.kinds.open_clip import TOWERS
from r1p_dist.kinds.open_clip.towers import open_towers
from r1p_dist.kinds.open_clip.weights import hub_parts, map_weights, model_source, weights_file
from r1p_dist.losses import contrastive_loss, sigmoid_loss


class ClipBackbone(nn.Module):
    """A CLIP model of open_clip, frozen, with its tokenizer and preprocessing.

    forward(image, tokens, counts, end) returns unit-norm features: image (n, 3, H, W) -> (n, d), tokens (m, context)
    -> (m, d), or None for what was not given. counts (m,): how often each prompt occurs in the batch, for the vote.
    end (m,): the place of each end token, where the tokens were trimmed to the longest prompt already.
    """

    kind = "open_clip"

    def __init__(self, model: nn.Module, tokenizer: Callable, preprocess: dict):
        super().__init__()
        self.towers = open_towers(model)
        self.model = model.requires_grad_(False)
        self.tokenizer, self.preprocess = tokenizer, preprocess
        self.routing = {name: Routing(auto=tower.guide) for name, tower in self.towers.items()}
        self.logit_scale = math.exp(_number(model, "logit_scale"))
        # with one, the model was trained with a sigmoid loss, and so it is here
        self.logit_bias = None if getattr(model, "logit_bias", None) is None else _number(model, "logit_bias")
        self._asks_for_gather = False
        self._image_gather: StartedGather | None = None
        self.train()

    @property
    def train_transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """What training does to a picture, a random crop: RGB picture -> (3, H, W), by torch's generator."""
        return train_transform(self.preprocess, augment=True)

    @property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """What evaluation does to a picture: RGB picture -> (3, H, W)."""
        return evaluation_transform(self.preprocess)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of both towers."""
        return [block for tower in self.towers.values() for block in tower.blocks]

    def train(self, mode: bool = True) -> "ClipBackbone":
        """Puts adapters, and open_clip's own blocks around them, into training or eval mode."""
        super().train(mode)
        for tower in self.towers.values():
            tower.train(mode)
        return self

    def compile_blocks(self) -> None:
        """Compiles the training forward of every block, by torch.compile; before `checkpoint_blocks`.

        InputError: blocks that are not open_clip's own.
        """
        self._need_own_blocks("train.compile", TOWERS)
        compile_blocks(self.blocks)

    def checkpoint_blocks(self) -> None:
        """Makes every block run its forward again in the backward instead of keeping its activations."""
        for block in self.blocks:
            checkpoint_forward(block)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def tower_parameters(self, towers: Sequence[str]) -> dict[str, nn.Parameter]:
        """Returns the weights of towers by their names in `named_parameters`."""
        prefixes = tuple({"image": "model.visual.", "text": "model.text."}[tower] for tower in towers)
        return {name: parameter for name, parameter in self.named_parameters() if name.startswith(prefixes)}

    def attach(
        self, make: Callable[[Slot, Routing], LowRankLinear], towers: Sequence[str], layers: Sequence[str]
    ) -> list[LowRankLinear]:
        """Puts `make(slot, routing)` on its linears; returns the adapters tower by tower, block by block, in the order
        q k v out gate fc1 fc2. A slot that has an adapter gets the new one. InputError: a tower has none of these.
        """
        return fill((slot for tower in towers for slot in self.towers[tower].slots(layers)), self.routing, make)

    def put_beside(self, make: Callable[[int, Routing], nn.Module], towers: Sequence[str]) -> dict[str, nn.Module]:
        """Puts `make(width, the tower's routing)` beside the MLP of every block; returns them by tower.block.

        They get what the MLP's LayerNorm gets, (batch, tokens, width), and what they return is added to the block's.
        InputError: blocks that are not open_clip's own.
        """
        self._need_own_blocks("modules beside the MLP", towers)
        found = {}
        for tower in towers:
            for number, block in enumerate(self.towers[tower].blocks):
                block.beside = make(block.attn.out_proj.in_features, self.routing[tower]).to(self.device)
                found[f"{tower}.{number}"] = block.beside
        return found

    def _need_own_blocks(self, what: str, towers: Sequence[str]) -> None:
        for name in towers:
            if not self.towers[name].is_own:
                raise InputError(
                    f"backbone: {what}: not for the {name} tower, {self.towers[name].described}; it needs open_clip's "
                    "own blocks (ViT-* models)"
                )

    def forward(
        self,
        image: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        image_features = text_features = None
        if image is not None:
            image = image.to(next(self.model.visual.parameters()).dtype)
            image_features = _unit_norm(self.model.visual(image))
            if self._asks_for_gather:
                self._asks_for_gather = False
                self._image_gather = start_gather(image_features)  # travels while the text tower runs
        if tokens is not None:
            tower, routing = self.towers["text"], self.routing["text"]
            if end is None:
                tokens, end = tower.trim(tokens)
            routing.weights, routing.end = counts, end
            routing.real = routing.padding = tower.real(tokens, end)
            text_features = _unit_norm(self.model.text(tokens))
        return image_features, text_features

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Returns the prompts' token ids (n, context) on the model's device."""
        return self.tokenizer(list(prompts)).to(self.device)

    def check(self, stream: Stream) -> None:
        """Raises InputError for a stream or a model that `loss` does not fit, before any training."""
        if stream.tasks[0].is_instruction:
            raise InputError(
                f"stream={stream.path}: has conversations, which backbone.kind=open_clip cannot answer; use "
                "backbone.kind=llava or a stream of classes"
            )

    def encoder(self, data: DataConfig) -> Encoder:
        """Returns what makes batches {"image": (n, 3, H, W)} of samples, with open_clip's transforms."""
        return PictureEncoder(self.preprocess, data.augment)

    def preparer(self, prompts: Sequence[str]) -> Callable[[Batch], Batch]:
        """Returns what gives a micro batch {"image", "label"} on the host its distinct prompts beside.

        prompts: of each label; equal prompts become one label. What it adds: "tokens" (m, longest), "end" (m,),
        "counts" (m,), how often each occurs, and "place" (n,), which of them each sample has.
        """
        tokens_of = self.tokenizer(list(prompts))  # on the host, as labels are
        first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
        label_of = torch.tensor([first[prompt] for prompt in prompts])

        def prepare(batch: Batch) -> Batch:
            label = label_of[batch["label"]]
            distinct, place, counts = label.unique(return_inverse=True, return_counts=True)
            tokens, end = self.towers["text"].trim(tokens_of[distinct])
            return batch | {"label": label, "tokens": tokens, "end": end, "counts": counts, "place": place}

        return prepare

    def begin_step(self, batches: Sequence[Batch], train: TrainConfig) -> None:
        """Does nothing: the contrastive loss of a micro batch needs no other."""

    def outputs(self, model: Callable, batch: Batch) -> list[torch.Tensor]:
        """Returns the features of a micro batch's pictures and of its distinct prompts."""
        return list(model(image=batch["image"], tokens=batch["tokens"], counts=batch["counts"], end=batch["end"]))

    def loss(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns the contrastive loss of a micro batch that a `preparer` has seen, or the sigmoid loss where the model
        has a bias for it; each distinct prompt is encoded once.

        model: this backbone, or the DeepSpeed engine around it.
        """
        return self._loss(model, batch, "mean")

    def sample_losses(self, model: Callable, batch: Batch) -> torch.Tensor:
        """Returns each sample's part (n,) of what `loss` is the mean of."""
        return self._loss(model, batch, "none")

    def _loss(self, model: Callable, batch: Batch, reduction: str) -> torch.Tensor:
        self._asks_for_gather = torch.is_grad_enabled()  # of this forward alone: a method may run others
        image, text = model(image=batch["image"], tokens=batch["tokens"], counts=batch["counts"], end=batch["end"])
        gather, self._image_gather = self._image_gather, None  # the features of all ranks shall not outlive the loss
        text = text[batch["place"]]
        if self.logit_bias is None:
            return contrastive_loss(image, text, batch["label"], self.logit_scale, gather, reduction)
        return sigmoid_loss(image, text, batch["label"], self.logit_scale, self.logit_bias, gather, reduction)


def _unit_norm(features: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns what a tower gave out, (n, d), at unit norm, fp32; towers of a CoCa give their tokens beside it."""
    return F.normalize((features[0] if isinstance(features, tuple) else features).float(), dim=-1)


def _number(model: nn.Module, name: str) -> float:
    """Returns a temperature of a model; a number, because DeepSpeed casts buffers to the model's precision."""
    parameter = getattr(model, name)
    return draw(model, name, torch.empty(parameter.shape)).item() if parameter.is_meta else parameter.item()


def load(config: BackboneConfig, placement: Placement | None, compiles: bool) -> ClipBackbone:
    """Loads the model that a configuration names, as `load_clip`."""
    return load_clip(
        config.name,
        config.pretrained,
        force_quick_gelu=config.force_quick_gelu,
        gradient_checkpointing=config.gradient_checkpointing,
        placement=placement,
        compiles=compiles,
    )


def weights_files(config: BackboneConfig) -> list[Path]:
    """Returns the file of a model's weights; none for random ones."""
    file = weights_file(config.name, config.pretrained)
    return [] if file is None else [file]


def load_clip(
    name: str,
    pretrained: str | None = None,
    *,
    force_quick_gelu: bool = False,
    gradient_checkpointing: bool = False,
    placement: Placement | None = None,
    compiles: bool = False,
) -> ClipBackbone:
    """Loads a CLIP model: `tiny`, any open_clip name with a `pretrained` tag or a local weights file, `local-dir:…`,
    `hf-hub:…`.

    Without `pretrained` a named model has random weights, with a warning. placement: where the weights go; on the CPU
    in fp32 by default. compiles: the training forward of every block, by torch.compile. Raises InputError for an
    unknown model or tag, a missing file, weights of another shape, and weights trained with another activation
    (QuickGELU) than the model's.
    """
    source = model_source(name)
    if name == "tiny":
        if pretrained is not None:
            raise InputError(f"backbone.pretrained={pretrained}: the model tiny brings its own weights; leave it out")
    elif ":" not in name:
        _check_name_and_weights(name, pretrained, force_quick_gelu)
    with explain_faults(name, pretrained):
        model = build_on_meta(source, pretrained, force_quick_gelu)
        file = weights_file(name, pretrained)
        if file is not None:
            model.load_state_dict(map_weights(file, model), assign=True)
        else:
            logging.getLogger(__name__).warning("backbone %s has random weights: backbone.pretrained is not set", name)
        tokenizer = open_clip.get_tokenizer(source)
    backbone = ClipBackbone(model, tokenizer, open_clip.get_model_preprocess_cfg(model))
    place(backbone, placement or Placement())
    if compiles:
        backbone.compile_blocks()
    if gradient_checkpointing:
        backbone.checkpoint_blocks()
    return backbone


def build_on_meta(source: str, pretrained: str | None, force_quick_gelu: bool) -> nn.Module:
    """Returns an open_clip model without weights: its parameters are on the meta device, its buffers are not.

    InputError: a tower that computes its buffers from where its weights are.
    """
    with warnings.catch_warnings(), _parameters_on_meta(), _without_words_about_missing_weights():
        warnings.filterwarnings("ignore", message="These pretrained weights were trained with QuickGELU")
        # text tower as a module, logit_scale with a dimension: DeepSpeed's hooks and broadcasts need them
        model = open_clip.create_model(
            source,
            pretrained,
            load_weights=False,
            pretrained_image=False,
            pretrained_text=False,
            force_quick_gelu=force_quick_gelu,
            force_custom_text=True,
            nonscalar_logit_scale=True,
        )
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise InputError(
                f"backbone: its {name} comes from where its weights are, so it cannot be built without any"
            )
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts every parameter on the meta device when a module gets it, before its first values are drawn.

    `torch.device("meta")` would take the values of buffers as well: masks, places, statistics. Nothing is moved
    meanwhile: open_clip moves whole models, which those on the meta device refuse. A module that is called while
    another one is built, for the shape of what it gives, computes on the meta device alone.
    """
    plain = {name: getattr(nn.Module, name) for name in ("register_parameter", "to", "__call__")}

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        plain["register_parameter"](module, name, parameter)

    def call(module: nn.Module, *args: torch.Tensor) -> torch.Tensor:
        buffers = {name: buffer.to("meta") for name, buffer in module.named_buffers()}
        if all(buffer.is_meta for buffer in module.buffers()):
            return plain["__call__"](module, *(tensor.to("meta") for tensor in args))
        return torch.func.functional_call(module, buffers, args)

    nn.Module.register_parameter, nn.Module.to, nn.Module.__call__ = register, lambda module, *_, **__: module, call
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(nn.Module, name, function)


@contextmanager
def _without_words_about_missing_weights() -> Iterator[None]:
    """open_clip warns that there are none; they come later."""

    def is_other(record: logging.LogRecord) -> bool:
        return "No pretrained weights loaded" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(is_other)
    try:
        yield
    finally:
        root.removeFilter(is_other)


@contextmanager
def explain_faults(name: str, pretrained: str | None) -> Iterator[None]:
    """Turns what open_clip and torch raise into one line."""
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        reason = one_line(error) or type(error).__name__
        if type(error) is OSError and (parts := hub_parts(model_source(name))):
            places = " and ".join(f"its {part} ({place})" for part, place in parts.items())
            reason = f"{places} is on the hub and not on this machine; HF_HUB_OFFLINE=0 lets it be fetched"
        raise InputError(f"backbone.name={name} backbone.pretrained={pretrained}: cannot load: {reason}") from error


def _check_name_and_weights(name: str, pretrained: str | None, force_quick_gelu: bool) -> None:
    config = open_clip.get_model_config(name)
    if config is None:
        nearest = difflib.get_close_matches(name, ["tiny", *open_clip.list_models()], n=3)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise InputError(f"backbone.name={name}: open_clip has no such model{hint}")
    if pretrained is None or Path(pretrained).is_file():
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise InputError(
            f"backbone.pretrained={pretrained}: neither a file nor a tag of {name}; tags: {', '.join(tags) or 'none'}"
        )
    trained_quick = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu", False))
    model_quick = bool(config.get("quick_gelu", False)) or force_quick_gelu
    if trained_quick != model_quick:
        remedy = (
            "use the model's -quickgelu name or backbone.force_quick_gelu=true"
            if trained_quick
            else "use the model's name without -quickgelu and backbone.force_quick_gelu=false"
        )
        raise InputError(
            f"backbone.pretrained={pretrained}: trained with{'' if trained_quick else 'out'} QuickGELU; "
            f"the model {name} has it {'on' if model_quick else 'off'}; {remedy}"
        )
