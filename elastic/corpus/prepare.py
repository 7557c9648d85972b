"""Prepare data: documents -> tokenizer -> indexed training and validation sets, with a manifest of what happened.

The corpus is read twice. The first reading counts, looks at the hashes that decide the split, and keeps a bounded
sample for the tokenizer; the second encodes and writes. No document list is ever held.
"""

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import DType

from elastic.corpus.blocks import empty_shards
from elastic.corpus.chosen import Chosen
from elastic.corpus.config import PrepareConfig
from elastic.corpus.conversation import MESSAGE_FIELDS
from elastic.corpus.files import SkipReason, Tally, describe_files
from elastic.corpus.joined import JOINED, join_shards
from elastic.corpus.splits import SUFFIXES, write_splits
from elastic.corpus.workers import CHANGED, TEST, TRAIN, VALIDATION, Borders, Work, Workers
from elastic.data.manifest import (
    MANIFEST_NAME,
    DataError,
    Manifest,
    SkipRecord,
    TokenizerRecord,
    checked_manifest,
)
from elastic.data.shards import shards_in
from elastic.data.tokenizer import (
    CHAT_TEMPLATE,
    TOKENIZER_FILES,
    TOKENIZER_JSON,
    copy_tokenizer,
    load_tokenizer,
    tokenizer_files,
    train_tokenizer,
)
from elastic.world.files import REMEDIES, first_few, remove, written_aside

OURS = {MANIFEST_NAME, *TOKENIZER_FILES, *(name + suffix for name in (TRAIN, VALIDATION, TEST) for suffix in SUFFIXES)}
CANNOT_WRITE = {*REMEDIES, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY}


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, its manifest, and whether it was there already; of the last shard, all of them as one."""

    folder: Path
    manifest: Manifest
    already_prepared: bool
    joined: Manifest | None = None


def prepare(config: PrepareConfig, on_read: Callable[[int, int], object] = lambda num_bytes, total: None) -> Prepared:
    """Make the folder `config.output_dir` with a tokenizer, data.json, and .bin and .idx of train, validation and test.

    Of chats of which the loss counts a part, also .mask of each split: a bit for every token.
    The same settings and source give the same bytes, whatever the number of `workers`. A folder already made from them
    is recognised and left alone. With `shard=3/64` it lies within `output_dir`, and all of them there are one, too.
    `on_read` hears how many bytes were read, of about how many: all is read twice.
    Raises DataError for illegal settings (all of them at once), a folder that holds something else, a corpus without
    usable documents, one that changes while it is read, or a place that cannot be written to.
    """
    problems = config.problems()
    if problems:
        raise DataError("data: " + "; ".join(map(str, problems)))
    folder, source = config.folder, describe_files(config)
    if config.shard is not None:
        _check_shards(config, source["total_bytes"])
    existing = _existing(folder, config, source)
    if existing is not None:
        return Prepared(folder, existing, already_prepared=True, joined=_joined(config))
    try:
        if config.shard is not None:
            remove(folder.with_name(MANIFEST_NAME))  # all shards together are no longer what it says
        with written_aside(folder, replace=config.overwrite) as aside:
            aside.mkdir()
            manifest = _build(config, source, aside, on_read)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise DataError(
            f"output_dir = {folder}: cannot be written ({error.strerror}); free the space or choose another place"
        ) from error
    return Prepared(folder, manifest, already_prepared=False, joined=_joined(config))


def _joined(config: PrepareConfig) -> Manifest | None:
    return None if config.shard is None else join_shards(Path(config.output_dir))


def _check_shards(config: PrepareConfig, total_bytes: int) -> None:
    """Raise DataError where a shard would be empty, or the folder of all shards holds something else."""
    together, number = Path(config.output_dir), config.part.of
    if empty := empty_shards(config, number, total_bytes):
        raise DataError(
            f"shard = {config.shard}: {len(empty)} of {number} shards would hold nothing, the first is {empty[0]}; "
            "only plain files of lines are cut: take fewer shards, or more and smaller files"
        )
    names = {path.name for path in together.iterdir()} if together.is_dir() else set()
    same = {name for name, shard in shards_in(together).items() if shard.of == number}
    if strangers := sorted(name for name in names - same - JOINED if not name.startswith(".")):
        raise DataError(
            f"output_dir = {together}: holds what is no shard of {number} ({', '.join(first_few(strangers))}); "
            "choose another folder"
        )


def _existing(folder: Path, config: PrepareConfig, source: dict[str, Any]) -> Manifest | None:
    """Return the manifest when `folder` already holds what is asked for, None when it may be (re)written."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    strangers = sorted({path.name for path in folder.iterdir()} - OURS) if folder.is_dir() else [str(folder)]
    if strangers:
        raise DataError(
            f"output_dir = {folder}: holds what no preparation wrote ({', '.join(strangers[:5])}), so it is not "
            "replaced even with overwrite=true; choose another folder"
        )
    try:
        # Told to overwrite, look at every byte before deciding that nothing needs to be done.
        manifest = checked_manifest(folder, verify="full" if config.overwrite else "sampled")
        differences = _differences(manifest.settings, config.settings()) + _differences(manifest.source, source)
        if differences:
            raise DataError(
                f"output_dir = {folder}: was prepared differently: {'; '.join(differences)}; "
                "choose another folder or set overwrite=true"
            )
    except DataError:
        if config.overwrite:
            return None
        raise
    return manifest


