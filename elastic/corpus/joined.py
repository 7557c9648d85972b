"""Make one prepared folder of the shards in it: a manifest of the whole beside them, so that nothing reads them all."""

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from elastic.corpus.files import Tally
from elastic.data.manifest import MANIFEST_NAME, DataError, Manifest, SplitRecord, read_manifest
from elastic.data.shards import shard_problem, shards_in
from elastic.data.tokenizer import TOKENIZER_FILES

JOINED = {MANIFEST_NAME, *TOKENIZER_FILES}


def join_shards(folder: Path) -> Manifest | None:
    """Write the manifest of all shards in `folder`, and their tokenizer; None while one is missing.

    Raises DataError when they are not all of one corpus, made with the same settings and tokenizer.
    """
    if shard_problem(folder) is not None:
        return None
    shards = {name: read_manifest(folder / name) for name in shards_in(folder)}
    one, *_ = shards.values()
    for name, other in shards.items():
        for what, ours, its in (
            ("files", one.source, other.source),
            ("settings", _without_shard(one), _without_shard(other)),
            ("tokenizer", one.tokenizer, other.tokenizer),
        ):
            if ours != its:
                rule = f"{folder / name}: was prepared with other {what} than {next(iter(shards))}"
                raise DataError(f"{rule}; prepare all shards alike, with overwrite=true where they are there already")
    skips, remarks = Tally(), Tally()
    for shard in shards.values():
        skips.add(shard.skipped)
        remarks.add(shard.remarks)
    splits = {
        name: _joined_split([(path, shard.splits[name]) for path, shard in shards.items()]) for name in one.splits
    }
    whole = Manifest(
        settings={**_without_shard(one), "shards": len(shards)},
        source=one.source,
        num_documents=sum(shard.num_documents for shard in shards.values()),
        skipped=dict(sorted(skips.skipped.items())),
        stopped_at_max_bytes=False,
        documents_sha256=hashlib.sha256(
            "".join(shard.documents_sha256 for shard in shards.values()).encode()
        ).hexdigest(),
        tokenizer=one.tokenizer,
        dtype=one.dtype,
        splits={name: split for name, split in splits.items() if split.num_tokens},
        remarks=dict(sorted(remarks.skipped.items())),
    )
    first = folder / next(iter(shards))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".joined-") as aside:
        for name in one.tokenizer.files:
            shutil.copyfile(first / name, Path(aside) / name)
        whole.write(Path(aside))
        for name in set(TOKENIZER_FILES).difference(one.tokenizer.files):  # of a tokenizer the shards had before
            (folder / name).unlink(missing_ok=True)
        for name in (*one.tokenizer.files, MANIFEST_NAME):  # the manifest last: what it says is there then
            (Path(aside) / name).replace(folder / name)
    return whole


def _without_shard(manifest: Manifest) -> dict[str, object]:
    return {name: value for name, value in manifest.settings.items() if name != "shard"}


def _joined_split(parts: Sequence[tuple[str, SplitRecord]]) -> SplitRecord:
    """Put the splits of shards behind each other; a source goes on where the shard before left it."""
    sources = Counter[str]()
    for _, split in parts:
        sources.update(split.sources)
    counted = [split.num_counted for _, split in parts if split.num_counted is not None]
    return SplitRecord(
        num_documents=sum(split.num_documents for _, split in parts),
        num_tokens=sum(split.num_tokens for _, split in parts),
        text_bytes=sum(split.text_bytes for _, split in parts),
        files={f"{path}/{name}": record for path, split in parts for name, record in split.files.items()},
        sources=dict(sources),
        num_counted=sum(counted) if counted else None,
    )
