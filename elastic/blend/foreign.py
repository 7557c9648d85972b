"""Read what other tools wrote: Megatron's indexed datasets, `.bin` and `.idx`, of a tokenizer that is named."""

import hashlib
from bisect import bisect_right
from pathlib import Path

import numpy as np
import torch

from elastic.config.sections import LongDocuments, Packed
from elastic.data.manifest import (
    MANIFEST_NAME,
    SAMPLED_BLOCKS,
    DataError,
    Manifest,
    SplitRecord,
    TokenizerRecord,
    read_manifest,
    sampled_sha256,
)
from elastic.data.packing import INDEX_HEADER_BYTES, INDEX_MAGIC, document_bounds
from elastic.data.tokenizer import TOKENIZER_JSON, load_tokenizer, tokenizer_files
from elastic.data.tokens import TokenStream

# Codes of Megatron-Core's indexed_dataset.DType that can be token ids.
INTEGERS = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
DTYPE_AT = INDEX_HEADER_BYTES - 17  # one byte, before the two counts
SAMPLED_TOKENS = 4096
SAMPLED_FILES = 16
REMEDY = "restore it"  # a list of problems adds that the source may be taken out


def is_prepared(path: Path) -> bool:
    """Tell whether a folder was written by prepare_data, and not by another tool."""
    return (path / MANIFEST_NAME).exists()


def foreign_prefixes(path: Path) -> list[Path]:
    """Return the prefixes of the pairs that a path names, itself or as the folder they lie in; none: no foreign data.

    The end .bin or .idx may stand in the path.
    """
    if path.is_dir():
        found = [index.with_suffix("") for index in sorted(path.glob("*.idx"))]
        return [] if is_prepared(path) else found
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    return [prefix] if _beside(prefix, ".idx").is_file() or _beside(prefix, ".bin").is_file() else []


def tokenizer_record(folder: Path) -> TokenizerRecord:
    """Describe the tokenizer of a prepared folder, or of any folder that stock transformers opens; raises DataError."""
    if is_prepared(folder) or not (folder / TOKENIZER_JSON).is_file():
        return read_manifest(folder).tokenizer
    tokenizer, files = load_tokenizer(folder), tokenizer_files(folder)
    return TokenizerRecord(
        tokenizer.vocab_size,
        tokenizer.eos_token,
        tokenizer.eos_id,
        trained=False,
        sha256=files[TOKENIZER_JSON],
        bos_ids=tokenizer.bos_ids,
        files=files,
    )


