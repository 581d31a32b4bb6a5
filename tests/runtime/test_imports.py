"""runtime imports nothing heavy: checked in a fresh interpreter, along with the check itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = {"torch", "diffusers", "transformers", "accelerate", "diffpress.compress.checkpoint", "diffpress.export"}
HEAVY = TORCH | {"onnxruntime", "openvino", "PIL", "onnx", "tokenizers"}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "diffpress" / "runtime").rglob("*.py")
)


def loaded(code: str) -> set[str]:
    """Return the modules loaded in a fresh interpreter after running `code`."""
    program = f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_runtime_loads_nothing_heavy() -> None:
    assert not loaded("import diffpress.runtime") & (HEAVY | {"numpy"})


def test_importing_all_runtime_modules_loads_neither_engines_nor_torch() -> None:
    assert len(MODULES) > 10
    assert not loaded("import " + ", ".join(MODULES)) & HEAVY


def test_engines_do_not_know_of_sampling() -> None:
    above = {"diffpress.runtime.fused", "diffpress.runtime.sampler", "diffpress.runtime.solvers"}
    folder = ROOT / "diffpress" / "runtime" / "engines"
    names = [name for name in MODULES if name.startswith("diffpress.runtime.engines")]
    assert len(names) > 10 and not {n for n in loaded("import " + ", ".join(names)) if n.startswith(tuple(above))}
    # imports inside functions
    assert [path for path in folder.rglob("*.py") if any(name in path.read_text() for name in above)] == []


@pytest.mark.parametrize("package", ["onnxruntime", "PIL", "tokenizers"])
def test_heavy_modules_are_detected_when_loaded(package: str) -> None:
    pytest.importorskip(package)
    assert package in loaded(f"import diffpress.runtime, {package}") & HEAVY


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_sampling_never_loads_torch(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    code = f"""
from diffpress.cli.main import main
main(["sample", "tests/runtime/tiny_bundle", "-n", "2", "--engine", "{engine}", "--out",
r"{tmp_path / "g.png"}"])
"""
    names = loaded(code)
    assert {engine, "PIL", "diffpress.runtime"} <= names and not names & (TORCH | {"tokenizers"})
    assert (tmp_path / "g.png").stat().st_size > 0


def test_importing_runtime_takes_less_than_a_third_of_a_second() -> None:
    code = "import time; a = time.perf_counter(); import diffpress.runtime; print(time.perf_counter() - a)"
    runs = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.3


def test_every_public_name_can_be_imported() -> None:
    from diffpress import runtime

    assert all(getattr(runtime, name) is not None for name in runtime.__all__)
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        runtime.sampel  # noqa: B018
