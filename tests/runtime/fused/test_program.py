"""runtime/fused/program.py: weighted sums with a program's coefficients give the samples of the sampler's loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import FUSED_SAMPLERS
from diffpress.runtime.fused.program import (
    CLIPPED_TERM,
    FIRST_HISTORY,
    SAMPLE_TERM,
    TERMS,
    X0_TERM,
    Program,
    fused_program,
)
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, noise_level_at
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection, Threshold, make_plan
from diffpress.runtime.solvers.contract import MAX_HISTORY
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fused_specs import CLASSES, ONE_EVALUATION, OTHERS, SCHEDULES, spec_of


class FusedNetwork:
    """A network with fused sampling in numpy: the program's float32 coefficients times arrays."""

    name = "numpy"

    def __init__(self, network: FakeNetwork) -> None:
        self._network, self.inputs, self.fused = network, network.inputs, 0

    def run(self, inputs: dict[str, np.ndarray]) -> NoReturn:
        raise AssertionError("sampled step by step")

    def run_fused(self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        self.fused += 1
        x, terms = start, np.zeros((TERMS, *start.shape), np.float32)
        for index, t in enumerate(program.timesteps):
            rows = np.concatenate([x] * program.halves)
            times = np.array([t] * len(rows)).astype(self.inputs["timestep"])
            out = self._network.run({"sample": rows, "timestep": times, **static_inputs})
            if program.halves == 2:
                cond_out, uncond_out = np.split(out, 2)
                out = uncond_out + np.float32(program.guidance) * (cond_out - uncond_out)
            a, b = program.reads[index]
            x0 = a * x + b * out + program.offsets[index][:, None, None]
            x0 = x0 if program.bounds is None else np.clip(x0, *program.bounds)
            terms[SAMPLE_TERM], terms[X0_TERM], terms[CLIPPED_TERM] = x, x0, np.clip(x0, -1.0, 1.0)
            kept, x = (np.tensordot(row[index], terms, 1) for row in (program.kept, program.moved))
            terms[FIRST_HISTORY + 2 :] = terms[FIRST_HISTORY:-2].copy()
            terms[FIRST_HISTORY], terms[FIRST_HISTORY + 1] = kept, x0
        return x


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSED_SAMPLERS, FusedNetwork.name, FusedNetwork.run_fused)


