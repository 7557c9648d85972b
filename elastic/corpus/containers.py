"""Read lines out of compressed files and rows out of parquet, in bounded memory; what is damaged is an OSError."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from elastic.data.manifest import DataError

COMPRESSED_SUFFIXES = (".gz", ".zst")
PARQUET = ".parquet"
INPUT_BYTES = 4 << 10  # of a zstd file at a time: four bytes of it can stand for 128 KiB
ROWS = 64


@contextmanager
def open_lines(path: Path) -> "Iterator[io.BufferedReader[Any]]":
    """Open a file of lines, unpacked on the way if it is named .gz or .zst.

    Raises DataError when the package that unpacks it is missing, OSError (also while it is read) when it is damaged.
    """
    if path.suffix not in COMPRESSED_SUFFIXES:
        with path.open("rb") as plain:
            yield plain
        return
    with path.open("rb") as packed:
        yield io.BufferedReader(_Chunks(_unpacked(path, packed)), 1 << 18)


def _unpacked(path: Path, packed: BinaryIO) -> Iterator[bytes]:
    if path.suffix == ".gz":
        try:
            with gzip.open(packed) as stream:
                while chunk := stream.read(1 << 18):
                    yield chunk
        except (EOFError, zlib.error) as error:
            raise OSError(f"damaged: {error}") from error
        return
    zstandard, reader = _package("zstandard", path), None
    try:
        while rest := packed.read(INPUT_BYTES):
            while rest:
                reader = reader or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
                yield reader.decompress(rest)
                rest = reader.unused_data if reader.eof else b""
                reader = None if reader.eof else reader
    except zstandard.ZstdError as error:
        raise OSError(f"damaged: {error}") from error
    if reader is not None:  # the library takes the end of the file for the end of the data
        raise OSError("damaged: it ends within a frame")


class _Chunks(io.RawIOBase):
    """Presents an iterator of bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        """Say yes."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill `target` with what comes next; 0 at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(target), len(self._rest))
        target[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def parquet_batches(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, bytes]]:
    """Yield the rows of a parquet file, some at a time: how many, and those of `columns` that it has, for `rows_of`."""
    parquet, arrow = _package("pyarrow.parquet", path), _package("pyarrow", path)
    try:
        with parquet.ParquetFile(path) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=ROWS, columns=there):
                sink = arrow.BufferOutputStream()
                with arrow.ipc.new_stream(sink, batch.schema) as stream:
                    stream.write_batch(batch)
                yield batch.num_rows, sink.getvalue().to_pybytes()
    except ValueError as error:  # what pyarrow's own errors derive from
        raise OSError(f"damaged: {error}") from error


def rows_of(batch: bytes, path: Path) -> Iterator[bytes]:
    """Yield each row of a batch of the file `path` as a line of JSON; null is left out.

    A column of objects gives every object all fields that one of them has, the others' null: they are no fields.
    """
    try:
        for row in _package("pyarrow", path).ipc.open_stream(batch).read_all().to_pylist():
            yield json.dumps(_without_null(row), ensure_ascii=False, default=str).encode(errors="surrogatepass")
    except ValueError as error:
        raise OSError(f"damaged: {error}") from error


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def _package(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: needs the package {package}, which is not installed: pip install {package}") from None
