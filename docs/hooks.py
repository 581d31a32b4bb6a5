"""mkdocs hooks: reference text that is generated from the code, so that it cannot disagree with it.

A page contains a marker, and `on_page_markdown` replaces it:

    <!-- cli -->                the --help of every verb
    <!-- settings -->           a table of the settings of every stage and section of a recipe
    <!-- renamed keys -->       recipe keys of earlier versions and their present names
    <!-- renamed options -->    options of the command line that have a second, older name
    <!-- format 1 names -->     names in the spec of bundle format 1 and their names in format 2

`on_files` adds the pages in benchmarks/, which lie beside docs/ in the repository.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from unittest import mock

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from diffpress.cli.main import VERBS
from diffpress.compress.config import Config, StageConfig, config_in
from diffpress.compress.recipe import SECTIONS, TEACHER_SAMPLES
from diffpress.compress.recipe_schema import DESCRIPTIONS
from diffpress.compress.stages import STAGES
from diffpress.runtime import format_1

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
WIDTH = 100  # columns of the help texts

# the key of a recipe itself -> type, default
TOP_LEVEL = {
    "seed": ("integer", "`0`"),
    "data": ("path", "`null`"),
    "teacher": ("path or hub id", "`null`"),
    "teacher_samples": ("integer, >= 1", f"`{TEACHER_SAMPLES}`"),
    "stages": ("list", "`[]`"),
    "export": ("section", "defaults below"),
    "evaluate": ("section", "`null`"),
    "gates": ("section", "`{}`"),
}


# what a reader of the Markdown sees where the site has generated text
GENERATED = "*Generated from the code: `make docs` fills it in and writes the site to `build/site`.* "


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """Return the page's Markdown with every marker replaced, and links to benchmarks/ valid inside the site."""
    for marker, text in MARKERS.items():
        if marker in markdown:
            markdown = markdown.replace(GENERATED + marker, marker).replace(marker, text())
    if page.file.src_uri.startswith("benchmarks/"):
        return markdown.replace("](../docs/", "](../")
    return markdown.replace("](../benchmarks/", "](benchmarks/")


def on_files(files: Any, config: Any, **_: object) -> Any:
    """Add benchmarks/*.md and the images beside them to the site."""
    from mkdocs.structure.files import File

    for path in sorted([*BENCHMARKS.glob("*.md"), *BENCHMARKS.glob("*.png")]):
        files.append(File.generated(config, f"benchmarks/{path.name}", abs_src_path=str(path)))
    return files


def cli_reference() -> str:
    """Return one section for every verb: what it does, and its help text."""
    return "\n\n".join(
        f"## diffpress {verb}\n\n{purpose[0].upper()}{purpose[1:]}.\n\n```text\n{help_text(verb)}```"
        for verb, purpose in VERBS.items()
    )


def help_text(verb: str) -> str:
    """Return what `diffpress VERB --help` prints, the same on every machine."""
    with mock.patch.dict(os.environ, {"COLUMNS": str(WIDTH), "DIFFPRESS_CACHE": "~/.cache/diffpress"}):
        return verb_parser(verb).format_help()


def verb_parser(verb: str) -> argparse.ArgumentParser:
    """Return the parser of a verb, as `diffpress.cli.main.run_verb` makes it."""
    module = importlib.import_module(f"diffpress.cli.{verb}")
    example = getattr(module, "EXAMPLE", None)
    parser = argparse.ArgumentParser(
        f"diffpress {verb}", description=VERBS[verb], epilog=example and f"example: {example}"
    )
    module.add_arguments(parser)
    return parser


def settings_reference() -> str:
    """Return the tables of all settings of a recipe: its own keys, then every stage and section."""
    rows = ((f"`{key}`", *entry, DESCRIPTIONS[key]) for key, entry in TOP_LEVEL.items())
    parts = ["### The recipe", _table(("key", "type", "default", "meaning"), rows)]
    for name, config in configs().items():
        parts += [f"### {name}", _first_line(config), settings_table(config)]
    return "\n\n".join(parts)


def settings_table(config: type[Config]) -> str:
    """Return the table of one class: name, type, default and description of every setting.

    A kind of a stage lists only what differs from the settings that all kinds share.
    """
    inherited = _shared(config).model_fields
    rows = (
        (f"`{name}`", type_text(field), default_text(field), description_text(field))
        for name, field in config.model_fields.items()
        if name != "kind" and not (name in inherited and _same(field, inherited[name]))
    )
    return _table(("setting", "type", "default", "meaning"), rows)


def type_text(field: FieldInfo) -> str:
    """Return the type of a setting in words, with its bounds: 'number, > 0, or null'."""
    words, optional = _annotation(field.annotation)
    bounds = [
        f"{sign} {bound:g}"
        for entry in field.metadata
        for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))
        if (bound := getattr(entry, name, None)) is not None
    ]
    return ", ".join([words, *bounds]) + (", or null" if optional else "")


