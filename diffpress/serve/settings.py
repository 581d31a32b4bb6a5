"""Settings of the server: limits of a request, dynamic batching, and who may connect."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError

API_KEY_VARIABLE = "DIFFPRESS_API_KEY"
MIN_API_KEY = 16  # characters
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
ANY_HOST = "*"


@dataclass(frozen=True)
class Limits:
    """Limits of one request; a request beyond them is refused.

    Attributes:
        images: Images of a request.
        steps: Denoising steps.
        side: Height and width in pixels, where a model allows other sizes than its own.
        prompt: Characters of a prompt.
        body: Bytes of the body.
        seconds: Time from a request to its last image; a request may ask for less.
        guidance: Magnitude of the guidance weight.
    """

    images: int = 16
    steps: int = 200
    side: int = 2048
    prompt: int = 4000
    body: int = 2**20
    seconds: float = 300.0
    guidance: float = 100.0

    def __post_init__(self) -> None:
        for name in ("images", "steps", "side", "prompt", "body", "seconds"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"limit of {name} {getattr(self, name)}: must be above 0")


@dataclass(frozen=True)
class Batching:
    """Dynamic batching of one model.

    Attributes:
        images: Images that are sampled together at most.
        wait_ms: How long the oldest image waits for others of its plan and size.
        queue: Images that wait at most, besides those that are being sampled.
    """

    images: int = 8
    wait_ms: float = 10.0
    queue: int = 64

    def __post_init__(self) -> None:
        if self.images < 1 or self.queue < 1 or not 0 <= self.wait_ms <= 60_000:
            raise InvalidInputError(
                f"batches of {self.images} images, a queue of {self.queue} and {self.wait_ms:g} ms: the first two must "
                "be at least 1, the time 0 to 60000"
            )


@dataclass(frozen=True)
class Access:
    """Who may connect.

    Attributes:
        hosts: Accepted values of the Host header, in lower case and without port; '*' accepts any.
        api_key: Key that requests for images, models and metrics must have; None for none.
        origins: Web origins that may read responses (CORS).
    """

    hosts: tuple[str, ...] = LOOPBACK_HOSTS
    api_key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()


def access_for(host: str, hosts: tuple[str, ...], origins: tuple[str, ...], key_file: Path | None) -> Access:
    """Return who may connect to a server that listens on `host`.

    The key is read from `key_file`, or else from the environment.

    Raises:
        InvalidInputError: There is no key and the address is not this machine's own, or the key cannot be read or is
            too short.
    """
    api_key = _api_key(key_file)
    if api_key is None and not is_loopback(host):
        raise InvalidInputError(
            f"--host {host}: other machines can reach this address, so an API key is needed; set {API_KEY_VARIABLE} or "
            "give --api-key-file FILE"
        )
    own = () if host in ("0.0.0.0", "::") else (f"[{host}]" if ":" in host else host,)
    accepted = (name.lower() for name in (*LOOPBACK_HOSTS, *own, *hosts))
    return Access(tuple(dict.fromkeys(accepted)), api_key, origins)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_key(file: Path | None) -> str | None:
    source = f"--api-key-file {file}" if file is not None else API_KEY_VARIABLE
    if file is None:
        key = os.environ.get(API_KEY_VARIABLE)
    else:
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{source}: not readable ({error})") from error
    if key is None:
        return None
    if len(key) < MIN_API_KEY or not key.isascii() or not key.isprintable():
        raise InvalidInputError(f"{source}: the key must have at least {MIN_API_KEY} printable ASCII characters")
    return key
