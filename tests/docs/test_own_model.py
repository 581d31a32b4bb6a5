"""The complete files of docs/own-model.md load, export and sample as the page says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import diffpress as dp

PAGE = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.M | re.S))
CONDITIONING = {"my_policy.py": {"observation": np.zeros((2, 2, 5), np.float32), "task": 3}}
SHAPES = {"my_model.py": (32, 32), "my_policy.py": (2, 3, 8), "my_latents.py": (64, 64)}


def test_the_page_has_a_file_for_each_kind() -> None:
    assert set(FILES) == set(SHAPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_of_the_page_loads_and_samples(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    (tmp_path / name).write_text(FILES[name])
    code: dict[str, object] = {"__name__": "page"}
    exec(FILES[name], code)
    (model,) = [value for key, value in code.items() if key in ("MyDenoiser", "MyPolicy", "MyModel")]
    torch.manual_seed(0)
    save_file(model().state_dict(), tmp_path / "weights.safetensors")  # type: ignore[operator]
    dp.export(f"{tmp_path / name}:{tmp_path / 'weights.safetensors'}", tmp_path / "bundle", threads=1)
    with dp.Pipeline(tmp_path / "bundle") as pipe:
        samples = pipe(seeds=range(2), conditioning=CONDITIONING.get(name))
    found = samples.shape if isinstance(samples, np.ndarray) else samples[0].size
    assert found == SHAPES[name]
