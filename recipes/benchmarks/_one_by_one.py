"""Prepare jsonl as Megatron-Core's own tools/preprocess_data.py does: a pool, a document at a time, one writer.

Started by preparation.py with the source, the tokenizer's folder, the output's prefix and the number of processes;
prints tokens, seconds, and CPU seconds of all processes, without what its imports take.
"""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import PreTrainedTokenizerFast

from recipes.benchmarks._timing import cpu_seconds


class Encoder:
    """What a process of the pool has: its tokenizer, opened once, as the tool keeps it."""

    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def open(cls, folder: str) -> None:
        """Open the tokenizer."""
        cls.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        """Encode the text of a line."""
        ids: list[int] = cls.tokenizer(json.loads(line)["text"], add_special_tokens=False).input_ids
        return [*ids, cls.tokenizer.eos_token_id]


def main() -> None:
    """Prepare and print."""
    source, tokenizer, prefix, processes = sys.argv[1:]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started, cpu = time.perf_counter(), cpu_seconds()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    with Path(source).open() as lines, multiprocessing.Pool(int(processes), Encoder.open, (tokenizer,)) as pool:
        for ids in pool.imap(Encoder.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
        pool.close()
        pool.join()
    builder.finalize(f"{prefix}.idx")
    print(sum(builder.sequence_lengths), time.perf_counter() - started, cpu_seconds() - cpu)


if __name__ == "__main__":
    main()