def _differences(old: Any, new: Any) -> list[str]:
    names = sorted(set(old) | set(new))
    return [f"{name} was {old.get(name)}, now {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _build(
    config: PrepareConfig, source: dict[str, Any], aside: Path, on_read: Callable[[int, int], object]
) -> Manifest:
    total = 2 * min(source["total_bytes"] // config.part.of, config.max_bytes or source["total_bytes"])
    if config.tokenizer_path is not None:
        copy_tokenizer(Path(config.tokenizer_path), aside)
    if config.chat_template is not None:
        (aside / CHAT_TEMPLATE).write_bytes(Path(config.chat_template).read_bytes())
    with Workers(config, aside, config.num_workers(source["total_bytes"])) as workers:
        chosen = Chosen(config, source["total_bytes"], lambda num_bytes: on_read(num_bytes, total))
        borders = _scan(chosen, workers)
        if config.tokenizer_path is None:
            train_tokenizer(chosen.sample(), config.vocab_size, aside)
        tokenizer = load_tokenizer(aside, parse_special_tokens=config.parse_special_tokens, add_bos=config.add_bos)
        dtype: np.dtype = np.dtype(DType.optimal_dtype(tokenizer.vocab_size))  # 2 bytes below 65,500 ids, else 4
        encoded = workers.run(Work.encode, chosen.again(borders, str(dtype)))
        digest, splits = write_splits(config, borders, encoded, dtype, aside)
    tally, files = chosen.tally, tokenizer_files(aside)
    if digest != tally.digest.digest():
        raise DataError(f"data: {', '.join(config.paths)} {CHANGED}")
    manifest = Manifest(
        settings=config.settings(),
        source=source,
        num_documents=tally.kept,
        skipped=dict(sorted(tally.skipped.items())),
        stopped_at_max_bytes=tally.stopped_at_max_bytes,
        documents_sha256=tally.digest.hexdigest(),
        tokenizer=TokenizerRecord(
            vocab_size=tokenizer.vocab_size,
            eos_token=tokenizer.eos_token,
            eos_id=tokenizer.eos_id,
            trained=config.tokenizer_path is None,
            sha256=files[TOKENIZER_JSON],
            bos_ids=tokenizer.bos_ids,
            files=files,
        ),
        dtype=str(dtype),
        splits=splits,
        remarks=dict(sorted(tally.remarks.items())),
    )
    manifest.write(aside)
    return manifest


def _scan(chosen: Chosen, workers: Workers) -> Borders:
    """Read everything once and choose; returns where the splits lie."""
    for found in workers.run(Work.scan, chosen.first()):
        chosen.add(found)
    tally, config = chosen.tally, chosen.config
    if not tally.kept:
        skipped = ", ".join(skip_lines(tally.skipped)) or "nothing"
        what = f"{', '.join(config.paths)}; skipped: {skipped}{_advice(tally, config.is_chat)}"
        if config.shard is not None:
            what = f"shard {config.shard} of {what}; if other shards have some, take fewer shards"
        raise DataError(f"data: no usable document in {what}")
    if config.part.of > 1:
        return chosen.nominal  # the same for every shard, whatever documents it has
    validation = _validation_border(chosen.nominal.validation, chosen.lowest, chosen.highest)
    return Borders(validation, _test_border(chosen, validation) if config.test_ratio else validation)


def _test_border(chosen: Chosen, validation: int) -> int:
    """Return the position below which documents are no training data, moved just enough that no split is empty."""
    first = next((position for position in chosen.nearest if position >= validation), chosen.highest)
    if first == chosen.highest:
        raise DataError(
            f"test_ratio = {chosen.config.test_ratio}: the {chosen.tally.kept} documents of the corpus leave it none "
            "beside training and validation, and documents are never cut; set test_ratio=0 or give more documents "
            "(document_format=lines cuts at line ends)"
        )
    return min(max(chosen.nominal.test, first + 1), chosen.highest)


def _validation_border(nominal: int, lowest: int, highest: int) -> int:
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


def _advice(tally: Tally, is_chat: bool) -> str:
    """Say what to do about what most users mean when nothing of their corpus can be used."""
    line = 'a line of chats is {"messages": [{"role": "user", "content": ...}, ...]}'
    remedies = {
        SkipReason.MESSAGES: "for chats set document_format=chat",
        SkipReason.UNKNOWN_FIELD: f"a message may have the fields {', '.join(sorted(MESSAGE_FIELDS))}: take others out",
        SkipReason.NO_RESPONSE: "loss_on=all takes conversations without an answer",
        SkipReason.JSON_LINES: "set document_format=jsonl",
        SkipReason.MISSING_FIELD: line if is_chat else "name the field that holds the text with text_field=",
        SkipReason.NOT_AN_OBJECT: line if is_chat else 'a line is one object, {"text": ...}',
        SkipReason.OTHER_SUFFIX: "name the endings of the files with suffixes=[...]",
        SkipReason.COMPRESSED: "unpack the files",
    }
    return "".join(f"; {remedy}" for reason, remedy in remedies.items() if reason in tally.skipped)


def skip_lines(skipped: Mapping[str, SkipRecord]) -> list[str]:
    """Say in one line per reason how many were left out, and which was the first."""
    return [f"{record.count:,} {reason} (first {record.example})" for reason, record in sorted(skipped.items())]
