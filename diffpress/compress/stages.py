"""The one table of stages: settings, function, order, and what `plan` and the checks must know of each.

Functions are imported when they are called: reading a recipe imports neither torch nor a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from diffpress.compress.config import StageConfig, config_classes
from diffpress.compress.distillation.distill import KINDS, AnyDistillConfig
from diffpress.compress.lazy import lazy
from diffpress.compress.pruning.prune import AnyPruneConfig
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.runtime.engines import available
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.context import Context
    from diffpress.compress.dry_run import Estimate
    from diffpress.compress.effort import Work
    from diffpress.runtime.spec import DenoiserSpec


class Stage(NamedTuple):
    """One entry of a recipe's `stages`: the stage's name and its checked configuration."""

    name: str
    config: Any

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the entry in rules and messages, such as 'distill' and 'distill: {kind: recover}'."""
        kind = getattr(self.config, "kind", None)
        return (self.name,) if kind is None else (self.name, f"{self.name}: {{kind: {kind}}}")


@dataclass(frozen=True)
class OrderRule:
    """A stage cannot come after `earlier` entries; if `required`, it can come only after one of them.

    Attributes:
        earlier: Labels of entries.
        why: The reason, as the end of the message.
        required: Whether one of `earlier` must come before the stage.
        only: Label of the entries to which the rule applies; None for all of the stage.
    """

    earlier: tuple[str, ...]
    why: str
    required: bool = False
    only: str | None = None


@dataclass(frozen=True)
class StageDef:
    """One stage.

    Attributes:
        name: Its name in a recipe.
        config: Class of its settings, or a union of classes discriminated by `kind`.
        run: (checkpoint, config, context) -> checkpoint.
        ordering: What cannot, or must, come before it.
        quantizes: Whether it gives the model quantization scales.
        trains: Whether it runs the training loop with these settings; several processes share that work.
        estimate: (estimate, config, seed) -> shapes, plan and sizes after the stage.
        work: (config, checkpoint, samples) -> network evaluations, for `plan`; None if unknown. `samples` are those
            that the teacher makes as training data, None for the stage's own number.
        check: (config, spec, has_engines, where) raises for what cannot work, before any stage runs.
    """

    name: str
    config: Any
    run: Callable[[Checkpoint, Any, Context], Checkpoint]
    ordering: tuple[OrderRule, ...] = ()
    quantizes: bool = False
    trains: Callable[[Any], bool] = lambda config: False
    estimate: Callable[[Estimate, Any, int], Estimate] = lambda estimate, config, seed: estimate
    work: Callable[[Any, Checkpoint, int | None], Work | None] = lambda config, checkpoint, samples: None
    check: Callable[[Any, DenoiserSpec, bool, str], None] = lambda config, spec, has_engines, where: None

    @property
    def configs(self) -> tuple[type[StageConfig], ...]:
        """The config classes of the stage."""
        return config_classes(self.config)  # type: ignore[return-value]


def _after_quantize(why: str) -> OrderRule:
    return OrderRule(("quantize",), f": {why}")


def _after_few_steps(only: str | None = None) -> OrderRule:
    few = tuple(f"distill: {{kind: {kind}}}" for kind, entry in KINDS.items() if entry.few_step)
    return OrderRule(few, ", which is for one network and one plan", only=only)


def _check_quantize(config: QuantizeConfig, spec: DenoiserSpec, has_engines: bool, where: str) -> None:
    from diffpress.compress.quantization.algorithms.mixed_precision import check_bounds
    from diffpress.compress.training import distributed

    if isinstance(config.components, dict):
        known = [*(encoder.graph for encoder in spec.conditioning.encoders), "vae_decoder"]
        for name in config.components:
            if name not in known:
                raise unknown_name(f"{where}: quantize.components", name, known)
    if config.bounds is None:
        return
    check_bounds(config.bounds, spec, has_engines)
    if config.qat and distributed.count() > 1:
        raise InvalidInputError(
            f"{where}: quantize: qat with bounds depends on latencies that differ between processes; run it with one "
            "process, which keeps stages that several processes finished"
        )


def _check_prune(config: Any, spec: DenoiserSpec, has_engines: bool, where: str) -> None:
    target = getattr(config, "target", None)
    if target is not None and target.latency is not None and not has_engines:
        raise InvalidInputError(f"{where}: prune: target latency is measured in an engine, and none is open; set macs")
    if config.kind == "low_rank" and config.engine is not None:
        if not has_engines:
            raise InvalidInputError(
                f"{where}: prune: engine = '{config.engine}' is where layers are timed, and none is open; remove engine"
            )
        if config.engine not in available():
            raise MissingDependencyError(config.engine, config.engine, f"{where}: prune: engine")
    if target is not None and target.latency is not None and _searches_blocks(config):
        from diffpress.compress.training import distributed

        if distributed.count() > 1:
            raise InvalidInputError(
                f"{where}: prune: method recoverability with a target of latency depends on latencies that differ "
                "between processes; run it with one process, or set target.macs"
            )


