"""The ASGI application: its routes, and what happens around every request (access, counting, logs, errors).

    GET  /                          the web page
    GET  /healthz  /readyz          whether the process runs; whether it accepts requests
    GET  /metrics                   metrics for Prometheus
    GET  /v1/models  /v1/models/ID  the bundles
    POST /v1/sample                 images, or a stream of steps and images
    POST /v1/images/generations     images, in OpenAI's API

Bodies and responses are described in docs/serving.md.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from diffpress.runtime.errors import DiffpressError
from diffpress.serve.errors import RequestError, request_error
from diffpress.serve.service import Service
from diffpress.serve.web.exchange import EXCHANGE, Exchange
from diffpress.serve.web.generation import generations, sample
from diffpress.serve.web.logs import access_logger, log_event
from diffpress.serve.web.metrics import CONTENT_TYPE
from diffpress.serve.web.page import page
from diffpress.serve.web.security import HEADERS, Message, Receive, Send, check_access, client_gone, discard_body

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATING = ("/v1/sample", "/v1/images/generations")
NEEDS_IMAGES = ("/v1/images/edits", "/v1/images/variations")
PATHS = ("/", "/healthz", "/readyz", "/metrics", "/v1/models", *GENERATING, *NEEDS_IMAGES)
ONE_MODEL = "/v1/models/"
WITHOUT_BODY = ("GET", "HEAD", "OPTIONS")


def create_app(service: Service) -> App:
    """Return the application of a service; it samples while its lifespan lasts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with service.running():
            yield

    handlers = {HTTPException: _router_error, DiffpressError: _error, Exception: _error}
    app: App = Starlette(routes=_routes(service), lifespan=lifespan, exception_handlers=handlers)
    if service.settings.access.origins:
        app = CORSMiddleware(
            app,
            allow_origins=service.settings.access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _answered(service, app, scope, receive, send)
        else:
            await app(scope, receive, send)

    return front


async def _answered(service: Service, app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request, count it and log it."""
    started, exchange = time.monotonic(), Exchange(uuid.uuid4().hex)
    scope[EXCHANGE] = exchange
    method, path, status = scope["method"], scope["path"], client_gone().status
    is_read = method in WITHOUT_BODY

    async def watched_receive() -> Message:
        nonlocal is_read
        message = await receive()
        is_read = is_read or not message.get("more_body", False)
        return message

    async def watched_send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            if not is_read:
                await discard_body(watched_receive)
            status = message["status"]
            own = [*HEADERS, (b"x-request-id", exchange.id.encode("ascii"))]
            own += [(b"connection", b"close")] if service.is_draining else []
            message = {**message, "headers": [*message.get("headers", []), *own]}
        await send(message)

    try:
        check_access(method, path, scope["headers"], service.settings.access)
        with service.request() if path in GENERATING and method == "POST" else contextlib.nullcontext():
            await app(scope, watched_receive, watched_send)
    except DiffpressError as error:
        await error_response(request_error(error))(scope, watched_receive, watched_send)
    except Exception as error:  # it was answered already
        access_logger.error(f"request {exchange.id}: {type(error).__name__}: {error}", exc_info=error)
    finally:
        exchange.cleanup.close()
        seconds = time.monotonic() - started
        service.metrics.request(_route(path), status, seconds)
        log_event(
            "request", id=exchange.id, method=method, route=_route(path), status=status,
            ms=round(seconds * 1e3, 1), **exchange.facts,
        )  # fmt: skip


def error_response(error: RequestError) -> JSONResponse:
    """Return the response of an error."""
    return JSONResponse(error.to_json(), error.status, dict(error.headers))


def _routes(service: Service) -> list[Route]:
    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readiness(request: Request) -> Response:
        is_ready = service.is_ready and not service.is_draining
        state = "ready" if is_ready else "shutting down" if service.is_draining else "loading"
        return JSONResponse({"status": state}, 200 if is_ready else 503)

    async def metrics(request: Request) -> Response:
        is_open = {name: model.pipeline is not None for name, model in service.store.models.items()}
        return Response(service.metrics.text(is_open), headers={"content-type": CONTENT_TYPE})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.to_json() for model in service.store.models.values()]})

    async def one_model(request: Request) -> Response:
        return JSONResponse(service.store.named(request.path_params["name"]).to_json())

    async def index(request: Request) -> Response:
        html, policy = page()
        return HTMLResponse(html, headers={"content-security-policy": policy})

    async def needs_images(request: Request) -> Response:
        raise RequestError(404, "not_supported", "this server takes no input images; use 'diffpress sample --image'")

    async def sampling(request: Request) -> Response:
        return await sample(service, request)

    async def generating(request: Request) -> Response:
        return await generations(service, request)

    return [
        Route("/", index),
        Route("/healthz", health),
        Route("/readyz", readiness),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route(f"{ONE_MODEL}{{name}}", one_model),
        Route("/v1/sample", sampling, methods=["POST"]),
        Route("/v1/images/generations", generating, methods=["POST"]),
        *(Route(path, needs_images, methods=["POST"]) for path in NEEDS_IMAGES),
    ]


async def _error(request: Request, error: Exception) -> Response:
    """Answer what a route refuses or fails at; an unexpected error is raised again by Starlette, and then logged."""
    return error_response(request_error(error))


async def _router_error(request: Request, error: Exception) -> Response:
    """Answer what the router refuses: an unknown path, or a method that a path does not have."""
    assert isinstance(error, HTTPException)
    code = {404: "unknown_path", 405: "wrong_method"}.get(error.status_code, "refused")
    message = f"{error.detail}: see GET /v1/models, POST /v1/sample and POST /v1/images/generations"
    return error_response(RequestError(error.status_code, code, message, error.headers or {}))


def _route(path: str) -> str:
    """Return the route of a path, one of few values."""
    if path.startswith(ONE_MODEL):
        return f"{ONE_MODEL}ID"
    return path if path in PATHS else "other"
