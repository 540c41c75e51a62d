"""The server of the page: three fixed files, what the model is, and a prediction for a picture that is sent.

It is for the person at this machine. It answers to this machine's own names alone, so no page elsewhere reaches it by
another (DNS rebinding), refuses what a page of another origin sends, and cannot be framed. No path and no word of a
request ever becomes the name of a file. A picture is read as a shard's is, JPEG, PNG or WebP within Pillow's limit of
pixels, and never kept.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from r1p_dist.data.pictures import decode_picture
from r1p_dist.data.stream import ASSETS
from r1p_dist.errors import InputError
from r1p_dist.predict.model import PredictingModel
from r1p_dist.predict.render import Found, as_json
from r1p_dist.predict.request import Classes, make_request
from r1p_dist.predict.request import Request as Asked
from r1p_dist.serve.local import guarded

MOST_BYTES = 20 << 20  # of a picture
MOST_LETTERS = 10_000  # of classes, or of a question
_PATIENCE_S = 30  # for a picture to arrive
_TOP = 5
_FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def make_app(model: PredictingModel) -> ASGIApp:
    """Returns the application; pictures are predicted one after another."""
    routes = [Route(path, _sends(name, kind)) for path, (name, kind) in _FILES.items()]
    routes.append(Route("/model.json", lambda request: JSONResponse(_facts(model))))
    turn = asyncio.Lock()

    async def predict(request: Request) -> JSONResponse:
        asked = _asked(model, request.query_params)
        content = await _picture(request)
        async with turn:
            return JSONResponse(await run_in_threadpool(_predict, model, asked, content))

    routes.append(Route("/predict", predict, methods=["POST"]))
    faults: Any = {InputError: _refuse, HTTPException: _refuse, ClientDisconnect: _refuse, Exception: _fail}
    app = Starlette(routes=routes, exception_handlers=faults)
    return guarded(app, _POLICY)


def _sends(name: str, kind: str) -> Any:
    content = (ASSETS / "serve" / name).read_bytes()
    return lambda request: Response(content, media_type=kind)


def _facts(model: PredictingModel) -> dict[str, Any]:
    source = model.source
    return {"name": source.folder.resolve().name, "answers": source.kind.has_answers, "most_bytes": MOST_BYTES}


def _asked(model: PredictingModel, query: Mapping[str, str]) -> Asked:
    if sum(map(len, query.values())) > MOST_LETTERS:
        raise HTTPException(413, f"more than {MOST_LETTERS:,} letters")
    words, question = query.get("classes"), query.get("ask")
    return make_request(model.source, words=None if words is None else words.split(","), question=question)


async def _picture(request: Request) -> bytes:
    too_large = HTTPException(413, f"a picture may have {MOST_BYTES >> 20} MB; this one has more")
    if int(request.headers.get("content-length", 0)) > MOST_BYTES:
        raise too_large
    content = bytearray()
    try:
        with anyio.fail_after(_PATIENCE_S):
            async for chunk in request.stream():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise too_large
    except TimeoutError as error:
        raise HTTPException(408, f"the picture did not arrive within {_PATIENCE_S} seconds") from error
    return bytes(content)


def _predict(model: PredictingModel, asked: Asked, content: bytes) -> dict[str, Any]:
    picture = decode_picture(content, "this file")
    (found,) = model.predict(asked, [model.encode(asked, picture)])
    return {"tasks": by_task(asked, found)} if isinstance(asked, Classes) else dict(found)


def by_task(asked: Classes, found: Found) -> list[dict[str, Any]]:
    """Returns {"task", "classes"} of each task: its most probable classes, where no other task's compete."""
    results, start = [], 0
    for task in asked.tasks:
        stop = start + len(task.class_names)
        own = {state: values[start:stop] for state, values in found.items()}
        shares = {state: [value / (sum(values) or 1) for value in values] for state, values in own.items()}
        results.append({"task": task.name or None, **as_json(Classes((task,)), shares, _TOP)})
        start = stop
    return results


def _refuse(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    # it names a flag of the command line where the page has a field
    return JSONResponse({"error": str(error).removeprefix("--")}, 400)


def _fail(request: Request, error: Exception) -> JSONResponse:
    logging.getLogger(__name__).warning("a request failed", exc_info=error)
    return JSONResponse({"error": "the server failed; its terminal says more"}, 500)
