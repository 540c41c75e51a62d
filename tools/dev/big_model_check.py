"""Train a big model of random weights on this machine and print what each phase takes in time and memory.

    python tools/dev/big_model_check.py --model ViT-L-14 --tasks 2 --steps 3
    python tools/dev/big_model_check.py --model ViT-bigG-14 --limit-gb 18 --json big.json
    python tools/dev/big_model_check.py --model llava-1.5-7b --limit-gb 22
    python tools/dev/big_model_check.py --model qwen2.5-vl-3b --plan

A real run of `deepspeed launchers/train.py` under ZeRO-3 in bf16, on a stream of few pictures: zero-shot evaluation,
steps, merge, evaluation, save. Memory is what all ranks hold together, from /proc (Linux): anonymous and shared memory,
and apart from it pages of files, which the system can drop at any time (weights that are mapped, the pristine copy).
--depth N cuts every tower, and the language model, to N blocks; timm's towers stay whole. --plan says beside it what
the planner counts for a step on these ranks. Exit code 0; 1 where the run fails or needs more than --limit-gb.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from r1p_dist.data import Stream
from r1p_dist.files import write_atomically
from r1p_dist.kinds.llava.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[2]
CLASSES, PICTURES = 2, {"train": 8, "test": 2}
# recipe -> the stream that it is tried on, and tasks of that
SOURCES = {
    "mini_mtil_dac": ("mini_mtil", ("fashion", "country_flags", "playing_cards", "planet_surface")),
    "mini_instruct": ("mini_instruct", ("yes_no", "which_flag", "read_card", "name_object")),
}
SETTINGS = (
    "deepspeed.config=zero3_low_memory train.precision=bf16 backbone.gradient_checkpointing=true log.every_steps=1"
).split()
NEW_TOKENS = 2  # of an answer: what each one costs is a pass through the whole model
# Gathered weights come and go between activations. In pieces of their own, mapped and unmapped, they leave no holes.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(4 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
LOOK_S = 0.25
GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; return 0 when the run finished within the limit."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="ViT-bigG-14", help=f"an open_clip name (ViT-bigG-14) or {', '.join(SHAPES)}"
    )
    parser.add_argument("--depth", type=int, metavar="N", help="blocks per tower (as many as the model has)")
    parser.add_argument("--tasks", type=int, default=1, choices=range(1, 5))
    parser.add_argument("--steps", type=int, default=2, help="of each task (2)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--limit-gb", type=float, metavar="GB", help="of anonymous and shared memory, all ranks together"
    )
    parser.add_argument("--plan", action="store_true", help="plan the memory of a step as well, which takes a while")
    parser.add_argument("--folder", type=Path, default=Path("runs/big_model_check"), help="emptied first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="laid over the run's configuration")
    arguments = parser.parse_args(argv)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    result = check(arguments)
    print_table(result)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(result, indent=1) + "\n")
    if result["exit_code"]:
        print(f"error: the run ended with exit code {result['exit_code']}; see {arguments.folder}/output.txt")
    return int(bool(result["exit_code"]) or result["peak_gb"] > (arguments.limit_gb or result["peak_gb"]))


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, and returns the phases in their order with their seconds and peaks of memory in GB (1e9 bytes)."""
    run_dir = arguments.folder / "run"
    recipe = "mini_instruct" if arguments.model in SHAPES else "mini_mtil_dac"
    source, tasks = SOURCES[recipe]
    stream = write_stream(arguments.folder / "stream", source, tasks[: arguments.tasks])
    settings = [*SETTINGS, f"train.iterations={arguments.steps}"]
    if arguments.model in SHAPES:
        model = write_llava(arguments.folder / "model", arguments.model, arguments.depth)
        settings += ["train.global_batch_size=2", f"backbone.name={model}"]
    else:
        model = write_clip(arguments.folder / "model", arguments.model, arguments.depth)
        settings += ["train.global_batch_size=4", f"backbone.name=local-dir:{model}"]
    overrides = [f"stream={stream}", *settings, *arguments.settings]
    planned = plan_step(recipe, overrides, arguments.ranks) if arguments.plan else None
    command = ["deepspeed", "--num_accelerators", str(arguments.ranks), str(ROOT / "launchers/train.py")]
    command += ["--recipe", recipe, f"stream={stream}", f"run_dir={run_dir}", *settings, *arguments.settings]
    started = time.monotonic()
    with (arguments.folder / "output.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | ALLOCATOR)
        phases = watch(process, run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text()) if (run_dir / "metrics.json").exists() else {}
    return {
        "model": arguments.model,
        "depth": arguments.depth,
        "ranks": arguments.ranks,
        "command": [word.replace(str(ROOT), ".") for word in command[:6]],
        "settings": settings[:-1] + arguments.settings,
        "trainable_parameters": metrics.get("trainable_parameters"),
        "accuracy": metrics.get("accuracy"),
        "seconds": round(time.monotonic() - started, 1),
        "peak_gb": max(phase["peak_gb"] for phase in phases),
        "planned_gb": planned,
        "phases": phases,
        "exit_code": process.returncode,
    }


def write_clip(folder: Path, name: str, depth: int | None) -> Path:
    """Writes the configuration of a model without weights; such a folder is a model whose weights are drawn."""
    from open_clip import get_model_config  # here, so that --help needs no torch

    config = get_model_config(name)
    if config is None:
        sys.exit(f"error: --model {name}: open_clip has no such model")
    vision, text = config["vision_cfg"], config["text_cfg"]
    for tower in (vision, text):
        if depth is not None and "layers" in tower:
            tower["layers"] = min(depth, tower["layers"])
    for key in ("hf_tokenizer_name", "tokenizer_kwargs"):  # of a hub; open_clip's own serves any vocabulary of its size
        text.pop(key, None)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def write_llava(folder: Path, name: str, depth: int | None) -> Path:
    """Writes configuration and processor of a model without weights, which are drawn as well."""
    from r1p_dist.kinds.llava.weights import read_config, read_processor

    config = read_config(name)
    if depth is not None:
        cut(config, depth)
    config.save_pretrained(folder)
    read_processor(name).save_pretrained(folder)
    return folder


def cut(config: Any, depth: int) -> None:
    """Cuts tower and decoder of a configuration to their first blocks."""
    for part in (config.vision_config, config.text_config):
        name = "depth" if hasattr(part, "depth") else "num_hidden_layers"
        setattr(part, name, min(depth, getattr(part, name)))
        for blocks in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if hasattr(part, blocks):
                setattr(part, blocks, [number for number in getattr(part, blocks) if number < depth])
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:depth]


