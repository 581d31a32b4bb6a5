"""Signed bundles: only what the owner signed opens where a signature is required, and openssl agrees."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.trust.signature import SIGNATURE, sign_manifest, signer, write_key_pair

pytest.importorskip("cryptography")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """The owner's private and public key."""
    public, _ = write_key_pair(tmp_path / "owner.pem")
    return tmp_path / "owner.pem", public


@pytest.fixture
def signed(tiny: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    sign_manifest(folder / MANIFEST, keys[0])
    return folder


def refusal(folder: Path, key: Path) -> str:
    with pytest.raises(InvalidInputError) as error:
        load_bundle(folder, key)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_signed_bundle_opens_with_its_owners_key_and_samples(signed: Path, keys: tuple[Path, Path]) -> None:
    assert load_bundle(signed, keys[1]).hash == load_bundle(signed).hash
    with Pipeline(signed, "onnxruntime", threads=1, public_key=keys[1]) as pipeline:
        assert len(pipeline(labels=1, seeds=[1])) == 1


def test_an_unsigned_bundle_is_refused_where_a_signature_is_required(tiny: Path, keys: tuple[Path, Path]) -> None:
    assert "has no manifest.sig" in refusal(tiny, keys[1])
    with pytest.raises(InvalidInputError, match=r"has no manifest\.sig"):
        Pipeline(load_bundle(tiny), public_key=keys[1])  # also of a bundle that is loaded already


def test_another_key_is_refused_by_its_fingerprint(signed: Path, tmp_path: Path) -> None:
    other, fingerprint = write_key_pair(tmp_path / "other.pem")
    message = refusal(signed, other)
    assert fingerprint[:16] in message and str(signer(signed))[:16] in message


def test_a_signature_that_names_the_required_key_but_is_of_another_is_refused(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    owner = signer(signed)
    write_key_pair(tmp_path / "other.pem")
    sign_manifest(signed / MANIFEST, tmp_path / "other.pem")
    entry = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(entry | {"key": owner}))
    assert "does not fit manifest.json" in refusal(signed, keys[1])


def test_every_file_of_a_signed_bundle_is_covered(signed: Path, keys: tuple[Path, Path]) -> None:
    """A changed file breaks its hash, a changed hash the manifest's, and a changed manifest the signature."""
    manifest = json.loads((signed / MANIFEST).read_text())
    graph = signed / "denoiser.onnx"
    graph.write_bytes(graph.read_bytes() + b"\0\0")
    assert "does not match its sha256" in refusal(signed, keys[1])
    from diffpress.runtime.bundle import sha256

    manifest["files"]["denoiser.onnx"] = {"bytes": graph.stat().st_size, "sha256": sha256(graph)}
    manifest["hash"] = manifest_hash(manifest)
    (signed / MANIFEST).write_text(json.dumps(manifest))
    assert "does not fit manifest.json" in refusal(signed, keys[1])


@pytest.mark.parametrize("change", [b" ", b"\n"])
def test_a_byte_more_in_the_manifest_is_refused(signed: Path, keys: tuple[Path, Path], change: bytes) -> None:
    (signed / MANIFEST).write_bytes((signed / MANIFEST).read_bytes() + change)
    load_bundle(signed)  # without a required signature its own hash counts, which whitespace does not change
    assert "does not fit manifest.json" in refusal(signed, keys[1])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "algorithm": "none"}', "algorithm 'none'"),
        ('{"format": 1, "algorithm": "ed25519", "key": 1}', "has no key or no signature"),
    ],
)
def test_a_damaged_signature_is_refused(signed: Path, keys: tuple[Path, Path], content: str, reason: str) -> None:
    (signed / SIGNATURE).write_text(content)
    assert reason in refusal(signed, keys[1])


@pytest.mark.parametrize("signature", ["", "?", "AAAA", base64.b64encode(bytes(64)).decode(), "é"])
def test_a_wrong_signature_is_refused(signed: Path, keys: tuple[Path, Path], signature: str) -> None:
    entry = json.loads((signed / SIGNATURE).read_text())
    (signed / SIGNATURE).write_text(json.dumps(entry | {"signature": signature}))
    assert "does not fit manifest.json" in refusal(signed, keys[1])


def test_the_private_key_is_readable_by_its_owner_alone_and_never_replaced(keys: tuple[Path, Path]) -> None:
    assert keys[0].stat().st_mode & 0o077 == 0
    before = keys[0].read_bytes()
    with pytest.raises(InvalidInputError, match="never replaced"):
        write_key_pair(keys[0])
    assert keys[0].read_bytes() == before


def test_a_private_key_that_others_may_read_gives_a_warning(
    signed: Path, keys: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    sign_manifest(signed / MANIFEST, keys[0])
    assert not caplog.records
    keys[0].chmod(0o644)
    sign_manifest(signed / MANIFEST, keys[0])
    assert "others may read" in caplog.text


def test_keys_of_other_kinds_are_refused_in_one_line(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    curve = ec.generate_private_key(ec.SECP256R1())
    private = tmp_path / "private.pem"
    form = (s.Encoding.PEM, s.PrivateFormat.PKCS8)
    private.write_bytes(curve.private_bytes(*form, s.NoEncryption()))
    with pytest.raises(InvalidInputError, match="not an Ed25519 key"):
        sign_manifest(signed / MANIFEST, private)
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(*form, s.BestAvailableEncryption(b"x"))
    private.write_bytes(locked)
    with pytest.raises(InvalidInputError, match="is encrypted"):
        sign_manifest(signed / MANIFEST, private)
    for key, reason in ((keys[1], "not a private key"), (tmp_path / "none.pem", "No such file"), (tmp_path, "cannot")):
        with pytest.raises(InvalidInputError, match=reason):
            sign_manifest(signed / MANIFEST, key)
    assert "name the public one" in refusal(signed, keys[0])
    public = tmp_path / "public.pem"
    public.write_bytes(curve.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    assert "not an Ed25519 key" in refusal(signed, public)
    public.write_bytes(b"\xff" * 100)
    assert "not a public key" in refusal(signed, public)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_the_signature_and_its_keys_are_accepted(tiny: Path, tmp_path: Path) -> None:
    def openssl(*words: object) -> str:
        done = subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True, text=True)
        return done.stdout

    folder, key, public = Path(shutil.copytree(tiny, tmp_path / "bundle")), tmp_path / "key", tmp_path / "public"
    openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    sign_manifest(folder / MANIFEST, key)
    load_bundle(folder, public)
    raw = tmp_path / "raw.sig"
    raw.write_bytes(base64.b64decode(json.loads((folder / SIGNATURE).read_text())["signature"]))
    words = ("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", folder / MANIFEST, "-sigfile", raw)
    assert "Verified Successfully" in openssl(*words)


def test_without_the_package_only_signatures_fail(
    signed: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    assert load_bundle(signed).spec.plan.steps == 8
    with pytest.raises(MissingDependencyError, match=r"diffpress\[sign\]"):
        load_bundle(signed, keys[1])
