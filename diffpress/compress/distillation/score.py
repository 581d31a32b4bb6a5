"""`score`: a generator of few steps, moved by the difference of two scores (DMD2 without its GAN, Yin et al. 2024).

    x = G(z, c)                           what the generator makes, by the solver `consistency` if in several steps
    x_t = alpha x + sigma eps             noised to a level drawn from t_min .. t_max
    grad = (f(x_t) - r(x_t)) / mean |x - r(x_t)|           r, f: x_0 of the teacher and of the critic
    L_G = |x - stopped(x - grad)|^2 / 2   moves x from where generated images lie to where the teacher's do
    L_f = |f(x_t) - stopped x|^2 min(max(SNR, 1), 25)      the critic follows what the generator makes now

(equation 7 and the two time scales of section 4.2: the critic has `score_steps` updates for each of the generator's.)
No images and no pairs are needed. The teacher may be guided; the generator then needs no guidance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import guidance_in, guided
from diffpress.compress.distillation.config import ScoreConfig
from diffpress.compress.distillation.few_steps import few_timesteps, place, student_spec, x0_of
from diffpress.compress.distillation.student import trained
from diffpress.compress.training.distributed import agreed
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, coefficients, forward
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.sampler import initial_std
from diffpress.runtime.sampling_plan import plan_levels
from diffpress.runtime.spec import DenoiserSpec

POOL = 1024  # conditions that generated images are told, drawn from these
SNR_BOUNDS = (1.0, 25.0)
SHARES = (0.02, 0.98)  # of the timesteps: below nothing differs, above nothing is seen


class Pair(nn.Module):
    """The generator and the critic as one module to train: `forward` asks one of them."""

    def __init__(self, generator: nn.Module, critic: nn.Module, spec: DenoiserSpec) -> None:
        super().__init__()
        self.generator, self.critic, self._spec = generator, critic, spec

    def forward(self, who: str, x: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> torch.Tensor:
        """The output of 'generator' or 'critic' at x [B, C, H, W] and timesteps t [B]."""
        out: torch.Tensor = forward(getattr(self, who), self._spec, x, t, conditions)
        return out


def score(checkpoint: Checkpoint, config: ScoreConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model into a generator of `config.sample_steps` steps; returns it with that plan."""
    spec = checkpoint.spec
    if ctx.teacher.spec.prediction != spec.prediction:
        raise InvalidInputError(
            f"distill: {{kind: score}}: the teacher predicts {ctx.teacher.spec.prediction}, the student "
            f"{spec.prediction}; take this kind before the one that changed it"
        )
    points = plan_levels(spec.schedule, few_timesteps(config.sample_steps, spec.schedule))
    spec = student_spec(spec, config.kind, "consistency", tuple(point.t for point in points[:-1]))
    teacher, cond_pool = ctx.teacher.model.eval(), ctx.conditions(POOL)
    weight = ctx.notes["guidance"] = config.guidance or guidance_in(checkpoint)
    first, last = (round(share * (len(spec.schedule) - 1)) for share in SHARES)

    def draw(generator: torch.Generator, share: float) -> tuple[Any, ...]:
        conditions, uncond = drawn(cond_pool, config.batch, generator)
        # one of the two in all processes, whose gradients are averaged
        moves = agreed(int(torch.randint(0, config.score_steps + 1, (), generator=generator))) == 0
        chosen = int(torch.randint(0, len(points) - 1, (), generator=generator))
        t = torch.randint(first, last + 1, (config.batch,), generator=generator)
        # what the generator starts from, what is added before each further step, and what hides its image
        noise = [torch.randn((config.batch, *spec.sample_shape), generator=generator) for _ in range(chosen + 2)]
        return conditions, uncond, moves, t, noise

    def loss(
        pair: nn.Module, conditions: Tensors, uncond: Tensors, moves: bool, t: torch.Tensor, noise: list[torch.Tensor]
    ) -> torch.Tensor:
        teacher.to(t.device)
        with torch.set_grad_enabled(moves):
            x = generated(pair, spec, points, conditions, noise[:-1])
        alpha, sigma = coefficients(spec, t)
        x_t = alpha * x.detach() + sigma * noise[-1]
        if not moves:
            found = x0_of(spec, pair("critic", x_t, t, conditions), x_t, alpha, sigma)
            return torch.mean(((alpha / sigma) ** 2).clamp(*SNR_BOUNDS) * (found - x.detach()) ** 2)
        with torch.no_grad():
            answer = guided(teacher, spec, x_t, t, conditions, uncond, weight)
            real = x0_of(spec, answer, x_t, alpha, sigma)
            fake = x0_of(spec, pair("critic", x_t, t, conditions), x_t, alpha, sigma)
            scale = (x - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-4)
            wanted = x - (fake - real) / scale
        return 0.5 * torch.mean((x - wanted) ** 2)

    pair = Pair(checkpoint.clone_model(), ctx.teacher.clone_model(), spec)
    pair = trained(checkpoint.evolve(spec=spec), Objective(draw, loss), config, ctx, student=pair, partial=True)
    return checkpoint.evolve(model=pair.generator, spec=spec)


def generated(
    pair: nn.Module,
    spec: DenoiserSpec,
    points: tuple[NoiseLevel, ...],
    conditions: Tensors,
    noise: list[torch.Tensor],
) -> torch.Tensor:
    """Images [B, C, H, W] as the generator sees them at the step that the last of `noise` leads to; gradients through
    that step alone.
    """
    first, *fresh = noise
    x = first * initial_std(points[0], spec.plan.start)
    for step in range(len(noise)):
        here = place(points, step, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step == len(fresh)):
            image = x0_of(spec, pair("generator", x, here.t, conditions), x, here.alpha, here.sigma)
        if step < len(fresh):
            x = points[step + 1].alpha * image + points[step + 1].sigma * fresh[step]
    return image


def drawn(pool: ConditioningInputs, batch: int, generator: torch.Generator) -> tuple[Tensors, Tensors]:
    """Random members of the pool, [B, ...] by input name, and what stands for none, [1, ...]."""
    count = len(next(iter(pool.cond.values()), ()))
    picks = torch.randint(0, count or 1, (batch,), generator=generator).numpy()
    conditions = {name: torch.from_numpy(array[picks]) for name, array in pool.cond.items()}
    return conditions, {name: torch.from_numpy(array[:1]) for name, array in (pool.uncond or {}).items()}
