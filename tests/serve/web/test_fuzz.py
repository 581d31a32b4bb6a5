"""Bodies that no client would send: each is refused with a status of 4xx, and the server goes on."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from diffpress.runtime.solvers import SOLVERS
from diffpress.serve.requests.image_request import FIELDS
from diffpress.serve.requests.openai_images import OWN

COUNT = 200
ROUTES = ("/v1/sample", "/v1/images/generations")
JSON = {"content-type": "application/json"}
DEEP: Any = []
for _ in range(50):
    DEEP = [DEEP]
PLAN_VALUES: dict[str, tuple[Any, ...]] = {
    "stride": (0, 3, 10, 60),
    "eta": (0, 0.5, 1),
    "end": (None, 0, 0.5),
    "guidance_rescale": (0, 0.5, 1),
    "clip": (True, False),
    "start": ("unit", "noise", "marginal"),
    "threshold": (None, {"ratio": 0.9}, {"ratio": 1, "max": 1e308}),
}
# of a wrong type or value for every field
JUNK: tuple[Any, ...] = (
    *(-1, -(10**30), 10**400, 1e308, -0.5),
    *([], [[]], [None], DEEP, {"": None}, {"a": {"b": [1]}}),
    *("\x00", "\ud800", "x" * 5000, "../../etc/passwd", "${jndi:ldap://x}", "%s%n", "\u202e1", "-1", "NaN"),
)
OUTSIDE_JUNK = ("guidance", "prompt", "negative_prompt", "user")  # fields for which some of it is valid


def junk_bodies() -> list[tuple[str, dict[str, Any]]]:
    """Return bodies with at least one value that its field cannot have."""
    draw = random.Random(0)
    found = []
    for _ in range(COUNT):
        route = draw.choice(ROUTES)
        names = [name for name in (FIELDS if route == ROUTES[0] else OWN) if name not in OUTSIDE_JUNK]
        body: dict[str, Any] = {"prompt": ""} if route == ROUTES[1] else {}
        for name in draw.sample(names, draw.randint(1, 3)):
            body[name] = draw.choice(JUNK)
        if draw.random() < 0.2:
            body[draw.choice(JUNK[-9:])] = draw.choice(JUNK)
        found.append((route, body))
    return found


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Any:
    yield
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]


def test_200_bodies_of_junk_get_4xx_and_never_5xx(client: TestClient) -> None:
    statuses = []
    for route, body in junk_bodies():
        response = client.post(route, content=json.dumps(body).encode(), headers=JSON)
        statuses.append(response.status_code)
        assert 400 <= response.status_code < 500, (route, body, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
        assert "Traceback" not in response.text and str(Path.cwd()) not in response.text
    assert len(statuses) == COUNT
    assert client.post("/v1/sample", json={}).status_code == 200


def test_200_damaged_bodies_never_get_5xx(client: TestClient) -> None:
    draw, refused = random.Random(1), 0
    valid = b'{"labels": [0, 2], "seed": 12, "steps": 3, "guidance": 1.5, "solver": "ddim", "plan": {"eta": 0.5}}'
    for _ in range(COUNT):
        body = bytearray(valid)
        for _ in range(draw.randint(1, 4)):
            position = draw.randrange(len(body))
            body[position : position + draw.choice((0, 1, 5))] = draw.randbytes(draw.choice((0, 1, 2)))
        response = client.post("/v1/sample", content=bytes(body), headers=JSON)
        assert response.status_code == 200 or 400 <= response.status_code < 500, (bytes(body), response.text)
        refused += response.status_code != 200
    assert refused > COUNT * 0.8


def test_every_plan_that_is_accepted_can_be_sampled(client: TestClient) -> None:
    draw, accepted = random.Random(2), 0
    numbers = (0, 1, 0.5, 2, 1e-300, 1e300, -1, 49, 50, 1e9)
    for _ in range(COUNT):
        plan: dict[str, Any] = {}
        for name in draw.sample([*PLAN_VALUES], 2):
            plan[name] = draw.choice(PLAN_VALUES[name] if draw.random() < 0.8 else numbers)
        if draw.random() < 0.7:
            count = draw.randint(1, 6)
            plan["timesteps"] = sorted(draw.sample(range(50), count), reverse=True)
            if draw.random() < 0.5:
                plan["ratios"] = sorted((draw.choice((*numbers, *range(9))) for _ in range(count)), reverse=True)
        if draw.random() < 0.3:
            plan["guidance_interval"] = [draw.choice(numbers), draw.choice((*numbers, None))]
        body = {"plan": plan, "solver": draw.choice([*SOLVERS]), "guidance": draw.choice((1, 2.5, -100, 100))}
        response = client.post("/v1/sample", json=body)
        assert response.status_code in (200, 400), (body, response.text)
        accepted += response.status_code == 200
    assert accepted > COUNT / 10
