"""Checkpoints of a search in its engine: the graph that a bundle would run, its size and its relative time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.evaluation.open_subject import checkpoint_subject
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.search.proxies import Cost
from diffpress.export.denoiser import lower_denoiser
from diffpress.export.engine_variants import with_engine_variants
from diffpress.export.graph.model import save_graph
from diffpress.export.verify.latency import BATCH, alternating_latency_ms
from diffpress.runtime.engines import Engine, load_engine
from diffpress.runtime.network_inputs import dummy_inputs


class EngineOfTrials:
    """Implementation of diffpress.compress.search.run.TrialEngine; `teacher` is the fp32 teacher in the engine."""

    def __init__(
        self, engine: str, threads: int | None, texts: tuple[str, ...], folder: Path, exact: Engine, teacher: Checkpoint
    ) -> None:
        self._engine, self._threads, self._texts = engine, threads, texts
        self._folder, self._exact, self._spec = folder, exact, teacher.spec
        self.teacher: EvaluationSubject = checkpoint_subject(teacher, exact, texts)

    def cost(self, checkpoint: Checkpoint, precision: str) -> Cost:
        """Measure the graph that a bundle of the checkpoint would run in the engine."""
        with self._opened(checkpoint, precision) as (_, network, size):
            teacher_ms, own_ms = alternating_latency_ms(
                (self._exact, network), dummy_inputs(self._exact, self._spec, BATCH)
            )
        return Cost(own_ms / teacher_ms, size / 2**20)

    @contextmanager
    def open(self, checkpoint: Checkpoint, precision: str) -> Iterator[EvaluationSubject]:
        """Open the graph, to sample from it."""
        with self._opened(checkpoint, precision) as (exported, network, _):
            yield checkpoint_subject(exported, network, self._texts)

    @contextmanager
    def _opened(self, checkpoint: Checkpoint, precision: str) -> Iterator[tuple[Checkpoint, Engine, int]]:
        config = ExportConfig.model_validate({"precision": precision, "threads": self._threads})
        denoiser = with_engine_variants(lower_denoiser(checkpoint, config), self._threads)
        file = self._folder / "trial.onnx"
        size = save_graph(denoiser.graph_for(self._engine).graph, file)
        with closing(load_engine(file, self._engine, self._threads)) as network:
            yield denoiser.checkpoint, network, size


@contextmanager
def open_trial_engine(
    teacher: Checkpoint, engine: str, threads: int | None, texts: tuple[str, ...]
) -> Iterator[EngineOfTrials]:
    """Open the teacher's fp32 graph in the engine, and what opens trials beside it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.onnx"
        save_graph(lower_denoiser(teacher, ExportConfig()).portable.graph, file)
        with closing(load_engine(file, engine, threads)) as exact:
            yield EngineOfTrials(engine, threads, texts, Path(folder), exact, teacher)
