"""Routes besides sampling, and what every response has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from diffpress.serve.models import Source
from diffpress.serve.settings import Access
from tests.serve.conftest import make_service

KEY = "0123456789abcdef"


def test_models_are_listed_by_name(tiny: Path, client_of: Callable[..., TestClient]) -> None:
    client = client_of(make_service(Source(tiny, "first"), Source(tiny, "second")))
    found = client.get("/v1/models").json()
    assert [model["id"] for model in found["data"]] == ["first", "second"] and found["object"] == "list"
    one = client.get("/v1/models/second").json()
    assert one["conditioning"] == "class" and one["classes"] == 3 and one["plan"]["steps"] == 8
    assert one["output_shape"] == [1, 8, 8] and not one["loaded"]
    missing = client.get("/v1/models/third")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    unknown = client.post("/v1/sample", json={"model": "secnd"})
    assert unknown.status_code == 404 and "did you mean 'second'" in unknown.json()["error"]["message"]


def test_it_is_ready_after_the_default_model_was_opened(tiny: Path, client_of: Callable[..., TestClient]) -> None:
    service = make_service(tiny)
    client = client_of(service)
    assert client.get("/healthz").status_code == 200 and client.get("/readyz").status_code == 503
    assert client.portal is not None
    client.portal.call(service.preload)
    assert client.get("/readyz").json() == {"status": "ready"}
    service.is_draining = True
    assert client.get("/readyz").json() == {"status": "shutting down"}
    refused = client.post("/v1/sample", json={})
    assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
    assert client.get("/v1/models").status_code == 200


def test_metrics_count_requests_images_and_batches(client: TestClient) -> None:
    client.post("/v1/sample", json={"n": 4})
    client.post("/v1/sample", json={"steps": "x"})
    client.get("/v1/models/nothing")
    client.get("/nowhere/at/all")
    text = client.get("/metrics").text
    for line in (
        'diffpress_requests_total{route="/v1/sample",status="200"} 1.0',
        'diffpress_requests_total{route="/v1/sample",status="400"} 1.0',
        'diffpress_requests_total{route="/v1/models/ID",status="404"} 1.0',
        'diffpress_requests_total{route="other",status="404"} 1.0',
        'diffpress_images_total{model="tiny_bundle"} 4.0',
        'diffpress_batch_images_count{model="tiny_bundle"} 1.0',
        'diffpress_model_open{model="tiny_bundle"} 1.0',
        'diffpress_waiting_images{model="tiny_bundle"} 0.0',
        "diffpress_requests_in_progress 0.0",
    ):
        assert line in text.splitlines(), line
    assert "process_resident_memory_bytes" in text


def test_unknown_paths_and_methods_are_json_too(client: TestClient) -> None:
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/sample", 405), ("DELETE", "/v1/models", 405)):
        response = client.request(method, path)
        assert response.status_code == status and "POST /v1/sample" in response.json()["error"]["message"]


def test_an_unexpected_error_tells_the_client_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("secret of the server")

    monkeypatch.setattr("diffpress.serve.web.generation.image_request", fail)
    response = client.post("/v1/sample", json={})
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text and "Traceback" not in response.text


def test_every_response_has_an_id_and_headers_against_sniffing(client: TestClient) -> None:
    ids = set()
    for path in ("/", "/healthz", "/nowhere"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        ids.add(headers["x-request-id"])
    assert len(ids) == 3


def test_the_page_is_one_file_that_needs_no_other(client: TestClient) -> None:
    response = client.get("/")
    html, policy = response.text, response.headers["content-security-policy"]
    assert response.headers["content-type"].startswith("text/html")
    assert re.findall(r"https?://|//[a-z]+\.|\bimport\b|@import|url\(", html) == []
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,"]
    assert "default-src 'none'" in policy and policy.count("sha256-") == 2 and "unsafe" not in policy
    assert re.findall(r"\son\w+=|\sstyle=", html) == [], "inline handlers and styles are not in the policy"
    named = re.findall(r"<(?:input|select|textarea)[^>]*>", html)
    labels = re.findall(r"<label[^>]*>(?:(?!</label>).)*<(?:input|select|textarea)", html, re.S)
    assert len(named) == len(labels) > 8, "every control has a label"
    assert 'lang="en"' in html and 'role="status"' in html and 'role="alert"' in html and ":focus-visible" in html


def test_a_key_is_required_where_there_is_one(tiny: Path, client_of: Callable[..., TestClient]) -> None:
    client = client_of(make_service(tiny, access=Access(api_key=KEY)))
    for path in ("/", "/healthz", "/readyz"):
        assert client.get(path).status_code != 401
    for value in (None, KEY, f"Basic {KEY}", "Bearer", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer \xe4"):
        headers = {} if value is None else {b"authorization": value.encode("latin-1")}
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/sample"), ("GET", "/nowhere")):
            response = client.request(method, path, headers=headers)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    assert client.get("/v1/models", headers={"authorization": f"bearer {KEY}"}).status_code == 200
    assert client.post("/v1/sample", json={}, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_another_host_is_refused(client: TestClient, tiny: Path, client_of: Callable[..., TestClient]) -> None:
    for host in ("localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for host in ("example.org", "localhost.example.org", "127.0.0.1.example.org", "", "[::1", "example.org:localhost"):
        for path in ("/v1/models", "/"):
            response = client.get(path, headers={"host": host})
            assert response.status_code == 421 and "--allow-host" in response.json()["error"]["message"]
        assert client.get("/healthz", headers={"host": host}).status_code == 200
    any_host = client_of(make_service(tiny, access=Access(hosts=("*",))))
    assert any_host.get("/v1/models", headers={"host": "example.org"}).status_code == 200


def test_other_origins_are_not_allowed_unless_they_were_named(
    client: TestClient, tiny: Path, client_of: Callable[..., TestClient]
) -> None:
    origin = "https://example.org"
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    assert client.options("/v1/sample", headers=asked).status_code == 405
    response = client.post("/v1/sample", json={}, headers={"origin": origin})
    assert not [name for name in response.headers if name.startswith("access-control")]
    allowing = client_of(make_service(tiny, access=Access(api_key=KEY, origins=(origin,))))
    preflight = allowing.options("/v1/sample", headers=asked)
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == origin
    assert allowing.options("/v1/sample", headers={**asked, "origin": "https://evil.org"}).status_code == 400


def test_a_body_has_to_be_json_and_small(client: TestClient, tiny: Path, client_of: Callable[..., TestClient]) -> None:
    from diffpress.serve.settings import Limits

    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = client.post("/v1/sample", content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415, "no preflight would protect these"
    small = client_of(make_service(tiny, limits=Limits(body=100)))
    json_type = {"content-type": "application/json; charset=utf-8"}
    large = b'{"seed": 1' + b" " * 100 + b"}"
    for content in (large, iter([large[:60], large[60:]])):  # with and without a Content-Length
        response = small.post("/v1/sample", content=content, headers=json_type)
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
    assert small.post("/v1/sample", content=b'{"seed": 1}', headers=json_type).status_code == 200
