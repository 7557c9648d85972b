"""A small corpus and the settings to prepare it, for the tests of preparation."""

import json
import random
from pathlib import Path
from typing import Any

from elastic.corpus.prepare import PrepareConfig

NUM_DOCUMENTS = 200


def texts() -> list[str]:
    generator = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "während", "雨"]
    return [f"{number} " + " ".join(generator.choices(words, k=30)) for number in range(NUM_DOCUMENTS)]


def write_jsonl(path: Path, documents: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def config(source: Path, output: Path, **changes: Any) -> PrepareConfig:
    settings: dict[str, Any] = {"validation_ratio": 0.1, "vocab_size": 300, "document_format": "jsonl"}
    return PrepareConfig(output_dir=str(output), paths=[str(source)], **(settings | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
