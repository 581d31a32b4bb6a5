"""`sign` and --require-signature: only the owner's bundles pass, before anything of them runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from diffpress.cli.main import main
from diffpress.runtime.trust.signature import SIGNATURE

pytest.importorskip("cryptography")


@pytest.fixture
def bundle(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    found = main([str(word) for word in words])
    said = capsys.readouterr()
    assert found == code, said.err
    if code:
        assert said.err.startswith("diffpress: ") and said.err.count("\n") == 1
    return said.err if code else said.out


def test_new_keys_sign_a_bundle_that_then_samples(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    key, public, out = tmp_path / "owner.pem", tmp_path / "owner.pem.pub", tmp_path / "grid.png"
    said = run(capsys, "sign", bundle, "--new-key", key)
    assert "keep it secret" in said and "manifest.sig" in said
    words = ("sample", bundle, "-n", 1, "--engine", "onnxruntime", "--threads", 1, "--out", out)
    run(capsys, *words, "--require-signature", public)
    assert out.is_file()
    facts = json.loads(run(capsys, "info", bundle, "--json", "--require-signature", public))
    assert facts["signature"]["checked"] and facts["signature"]["key"][:16] in said
    assert "not checked" in run(capsys, "info", bundle)


def test_every_verb_that_opens_a_bundle_refuses_one_without_the_signature(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    run(capsys, "sign", "--new-key", tmp_path / "owner.pem")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr("diffpress.runtime.engines.load_engine", never)
    rest = ("--require-signature", tmp_path / "owner.pem.pub")
    opened = (("sample", bundle), ("bench", bundle), ("evaluate", bundle), ("info", bundle), ("profile", bundle))
    for words in (*opened, ("serve", bundle, "--port", 0), ("push", bundle, "owner/name")):
        assert "has no manifest.sig" in run(capsys, *words, *rest, code=2)
    (bundle / SIGNATURE).write_text("{}")
    assert "manifest.sig: format None" in run(capsys, "sample", bundle, *rest, code=2)


def test_a_checkpoint_is_refused_where_a_signature_is_required(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    run(capsys, "sign", "--new-key", tmp_path / "owner.pem")
    for verb in ("evaluate", "info"):
        said = run(capsys, verb, "calib_data/student", "--require-signature", tmp_path / "owner.pem.pub", code=2)
        assert "only bundles are signed" in said


def test_a_damaged_bundle_is_not_signed(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    (bundle / "denoiser.onnx").write_bytes(b"x")
    key = tmp_path / "owner.pem"
    assert "does not match its sha256" in run(capsys, "sign", bundle, "--new-key", key, code=2)
    assert not (bundle / SIGNATURE).exists() and not key.exists()


def test_sign_says_what_it_lacks(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    assert "name a BUNDLE" in run(capsys, "sign", code=2)
    assert "name a BUNDLE" in run(capsys, "sign", bundle, code=2)
    assert "leave out one" in run(capsys, "sign", bundle, "--key", "a", "--new-key", "b", code=2)
    assert "No such file" in run(capsys, "sign", bundle, "--key", tmp_path / "none", code=2)
