"""The command `r1p moments`."""

from collections.abc import Sequence
from pathlib import Path

from r1p_dist.arguments import RECIPE_HELP, documented_parser, parse_with_overrides
from r1p_dist.errors import InputError

_TEXT = """Measure the moments of a backbone's layer inputs and write them to a file, for `method: steady`.

    r1p moments --recipe mini_mtil --noise --out tiny.safetensors
    r1p moments --recipe mini_mtil --pairs pairs/*.tar --samples 1280 --out tiny.safetensors
    r1p moments --recipe RECIPE --stream my_stream --out moments.safetensors backbone.name=ViT-B-16

With options.anchor=FILE the moments count as tasks before the first one. The file has statistics of the inputs of the
layers in `targets`, and no picture or text. Noise needs no data: pictures of coloured noise, each with a text of
made-up words.
"""

_PAIRS = 1280


def main(prog: str, argv: Sequence[str]) -> int:
    """Measures moments on pairs or on a stream and writes them to a file."""
    parser = documented_parser(prog, _TEXT)
    parser.add_argument("--recipe", required=True, help=RECIPE_HELP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pairs", type=Path, nargs="+", metavar="TAR", help="shards of pictures with a .txt each")
    source.add_argument("--noise", action="store_true", help="pictures of noise, each with a text of made-up words")
    source.add_argument("--stream", help="a stream's training samples with their prompts")
    parser.add_argument("--samples", type=int, metavar="N", help="pairs; of shards evenly (1280)")
    parser.add_argument("--keep", type=int, default=128, metavar="K", help="directions of each layer's input (128)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments, words = parse_with_overrides(parser, argv)
    # it also takes the overrides that stand behind the shards
    shards = [path for path in arguments.pairs or () if path.is_file() or "=" not in str(path)]
    words += [str(path) for path in arguments.pairs or () if path not in shards]
    for name in ("samples", "keep"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be from 1")
    if arguments.stream is not None and arguments.samples is not None:
        raise InputError(f"--samples {arguments.samples}: --stream measures an epoch of its tasks; leave it out")
    from r1p_dist.recipes import load_config

    own = ["method=steady", "deepspeed.config=zero0"]
    stream = [] if arguments.stream is None else [f"stream={arguments.stream}", "order=null", "tasks=null"]
    config = load_config(arguments.recipe, [*own, *stream, *words])
    from r1p_dist.measuring.moments import measure_noise, measure_pairs, measure_stream

    count, keep, out = arguments.samples or _PAIRS, arguments.keep, arguments.out
    if arguments.stream is not None:
        seen = measure_stream(config, keep, out)
    elif arguments.noise:
        seen = measure_noise(config, count, keep, out)
    else:
        seen = measure_pairs(config, shards, count, keep, out)
    print(f"{arguments.out}: moments of {seen} samples")
    return 0
