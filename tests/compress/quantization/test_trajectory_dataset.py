"""compress/quantization/trajectory_dataset.py: states that the model visits, recorded once, drawn evenly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import capture_features, energy_map
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization import trajectory_dataset
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize, trajectories_of
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate


class RecordingNetwork(TorchNetwork):
    """Keeps the inputs and outputs of every evaluation."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.inputs_seen: list[dict[str, np.ndarray]] = []
        self.outputs: list[np.ndarray] = []

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.inputs_seen.append(inputs)
        self.outputs.append(super().run(inputs))
        return self.outputs[-1]


def dataset(checkpoint: Checkpoint, ctx: Context, qat: dict[str, Any] | None = None, **more: Any) -> TrajectoryDataset:
    config = QuantizeConfig(**{"samples": 5, "batch": 3, "qat": qat or {"trajectories": 5}, **more})
    return trajectories_of(checkpoint, config, ctx)


def by_label_and_timestep(inputs: dict[str, torch.Tensor], values: torch.Tensor) -> dict[tuple[Any, ...], torch.Tensor]:
    """Map every state, identified by its timestep, label and first pixels, to its value."""
    keys = zip(
        inputs["timestep"].tolist(), inputs["class_labels"].tolist(), inputs["sample"][:, 0, 0, 0].tolist(), strict=True
    )
    return {(t, label, round(x, 4)): value for (t, label, x), value in zip(keys, values, strict=True)}


