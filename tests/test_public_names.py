"""The public names of diffpress: each can be imported, has a docstring, and its example runs as printed."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import diffpress

ROOT = Path(__file__).parents[1]
NAMES = [name for name in diffpress.__all__ if not name.startswith("__")]
FUNCTIONS_OF = {"compress": "diffpress.api", "export": "diffpress.api"}  # packages whose call is a function of api


def documented(name: str) -> object:
    """The object whose docstring documents the public name."""
    return getattr(importlib.import_module(FUNCTIONS_OF.get(name, "diffpress")), name)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What examples may use: a tiny `checkpoint` folder, a `bundle` folder, and an empty `folder`."""
    torch = pytest.importorskip("torch")
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("examples")
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    sizes: dict[str, Any] = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32)}
    model: Any = UNet2DModel(**sizes, **blocks, layers_per_block=1, norm_num_groups=4)
    model.save_pretrained(folder / "checkpoint" / "unet")
    scheduler: Any = DDIMScheduler(num_train_timesteps=50)
    scheduler.save_pretrained(folder / "checkpoint" / "scheduler")
    return {
        "checkpoint": folder / "checkpoint",
        "bundle": ROOT / "tests" / "runtime" / "tiny_bundle",
        "folder": folder,
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs_as_printed(
    name: str, namespace: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = documented(name)
    text = found.__doc__ or ""
    examples = doctest.DocTestParser().get_doctest(text, dict(namespace), name, None, None)
    assert examples.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    said: list[str] = []
    runner.run(examples, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_compress_and_export_are_packages_that_can_be_called() -> None:
    import diffpress.compress.recipe
    import diffpress.export

    assert isinstance(diffpress.compress, ModuleType) and callable(diffpress.compress)
    assert isinstance(diffpress.export, ModuleType) and callable(diffpress.export)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        diffpress.compres  # noqa: B018
    assert set(NAMES) <= set(dir(diffpress))


def test_importing_diffpress_loads_nothing_heavy() -> None:
    code = (
        "import diffpress, sys; print([n for n in ('torch', 'numpy', 'onnxruntime', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_of_an_extra_that_is_missing_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    code = (
        "import diffpress\ntry:\n    diffpress.Checkpoint\nexcept diffpress.MissingDependencyError as e:\n    print(e)"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "pip install 'diffpress[compress]'" in done.stdout, done.stderr
