"""compress/seeds.py: the seeds of all purposes are far apart, and no other module defines some of its own."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from diffpress.compress import seeds

ROOT = Path(__file__).parents[2]
ALL = {name: value for name, value in vars(seeds).items() if name.endswith("_SEED")}


def test_the_ranges_are_disjoint_for_a_million_samples_each() -> None:
    assert len(ALL) >= 6
    firsts = [0, *sorted(ALL.values())]  # users sample with 0, 1, ...
    assert all(after - before >= 1_000_000 for before, after in pairwise(firsts))
    assert max(ALL, key=ALL.__getitem__) == "EVALUATION_SEED"  # the only one that is multiplied


def test_no_other_module_of_the_package_defines_seeds() -> None:
    defining = re.compile(r"^\w*SEED = [\d_]+(  #.*)?$", re.MULTILINE)
    assert defining.search((ROOT / "diffpress" / "compress" / "seeds.py").read_text())
    others = [path for path in (ROOT / "diffpress").rglob("*.py") if path.name != "seeds.py"]
    assert [path.name for path in others if defining.search(path.read_text())] == []
