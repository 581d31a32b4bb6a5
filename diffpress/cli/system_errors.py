"""Errors of the machine, not of the input or of diffpress: a full disk, too little memory, no permission.

Most files are written by runtime/io/files.py, which names the file. Here are those that can occur anywhere, such as in
temporary files, on stdout, and in native code, which reports them as RuntimeError.
"""

from __future__ import annotations

import errno

from diffpress.runtime.errors import DiffpressError, InvalidInputError

# number -> what to do
HINTS = {
    errno.ENOSPC: "free disk space, or set TMPDIR to a folder with more",
    errno.EDQUOT: "free disk space, or ask for a larger quota",
    errno.EFBIG: "raise the limit of the file size (ulimit -f)",
    errno.EROFS: "choose a writable folder",
    errno.EACCES: "change its permissions, or choose another folder",
    errno.EPERM: "change its permissions, or choose another folder",
    errno.ENOMEM: "free memory, or work with a smaller batch",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs that have many files open",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "choose a shorter path",
}
OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "bad allocation", "out of memory", "failed to allocate")
NO_TEMPORARY_FOLDER = "No usable temporary directory"


def system_error(error: Exception) -> DiffpressError | None:
    """Return the readable form of an error of the machine; None for any other error."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text.lower() for words in OUT_OF_MEMORY)
    ):
        return InvalidInputError(f"not enough memory ({text[:200] or 'allocation failed'}); {HINTS[errno.ENOMEM]}")
    if not isinstance(error, OSError):
        return None
    if NO_TEMPORARY_FOLDER in text:
        return InvalidInputError(f"{error.strerror}; set TMPDIR to a writable folder")
    hint = HINTS.get(error.errno or 0)
    if hint is None:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return InvalidInputError(f"{place}{error.strerror}; {hint}")