def default_text(field: FieldInfo) -> str:
    """Return the default as YAML writes it; 'required' without one."""
    if field.default is PydanticUndefined:
        return "required"
    if isinstance(field.default, Config):
        return "defaults below"
    return f"`{_yaml(field.default)}`"


def description_text(field: FieldInfo) -> str:
    """Return the description as a sentence that speaks YAML: null instead of None."""
    text = re.sub(r"\bNone\b", "null", field.description or "").replace("|", "\\|").rstrip(".")
    starts_with_value = f"`{text.partition(' ')[0]}`" in type_text(field)
    return f"{text if starts_with_value else text[:1].upper() + text[1:]}."


def renamed_keys() -> str:
    """Return the table of recipe keys that have a new name."""
    rows = {  # without duplicates: the kinds of a stage share some
        (f"`{name.partition(',')[0]}.{old}`", f"`{name.partition(',')[0]}.{new}`"): None
        for name, config in configs().items()
        for old, new in (config.renamed | config.of_methods).items()
    }
    return _table(("before", "now"), rows)


def renamed_options() -> str:
    """Return the table of options that are accepted under a second, older name."""
    rows = []
    for verb in VERBS:
        actions = verb_parser(verb)._actions
        for old in (action for action in actions if action.help == argparse.SUPPRESS and action.option_strings):
            new = next(action for action in actions if action.dest == old.dest and action is not old)
            rows.append((f"`{verb}`", f"`{new.option_strings[-1]}`", f"`{old.option_strings[-1]}`"))
    return _table(("verb", "option", "also accepted"), rows)


def format_1_names() -> str:
    """Return the table of names in the spec that differ between bundle formats 1 and 2."""
    tables: dict[str, Mapping[str, str]] = {
        "spec": format_1.SPEC_NAMES,
        "spec.spacing": format_1.SPACING_NAMES,
        "spec.plan": format_1.PLAN_NAMES,
        "spec.plan.threshold": format_1.THRESHOLD_NAMES,
    }
    rows = [(f"`{where}`", f"`{old}`", f"`{new}`") for where, names in tables.items() for old, new in names.items()]
    return _table(("object", "format 1", "format 2"), rows)


MARKERS: dict[str, Callable[[], str]] = {
    "<!-- cli -->": cli_reference,
    "<!-- settings -->": settings_reference,
    "<!-- renamed keys -->": renamed_keys,
    "<!-- renamed options -->": renamed_options,
    "<!-- format 1 names -->": format_1_names,
}


def configs() -> dict[str, type[Config]]:
    """Return heading -> class, in the order of the page; settings inside another setting follow it."""
    found: dict[str, type[Config]] = {}
    for name, stage in STAGES.items():
        if len(stage.configs) > 1:
            shared = _shared(stage.configs[0])
            found |= {f"{name}, all kinds": shared} if shared.model_fields else {}
            found |= {f"{name}, kind {kind.model_fields['kind'].default}": kind for kind in stage.configs}
            for kind in stage.configs:
                found |= _nested(name, kind)
        else:
            found[name] = stage.configs[0]
            found |= _nested(name, stage.configs[0])
    for name, section in SECTIONS.items():
        found |= {name: section, **_nested(name, section)}
    return found


def _nested(name: str, config: type[Config]) -> dict[str, type[Config]]:
    inner = {f"{name}.{key}": config_in(field.annotation) for key, field in config.model_fields.items()}
    return {path: kind for path, kind in inner.items() if kind is not None}


def _shared(config: type[Config]) -> type[Config]:
    """Return the class with the settings that all kinds of a stage share; StageConfig, without settings, if none do."""
    base = config.__bases__[0]
    return base if issubclass(base, StageConfig) else StageConfig


def _same(field: FieldInfo, other: FieldInfo) -> bool:
    return (field.default, type_text(field)) == (other.default, type_text(other))


def _annotation(annotation: Any) -> tuple[str, bool]:
    """Return an annotation in words, and whether it may be null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, Union):
        words = [_annotation(argument)[0] for argument in arguments if argument is not type(None)]
        return ", ".join(words), type(None) in arguments
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments), False
    if origin is dict:
        return f"mapping to {_annotation(arguments[1])[0]}", False
    if origin is tuple:
        inner, _ = _annotation(arguments[0])
        if arguments[-1] is Ellipsis:
            return f"list of {inner}", False
        return f"list of {len(arguments)} {_plural(inner)}", False
    if hasattr(annotation, "__metadata__"):
        return _annotation(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section", False
    return {bool: "true or false", int: "integer", float: "number", str: "text"}.get(annotation, str(annotation)), False


def _plural(word: str) -> str:
    return word.replace("list of", "lists of") if word.startswith("list") else f"{word}s"


def _yaml(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _first_line(config: type[Config]) -> str:
    line = (config.__doc__ or "").strip().splitlines()[0]
    return re.sub(r" \([\w/]+\.py\)", "", line)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
