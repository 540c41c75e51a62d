"""Show the report of a run while it goes on, or of all runs in a folder, on a page of this machine.

    r1p watch runs/mini_mtil
    r1p watch runs --port 9000

Reads the runs' files alone, so it works for jobs of a cluster too, from any machine that sees the folder. The page asks
every few seconds for what is new. It ends with the runs, or with Ctrl-C; a run that was stopped and has a job may be
queued again, so it is waited for. Nobody but this machine reaches the page (127.0.0.1); from elsewhere it takes a
tunnel, `ssh -L 8000:127.0.0.1:8000 HOST`. Needs `pip install 'r1p-dist[serve]'`.
"""

from collections.abc import Sequence
from pathlib import Path

from r1p_dist.arguments import documented_parser
from r1p_dist.errors import InputError
from r1p_dist.run_files import REPORT_FILE
from r1p_dist.serve.port import address_of, check_installed, listening


def main(prog: str, argv: Sequence[str]) -> int:
    """Serves the page until all runs are over; 1 where one of them has failed."""
    parser = documented_parser(prog, __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="8000; 0: one that is free")
    arguments = parser.parse_args(argv)
    check_installed(prog)
    from r1p_dist.watch.runs import Watched

    watched = Watched(arguments.run)
    if not watched.states():
        raise InputError(f"{arguments.run}: no run in it; `r1p train` and `r1p submit` make one")
    if not watched.is_over():
        with listening(arguments.port) as listener:
            from r1p_dist.serve.local import make_server, run_server
            from r1p_dist.watch.app import make_app

            server = make_server(make_app(watched, lambda: setattr(server, "should_exit", True)))
            print(f"{address_of(listener)}  (Ctrl-C ends it, and so do the runs)", flush=True)
            run_server(server, listener)
    states = watched.states().values()
    for state in states:
        report = state.run_dir / REPORT_FILE
        print(f"{state.run_dir}: {state.state}{f'; report: {report}' if report.is_file() else ''}")
    return 1 if any(state.state in ("failed", "died") for state in states) else 0
