"""`diffpress push`: upload a bundle to the Hugging Face hub."""

from __future__ import annotations

import argparse

from diffpress.cli.arguments import add_signature_argument

EXAMPLE = "diffpress push work/bundle OWNER/NAME"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress push`."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle or of a compress run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="repository on the hub, created if there is none")
    parser.add_argument("--private", action="store_true", help="create it as a private repository")
    parser.add_argument("--message", help="commit message (default: the bundle's hash)")
    add_signature_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Upload the bundle and print the address of the commit."""
    from diffpress.export.push import push_bundle

    print(push_bundle(args.bundle, args.repo, private=args.private, message=args.message, public_key=args.public_key))
    return 0
