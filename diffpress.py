"""diffpress: one verb per line. Each verb's module is imported only when the verb is used."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from runtime.errors import DiffpressError, extra_for, told

VERBS = {
    "plan": ("compress.commands", "show what a recipe would do to a checkpoint, without doing it"),
    "compress": ("export.deliver", "run a recipe's stages on a checkpoint, then export the bundle"),
    "export": ("export.commands", "turn a checkpoint into a bundle"),
    "sample": ("runtime.commands", "make images with a bundle, without torch"),
    "bench": ("compress.bench", "measure a bundle against its baselines, in one run"),
    "evaluate": ("compress.commands", "score a bundle's or checkpoint's samples"),
    "report": ("compress.report", "gather what a run measured into report.html and report.json"),
}


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser("diffpress", description="Make a pretrained diffusion model deployable.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, purpose) in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    verb = parser.parse_args(words[:1]).verb
    try:
        module = importlib.import_module(VERBS[verb][0])
        parser = argparse.ArgumentParser(f"diffpress {verb}", description=VERBS[verb][1])
        getattr(module, f"add_{verb}_arguments")(parser)
        return int(getattr(module, f"{verb}_command")(parser.parse_args(words[1:])))
    except DiffpressError as error:
        return told(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        extra = extra_for(error, f"diffpress {verb}")
        if extra is None:
            raise
        return told(str(extra), extra.exit_code)
    except KeyboardInterrupt:
        return told("interrupted; the same command goes on where it stood", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left; nothing more to say
        return 0


if __name__ == "__main__":
    sys.exit(main())
