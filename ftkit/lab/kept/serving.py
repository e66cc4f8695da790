"""A page and a JSON end point to try a kept classifier by hand: ``ftkit serve``."""

import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from ftkit.errors import ModelError
from ftkit.lab.kept.loading import KeptClassifier, KeptTowers, load_kept

MAX_TEXTS, MAX_BYTES = 256, 2**20  # of one request

_LOOPBACK = ["127.0.0.1", "localhost", "::1"]

_EVERYWHERE = ("0.0.0.0", "::", "")

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Texts(BaseModel):
    """Body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)
    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


def make_app(model: KeptClassifier, name: str, *, hosts: list[str] | None = None) -> FastAPI:
    """The page (``GET /``) and the end point (``POST /predict``) of a model.

    ``POST /predict`` takes ``{"texts": [...]}``, 1 to 256 texts in at most 1 MiB, and gives ``{"predictions": [{"text",
    "predicted", "probabilities": {class: probability}}]}`` in the same order; both are null for a text of blanks. A
    request that cannot be used gets a
    status from 400 to 422 and ``{"error": sentence}``.

    Args:
        model: the kept model.
        name: what the page calls it.
        hosts: names under which the server may be asked for; None for those of this machine's loopback, an
            empty list for any. It keeps pages of others, opened in the same browser, from asking.
    """
    app = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url=None)  # those pages would load from a CDN
    page = Environment(loader=PackageLoader("ftkit.lab.kept", "."), autoescape=True).get_template("serve.html.j2")
    one_at_a_time = threading.Lock()
    allowed = _LOOPBACK if hosts is None else hosts

    @app.get("/")
    def show() -> HTMLResponse:
        about = {"method": model.info.get("method"), "base": model.info.get("base")}
        shown = page.render(name=name, names=model.names, max_length=model.max_length, **about)
        return HTMLResponse(shown, headers={"Content-Security-Policy": _POLICY})

    @app.post("/predict")
    def predict(body: Texts) -> JSONResponse:
        filled = {i: text.strip() for i, text in enumerate(body.texts) if text.strip()}
        with one_at_a_time:
            try:
                found = dict(zip(filled, model.probabilities(list(filled.values())), strict=True))
            except ValueError as error:  # a special token in the text of a prompt, for example
                return _refusal(422, str(error))
        predictions = [_prediction(text, found.get(i), model.names) for i, text in enumerate(body.texts)]
        return JSONResponse({"predictions": predictions})

    @app.exception_handler(RequestValidationError)
    def refuse(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _refusal(400, f"The body is no JSON ({first['ctx']['error']}): {_FORM}.")
        where = ".".join(map(str, first["loc"])) or "body"
        return _refusal(422, f"{where}: {first['msg']}; {_FORM}.")

    @app.exception_handler(HTTPException)
    def refuse_otherwise(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 400:
            return _refusal(400, f"The body is no JSON in UTF-8: {_FORM}.")
        return _refusal(error.status_code, f"{request.method} {request.url.path} is not served: POST to /predict.")

    @app.middleware("http")
    async def limit(request: Request, forward: Callable[[Request], Awaitable[Response]]) -> Response:
        if allowed and request.url.hostname not in allowed:
            return _refusal(400, f"This server is not called {request.url.hostname!r}: ask for {' or '.join(allowed)}.")
        if request.method == "POST":
            # a page elsewhere can send other types without asking this server first
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return _refusal(415, f"The content type is not application/json: {_FORM}.")
            size, body = 0, []
            async for part in request.stream():
                size += len(part)
                if size > MAX_BYTES:
                    return _refusal(413, f"The request is larger than {MAX_BYTES:,} bytes: send fewer texts at a time.")
                body.append(part)
            request._body = b"".join(body)  # what Starlette itself keeps for later readers
        return await forward(request)

    return app


_FORM = f'send {{"texts": ["…"]}} with 1 to {MAX_TEXTS} texts'


def _prediction(text: str, row: NDArray[np.float32] | None, names: list[str]) -> dict[str, Any]:
    if row is None:  # a text of blanks
        return {"text": text, "predicted": None, "probabilities": None}
    probabilities = dict(zip(names, map(float, row), strict=True))
    return {"text": text, "predicted": names[int(row.argmax())], "probabilities": probabilities}


def _refusal(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def serve(folder: str | Path, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a kept classifier until Ctrl-C.

    Args:
        folder: as for ``load_kept``.
        host: address to listen on.
        port: number of the port; 0 for one that is free.

    Raises:
        ModelError: there is no kept model in the folder, or it is no classifier of texts.
        OSError: the port is in use, or the address is not one of this machine.
    """
    import uvicorn

    listening = _listen(host, port)
    with listening:
        model = load_kept(folder)
        if isinstance(model, KeptTowers):
            raise ModelError(
                f"The model in {str(folder)!r} is two towers, and only classifiers of texts are served: search with "
                "`ftkit predict DIR FILE --among`."
            )
        host, port = listening.getsockname()[:2]
        hosts = [] if host in _EVERYWHERE else list(dict.fromkeys([*_LOOPBACK, host]))
        app = make_app(model, Path(folder).absolute().name, hosts=hosts)
        address = f"[{host}]" if ":" in host else host
        said = f"Serving {folder} ({len(model.names)} classes) on http://{address}:{port}; Ctrl-C ends."

        class Server(uvicorn.Server):
            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets=sockets)
                print(said, flush=True)  # from here on it answers, and Ctrl-C ends it in order

        try:
            Server(uvicorn.Config(app, log_level="warning", lifespan="off")).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has ended the requests and passes the signal on
            print("Stopped.", file=sys.stderr)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OverflowError:
        raise ValueError(f"There is no port {port}: give one from 1 to 65535, or 0 for one that is free.") from None
    except OSError as error:
        raise type(error)(
            f"Port {port} of {host} cannot be used ({error.strerror.partition(' (')[0]}): give another with --port, or "
            "end what uses it."
        ) from None