def _searches_blocks(config: Any) -> bool:
    return getattr(config, "search", None) is not None


_RECOVER = "distill: {kind: recover}"
_WIDTH, SPARSITY, LOW_RANK = "prune: {kind: width}", "prune: {kind: sparsity}", "prune: {kind: low_rank}"
STAGES: dict[str, StageDef] = {
    stage.name: stage
    for stage in (
        StageDef(
            "schedule",
            ScheduleConfig,
            lazy("diffpress.compress.sampling_schedule.schedule:schedule"),
            ordering=(_after_quantize("scales are calibrated on the trajectory that is deployed"), _after_few_steps()),
            estimate=lazy("diffpress.compress.dry_run:estimate_schedule"),
            work=lazy("diffpress.compress.effort:work_of_schedule"),
        ),
        StageDef(
            "prune",
            AnyPruneConfig,
            lazy("diffpress.compress.pruning.prune:prune"),
            ordering=(
                _after_quantize("scales are calibrated for one set of channels"),
                _after_few_steps(),
                OrderRule((SPARSITY,), ": removing channels breaks the groups of four", only=_WIDTH),
                OrderRule((LOW_RANK,), ": its groups of channels are those of whole layers", only=_WIDTH),
                OrderRule((SPARSITY,), ": the factors of sparse weights are dense", only=LOW_RANK),
            ),
            trains=_searches_blocks,
            estimate=lazy("diffpress.compress.pruning.prune:estimate_prune"),
            work=lazy("diffpress.compress.pruning.prune:work_of_prune"),
            check=_check_prune,
        ),
        StageDef(
            "distill",
            AnyDistillConfig,
            lazy("diffpress.compress.distillation.distill:distill"),
            ordering=(
                _after_quantize("training moves the weights away from their calibrated scales"),
                _after_few_steps(_RECOVER),
                OrderRule(("prune",), ": nothing was lost yet", required=True, only=_RECOVER),
            ),
            trains=lambda config: True,
            estimate=lazy("diffpress.compress.dry_run:estimate_distill"),
            work=lazy("diffpress.compress.effort:work_of_distill"),
        ),
        StageDef(
            "quantize",
            QuantizeConfig,
            lazy("diffpress.compress.quantization.quantize:quantize"),
            ordering=(_after_quantize("a model is quantized once"),),
            quantizes=True,
            trains=lambda config: config.qat is not None,
            estimate=lazy("diffpress.compress.dry_run:estimate_quantize"),
            work=lazy("diffpress.compress.effort:work_of_quantize"),
            check=_check_quantize,
        ),
    )
}


def check_order(stages: Sequence[Stage], source: str, *, is_student: bool = False, before: Sequence[str] = ()) -> None:
    """Raise InvalidInputError for the first stage that breaks a rule of order, with the reason.

    Args:
        stages: The recipe's stages.
        source: Name of the recipe, for the message.
        is_student: Whether the recipe begins with a student, which may have gone through any stage.
        before: Labels of what the checkpoint is known to have gone through.
    """
    for i, stage in enumerate(stages):
        earlier_labels = [*before, *(label for earlier in stages[:i] for label in earlier.labels)]
        for rule in STAGES[stage.name].ordering:
            if rule.only is not None and rule.only not in stage.labels:
                continue
            found = next((label for label in earlier_labels if label in rule.earlier), None)
            if rule.required and found is None and not is_student:
                raise InvalidInputError(
                    f"{source}: stages[{i}]: {stage.labels[-1]} must come after {' or '.join(rule.earlier)}{rule.why}"
                )
            if found is not None and not rule.required:
                name = stage.name if rule.only is None else rule.only
                raise InvalidInputError(f"{source}: stages[{i}]: {name} cannot come after {found}{rule.why}")


def stages_of(configs: Iterable[object]) -> tuple[Stage, ...]:
    """Return the entries for stage objects; InvalidInputError for anything that is not a stage."""
    found = []
    for config in configs:
        name = next((name for name, stage in STAGES.items() if isinstance(config, stage.configs)), None)
        if name is None:
            raise InvalidInputError(
                f"stages: {config!r} is not a stage; use diffpress.Prune(...), Quantize(...) and so on"
            )
        found.append(Stage(name, config))
    return tuple(found)
