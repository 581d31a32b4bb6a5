"""Entry point of the `diffpress` command: one verb per line. A verb's module is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from diffpress import __version__
from diffpress.cli.console import console, show_every_character
from diffpress.cli.system_errors import system_error
from diffpress.runtime.errors import DiffpressError, InvalidInputError, extra_for, unknown_name

logger = logging.getLogger(__name__)

# verb -> what it does; diffpress/cli/<verb>.py has `EXAMPLE`, `add_arguments(parser)` and `run(args) -> exit code`
VERBS = {
    "plan": "show what a recipe would do to a checkpoint, without doing it",
    "recommend": "propose a recipe to start with, from measurements and without training",
    "search": "find recipes that keep bounds on latency, quality and size",
    "compress": "run a recipe's stages on a checkpoint, then export the bundle",
    "export": "turn a checkpoint into a bundle",
    "sample": "make images with a bundle, without torch",
    "serve": "answer requests for images over HTTP, without torch",
    "bench": "measure a bundle against its baselines, in one run",
    "profile": "show where the time of one evaluation goes, by layer and operation, and what is worth doing",
    "evaluate": "score a bundle's or checkpoint's samples",
    "report": "gather what a run measured into report.html and report.json",
    "sign": "sign a bundle, so that a deployment can require its owner's key",
    "push": "upload a bundle to the Hugging Face hub",
    "info": "describe a checkpoint or bundle: family, precision, sizes, sampling plan, history",
    "recipes": "list the built-in recipes",
    "schema": "print the JSON schema of a recipe, for editors",
    "init": "write a built-in recipe to a file, to edit",
    "cache": "show or remove compiled models and what else is cached",
    "doctor": "check what this machine can run, and which extras are missing",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line, `sys.argv` by default, and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    show_every_character()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it advises on packages that diffpress does not use
    return reported(lambda: _run(words), f"diffpress {words[0] if words else ''}")


def reported(run: Callable[[], int], command: str) -> int:
    """Return what `run` returns; an expected error becomes one line on stderr and its exit code."""
    with console():
        try:
            return _flushed(run)
        except DiffpressError as error:
            return _failed(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            extra = extra_for(error, command)
            if extra is None:
                raise
            return _failed(str(extra), extra.exit_code)
        except KeyboardInterrupt as interrupt:
            return _failed(f"interrupted; {str(interrupt) or 'run the same command again to resume'}", 130)
        except BrokenPipeError:
            _discard_output()  # the reader of the pipe has gone
            return 0
        except (OSError, MemoryError, RuntimeError) as error:
            failure = system_error(error)
            if failure is None:
                raise
            try:
                sys.stdout.flush()
            except OSError:
                _discard_output()
            return _failed(str(failure), failure.exit_code)


def _discard_output() -> None:
    """Send what is left of stdout to nowhere, so that Python can exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """A parser that raises InvalidInputError."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message}; see {self.prog} --help")


def _run(words: list[str]) -> int:
    """Run the verb that the first word names, with the other words as its arguments."""
    parser = _Parser("diffpress", description="Make a pretrained diffusion model deployable.")
    parser.add_argument("--version", action="version", version=f"diffpress {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, purpose in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    if words and not words[0].startswith("-") and words[0] not in VERBS:
        raise unknown_name("command", words[0], VERBS)
    verb = parser.parse_args(words[:1]).verb
    module = importlib.import_module(f"diffpress.cli.{verb}")
    example = getattr(module, "EXAMPLE", None)
    parser = _Parser(f"diffpress {verb}", description=VERBS[verb], epilog=example and f"example: {example}")
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(words[1:], argparse.Namespace(words=words))))


def _flushed(run: Callable[[], int]) -> int:
    """Return what `run` returns, with stdout flushed: a closed pipe is noticed here, and not while Python exits."""
    try:
        code = run()
    except SystemExit:  # argparse's --help and --version
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _failed(message: str, code: int) -> int:
    logger.error(message)
    return code
