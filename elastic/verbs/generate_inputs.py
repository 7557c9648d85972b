"""What recipes/generate.py finds in the files it is given, checked before any process group starts."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from elastic.checkpoint.record import Record, RecordError
from elastic.config.load import Problem
from elastic.config.rules_layout import layout_problems, nearest_multiple
from elastic.config.serving import GenerateConfig
from elastic.data.manifest import DataError
from elastic.data.tokenizer import load_tokenizer
from elastic.space.shape import ModelShape, ShapeError
from elastic.space.subnet import SubnetError


@dataclass(frozen=True)
class _Source:
    """What a checkpoint or a folder says about itself: where it is given, sizes, lanes, budgets, its tokenizer."""

    field: str
    path: str
    shape: ModelShape
    lanes: int
    budgets: tuple[str, ...]
    tokenizer: str | None


def generate_problems(config: GenerateConfig) -> Iterator[Problem]:
    """Yield a problem for weights that cannot be opened or split, an unknown budget, a tokenizer that does not fit."""
    if (config.init_from.checkpoint is None) == (config.folder is None):
        return  # the rules between fields say so
    source = _source(config)
    if isinstance(source, Problem):
        yield source
        return
    yield from layout_problems(source.shape, config.parallel, source.lanes if source.lanes > 1 else None)
    yield from _writer_problems(config, source)
    yield from _tokenizer_problems(config, source)


def tokenizer_path(config: GenerateConfig, own: str | None) -> str | None:
    """Return the folder of the tokenizer: the config's, else the Hugging Face folder, else the checkpoint's own."""
    return config.tokenizer or config.folder or own


def _source(config: GenerateConfig) -> _Source | Problem:
    # Megatron-Core takes seconds to import, and a wrong config should not wait for it.
    from elastic.checkpoint.contents import CheckpointError
    from elastic.checkpoint.find import resolve_checkpoint
    from elastic.hf.export_settings import ExportSettingsError
    from elastic.hf.folder import HfFolderError, open_hf_folder
    from elastic.verbs.text_settings import text_settings

    if config.folder is not None:
        try:
            shape = open_hf_folder(Path(config.folder)).shape
        except HfFolderError as error:
            return Problem("folder", config.folder, str(error), "give a folder that recipes/extract.py wrote")
        return _Source("folder", config.folder, shape, 1, (), None)
    opened: dict[str, tuple[Path, Record]] = {}
    for name, path in (("checkpoint", config.init_from.checkpoint), ("router", config.init_from.router)):
        if path is None:
            continue
        try:
            folder = resolve_checkpoint(path)
            opened[name] = (folder, Record.read(folder))
        except (CheckpointError, RecordError) as error:
            remedy = "give a run folder of an earlier verb, or one checkpoint in it"
            return Problem(f"init_from.{name}", path, str(error), remedy)
    folder, record = opened["checkpoint"]
    _, chooser = opened.get("router", opened["checkpoint"])
    budgets = () if chooser.family is None else tuple(budget.name for budget in chooser.family.budgets)
    path = str(config.init_from.checkpoint)
    try:
        tokenizer = None if config.tokenizer is not None else text_settings(folder, record)[1]
    except (DataError, ExportSettingsError) as error:
        return Problem("tokenizer", None, str(error), "set tokenizer=FOLDER, one with a tokenizer.json")
    own = None if tokenizer is None else str(tokenizer)
    return _Source("init_from.checkpoint", path, record.shape, record.lanes, budgets, own)


def _writer_problems(config: GenerateConfig, source: _Source) -> Iterator[Problem]:
    """Names must be known, and subnets given by hand must fit."""
    by_hand = [given.name for given in config.subnets]
    known = [*source.budgets, *by_hand]
    for field, name in (("budget", config.budget), ("think", config.think), ("answer", config.answer)):
        if name is None or name in known or config.folder is not None:
            continue
        if not known:
            remedy = f"set {field}=null, or describe it in subnets"
            yield Problem(field, name, f"{source.path} has no router and subnets is empty", remedy)
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield Problem(field, name, f"must be one of {', '.join(known)}", f"nearest legal name is {near}")
    for index, given in enumerate(config.subnets):
        try:
            widths = given.subnet(source.shape).ffn
        except (SubnetError, ShapeError) as error:
            yield Problem(f"subnets.{index}", given.name, str(error), "a width that is left out stays full")
            continue
        if any(width % source.lanes for width in widths):
            rule = f"widths must be multiples of the lanes = {source.lanes}"
            remedy = f"nearest legal is {_nearest(widths, source.lanes)}"
            yield Problem(f"subnets.{index}.ffn", list(given.ffn), rule, remedy)


def _nearest(widths: tuple[int, ...], lanes: int) -> list[int]:
    return sorted({nearest_multiple(width, lanes) for width in widths}, reverse=True)


def _tokenizer_problems(config: GenerateConfig, source: _Source) -> Iterator[Problem]:
    """There must be a tokenizer, with no more tokens than the model has rows."""
    path = tokenizer_path(config, source.tokenizer)
    if path is None:
        rule = f"{source.path} neither carries a tokenizer nor says what data it was trained on"
        yield Problem("tokenizer", None, rule, "set tokenizer=FOLDER, one with a tokenizer.json")
        return
    try:
        tokens = load_tokenizer(Path(path)).vocab_size
    except DataError as error:
        yield Problem("tokenizer", config.tokenizer, str(error), "set tokenizer=FOLDER, one with a tokenizer.json")
        return
    if tokens > source.shape.vocab:
        rule = f"has {tokens} tokens, the model of {source.field} has {source.shape.vocab} rows"
        yield Problem("tokenizer", path, rule, "give the tokenizer the model was trained with")
