"""The generated reference text of the site: complete, and the same on every machine."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from diffpress.cli.main import VERBS
from diffpress.compress.config import Config, TensorRTConfig, config_in
from diffpress.compress.distillation.distill import KINDS
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.quantization.config import BoundsConfig
from diffpress.compress.recipe import KEYS, SECTIONS
from diffpress.compress.stages import STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def every_config() -> set[type[Config]]:
    """The config classes of all stages and sections, and the classes inside them."""
    outer = [*SECTIONS.values(), *(config for stage in STAGES.values() for config in stage.configs)]
    inner = (config_in(field.annotation) for config in outer for field in config.model_fields.values())
    return {*outer, *(config for config in inner if config is not None)}


def page(uri: str) -> SimpleNamespace:
    return SimpleNamespace(file=SimpleNamespace(src_uri=uri))


def test_every_verb_has_its_help_on_the_page(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("<!-- cli -->", page("reference/cli.md"))
    for verb in VERBS:
        assert f"## diffpress {verb}\n" in text
        assert f"usage: diffpress {verb} " in text


def test_every_option_of_a_verb_is_in_its_help(hooks: ModuleType) -> None:
    text = hooks.cli_reference()
    for verb in VERBS:
        for action in hooks.verb_parser(verb)._actions:
            if action.help == argparse.SUPPRESS:  # an old name, which compatibility.md lists
                continue
            for option in action.option_strings:
                assert option in text


def test_the_help_does_not_depend_on_the_machine(hooks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hooks.cli_reference()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("DIFFPRESS_CACHE", "/somewhere/else")
    assert hooks.cli_reference() == before
    assert str(Path.home()) not in before


def test_every_key_of_a_recipe_is_in_the_tables(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("<!-- settings -->", page("recipes.md"))
    assert set(hooks.TOP_LEVEL) == set(KEYS)
    configs = every_config()
    assert {BoundsConfig, TensorRTConfig, KINDS["score"].config} <= configs
    keys = {*KEYS, *(name for config in configs for name in config.model_fields if name != "kind")}
    for key in keys:
        assert f"| `{key}` |" in text
    for kind in KINDS:
        assert f"### distill, kind {kind}\n" in text


def test_a_table_has_one_row_per_setting_with_default_and_description(hooks: ModuleType) -> None:
    configs = hooks.configs()
    assert {
        *SECTIONS,
        "prune, kind width",
        "prune.target",
        "quantize",
        "distill, all kinds",
        "quantize.qat",
        "export.tensorrt",
    } <= set(configs)
    rows = []
    for name, config in configs.items():
        rows += (found := hooks.settings_table(config).splitlines()[2:])
        if ", kind " not in name:
            assert len(found) == len([key for key in config.model_fields if key != "kind"])
    for row in rows:
        _, setting, kind, default, meaning, _ = row.replace("\\|", "").split("|")
        assert setting.strip() and kind.strip() and default.strip()
        assert meaning.strip().endswith(".") and len(meaning) > 10


def test_a_kind_of_distillation_repeats_no_setting_that_all_kinds_share(hooks: ModuleType) -> None:
    table = hooks.settings_table(KINDS["score"].config)
    assert "`score_steps`" in table and "`learning_rate`" in table  # its default differs
    assert "`save_every`" not in table


def test_the_types_of_settings_are_in_words(hooks: ModuleType) -> None:
    fields = {**TensorRTConfig.model_fields, **PruneConfig.model_fields, **BoundsConfig.model_fields}
    assert hooks.type_text(fields["ratio"]) == "number, > 0, < 1, or null"
    assert hooks.type_text(fields["method"]) == "`taylor`, `diff_pruning`, `magnitude`, `random`"
    assert hooks.type_text(fields["sizes"]) == "list of 2 lists of 2 integers, or null"
    assert hooks.type_text(fields["max_size_mib"]) == "number, > 0, or null"
    assert hooks.default_text(fields["batch"]) == "`32`"


def test_every_renamed_key_is_in_its_table(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("<!-- renamed keys -->", page("compatibility.md"))
    for section, old, new in (
        ("schedule", "grid", "spacing"),
        ("distill", "paths", "trajectories"),
        ("quantize", "keep", "ignored_layers"),
        ("quantize", "steps", "qat.steps"),
        ("export", "fixed_plan", "fixed_timesteps"),
    ):
        assert text.count(f"| `{section}.{old}` | `{section}.{new}` |") == 1


def test_every_option_with_a_second_name_is_in_its_table(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("<!-- renamed options -->", page("compatibility.md"))
    assert "| `sample` | `--spacing` |" in text
    assert "| `export` | `--fixed-timesteps` |" in text
    assert "`-n`" not in text and "`--number`" not in text


def test_links_to_the_benchmarks_stay_inside_the_site(hooks: ModuleType) -> None:
    link = "[figures](../benchmarks/few_step.md)"
    assert hooks.on_page_markdown(link, page("solvers.md")) == "[figures](benchmarks/few_step.md)"
    back = "[solvers](../docs/solvers.md)"
    assert hooks.on_page_markdown(back, page("benchmarks/few_step.md")) == "[solvers](../solvers.md)"
