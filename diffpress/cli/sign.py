"""`diffpress sign`: sign a bundle, or make the keys for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress sign work/bundle --key owner.pem"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress sign`."""
    parser.add_argument(
        "bundle", nargs="?", type=Path, metavar="BUNDLE", help="folder of a bundle or of a compress run"
    )
    parser.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="Ed25519 private key in PEM, as 'openssl genpkey -algorithm ed25519' and --new-key write it",
    )
    parser.add_argument(
        "--new-key", type=Path, metavar="FILE", help="write a new private key, and the public key to FILE.pub"
    )


def run(args: argparse.Namespace) -> int:
    """Write the keys, the signature, or both, and print what was written."""
    from diffpress.runtime.bundle import MANIFEST, load_bundle
    from diffpress.runtime.trust.signature import SIGNATURE, sign_manifest, write_key_pair

    if args.key is not None and args.new_key is not None:
        raise InvalidInputError("--new-key: --key names a key already; leave out one of them")
    key = args.new_key or args.key
    if key is None or (args.bundle is None and args.new_key is None):
        raise InvalidInputError("sign: name a BUNDLE and its --key FILE, or make keys with --new-key FILE")
    bundle = None if args.bundle is None else load_bundle(args.bundle)  # a damaged bundle is not signed
    if args.new_key is not None:
        public, fingerprint = write_key_pair(args.new_key)
        print(f"{args.new_key}: new private key {fingerprint[:16]}, keep it secret; {public}: its public key")
    if bundle is not None:
        fingerprint = sign_manifest(bundle.path / MANIFEST, key)
        print(f"{bundle.path / SIGNATURE}: bundle {bundle.hash[:12]} signed with the key {fingerprint[:16]}")
    return 0
