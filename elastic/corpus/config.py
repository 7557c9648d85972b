"""Settings of data preparation and their rules."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from elastic.config.load import Problem, load_with_problems
from elastic.corpus.conversation import LossOn
from elastic.corpus.files import STDLIB, Corpus, resolve_path
from elastic.data.shards import WHOLE, Shard, parse_shard
from elastic.data.tokenizer import SMALLEST_VOCAB, TOKENIZER_JSON, AddBos, tokenizer_fingerprint
from elastic.space.ranges import Bytes, Range, Required
from elastic.world.files import sha256_of

WORKER_BYTES = 16 << 20  # to encode them takes ten times as long as to start a process
MOST_WORKERS = 1024
MOST_TRAINED = 2**20  # the trainer takes memory for every token before it reads a text


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(Corpus):
    """Say what to read (see Corpus), how to tokenize and split it, and where the prepared folder goes.

    validation_ratio: share of the documents, chosen by a hash of their content, that goes to validation.
    test_ratio: share that goes to a split that nothing reads but `recipes/evaluate.py data.split=test`; 0 makes none.
        What is held out for validation does not depend on it.
    tokenizer_path: folder of a tokenizer to use; None trains one of at most `vocab_size` tokens on a sample of
        `tokenizer_sample_bytes` of the training documents, spread over the corpus.
    add_bos: put the tokenizer's begin-of-text token in front of every document; `auto` does as the tokenizer does.
    parse_special_tokens: turn special tokens spelled out in the text into their ids, else into letters. Those that a
        chat template writes are ids in any case.
    chat_template: file of a Jinja template for chats; None takes the tokenizer's own. It goes along with the tokenizer.
    loss_on: which tokens of chats the loss counts: `response` (what the assistant says, the default), `last_response`
        (in its last turn) or `all`. Text has no mask.
    overwrite: replace a prepared folder that was made from something else.
    workers: how many processes make documents and ids; `auto` is one for each core, where there is enough to do. The
        result is the same.
    shard: `3/64` prepares the third of 64 equal shares, in a folder of its own within `output_dir`; together they are
        one prepared folder. Copies of a document are found within a shard. None prepares everything.
    """

    output_dir: Annotated[str, Required("for example runs/data")] = "runs/data"
    validation_ratio: Annotated[float, Range(0, 0.5)] = 0.05
    test_ratio: Annotated[float, Range(0, 0.4)] = 0.0
    tokenizer_path: str | None = None
    vocab_size: Annotated[int, Range(SMALLEST_VOCAB, MOST_TRAINED)] = 8192
    tokenizer_sample_bytes: Bytes = 128 << 20
    add_bos: AddBos = "auto"
    parse_special_tokens: bool = False
    chat_template: str | None = None
    loss_on: LossOn | None = None
    overwrite: bool = False
    workers: Annotated[str, Required("auto, or a number")] = "auto"
    shard: str | None = None

    @property
    def part(self) -> Shard:
        """Return which share of the corpus is prepared."""
        return (WHOLE if self.shard is None else parse_shard(self.shard)) or WHOLE

    @property
    def folder(self) -> Path:
        """Return the folder that is prepared."""
        together = Path(self.output_dir)
        return together if self.shard is None else together / self.part.folder_name

    def num_workers(self, total_bytes: int) -> int:
        """Return how many processes work on a corpus of so many bytes."""
        if self.workers != "auto":
            return int(self.workers)
        return max(1, min(len(os.sched_getaffinity(0)), total_bytes // self.part.of // WORKER_BYTES))

    @property
    def is_chat(self) -> bool:
        """Tell whether conversations are read."""
        return self.document_format == "chat"

    @property
    def counted_part(self) -> LossOn:
        """Return which tokens the loss counts."""
        return self.loss_on or ("response" if self.is_chat else "all")

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
        if self.is_chat and self.tokenizer_path is None:
            rule = "chats need a tokenizer whose special tokens their template writes"
            yield Problem("tokenizer_path", None, rule, "name the parent's folder")
        if self.is_chat and self.add_bos is True and "add_bos" not in unreliable:
            yield Problem("add_bos", True, "a chat begins as its template writes it", "nearest legal value is auto")
        for name in () if self.is_chat else ("chat_template", "loss_on"):
            if (value := asdict(self)[name]) is not None:
                yield Problem(name, value, "is for chats", "set document_format=chat, or null")
        yield from self._dealing_problems()
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            yield Problem("chat_template", self.chat_template, "must be a file", "null takes the tokenizer's own")
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

    def _dealing_problems(self) -> Iterator[Problem]:
        if self.workers != "auto" and not (self.workers.isdecimal() and 1 <= int(self.workers) <= MOST_WORKERS):
            rule = f"must be auto, or a number of processes from 1 to {MOST_WORKERS}"
            yield Problem("workers", self.workers, rule, "nearest legal value is auto")
        if self.shard is None:
            return
        if parse_shard(self.shard) is None:
            yield Problem(
                "shard", self.shard, "must be a number, from 1, of how many: 3/64", "null prepares everything"
            )
        if self.tokenizer_path is None:
            rule = "shards are encoded with one tokenizer, which cannot be trained on one of them"
            yield Problem("tokenizer_path", None, rule, "name one, for example that of data prepared with max_bytes")
        if self.max_bytes is not None:
            rule = "a shard does not know how many bytes stand before it"
            yield Problem("max_bytes", self.max_bytes, rule, "null takes everything, or leave shard out")

    def settings(self) -> dict[str, Any]:
        """Return what decides the prepared content, as it stands in the manifest.

        A given tokenizer counts by its content; the settings of training one count only where one is trained.
        """
        elsewhere = {
            "output_dir",
            "paths",
            "overwrite",
            "tokenizer_path",
            "workers",
            *(("shard",) if self.shard is None else ()),
            *(() if self.test_ratio else ("test_ratio",)),  # as in folders from before there was one
        }  # paths stand in the description of the source
        if self.tokenizer_path is not None:
            elsewhere |= {"vocab_size", "tokenizer_sample_bytes"}
        elsewhere |= {"text_field"} if self.is_chat else {"chat_template", "loss_on"}
        settings = {name: value for name, value in asdict(self).items() if name not in elsewhere}
        if self.exclude_folders is not None:
            settings["exclude_folders"] = sorted(self.exclude_folders)
        if self.shard is not None:
            settings["shard"] = f"{self.part.number}/{self.part.of}"
        if self.is_chat:
            settings["loss_on"] = self.counted_part
        if self.is_chat and self.chat_template is not None:
            settings["chat_template"] = sha256_of(Path(self.chat_template))
        if self.tokenizer_path is not None:
            settings["tokenizer_fingerprint"] = tokenizer_fingerprint(Path(self.tokenizer_path))
        return settings