def both(
    fake_network: type[FakeNetwork], spec: DenoiserSpec, count: int = 3, batch: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the loop and of the program from the same seeds."""
    labelled = spec.conditioning.kind == "class"
    network = fake_network(spec.prediction, spec.schedule, labelled=labelled, timestep_type=np.dtype(np.float32))
    fused_only = FusedNetwork(network)
    found = generate(fused_only, spec, range(count), batch=batch)
    assert fused_only.fused == -(-count // batch)
    return generate(network, spec, range(count), batch=batch), found


@pytest.mark.parametrize("solver", ONE_EVALUATION)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_program_equals_the_solver(
    fake_network: type[FakeNetwork], solver: str, prediction: str, clip: bool, guidance: float
) -> None:
    if solver == "ddim_clip" and clip:
        pytest.skip("ddim_clip clips x_0 itself")
    spec = spec_of(solver, prediction, clip=clip, guidance=guidance, conditioning=CLASSES)
    expected, found = both(fake_network, spec)
    # float32 sums in another order; without clipping the network is steep outside the data range
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("solver", ONE_EVALUATION)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "quad", "logsnr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_on_any_spacing_and_number_of_steps(
    fake_network: type[FakeNetwork], solver: str, spacing: str, steps: int
) -> None:
    spec = spec_of(solver, "v", steps, spacing=spacing)
    expected, found = both(fake_network, spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{"start": "unit"}, {"end": 0.0}, {"start": "noise"}])
def test_start_and_end_follow_the_plan(fake_network: type[FakeNetwork], changes: dict[str, Any]) -> None:
    expected, found = both(fake_network, spec_of("dpmpp_2m", spacing="leading", **changes))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_output_corrections_are_part_of_the_coefficients(fake_network: type[FakeNetwork], prediction: str) -> None:
    output_corrections = tuple(OutputCorrection(0.01 * i - 0.03, (0.02 * i, -0.1)) for i in range(9))
    spec = spec_of("unipc_3", prediction, output_corrections=output_corrections, clip=False)
    expected, found = both(fake_network, spec)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    without = spec.with_plan(spec.plan.without_corrections)
    assert np.abs(both(fake_network, without)[1] - found).max() > 1e-2


def test_a_plan_that_starts_at_pure_noise_has_a_program(fake_network: type[FakeNetwork]) -> None:
    alphas = np.asarray(SCHEDULES["vp"].alphas)
    alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    schedule = NoiseSchedule(tuple(alphas.tolist()), tuple(np.sqrt(1.0 - alphas**2).tolist()))
    for solver in ONE_EVALUATION:
        spec = spec_of(solver, "v")
        spec = replace(spec, schedule=schedule)
        assert noise_level_at(schedule, spec.plan.timesteps[0]).alpha == 0.0
        expected, found = both(fake_network, spec)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=solver)
    with pytest.raises(InvalidInputError, match="pure noise"):
        fused_program(replace(spec_of("ddim", "epsilon"), schedule=schedule))


@pytest.mark.parametrize("solver", OTHERS)
def test_stochastic_and_multi_evaluation_solvers_have_no_program(solver: str) -> None:
    assert fused_program(spec_of(solver)) is None


@pytest.mark.parametrize(
    "changes",
    [{"eta": 0.5}, {"threshold": Threshold()}, {"guidance_interval": (0.0, 1.0)}, {"guidance_rescale": 0.7}],
)
def test_nonlinear_plans_have_no_program_and_are_run_by_the_loop(
    fake_network: type[FakeNetwork], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("ddim", conditioning=CLASSES, guidance=2.0, **changes)
    assert fused_program(spec) is None
    network = fake_network("epsilon", spec.schedule, labelled=True)
    fused_only = FusedNetwork(network)
    monkeypatch.setattr(fused_only, "run", network.run)
    np.testing.assert_array_equal(generate(fused_only, spec, range(3)), generate(network, spec, range(3)))
    assert fused_only.fused == 0


def test_a_network_whose_fused_sampler_returns_none_is_run_by_the_loop(
    fake_network: type[FakeNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("ddim")
    network = fake_network("epsilon", spec.schedule)
    fused_only = FusedNetwork(network)
    monkeypatch.setattr(fused_only, "run", network.run)
    monkeypatch.setitem(FUSED_SAMPLERS, "numpy", lambda network, program, static_inputs, start: None)
    np.testing.assert_array_equal(generate(fused_only, spec, range(3)), generate(network, spec, range(3)))


def test_steps_do_not_use_terms_from_before_the_first_step() -> None:
    program = fused_program(spec_of("dpmpp_3m"))
    assert program is not None
    for table in (program.kept, program.moved):
        for index in range(MAX_HISTORY):
            assert not table[index, FIRST_HISTORY + 2 * index :].any()
    assert program.moved[4, FIRST_HISTORY:].any() and program.moved.dtype == np.float32


def test_equal_plans_share_one_program() -> None:
    schedule = betas_schedule("linear", 100, 1e-4, 0.02)
    spec = replace(spec_of("unipc_2"), schedule=schedule, plan=make_plan("unipc_2", 5, schedule))
    again = replace(spec, schedule=replace(schedule), plan=replace(spec.plan))
    assert fused_program(again) is fused_program(spec) and hash(again.schedule) == hash(schedule)
    corrected = replace(spec.plan, output_corrections=(OutputCorrection(0.1, (0.0, 0.0)),) * 5)
    for other in (
        replace(spec, plan=corrected),
        replace(spec, plan=replace(spec.plan, clip=False)),
        replace(spec, data_range=(0.0, 1.0)),
        replace(spec, prediction="v"),
        replace(spec, schedule=betas_schedule("linear", 100, 1e-4, 0.03)),
    ):
        assert fused_program(other) is not fused_program(spec)
