"""Checks before any route: the Host header, the API key, the type and size of the body; and headers of every response.

A browser sends a JSON body to another origin only after a CORS preflight, which is refused unless the origin was
allowed: no page of another site can use the server, nor, by the Host check, one that rebinds its name to this address.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from diffpress.serve.errors import RequestError
from diffpress.serve.settings import ANY_HOST, Access

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

OPEN_PATHS = ("/", "/healthz", "/readyz")  # without a key
PROBES = ("/healthz", "/readyz")  # with any Host: they tell nothing, and probes use addresses
BEARER = b"bearer "
BODY_SECONDS = 30.0  # to receive a body
DISCARD_SECONDS, DISCARD_BYTES = 2.0, 2**24  # of a body that is refused; then the connection is closed
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def check_access(method: str, path: str, headers: list[tuple[bytes, bytes]], access: Access) -> None:
    """Raise RequestError for a Host that is not accepted (421), or a missing or wrong API key (401).

    A CORS preflight (OPTIONS) has no key.
    """
    values = dict(headers)
    if path not in PROBES and ANY_HOST not in access.hosts:
        host = without_port(values.get(b"host", b"").decode("latin-1").lower())
        if host not in access.hosts:
            raise RequestError(421, "wrong_host", "this Host is not served here; start the server with --allow-host")
    if access.api_key is None or path in OPEN_PATHS or method == "OPTIONS":
        return
    given = values.get(b"authorization", b"")
    key = given[len(BEARER) :].strip() if given[: len(BEARER)].lower() == BEARER else b""
    if not hmac.compare_digest(key, access.api_key.encode("ascii")):
        headers_401 = {"www-authenticate": "Bearer"}
        raise RequestError(401, "invalid_api_key", "give the API key as 'Authorization: Bearer KEY'", headers_401)


def without_port(host: str) -> str:
    """Return a Host header's value without its port; the brackets of an IPv6 address stay."""
    if host.startswith("["):
        address, bracket, _ = host.partition("]")
        return address + bracket
    return host.partition(":")[0]


async def read_body(headers: dict[str, str], receive: Receive, limit: int) -> bytes:
    """Receive the body of a request.

    Raises:
        RequestError: It is not declared as JSON (415), has more than `limit` bytes (413), came too slowly (408), or
            the client has gone (499).
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "wrong_content_type", "send the body as JSON, with Content-Type: application/json")
    too_large = RequestError(413, "body_too_large", f"the body has more than {limit} bytes")
    declared = headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise client_gone()
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limit:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(408, "body_too_slow", f"the body took more than {BODY_SECONDS:g} s") from error
    return bytes(body)


async def discard_body(receive: Receive) -> None:
    """Receive the rest of a refused body: a connection that is closed before it loses the response as well."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while size <= DISCARD_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def client_gone() -> RequestError:
    """Return what a request ends with, in the log and the metrics, whose client does not wait for the response."""
    return RequestError(499, "client_gone", "the client closed the connection")
