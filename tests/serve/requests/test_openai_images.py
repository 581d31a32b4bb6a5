"""OpenAI's body in terms of ours: nothing that could change the image is ignored."""

from __future__ import annotations

from typing import Any

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.requests.openai_images import sample_body, without_empty_prompt


def test_a_size_is_width_by_height() -> None:
    found = sample_body({"prompt": "a", "size": "512x768", "n": 2, "response_format": "b64_json"})
    assert found == {"prompt": "a", "n": 2, "width": 512, "height": 768, "format": "png"}


def test_neutral_settings_and_extensions_are_accepted() -> None:
    body = {"prompt": "a", "size": "auto", "quality": "auto", "background": None, "user": "me", "stream": False}
    found = sample_body({**body, "seed": 3, "steps": 4, "negative_prompt": "b", "output_format": "webp"})
    assert found == {"prompt": "a", "seed": 3, "steps": 4, "negative_prompt": "b", "format": "webp"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("response_format", "url", "images are not stored here; use b64_json"),
        ("stream", True, "steps are streamed by POST /v1/sample"),
        ("quality", "hd", "quality: not supported here; leave it out or use auto or standard"),
        ("style", "vivid", "style: not supported here; leave it out"),
        ("background", "transparent", "background: not supported"),
        ("partial_images", 2, "partial_images: not supported"),
        ("partial_images", False, "partial_images: not supported"),
        ("output_format", "gif", "output_format 'gif': choose from"),
        ("size", "512", "size: give width and height"),
        ("size", "999999x1", "size: give width and height"),
        ("height", 8, "unknown field 'height'"),
        ("image", "x", "unknown field 'image'"),
        ("user", 1, "user: expected text"),
    ],
)
def test_what_no_bundle_does_is_refused_by_its_name(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        sample_body({"prompt": "a", field: value})
    assert message in str(caught.value)


def test_an_empty_prompt_is_none_for_models_without_prompts_only() -> None:
    assert without_empty_prompt({"prompt": "", "n": 1}, "class") == {"n": 1}
    assert without_empty_prompt({"prompt": "", "n": 1}, "text") == {"prompt": "", "n": 1}
    assert without_empty_prompt({"prompt": "a"}, "class") == {"prompt": "a"}
