"""Safe writing: to a temporary name first, then renamed, so that a file is either complete or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from deebert.utils.cli import InputError


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with partial.open(mode, **text) as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder for results. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: no folder can be made there ({error.strerror})") from None


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill. It gets its name when the block ends without an error and all is on the disk."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_writable(folder: Path, flag: str) -> None:
    """Makes a folder for results and checks that a file can be written there. Raises InputError."""
    make_folder(folder)
    try:
        with tempfile.NamedTemporaryFile(prefix=".writable-", dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise InputError(f"{flag} {folder}: nothing can be written there ({error.strerror})") from None


def check_disk_space(folder: Path, size: int, what: str) -> None:
    """Raises InputError if fewer than `size` bytes are free. what: the subject of the message, in the plural."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(f"{folder}: {what} take up to {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
