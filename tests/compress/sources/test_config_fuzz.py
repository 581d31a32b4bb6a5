"""Single changes of config entries: sampled as diffusers samples them, or refused by name (config_fuzz.py)."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compress.sources.config_fuzz import FUZZED, Change, fuzz, in_order, outcome, quietly
from tests.pipelines import tiny_pipeline

# changes that ended in another image, a traceback, or a refusal that did not name the entry
FIXED = [
    ("sd", Change("text_encoder", "return_dict", False)),
    ("flux", Change("text_encoder_2", "return_dict", False)),
    ("sd", Change("vae", "shift_factor", 0.1)),
    ("sd", Change("unet", "time_cond_proj_dim", 32)),
    ("lcm", Change("unet", "time_cond_proj_dim", 33)),
    ("sd", Change("unet", "encoder_hid_dim", 32)),
    ("sd", Change("tokenizer", "padding_side", "left")),
    ("sdxl", Change("model_index", "force_zeros_for_empty_prompt", False)),
    ("sdxl", Change("vae", "latents_mean", [0.1, -0.2, 0.3, 0.05])),
    ("ldm-kl", Change("scheduler", "clip_sample", True)),
    ("dit", Change("scheduler", "clip_sample", True)),
    ("sd3", Change("text_encoder", "hidden_size", 48)),
    ("sd3", Change("tokenizer", "model_max_length", 8)),
    ("flux", Change("text_encoder_2", "vocab_size", 77)),
    ("ldm", Change("scheduler", "_class_name", "EulerDiscreteScheduler")),
    ("ldm", Change("scheduler", "_class_name", "EDMEulerScheduler")),
    ("ldm", Change("scheduler", "steps_offset", -1)),
    ("pixart-alpha", Change("scheduler", "use_flow_sigmas", True)),
]
LEAST_SAME = 0.7


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with quietly():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("kind", "change"), FIXED, ids=lambda value: str(value))
def test_a_changed_entry_is_followed_or_refused_by_name(
    kind: str, change: Change, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    result = outcome(shutil.copytree(tiny_folder(kind), tmp_path / "changed"), change)
    assert result.outcome in ("same", "refused"), result


@pytest.mark.slow
@pytest.mark.parametrize("kind", FUZZED)
def test_random_changes_are_followed_or_refused_by_name(kind: str, tmp_path: Path) -> None:
    results = fuzz(kind, tmp_path, 200)
    counts = Counter(result.outcome for result in results)
    assert len(results) >= 100 and not counts["wrong"], "\n".join(str(r) for r in results if r.outcome == "wrong")
    assert counts["same"] + counts["limit"] >= LEAST_SAME * len(results), counts


def test_the_fuzz_finds_a_setting_that_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_pipeline("sd", tmp_path / "sd")
    ignore: dict[str, Any] = {"latent_scale": 1.0, "latent_shift": 0.0, "latent_factor": 2}
    monkeypatch.setattr("diffpress.compress.sources.diffusers_folder.read_latent_space", lambda *_: ignore)
    assert outcome(folder, Change("vae", "scaling_factor", 0.25)).outcome == "wrong"


def test_every_component_has_its_turn_early(tmp_path: Path) -> None:
    changes = [Change(part, str(entry), value) for part in "abc" for entry in range(9) for value in range(3)]
    order = in_order(changes, seed=0)
    assert sorted(order, key=str) == sorted(changes, key=str)
    assert {change.component for change in order[:3]} == set("abc")
    assert len({(change.component, change.entry) for change in order[:27]}) == 27
