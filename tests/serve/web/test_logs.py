"""The log: one JSON object a line, without prompts unless they were asked for."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from diffpress.serve.web.logs import json_logs
from tests.serve.conftest import make_service


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_logged_only_if_that_was_asked_for(
    log_prompts: bool, sd_bundle: Path, client_of: Callable[..., TestClient]
) -> None:
    stream = io.StringIO()
    with json_logs(log_prompts, stream):
        client = client_of(make_service(sd_bundle, log_prompts=log_prompts))
        prompt = "red secret " * 20  # too long, which the runtime warns of, quoting it
        body = {"prompt": prompt, "negative_prompt": "hidden", "guidance": 2.0, "steps": 1}
        assert client.post("/v1/sample", json=body).status_code == 200
        assert client.post("/v1/sample", json={**body, "prompt": prompt * 100}).status_code == 400
        assert client.post("/v1/sample", json={**body, "solver": "secret"}).status_code == 400
    assert ("secret" in stream.getvalue()) == ("hidden" in stream.getvalue()) == log_prompts
    request = next(line for line in lines(stream) if line["event"] == "request")
    assert request["status"] == 200 and request["images"] == 1 and request["steps"] == 1 and request["ms"] > 0
    assert request["batches"] == [1] and request["sample_ms"] > 0 and request["route"] == "/v1/sample"


def test_a_line_stays_one_line_whatever_it_says(client_of: Callable[..., TestClient], tiny: Path) -> None:
    stream = io.StringIO()
    with json_logs(False, stream):
        client = client_of(make_service(tiny))
        client.get('/a%0a{"event":"forged"}')
        logging.getLogger("diffpress.somewhere").warning("two\nlines")
        try:
            raise ValueError("wrong")
        except ValueError as error:
            logging.getLogger("uvicorn.error").error("failed", exc_info=error)
    found = lines(stream)
    assert [line["event"] for line in found] == ["request", "log", "log"] and found[0]["route"] == "other"
    assert found[1]["message"] == "two\nlines" and "ValueError: wrong" in found[2]["traceback"]


def test_what_was_there_before_is_restored() -> None:
    logger = logging.getLogger("diffpress")
    before = (logger.handlers[:], logger.level, logger.propagate)
    with json_logs(False, io.StringIO()):
        assert len(logger.handlers) == 1
    assert (logger.handlers, logger.level, logger.propagate) == before
