"""Prepare data: documents -> tokenizer -> indexed training and validation sets, with a manifest of what happened.

The corpus is read twice. The first reading counts, looks at the hashes that decide the split, and keeps a bounded
sample for the tokenizer; the second encodes and writes. No document list is ever held.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.data.corpus import POSITIONS, Corpus, Document, Tally, read_documents
from elastic.data.corpus_files import SkipReason, describe_files
from elastic.data.indexed import IndexedWriter
from elastic.data.manifest import (
    MANIFEST_NAME,
    DataError,
    FileRecord,
    Manifest,
    SkipRecord,
    SplitRecord,
    TokenizerRecord,
    check_folder,
    read_manifest,
    record_file,
)
from elastic.data.prepare_config import PrepareConfig
from elastic.data.publish import written_aside
from elastic.data.tokenizer import (
    TOKENIZER_FILES,
    LoadedTokenizer,
    copy_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from elastic.world.files import sha256_of

__all__ = ["PrepareConfig", "Prepared", "prepare", "skip_lines"]

TRAIN = "train"
VALIDATION = "validation"
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096
SAMPLE_DOCUMENT_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, its manifest, and whether it was there already."""

    folder: Path
    manifest: Manifest
    already_prepared: bool


@dataclass(frozen=True)
class Scan:
    """What the first reading found. A document whose split position is below `threshold` goes to validation."""

    tally: Tally
    threshold: int
    documents_sha256: str
    sample: list[str]


def prepare(config: PrepareConfig) -> Prepared:
    """Make the folder `config.output_dir` with train.{bin,idx}, validation.{bin,idx}, a tokenizer and data.json.

    The same settings and source give the same bytes. A folder already made from them is recognised and left alone.
    Raises DataError for illegal settings (all of them at once), a folder that holds something else, a corpus without
    usable documents, one that changes while it is read, or a place that cannot be written to.
    """
    problems = config.problems()
    if problems:
        raise DataError("data: " + "; ".join(map(str, problems)))
    folder = Path(config.output_dir)
    settings = config.settings()
    source = describe_files(config.paths, config.corpus().file_choice)
    existing = _existing(folder, settings, source, config.overwrite)
    if existing is not None:
        return Prepared(folder, existing, already_prepared=True)
    with written_aside(folder, replace=config.overwrite) as aside:
        manifest = _build(config, settings, source, aside)
    return Prepared(folder, manifest, already_prepared=False)


def _existing(folder: Path, settings: dict[str, Any], source: dict[str, Any], overwrite: bool) -> Manifest | None:
    """Return the manifest when `folder` already holds what is asked for, None when it may be (re)written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    strangers = [str(folder)] if not folder.is_dir() else sorted(_strangers(folder))
    if strangers:
        raise DataError(
            f"output_dir = {folder}: holds what no preparation wrote ({', '.join(strangers[:5])}), so it is not "
            "replaced even with overwrite=true; choose another folder"
        )
    try:
        manifest = read_manifest(folder)
        # Told to overwrite, look at every byte before deciding that nothing needs to be done.
        check_folder(folder, manifest, full=overwrite)
        differences = _differences(manifest.settings, settings) + _differences(manifest.source, source)
    except DataError:
        if overwrite:
            return None
        raise
    if not differences:
        return manifest
    if overwrite:
        return None
    raise DataError(
        f"output_dir = {folder}: was prepared differently: {'; '.join(differences)}; "
        "choose another folder or set overwrite=true"
    )


def _strangers(folder: Path) -> set[str]:
    ours = {f"{split}.{suffix}" for split in (TRAIN, VALIDATION) for suffix in ("bin", "idx")}
    return {path.name for path in folder.iterdir()} - ours - {MANIFEST_NAME, *TOKENIZER_FILES}


def _differences(old: Any, new: Any) -> list[str]:
    names = sorted(set(old) | set(new))
    return [f"{name} was {old.get(name)}, now {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _build(config: PrepareConfig, settings: dict[str, Any], source: dict[str, Any], aside: Path) -> Manifest:
    corpus = config.corpus()
    scan = _scan(corpus, config, source["total_bytes"])
    if config.tokenizer_path is None:
        train_tokenizer(scan.sample, config.vocab_size, aside)
    else:
        copy_tokenizer(Path(config.tokenizer_path), aside)
    tokenizer = load_tokenizer(aside, parse_special_tokens=config.parse_special_tokens, add_bos=config.add_bos)
    splits, dtype = _write_splits(corpus, scan, tokenizer, aside)
    manifest = Manifest(
        settings=settings,
        source=source,
        num_documents=scan.tally.kept,
        skipped=_by_name(scan.tally),
        stopped_at_max_bytes=scan.tally.stopped_at_max_bytes,
        documents_sha256=scan.documents_sha256,
        tokenizer=TokenizerRecord(
            vocab_size=tokenizer.vocab_size,
            eos_token=tokenizer.eos_token,
            eos_id=tokenizer.eos_id,
            trained=config.tokenizer_path is None,
            sha256=tokenizer.sha256,
            bos_ids=tokenizer.bos_ids,
            files={name: sha256_of(aside / name) for name in TOKENIZER_FILES if (aside / name).is_file()},
        ),
        dtype=dtype,
        splits=splits,
    )
    manifest.write(aside)
    return manifest


def _scan(corpus: Corpus, config: PrepareConfig, source_bytes: int) -> Scan:
    """Read everything once: tally, split threshold, a checksum of all documents, the tokenizer's sample."""
    tally, digest = Tally(), hashlib.sha256()
    lowest, highest, surely_training = POSITIONS, -1, ""
    sample: list[str] = []
    sample_bytes = 0
    nominal = int(config.validation_ratio * POSITIONS)
    total_bytes = max(1, min(source_bytes, corpus.max_bytes or source_bytes))
    # Sampled by content and not from the front, so that the tokenizer sees the whole corpus whatever its order.
    sampled_below = POSITIONS * config.tokenizer_sample_bytes // total_bytes
    for document in read_documents(corpus, tally):
        digest.update(document.digest)
        lowest = min(lowest, document.split_position)
        if document.split_position > highest:
            highest, surely_training = document.split_position, document.text[:SAMPLE_DOCUMENT_CHARACTERS]
        wanted = document.split_position >= nominal and document.sample_position < sampled_below
        if config.tokenizer_path is None and wanted and sample_bytes < config.tokenizer_sample_bytes:
            sample.append(document.text[:SAMPLE_DOCUMENT_CHARACTERS])
            sample_bytes += min(document.num_bytes, 4 * SAMPLE_DOCUMENT_CHARACTERS)
    if not tally.kept:
        skipped = ", ".join(skip_lines(_by_name(tally))) or "nothing"
        raise DataError(f"data: no usable document in {', '.join(corpus.paths)}; skipped: {skipped}{_advice(tally)}")
    threshold = _split_threshold(nominal, lowest, highest)
    # Few large documents may all miss the sample; the tokenizer still needs one that is not validation.
    return Scan(tally, threshold, digest.hexdigest(), sample or [surely_training])


