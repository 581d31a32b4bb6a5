"""The settings of each kind of distillation: `distill: {kind: ..., ...}` in a recipe takes those of its kind alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffpress.compress.config import Config


class DistillConfig(Config):
    """What every kind takes: how the one training loop runs (compress/training/loop.py).

    `precision` bf16 computes under autocast, the weights stay float32. `cuda_graphs` replays steps on a GPU: several
    times faster for small networks, for one process and networks without dropout. `preview_every` steps (0: never) a
    grid of samples is drawn into the run's `logs/`, where `tensorboard` writes the loss too. Where the recipe has no
    data, the kinds that learn from images take `samples` of the teacher's, made once.
    """

    kind: str
    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(5e-4, gt=0.0)
    warmup: int = Field(20, ge=0)
    ema: float = Field(0.99, ge=0.0, lt=1.0)
    save_every: int = Field(100, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    cuda_graphs: bool = False
    preview_every: int = Field(0, ge=0)
    tensorboard: bool = False
    samples: int = Field(2048, ge=1)


class RecoverConfig(DistillConfig):
    """A pruned student learns to answer like the model it was pruned from (recover.py)."""

    kind: Literal["recover"] = "recover"
    output_weight: float = Field(1.0, ge=0.0)
    feature_weight: float = Field(0.1, ge=0.0)
    task_weight: float = Field(0.0, ge=0.0)
    timesteps: Literal["all", "plan"] = "all"


class GuidanceConfig(DistillConfig):
    """One call learns what guidance takes two for (guidance.py).

    `weight` (None: that of the plan) is baked in; `weights`, the least and the most, becomes an input of the network.
    """

    kind: Literal["guidance"]
    learning_rate: float = Field(1e-4, gt=0.0)
    weight: float | None = Field(None, gt=0.0)
    weights: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> GuidanceConfig:
        if self.weight is not None and self.weights is not None:
            raise ValueError("weight bakes one in, weights makes it an input; give one of them")
        if self.weights is not None and not 0.0 < self.weights[0] < self.weights[1]:
            raise ValueError("weights are the least and the most, both above 0")
        return self


class ProgressiveConfig(DistillConfig):
    """Steps are halved from `start_steps` down to `sample_steps`, with `steps` of training each time (progressive.py).

    A network that predicts epsilon is first taught, as many steps, to predict v.
    """

    kind: Literal["progressive"]
    learning_rate: float = Field(2e-4, gt=0.0)
    start_steps: int = Field(16, ge=2)
    sample_steps: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _halving_leads_there(self) -> ProgressiveConfig:
        steps = self.start_steps
        while steps > self.sample_steps and steps % 2 == 0:
            steps //= 2
        if steps != self.sample_steps or steps == self.start_steps:
            raise ValueError(f"halving {self.start_steps} steps does not lead to {self.sample_steps}")
        return self


class TrajectoryConfig(DistillConfig):
    """The student's own few steps learn to keep to the teacher's fine trajectory (trajectory.py).

    `trajectories` of the teacher are made once, `trajectory_steps` fine steps each. `other_steps` are further numbers
    of steps that the same student learns to sample in; `sample_steps` is what its plan says.
    """

    kind: Literal["trajectory"]
    sample_steps: int = Field(2, ge=1)
    other_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    trajectories: int = Field(4096, ge=1)
    trajectory_steps: int = Field(12, ge=1)

    @model_validator(mode="after")
    def _paths_are_finer(self) -> TrajectoryConfig:
        counts = (self.sample_steps, *self.other_steps)
        if len(set(counts)) < len(counts):
            raise ValueError("other_steps name a number of steps twice, or that of sample_steps")
        if self.trajectory_steps < max(counts):
            raise ValueError(f"{self.trajectory_steps} fine steps are fewer than the student's {max(counts)}")
        return self


class ConsistencyConfig(DistillConfig):
    """Points of one noise line, ever further apart, learn to give the same image (consistency.py).

    Noise levels are drawn log-normal. The gap between the two shrinks by `q` in each of the training's `stages`.
    """

    kind: Literal["consistency"]
    learning_rate: float = Field(1e-4, gt=0.0)
    sample_steps: int = Field(2, ge=1)
    q: float = Field(2.0, gt=1.0)
    stages: int = Field(8, ge=1)
    level_mean: float = -0.4
    level_sd: float = Field(2.0, gt=0.0)


class ScoreConfig(DistillConfig):
    """A generator of few steps, moved by the difference of two scores: no images, no pairs (score.py).

    The score of what it makes is learned beside it, `score_steps` updates for each of the generator's. `guidance` is
    the teacher's (None: that of the plan).
    """

    kind: Literal["score"]
    learning_rate: float = Field(5e-5, gt=0.0)
    sample_steps: int = Field(1, ge=1)
    score_steps: int = Field(4, ge=1)
    guidance: float | None = Field(None, gt=0.0)


KINDS: dict[str, type[DistillConfig]] = {
    "recover": RecoverConfig,
    "guidance": GuidanceConfig,
    "progressive": ProgressiveConfig,
    "trajectory": TrajectoryConfig,
    "consistency": ConsistencyConfig,
    "score": ScoreConfig,
}
# those whose students sample by the plan that they were taught alone
FEW_STEP_KINDS = ("progressive", "trajectory", "consistency", "score")
