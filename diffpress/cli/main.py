"""Entry point of the `diffpress` command: one verb per line. A verb's module is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from diffpress import __version__
from diffpress.cli.console import console
from diffpress.runtime.errors import DiffpressError, extra_for

logger = logging.getLogger(__name__)

# verb -> what it does; diffpress/cli/<verb>.py has `EXAMPLE`, `add_arguments(parser)` and `run(args) -> exit code`
VERBS = {
    "plan": "show what a recipe would do to a checkpoint, without doing it",
    "compress": "run a recipe's stages on a checkpoint, then export the bundle",
    "export": "turn a checkpoint into a bundle",
    "sample": "make images with a bundle, without torch",
    "bench": "measure a bundle against its baselines, in one run",
    "evaluate": "score a bundle's or checkpoint's samples",
    "report": "gather what a run measured into report.html and report.json",
    "info": "describe a checkpoint or bundle: family, precision, sizes, sampling plan, history",
    "recipes": "list the built-in recipes",
    "schema": "print the JSON schema of a recipe, for editors",
    "init": "write a built-in recipe to a file, to edit",
    "doctor": "check what this machine can run, and which extras are missing",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line, `sys.argv` by default, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("diffpress", description="Make a pretrained diffusion model deployable.")
    parser.add_argument("--version", action="version", version=f"diffpress {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    verb = parser.parse_args(words[:1]).verb
    return run_verb(verb, lambda: importlib.import_module(f"diffpress.cli.{verb}"), words[1:])


def run_verb(verb: str, load: Callable[[], Any], words: list[str]) -> int:
    """Run a verb's module and return its exit code; every expected error becomes one line on stderr."""
    with console():
        try:
            module = load()
            example = getattr(module, "EXAMPLE", None)
            parser = argparse.ArgumentParser(
                f"diffpress {verb}", description=VERBS.get(verb), epilog=example and f"example: {example}"
            )
            module.add_arguments(parser)
            return int(module.run(parser.parse_args(words)))
        except DiffpressError as error:
            return _failed(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            extra = extra_for(error, f"diffpress {verb}")
            if extra is None:
                raise
            return _failed(str(extra), extra.exit_code)
        except KeyboardInterrupt:
            return _failed("interrupted; run the same command again to resume", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of the pipe has gone
            return 0


def _failed(message: str, code: int) -> int:
    logger.error(message)
    return code
