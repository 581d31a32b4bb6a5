"""compress/sources/renamed_imports.py: a custom module written for diffpress 0.1 is refused with the new import."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffpress.compress.sources.renamed_imports import refuse_old_imports
from diffpress.runtime.errors import InvalidInputError


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("from runtime.spec import DenoiserSpec", "is now 'from diffpress import DenoiserSpec'"),
        ("from runtime.schedule import make_plan, flow_schedule", "is now 'from diffpress import make_plan'"),
        ("from runtime.errors import BadInput", "is now 'from diffpress import InvalidInputError'"),
        ("from runtime.sampler import noise_for", "is now 'from diffpress.runtime.sampler import noise_for'"),
        ("import runtime.sampler", "is now 'import diffpress.runtime.sampler'"),
        ("from compress.load import load_checkpoint", "docs/compatibility.md"),
        (
            "def load(path):\n    from export.bundle import write_bundle",
            "from diffpress.export.bundle import write_bundle",
        ),
    ],
)
def test_an_old_import_names_its_replacement(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"import math\n{line}\n")
    with pytest.raises(InvalidInputError) as caught:
        refuse_old_imports(file)
    assert message in str(caught.value) and f"{file}:" in str(caught.value) and "\n" not in str(caught.value)


def test_new_imports_and_packages_of_the_users_own_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from diffpress.runtime.spec import DenoiserSpec\nfrom . import runtime\nfrom runtime.model import Net\n"
    )
    with pytest.raises(InvalidInputError):
        refuse_old_imports(file)
    (tmp_path / "runtime").mkdir()
    refuse_old_imports(file)
    file.write_text("def broken(:\n")
    refuse_old_imports(file)
