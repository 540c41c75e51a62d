"""Serve a page on this machine: drop a picture and see what a run's model says of it, before and after the run.

    r1p serve runs/mini_mtil
    r1p serve runs/mini_instruct --port 9000

RUN is what `r1p predict` takes. The page shows the most probable classes of each task, those of words that you type,
or, of a LLaVA, the answer to a question. Nobody but this machine reaches it (127.0.0.1); from elsewhere it takes a
tunnel, `ssh -L 8000:127.0.0.1:8000 HOST`. Ctrl-C ends it. Needs `pip install 'r1p-dist[serve]'`.
"""

import importlib.util
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from r1p_dist.arguments import documented_parser
from r1p_dist.errors import InputError
from r1p_dist.output import noise_in, terminal
from r1p_dist.run_files import LAUNCH_LOG

_ADDRESS = "127.0.0.1"
_CONNECTIONS = 32  # a browser opens six


def main(prog: str, argv: Sequence[str]) -> int:
    """Serves the page until it is ended."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run or of an export")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000; 0: one that is free")
    arguments = parser.parse_args(argv)
    from r1p_dist.predict.source import open_source

    source = open_source(arguments.run)
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"{prog} needs {' and '.join(missing)}: pip install 'r1p-dist[serve]'")
    with _listening(arguments.port) as listener, TemporaryDirectory() as folder, noise_in(Path(folder) / LAUNCH_LOG):
        from uvicorn import Config, Server

        from r1p_dist.predict.model import PredictingModel
        from r1p_dist.serve.app import make_app

        app = make_app(PredictingModel(source))
        print(f"http://{_ADDRESS}:{listener.getsockname()[1]}/  (Ctrl-C ends it)", file=terminal(), flush=True)
        config = Config(app, log_config=None, access_log=False, limit_concurrency=_CONNECTIONS, ws="none")
        with suppress(KeyboardInterrupt):
            Server(config).run(sockets=[listener])
    return 0


def _listening(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_ADDRESS, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"--port {port}: cannot be used: {error}; name another, or 0 for one that is free") from error
    return listener
