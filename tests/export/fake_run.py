"""Run folders made by hand: a configuration, random updates for some tasks and metrics that were never measured."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from r1p_dist.backbones import ClipBackbone, Placement, load_backbone
from r1p_dist.checkpoint import load_updates
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config

TASKS = ("fashion", "country_flags")
SIZE = 2.0  # of the random factors: large enough to turn many logits around
SMALL_MODEL = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = [
    "a photo of a cat",
    "two dogs",
    "an umbrella, and a very long prompt that does not fit in the context at all",
]


def write_model(folder: Path, config: dict) -> Path:
    """Writes a folder of open_clip with random weights and biases; returns it."""
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_image=False, pretrained_text=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "text_decoder.text_projection":  # open_clip leaves a CoCa's as it finds it
                parameter.normal_()
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_run(
    folder: Path, overrides: Sequence[str] = (), tasks: Sequence[str] = TASKS, ranks: Sequence[int] = (2, 2)
) -> Path:
    """Writes a run folder whose tasks merged random updates of these ranks; returns it."""
    config = load_config("mini_mtil_dac", overrides)
    folder.mkdir()
    (folder / "config.yaml").write_text(config.dump())
    backbone = load_backbone(config.backbone, Placement(torch.device("meta")))
    generator = torch.Generator().manual_seed(1)
    adapters = make_method(config, backbone).adapters
    for index, (task, rank) in enumerate(zip(tasks, ranks, strict=True)):
        tensors = {}
        for adapter in adapters:
            size = SIZE * (adapter.in_features * adapter.out_features) ** -0.25 / adapter.scaling**0.5
            tensors[f"{adapter.name}.A"] = size * torch.randn(rank, adapter.in_features, generator=generator)
            tensors[f"{adapter.name}.B"] = size * torch.randn(adapter.out_features, rank, generator=generator)
            tensors[f"{adapter.name}.scaling"] = torch.tensor(adapter.scaling, dtype=torch.float64)
        at = folder / "adapters" / f"{index:02d}-{task}"
        at.mkdir(parents=True)
        save_file(tensors, at / "adapter.safetensors")
        (at / "adapter.json").write_text(json.dumps({"task": task}))
    metrics = {"tasks": list(TASKS), "accuracy": [[10.0, 20.0], [41.25, 19.0], [37.5, 52.5]], "method": config.method}
    metrics |= {"transfer": 19.0, "average": None, "last": 45.0}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def library_model(run: Path, tasks: Sequence[int]) -> ClipBackbone:
    """Returns the library's own model of a run with the updates of these tasks merged."""
    # a later test may have a run in the same place
    return _library_model(run, tuple(tasks), (run / "config.yaml").stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _library_model(run: Path, tasks: tuple[int, ...], made: int) -> ClipBackbone:
    config = load_config(run / "config.yaml")
    backbone = load_backbone(config.backbone)
    method = make_method(config, backbone)
    folders = sorted(run.glob("adapters/*"))
    places = method.update_places()
    method.set_merged([load_updates(folders[i] / "adapter.safetensors", places) for i in tasks])
    return backbone.eval()


def images(backbone: ClipBackbone) -> torch.Tensor:
    return torch.randn(4, 3, *backbone.preprocess["size"], generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def library_logits(backbone: ClipBackbone) -> torch.Tensor:
    """Returns (pictures, prompts)."""
    image, text = backbone(images(backbone), backbone.tokenize(PROMPTS))
    return backbone.logit_scale * image @ text.T


def expected_logits(run: Path, tasks: Sequence[int]) -> torch.Tensor:
    """Returns the logits of the library's merged model, which the updates have changed beyond doubt."""
    logits = library_logits(library_model(run, tasks))
    if tasks:
        assert (logits - library_logits(library_model(run, []))).abs().max() > 1
    return logits
