"""Entry point of the `diffpress` command: one verb per line. A verb's module is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from diffpress import __version__
from diffpress.runtime.errors import DiffpressError, extra_for, report_error

# verb -> what it does; the verb's module is diffpress/cli/<verb>.py with `add_arguments(parser)` and `run(args)`
VERBS = {
    "plan": "show what a recipe would do to a checkpoint, without doing it",
    "compress": "run a recipe's stages on a checkpoint, then export the bundle",
    "export": "turn a checkpoint into a bundle",
    "sample": "make images with a bundle, without torch",
    "bench": "measure a bundle against its baselines, in one run",
    "evaluate": "score a bundle's or checkpoint's samples",
    "report": "gather what a run measured into report.html and report.json",
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("diffpress", description="Make a pretrained diffusion model deployable.")
    parser.add_argument("--version", action="version", version=f"diffpress {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    verb = parser.parse_args(words[:1]).verb
    return run_verb(verb, lambda: importlib.import_module(f"diffpress.cli.{verb}"), words[1:])


def run_verb(verb: str, load: Callable[[], Any], words: list[str]) -> int:
    """Run a verb's module (`add_arguments(parser)`, `run(args)`); every expected error becomes one line and its code."""
    try:
        module = load()
        parser = argparse.ArgumentParser(f"diffpress {verb}", description=VERBS.get(verb))
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(words)))
    except DiffpressError as error:
        return report_error(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        extra = extra_for(error, f"diffpress {verb}")
        if extra is None:
            raise
        return report_error(str(extra), extra.exit_code)
    except KeyboardInterrupt:
        return report_error("interrupted; the same command goes on where it stood", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0
