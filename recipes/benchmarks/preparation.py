"""Speed of preparing data and of reading it: ours and the way of Megatron-Core's own tool, on the same input."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from elastic.corpus.blocks import read_blocks
from elastic.corpus.config import PrepareConfig
from elastic.corpus.documents import Document, parse_block
from elastic.corpus.files import Corpus
from elastic.corpus.prepare import prepare
from elastic.data.stream import Concatenated, Isolated, Samples
from elastic.data.tokens import TokenStream
from recipes.benchmarks._timing import cpu_seconds

SOURCE_BYTES = 12_000_000
SEQUENCE_LENGTH = 4096
READ_SEQUENCES = 1000


def run(rounds: int) -> list[dict[str, Any]]:
    """Measure with one process and with one for each core, alternating; then reading sequences. Best of `rounds`."""
    cores = len(os.sched_getaffinity(0))
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one thread
    try:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            tokenizer = prepare(PrepareConfig(output_dir=str(place / "small"), max_bytes=3_000_000)).folder
            source = write_corpus(place / "corpus.jsonl")
            rows = []
            for number in range(rounds):
                for processes in sorted({1, cores}):
                    rows.append(_prepared(source, tokenizer, place / f"ours{number}_{processes}", processes))
                    rows.append(_one_by_one(source, tokenizer, place / f"theirs{number}_{processes}", processes))
            best: dict[tuple[str, int], dict[str, Any]] = {}
            for row in sorted(rows, key=lambda row: row["seconds"]):
                best.setdefault((row["what"], row["processes"]), row)
            stream = TokenStream(place / "ours0_1" / "train")
            ways: dict[str, Samples] = {
                "concatenated": Concatenated(stream, SEQUENCE_LENGTH, seed=0),
                "isolated": Isolated(stream, SEQUENCE_LENGTH, seed=0),
            }
            reading = [_read(f"reading, {way}", samples) for way, samples in ways.items()]
            return [*(best[key] for key in sorted(best)), *reading]
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def write_corpus(path: Path) -> Path:
    """Write the standard library's sources as jsonl, again and again with another first line; returns the file."""
    found = (part for block in read_blocks(Corpus()) for part in parse_block(block, Corpus()))
    texts, size = [part.text for part in found if isinstance(part, Document)], 0
    with path.open("w") as stream:
        while size < SOURCE_BYTES:
            for text in texts:
                line = json.dumps({"text": f"# copy {size}\n{text}"}) + "\n"
                stream.write(line)
                size += len(line)
    return path


def _prepared(source: Path, tokenizer: Path, output: Path, processes: int) -> dict[str, Any]:
    config = PrepareConfig(
        output_dir=str(output),
        paths=[str(source)],
        document_format="jsonl",
        tokenizer_path=str(tokenizer),
        validation_ratio=0,
        workers=str(processes),
    )
    started, cpu = time.perf_counter(), cpu_seconds()
    manifest = prepare(config).manifest
    return _row("prepare_data", processes, manifest.splits["train"].num_tokens, started, cpu, source.stat().st_size)


def _one_by_one(source: Path, tokenizer: Path, prefix: Path, processes: int) -> dict[str, Any]:
    script = Path(__file__).with_name("_one_by_one.py")
    command = [sys.executable, str(script), str(source), str(tokenizer), str(prefix), str(processes)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    tokens, seconds, cpu = int(printed[-3]), float(printed[-2]), float(printed[-1])
    size = source.stat().st_size
    return dict(what="Megatron-Core's way", processes=processes, tokens=tokens, seconds=seconds, cpu=cpu, size=size)


def _row(what: str, processes: int, tokens: int, started: float, cpu: float, size: int) -> dict[str, Any]:
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return dict(what=what, processes=processes, tokens=tokens, seconds=seconds, cpu=cpu, size=size)


def _read(what: str, samples: Samples) -> dict[str, Any]:
    """Read sequences as training does, in the order of an epoch and on, on one thread."""
    started, cpu = time.perf_counter(), cpu_seconds()
    for index in range(READ_SEQUENCES):
        samples.row(index)
    return _row(what, 1, READ_SEQUENCES * SEQUENCE_LENGTH, started, cpu, 0)
