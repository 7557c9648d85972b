"""The verb prepare_data: text becomes a tokenizer and indexed train / validation sets; corpus/prepare.py does it."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from elastic.corpus.config import PrepareConfig
from elastic.corpus.prepare import prepare, skip_lines
from elastic.data.packing import document_bounds, pack

MINUTES_BYTES = 200_000_000  # read: a minute's work of one process
COMMON_LENGTHS = (4096, 16384, 49152)  # how full sequences would be is said of these; a run says it of its own


def run_prepare(config: PrepareConfig, console: Console) -> Path:
    """Prepare the text, say what was done with it and what was passed over; returns the folder."""
    with _leaving_on_sigterm():
        prepared = prepare(config, _Tenths(console))
    manifest, state = prepared.manifest, "already prepared" if prepared.already_prepared else "prepared"
    splits = ", ".join(f"{name} {split.num_tokens:,} tokens" for name, split in manifest.splits.items())
    lines = [f"{prepared.folder}: {state}, {manifest.num_documents:,} documents, {splits}"]
    if manifest.tokenizer.bos_ids and not config.is_chat:
        lines.append(f"every document begins with the tokenizer's own {list(manifest.tokenizer.bos_ids)}")
    if manifest.stopped_at_max_bytes:
        lines.append(f"stopped at max_bytes = {manifest.settings['max_bytes']:,}: there are more documents")
    for name, split in manifest.splits.items():
        if split.num_counted is not None:
            lines.append(f"{name}: the loss counts {split.num_counted:,} of its tokens ({config.counted_part})")
    index = prepared.folder / "train.idx"
    if manifest.packing == "isolated" and index.is_file():
        bounds = document_bounds(index)
        fitting = (length for length in COMMON_LENGTHS if length < bounds[-1])
        lines += [f"packed: {pack(bounds, length, seed=0)}" for length in fitting]
    lines += [f"remarked: {line}" for line in skip_lines(manifest.remarks)]
    lines += [f"skipped: {line}" for line in skip_lines(manifest.skipped) or ["nothing"]]
    if prepared.joined is not None:
        together = sum(split.num_tokens for split in prepared.joined.splits.values())
        lines.append(f"{config.output_dir}: all {config.part.of} shards are there, {together:,} tokens")
    console.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)
    return Path(prepared.folder)


@dataclass
class _Tenths:
    """Says ten times how far a large corpus has been read."""

    console: Console
    done: int = 0

    def __call__(self, num_bytes: int, total: int) -> None:
        before, self.done = self.done, self.done + num_bytes
        if total >= MINUTES_BYTES and 10 * before // total < 10 * self.done // total:
            text = f"read {self.done / 1e6:,.0f} MB of about {total / 1e6:,.0f}, for everything is read twice"
            self.console.print(text, highlight=False)


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Leave by an exception where a job's time is up, so that what is half written is removed."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
