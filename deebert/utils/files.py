"""Safe writing: to a temporary name first, then renamed, so that a file is either complete or absent.

And texts of others, such as labels, made safe for what shows them: terminals and spreadsheets.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from deebert.utils.errors import InputError

LOCK = ".lock"
# Temporary files of a process that was killed.
LEFTOVERS = (".*.partial", ".*.removed", ".saving-*")
FORMULA = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")  # the first characters of formulas, also in their wide forms


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside `path` and renames it to `path` when the block ends without an error.

    By then it is on the disk, so that a power cut leaves the old file or the new one. Raises InputError where the disk
    is full or the folder cannot be written to, and where the block cannot read another file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.filename is None or str(error.filename) in map(str, (partial, path, *path.parents)):
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_json(path: Path, facts: dict) -> None:
    """Writes a dictionary; values that JSON does not know, such as paths, become strings."""
    with replacing(path) as file:
        json.dump(facts, file, indent=2, default=str)
        file.write("\n")


def read_json(path: Path, kind: type = dict, advice: str = "remove it") -> dict | list:
    """Reads a file that holds a dict, or a list. Raises InputError, with the advice, where it is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, kind):
            raise ValueError(f"not a JSON {kind.__name__}")
    except (OSError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}); {advice}") from None
    return facts


def checksum(path: Path) -> str:
    """The SHA-256 of a file. Raises InputError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def make_folder(folder: Path) -> None:
    """Makes a folder for results. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: no folder can be made there ({error.strerror})") from None


def sync(files: Iterable[Path]) -> None:
    """Waits until these files are on the disk."""
    for file in files:
        with file.open("rb") as written:
            os.fsync(written.fileno())


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill. It gets its name once all is on the disk, if no error ends the block before."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        yield partial
        sync(partial.iterdir())
        if folder.exists():
            remove_folder(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def adding_files(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder to fill. When the block ends without an error, its files are moved into `folder`.

    last: the name of the file that says that the others are complete: an old one is removed before they are moved, and
    the new one is moved last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield partial
        files = list(partial.iterdir())
        sync(files)
        (folder / last).unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file.name == last):
            file.replace(folder / file.name)
    finally:
        shutil.rmtree(partial)


def remove_folder(folder: Path) -> None:
    """Removes a folder. A process that is killed meanwhile does not leave a part of it under its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of a process that was killed."""
    for pattern in LEFTOVERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes from reserving it.

    A process that is killed reserves nothing. A folder that was made here and is empty is removed. Raises InputError.
    """
    from filelock import FileLock, Timeout  # not above: without any package, a command still says which one it lacks

    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another run uses this folder; wait for it, or choose another") from None
    except OSError as error:
        raise InputError(f"{folder}: nothing can be written there ({error.strerror})") from None
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # while it is held: who opened it meanwhile is refused
        lock.release()
        for path in made:
            with suppress(OSError):  # there are results in it
                path.rmdir()


def printable(text: str) -> str:
    """The text with escapes, such as \\x1b and \\n, in place of the control characters that a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda match: ascii(match[0])[1:-1], text)


def no_formula(field: str) -> str:
    """The field with a ' before it where a spreadsheet would take it for a formula. Numbers stay as they are."""
    formula = field[:1] in FORMULA and len(field) > 1 and not re.fullmatch(r"[+-]?[\d.,]+(e[+-]?\d+)?%?", field, re.I)
    return f"'{field}" if formula else field
