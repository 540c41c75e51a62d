"""Export the model of a finished run, or its tasks' updates as adapters.

    r1p export runs/mini_mtil --to open_clip
    r1p export runs/mini_mtil --to hf --output clip-hf --dtype bf16
    r1p export runs/mini_mtil --to peft --tasks fashion,country_flags --with-base
    r1p export runs/mini_instruct --to hf
    r1p export runs/mini_mtil --to open_clip --push me/tiny-clip-mini-mtil

open_clip: a folder for `open_clip.create_model("local-dir:FOLDER")`, of a CLIP alone. hf: one for transformers, for
`CLIPModel.from_pretrained(FOLDER)` or, of a LLaVA, `AutoModelForImageTextToText.from_pretrained(FOLDER)`. peft: a LoRA
adapter per task and one of all, for `PeftModel.from_pretrained(base, FOLDER/all)`. Every folder has a model card and
tasks.json, the class names for `r1p predict`. By default it is RUN_DIR/export/FORMAT. With --push it goes to the hub of
Hugging Face as well.
"""

from collections.abc import Sequence
from pathlib import Path

from r1p_dist.arguments import documented_parser
from r1p_dist.export.formats import FORMATS, TYPE_NAMES
from r1p_dist.output import noise_in
from r1p_dist.run_files import LAUNCH_LOG


def main(prog: str, argv: Sequence[str]) -> int:
    """Writes the folder and prints where it is."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--tasks", metavar="NAME,NAME", help="only these tasks; default: all that are finished")
    parser.add_argument(
        "--dtype",
        choices=TYPE_NAMES,
        help="what the weights are rounded to; default: fp32, which keeps them, and for a LLaVA what its files have",
    )
    parser.add_argument("--with-base", action="store_true", help="peft: write the base model beside the adapters")
    parser.add_argument("--push", metavar="NAME", help="upload the folder to the hub, a new repository is private")
    arguments = parser.parse_args(argv)
    if arguments.push is not None:
        from r1p_dist.export.hub import check_login, push

        check_login(arguments.push)
    with noise_in(arguments.run_dir / LAUNCH_LOG):
        from r1p_dist.export.run import export_run

        folder = export_run(
            arguments.run_dir,
            arguments.to,
            arguments.output,
            tasks=None if arguments.tasks is None else arguments.tasks.split(","),
            dtype=arguments.dtype,
            with_base=arguments.with_base,
        )
    print(folder)
    if arguments.push is not None:
        print(push(folder, arguments.push))
    return 0
