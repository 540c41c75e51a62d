"""Classify pictures, or ask about them, by the model of a run and by the model before it.

    r1p predict runs/mini_mtil photo.jpg
    r1p predict runs/mini_mtil photos --task fashion,playing_cards --top 3
    r1p predict runs/mini_mtil photo.jpg --classes 'cat,dog,hot dog' --json
    r1p predict runs/mini_mtil/export/open_clip photo.jpg
    r1p predict runs/mini_instruct photo.jpg --ask 'What is this?'

RUN is the folder of a run, finished or with a first task, or an export: `--to open_clip` of a CLIP, `--to hf` of a
LLaVA; an export has no model before it. All classes that are given compete, so the probabilities of all sum to one. The
most probable ones after the run are listed, and what was most probable before. A folder among the pictures stands for
those in it. A picture that cannot be read gets one line on standard error, and the exit code is 2 then.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from r1p_dist.arguments import documented_parser
from r1p_dist.errors import EXIT_INPUT, BadSampleError, InputError
from r1p_dist.output import error_terminal, noise_in, terminal
from r1p_dist.run_files import LAUNCH_LOG

if TYPE_CHECKING:
    from r1p_dist.predict.render import Found
    from r1p_dist.predict.request import Request
    from r1p_dist.predict.source import Source

_AT_ONCE = 32  # pictures between two changes of the weights


def main(prog: str, argv: Sequence[str]) -> int:
    """Prints the predictions and returns the exit code: 2 where a picture could not be read."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of an export")
    parser.add_argument("pictures", type=Path, metavar="PICTURE", nargs="+", help="a file, or a folder of pictures")
    parser.add_argument("--task", metavar="NAME,NAME", help="only the classes of these tasks; default: of all")
    parser.add_argument(
        "--classes", metavar="A,B,C", help="classes of your own, in the templates of --task or 'a photo of a {c}.'"
    )
    parser.add_argument("--ask", metavar="QUESTION", help="of a LLaVA: the question about each picture")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many classes are listed (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    arguments = parser.parse_args(argv)
    if arguments.top < 1:
        raise InputError(f"--top {arguments.top}: must be a number from 1")
    from r1p_dist.predict.pictures import find_pictures
    from r1p_dist.predict.render import as_json, as_text
    from r1p_dist.predict.request import make_request
    from r1p_dist.predict.source import open_source

    source = open_source(arguments.run)
    request = make_request(source, _names(arguments.task), _names(arguments.classes), arguments.ask)
    paths = list(find_pictures(arguments.pictures))
    entries, is_whole = [], True
    # a folder of its own: the run may be training, or another's
    with TemporaryDirectory() as folder, noise_in(Path(folder) / LAUNCH_LOG):
        for path, found in _predictions(source, request, paths):
            if isinstance(found, BadSampleError):
                is_whole = False
                print(f"error: {found}", file=error_terminal(), flush=True)
                entries.append({"picture": str(path), "error": str(found)})
                continue
            entries.append({"picture": str(path), **as_json(request, found, arguments.top)})
            if not arguments.json:
                print(as_text(str(path), request, found, arguments.top), file=terminal(), flush=True)
    if arguments.json:
        print(json.dumps({"model": str(arguments.run), "pictures": entries}, indent=2))
    return 0 if is_whole else EXIT_INPUT


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _predictions(
    source: "Source", request: "Request", paths: Sequence[Path]
) -> "Iterator[tuple[Path, Found | BadSampleError]]":
    """Yields what is found in each picture, or why it cannot be read; the first one that can loads the model."""
    from r1p_dist.predict.pictures import open_picture

    model = None
    for start in range(0, len(paths), _AT_ONCE):
        chunk = paths[start : start + _AT_ONCE]
        faults, examples = {}, []
        for path in chunk:
            try:
                picture = open_picture(path)
                if model is None:
                    from r1p_dist.predict.model import PredictingModel

                    model = PredictingModel(source)
                examples.append(model.encode(request, picture))
            except BadSampleError as error:
                faults[path] = error
        found = iter(model.predict(request, examples) if model is not None and examples else ())
        yield from ((path, faults[path] if path in faults else next(found)) for path in chunk)
