"""The web page at `/`: one file without external requests, and the content security policy that holds it to that."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

INLINE = {
    "script-src": re.compile(r"<script>(.*?)</script>", re.S),
    "style-src": re.compile(r"<style>(.*?)</style>", re.S),
}


@cache
def page() -> tuple[str, str]:
    """Return the page, and its policy: its own script and style by their hashes, images in data, requests to itself."""
    html = (files("diffpress.serve.web") / "page.html").read_text(encoding="utf-8")
    sources = [f"{name} {' '.join(_hash(text) for text in pattern.findall(html))}" for name, pattern in INLINE.items()]
    rest = ["default-src 'none'", "img-src data:", "connect-src 'self'", "base-uri 'none'", "form-action 'none'"]
    return html, "; ".join([*rest, "frame-ancestors 'none'", *sources])


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"
