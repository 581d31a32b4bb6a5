"""What one campaign returns: how much it tried, how much survived, and each failure in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Result:
    """Counts of one campaign; `failures` has a line for each trial that did not survive."""

    tried: int = 0
    survived: int = 0
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was measured besides, for docs/reliability.md

    def trial(self, name: str, problems: Iterable[str]) -> bool:
        """Count one trial, which survived if it has no problems; return whether it did."""
        found = "; ".join(problems)
        self.tried += 1
        self.survived += not found
        if found:
            self.failures.append(f"{name}: {found}")
            sys.stderr.write(f"FAILED {name}: {found}\n")  # while a long campaign goes on
        return not found

    def to_json(self) -> dict[str, Any]:
        """Return the counts, failures and notes as JSON."""
        return asdict(self)
