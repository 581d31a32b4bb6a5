"""OpenAI's images API in terms of ours: the body of POST /v1/images/generations as one of POST /v1/sample, and back.

    size "512x768"      width first -> width 512, height 768; "auto" is the model's own
    output_format       -> format
    seed, steps, ...    fields of /v1/sample are accepted as well (`extra_body` in the openai client)

A setting of the API that could change the image and that bundles do not have is refused by its name.
"""

from __future__ import annotations

import re
import time
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.requests import fields
from diffpress.serve.requests.encoding import SUFFIXES
from diffpress.serve.requests.image_request import FIELDS, MODEL, ImageRequest

SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})")
# settings without a counterpart -> the values that ask for nothing
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": ("auto",),
    "moderation": ("auto",),
    "output_compression": (100,),
    "partial_images": (0,),
    "quality": ("auto", "standard"),
    "style": (),
}
OWN = ("prompt", MODEL, "n", "size", "response_format", "output_format", "stream", "user", *NEUTRAL)
OWN_ELSEWHERE = ("format", "height", "width", "previews")  # of /v1/sample, with another name here
EXTENSIONS = tuple(name for name in FIELDS if name not in (*OWN, *OWN_ELSEWHERE))
USER_LENGTH = 512


def sample_body(body: fields.Body) -> dict[str, Any]:
    """Return the body of /v1/sample that makes the same images.

    Raises:
        InvalidInputError: A field is unknown, or asks for what no bundle does.
    """
    fields.check_names(body, (*OWN, *EXTENSIONS))
    if fields.choice(body, "response_format", ("b64_json", "url")) == "url":
        raise InvalidInputError("response_format url: images are not stored here; use b64_json")
    if fields.flag(body, "stream"):
        raise InvalidInputError("stream: steps are streamed by POST /v1/sample; leave it out here")
    for name, values in NEUTRAL.items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or value not in values):
            only = " or ".join(map(str, values))
            raise InvalidInputError(f"{name}: not supported here; leave it out{only and f' or use {only}'}")
    fields.text(body, "user", USER_LENGTH)
    found = {name: body[name] for name in ("prompt", MODEL, "n", *EXTENSIONS) if body.get(name) is not None}
    found["format"] = fields.choice(body, "output_format", tuple(SUFFIXES)) or "png"
    size = fields.text(body, "size", USER_LENGTH)
    if size is not None and size != "auto":
        match = SIZE.fullmatch(size)
        if match is None:
            raise InvalidInputError("size: give width and height in pixels, as in 512x768, or auto")
        found |= {"width": int(match[1]), "height": int(match[2])}
    return found


def without_empty_prompt(body: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return the body without an empty prompt, which OpenAI's clients require, for models that take no prompt."""
    if kind != "text" and body.get("prompt") == "":
        return {name: value for name, value in body.items() if name != "prompt"}
    return body


def images_json(request: ImageRequest, images: list[str]) -> dict[str, Any]:
    """Return the response for images in base64, each with its seed."""
    height, width = request.spec.image_size
    return {
        "created": int(time.time()),
        "data": [{"b64_json": image, "seed": seed} for image, seed in zip(images, request.seeds, strict=True)],
        "output_format": request.format,
        "size": f"{width}x{height}",
        MODEL: request.model,
        "warnings": list(request.warnings),
    }
