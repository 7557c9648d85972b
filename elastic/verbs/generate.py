"""The verb generate: text from one resident copy of the weights, at any budget, or with one budget to think and another
to answer.

Prompts are answered in batches of like lengths.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers.decoders import DecodeStream

from elastic.checkpoint.find import resolve_checkpoint
from elastic.checkpoint.record import Record
from elastic.config.load import Problem
from elastic.config.rules_layout import layout_problems
from elastic.config.verbs import GenerateConfig
from elastic.data.manifest import DataError
from elastic.data.tokenizer import LoadedTokenizer, load_tokenizer
from elastic.generate.batch import End, Part
from elastic.generate.sampling import Sampling
from elastic.generate.text import Generation, Marker, ThinkPlan, batches_by_length, generate_batch
from elastic.hf.export_settings import ExportSettingsError, HfSettings, read_export_settings
from elastic.hf.folder import HfFolder, HfFolderError, open_hf_folder
from elastic.hf.names import from_hf
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel, build_model
from elastic.model.sharding import shard_tensor
from elastic.run.world import run_world
from elastic.space.cost import subnet_cost
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.verbs.members import members_problems, open_checkpoint, subnet_summary
from elastic.verbs.prompts import Prompt, prompt_problems, read_prompts
from elastic.verbs.report_file import check_output, write_output
from elastic.verbs.text import TOKENIZER_REMEDY, served_tokenizer_problems, text_settings
from elastic.world.files import first_few
from elastic.world.groups import Layout, World

WHOLE = "whole model"
# A model may write anything; a terminal must not obey it. Taken away on the screen only.
CONTROL_CODES = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class Served:
    """One resident model, the subnets that write by name, and how its text is read and ended."""

    source: str
    model: ElasticModel
    subnets: dict[str, Subnet]
    tokenizer: LoadedTokenizer
    tokenizer_folder: Path
    eos_ids: frozenset[int]
    suppressed: tuple[int, ...] = ()

    @property
    def shape(self) -> ModelShape:
        """Return the sizes of the whole model."""
        return self.model.decoder.masks.space.parent

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text, special tokens too; an id that only fills up the vocabulary is nothing."""
        text: str = self.tokenizer.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def run_generate(config: GenerateConfig, console: Console) -> list[dict[str, Any]]:
    """Write on from every prompt, to the console; returns what `output` holds of each text, if it is given.

    A text that is alone in its batch is shown as it comes, those of a larger one when all of them are there, so that
    they do not stand mixed; a bar counts their tokens meanwhile. Nothing but that file is written, so a call needs no
    name of its own. Raises OutputError if it exists.
    """
    check_output(config)
    with run_world(config) as here:
        served = open_served(config, here, console)
        prompts = read_prompts(config, served.tokenizer, served.tokenizer_folder)
        rows: dict[int, dict[str, Any]] = {}
        for numbers in batches_by_length([len(prompt.tokens) for prompt in prompts], config.batch_size):
            for number, text in _written(config, served, prompts, numbers, console if here.is_main else None):
                rows[number] = _row(config, served, prompts[number], text)
                if here.is_main:
                    console.print(_summary(rows[number]), style="dim", markup=False, highlight=False)
        texts = [rows[number] for number in range(len(prompts))]
        if here.is_main:
            write_output(config, {"config": asdict(config), "source": served.source, "texts": texts}, console)
    return texts


def _written(
    config: GenerateConfig, served: Served, prompts: Sequence[Prompt], numbers: Sequence[int], console: Console | None
) -> Iterator[tuple[int, Generation]]:
    """Write the texts of one batch and yield each, by the prompt's number, once the console has shown it."""

    def heading(number: int) -> None:
        if console is not None:
            tokens = len(prompts[number].tokens)
            console.rule(f"prompt {number + 1} of {len(prompts)}, {tokens} tokens", align="left")
            console.out(prompts[number].text, style="bold", end="", highlight=False)

    drawn = (config.temperature, config.top_k, config.top_p, config.seed)
    samplings = [Sampling(*drawn, number, suppressed=served.suppressed) for number in numbers]
    given = [prompts[number].tokens for number in numbers]
    is_alone, shown = len(numbers) == 1, [] if console is None else [_shown(served, console) for _ in numbers]
    if is_alone:
        heading(numbers[0])
    plan, ends = _plan(config, served), served.eos_ids
    with _counted(numbers, config, console) if not is_alone and console is not None else nullcontext() as count:
        live = shown if is_alone and shown else None if count is None else [count] * len(numbers)
        texts = generate_batch(served.model, plan, given, samplings, config.max_new_tokens, ends, live)
    for index, (number, text) in enumerate(zip(numbers, texts, strict=True)):
        if console is not None:
            if not is_alone:
                heading(number)
                for token in text.tokens:
                    shown[index](token)
            console.out("")
        yield number, text


