"""Distillation stages. `recover`: a pruned student learns to answer like the model it was pruned from.

On real images noised to timesteps of the whole schedule or of the plan, with o the outputs and e the block energies,

    L = w_out |o_s - o_t|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2  +  w_task |o_s - target|^2

(output + feature distillation of BK-SDM, Kim et al. 2023, eq. 2-4). Widths differ after pruning, so a feature f is
compared through its energy map e = mean over channels of f^2, as in attention transfer (Zagoruyko & Komodakis
2017): no projection has to be learned and thrown away. The teacher is the checkpoint the run began with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from compress.adapters import adapter_for
from compress.checkpoint import Checkpoint
from compress.config import DistillConfig
from compress.context import Context
from compress.losses import add_noise, forward, target_of
from compress.training import Training, train

Features = dict[str, torch.Tensor]


def distill(checkpoint: Checkpoint, config: DistillConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model; returns it with new weights (the EMA)."""
    run = Training(
        config.steps,
        config.learning_rate,
        config.warmup,
        config.ema,
        ctx.seed,
        config.save_every,
        ctx.work,
        f"distill {config.kind}",
    )
    student = train(checkpoint.clone_model(), KINDS[config.kind](checkpoint, config, ctx), run)
    ctx.teacher.model.to("cpu")  # training took it to the student's device
    return checkpoint.evolve(model=student)


def _recover(checkpoint: Checkpoint, config: DistillConfig, ctx: Context) -> Callable[..., torch.Tensor]:
    data, spec = ctx.require_data("distill: {kind: recover}"), checkpoint.spec
    teacher = ctx.teacher.model.eval()
    # a fixed plan visits few timesteps: with `timesteps: plan` all of the training goes there
    visited = spec.plan.timesteps if config.timesteps == "plan" else range(len(spec.schedule))
    timesteps = torch.tensor(list(visited)).round().long()
    blocks = adapter_for(teacher).blocks(teacher) if config.feature_weight else []

    def loss_of(student: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x0, conditions = data.batch(config.batch, generator)
        conditions = drop_conditions(conditions, data.null, generator)
        t = timesteps[torch.randint(0, len(timesteps), (config.batch,), generator=generator)]
        noise = torch.randn(x0.shape, generator=generator)
        device = next(student.parameters()).device
        teacher.to(device)
        x0, noise, t = x0.to(device), noise.to(device), t.to(device)
        conditions = {name: value.to(device) for name, value in conditions.items()}
        x_t = add_noise(spec, x0, noise, t)
        with torch.no_grad(), captured(teacher, blocks) as wanted:
            answer = forward(teacher, spec, x_t, t, conditions)
        with captured(student, blocks) as found:
            out = forward(student, spec, x_t, t, conditions)
        loss = config.output_weight * torch.mean((out - answer) ** 2)
        if blocks:
            loss = loss + config.feature_weight * feature_distance(found, wanted)
        if config.task_weight:
            loss = loss + config.task_weight * torch.mean((out - target_of(spec, x0, noise, t)) ** 2)
        return loss

    return loss_of


KINDS = {"recover": _recover}


def drop_conditions(
    conditions: dict[str, torch.Tensor],
    null: dict[str, torch.Tensor],
    generator: torch.Generator,
    share: float = 0.1,
) -> dict[str, torch.Tensor]:
    """Tell a tenth of the batch nothing, `null` [1, ...], so that guidance keeps working (Ho & Salimans 2022)."""
    if not null:
        return conditions
    batch = len(next(iter(conditions.values())))
    dropped = torch.rand((batch,), generator=generator) < share
    kept = {name: value for name, value in conditions.items() if name not in null}
    return kept | {
        name: torch.where(dropped.view(-1, *[1] * (conditions[name].dim() - 1)), nothing, conditions[name])
        for name, nothing in null.items()
    }


def feature_distance(found: Features, wanted: Features) -> torch.Tensor:
    """Mean over blocks of the relative squared distance between energy maps: [B, H, W], or [B, tokens]."""
    terms = []
    for name, reference in wanted.items():
        channels = 1 if reference.dim() == 4 else -1
        ours, theirs = found[name].square().mean(channels), reference.square().mean(channels)
        terms.append(torch.mean((ours - theirs) ** 2) / torch.mean(theirs**2).clamp_min(1e-12))
    return torch.stack(terms).mean()


@contextmanager
def captured(model: nn.Module, names: list[str]) -> Iterator[Features]:
    """Collect the outputs of the named blocks during the forwards inside the context."""
    features: Features = {}
    modules = dict(getattr(model, "module", model).named_modules())  # under DDP the model is wrapped
    with ExitStack() as stack:
        for name in names:
            hook = modules[name].register_forward_hook(_keep(features, name))
            stack.callback(hook.remove)
        yield features


def _keep(features: Features, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, tuple):
            # U-Net blocks give (stream, (skip, ...), ...), joint transformer blocks (text, stream)
            output = output[0] if isinstance(output[-1], tuple) or len(output) > 2 else output[-1]
        features[name] = output  # type: ignore[assignment]

    return hook
