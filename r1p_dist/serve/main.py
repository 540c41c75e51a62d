"""Serve a page on this machine: drop a picture and see what a run's model says of it, before and after the run.

    r1p serve runs/mini_mtil
    r1p serve runs/mini_instruct --port 9000

RUN is what `r1p predict` takes. The page shows the most probable classes of each task, those of words that you type,
or, of a LLaVA, the answer to a question. Nobody but this machine reaches it (127.0.0.1); from elsewhere it takes a
tunnel, `ssh -L 8000:127.0.0.1:8000 HOST`. Ctrl-C ends it. Needs `pip install 'r1p-dist[serve]'`.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from r1p_dist.arguments import documented_parser
from r1p_dist.output import noise_in, terminal
from r1p_dist.run_files import LAUNCH_LOG
from r1p_dist.serve.port import address_of, check_installed, listening


def main(prog: str, argv: Sequence[str]) -> int:
    """Serves the page until it is ended."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of an export")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000; 0: one that is free")
    arguments = parser.parse_args(argv)
    from r1p_dist.predict.source import open_source

    source = open_source(arguments.run)
    check_installed(prog)
    with listening(arguments.port) as listener, TemporaryDirectory() as folder, noise_in(Path(folder) / LAUNCH_LOG):
        from r1p_dist.predict.model import PredictingModel
        from r1p_dist.serve.app import make_app
        from r1p_dist.serve.local import make_server, run_server

        server = make_server(make_app(PredictingModel(source)))
        print(f"{address_of(listener)}  (Ctrl-C ends it)", file=terminal(), flush=True)
        run_server(server, listener)
    return 0
