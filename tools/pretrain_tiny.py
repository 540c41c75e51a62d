"""Pretrain the small models that ship with the package, on real image-caption pairs.

    python tools/pretrain_tiny.py --pairs DIR --output r1p_dist/assets/tiny
    python tools/pretrain_tiny.py --kind llava --pairs DIR --clip r1p_dist/assets/tiny --output OUTPUT

DIR holds `pairs-*.tar`, `extra-*.tar.gz` (training) and `val-*.tar` (held out), each sample `KEY.jpg|png` plus
`KEY.txt`. OUTPUT becomes a folder with configuration, tokenizer, safetensors weights and the log. Plain open_clip loads
a `clip` as `local-dir:OUTPUT`; plain transformers loads a `llava` with `LlavaForConditionalGeneration` and
`AutoProcessor`.
"""

import argparse
from pathlib import Path

from pretraining import clip, llava

KINDS = {"clip": clip, "llava": llava}


def main() -> None:
    kind_parser = argparse.ArgumentParser(add_help=False)
    kind_parser.add_argument("--kind", choices=KINDS, default="clip", help="which model; each has its own options")
    kind = KINDS[kind_parser.parse_known_args()[0].kind]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kind_parser]
    )
    parser.add_argument("--pairs", type=Path, required=True, help="folder with the pair archives")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    kind.add_arguments(parser)
    kind.main(parser.parse_args())


if __name__ == "__main__":
    main()
