"""The service over HTTP: the Open Inference Protocol v2 as a Starlette application."""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rpd_sb3 import __version__
from rpd_sb3.contract.teacher import Labels, TeacherError, TeacherSpec
from rpd_sb3.serve.batch import Unanswerable
from rpd_sb3.serve.engine import Busy, Engine
from rpd_sb3.serve.memory import OutOfStep
from rpd_sb3.serve.page import status_page
from rpd_sb3.serve.regions import Regions, UnknownRegion
from rpd_sb3.serve.requests import read_request, write_response
from rpd_sb3.wire.messages import HEADER_LENGTH, parse_region
from rpd_sb3.wire.shared_memory import SharedMemoryError, StaleGeneration
from rpd_sb3.wire.spec import metadata
from rpd_sb3.wire.tensors import ProtocolError
from rpd_sb3.wire.urls import TOKEN

MAX_BODY = 256 * 2**20
EXTENSIONS = ["binary_tensor_data", "system_shared_memory"]
OPEN = ("/v2/health/live", "/v2/health/ready")
"""Paths that need no token."""
LARGE = 2**16
"""Bytes of a request above which reading it would hold up the others."""


class BodyTooLarge(ValueError):
    """The request's body is larger than the service takes."""


class UnknownModel(ValueError):
    """The model is not the one that is served."""


