"""Progress of an engine build: one live line on a terminal, a log record every few seconds elsewhere.

TensorRT reports nested phases with a number of steps each. A nested phase is part of its parent's next step:

    progress(phase) = (steps done + progress of its nested phase, at most 1) / steps
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

logger = logging.getLogger(__name__)

PLAIN_EVERY_S, LIVE_EVERY_S = 10.0, 0.1


class Phases:
    """The running phases of a build; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps, done)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Add a phase with this number of steps."""
        with self._lock:
            self._phases[name] = (parent, max(steps, 1), 0)

    def step(self, name: str) -> None:
        """Count one finished step of a phase."""
        with self._lock:
            if name in self._phases:
                parent, steps, done = self._phases[name]
                self._phases[name] = (parent, steps, min(done + 1, steps))

    def finish(self, name: str) -> None:
        """Remove a phase."""
        with self._lock:
            self._phases.pop(name, None)

    def now(self) -> tuple[float, str]:
        """Return the progress of the outermost phase in 0..1, and the name of the innermost."""
        with self._lock:
            outermost = next((name for name, phase in self._phases.items() if phase[0] is None), None)
            innermost = next(reversed(self._phases), "")
            return (0.0 if outermost is None else self._progress(outermost)), innermost

    def _progress(self, name: str) -> float:
        _, steps, done = self._phases[name]
        nested = max((self._progress(child) for child, phase in self._phases.items() if phase[0] == name), default=0.0)
        return min((done + nested) / steps, 1.0)


def monitor(trt: Any, what: str) -> Any:
    """Create an IProgressMonitor that reports progress; Ctrl-C stops the build and sets `interrupted`."""
    live = sys.stdout.isatty() and logger.isEnabledFor(logging.INFO)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self._phases, self._last_report = Phases(), time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self._phases.step(phase_name)
                self._report()
            except KeyboardInterrupt:  # must not propagate through the builder's C++ frames
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def _report(self) -> None:
            if time.monotonic() - self._last_report < (LIVE_EVERY_S if live else PLAIN_EVERY_S):
                return
            self._last_report = time.monotonic()
            progress, phase = self._phases.now()
            line = f"building {what}: {progress:.0%}  {phase}"
            if live:
                _show(f"  {line}"[:79])
            else:
                logger.info(line)

        def clear(self) -> None:
            """Erase the live line."""
            if live:
                _show("")

    return Monitor()


def _show(line: str) -> None:
    """Replace the current line of the terminal."""
    sys.stdout.write(f"\r\033[2K{line}")
    sys.stdout.flush()