def test_drawn_states_are_those_of_the_models_own_trajectory_under_guidance(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    guided = unet.evolve(spec=replace(unet.spec, plan=replace(unet.spec.plan, guidance=2.0)))
    network = RecordingNetwork(unet.model, guided.spec)
    generate(network, guided.spec, range(CALIBRATION_SEED, CALIBRATION_SEED + 5), batch=3)
    seen = {name: torch.from_numpy(np.concatenate([i[name] for i in network.inputs_seen])) for name in network.inputs}
    expected = by_label_and_timestep(seen, torch.from_numpy(np.concatenate(network.outputs)))
    states = dataset(guided, context(unet)).draw(400, torch.Generator().manual_seed(0))
    found = by_label_and_timestep(states.inputs, states.outputs)
    assert found.keys() == expected.keys() and len(found) == 2 * 5 * 4  # cond and uncond at four timesteps
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


def test_recorded_energies_are_those_of_the_model_at_the_drawn_states(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    states = dataset(unet, context(unet)).draw(6, torch.Generator().manual_seed(1))
    blocks = adapter_for(unet.model).blocks(unet.model)
    with torch.no_grad(), capture_features(unet.model, blocks) as features:
        outputs = adapter_for(unet.model).forward(unet.model, states.inputs)
    torch.testing.assert_close(states.outputs, outputs, rtol=1e-4, atol=1e-5)
    assert states.energies.keys() == features.keys() == set(blocks)
    for name, feature in features.items():
        torch.testing.assert_close(states.energies[name], energy_map(feature), rtol=1e-4, atol=1e-5)


def test_states_are_drawn_uniformly_from_the_first_trajectories(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = dataset(unet, context(unet), {"trajectories": 8})
    for trajectories in (5, 8):
        states = found.draw(8000, torch.Generator().manual_seed(0), trajectories)
        counts = torch.unique(states.inputs["sample"].flatten(1), dim=0, return_counts=True)[1]
        expected = 8000 / (4 * trajectories)
        assert len(counts) == 4 * trajectories and (counts - expected).abs().max() < 5 * expected**0.5


def test_the_network_is_evaluated_once_however_often_states_are_read(
    unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluations, run = [], TorchNetwork.run

    def counting(network: TorchNetwork, inputs: dict[str, np.ndarray]) -> np.ndarray:
        evaluations.append(len(inputs["sample"]))
        return run(network, inputs)

    monkeypatch.setattr(TorchNetwork, "run", counting)
    found = dataset(unet, context(unet), {"trajectories": 8})
    found.observe("calibrate", {}, {})
    assert evaluations == [3] * 4 + [2] * 4
    first = found.draw(9, torch.Generator().manual_seed(0))
    found.draw(9, torch.Generator().manual_seed(0), 8)
    assert evaluations == [3] * 4 + [2] * 4 + [3] * 4  # trajectories 5 to 7, which only the training reads
    again = dataset(unet, context(unet), {"trajectories": 8}).draw(9, torch.Generator().manual_seed(0))
    assert len(evaluations) == 12 and torch.equal(again.outputs, first.outputs)


def test_observers_see_the_same_activations_while_sampling_and_from_recorded_states(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found, seen = dataset(unet, context(unet)), []
    for what in ("first", "second"):
        values: list[torch.Tensor] = []
        found.observe(what, {"mid_block.output": lambda x, *_, values=values: values.append(x.clone())}, {})
        seen.append(values)
    assert len(seen[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_states_of_other_settings_are_not_used(unet: Checkpoint, context: Callable[..., Context]) -> None:
    ctx = context(unet)
    before = dataset(unet, ctx).draw(4, torch.Generator().manual_seed(0))
    other = unet.evolve(spec=unet.spec.with_plan(unet.spec.plan.over(unet.spec.plan.timesteps[:2])))
    after = dataset(other, ctx).draw(64, torch.Generator().manual_seed(0))
    assert set(after.inputs["timestep"].tolist()) == {round(t) for t in other.spec.plan.timesteps}
    assert before.inputs["timestep"].min() < after.inputs["timestep"].min()


def test_training_on_fewer_trajectories_than_the_samples_reads_only_these(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    states = dataset(unet, context(unet), {"trajectories": 2}).draw(500, torch.Generator().manual_seed(0), 2)
    assert len(torch.unique(states.inputs["sample"].flatten(1), dim=0)) == 2 * 4


@pytest.mark.parametrize("samples", [3, 5])  # one batch, two batches
@pytest.mark.parametrize("observed", [True, False])
def test_a_run_killed_while_the_last_batch_is_written_can_be_repeated(
    observed: bool,
    samples: int,
    unet: Checkpoint,
    context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ctx, write = context(unet), trajectory_dataset._write
    settings: dict[str, Any] = {"qat": {"trajectories": samples}, "samples": samples}
    undisturbed = dataset(unet, replace(ctx, work=tmp_path / "undisturbed"), **settings)

    def killed(path: Path, *arguments: Any) -> None:
        if path.stem.endswith(f"{samples:06d}"):
            raise KeyboardInterrupt
        write(path, *arguments)

    def run(found: TrajectoryDataset) -> torch.Tensor:
        if observed:
            found.observe("calibrate", {"mid_block.output": lambda *_: None}, {})
        return found.draw(50, torch.Generator().manual_seed(0)).outputs

    monkeypatch.setattr("diffpress.compress.quantization.calibration.observer.SAVE_EVERY", 1)
    with monkeypatch.context() as patched:
        patched.setattr(trajectory_dataset, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(dataset(unet, ctx, **settings))
    torch.testing.assert_close(run(dataset(unet, ctx, **settings)), run(undisturbed))


def test_an_unreadable_file_is_named(unet: Checkpoint, context: Callable[..., Context]) -> None:
    ctx = context(unet)
    dataset(unet, ctx).draw(1, torch.Generator())
    (file,) = ctx.work.glob("trajectories-0/000000-000003.safetensors")
    file.write_bytes(b"half a fi")
    with pytest.raises(InvalidInputError, match=r"000000-000003\.safetensors: cannot be read .*; delete it"):
        dataset(unet, ctx).draw(1, torch.Generator())


def test_nothing_is_recorded_if_no_method_reads_the_states_again(
    unet: Checkpoint, context: Callable[..., Context], tmp_path: Path
) -> None:
    quantize(unet, QuantizeConfig(samples=4, batch=2), replace(context(unet), work=tmp_path / "other"))
    assert not list((tmp_path / "other").rglob("trajectories*"))
