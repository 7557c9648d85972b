"""Settings of data preparation and their rules."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.data.corpus import Corpus, DocumentFormat
from elastic.data.corpus_files import STDLIB, resolve_path
from elastic.data.tokenizer import SMALLEST_VOCAB, TOKENIZER_JSON, AddBos, tokenizer_fingerprint


@dataclass(frozen=True)
class PrepareConfig:
    """Say what to read, how to tokenize and split it, and where the prepared folder goes.

    paths: files and folders, read in order of their names; `python:stdlib` is the running Python's own library.
    suffixes, exclude_folders: which files of folders are taken, and folders of which names are not looked into. None:
        every file of an own folder (.jsonl, .ndjson and .json for jsonl), of the library .py without tests.
    document_format: `text` (a file is a document), `lines` (a line is), `jsonl` (field `text_field` of a line is).
    max_bytes: text to take in all, None takes everything; max_document_bytes: larger documents are skipped.
    validation_ratio: share of the documents, chosen by a hash of their content, that goes to validation.
    tokenizer_path: folder of a tokenizer to use; None trains one of at most `vocab_size` tokens on a sample of
        `tokenizer_sample_bytes` of the training documents, spread over the corpus.
    add_bos: put the tokenizer's begin-of-text token in front of every document; `auto` does as the tokenizer does.
    parse_special_tokens: turn special tokens spelled out in the text into their ids (chat data), else into letters.
    overwrite: replace a prepared folder that was made from something else.
    """

    output_dir: str = "runs/data"
    paths: list[str] = field(default_factory=lambda: [STDLIB])
    document_format: str = "text"
    text_field: str = "text"
    suffixes: list[str] | None = None
    exclude_folders: list[str] | None = None
    max_bytes: int | None = None
    max_document_bytes: int = 16 << 20
    skip_duplicates: bool = True
    validation_ratio: float = 0.05
    tokenizer_path: str | None = None
    vocab_size: int = 8192
    tokenizer_sample_bytes: int = 128 << 20
    add_bos: AddBos = "auto"
    parse_special_tokens: bool = False
    overwrite: bool = False

    def problems(self) -> list[str]:
        """List every illegal setting as 'field = value: rule; nearest legal value'; looks whether paths exist."""
        return [*self._value_problems(), *self._path_problems()]

    def _value_problems(self) -> list[str]:
        problems = []
        formats = [str(known) for known in DocumentFormat]
        if self.document_format not in formats:
            nearest_format = difflib.get_close_matches(self.document_format, formats, n=1, cutoff=0.0)[0]
            problems.append(
                f"document_format = {self.document_format}: must be one of {', '.join(formats)}; "
                f"nearest legal {nearest_format}"
            )
        if not self.text_field:
            problems.append("text_field = '': must name a field; nearest legal text")
        if not 0 <= self.validation_ratio <= 0.5:
            nearest = 0 if not self.validation_ratio > 0 else 0.5
            problems.append(
                f"validation_ratio = {self.validation_ratio}: must be within 0 and 0.5; nearest legal {nearest}"
            )
        smallest = {
            "max_bytes": (self.max_bytes, 1),
            "max_document_bytes": (self.max_document_bytes, 1),
            "tokenizer_sample_bytes": (self.tokenizer_sample_bytes, 1),
            "vocab_size": (self.vocab_size, SMALLEST_VOCAB),
        }
        for name, (value, least) in smallest.items():
            if value is not None and value < least:
                problems.append(f"{name} = {value}: must be at least {least}; nearest legal {least}")
        if self.suffixes is not None and not (self.suffixes and all(self.suffixes)):
            problems.append(f"suffixes = {self.suffixes}: must list file name endings, none empty; e.g. [.py], or null")
        if self.add_bos is True and self.tokenizer_path is None:
            problems.append("add_bos = true: a tokenizer trained here has no begin-of-text token; nearest legal auto")
        return problems

    def _path_problems(self) -> list[str]:
        problems = []
        if not self.output_dir:
            problems.append("output_dir = '': must name a folder; e.g. runs/data")
        if not self.paths:
            problems.append(f"paths = []: must name a file or folder; nearest legal [{STDLIB}]")
        output = Path(self.output_dir).resolve()
        for configured in self.paths:
            path = resolve_path(configured)
            if not configured or not path.exists():
                problems.append(f"paths = {configured}: must exist; give a file, a folder or {STDLIB}")
            elif path.is_dir() and path.resolve() in [output, *output.parents]:
                problems.append(f"output_dir = {self.output_dir}: must lie outside the source {configured}")
        if self.tokenizer_path is not None and not (Path(self.tokenizer_path) / TOKENIZER_JSON).is_file():
            problems.append(
                f"tokenizer_path = {self.tokenizer_path}: must be a folder with {TOKENIZER_JSON}; "
                "null trains a tokenizer"
            )
        return problems

    def corpus(self) -> Corpus:
        """Return the part that says which documents are read."""
        return Corpus(
            paths=tuple(self.paths),
            document_format=DocumentFormat(self.document_format),
            text_field=self.text_field,
            suffixes=None if self.suffixes is None else tuple(self.suffixes),
            exclude_folders=None if self.exclude_folders is None else tuple(self.exclude_folders),
            max_bytes=self.max_bytes,
            max_document_bytes=self.max_document_bytes,
            skip_duplicates=self.skip_duplicates,
        )

    def settings(self) -> dict[str, Any]:
        """Return what decides the prepared content, as it stands in the manifest.

        A given tokenizer counts by its content; the settings of training one count only where one is trained.
        """
        settings: dict[str, Any] = {
            "document_format": self.document_format,
            "text_field": self.text_field,
            "suffixes": self.suffixes,
            "exclude_folders": None if self.exclude_folders is None else sorted(self.exclude_folders),
            "max_bytes": self.max_bytes,
            "max_document_bytes": self.max_document_bytes,
            "skip_duplicates": self.skip_duplicates,
            "validation_ratio": self.validation_ratio,
            "add_bos": self.add_bos,
            "parse_special_tokens": self.parse_special_tokens,
        }
        if self.tokenizer_path is None:
            trained = {"vocab_size": self.vocab_size, "tokenizer_sample_bytes": self.tokenizer_sample_bytes}
            return settings | trained
        return settings | {"tokenizer_fingerprint": tokenizer_fingerprint(Path(self.tokenizer_path))}
