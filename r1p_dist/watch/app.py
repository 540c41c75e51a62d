"""The server of `r1p watch`: pages made of the runs' files when they are asked for, anew only where those changed.

No word of a request ever becomes the name of a file: what is asked for is looked up among the runs there are.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1p_dist.page.render import POLICY, render_main, render_page
from r1p_dist.serve.local import guarded
from r1p_dist.watch.runs import Watched

REFRESH_S = 5.0
_GOODBYES = 4  # refreshes that the runs have ended for, before the server does
_PATIENCE_S = 60  # until a page that is busy with its figures asks again and is told so


def make_app(watched: Watched, on_over: Callable[[], None], refresh_s: float = REFRESH_S) -> ASGIApp:
    """Returns the application. on_over: called when all runs have ended and a page that is open has shown it."""
    turn = asyncio.Lock()
    kept: dict[str | None, tuple[str, str]] = {}
    rounds_over, has_asked, is_told = 0, False, False

    def find(path: str) -> tuple[str | None, str] | None:
        """Returns the run's name and its tag; None where there is no such run."""
        name = None if not path and not watched.is_one else path or "."
        return (name, watched.tag(name)) if name is None or name in watched.runs() else None

    def main_of(name: str | None, tag: str) -> str:
        if kept.get(name, ("", ""))[0] != tag:
            kept[name] = tag, render_main(watched.page(name))
        return kept[name][1]

    async def show(request: Request) -> Response:
        nonlocal has_asked, is_told
        headers = {"x-ended": "yes"} if rounds_over else {}  # before the files are looked at: they are the last ones
        found = await run_in_threadpool(find, request.path_params["path"])
        if found is None:
            return PlainTextResponse("no such run", 404)
        name, tag = found
        if "x-part" not in request.headers:
            page = await run_in_threadpool(watched.page, name)
            return HTMLResponse(await run_in_threadpool(render_page, page, refresh_s))
        headers["x-tag"] = tag
        has_asked, is_told = True, is_told or "x-ended" in headers
        if request.query_params.get("have") == tag:
            return Response(status_code=204, headers=headers)
        async with turn:
            return HTMLResponse(await run_in_threadpool(main_of, name, tag), headers=headers)

    async def end_with_the_runs() -> None:
        nonlocal rounds_over
        while rounds_over < _GOODBYES or (has_asked and not is_told and rounds_over * refresh_s < _PATIENCE_S):
            await asyncio.sleep(refresh_s)
            rounds_over = rounds_over + 1 if await run_in_threadpool(watched.is_over) else 0
        on_over()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(end_with_the_runs())
        yield
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    app = Starlette(routes=[Route("/{path:path}", show)], lifespan=lifespan)
    return guarded(app, f"{POLICY}; frame-ancestors 'none'")
