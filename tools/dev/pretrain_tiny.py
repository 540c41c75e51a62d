"""Pretrain the small models that ship with the package, on real image-caption pairs.

    python tools/dev/pretrain_tiny.py --pairs DIR --output r1p_dist/assets/tiny
    python tools/dev/pretrain_tiny.py --kind llava --pairs DIR --clip r1p_dist/assets/tiny --output OUTPUT

DIR holds `pairs-*.tar`, `extra-*.tar.gz` (training) and `val-*.tar` (held out), each sample `KEY.jpg|png` plus
`KEY.txt`. OUTPUT becomes a folder with configuration, tokenizer, safetensors weights and the log. Plain open_clip loads
a `clip` as `local-dir:OUTPUT`; plain transformers loads a `llava` with `LlavaForConditionalGeneration` and
`AutoProcessor`.
"""

import argparse
import importlib
from pathlib import Path


def main() -> None:
    kind_parser = argparse.ArgumentParser(add_help=False)
    kind_parser.add_argument("--kind", choices=KINDS, default="clip", help="which model; each has its own options")
    kind = kind_parser.parse_known_args()[0].kind
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kind_parser]
    )
    parser.add_argument("--pairs", type=Path, required=True, help="folder with the pair archives")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    KINDS[kind](parser)
    arguments = parser.parse_args()
    importlib.import_module(f"pretraining.{kind}").main(arguments)  # here, so that --help needs no torch


def _add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1700)
    parser.add_argument("--patch-dropout", type=float, default=0.7, help="share of a picture's patches left out")
    parser.add_argument("--whole-image-steps", type=int, default=200, help="last steps, without patch dropout")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)


def _add_llava_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", type=Path, required=True, help="folder of the small CLIP, for its image tower")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--caption-steps", type=int, default=2500, help="first steps, from captions, not pictures")
    parser.add_argument("--projector-steps", type=int, default=500, help="steps after those, with a frozen decoder")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures, each with six to eight questions")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--layers", type=int, default=4, help="blocks of the decoder")
    parser.add_argument("--feature-layer", type=int, default=-1, help="hidden state of the image tower to look at")
    parser.add_argument("--save-steps", type=int, default=400)


KINDS = {"clip": _add_clip_arguments, "llava": _add_llava_arguments}


if __name__ == "__main__":
    main()
