"""Settings of each kind of distillation: the keys of `distill: {kind: ..., ...}` in a recipe."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from diffpress.compress.config import StageConfig


class DistillConfig(StageConfig):
    """Settings shared by all kinds: how the training loop runs (compress/training/loop.py)."""

    renamed: ClassVar[dict[str, str]] = {"paths": "trajectories", "path_steps": "trajectory_steps"}

    kind: str = Field(description="Kind of distillation.")
    steps: int = Field(1000, ge=1, description="Number of optimizer steps of each training phase.")
    batch: int = Field(32, ge=1, description="Samples of one batch in each process.")
    accumulate: int = Field(
        1,
        ge=1,
        description="Batches per step in each process, whose gradients are averaged: a larger batch in its memory.",
    )
    learning_rate: float = Field(5e-4, gt=0.0, description="Peak learning rate of AdamW.")
    warmup: int = Field(20, ge=0, description="Steps of linear learning-rate warm-up.")
    ema: float = Field(
        0.99,
        ge=0.0,
        lt=1.0,
        description="Final decay of the exponential moving average of the weights, which every training starts anew.",
    )
    save_every: int = Field(100, ge=1, description="Steps between two saves of the training state, for resuming.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Compute precision; bf16 runs under autocast, the weights stay float32."
    )
    cuda_graphs: bool = Field(
        False,
        description="Replay training steps as CUDA graphs on a GPU: several times faster for small networks; "
        "one process only, and no dropout.",
    )
    preview_every: int = Field(
        0, ge=0, description="Steps between two image grids of samples, written to the run's logs/; 0: never."
    )
    tensorboard: bool = Field(False, description="Log the loss for TensorBoard to the run's logs/.")
    samples: int = Field(
        2048,
        ge=1,
        description="Number of teacher samples to train on if the recipe has no data; generated once, "
        "and only for kinds that learn from images.",
    )

    @model_validator(mode="after")
    def _graphs_hold_one_batch(self) -> Self:
        if self.cuda_graphs and self.accumulate > 1:
            raise ValueError(
                f"cuda_graphs replays steps of one batch and excludes accumulate = {self.accumulate}; remove one"
            )
        return self


class RecoverConfig(DistillConfig):
    """Train a pruned model to reproduce the model it was pruned from.

    Examples:
        >>> import diffpress as dp
        >>> dp.Recover(steps=2000).steps
        2000
    """

    kind: Literal["recover"] = Field("recover", description="Kind of distillation.")
    output_weight: float = Field(1.0, ge=0.0, description="Weight of the output loss against the teacher.")
    feature_weight: float = Field(0.1, ge=0.0, description="Weight of the block feature loss against the teacher.")
    features: Literal["energy", "projection"] = Field(
        "energy",
        description="How the outputs of blocks are compared: by their energy over the channels, or channel by channel, "
        "through a learned linear projection where the widths differ.",
    )
    task_weight: float = Field(0.0, ge=0.0, description="Weight of the denoising loss on the training images.")
    timesteps: Literal["all", "plan"] = Field(
        "all", description="Timesteps to train on: all of the noise schedule, or those of the sampling plan."
    )
    min_snr_gamma: float | None = Field(
        None,
        gt=0.0,
        description="Weights output and denoising losses of each sample so that they are min(SNR, gamma) times the "
        "squared error of the image; 5 in the paper. None: all timesteps weigh the same.",
    )

    @model_validator(mode="after")
    def _terms_have_weights(self) -> Self:
        if self.features == "projection" and not self.feature_weight:
            raise ValueError("features: projection has no effect with feature_weight: 0; remove one")
        if self.min_snr_gamma is not None and not (self.output_weight or self.task_weight):
            raise ValueError("min_snr_gamma weights the output and denoising losses, but both have weight 0; remove it")
        return self


class GuidanceConfig(DistillConfig):
    """Train one evaluation to replace the two of classifier-free guidance.

    Examples:
        >>> import diffpress as dp
        >>> dp.Guidance(weight=7.5).kind
        'guidance'
    """

    kind: Literal["guidance"] = Field("guidance", description="Kind of distillation.")
    learning_rate: float = Field(1e-4, gt=0.0, description="Peak learning rate of AdamW.")
    weight: float | None = Field(
        None, gt=0.0, description="Guidance weight baked into the student; None: that of the sampling plan."
    )
    weights: tuple[float, float] | None = Field(
        None, description="Minimum and maximum guidance weight; makes the weight an input of the network."
    )

    @model_validator(mode="after")
    def _check_weights(self) -> GuidanceConfig:
        if self.weight is not None and self.weights is not None:
            raise ValueError("set either weight (baked in) or weights (an input of the network), not both")
        if self.weights is not None and not 0.0 < self.weights[0] < self.weights[1]:
            raise ValueError("weights must be [minimum, maximum] with 0 < minimum < maximum")
        return self


class ProgressiveConfig(DistillConfig):
    """Halve the number of sampling steps repeatedly, training `steps` for each.

    A network that predicts epsilon is first trained, for another `steps`, to predict v.

    Examples:
        >>> import diffpress as dp
        >>> dp.Progressive(start_steps=16, sample_steps=2).sample_steps
        2
    """

    kind: Literal["progressive"] = Field("progressive", description="Kind of distillation.")
    learning_rate: float = Field(2e-4, gt=0.0, description="Peak learning rate of AdamW.")
    start_steps: int = Field(16, ge=2, description="Number of sampling steps before the first halving.")
    sample_steps: int = Field(2, ge=1, description="Number of sampling steps of the resulting student.")

    @model_validator(mode="after")
    def _check_halving(self) -> ProgressiveConfig:
        steps = self.start_steps
        while steps > self.sample_steps and steps % 2 == 0:
            steps //= 2
        if steps != self.sample_steps or steps == self.start_steps:
            raise ValueError(
                f"halving start_steps = {self.start_steps} does not give sample_steps = {self.sample_steps}"
            )
        return self


class TrajectoryConfig(DistillConfig):
    """Train the student's few steps to follow the teacher's fine trajectory.

    Examples:
        >>> import diffpress as dp
        >>> dp.Trajectory(sample_steps=4).kind
        'trajectory'
    """

    kind: Literal["trajectory"] = Field("trajectory", description="Kind of distillation.")
    sample_steps: int = Field(2, ge=1, description="Number of sampling steps of the student's plan.")
    other_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="Further numbers of sampling steps that the same student learns."
    )
    trajectories: int = Field(4096, ge=1, description="Number of teacher trajectories to train on; generated once.")
    trajectory_steps: int = Field(12, ge=1, description="Number of fine steps of each teacher trajectory.")

    @model_validator(mode="after")
    def _check_step_counts(self) -> TrajectoryConfig:
        counts = (self.sample_steps, *self.other_steps)
        if len(set(counts)) < len(counts):
            raise ValueError("other_steps lists a number of steps twice, or repeats sample_steps")
        if self.trajectory_steps < max(counts):
            raise ValueError(
                f"trajectory_steps = {self.trajectory_steps} is fewer than the student's {max(counts)} steps"
            )
        return self


class ConsistencyConfig(DistillConfig):
    """Train points of one noise line, increasingly far apart, to give the same image.

    Examples:
        >>> import diffpress as dp
        >>> dp.Consistency(sample_steps=2).kind
        'consistency'
    """

    kind: Literal["consistency"] = Field("consistency", description="Kind of distillation.")
    learning_rate: float = Field(1e-4, gt=0.0, description="Peak learning rate of AdamW.")
    sample_steps: int = Field(2, ge=1, description="Number of sampling steps of the student's plan.")
    q: float = Field(2.0, gt=1.0, description="Factor by which the gap between the two noise levels shrinks per stage.")
    stages: int = Field(8, ge=1, description="Number of equal stages into which the training is divided.")
    level_mean: float = Field(-0.4, description="Mean of log(sigma / alpha) of the log-normal noise levels.")
    level_sd: float = Field(
        2.0, gt=0.0, description="Standard deviation of log(sigma / alpha) of the log-normal noise levels."
    )


class ScoreConfig(DistillConfig):
    """Train a few-step generator with the difference of two scores, without images or pairs.

    The critic, which learns the score of the generated images, is trained along with the generator.

    Examples:
        >>> import diffpress as dp
        >>> dp.Score(sample_steps=1).kind
        'score'
    """

    kind: Literal["score"] = Field("score", description="Kind of distillation.")
    learning_rate: float = Field(5e-5, gt=0.0, description="Peak learning rate of AdamW.")
    sample_steps: int = Field(1, ge=1, description="Number of sampling steps of the generator.")
    score_steps: int = Field(4, ge=1, description="Average number of critic updates per generator update.")
    guidance: float | None = Field(
        None, gt=0.0, description="Guidance weight of the teacher; None: that of the sampling plan."
    )