def _split_threshold(nominal: int, lowest: int, highest: int) -> int:
    """Return the position below which documents are validation, moved just enough that neither split is empty."""
    if nominal == 0:
        return 0
    if lowest == highest:
        raise DataError(
            "validation_ratio > 0: the corpus has one document and documents are never cut; "
            "set validation_ratio=0 or give more documents (document_format=lines cuts at line ends)"
        )
    if lowest >= nominal:
        return lowest + 1
    return min(nominal, highest)


def _write_splits(
    corpus: Corpus, scan: Scan, tokenizer: LoadedTokenizer, aside: Path
) -> tuple[dict[str, SplitRecord], str]:
    """Read everything again, encode in bounded batches and write each document into its split."""
    names = [TRAIN, VALIDATION] if scan.threshold else [TRAIN]
    digest = hashlib.sha256()
    with ExitStack() as stack:
        writers = {name: stack.enter_context(IndexedWriter(aside / name, tokenizer.vocab_size)) for name in names}
        for batch in _batches(read_documents(corpus, Tally())):
            ids_of_documents = tokenizer.encode_documents([document.text for document in batch])
            for document, ids in zip(batch, ids_of_documents, strict=True):
                digest.update(document.digest)
                split = VALIDATION if document.split_position < scan.threshold else TRAIN
                writers[split].add(ids, document.num_bytes, document.source)
    if digest.hexdigest() != scan.documents_sha256:
        raise DataError(f"data: {', '.join(corpus.paths)} changed while it was read; start again when it is at rest")
    splits = {
        name: SplitRecord(
            writer.num_documents, writer.num_tokens, writer.text_bytes, _records(aside, name), writer.source_tokens
        )
        for name, writer in writers.items()
    }
    return splits, str(writers[TRAIN].dtype)


def _records(folder: Path, split: str) -> dict[str, FileRecord]:
    return {name: record_file(folder / name) for name in (f"{split}.bin", f"{split}.idx")}


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_bytes = 0
    for document in documents:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _by_name(tally: Tally) -> dict[str, SkipRecord]:
    skipped = tally.skipped
    return {
        reason.value: SkipRecord(count, skipped.examples[reason])
        for reason, count in sorted(skipped.counts.items(), key=lambda item: item[0].value)
    }


def _advice(tally: Tally) -> str:
    """Say what to do about what most users mean when nothing of their corpus can be used."""
    remedies = {
        SkipReason.MESSAGES: "chats are not read: write each with its chat template into a text field",
        SkipReason.JSON_LINES: "set document_format=jsonl",
        SkipReason.MISSING_FIELD: "name the field that holds the text with text_field=",
        SkipReason.OTHER_SUFFIX: "name the endings of the files with suffixes=[...]",
        SkipReason.COMPRESSED: "unpack the files",
    }
    return "".join(f"; {remedy}" for reason, remedy in remedies.items() if tally.skipped.counts[reason])


def skip_lines(skipped: Mapping[str, SkipRecord]) -> list[str]:
    """Say in one line per reason how many were left out, and which was the first."""
    return [f"{record.count:,} {reason} (first {record.example})" for reason, record in skipped.items()]
