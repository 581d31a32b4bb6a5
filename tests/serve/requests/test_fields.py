"""Bodies that are no JSON object, and texts that cannot be encoded."""

from __future__ import annotations

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.requests.fields import number, parsed, text, texts


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'{"a": NaN}', b'{"a": -Infinity}', b"[" * 100_000,
     b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": 1} x'],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInputError, match="body"):
        parsed(body)


def test_half_a_surrogate_pair_is_refused() -> None:
    body = parsed(b'{"prompt": "a \\ud800", "both": "\\ud83d\\ude00"}')
    with pytest.raises(InvalidInputError, match="prompt: contains half of a surrogate pair"):
        text(body, "prompt", 10)
    assert text(body, "both", 10) == "\U0001f600"


def test_a_text_is_measured_in_characters() -> None:
    assert text({"a": "äöü"}, "a", 3) == "äöü"
    with pytest.raises(InvalidInputError, match="a: 4 characters; at most 3 are accepted"):
        texts({"a": ["abc", "abcd"]}, "a", 3, 2)


def test_a_number_is_finite() -> None:
    assert number({"a": 3}, "a", 0, 5) == 3.0
    for value in (float("inf"), 10**400, -1, "3", True):
        with pytest.raises(InvalidInputError, match=r"^a\b"):
            number({"a": value}, "a", 0, 5)
