"""What every page that is served on this machine has in common: the server, and who may not ask it."""

import socket
from collections.abc import Mapping
from contextlib import suppress

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import Config, Server

from r1p_dist.serve.port import ADDRESS

HOSTS = (ADDRESS, "localhost")
_CONNECTIONS = 32  # a browser opens six
_HEADERS = {
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def make_server(app: ASGIApp) -> Server:
    """Returns a server that says nothing."""
    return Server(Config(app, log_config=None, access_log=False, limit_concurrency=_CONNECTIONS, ws="none"))


def run_server(server: Server, listener: socket.socket) -> None:
    """Serves until the server is told to end, or Ctrl-C."""
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def guarded(app: ASGIApp, policy: str) -> ASGIApp:
    """Returns the application for this machine's browsers alone. policy: the content security policy of its pages."""
    return Guard(TrustedHostMiddleware(app, allowed_hosts=list(HOSTS), www_redirect=False), policy)


class Guard:
    """Refuses what pages of other origins send, and gives every answer the policy and the headers of _HEADERS."""

    def __init__(self, app: ASGIApp, policy: str):
        self.app, self._headers = app, {**_HEADERS, "content-security-policy": policy}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in self._headers.items()]
                if message["status"] >= 400:
                    more.append((b"connection", b"close"))  # what is still on its way is not read
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        app = self.app
        if scope["type"] == "http" and _is_foreign(dict(scope["headers"])):
            app = PlainTextResponse("this page is for requests of its own alone", 403)
        await app(scope, receive, send_guarded)


def _is_foreign(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser says that another origin's page sent the request; browsers say so of all that are not GET."""
    origin = headers.get(b"origin")
    return origin is not None and origin != b"http://" + headers.get(b"host", b"")
