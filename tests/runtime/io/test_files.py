"""runtime/io/files.py: files and folders are written completely or not at all, and JSON is read with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import (
    atomic,
    atomic_folder,
    read_json,
    remove_leftovers,
    write_bytes,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[3]
Writing = Callable[[Path], AbstractContextManager[Path]]


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def folder(path: Path) -> AbstractContextManager[Path]:
    return atomic_folder(path, "free some space")


@pytest.mark.parametrize("writing", [atomic, folder])
def test_the_old_content_stays_until_the_new_is_complete(writing: Writing, tmp_path: Path) -> None:
    target = tmp_path / "new" / "target"
    for content in ("first", "second"):
        with writing(target) as temporary:
            file = temporary / "inside" if temporary.is_dir() else temporary
            file.write_text(content)
            assert not target.exists() or "first" in (target / "inside" if target.is_dir() else target).read_text()
        assert (target / "inside" if target.is_dir() else target).read_text() == content
    assert files_in(tmp_path) == ["new/target/inside" if target.is_dir() else "new/target"]


class FullDiskError(Exception):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), FullDiskError("disk full"), ValueError("x")])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_after_a_failure_nothing_is_left_and_the_error_is_one_line(kind: str, error: Exception, tmp_path: Path) -> None:
    target, hint = tmp_path / "target", "free some space"
    writing = (
        atomic(target, hint, problem="the state cannot be saved", errors=FullDiskError)
        if kind == "file"
        else atomic_folder(target, hint, errors=FullDiskError)
    )
    expected = ValueError if isinstance(error, ValueError) else InvalidInputError

    def write_half() -> None:
        with writing as temporary:
            (temporary / "inside" if kind == "folder" else temporary).write_text("half")
            raise error

    with pytest.raises(expected) as caught:
        write_half()
    assert list(tmp_path.iterdir()) == []
    if expected is InvalidInputError:
        problem = "the state cannot be saved" if kind == "file" else "cannot be written"
        reason = "No space left on device" if isinstance(error, OSError) else "disk full"
        assert str(caught.value) == f"{target}: {problem} ({reason}); free some space"


def test_a_path_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (lambda path: write_bytes(path, b""), lambda path: folder(path).__enter__()):
        with pytest.raises(InvalidInputError, match=r"file/below: cannot be written \((File exists|Not a directory)\)"):
            write(tmp_path / "file" / "below")
    assert files_in(tmp_path) == ["file"]


def test_a_folder_left_by_a_killed_process_is_replaced(tmp_path: Path) -> None:
    for name in (".target.partial", ".target.outgoing"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "junk").write_text("junk")
    with folder(tmp_path / "target") as temporary:
        (temporary / "inside").write_text("new")
    assert files_in(tmp_path) == ["target/inside"]


def test_a_folder_whose_replacement_was_killed_keeps_its_old_content(tmp_path: Path) -> None:
    (tmp_path / ".target.outgoing").mkdir()
    (tmp_path / ".target.outgoing" / "inside").write_text("old")

    def fail() -> None:
        with folder(tmp_path / "target"):
            assert (tmp_path / "target" / "inside").read_text() == "old"
            raise OSError(28, "No space left on device")

    with pytest.raises(InvalidInputError, match="No space left"):
        fail()
    assert files_in(tmp_path) == ["target/inside"]


def test_a_folder_that_cannot_be_moved_into_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with folder(tmp_path / "target") as temporary:
        (temporary / "inside").write_text("old")
    replace = Path.replace

    def full(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InvalidInputError, match="No space left"), folder(tmp_path / "target") as temporary:
        (temporary / "inside").write_text("new")
    assert files_in(tmp_path) == ["target/inside"] and (tmp_path / "target" / "inside").read_text() == "old"


def killed_while_writing(path: Path) -> None:
    """Start to write `path` in a process that is killed in the middle."""
    program = (
        "import os, sys; from pathlib import Path; from diffpress.runtime.io.files import atomic\n"
        "with atomic(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], cwd=ROOT, check=False).returncode == -9


def test_a_file_left_by_a_killed_process_is_removed_by_the_next_write(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "target")
    assert len(files_in(tmp_path)) == 1
    write_text(tmp_path / "target", "new")
    assert files_in(tmp_path) == ["target"] and (tmp_path / "target").read_text() == "new"


def test_leftovers_of_killed_processes_are_removed_below_a_folder_and_old_folders_restored(tmp_path: Path) -> None:
    killed_while_writing(tmp_path / "a" / "target")
    for name in (".b.partial", ".c.outgoing", ".d.outgoing", "d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inside").write_text("")
    (tmp_path / ".b.lock").touch()
    (tmp_path / ".hidden").touch()
    remove_leftovers(tmp_path)
    assert files_in(tmp_path) == [".hidden", "c/inside", "d/inside"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_content_is_on_the_disk_before_it_gets_its_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        calls.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name.partition('.partial')[0][:7]}")
        sync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        calls.append(f"rename to {target.name}")
        return replace(path, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to name what is written to the disk")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    place = tmp_path / "place"
    if kind == "file":
        write_text(place / "target", "new")
        assert calls == ["sync .target", "rename to target", "sync place"]
    else:
        with folder(place / "target") as temporary:
            (temporary / "inside").write_text("new")
        assert calls == ["sync inside", "sync .target", "rename to target", "sync place"]
    calls.clear()
    with atomic(place / "cached", durable=False) as temporary:
        temporary.touch()
    assert calls == ["rename to cached"]


def writing_elsewhere(writer: str, target: Path) -> subprocess.Popen[str]:
    """Start a process that is in the middle of writing `target`, until a line is sent to it."""
    program = (
        "import sys; from pathlib import Path; from diffpress.runtime.io.files import atomic, atomic_folder\n"
        f"with {writer} as temporary:\n"
        "    path = temporary / 'inside' if temporary.is_dir() else temporary\n"
        "    path.write_text('other'); print('ready', flush=True)\n    sys.stdin.readline()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, target], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "ready\n"
    return other


def test_processes_that_write_one_file_do_not_collide(tmp_path: Path) -> None:
    target = tmp_path / "target"
    other = writing_elsewhere("atomic(Path(sys.argv[1]))", target)
    with atomic(target) as temporary:
        temporary.write_bytes(b"ours")
    assert target.read_text() == "ours"
    other.communicate("\n", timeout=30)
    assert other.returncode == 0 and target.read_text() == "other" and files_in(tmp_path) == ["target"]


def test_threads_that_write_one_file_do_not_collide(tmp_path: Path) -> None:
    with atomic(tmp_path / "target") as one, atomic(tmp_path / "target") as two:
        one.write_text("one")
        two.write_text("two")
    assert files_in(tmp_path) == ["target"] and (tmp_path / "target").read_text() == "one"


def test_a_folder_that_another_process_writes_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "target"
    other = writing_elsewhere("atomic_folder(Path(sys.argv[1]), '')", target)
    with pytest.raises(InvalidInputError, match="target: another command is writing here; wait until it has ended"):
        folder(target).__enter__()
    other.communicate("\n", timeout=30)
    assert other.returncode == 0 and files_in(tmp_path) == ["target/inside"]
    with folder(target) as temporary:
        (temporary / "inside").write_text("ours")
    assert (target / "inside").read_text() == "ours"


def test_files_get_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "ours", "")
    (tmp_path / "usual").touch()
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_json_round_trips(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "é": {"b": "c"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value == json.loads((tmp_path / "x.json").read_text())
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, r"not readable as JSON \(.*No such file"), (b"{", r"not readable as JSON \("), (b"\xff", "not readable"),
     (b"[1]", "expected a JSON object")],
)  # fmt: skip
@pytest.mark.parametrize("hint", [None, "copy it again", ""])
def test_unreadable_json_is_refused_with_the_hint(
    content: bytes | None, problem: str, hint: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"x.json: {problem}") as caught:
        read_json(file) if hint is None else read_json(file, hint)
    end = {None: "; rerun the command that wrote it", "": ""}.get(hint, f"; {hint}")
    message = str(caught.value)
    assert message.endswith(end) and "\n" not in message and (hint != "" or not message.endswith("; "))
