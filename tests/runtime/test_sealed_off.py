"""A bundle that is renamed, read-only and without network access gives the same samples as the original."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.engines import available

ROOT = Path(__file__).parents[2]

PROGRAM = """
import socket, sys

def refuse(*_, **__):
    raise OSError("there is no network here")

if sys.argv[2] == "alone":
    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = socket.create_connection = refuse
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        assert "no network here" in str(error)

from diffpress.cli.main import main
code = main(["sample", sys.argv[1], "-n", "3", "--seed", "5", "--engine", sys.argv[3], "--out", sys.argv[4]])
assert code == 0, code
"""


def run_sample(bundle: Path, where: str, engine: str, out: Path, cache: Path) -> np.ndarray:
    from PIL import Image

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, bundle, where, engine, out],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"DIFFPRESS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        return np.asarray(image)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_read_only_copy_without_a_network_makes_the_same_image(engine: str, tiny: Path, tmp_path: Path) -> None:
    if engine not in available():
        pytest.skip(f"{engine} is not installed")
    copy = Path(shutil.copytree(tiny, tmp_path / "another name"))
    before = {path: path.read_bytes() for path in copy.iterdir()}
    (tmp_path / "cache").write_text("")  # a file in place of the cache folder, so that nothing can be cached
    for path in (*copy.iterdir(), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        original = run_sample(tiny, "at home", engine, tmp_path / "a.png", tmp_path / "home")
        copied = run_sample(copy, "alone", engine, tmp_path / "b.png", tmp_path / "cache")
    finally:
        copy.chmod(0o755)
    assert np.array_equal(original, copied)
    assert {path: path.read_bytes() for path in copy.iterdir()} == before
