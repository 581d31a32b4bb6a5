"""`score`: train a few-step generator with the difference of two scores (Yin et al. 2024).

This is DMD2 without its GAN loss.

    x = G(z, c)                           generated image, by the solver `consistency` if in several steps
    x_t = alpha x + sigma eps             noised to a random level in t_min .. t_max
    grad = (f(x_t) - r(x_t)) / mean |x - r(x_t)|           r, f: x_0 of the teacher and the critic
    L_G = |x - stopped(x - grad)|^2 / 2   moves generated images towards the teacher's distribution
    L_f = |f(x_t) - stopped x|^2 min(max(SNR, 1), 25)      the critic tracks the current generator

(eq. 7, and the two time scales of section 4.2: the critic gets `score_steps` updates per generator update, on average).
No images and no pairs are needed. If the teacher is guided, the generator needs no guidance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import effective_guidance, guided_output
from diffpress.compress.distillation.config import ScoreConfig
from diffpress.compress.distillation.few_steps import expand_level, few_timesteps, student_spec
from diffpress.compress.distillation.student import train_student
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, forward, noise_levels_at
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampler import initial_std
from diffpress.runtime.sampling_plan import plan_levels
from diffpress.runtime.spec import DenoiserSpec

POOL_SIZE = 1024  # size of the set of conditioning inputs that batches are drawn from
SNR_BOUNDS = (1.0, 25.0)
# as fractions of the timesteps: below, the scores hardly differ; above, x_t is almost pure noise
TIMESTEP_RANGE = (0.02, 0.98)


class GeneratorCritic(nn.Module):
    """The generator and the critic as one trainable module; `forward` evaluates one of them."""

    def __init__(self, generator: nn.Module, critic: nn.Module, spec: DenoiserSpec) -> None:
        super().__init__()
        self.generator, self.critic, self._spec = generator, critic, spec

    def forward(self, network: str, x: torch.Tensor, t: torch.Tensor, conditions: Tensors) -> torch.Tensor:
        """Return the output of `network`, 'generator' or 'critic', at x [B, ...] and timesteps t [B]."""
        out: torch.Tensor = forward(getattr(self, network), self._spec, x, t, conditions)
        return out


def score(checkpoint: Checkpoint, config: ScoreConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model into a generator of `config.sample_steps` steps, and set that plan."""
    spec = checkpoint.spec
    timesteps = few_timesteps(config.sample_steps, spec.schedule)
    levels = plan_levels(spec.schedule, timesteps)
    weight = ctx.notes["guidance"] = config.guidance or effective_guidance(spec)
    spec = student_spec(replace(spec, baked_in_guidance=weight), config.kind, "consistency", timesteps)
    teacher, cond_pool = ctx.teacher.model.eval(), ctx.conditions(POOL_SIZE)
    first, last = (round(share * (len(spec.schedule) - 1)) for share in TIMESTEP_RANGE)

    def choose(generator: torch.Generator) -> tuple[bool]:
        return (int(torch.randint(0, config.score_steps + 1, (), generator=generator)) == 0,)

    def draw(generator: torch.Generator, share: float) -> tuple[Any, ...]:
        conditions, uncond = draw_conditioning(cond_pool, config.batch, generator)
        last_step = int(torch.randint(0, len(levels) - 1, (), generator=generator))
        t = torch.randint(first, last + 1, (config.batch,), generator=generator)
        # initial noise, fresh noise before each further step, and noise that is added to the generated image
        noise = [torch.randn((config.batch, *spec.sample_shape), generator=generator) for _ in range(last_step + 2)]
        return conditions, uncond, t, noise

    def loss(
        pair: nn.Module,
        update_generator: bool,
        conditions: Tensors,
        uncond: Tensors,
        t: torch.Tensor,
        noise: list[torch.Tensor],
    ) -> torch.Tensor:
        teacher.to(t.device)
        with torch.set_grad_enabled(update_generator):
            x = generate_x0(pair, spec, levels, conditions, noise[:-1])
        level = noise_levels_at(spec, t)
        x_t = level.alpha * x.detach() + level.sigma * noise[-1]
        if not update_generator:
            critic_x0 = to_x0(spec.prediction, x_t, pair("critic", x_t, t, conditions), level)
            return torch.mean(((level.alpha / level.sigma) ** 2).clamp(*SNR_BOUNDS) * (critic_x0 - x.detach()) ** 2)
        with torch.no_grad():
            teacher_out = guided_output(teacher, spec, x_t, t, conditions, uncond, weight)
            real = to_x0(spec.prediction, x_t, teacher_out, level)
            fake = to_x0(spec.prediction, x_t, pair("critic", x_t, t, conditions), level)
            scale = (x - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True).clamp_min(1e-4)
            target = x - (fake - real) / scale
        return 0.5 * torch.mean((x - target) ** 2)

    pair = GeneratorCritic(checkpoint.clone_model(), ctx.teacher.clone_model(), spec)
    pair = train_student(
        checkpoint.evolve(spec=spec),
        Objective(draw, loss, choose),
        config,
        ctx,
        student=pair,
        part="generator",
        partial=True,
    )
    return checkpoint.evolve(model=pair.generator, spec=spec)


def generate_x0(
    pair: nn.Module,
    spec: DenoiserSpec,
    levels: tuple[NoiseLevel, ...],
    conditions: Tensors,
    noise: list[torch.Tensor],
) -> torch.Tensor:
    """Return the generator's x_0 [B, ...] at step len(noise) - 1; only that step has gradients.

    Args:
        pair: A GeneratorCritic, possibly wrapped for distributed training.
        spec: Spec of the generator.
        levels: Noise levels of its plan.
        conditions: Conditioning [B, ...] by name.
        noise: Initial noise and the fresh noise before each further step, each [B, ...].
    """
    first, *fresh = noise
    x = first * initial_std(levels[0], spec.plan.start)
    for step in range(len(noise)):
        level = expand_level(levels, step, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step == len(fresh)):
            image = to_x0(spec.prediction, x, pair("generator", x, level.t, conditions), level)
        if step < len(fresh):
            x = levels[step + 1].alpha * image + levels[step + 1].sigma * fresh[step]
    return image


def draw_conditioning(pool: ConditioningInputs, batch: int, generator: torch.Generator) -> tuple[Tensors, Tensors]:
    """Draw conditioning from the pool, [B, ...] by name, with its unconditional counterparts [1, ...]."""
    count = len(next(iter(pool.cond.values()), ()))
    picks = torch.randint(0, count or 1, (batch,), generator=generator).numpy()
    conditions = {name: torch.from_numpy(array[picks]) for name, array in pool.cond.items()}
    return conditions, {name: torch.from_numpy(array[:1]) for name, array in (pool.uncond or {}).items()}
