"""The server process: listening, readiness, and a shutdown that finishes what it accepted.

SIGTERM or SIGINT: new requests get 503, those in progress are finished, then the process ends with exit code 0. A
second signal, or `drain_seconds`, ends it without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from diffpress.runtime.errors import DiffpressError, InvalidInputError
from diffpress.serve.service import Service
from diffpress.serve.web.app import create_app
from diffpress.serve.web.logs import log_event

MAX_CONNECTIONS = 1000  # further ones are refused with 503
BACKLOG = 512
KEEP_ALIVE_SECONDS = 15
LINGER_SECONDS = 1.0  # in which connections that were just accepted still get an answer
CLOSING_SECONDS = 5  # for connections, after all requests were answered
POLL_SECONDS = 0.01
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Address:
    """Where the server listens.

    Attributes:
        host: Address or name of an interface.
        port: Port; 0 takes a free one.
    """

    host: str = "127.0.0.1"
    port: int = 8000

    def listen(self) -> socket.socket:
        """Return a listening socket; raises InvalidInputError if the address cannot be used."""
        if not 0 <= self.port <= 65535:
            raise InvalidInputError(f"--port {self.port}: must lie in 0..65535")
        with contextlib.ExitStack() as opened:
            try:
                family, kind, _, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
                # named as TCP, or asyncio would not switch off Nagle's algorithm, which costs 40 ms per response
                listener = opened.enter_context(socket.socket(family, kind, socket.IPPROTO_TCP))
                if os.name == "posix":
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(BACKLOG)
            except OSError as error:
                raise InvalidInputError(
                    f"--host {self.host} --port {self.port}: cannot listen there ({error}); choose another address or "
                    "port"
                ) from error
            opened.pop_all()
        return listener


def serve(service: Service, address: Address, drain_seconds: float) -> None:
    """Serve until a signal ends it.

    Args:
        service: The service.
        address: Where to listen.
        drain_seconds: How long requests in progress may take after the first signal.

    Raises:
        InvalidInputError: The address cannot be used, or the default model cannot be opened.
    """
    with contextlib.closing(address.listen()) as listener:
        asyncio.run(_serve(service, listener, drain_seconds))


async def _serve(service: Service, listener: socket.socket, drain_seconds: float) -> None:
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=CLOSING_SECONDS,
    )
    server = uvicorn.Server(config)
    running = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not running.done():
        await asyncio.sleep(POLL_SECONDS)
    host, port = listener.getsockname()[:2]
    log_event("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}/", models=[*service.store.models])
    draining = _drain_on_signal(service, server, listener, drain_seconds)
    try:
        await service.preload()
        if not service.is_draining:
            log_event("ready")
    except DiffpressError:
        server.should_exit = True
        await running
        raise
    await running
    for task in draining:
        task.cancel()


def _drain_on_signal(
    service: Service, server: uvicorn.Server, listener: socket.socket, drain_seconds: float
) -> list[asyncio.Task[None]]:
    """Install handlers of the signals that end the server; return the list that will have the task of the first."""
    loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()

    async def drain() -> None:
        log_event("draining", requests=service.in_progress)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                await service.idle.wait()
        await _stop_listening(server, listener)
        await asyncio.sleep(LINGER_SECONDS)
        server.should_exit = True

    def stop() -> None:
        if service.is_draining:
            server.should_exit = server.force_exit = True
            return
        service.is_draining = True
        tasks.append(loop.create_task(drain()))

    with contextlib.suppress(NotImplementedError):  # on Windows uvicorn's own handlers stay
        for name in STOP_SIGNALS:
            loop.add_signal_handler(name, stop)
    return tasks


async def _stop_listening(server: uvicorn.Server, listener: socket.socket) -> None:
    """Close the listening socket; connections that the kernel has made, but nobody accepted, would be reset."""
    accepted = []
    with contextlib.suppress(BlockingIOError):
        while True:
            accepted.append(listener.accept()[0])
    with contextlib.suppress(OSError):  # not on every system, and the next line does it as well, if later
        listener.shutdown(socket.SHUT_RDWR)
    for listening in server.servers:
        listening.close()

    make: Callable[..., asyncio.Protocol] = server.config.http_protocol_class

    def protocol() -> asyncio.Protocol:
        return make(config=server.config, server_state=server.server_state, app_state=server.lifespan.state)

    for connection in accepted:
        connection.setblocking(False)
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection)
