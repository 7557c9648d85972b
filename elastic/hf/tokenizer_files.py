"""Tokenizer files of a folder: found, checked against the vocabulary, copied; never code, never a pointer to code."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from elastic.hf.safe_files import UnsafeFileError, open_regular, read_json, shown

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TOKENIZER_JSON, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
# The largest published ones have some thirty megabytes.
MAX_BYTES = 128_000_000


def find_tokenizer(folder: Path) -> tuple[Path, ...]:
    """Return the tokenizer files of `folder`, links included; empty if there are none."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).exists(follow_symlinks=False))


def tokenizer_problems(files: Iterable[Path], vocab: int | None) -> list[str]:
    """List what is wrong with tokenizer files: not regular, not JSON, or a token beyond `vocab` (None: not known)."""
    problems = []
    for path in files:
        try:
            if path.suffix != ".json":
                open_regular(path).close()
                continue
            content = read_json(path, MAX_BYTES)
            largest = _largest_token(content) if path.name == TOKENIZER_JSON else -1
            if vocab is not None and largest >= vocab:
                problems.append(f"tokenizer {path.parent} has token {largest}, the model's vocabulary is {vocab}")
        except UnsafeFileError as error:
            problems.append(str(error))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(f"{path.name} is not a tokenizer's: {shown(str(error))}")
    return problems


def copy_tokenizer_files(files: Iterable[Path], folder: Path) -> None:
    """Copy sound files byte for byte, but without `auto_map`, which asks users of the copy to run code."""
    for path in files:
        settings = read_json(path, MAX_BYTES) if path.name == _SETTINGS else {}
        if "auto_map" in settings:
            del settings["auto_map"]
            (folder / path.name).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            with open_regular(path) as given, open(folder / path.name, "wb") as copy:
                shutil.copyfileobj(given, copy)


def _largest_token(tokenizer: dict[str, Any]) -> int:
    numbers = [*_entries(tokenizer).values(), *(token["id"] for token in tokenizer.get("added_tokens") or [])]
    if not all(type(number) is int for number in numbers):
        raise TypeError("token numbers must be integers")
    return max(numbers, default=0)


def _entries(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return the number of each text of a tokenizer's model, whose file may list them in order (unigrams do)."""
    entries = (tokenizer.get("model") or {}).get("vocab") or {}
    return entries if isinstance(entries, dict) else {text: number for number, (text, *_) in enumerate(entries)}


def special_tokens(folder: Path) -> dict[str, int | None]:
    """Return the numbers of the bos, eos and pad tokens that a tokenizer's settings name, None where they name none.

    Raises UnsafeFileError for files that cannot be read.
    """
    names = {path.name for path in find_tokenizer(folder)}
    settings, tokenizer = (
        read_json(folder / name, MAX_BYTES) if name in names else {} for name in (_SETTINGS, TOKENIZER_JSON)
    )
    numbers = _entries(tokenizer) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}
    named = {name: settings.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    return {name: numbers.get(of.get("content") if isinstance(of, dict) else of) for name, of in named.items()}
