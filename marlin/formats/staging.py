"""Write a directory so that it is complete under its name or not there, whenever it is killed.

Everything is written into a sibling ``.<name>.marlin-partial``, flushed to the disk, and renamed
once. The name is fixed, so the next run finds and removes what a killed one left; a lock on
``.<name>.marlin-lock``, which the system drops with the process, keeps two runs apart.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from marlin.formats.checkpoint import CheckpointError


def destination_problem(destination: Path) -> str | None:
    """Why ``destination`` cannot be created by a rename, or None."""
    problem = _name_problem(destination)
    if problem:
        return problem
    if destination.is_symlink():
        return f"{destination} is a symbolic link; give the path that it stands for"
    if destination.exists():
        if not destination.is_dir():
            return f"{destination} exists and is not a directory; choose another name"
        if os.path.ismount(destination):
            return (
                f"{destination} is a mount point, not to be replaced; give a new folder inside it"
            )
        if any(destination.iterdir()):
            return f"{destination} exists and is not empty; remove it or choose another name"
    elif not destination.parent.is_dir():
        return f"{destination.parent} is not a directory; create it first"
    if not os.access(destination.parent, os.W_OK | os.X_OK):
        return f"{destination.parent} is not writable"
    return None


def _name_problem(destination: Path) -> str:
    """Why the file system cannot hold the name under which ``destination`` is written, if so."""
    if not destination.name or not destination.parent.is_dir():  # refused for that
        return ""
    name = partial_path(destination).name
    over = len(os.fsencode(name)) - os.pathconf(destination.parent, "PC_NAME_MAX")
    if over <= 0:
        return ""
    return (
        f"{destination.name} is too long a name by {over} bytes: it is written as {name} first; "
        "choose a shorter one"
    )


def partial_path(destination: Path) -> Path:
    """Where ``destination`` is while it is being written."""
    return destination.with_name(f".{destination.name}.marlin-partial")


def check_space(destination: Path, needed: int, reclaimed: int = 0) -> None:
    """``reclaimed``: bytes that the conversion itself will have freed by removing what is stale."""
    free = shutil.disk_usage(destination.parent).free + reclaimed
    if free < needed:
        stale = f", with what {partial_path(destination)} holds" if reclaimed else ""
        raise CheckpointError(
            f"{destination.parent} has {free / 1e9:.2f} GB free{stale} and {destination} needs "
            f"{needed / 1e9:.2f} GB: free some space or choose another folder"
        )


def disk_bytes(directory: Path) -> int:
    """What the files below a folder take on the disk; 0 if it is not there."""
    return sum(
        512 * os.lstat(os.path.join(folder, name)).st_blocks
        for folder, _, names in os.walk(directory)
        for name in names
    )


def flush(path: Path) -> None:
    """Wait until a file's data, or a directory's entries, are on the disk.

    Some network and FUSE file systems cannot flush a directory; there its entries are as safe as
    they get.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path, destination: Path) -> Iterator[None]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise CheckpointError(
                f"another conversion is writing {destination}; wait for it to end"
            ) from None
        except OSError as error:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise OSError(
                    error.errno,
                    f"{path.parent} is on a file system that cannot lock files "
                    f"({error.strerror}), so two conversions could not be kept apart; convert into "
                    "a folder on another one and copy it",
                ) from error
            raise
        # The run before us removes the file as it ends: what we locked may no longer be what the
        # name stands for.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextmanager
def staged_directory(destination: Path) -> Iterator[Path]:
    """Yield an empty directory that becomes ``destination``, or vanishes if the block raises.

    Files written into it must have been flushed by their writers. Raises :class:`CheckpointError`
    when ``destination`` exists and is not an empty directory, or another run is writing it.
    """
    partial = partial_path(destination)
    with _locked(destination.with_name(f".{destination.name}.marlin-lock"), destination):
        problem = destination_problem(destination)
        if problem:
            raise CheckpointError(problem)
        _remove(partial)
        partial.mkdir()
        try:
            yield partial
            for directory, _, _ in os.walk(partial):
                flush(Path(directory))
            partial.rename(destination)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(destination.parent)
