"""benchmarks/real_size.py: its steps run in processes, resume, and report what failed, from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitted_network import load_network, write_network
from made_models import MAKINGS, Race, needed, quantize_config, record, recorded
from real_size import run_process

from diffpress.compress.context import Context
from diffpress.compress.quantization.quantize import trajectories_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_size.py"


def test_steps_bring_what_they_need_in_order() -> None:
    assert needed(["export"]) == ["write", "fit", "ptq", "export"]
    assert needed(["nncf", "ptq"]) == ["write", "fit", "record", "float", "ptq", "nncf"]
    names = list(MAKINGS)
    assert all(names.index(need) < names.index(name) for name, making in MAKINGS.items() for need in making.needs)


def test_a_process_that_dies_gives_its_reason(tmp_path: Path) -> None:
    def run(code: str) -> dict[str, Any]:
        return run_process([sys.executable, "-c", code], tmp_path / "log")

    assert run("print('noise'); print('{\"ms\": 1}')") == {"ms": 1}
    assert run("import os; os.kill(os.getpid(), 9)") == {"failed": "out of memory (killed)"}
    assert run("import os; os.abort()") == {"failed": "ended by SIGABRT"}
    assert run("raise MemoryError('no 3 GiB')") == {"failed": "MemoryError: no 3 GiB"}
    assert run("raise SystemExit(3)") == {"failed": "exit code 3"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--subjects", "openvino"], "unknown subject 'openvino': choose from torch-fp32, "),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--peers", "no/python"], "--peers no/python: no such file"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "sd15", *flags], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_set_a_is_what_our_calibration_sees(tmp_path: Path) -> None:
    race = Race("sd15", True, tmp_path)
    write_network(race.model, True, race.network)
    record(race)
    checkpoint = load_network(race.model, race.network)
    config = quantize_config().model_copy(update={"output_correction": False})
    dataset = trajectories_of(checkpoint, config, Context(0, tmp_path / "work", checkpoint), checkpoint.model)
    visited = dataset.draw(64, torch.Generator().manual_seed(0)).inputs["sample"].numpy()
    ours = np.concatenate([inputs["sample"] for inputs, _ in recorded(race, "A")])
    assert all(min(np.abs(ours - row).max(axis=(1, 2, 3))) == 0.0 for row in visited)
    others = np.concatenate([inputs["sample"] for inputs, _ in recorded(race, "B")])
    assert all(min(np.abs(others - row).max(axis=(1, 2, 3))) > 0.1 for row in visited)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit_xl"])
def test_the_small_scale_runs_from_end_to_end_and_resumes(name: str, tmp_path: Path) -> None:
    subjects = ["torch-bf16", "onnxruntime-int8", "openvino-fp32", "openvino-int8", "nncf"]

    def run() -> tuple[list[dict[str, Any]], str]:
        command = [sys.executable, str(SCRIPT), name, "--scale", "small", "--work", str(tmp_path), "--repeats", "1"]
        done = subprocess.run([*command, "--subjects", ",".join(subjects)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        lines, _, table = done.stdout.partition("\n\n")
        return [json.loads(line) for line in lines.splitlines()], table

    (machine, *processes), table = run()
    assert "machine" in machine
    steps = {process["step"]: process for process in processes if "step" in process}
    assert list(steps) == ["write", "fit", "record", "float", "ptq", "export", "nncf"]
    assert steps["fit"]["r2"] >= 0.5 and steps["nncf"]["failed"] == "not installed"
    report = json.loads((tmp_path / f"{name}-small-race.json").read_text())
    rows = {row["subject"]: row for row in report["rows"]}
    assert list(rows) == subjects and rows["nncf"]["failed"]["accuracy"] == "not installed"
    assert rows["openvino-fp32"]["sqnr_min_db"] > 80.0 and rows["openvino-fp32"]["ratio"] == 1.0
    assert rows["openvino-int8"]["sqnr_db"] > 20.0 and rows["openvino-int8"]["integer_mac_share"] > 0.5
    assert rows["openvino-int8"]["file_bytes"] < 0.6 * rows["openvino-fp32"]["file_bytes"]
    assert all(len(row["load_seconds"]) == 2 and row["run_peak_mib"] > 0 for row in rows.values() if not row["failed"])
    assert (
        table.count("\n| ") == len(subjects) + 2 and "| NNCF int8 in OpenVINO, fp32 around | not installed |" in table
    )

    _, *again = run()[0]
    assert all(process.get("done_before") for process in again if "failed" not in process)
    (tmp_path / f"{name}-small" / "rows" / "export.json").unlink()
    _, *partly = run()[0]
    repeated = {process.get("step", process.get("subject")) for process in partly if "done_before" not in process}
    assert repeated == {"export", "openvino-int8", "onnxruntime-int8", "nncf"}
