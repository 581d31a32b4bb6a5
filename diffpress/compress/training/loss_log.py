"""The losses of a training as `losses.csv` (step, loss) in the folder of its logs, for the curves of the report.

It is written before every save of the training state. A resumed training keeps the rows up to the step that it resumes
from, so that an interrupted training leaves the same file as an undisturbed one. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import write_text

logger = logging.getLogger(__name__)

LOSSES = "losses.csv"
COLUMNS = ("step", "loss")


class LossLog:
    """Losses of the steps so far; `folder` None keeps no log."""

    def __init__(self, folder: Path | None, start: int) -> None:
        self._file = None if folder is None else folder / LOSSES
        self._rows = [] if self._file is None else [row for row in read_losses(self._file) if row[0] <= start]

    def add(self, step: int, loss: float) -> None:
        """Keep the loss of a step, counted from 1."""
        if self._file is not None:
            self._rows.append((step, loss))

    def write(self) -> None:
        """Write all losses atomically."""
        if self._file is None:
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [COLUMNS, *((step, f"{loss:.6g}") for step, loss in self._rows)]
        )
        try:
            write_text(self._file, text.getvalue())
        except InvalidInputError as error:  # a lost log is no reason to stop a training
            logger.warning(f"the losses are not logged: {error}")


def read_losses(file: Path) -> list[tuple[int, float]]:
    """Return the (step, loss) rows of a log; none for a file that is missing or not a log of losses."""
    try:
        rows = list(csv.reader(io.StringIO(file.read_text(encoding="utf-8"))))
        return [(int(step), float(loss)) for step, loss in rows[1:]]
    except (OSError, ValueError, csv.Error):  # a lost log is no reason to stop a training or a report
        return []