@contextmanager
def _counted(numbers: Sequence[int], config: GenerateConfig, console: Console) -> Iterator[Callable[[int], None]]:
    """Say which prompts are answered together, and give what counts their tokens on a bar while they come."""
    each = config.max_new_tokens + (0 if config.think is None else config.max_think_tokens)
    named = ", ".join(first_few([str(number + 1) for number in sorted(numbers)], 8))
    console.print(f"prompts {named} are answered together, and shown when all are there", style="dim", highlight=False)
    columns = BarColumn(), TextColumn("{task.completed} tokens of at most {task.total}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("writing", total=each * len(numbers))
        yield lambda token: bar.advance(task)


def open_served(config: GenerateConfig, here: World, console: Console) -> Served:
    """Load the checkpoint or the folder, and find the subnets that `config` names."""
    if config.folder is not None:
        folder, source, named = open_hf_folder(Path(config.folder)), config.folder, dict[str, Subnet]()
        model = load_hf_model(folder, here.layout)
        text: tuple[HfSettings, Path | None] = (folder.exports.settings, folder.path)
    else:
        opened = open_checkpoint(config.init_from, _budgets(config), config.subnets, world=here, say=console.print)
        model, source = opened.load_model(here.layout), str(opened.checkpoint)
        named = {member.name: member.subnet for member in opened.members}
        text = own_text(config.tokenizer, opened.checkpoint, opened.record)
    settings, path = text[0], config.tokenizer or text[1]
    assert path is not None, "generate_problems lets nothing without a tokenizer through"
    tokenizer = load_tokenizer(Path(path), parse_special_tokens=True)
    whole = Subnet.full(model.decoder.masks.space.parent)
    ends = settings.end_tokens() or frozenset((tokenizer.eos_id,))
    suppressed = tuple((settings.generation or {}).get("suppress_tokens") or ())
    return Served(source, model.eval(), {WHOLE: whole, **named}, tokenizer, Path(path), ends, suppressed)


def own_text(tokenizer: str | None, checkpoint: Path, record: Record) -> tuple[HfSettings, Path | None]:
    """Return settings and tokenizer folder of a checkpoint; a tokenizer that is given keeps only what it carries."""
    if tokenizer is None:
        return text_settings(checkpoint, record)
    carried = read_export_settings(checkpoint)
    return HfSettings(eos_token_id=None) if carried is None else carried.settings, None


@torch.no_grad()
def load_hf_model(source: HfFolder, layout: Layout) -> ElasticModel:
    """Build a model of the folder's sizes, with nothing to choose, and read this rank's part tensor by tensor.

    Raises HfTensorError; no code in the folder is run.
    """
    model = build_model(Space(source.shape, {}, lanes=1), layout, seed=None)
    parameters, tp = dict(named_global_parameters(model)), model.pg_collection.tp
    for name, tensor in from_hf(source.tensors, source.shape):
        if name in parameters:  # other pipeline stages hold the rest
            parameters[name].copy_(shard_tensor(tensor, name, source.shape, tp.rank(), tp.size()))
    return model


def _budgets(config: GenerateConfig) -> list[str]:
    """Return the budgets that write, beside the subnets given by hand."""
    by_hand = {given.name for given in config.subnets}
    return [name for name in (config.budget, config.think, config.answer) if name is not None and name not in by_hand]


def generate_problems(config: GenerateConfig) -> Iterator[Problem]:
    """Yield a problem for a folder that cannot be opened, weights that cannot be split, unknown names, a tokenizer that
    does not fit; checkpoints can be opened (`source_problems`).
    """
    source, folder = config.init_from, config.folder
    if (source.checkpoint is None) == (folder is None):
        return  # the rules between fields say so
    own: Path | None = None if folder is None else Path(folder)
    if folder is not None:
        try:
            shape, lanes, field = open_hf_folder(Path(folder)).shape, 1, "folder"
        except HfFolderError as error:
            yield Problem("folder", folder, str(error), "give a folder that recipes/extract.py wrote")
            return
    else:
        assert source.checkpoint is not None
        checkpoint = resolve_checkpoint(source.checkpoint)
        record = Record.read(checkpoint)
        shape, lanes, field = record.shape, record.lanes, "init_from.checkpoint"
        try:
            own = own_text(config.tokenizer, checkpoint, record)[1]
        except (DataError, ExportSettingsError) as error:
            yield Problem("tokenizer", None, str(error), TOKENIZER_REMEDY)
            return
    yield from layout_problems(shape, config.parallel, lanes if lanes > 1 else None)
    if folder is None:
        yield from _writer_problems(config)
    if found := tuple(served_tokenizer_problems(config.tokenizer, own, field, shape)):
        yield from found
    else:
        yield from prompt_problems(config, Path(str(config.tokenizer or own)))


def _writer_problems(config: GenerateConfig) -> Iterator[Problem]:
    """Names must be known, and subnets given by hand must fit."""
    source = config.init_from
    family = Record.read(resolve_checkpoint(source.router or source.checkpoint or "")).family
    budgets = [] if family is None else [budget.name for budget in family.budgets]
    known = [*budgets, *(given.name for given in config.subnets)]
    for field, name in (("budget", config.budget), ("think", config.think), ("answer", config.answer)):
        if name is not None and not known:
            remedy = f"set {field}=null, or describe it in subnets"
            yield Problem(field, name, f"{source.checkpoint} has no router and subnets is empty", remedy)
        elif name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            yield Problem(field, name, f"must be one of {', '.join(known)}", f"nearest legal name is {near}")
    yield from members_problems(source, [name for name in _budgets(config) if name in budgets], config.subnets)


def _plan(config: GenerateConfig, served: Served) -> Subnet | ThinkPlan:
    think, answer = config.think, config.answer
    if think is None or answer is None:
        return served.subnets[config.budget or WHOLE]
    ids = served.tokenizer.tokenizer.encode(config.marker, add_special_tokens=False).ids
    marker = Marker(config.marker, tuple(ids), served.decode)
    return ThinkPlan(served.subnets[think], served.subnets[answer], marker, config.max_think_tokens)


def _shown(served: Served, console: Console) -> Callable[[int], None]:
    """Return what prints tokens as they come; letters that are spread over several tokens wait for the last one."""
    stream = DecodeStream(skip_special_tokens=False)

    def show(token: int) -> None:
        piece = None if token in served.eos_ids else stream.step(served.tokenizer.tokenizer, token)
        if piece:
            console.out(piece.translate(CONTROL_CODES), end="", highlight=False)

    return show


def _row(config: GenerateConfig, served: Served, prompt: Prompt, text: Generation) -> dict[str, Any]:
    names = [config.budget or WHOLE] if config.think is None else [config.think, config.answer]
    spoken = text.tokens[:-1] if text.end is End.EOS else text.tokens
    return {
        "prompt": prompt.text,
        "text": served.decode(spoken),
        "answer": None if text.switch is None else served.decode(spoken[text.switch :]),
        "prompt_tokens": prompt.tokens,
        "tokens": list(text.tokens),
        "end": str(text.end),
        "switch": text.switch,
        "forced_marker": text.forced_marker,
        "parts": [_part(str(name), part, served.shape) for name, part in zip(names, text.parts, strict=False)],
    }


def _part(name: str, part: Part, parent: ModelShape) -> dict[str, Any]:
    return {
        "name": name,
        "params": subnet_cost(parent, part.subnet).params,
        "subnet": subnet_summary(part.subnet),
        "read_tokens": part.read_tokens,
        "read_tokens_per_s": part.read_tokens / part.read_s if part.read_tokens else None,
        "new_tokens": part.new_tokens,
        "steps": part.steps,
        "steps_per_s": part.steps / part.step_s if part.steps else None,
    }


def _summary(row: dict[str, Any]) -> str:
    def speed(value: float | None) -> str:
        return "-" if value is None else f"{value:,.1f}/s"

    parts = [
        f"{part['name']}: read {part['read_tokens']} tokens ({speed(part['read_tokens_per_s'])}), "
        f"wrote {part['new_tokens']} ({speed(part['steps_per_s'])})"
        for part in row["parts"]
    ]
    forced = ["marker forced"] if row["forced_marker"] else []
    return "; ".join([*parts, *forced, f"ended by {row['end']}"])
