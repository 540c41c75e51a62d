"""What the real engine does, to compare the planner with: the collectives and memory of steps on several ranks."""

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import open_clip
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig, LlavaForConditionalGeneration

from r1p_dist.backbones import Backbone, ClipBackbone, LlavaBackbone
from r1p_dist.backbones.conversations import IGNORED
from r1p_dist.checkpoint import save_memory, save_updates
from r1p_dist.config import RunConfig
from r1p_dist.data.samples import IMAGE_MARK, Sample, Turn
from r1p_dist.distributed import world_size
from r1p_dist.fit import train_step
from r1p_dist.kinds.llava import token_losses
from r1p_dist.kinds.llava.planner import Conversations
from r1p_dist.kinds.llava.weights import build_on_meta
from r1p_dist.methods import make_method
from r1p_dist.recipes import load_config
from tests import small_clip, small_llava, small_towers, small_vlms
from tests.stages import Stages, of_all_ranks

IMAGE_TOKEN = 3
PROMPTS = ["cat", "tall tree", "sea", "a red flag", "boat"]
KINDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "allgather_base": "all_gather",
    "reduce": "reduce",
    "reduce_scatter_base": "reduce_scatter",
    "broadcast": "broadcast",
    "barrier": "barrier",
}


class Recorder(TorchDispatchMode):
    """Counts (kind, bytes of the larger of input and output) of this rank's collectives, DeepSpeed's too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            sizes = [sum(leaf.nbytes for leaf in tree_leaves(a) if isinstance(leaf, torch.Tensor)) for a in args]
            self.found[KINDS[function.overloadpacket.__name__.strip("_")], max(sizes)] += 1
        return function(*args, **(kwargs or {}))

    def as_list(self) -> list[list]:
        return [[*key, count] for key, count in sorted(self.found.items())]


def make_backbone(config: RunConfig, sizes: dict, device: str = "cpu") -> Backbone:
    """Returns a model with random weights. sizes: those that differ from tests/small_clip.py's or small_llava.py's, or
    the family of one of tests/small_towers.py, small_llava.py or small_vlms.py."""
    is_llava, family = config.backbone.kind == "llava", sizes.get("family")
    torch.manual_seed(0)
    if is_llava and family is not None:
        module = small_vlms if family in small_vlms.FAMILIES else small_llava
        model, processor = module.make_model(family), module.make_processor(family)
        model = build_on_meta(model.config) if device == "meta" else model
    else:
        vision = small_llava.VISION | sizes.get("vision", {})
        processor = small_llava.make_processor(side=vision["image_size"], patch=vision["patch_size"])
        with torch.device(device), TemporaryDirectory() as folder:
            if family is not None:
                model = small_towers.make_model(family, Path(folder))
            else:
                model = _make_llava(sizes) if is_llava else _make_clip(sizes)
    if not is_llava:
        return ClipBackbone(model, small_clip.tokenize, {"size": 16})
    cache_bytes = int(config.backbone.feature_cache_gb * 1e9)
    is_sharded = config.deepspeed.config == "zero3"
    return LlavaBackbone(model, processor, cache_bytes, is_sharded)


def _make_clip(sizes: dict) -> torch.nn.Module:
    return open_clip.model.CustomTextCLIP(
        embed_dim=sizes.get("embed_dim", small_clip.CONFIG["embed_dim"]),
        vision_cfg=small_clip.VISION | sizes.get("vision", {}),
        text_cfg=small_clip.TEXT | sizes.get("text", {}),
        nonscalar_logit_scale=True,
    )


def _make_llava(sizes: dict) -> torch.nn.Module:
    vision = {"model_type": "clip_vision_model", **small_llava.VISION, **sizes.get("vision", {})}
    text = {"model_type": "llama", **small_llava.TEXT, **sizes.get("text", {})}
    config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=sizes.get("tied", False))
    config.image_token_id = IMAGE_TOKEN
    return LlavaForConditionalGeneration(config)


def measure_steps(rank: int, ranks: int, cases: list[tuple[dict, list[str]]]) -> list[list[list]]:
    """Returns per case the collectives of the fourth step of a run, as [kind, bytes, calls]."""
    # a few tokens in a chunk: the head is gathered no more often than planned
    token_losses.CHUNK_LOGITS = 5 * small_llava.TEXT["vocab_size"]
    return _of_each(rank, cases, _Run.record_step)


def measure_boundaries(rank: int, ranks: int, cases: list[tuple[dict, list[str]]]) -> list[list[list]]:
    """Returns per case the collectives from the last step of a task to the first of the next, without evaluations."""

    def boundary(run: _Run) -> list[list]:
        for _ in range(3):
            run.step()
        return run.next_task()

    return _of_each(rank, cases, boundary)


def measure_later_steps(rank: int, ranks: int, cases: list[tuple[dict, list[str]]]) -> list[list[list]]:
    """Returns per case the collectives of the fourth step of a second task."""

    def later_step(run: _Run) -> list[list]:
        run.step()
        run.next_task()
        return run.record_step()

    return _of_each(rank, cases, later_step)


def _of_each(
    rank: int, cases: list[tuple[dict, list[str]]], measure: "Callable[[_Run], list[list]]"
) -> list[list[list]]:
    found = []
    for sizes, overrides in cases:
        run = _Run(rank, sizes, overrides)
        found.append(measure(run))
        run.stages.engine.close()
    return found


def measure_memory(rank: int, ranks: int, cases: list[tuple[dict, list[str]]]) -> list[int]:
    """Returns per case the anonymous bytes that a run adds to a process at the peak of its second step."""
    return [_memory_of_run(rank, sizes, overrides) for sizes, overrides in cases]


def _memory_of_run(rank: int, sizes: dict, overrides: list[str]) -> int:
    # a first run in the same process, closed before, leaves behind what is not the model's: modules that DeepSpeed
    # imports late and the code that oneDNN makes for each shape of a product
    for is_measured in (False, True):
        gc.collect()
        before = _anonymous_bytes()
        run = _Run(rank, sizes, overrides)
        run.step()
        with _Peak() as peak:
            if is_measured:
                run.step()
        run.stages.engine.close()
        del run
    return peak.bytes - before


def _anonymous_bytes() -> int:
    # a counter: to add up the mappings, as smaps does, would hold the process that is measured up
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


class _Peak:
    """The highest anonymous memory while the context is open, looked at every few milliseconds."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._is_open = 0, True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self._is_open:
            self.bytes = max(self.bytes, _anonymous_bytes())
            time.sleep(0.003)

    def __exit__(self, *exception: object) -> None:
        self._is_open = False
        self._thread.join()


