"""Upload a bundle to the Hugging Face hub: the files that its manifest lists, the manifest, its signature, the card."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.terms import CARD
from diffpress.export.model_card import PICTURE
from diffpress.export.verify.gate import failures_of
from diffpress.runtime.bundle import MANIFEST, load_bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.trust.signature import SIGNATURE

SPECIAL = "[*?"  # characters of a pattern


def push_bundle(
    path: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    public_key: str | Path | None = None,
) -> str:
    """Upload the bundle at `path` and return the address of the commit.

    The token is that of `hf auth login`, or of the environment variable HF_TOKEN.

    Args:
        path: The bundle's folder, or that of a compress run.
        repo: Name on the hub, OWNER/NAME; it is created if it does not exist.
        private: Create it as a private one; otherwise as the owner's default says.
        message: Commit message; by default it names the bundle's hash.
        public_key: PEM file of the key that the bundle has to be signed with, if any.

    Raises:
        InvalidInputError: There is no such bundle, it is damaged, the name is not one of the hub's, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

    bundle = load_bundle(path, public_key)
    failed = [failure.message for failure in failures_of(bundle) if failure.target]
    if failed:
        raise InvalidInputError(
            f"{bundle.path}: failed parity ({'; '.join(failed)}); export it again before sharing it"
        )
    documents = [name for name in (CARD, PICTURE, SIGNATURE) if (bundle.path / name).is_file()]
    files = sorted({MANIFEST, *documents, *bundle.manifest["files"]})
    api = HfApi(library_name="diffpress")
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=bundle.path,
            commit_message=message or f"Bundle {bundle.hash[:12]}",
            allow_patterns=[_pattern(name) for name in files],
        )
    except HFValidationError as error:
        raise InvalidInputError(
            f"push: '{repo}' is no name on the hub; use OWNER/NAME ({first_line(error)})"
        ) from error
    except LocalTokenNotFoundError as error:
        raise InvalidInputError("push: no token of the hub; run 'hf auth login', or set HF_TOKEN") from error
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"push: {repo}: the upload failed ({first_line(error)}); check the name, the token's permission to write "
            "and the connection"
        ) from error
    return str(commit.commit_url)


def _pattern(name: str) -> str:
    """Return a pattern that matches this name."""
    pattern = "".join(f"[{character}]" if character in SPECIAL else character for character in name)
    assert fnmatchcase(name, pattern)
    return pattern
