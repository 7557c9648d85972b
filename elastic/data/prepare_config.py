"""Settings of data preparation and their rules."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from elastic.config.load import Problem, load_with_problems
from elastic.data.corpus import Corpus, DocumentFormat
from elastic.data.corpus_files import STDLIB, resolve_path
from elastic.data.tokenizer import SMALLEST_VOCAB, TOKENIZER_JSON, AddBos, tokenizer_fingerprint
from elastic.space.ranges import Bytes, Range, Required

MOST_TRAINED = 2**20  # the trainer takes memory for every token before it reads a text


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

    output_dir: Annotated[str, Required("for example runs/data")] = "runs/data"
    paths: Annotated[list[str], Range(low=1)] = field(default_factory=lambda: [STDLIB])
    document_format: DocumentFormat = DocumentFormat.TEXT
    text_field: Annotated[str, Required("for example text")] = "text"
    suffixes: Annotated[list[str], Range(low=1)] | None = None
    exclude_folders: list[str] | None = None
    max_bytes: Bytes | None = None
    max_document_bytes: Bytes = 16 << 20
    skip_duplicates: bool = True
    validation_ratio: Annotated[float, Range(0, 0.5)] = 0.05
    tokenizer_path: str | None = None
    vocab_size: Annotated[int, Range(SMALLEST_VOCAB, MOST_TRAINED)] = 8192
    tokenizer_sample_bytes: Bytes = 128 << 20
    add_bos: AddBos = "auto"
    parse_special_tokens: bool = False
    overwrite: bool = False

    def problems(self) -> tuple[Problem, ...]:
        """List every illegal setting, also of a config that no loader built; looks whether paths exist."""
        _, found = load_with_problems(PrepareConfig, asdict(self))
        return (*found, *self.rule_problems(frozenset(problem.section for problem in found)))

    def rule_problems(self, unreliable: frozenset[str]) -> Iterator[Problem]:
        """Yield what types do not say; fields in `unreliable` have a problem of their own."""
        if self.suffixes is not None and not all(self.suffixes):
            yield Problem("suffixes", self.suffixes, "must list file name endings, none empty", "e.g. [.py], or null")
        if self.add_bos is True and self.tokenizer_path is None:
            rule = "a tokenizer trained here has no begin-of-text token"
            yield Problem("add_bos", True, rule, "nearest legal value is auto")
        output = Path(self.output_dir).resolve()
        for configured in () if "paths" in unreliable else self.paths:
            path = resolve_path(configured)
            if not configured or not path.exists():
                yield Problem("paths", configured, "must exist", f"give a file, a folder or {STDLIB}")
            elif path.is_dir() and path.resolve() in [output, *output.parents] and "output_dir" not in unreliable:
                rule = f"must lie outside the source {configured}"
                yield Problem("output_dir", self.output_dir, rule, "choose a folder beside it")
        if self.tokenizer_path is not None and not (Path(self.tokenizer_path) / TOKENIZER_JSON).is_file():
            rule, remedy = f"must be a folder with {TOKENIZER_JSON}", "null trains a tokenizer"
            yield Problem("tokenizer_path", self.tokenizer_path, rule, remedy)

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
