"""One document of 200 MB, a million empty ones: read, counted, and prepared in the memory they need."""

import subprocess
import sys
from pathlib import Path

import pytest

from elastic.corpus.prepare import prepare
from elastic.data.manifest import SkipRecord, read_manifest
from tests.unit.data.preparing import config, texts, write_jsonl

MILLION = 1_000_000
MIB = 1 << 20

# Not ru_maxrss: that of a child begins at the peak of the process which started it.
PEAK_KIB = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
MEASURE = f"""
import sys
from tests.unit.corpus.reading import read_documents
from elastic.corpus.files import Corpus, Tally
kind, path, limit = sys.argv[1:]
tally, before = Tally(), {PEAK_KIB}
corpus = Corpus([path], kind, max_document_bytes=int(limit))
kept = sum(1 for _ in read_documents(corpus, tally))
grown = {PEAK_KIB} - before
print(kept, grown // 1024, *(f"{{reason}}={{record.count}}" for reason, record in tally.skipped.items()))
"""


def measured(kind: str, path: Path, limit_bytes: int) -> tuple[int, int, str]:
    """Read in a process of its own: documents kept, MiB by which its memory grew, what was skipped."""
    command = [sys.executable, "-c", MEASURE, kind, str(path), str(limit_bytes)]
    kept, grown_mib, *skipped = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return int(kept), int(grown_mib), " ".join(skipped)


def test_many_empty_documents_are_counted_in_the_memory_of_one(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(b"\n" * (MILLION // 4) + b"the only one\n")
    kept, grown_mib, skipped = measured("lines", path, MIB)
    assert (kept, skipped) == (1, f"empty={MILLION // 4}")
    assert grown_mib < 4


def test_a_real_document_of_200_mb_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "')
        for _ in range(200):
            stream.write(b"words " * (MIB // 6))
        stream.write(b'"}\n{"text": "after it"}\n')
    kept, grown_mib, skipped = measured("jsonl", path, 16 * MIB)
    assert (kept, skipped) == (1, "too_large=1")
    assert grown_mib < 80  # a line up to the limit, its buffer growing


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_document_of_200_mb_is_prepared_when_allowed(tmp_path: Path) -> None:
    line = "def function(value: int) -> int: return value + 1\n"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "big.py").write_text(line * (200_000_000 // len(line)))
    (tmp_path / "source" / "small.py").write_text(line)
    peak_mib = prepared_peak_mib(tmp_path, max_document_bytes=256 * MIB)
    manifest = read_manifest(tmp_path / "data")
    assert sum(split.text_bytes for split in manifest.splits.values()) == 200_000_000 + len(line)
    assert peak_mib < 3000  # Python and Megatron-Core take 700 of it; encoded at once it would be 30,000


@pytest.mark.slow
def test_a_million_empty_documents_among_good_ones_are_prepared(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    write_jsonl(source, texts())
    with source.open("ab") as stream:
        stream.write(b'{"text": ""}\n' * MILLION)
    manifest = prepare(config(source, tmp_path / "data")).manifest
    assert manifest.num_documents == len(texts())
    assert manifest.skipped == {"empty": SkipRecord(MILLION, f"{source}:{len(texts()) + 1}")}


def prepared_peak_mib(folder: Path, max_document_bytes: int) -> int:
    """Prepare folder/source in a process of its own and return the MiB it took at most."""
    code = (
        "import sys\n"
        "from elastic.corpus.prepare import PrepareConfig, prepare\n"
        "source, output, limit = sys.argv[1:]\n"
        "prepare(PrepareConfig(output_dir=output, paths=[source], vocab_size=1000, max_document_bytes=int(limit)))\n"
        f"print({PEAK_KIB} // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(folder / "source"), str(folder / "data"), str(max_document_bytes)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout.split()[-1])
