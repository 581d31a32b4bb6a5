"""How far the builder is: one live line on a terminal, a plain one every few seconds elsewhere.

TensorRT reports nested phases, each of so many steps. A phase that is inside another is a part of that one's next step:

    share(phase) = (steps done + share of what runs inside it, at most 1) / steps
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

PLAIN_EVERY_S, LIVE_EVERY_S = 10.0, 0.1


class Phases:
    """The phases that run now; may be told of them from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> (parent, steps, done)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = (parent, max(steps, 1), 0)

    def step(self, name: str) -> None:
        with self._lock:
            if name in self._phases:
                parent, steps, done = self._phases[name]
                self._phases[name] = (parent, steps, min(done + 1, steps))

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def now(self) -> tuple[float, str]:
        """The share of the outermost phase that is done, and the name of the innermost."""
        with self._lock:
            outermost = next((name for name, phase in self._phases.items() if phase[0] is None), None)
            innermost = next(reversed(self._phases), "")
            return (0.0 if outermost is None else self._share(outermost)), innermost

    def _share(self, name: str) -> float:
        _, steps, done = self._phases[name]
        inner = max((self._share(child) for child, phase in self._phases.items() if phase[0] == name), default=0.0)
        return min((done + inner) / steps, 1.0)


def monitor(trt: Any, what: str, out: TextIO | None = None) -> Any:
    """An IProgressMonitor that tells of building `what`; an interrupt stops the build and is kept in `interrupted`."""
    stream = sys.stdout if out is None else out
    live = stream.isatty()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.interrupted = False
            self._phases, self._network_conditioning = Phases(), time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self._phases.step(phase_name)
                self._tell()
            except KeyboardInterrupt:  # must not travel through the builder's own frames
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)

        def _tell(self) -> None:
            if time.monotonic() - self._network_conditioning < (LIVE_EVERY_S if live else PLAIN_EVERY_S):
                return
            self._network_conditioning = time.monotonic()
            share, phase = self._phases.now()
            line = f"  building {what}: {share:.0%}  {phase}"
            print(f"\r\033[2K{line[:79]}" if live else line, end="" if live else "\n", file=stream, flush=True)

        def clear(self) -> None:
            """Take the live line away."""
            if live:
                print("\r\033[2K", end="", file=stream, flush=True)

    return Monitor()
