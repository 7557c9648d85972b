"""Read files of a folder that came from somewhere else: regular files only, bounded in size, JSON without surprises."""

import json
import math
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any, BinaryIO

from elastic.world.files import first_few

# What stands in place of a large file in a repository that was cloned without its large files.
_POINTER = b"version https://git-lfs"
_MAX_DEPTH = 32
_SHOWN_CHARACTERS = 100


class UnsafeFileError(ValueError):
    """A file that is missing, not a regular file, too large, or damaged: not the JSON or safetensors it should be."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, following links (the Hugging Face cache is made of them).

    Raises UnsafeFileError for what is missing, a broken link, a folder, a pipe or a device, which are not opened, and
    for a Git LFS pointer.
    """
    try:
        _refuse_irregular(path, os.stat(path))
        # Non-blocking, and looked at again: what stands there may have changed, and a pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise UnsafeFileError(f"{shown(path.name)} is a link to a file that is not there") from error
        raise UnsafeFileError(f"{shown(path.name)} is missing from {path.parent}") from error
    except OSError as error:
        raise UnsafeFileError(f"{shown(path.name)} cannot be opened: {error.strerror}") from error
    file = os.fdopen(descriptor, "rb")
    try:
        _refuse_irregular(path, os.fstat(descriptor))
        if file.read(len(_POINTER)) == _POINTER:
            where = f"run `git lfs pull` in {path.parent}, or download it"
            raise UnsafeFileError(f"{shown(path.name)} is a Git LFS pointer, not the file itself; {where}")
        file.seek(0)
    except UnsafeFileError:
        file.close()
        raise
    return file


def read_json(path: Path, limit_bytes: int, infinity_in: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object of at most `limit_bytes`; raises UnsafeFileError as `open_regular` and `parse_json` do."""
    with open_regular(path) as file:
        content = file.read(limit_bytes + 1)
    if len(content) > limit_bytes:
        raise UnsafeFileError(f"{shown(path.name)} is larger than {limit_bytes:,} bytes, which no such file needs")
    return parse_json(content, path.name, infinity_in)


def parse_json(content: bytes, name: str, infinity_in: Collection[str] = ()) -> dict[str, Any]:
    """Return the JSON object that `content` of the file `name` holds.

    Raises UnsafeFileError unless it is UTF-8, an object, without duplicate keys, at most 32 levels deep, and all its
    numbers are finite (under the top-level keys `infinity_in`, where published configs write Infinity, any number).
    """
    name = shown(name)
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        raise UnsafeFileError(f"{name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise UnsafeFileError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise UnsafeFileError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsafeFileError(f"{name} must hold a JSON object, it holds a {type(value).__name__}")
    for key, content_of_key in value.items():
        try:
            _check_values({key: content_of_key}, finite=key not in infinity_in)
        except ValueError as error:
            raise UnsafeFileError(f"{name}: {shown(key)}: {error}") from error
    return value


def shown(value: object) -> str:
    """Return a value from a foreign file as short printable text."""
    is_plain = isinstance(value, str) and value != "" and value.isprintable() and value == value.strip()
    text = str(value) if is_plain else repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def quoted(value: object) -> str:
    """Return `shown`, with quotation marks around text so that it differs from a number or null."""
    text = shown(value)
    return f"'{text}'" if isinstance(value, str) and not text.startswith(("'", '"')) else text


def listed(names: Collection[str], limit: int = 4) -> str:
    """Name the first few of `names`, sorted, and count the others."""
    return ", ".join(first_few([shown(name) for name in sorted(names)], limit))


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise UnsafeFileError(f"{shown(path.name)} is {kind}, not a regular file")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = {key for key in content if keys.count(key) > 1} if len(keys) < 1000 else set[str]()
        raise ValueError(f"the same key twice {listed(twice)}".rstrip())
    return content


def _check_values(value: Any, finite: bool) -> None:
    """Raise ValueError for what cannot be printed, compared or written again; a loop, for depth cannot end it."""
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
        if isinstance(item, dict):
            pending += [(inner, depth + 1) for pair in item.items() for inner in pair]
        elif isinstance(item, list):
            pending += [(inner, depth + 1) for inner in item]
        elif isinstance(item, float) and finite and not math.isfinite(item):
            raise ValueError("numbers must be finite, not NaN or Infinity")
        elif isinstance(item, str):
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError("text holds half a character (a lone surrogate)") from error
