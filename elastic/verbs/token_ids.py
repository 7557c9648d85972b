"""Configs and prepared data: token ids that the model's vocabulary holds, of the tokenizer that it was trained on."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from elastic.checkpoint.record import Record
from elastic.config.load import Problem
from elastic.config.serving import EvaluateConfig
from elastic.config.training import ElasticConfig, PretrainConfig, TrainConfig
from elastic.data.manifest import DataError, Manifest, read_manifest
from elastic.data.tokenizer import TOKENIZER_JSON
from elastic.hf.export_settings import EXPORT_SETTINGS_FOLDER


def vocab_problems(config: object) -> Iterator[Problem]:
    """Yield a problem if model.vocab has no row for some token of the prepared data."""
    if not isinstance(config, TrainConfig) or config.model.vocab is None or not config.data.path:
        return
    manifest = _manifest(config.data.path)
    if manifest is not None and config.model.vocab < manifest.tokenizer.vocab_size:
        tokens = manifest.tokenizer.vocab_size
        rule = f"must be at least the {tokens:,} tokens of the data in {config.data.path}"
        remedy = f"nearest legal value is {config.model.padded_vocab(tokens)}, null takes it from the data"
        yield Problem("model.vocab", config.model.vocab, rule, remedy)


def validation_problems(config: object) -> Iterator[Problem]:
    """Yield a problem if the held-out split is too short for the sequences that a run evaluates on, of any length."""
    if not isinstance(config, PretrainConfig | ElasticConfig | EvaluateConfig):
        return
    manifest = _manifest(config.data.path)
    if manifest is None or "validation" not in manifest.splits:  # opening it reports that
        return
    if isinstance(config, EvaluateConfig):
        lengths = {"sequence_length": config.sequence_length}
    else:
        lengths = {f"phase {phase.name}": phase.sequence_length for phase in config.curriculum}
    split, wanted = manifest.splits["validation"], config.data.validation_sequences
    for where, length in lengths.items():
        available = split.num_sequences(length)
        if wanted > available:
            rule = f"{where}: the held-out split has {available:,} sequences of {length:,} tokens"
            remedy = (
                f"nearest legal value is {available}"
                if available
                else "prepare the data with a larger validation_ratio"
            )
            yield Problem("data.validation_sequences", wanted, rule, remedy)
            return


def tokenizer_problems(data: str | None, checkpoint: Path, record: Record) -> Iterator[Problem]:
    """Yield a problem if the prepared data in `data` is of another tokenizer than the checkpoint was trained on.

    That is the one an imported parent brought along, else the one of the data it was trained on. Where neither is
    there any more, only the size of the vocabulary is compared.
    """
    manifest = None if data is None else _manifest(data)
    if data is None or manifest is None:
        return
    if record.shape.vocab < manifest.tokenizer.vocab_size:
        rule = (
            f"its {manifest.tokenizer.vocab_size:,} tokens do not fit in the vocabulary of the checkpoint = "
            f"{record.shape.vocab:,}"
        )
        yield Problem("data.path", data, rule, _remedy(_trained_tokenizer(checkpoint, record)))
        return
    trained = _trained_tokenizer(checkpoint, record)
    if trained is not None and not _is_same(trained, Path(data), manifest):
        rule = f"is of another tokenizer than the checkpoint, which was trained with {trained}"
        yield Problem("data.path", data, rule, _remedy(trained))


def _manifest(data: str) -> Manifest | None:
    """Return what a prepared folder says; None where it says nothing, which opening it reports."""
    try:
        return read_manifest(Path(data))
    except DataError:
        return None


def _trained_tokenizer(checkpoint: Path, record: Record) -> Path | None:
    """Return the tokenizer.json a checkpoint was trained with, None if it is not there any more."""
    folders = [checkpoint / EXPORT_SETTINGS_FOLDER, *([] if record.data is None else [Path(record.data)])]
    return next((folder / TOKENIZER_JSON for folder in folders if (folder / TOKENIZER_JSON).is_file()), None)


def _is_same(trained: Path, data: Path, manifest: Manifest) -> bool:
    """Tell whether the data has the tokenizer in `trained`: the same file, or one of the same tokens under its ids."""
    if hashlib.sha256(trained.read_bytes()).hexdigest() == manifest.tokenizer.sha256:
        return True
    try:
        own, other = (Tokenizer.from_file(str(path)) for path in (data / TOKENIZER_JSON, trained))
    except Exception:  # the library raises nothing narrower; a damaged or absent file is reported when it is opened
        return False
    return bool(own.get_vocab(with_added_tokens=True) == other.get_vocab(with_added_tokens=True))


def _remedy(trained: Path | None) -> str:
    folder = "the folder of the checkpoint's tokenizer" if trained is None else trained.parent
    return f"prepare the text with tokenizer_path={folder}"
