"""Measures the moments of layers: on pairs of a picture and a text, on noise, or on a stream's training samples."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from tarfile import TarError

import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from r1p_dist.backbones import Backbone, Placement, load_backbone, weights_identity
from r1p_dist.config import RunConfig
from r1p_dist.data import Sample, Stream, train_loader
from r1p_dist.data.samples import BadSampleError, decode_picture, picture_suffix
from r1p_dist.errors import InputError, one_line
from r1p_dist.host_copy import on_device
from r1p_dist.kinds import kind_of
from r1p_dist.measuring.noise import noise_pairs
from r1p_dist.methods import make_method
from r1p_dist.moments.file import write_moments
from r1p_dist.protocol import InputMoments, Sketching
from r1p_dist.protocol.watchers import random_projection

_BATCH = 64
_SKETCH_ABOVE = 2048  # the width of what is measured without forming its moment


def measure_pairs(config: RunConfig, shards: Sequence[Path], count: int, keep: int, out: Path) -> int:
    """Measures `count` pairs (.jpg and .txt of one key), the first ones of each shard, and writes the file `out`.

    Returns how many there were. InputError: a backbone that is no CLIP, a shard or a pair that cannot be read.
    """
    share = -(-count // len(shards))
    pairs = islice((pair for shard in shards for pair in islice(_pairs(shard), share)), count)
    return _measure(config, pairs, "pairs of " + ", ".join(shard.name for shard in shards), keep, out)


def measure_noise(config: RunConfig, count: int, keep: int, out: Path) -> int:
    """Measures `count` pairs of noise and made-up words (`noise_pairs`) and writes the file `out`.

    Returns how many there were. InputError: a backbone that is no CLIP.
    """
    return _measure(config, noise_pairs(count), "pairs of noise", keep, out)


def _measure(config: RunConfig, pairs: Iterator[tuple[Sample, str]], source: str, keep: int, out: Path) -> int:
    if kind_of(config.backbone.kind).has_answers:
        raise InputError(
            f"a picture and a text are no input of backbone.kind={config.backbone.kind}; measure with --stream"
        )
    backbone, inputs = _watched(config, keep)
    encoder, seen = backbone.encoder(config.data), 0
    with inputs.watch():
        while batch := list(islice(pairs, _BATCH)):
            images = encoder.collate([encoder.evaluate(sample) for sample, _ in batch])["image"]
            image, _ = backbone(image=images.to(backbone.device))
            _, text = backbone(tokens=backbone.tokenize([text for _, text in batch]))
            _look(backbone, [image, text], seen)
            seen += len(batch)
        if not seen:
            raise InputError(f"{source}: no pair in it")
    _write(config, backbone, inputs, keep, f"{seen} {source}", out)
    return seen


def measure_stream(config: RunConfig, keep: int, out: Path) -> int:
    """Measures one epoch of all tasks of the configuration's stream, without augmentation, and writes the file `out`.

    Returns how many samples there were. InputError: as in training.
    """
    stream = Stream.load(config.stream, config.order, config.tasks)
    backbone, inputs = _watched(config, keep)
    backbone.check(stream)
    plain = config.data.model_copy(update={"augment": False})
    loader = train_loader(config, stream.tasks, None, backbone.encoder(plain))
    seen = 0
    with inputs.watch():
        for batches in on_device(loader.steps(), backbone.preparer(loader.prompts), backbone.device):
            backbone.begin_step(batches, config.train)
            for batch in batches:
                _look(backbone, backbone.outputs(backbone, batch), seen)
            seen += config.train.global_batch_size
    loader.check_faults()
    _write(config, backbone, inputs, keep, f"{seen} samples of {stream.name}", out)
    return seen


def _watched(config: RunConfig, keep: int) -> tuple[Backbone, InputMoments]:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    backbone = load_backbone(config.backbone, Placement(device))
    adapters = make_method(config, backbone).adapters
    backbone.train()  # with the updates in place, which add nothing yet
    for adapter in adapters:
        adapter.dropout, adapter.is_recorded = 0.0, True
    return backbone, InputMoments(backbone, adapters, with_gradients=True, sketching=Sketching(_SKETCH_ABOVE, keep))


def _look(backbone: Backbone, outputs: Sequence[torch.Tensor], number: int) -> None:
    """Lets the watcher see the gradients of what the model gave out."""
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    torch.autograd.grad(random_projection(outputs, number), trained, allow_unused=True)


def _pairs(shard: Path) -> Iterator[tuple[Sample, str]]:
    """Yields (picture, text) of a shard, opened here: webdataset would run an address as a command."""
    try:
        with shard.open("rb") as file:
            for sample in group_by_keys(tar_file_expander([{"url": str(shard), "stream": file}])):
                where = f"{shard}: key {sample['__key__']}"
                if "txt" not in sample:
                    raise BadSampleError(f"{where}: has no .txt; pairs are a picture and a text of one key")
                picture = decode_picture(sample[picture_suffix(sample.keys(), where)], where)
                yield Sample(sample["__key__"], (picture,)), sample["txt"].decode("utf-8", "replace").strip()
    except (OSError, TarError) as error:
        raise InputError(f"--pairs {shard}: cannot be read: {one_line(error)}") from error


def _write(config: RunConfig, backbone: Backbone, inputs: InputMoments, keep: int, source: str, out: Path) -> None:
    facts = {"backbone": weights_identity(config.backbone, backbone), "source": source}
    write_moments(out, inputs.moments, inputs.gradients, inputs.layers, keep, facts, inputs.sketches)