def plan_step(recipe: str, overrides: Sequence[str], ranks: int) -> float:
    """Returns the GB of a step's tensors that the planner counts, of all ranks together."""
    from r1p_dist.engine import resolve_deepspeed
    from r1p_dist.planner.memory import training_memory
    from r1p_dist.planner.part import planner_part
    from r1p_dist.planner.zero import Zero
    from r1p_dist.precision import precision_type
    from r1p_dist.recipes import load_config

    config = load_config(recipe, overrides)
    part = planner_part(config.backbone.kind)
    sizes = longest_conversation(config) if config.backbone.kind == "llava" else longest_prompt(config)
    batch = part.micro_batch(config.train.global_batch_size // ranks, sizes)
    shape = part.describe(config, batch, precision_type(config.train.precision))
    memory = training_memory(shape, Zero.of(resolve_deepspeed(config, ranks)), ranks, touches_buffers=True)
    return round(ranks * memory.total / GB, 2)


def longest_conversation(config: Any) -> dict[str, int | None]:
    """Returns the sizes of the first task's longest conversation."""
    from r1p_dist.backbones.conversations import IGNORED
    from r1p_dist.data import ShardDataset
    from r1p_dist.kinds.llava.planner import build_llava

    encoder = build_llava(config.backbone).encoder(config.data)
    data = ShardDataset(Stream.load(config.stream).tasks[0].train, None)
    samples = [data.read(number) for number in range(len(data))]
    sample, example = max(((s, encoder.train(s, None)) for s in samples), key=lambda pair: len(pair[1]["input_ids"]))
    return {
        "--tokens": len(example["input_ids"]),
        "--answer-tokens": int((example["labels"] != IGNORED).sum()),
        "--pictures": len(sample.images),
        "--picture-side": max([1, *(max(image.size) for image in sample.images)]),
    }


def longest_prompt(config: Any) -> dict[str, int | None]:
    """Returns the sizes of the first task's prompts, with one template."""
    import open_clip

    from r1p_dist.kinds.open_clip.planner import build_clip

    task, backbone = Stream.load(config.stream).tasks[0], build_clip(config.backbone)
    tokenize = open_clip.SimpleTokenizer(context_length=backbone.model.context_length)
    tokens, _ = backbone.towers["text"].trim(tokenize([task.prompt(label) for label in range(CLASSES)]))
    return {"--prompts": CLASSES, "--prompt-tokens": tokens.shape[1]}


def write_stream(folder: Path, name: str, tasks: Sequence[str]) -> Path:
    """Writes a stream with a few samples of shipped tasks: of a few classes with one template each, or of questions."""
    folder.mkdir(parents=True)
    entries = []
    for task in Stream.load(name, tasks=tasks).tasks:
        entry: dict[str, Any] = {"name": task.name}
        for split, count in PICTURES.items():
            entry[split] = [f"{task.name}-{split}.tar"]
            copy_samples(getattr(task, split), folder / entry[split][0], count)
        if task.is_instruction:
            entry |= {"metric": task.metric, "max_new_tokens": NEW_TOKENS}
        else:
            (folder / f"{task.name}.txt").write_text("\n".join(task.class_names[:CLASSES]) + "\n")
            (folder / f"{task.name}-templates.txt").write_text(task.templates[0] + "\n")
            entry |= {"class_names": f"{task.name}.txt", "templates": f"{task.name}-templates.txt"}
        entries.append(entry)
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump({"name": "few_samples", "tasks": entries}))
    return path


