"""Compare methods on one stream: run each with several seeds and tabulate.

    r1p compare --output runs/compare
    r1p compare --output runs/compare --methods lora,dac --seeds 0,1 train.iterations=50
    r1p compare --output runs/tune --methods lora,dac --tune train.lr=2e-3,5e-3,1e-2
    r1p compare --output runs/compare_instruct --recipe mini_instruct
    r1p compare --output runs/compare --methods all --tabulate

Every run is `r1p train` under DeepSpeed's launcher in DIR/<method>-seed<k>, its output in DIR/<method>-seed<k>.log; a
finished one is not run again, and one that another process is training is skipped, so that several commands on one DIR
share the work. What each method gets beside the recipe stands in tools/compare_<recipe>.yaml; `--methods all` adds each
shipped method that is no label there, as the recipe has it, and leaves out what does not go with the recipe. Results:
comparison.md, .json, .csv and .html in DIR; for instruction tasks also every task's value, beside that of the
most frequent training answer, and how many answers have the form asked for. `--tune` evaluates on the validation
split, with seed 0, and leaves the choice to you: copy it into the settings file. On the test split it does so where
`data.evaluate_on=test` asks for it, and the page says so. Exit code 1 when a run failed; the others are tabulated.
"""

from collections.abc import Sequence
from pathlib import Path

from r1p_dist.arguments import documented_parser


def main(prog: str, argv: Sequence[str]) -> int:
    """Runs and tabulates; 1 where a run failed."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--methods", help="labels, comma-separated, or all; default: those of the settings file")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", default="mini_mtil")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--settings", type=Path, help="YAML: label -> list of key=value; default: tools/compare_<recipe>.yaml"
    )
    parser.add_argument("--tune", metavar="KEY=V1,V2,...", help="compare values of one key on the validation split")
    parser.add_argument("--reference", metavar="LABEL", help="which one the others are subtracted from; default: dac")
    parser.add_argument("--tabulate", action="store_true", help="train nothing, tabulate what is finished")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run, over the settings file")
    arguments = parser.parse_intermixed_args(argv)
    from r1p_dist.compare.compare import compare

    return compare(arguments)