class Service:
    """Handlers of one application.

    :param engine: answers the queries
    :param name: of the model
    :param max_body: bytes of a request
    :param shared_memory: False where clients on this machine may reach another process than this one
    """

    def __init__(self, engine: Engine, name: str, max_body: int = MAX_BODY, shared_memory: bool = True) -> None:
        self.engine = engine
        self.name = name
        self.max_body = max_body
        self.shared_memory = shared_memory
        self.regions = Regions()

    async def server(self, request: Request) -> Response:
        return JSONResponse({"name": "rpd_sb3", "version": __version__, "extensions": EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        self._check_name(request)
        ready = self.engine.ready
        body = {
            "ready": ready,
            "name": self.name,
            "state": self.engine.state(),
            "failed": self.engine.error is not None,
        }
        return JSONResponse(body, 200 if ready else 503, {} if ready else {"Retry-After": "1"})

    async def metadata(self, request: Request) -> Response:
        self._check_name(request)
        return JSONResponse(metadata(self._spec(), self.name, __version__, shared_memory=self.shared_memory))

    async def metrics(self, request: Request) -> Response:
        return Response(self.engine.metrics.prometheus(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        return HTMLResponse(status_page(self.engine, self.name, __version__))

    async def infer(self, request: Request) -> Response:
        started, code = time.monotonic(), 500
        try:
            response = await self._infer(request)
            code = response.status_code
            return response
        except Exception as error:
            code = status_of(error)
            raise
        finally:
            self.engine.metrics.request(code, time.monotonic() - started)

    async def _infer(self, request: Request) -> Response:
        self._check_name(request)
        length = request.headers.get(HEADER_LENGTH)
        body = await self._body(request)
        spec = self._spec()
        if len(body) < LARGE:
            inference, query = read_request(body, length, spec, self.regions)
        else:
            inference, query = await run_in_threadpool(read_request, body, length, spec, self.regions)
        labels: Labels = await asyncio.wrap_future(self.engine.submit(query))
        message = write_response(inference, labels, self.name, self.regions)
        return Response(message.body, 200, message.headers)

    async def shared_memory_status(self, request: Request) -> Response:
        return JSONResponse(self.regions.status(request.path_params.get("region")))

    async def register(self, request: Request) -> Response:
        if not self.shared_memory:
            raise ProtocolError("this service takes no shared memory: several processes answer its queries")
        region = parse_region(await self._body(request))
        await run_in_threadpool(self.regions.register, request.path_params["region"], region)
        return Response()

    async def unregister(self, request: Request) -> Response:
        self.regions.unregister(request.path_params.get("region"))
        return Response()

    def _check_name(self, request: Request) -> None:
        name = request.path_params.get("name", self.name)
        if name != self.name:
            raise UnknownModel(
                f"there is no model {name[:100]!r} here, only {self.name!r}: ask for it with --teacher-kwargs name:{self.name}"
            )

    def _spec(self) -> TeacherSpec:
        if self.engine.spec is None:
            raise Busy(f"the teacher {self.engine.state()}")
        return self.engine.spec

    async def _body(self, request: Request) -> bytes:
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ProtocolError(f"the body has the Content-Encoding {encoding[:50]!r}; send it as it is")
        announced = request.headers.get("content-length", "0")
        if int(announced) > self.max_body:
            raise BodyTooLarge(f"the body has {announced} bytes, at most {self.max_body} are taken")
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > self.max_body:
                raise BodyTooLarge(f"the body has more than {self.max_body} bytes")
            chunks.append(chunk)
        return b"".join(chunks)


STATUS: dict[type[Exception], int] = {
    UnknownRegion: 404,
    UnknownModel: 404,
    BodyTooLarge: 413,
    OutOfStep: 409,
    StaleGeneration: 409,
    Unanswerable: 422,
    ProtocolError: 400,
    SharedMemoryError: 400,
    ClientDisconnect: 400,
    Busy: 503,
    TeacherError: 500,
}


def status_of(error: Exception) -> int:
    """HTTP status for what went wrong."""
    return next((code for kind, code in STATUS.items() if isinstance(error, kind)), 500)


async def on_http_error(request: Request, error: Exception) -> Response:
    """An unknown path or a wrong method, as the protocol wants it."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse({"error": text}, error.status_code, error.headers)


async def on_error(request: Request, error: Exception) -> Response:
    """What went wrong, as the protocol wants it: ``{"error": "..."}``."""
    headers = {"Retry-After": "1"} if isinstance(error, Busy) else {}
    text = str(error).encode(errors="backslashreplace").decode()  # a request may hold half of a surrogate pair
    return JSONResponse({"error": text, "type": type(error).__name__}, status_of(error), headers)


class TokenGate:
    """Lets in only callers that know the token; browsers may give it as the password.

    :param app: what is guarded
    :param token: that callers must know
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app = app
        self.token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN
        if is_open or hmac.compare_digest(_credentials(Headers(scope=scope)), self.token):
            await self.app(scope, receive, send)
            return
        body = {"error": f"this service wants a bearer token: --teacher-kwargs token:..., or {TOKEN}"}
        await JSONResponse(body, 401, {"WWW-Authenticate": 'Basic realm="rpd_sb3", charset="UTF-8"'})(
            scope, receive, send
        )


def _credentials(headers: Headers) -> bytes:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value).partition(b":")[2]
        except ValueError:
            return b""
    return value.encode() if scheme.lower() == "bearer" else b""


def make_app(service: Service, token: str | None = None, lifespan: bool = True) -> Starlette:
    """The application.

    :param service: handlers
    :param token: that callers must know; None: no token
    :param lifespan: start and close the engine with the application
    :raises ValueError: for a token that no header can hold
    """
    if token and not re.fullmatch("[!-~]+", token):
        raise ValueError("the token must consist of printable ASCII characters without spaces")

    @asynccontextmanager
    async def life(app: Any) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await run_in_threadpool(service.engine.close)

    model, memory = "/v2/models/{name}", "/v2/systemsharedmemory"
    # Searched in this order, so what is asked at every step comes first.
    routes = [
        Route(model + "/infer", service.infer, methods=["POST"]),
        Route("/", service.page),
        Route("/metrics", service.metrics),
        Route("/v2", service.server),
        Route("/v2/health/live", service.live),
        Route("/v2/health/ready", service.ready),
        Route(model, service.metadata),
        Route(model + "/ready", service.ready),
        Route(memory + "/region/{region}/register", service.register, methods=["POST"]),
    ]
    for path in (memory, memory + "/region/{region}"):
        routes.append(Route(path + "/status", service.shared_memory_status))
        routes.append(Route(path + "/unregister", service.unregister, methods=["POST"]))
    return Starlette(
        routes=routes,
        middleware=[Middleware(TokenGate, token=token)] if token else [],
        exception_handlers={**dict.fromkeys([*STATUS, Exception], on_error), HTTPException: on_http_error},
        lifespan=life if lifespan else None,
    )