class _Run:
    """A run's steps without its data and evaluations."""

    def __init__(self, rank: int, sizes: dict, overrides: list[str]) -> None:
        self.config = load_config("mini_mtil_dac", overrides)
        self.sizes, self.rank, self.seen = sizes, rank, 0
        self.backbone = make_backbone(self.config, sizes)
        if self.config.backbone.gradient_checkpointing:
            self.backbone.checkpoint_blocks()
        self.method = make_method(self.config, self.backbone)
        if self.config.data.packing:
            self.backbone.encoder(self.config.data)  # makes the decoder attend to packed rows
        self.prepare = self.backbone.preparer(PROMPTS)
        self.generator = torch.Generator().manual_seed(rank)
        self.stages = Stages(self.method, self.config, lambda batches: _Scan(self, batches))
        self.stages.shares_memory = False
        self.stages.begin(0)

    def step(self) -> None:
        batches = [self.prepare(batch) for batch in self.micro_batches()]
        train_step(self.method, self.stages.trainer, batches, self.config.train)
        list(self.stages.agreement.findings())

    def record_step(self) -> list[list]:
        """Makes four steps; returns the last one's collectives."""
        for _ in range(4):
            with Recorder() as recorder:
                self.step()
        return recorder.as_list()

    def next_task(self) -> list[list]:
        """Goes on to the second task; returns the collectives."""
        stages, recorder = self.stages, Recorder()
        with recorder, TemporaryDirectory() as folder:
            stages.end()
            save_updates(Path(folder) / "adapter.safetensors", stages.updates[-1])
            save_memory(Path(folder) / "memory.safetensors", stages.memory[-1])
            stages.engine.close()
        stages.memory[-1] = of_all_ranks(stages.memory[-1])  # as the file has it
        with recorder:
            stages.begin(1)
        return recorder.as_list()

    def micro_batches(self) -> list[dict[str, torch.Tensor]]:
        """Returns this rank's part of a global batch."""
        micro_steps = self.config.train.gradient_accumulation_steps
        count = self.config.train.global_batch_size // micro_steps // world_size()
        make = self._pictures
        if self.config.backbone.kind == "llava":
            make = self._talks if "family" in self.sizes else self._conversations
        return [make(count) for _ in range(micro_steps)]

    def _pictures(self, count: int) -> dict[str, torch.Tensor]:
        return {
            "image": torch.randn(count, 3, *self.backbone.model.visual.image_size, generator=self.generator),
            "label": torch.randint(len(PROMPTS), (count,), generator=self.generator),
        }

    def _talks(self, count: int) -> dict[str, torch.Tensor]:
        """Conversations as a family's processor makes them, with a picture each on rank 0 and without on the others."""
        images: tuple[Image.Image, ...] = ()
        if self.rank == 0:
            pixels = torch.randint(256, (12, 20, 3), generator=self.generator, dtype=torch.uint8)
            images = (Image.fromarray(pixels.numpy()),)
        turns = (Turn("user", IMAGE_MARK * len(images) + "what is it?"), Turn("assistant", "a cat"))
        encoder = self.backbone.encoder(self.config.data)
        example = encoder.train(Sample("one", images, turns=turns), self.generator)
        return encoder.collate([example] * count)

    def _conversations(self, count: int) -> dict[str, torch.Tensor]:
        """Conversations with a picture each on rank 0 and without any on the others; packed ones of unlike length."""
        vision, pictures = self.backbone.config.vision_config, int(self.rank == 0)
        tokens, answer_tokens = self.sizes["tokens"]
        planned = Conversations(count, 1, tokens, answer_tokens, vision.image_size, self.sizes.get("mean_tokens"))
        place, ends = torch.arange(tokens), torch.tensor(planned.lengths)[:, None]
        ids = torch.randint(IMAGE_TOKEN + 1, 100, (count, tokens), generator=self.generator)
        ids[:, : pictures * (vision.image_size // vision.patch_size) ** 2] = IMAGE_TOKEN
        labels = torch.where((place < ends) & (place >= ends - answer_tokens), ids, IGNORED)
        size = (max(1, count * pictures), 3, vision.image_size, vision.image_size)
        pixels = torch.randn(size, generator=self.generator)
        self.seen += len(pixels)  # pictures are never the same, so their features are always missing
        return {
            "input_ids": ids,
            "labels": labels,
            "attention_mask": (place < ends).long(),
            "is_packed": self.config.data.packing,
            "prompt_length": ends.flatten() - answer_tokens,
            "image_counts": torch.full((count,), pictures),
            "pixel_values": pixels,
            "picture_digests": self.seen + torch.arange(len(pixels))[:, None].expand(-1, 4),
        }


class _Scan:
    """Stands for the loader of a scan."""

    prompts = PROMPTS

    def __init__(self, run: _Run, batches: int) -> None:
        self._run, self._batches = run, batches

    def steps(self) -> Iterator[list[dict[str, torch.Tensor]]]:
        for _ in range(self._batches):
            yield self._run.micro_batches()

    def check_faults(self) -> None:
        """All are good; a run sums a number for each sample."""
