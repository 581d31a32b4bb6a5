"""Campaign `fuzz`: intact files of every kind with random changes, read as a user's command reads them.

A trial survives if it ends in one error line or loads correctly. What a correct load is, each kind of file defines:

    bundle              changed bytes of any file are refused, or leave the samples as they were
    manifest            sealed again, so that it is another valid bundle or refused
    graph, tokenizer    sealed again: another graph or vocabulary, or refused
    safetensors         every tensor that is loaded has the bytes at its offsets (read here, without the package)
    recipe              no entry of the file is ignored: each is in the recipe that it becomes
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.forked import Outcome, import_everything, run_forked
from tests.campaign.fuzz_kinds import KINDS, Trial
from tests.campaign.intact import make_intact
from tests.campaign.result import Result


def run(minutes: float, seed: int) -> Result:
    """Change files at random for so long; the same seed makes the same trials in the same order."""
    import_everything()
    result, counts, refused = Result(), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        intact = make_intact(Path(root, "intact"))
        end = time.monotonic() + 60 * minutes  # the inputs are made before
        for number in _numbers(end):
            kind = list(KINDS)[number % len(KINDS)]
            folder = Path(root, "trial")
            folder.mkdir()
            outcome, found = one(KINDS[kind], intact, folder, f"{seed} {number}")
            result.trial(f"{kind}, seed {seed}, number {number}", found)
            counts[kind] += 1
            refused[kind] += outcome.refused
            shutil.rmtree(folder)
    result.notes += [f"{kind}: {counts[kind]} tried, {refused[kind]} refused" for kind in KINDS]
    return result


def one(
    prepare: Callable[[Path, Path, random.Random], Trial], intact: Path, folder: Path, seed: str
) -> tuple[Outcome, list[str]]:
    """Run one trial; return its outcome and what is wrong with it."""
    trial = prepare(intact, folder, random.Random(seed))
    outcome = run_forked(trial.action, folder)
    found = list(outcome.problems())
    if outcome.code == 0 and not found:
        wrong = folder / "wrong.json"
        found += json.loads(wrong.read_text()) if wrong.is_file() else []
    return outcome, [f"{trial.change}: {problem}" for problem in found]


def _numbers(end: float) -> Iterator[int]:
    number = 0
    while time.monotonic() < end:
        yield number
        number += 1
