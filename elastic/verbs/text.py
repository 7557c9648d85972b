"""Configs, checkpoints and prepared data: whose tokenizer, token ids that the model holds, sequences that are there."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from elastic.blend.foreign import foreign_prefixes, tokenizer_record
from elastic.blend.sources import TrainingData, open_held_out, open_sources, tokenizer_folder
from elastic.checkpoint.record import Record
from elastic.config.load import Problem
from elastic.config.sections import PreparedData
from elastic.config.verbs import (
    ElasticConfig,
    EvaluateConfig,
    HeldOutConfig,
    ImportanceConfig,
    PretrainConfig,
    TrainConfig,
)
from elastic.data.held_out import HeldOut
from elastic.data.manifest import DataError, Manifest, TokenizerRecord, holds_chats, read_manifest
from elastic.data.pieces import Pieces
from elastic.data.tokenizer import TOKENIZER_JSON, load_tokenizer, same_tokenizer
from elastic.data.tokens import LONGER, num_packable, open_split
from elastic.hf.export_settings import EXPORT_SETTINGS_FOLDER, HfSettings, read_export_settings
from elastic.hf.tokenizer_files import special_tokens
from elastic.router.phases import Phase
from elastic.run.resume import goes_on
from elastic.space.shape import ModelShape

TOKENIZER_REMEDY = "set tokenizer=FOLDER, one with a tokenizer.json"
LONGEST = "longest sequence trained, tokens"  # in the provenance of a record


def vocab_problems(config: object) -> Iterator[Problem]:
    """Yield a problem if model.vocab has no row for some token of the prepared data."""
    if not isinstance(config, TrainConfig) or config.model.vocab is None or not (config.data.path or config.data.blend):
        return
    folder = tokenizer_folder(config.data)
    tokenizer = _tokenizer(folder)
    if tokenizer is not None and config.model.vocab < (tokens := tokenizer.vocab_size):
        rule = f"must be at least the {tokens:,} tokens of the data in {folder}"
        remedy = f"nearest legal value is {config.model.padded_vocab(tokens)}, null takes it from the data"
        yield Problem("model.vocab", config.model.vocab, rule, remedy)


def length_problems(config: object) -> Iterator[Problem]:
    """Yield a problem for sequences that a split of the prepared data is too short for."""
    match config:  # what a problem calls a sequence, its field, its length
        case PretrainConfig() | ElasticConfig():
            lengths = [
                (f"phase {phase.name}", f"curriculum.{index}.sequence_length", phase.sequence_length)
                for index, phase in enumerate(config.curriculum)
            ]
        case HeldOutConfig():
            lengths = [("sequence_length", "sequence_length", config.sequence_length)]
        case ImportanceConfig():
            lengths = [("calibration", "importance.sequence_length", config.importance.sequence_length)]
        case _:
            return
    try:
        if config.data.blend:
            yield from _blend_too_short(config, lengths)
        elif not config.data.path:
            return  # a rule says so
        elif foreign_prefixes(Path(config.data.path)):
            remedy = f"set data.blend='[{{path: {config.data.path}, weight: 1, tokenizer: FOLDER}}]' instead"
            yield Problem("data.path", config.data.path, "holds .bin and .idx of another tool", remedy)
            return
        else:
            yield from _too_short(config, lengths, read_manifest(Path(config.data.path)))
        if "stop" in {config.data.on_end, *(source.on_end for source in config.data.blend)}:
            if isinstance(config, ImportanceConfig):
                length, batch = config.importance.sequence_length, config.importance.num_sequences
                phase = Phase(name="calibration", sequence_length=length, global_batch=batch, steps=1)
                yield from TrainingData(_sampled(config.data), [phase], config.seed).end_problems(1)
            elif isinstance(config, TrainConfig) and not goes_on(config.exp_manager):  # else run/resume.py judges
                data = TrainingData(_sampled(config.data), config.curriculum, config.seed)
                yield from data.end_problems(config.trainer.max_steps or data.curriculum.total_steps)
    except DataError as error:
        field, value = ("data.blend", list(config.data.names)) if config.data.blend else ("data.path", config.data.path)
        yield Problem(field, value, str(error), "or give another folder")


def _sampled(data: PreparedData) -> PreparedData:
    """Return the section without its full look at the contents, which the run takes when it opens them."""
    return replace(data, verify="sampled") if data.verify == "full" else data


def _blend_too_short(
    config: TrainConfig | HeldOutConfig | ImportanceConfig, lengths: Sequence[tuple[str, str, int]]
) -> Iterator[Problem]:
    """Every source must have a sequence of every length, and one of them something held out."""
    data, paths = _sampled(config.data), {name: index for index, name in enumerate(config.data.names)}
    for name, stream in () if isinstance(config, HeldOutConfig) else open_sources(data, "train").items():
        for where, _, length in lengths:
            isolated = stream.packing == "isolated"
            if isolated and num_packable(stream.bounds(), length, stream.long_documents):
                continue
            if isolated or length >= stream.num_tokens:
                rule = (
                    f"{where}: no document of it fits"
                    if isolated
                    else f"{where}: it holds {stream.num_tokens:,} tokens"
                )
                remedy = LONGER if isolated else f"nearest legal length is {max(1, stream.num_tokens - 1)}"
                index, what = paths[name], "into a sequence" if isolated else f"and a sequence takes {length + 1:,}"
                yield Problem(
                    f"data.blend.{index}.path", data.blend[index].path, f"{rule} {what}", f"{remedy}; or take it out"
                )
    if not isinstance(config, ImportanceConfig):
        held_out = open_sources(data, split := _held_out_split(config))
        for where, _, length in lengths:
            if not len(open_held_out(data, held_out, length)):
                rule = f"{where}: no source has a held-out sequence of {length:,} tokens"
                yield Problem("data.blend", list(held_out), rule, f"prepare with a larger {split}_ratio")


def _held_out_split(config: object) -> str:
    return config.data.split if isinstance(config, EvaluateConfig) else "validation"


def _too_short(
    config: TrainConfig | HeldOutConfig | ImportanceConfig, lengths: Sequence[tuple[str, str, int]], manifest: Manifest
) -> Iterator[Problem]:
    splits, held_out = manifest.splits, _held_out_split(config)
    isolated = (config.data.packing or manifest.packing) == "isolated"
    if "train" in splits and not isinstance(config, HeldOutConfig):
        tokens = splits["train"].num_tokens
        for _, field, length in lengths:
            train = Path(config.data.path) / "train"
            bounds = Pieces(train, manifest, checks=False).bounds() if isolated else None
            if bounds is not None and not num_packable(bounds, length, config.data.long_documents):
                rule = f"no document in the training split of {config.data.path} fits into a sequence"
                yield Problem(field, length, rule, LONGER)
            elif not isolated and length >= tokens:
                rule = f"the training split of {config.data.path} holds {tokens:,} tokens, and a sequence needs one "
                remedy = f"nearest legal value is {max(1, tokens - 1)}"
                yield Problem(field, length, f"{rule}more than its length", remedy)
    if held_out in splits and not isinstance(config, ImportanceConfig):
        wanted, what = config.data.validation_sequences, "held-out" if held_out == "validation" else held_out
        for where, _, length in lengths:
            available = splits[held_out].num_sequences(length)
            if isolated:
                available = len(HeldOut(open_split(_sampled(config.data), held_out), length))
            if wanted > available:
                rule = f"{where}: the {what} split has {available:,} sequences of {length:,} tokens"
                larger = f"prepare the data with a larger {held_out}_ratio"
                remedy = f"nearest legal value is {available}" if available else larger
                yield Problem("data.validation_sequences", wanted, rule, remedy)
                return


def tokenizer_problems(field: str, data: str | None, checkpoint: Path, record: Record) -> Iterator[Problem]:
    """Yield a problem if the data whose tokenizer is in `data` is of another one than the checkpoint was trained on.

    That is the one an imported parent brought along, else the one of the data it was trained on. Where neither is
    there any more, only the size of the vocabulary is compared.
    """
    tokenizer = None if data is None else _tokenizer(Path(data))
    if data is None or tokenizer is None:
        return
    trained, tokens = _trained_tokenizer(checkpoint, record), tokenizer.vocab_size
    folder = "the folder of the checkpoint's tokenizer" if trained is None else trained.parent
    remedy = f"prepare the text with tokenizer_path={folder}"
    if record.shape.vocab < tokens:
        rule = f"its {tokens:,} tokens do not fit in the vocabulary of the checkpoint = {record.shape.vocab:,}"
        yield Problem(field, data, rule, remedy)
    elif trained is not None and not same_tokenizer(trained.parent, Path(data)):
        rule = f"is of another tokenizer than the checkpoint, which was trained with {trained}"
        yield Problem(field, data, rule, remedy)


def _tokenizer(folder: Path) -> TokenizerRecord | None:
    """Return what a folder of data says of its tokenizer; None where it says nothing, which opening it reports."""
    try:
        return tokenizer_record(folder)
    except DataError:
        return None


def _trained_tokenizer(checkpoint: Path, record: Record) -> Path | None:
    """Return the tokenizer.json a checkpoint was trained with, None if it is not there any more."""
    folders = [checkpoint / EXPORT_SETTINGS_FOLDER, *([] if record.data is None else [Path(record.data)])]
    return next((folder / TOKENIZER_JSON for folder in folders if (folder / TOKENIZER_JSON).is_file()), None)


def text_settings(checkpoint: Path, record: Record, data: str | None = None) -> tuple[HfSettings, Path | None]:
    """Return the settings of a checkpoint's exports and the folder of its tokenizer (None: it has none).

    An imported parent's settings stay what they were, but for a longer sequence if it was trained on one. The tokenizer
    is that of prepared data which the user names, else, for its chat template, of the chats the model was trained on,
    else the one an imported parent brought along, else that of other data the model was trained on. Raises DataError,
    UnsafeFileError or ExportSettingsError for damage.
    """
    carried, trained = read_export_settings(checkpoint), int(record.provenance.get(LONGEST, 0))
    brought = carried is not None and carried.tokenizer_folder is not None
    if data is None and record.data is not None and (not brought or holds_chats(Path(record.data))):
        data = record.data
    if carried is not None:
        longest = max(trained, carried.settings.max_position_embeddings)
        settings = replace(carried.settings, max_position_embeddings=longest)
        return settings, carried.tokenizer_folder if data is None else Path(data)
    if data is None:
        return HfSettings(), None
    tokenizer, named = tokenizer_record(Path(data)), special_tokens(Path(data))
    made_here = HfSettings(
        bos_token_id=next(iter(tokenizer.bos_ids), None) if named["bos"] is None else named["bos"],
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id if named["pad"] is None else named["pad"],
        max_position_embeddings=trained or HfSettings().max_position_embeddings,
    )
    # Rows that only fill the vocabulary up were trained and are counted: they stay, and are never generated.
    if fillers := list(range(tokenizer.vocab_size, record.shape.vocab)):
        known = {key: value for key, value in made_here.token_ids().items() if value is not None}
        made_here = replace(made_here, generation={**known, "suppress_tokens": fillers})
    return made_here, Path(data)


def served_tokenizer_problems(given: str | None, own: Path | None, field: str, shape: ModelShape) -> Iterator[Problem]:
    """There must be a tokenizer, with no more tokens than the model of `field` has rows."""
    path = given or own
    if path is None:
        rule = f"{field} neither carries a tokenizer nor says what data it was trained on"
        yield Problem("tokenizer", None, rule, TOKENIZER_REMEDY)
        return
    try:
        tokens = load_tokenizer(Path(path)).vocab_size
    except DataError as error:
        yield Problem("tokenizer", given, str(error), TOKENIZER_REMEDY)
        return
    if tokens > shape.vocab:
        rule = f"has {tokens} tokens, the model of {field} has {shape.vocab} rows"
        yield Problem("tokenizer", str(path), rule, "give the tokenizer the model was trained with")
