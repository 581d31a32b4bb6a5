"""Signature of a bundle: Ed25519 (RFC 8032) over the bytes of manifest.json, which holds the sha256 of every file.

    manifest.sig    {"format": 1, "algorithm": "ed25519", "key": fingerprint, "signature": base64}

The fingerprint is the sha256 of the public key in DER (SubjectPublicKeyInfo), in hexadecimal. Keys are PEM files, as
`openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. `cryptography` is imported only here, when a
bundle is signed or a signature is required.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.io.files import read_json, write_bytes, write_json

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

logger = logging.getLogger(__name__)

SIGNATURE = "manifest.sig"
FORMAT = 1
ALGORITHM = "ed25519"
MAX_KEY_BYTES = 2**16


def sign_manifest(manifest: Path, key: Path) -> str:
    """Sign a manifest with the private key in a PEM file, write the signature beside it, and return its fingerprint.

    Raises:
        InvalidInputError: The key is not an unencrypted Ed25519 private key, or the signature cannot be written.
        MissingDependencyError: `cryptography` is not installed.
    """
    private = _private_key(key)
    fingerprint = _fingerprint(private.public_key())
    signature = base64.b64encode(private.sign(manifest.read_bytes())).decode()
    entry = {"format": FORMAT, "algorithm": ALGORITHM, "key": fingerprint, "signature": signature}
    write_json(manifest.with_name(SIGNATURE), entry)
    return fingerprint


def check_signature(manifest: Path, content: bytes, public_key: str | Path) -> None:
    """Check that `content`, the bytes of the manifest, was signed with this key.

    Args:
        manifest: File that the content was read from; its signature is beside it.
        content: The bytes that are parsed afterwards.
        public_key: PEM file of the public key.

    Raises:
        InvalidInputError: There is no signature, it is damaged, of another key or of another manifest.
        MissingDependencyError: `cryptography` is not installed.
    """
    public, file = _public_key(Path(public_key)), manifest.with_name(SIGNATURE)
    if not file.is_file():
        raise InvalidInputError(
            f"{manifest.parent}: has no {SIGNATURE}, and a signature is required; its owner signs it with "
            "'diffpress sign'"
        )
    entry, required = _read_signature(file), _fingerprint(public)
    if entry["key"] != required:
        raise InvalidInputError(
            f"{file}: signed with the key {entry['key'][:16]}, but {public_key} is {required[:16]}; use the public key "
            "of the bundle's owner"
        )
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify(base64.b64decode(entry["signature"], validate=True), content)
    except (InvalidSignature, ValueError) as error:
        raise InvalidInputError(
            f"{file}: does not fit {manifest.name}, so one of them was changed after signing; get the bundle again"
        ) from error


def signer(folder: Path) -> str | None:
    """Return the fingerprint that the signature of a bundle names, unchecked; None if it has no signature.

    Raises:
        InvalidInputError: The signature file is malformed.
    """
    file = folder / SIGNATURE
    return str(_read_signature(file)["key"]) if file.is_file() else None


def refuse_unsigned(reference: str, public_key: str | Path | None) -> None:
    """Raise InvalidInputError for a checkpoint, which has no signature, if one is required."""
    if public_key is not None:
        raise InvalidInputError(f"{reference}: is no bundle, and only bundles are signed; a signature is required")


def write_key_pair(key: Path) -> tuple[Path, str]:
    """Write a new private key, readable by its owner alone, and the public key beside it, with the suffix .pub.

    Returns:
        The file of the public key, and its fingerprint.

    Raises:
        InvalidInputError: One of the files exists, or cannot be written.
        MissingDependencyError: `cryptography` is not installed.
    """
    _require_package()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = key.with_name(f"{key.name}.pub")
    for path in (key, public):
        if path.exists():
            raise InvalidInputError(f"{path}: exists; a key is never replaced, choose another name")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(pem)
    except OSError as error:
        raise InvalidInputError(f"{key}: cannot be written ({error.strerror}); choose another path") from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    write_bytes(public, private.public_key().public_bytes(serialization.Encoding.PEM, form))
    return public, _fingerprint(private.public_key())


def _read_signature(file: Path) -> dict[str, Any]:
    entry = read_json(file, "sign the bundle again")
    if entry.get("format") != FORMAT or entry.get("algorithm") != ALGORITHM:
        raise InvalidInputError(
            f"{file}: format {entry.get('format')!r}, algorithm {entry.get('algorithm')!r}; this diffpress reads "
            f"format {FORMAT}, {ALGORITHM}"
        )
    if not all(isinstance(entry.get(name), str) for name in ("key", "signature")):
        raise InvalidInputError(f"{file}: has no key or no signature; sign the bundle again")
    return entry


def _private_key(file: Path) -> Ed25519PrivateKey:
    _require_package()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read_key(file)
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise InvalidInputError(f"{file}: is encrypted; decrypt it first with 'openssl pkey -in FILE'") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInputError(
            f"{file}: not a private key in PEM; make one with 'diffpress sign --new-key FILE'"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidInputError(f"{file}: not an Ed25519 key; make one with 'diffpress sign --new-key FILE'")
    if os.name == "posix" and file.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning(f"{file}: others may read this private key; run 'chmod 600' on it")
    return key


def _public_key(file: Path) -> Ed25519PublicKey:
    _require_package()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    pem = _read_key(file)
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = "this is the private key, name the public one" if b"PRIVATE KEY" in pem else "is it the right file?"
        raise InvalidInputError(f"{file}: not a public key in PEM; {hint}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InvalidInputError(f"{file}: not an Ed25519 key; bundles are signed with Ed25519")
    return key


def _read_key(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_KEY_BYTES:
            raise InvalidInputError(f"{file}: too large for a key; name a PEM file")
        return file.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{file}: the key cannot be read ({error.strerror})") from error


def _fingerprint(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _require_package() -> None:
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError("cryptography", "sign", "a signature") from error
