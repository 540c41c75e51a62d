"""Where a page is served on this machine, and what that needs; imports nothing of it."""

import importlib.util
import socket

from r1p_dist.errors import InputError

ADDRESS = "127.0.0.1"


def check_installed(prog: str) -> None:
    """Raises InputError where what serves pages is not installed."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise InputError(f"{prog} needs {' and '.join(missing)}: pip install 'r1p-dist[serve]'")


def listening(port: int) -> socket.socket:
    """Returns a socket of this machine's own address. InputError: the port is in use, or is none."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"--port {port}: cannot be used: {error}; name another, or 0 for one that is free") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Returns what a browser calls the socket."""
    return f"http://{ADDRESS}:{listener.getsockname()[1]}/"