class ForeignStream(TokenStream):
    """The tokens of one or several pairs as one stream, in the order of their names; the loss counts all of them.

    Nothing but the index says what they are: sizes are compared with it, and ids with the tokenizer's vocabulary, a
    sample here and every one where it is read. Raises DataError.
    """

    def __init__(
        self,
        path: Path,
        tokenizer: TokenizerRecord,
        packing: Packed | None = None,
        long_documents: LongDocuments = "cut",
    ) -> None:
        self.prefix, self.packing, self.long_documents = path, packing or "concatenated", long_documents
        self._packings = {}
        self._prefixes = foreign_prefixes(path)
        if not self._prefixes:
            raise DataError(f"{path}: no .idx and .bin of Megatron; name their prefix, or the folder they lie in")
        self._parts = [_open_pair(prefix) for prefix in self._prefixes]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)]).tolist()
        split = SplitRecord(num_documents=0, num_tokens=self.num_tokens, text_bytes=0, files={})
        self.manifest = Manifest(
            settings={},
            source={},
            num_documents=0,
            skipped={},
            stopped_at_max_bytes=False,
            documents_sha256="",
            tokenizer=tokenizer,
            dtype=str(self._parts[0].dtype),
            splits={path.name: split},
        )
        last = max(0, self.num_tokens - SAMPLED_TOKENS)
        for block in range(SAMPLED_BLOCKS):
            self.read(last * block // (SAMPLED_BLOCKS - 1), min(SAMPLED_TOKENS, self.num_tokens))

    @property
    def num_tokens(self) -> int:
        """Return how many tokens all pairs hold."""
        return self._starts[-1]

    def bounds(self) -> np.ndarray:
        """Return where the documents begin, and the last ends: positions [N + 1], from the indices beside them."""
        bounds = [np.zeros(1, np.int64)]
        for prefix, part, start in zip(self._prefixes, self._parts, self._starts, strict=False):
            found = document_bounds(_beside(prefix, ".idx"), REMEDY)
            if not len(found) or found[-1] != len(part):
                rule = f"its documents do not end where the {len(part):,} tokens do"
                raise DataError(f"{_beside(prefix, '.idx')}: {rule}; {REMEDY}")
            bounds.append(found[1:] + start)
        return np.concatenate(bounds)

    def read(self, start: int, count: int) -> torch.Tensor:
        """Return tokens [count] from position `start`, int64; raises DataError for an id beyond the vocabulary."""
        assert start >= 0 and start + count <= self.num_tokens, f"tokens {start}..{start + count} are not in the stream"
        found, first = [], bisect_right(self._starts, start) - 1
        for begin, part in zip(self._starts[first:], self._parts[first:], strict=False):
            if begin >= start + count:
                break
            found.append(part[max(0, start - begin) : start + count - begin].astype(np.int64))
        tokens = torch.from_numpy(np.concatenate(found))
        limit = self.manifest.tokenizer.vocab_size
        if count and not 0 <= int(tokens.min()) <= int(tokens.max()) < limit:
            worst = int(tokens.max()) if int(tokens.max()) >= limit else int(tokens.min())
            raise DataError(
                f"{self.prefix}: holds token id {worst}, and its tokenizer has {limit:,} ids; name the tokenizer that "
                "made it"
            )
        return tokens

    def checksums(self) -> dict[str, str]:
        """Return what tells other content: the size of every file, and of up to 16 pairs a sample of the tokens."""
        step = -(-len(self._prefixes) // SAMPLED_FILES)
        sampled = {prefix.name: sampled_sha256(_beside(prefix, ".bin")) for prefix in self._prefixes[::step]}
        sizes = {
            prefix.name: f"{len(part) * part.itemsize} {sampled.get(prefix.name)}"
            for prefix, part in zip(self._prefixes, self._parts, strict=True)
        }
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sizes.items()}


def _beside(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _open_pair(prefix: Path) -> np.ndarray:
    """Map the tokens of a pair, whose index must say the same number of them."""
    index, binary = _beside(prefix, ".idx"), _beside(prefix, ".bin")
    for path in (index, binary):
        if not path.is_file():
            raise DataError(f"{path} is missing; {REMEDY}")
    with index.open("rb") as file:
        header = file.read(INDEX_HEADER_BYTES)
    if len(header) < INDEX_HEADER_BYTES or not header.startswith(INDEX_MAGIC):
        raise DataError(f"{index}: is no index of a Megatron dataset; {REMEDY}")
    if header[DTYPE_AT] not in INTEGERS:
        raise DataError(f"{index}: its type {header[DTYPE_AT]} is none of token ids; {REMEDY}")
    dtype = np.dtype(INTEGERS[header[DTYPE_AT]])
    num_tokens = int(_sequence_lengths(index, header).sum(dtype=np.int64))
    if not num_tokens or binary.stat().st_size != num_tokens * dtype.itemsize:
        raise DataError(
            f"{binary}: has {binary.stat().st_size:,} bytes, its index says {num_tokens:,} tokens of {dtype.itemsize}; "
            f"{REMEDY}"
        )
    return np.asarray(np.memmap(binary, dtype=dtype, mode="r"))


def _sequence_lengths(index: Path, header: bytes) -> np.ndarray:
    count = int(np.frombuffer(header, np.int64, 1, offset=INDEX_HEADER_BYTES - 16)[0])
    if not 0 <= count <= (index.stat().st_size - INDEX_HEADER_BYTES) // 12:
        raise DataError(f"{index}: is cut off, {count:,} sequences need more bytes; {REMEDY}")
    return np.memmap(index, dtype=np.int32, mode="r", offset=INDEX_HEADER_BYTES, shape=(count,))
