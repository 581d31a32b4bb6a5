"""Paths of all files and folders that a run writes (`diffpress compress --out DIR`).

    recipe.json  inputs.json  stages/NN-NAME-KEY/  checkpoint/  float/  baseline/  bundle/  logs/NN-NAME-KEY/
    run.json  evaluation.json  gates.json  latency.json  profile.json  report.json  report.html  report.csv
    comparison.png and pairs.npz (or comparison.npz)

Other modules take their paths from a `Workspace`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import remove_leftovers
from diffpress.runtime.io.locks import exclusive


@dataclass(frozen=True)
class Workspace:
    """Paths below the folder `root` of a run."""

    root: Path

    @property
    def lock(self) -> Path:
        """Lock file of the process that is running here; it exists only while one does."""
        return self.root / ".running"

    @property
    def recipe(self) -> Path:
        """Resolved recipe, by which a later run recognizes its folder; it is a recipe that repeats the run."""
        return self.root / "recipe.json"

    @property
    def inputs(self) -> Path:
        """Hashes of the checkpoint and of the data that the run started from."""
        return self.root / "inputs.json"

    @property
    def invocation(self) -> Path:
        """The last command that ran here, with its machine and the versions of what it used."""
        return self.root / "run.json"

    @property
    def stages(self) -> Path:
        """Folder of the finished stages and of the samples that stages share."""
        return self.root / "stages"

    def stage(self, number: int, name: str, key: str) -> Path:
        """Folder of a finished stage; `key` identifies its input and settings."""
        return self.stages / f"{number:02d}-{name}-{key[:12]}"

    def work(self, stage: Path) -> Path:
        """Folder for the resume data of the stage that is saved in `stage`."""
        return self.stages / f".{stage.name}.work"

    def logs(self, stage: Path) -> Path:
        """Folder for the logs of the stage that is saved in `stage`."""
        return self.root / "logs" / stage.name

    @property
    def checkpoint(self) -> Path:
        """Folder of the last stage's checkpoint."""
        return self.root / "checkpoint"

    @property
    def float_graph(self) -> Path:
        """Folder of the result's float graph."""
        return self.root / "float"

    @property
    def baseline(self) -> Path:
        """Folder of the teacher's bundle."""
        return self.root / "baseline"

    @property
    def bundle(self) -> Path:
        """Folder of the result's bundle."""
        return self.root / "bundle"

    @property
    def evaluation(self) -> Path:
        """Scores of the result and of the teacher."""
        return self.root / "evaluation.json"

    @property
    def gates(self) -> Path:
        """Gates of the recipe with their measured values."""
        return self.root / "gates.json"

    @property
    def latency(self) -> Path:
        """Measured latency of the quantized graph relative to the float graph, per engine."""
        return self.root / "latency.json"

    @property
    def profile(self) -> Path:
        """Profiles of one evaluation of the teacher's graph and of the result's (compress/report/profiles.py)."""
        return self.root / "profile.json"

    @property
    def bench(self) -> Path:
        """Result of `diffpress bench --json`, if the user wrote it here."""
        return self.root / "bench.json"

    @property
    def comparison(self) -> Path:
        """Images of the teacher and of the result from the same noise."""
        return self.root / "comparison.png"

    @property
    def comparison_arrays(self) -> Path:
        """The same for samples that are not pictures: arrays `teacher` and `bundle`, float32 [N, ...]."""
        return self.root / "comparison.npz"

    @property
    def pairs(self) -> Path:
        """The single pictures of `comparison`: `teacher` and `bundle`, uint8 [N, H, W, C], and `prompts`, str [N]."""
        return self.root / "pairs.npz"

    def compared(self) -> Path | None:
        """Return the comparison image or arrays; None if the run could not sample."""
        return next((file for file in (self.comparison, self.comparison_arrays) if file.is_file()), None)

    @property
    def report_data(self) -> Path:
        """Everything measured, as JSON."""
        return self.root / "report.json"

    @property
    def report_page(self) -> Path:
        """The same as a web page."""
        return self.root / "report.html"

    @property
    def report_table(self) -> Path:
        """The figures of the report as CSV."""
        return self.root / "report.csv"


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Reserve the folder of a run for this process, and remove what a killed run left there.

    The folder is created if it does not exist.

    Raises:
        InvalidInputError: The folder cannot be written, or another run is using it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(exclusive(Workspace(folder).lock, folder))
        except FileExistsError as error:
            raise not_a_run(folder) from error
        except OSError as error:
            raise InvalidInputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
        if Workspace(folder).recipe.is_file():
            remove_leftovers(folder)
        yield


def not_a_run(folder: Path) -> InvalidInputError:
    """Return the error for an output path that holds something else than a run."""
    return InvalidInputError(f"{folder}: exists and is not a folder of diffpress; choose another --out")