def copy_samples(sources: Sequence[Path], target: Path, count: int) -> None:
    """Copies the first `count` samples, of classes those whose label is one of the first."""
    samples: dict[str, dict[str, tuple[tarfile.TarInfo, bytes]]] = defaultdict(dict)
    for source in sources:
        with tarfile.open(source) as shard:
            for member in shard:
                key, _, suffix = member.name.partition(".")
                samples[key][suffix] = (member, shard.extractfile(member).read())
    chosen = [sample for sample in samples.values() if "cls" not in sample or int(sample["cls"][1]) < CLASSES]
    with tarfile.open(target, "w") as shard:
        for sample in chosen[:count]:
            for member, content in sample.values():
                shard.addfile(member, io.BytesIO(content))


def watch(process: subprocess.Popen, run_dir: Path) -> list[dict[str, Any]]:
    """Returns the phases that the run went through until it ended."""
    phases: list[dict[str, Any]] = []
    since = time.monotonic()
    while process.poll() is None:
        name, now = phase_of(run_dir), time.monotonic()
        own, files = memory_of(process)
        if not phases or phases[-1]["phase"] != name:
            phases.append({"phase": name, "seconds": 0.0, "peak_gb": 0.0, "files_gb": 0.0})
        phases[-1]["seconds"] = round(phases[-1]["seconds"] + now - since, 1)
        phases[-1]["peak_gb"] = max(phases[-1]["peak_gb"], round(own / GB, 2))
        phases[-1]["files_gb"] = max(phases[-1]["files_gb"], round(files / GB, 2))
        since = now
        time.sleep(LOOK_S)
    return phases


def phase_of(run_dir: Path) -> str:
    try:
        status = json.loads((run_dir / "status.json").read_text())
    except FileNotFoundError:
        return "loading"
    if status["state"] == "training":
        return f"{status['task']}: step {(status['step'] or 0) + 1}"
    return f"{status['task']}: {status['state']}" if status["task"] else status["state"]


def memory_of(process: subprocess.Popen) -> tuple[int, int]:
    """Returns the bytes of anonymous and shared memory of all ranks together, and those of pages of files."""
    own = files = 0
    try:
        ranks = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0, 0
    for rank in ranks:
        try:
            content = Path(f"/proc/{rank.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended a moment ago
        sizes = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB$", content, re.MULTILINE)}
        own += sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)
        files += sizes.get("Pss_File", 0)
    return own, files


def print_table(result: dict[str, Any]) -> None:
    """Prints a line per phase."""
    print(f"{result['model']} on {result['ranks']} ranks")
    print(f"{'phase':<32} {'seconds':>8} {'peak GB':>8} {'files GB':>9}")
    for phase in result["phases"]:
        print(f"{phase['phase']:<32} {phase['seconds']:>8.1f} {phase['peak_gb']:>8.2f} {phase['files_gb']:>9.2f}")
    print(f"{'all':<32} {result['seconds']:>8.1f} {result['peak_gb']:>8.2f}")
    if result["planned_gb"] is not None:
        print(f"{'planned: the tensors of a step':<32} {'':>8} {result['planned_gb']:>8.2f}")


if __name__ == "__main__":
    sys.exit(main())
