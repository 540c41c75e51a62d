"""The arguments of every benchmark, apart from what measures, so that --help needs no torch."""

import argparse
from pathlib import Path

TYPES = ("float32", "bfloat16")
VOTES = ("global", "lagged", "local")


def _step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-16", help="tiny, an open_clip name or llava-1.5-7b (random weights)")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step, of ten classes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, in all variants")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the input of the updates, ours and PEFT's")
    parser.add_argument("--dropout-kind", choices=("element", "feature"), default="element", help="ours")
    parser.add_argument("--against", default="limit,peft", help="limit, compiled, steady, peft, or several")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds")


def _llava(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="small_llava",
        help="llava-1.5-7b, or small_ or tiny_ with llava, qwen2_vl, qwen2_5_vl, qwen3_vl or internvl (random weights)",
    )
    parser.add_argument("--batch", type=int, default=4, help="conversations of a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=TYPES, default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved rounds")
    parser.set_defaults(dropout=0.0, dropout_kind="element")


def _launches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-16", help="an open_clip name")
    parser.add_argument("--compiled", action="store_true", help="count compiled blocks of tiny, too (some minutes)")


def _precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scales", type=float, nargs="+", default=[1e-5, 1e-4, 1e-3], help="of B")


def _inference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ViT-B-16", help="tiny or an open_clip name (random weights)")
    parser.add_argument("--batch", type=int, default=8, help="images and prompts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")


def _tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny or an open_clip name (random weights)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50], help="report after so many tasks")


def _boundary(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    parser.add_argument("--recipe", default="mini_mtil")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 50], help="past tasks")


def _scaling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny or an open_clip name (random weights)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step over all ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--votes", nargs="+", choices=VOTES, default=list(VOTES))
    parser.add_argument("--zero", type=int, default=2, choices=range(4), help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=320, help="pictures")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--input", type=int, default=224, help="side of the model's input, in pixels")
    parser.add_argument("--pairs", type=int, default=7, help="interleaved rounds")
    parser.add_argument("--steps", type=int, default=20, help="training steps for data_wait; 0 leaves it out")


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", help="tiny or an open_clip name (random weights)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=15, help="interleaved rounds")


def _table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="holds step*.json and so on, and of tools/gpu_check.py gpu/*.json")


BENCHMARKS = {
    "step": _step,
    "llava": _llava,
    "launches": _launches,
    "precision": _precision,
    "inference": _inference,
    "tasks": _tasks,
    "boundary": _boundary,
    "scaling": _scaling,
    "data": _data,
    "checkpoint": _checkpoint,
    "table": _table,
}
