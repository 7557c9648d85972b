"""The verb generate: text from one resident copy of the weights, at any budget, or with one budget to think and another
to answer.

Prompts are answered one after another.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers.decoders import DecodeStream

from elastic.config.serving import GenerateConfig
from elastic.data.manifest import DataError
from elastic.data.tokenizer import LoadedTokenizer, load_tokenizer
from elastic.generate.sampling import Sampling
from elastic.generate.text import End, Generation, Limits, Marker, Part, ThinkPlan, generate, ignore
from elastic.hf.config import HfSettings
from elastic.hf.export_settings import read_export_settings
from elastic.hf.folder import open_hf_folder
from elastic.model.model import ElasticModel
from elastic.run.folder import open_run_folder
from elastic.space.subnet import Subnet
from elastic.verbs.evaluate import subnet_summary
from elastic.verbs.family import open_family
from elastic.verbs.generate_inputs import tokenizer_path
from elastic.verbs.hf_model import load_hf_model
from elastic.verbs.text_settings import text_settings
from elastic.world.files import write_json
from elastic.world.groups import World, model_layout, world

GENERATION_FILE = "generation.json"
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
    eos_ids: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Turn a prompt into tokens as stock transformers does: special tokens are read, and added if it adds any."""
        ids = self.tokenizer.encode_prompt(text)
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Turn tokens into text, special tokens too; an id that only fills up the vocabulary is nothing."""
        text: str = self.tokenizer.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text


def run_generate(config: GenerateConfig, console: Console) -> Path:
    """Write on from every prompt, to the console as it comes and to generation.json; returns the run folder."""
    prompts = list(config.prompts)
    if config.prompt_file is not None:
        prompts.append(_read(Path(config.prompt_file)))
    with world(model_layout(config.parallel, config.trainer), config.trainer.collective_timeout_s) as here:
        folder, _ = open_run_folder(config.exp_manager, asdict(config), here)
        served = open_served(config, here, console)
        limits, rows = Limits(config.max_new_tokens, served.eos_ids), []
        for number, prompt in enumerate(prompts):
            tokens = served.encode(prompt)
            sampling = Sampling(config.temperature, config.top_k, config.top_p, config.seed, text=number)
            if here.is_main:
                console.rule(f"prompt {number + 1} of {len(prompts)}, {len(tokens)} tokens", align="left")
                console.out(prompt, style="bold", end="", highlight=False)
            show = _shown(served, console) if here.is_main else ignore
            text = generate(served.model, _plan(config, served), tokens, sampling, limits, show)
            rows.append(_row(config, served, prompt, tokens, text))
            if here.is_main:
                console.out("")
                console.print(_summary(rows[-1]), style="dim", markup=False, highlight=False)
        if here.is_main:
            write_json(folder / GENERATION_FILE, {"source": served.source, "texts": rows})
    return folder


def open_served(config: GenerateConfig, here: World, console: Console) -> Served:
    """Load the checkpoint or the folder, and find the subnets that `config` names."""
    if config.folder is not None:
        settings = open_hf_folder(Path(config.folder)).settings
        model = load_hf_model(Path(config.folder), here.layout)
        named: dict[str, Subnet] = {}
        source, own = config.folder, None
    else:
        wanted = [name for name in (config.budget, config.think, config.answer) if name is not None]
        by_hand = [given for given in config.subnets if given.name in wanted]
        budgets = [name for name in wanted if name not in {given.name for given in by_hand}]
        assert config.init_from.checkpoint is not None, "config_rules lets exactly one source through"
        family = open_family(
            config.init_from.checkpoint,
            config.init_from.router,
            budgets,
            by_hand,
            full=config.init_from.verify == "full",
            world=here,
            say=console.print,
        )
        model, named = family.load_model(here.layout), {member.name: member.subnet for member in family.members}
        source = str(family.checkpoint)
        settings, tokenizer_folder = HfSettings(eos_token_id=None), None
        if config.tokenizer is None:
            settings, tokenizer_folder = text_settings(family.checkpoint, family.record)
        elif (carried := read_export_settings(family.checkpoint)) is not None:
            settings = carried.settings
        own = None if tokenizer_folder is None else str(tokenizer_folder)
    path = tokenizer_path(config, own)
    assert path is not None, "generate_files lets nothing without a tokenizer through"
    tokenizer = load_tokenizer(Path(path), parse_special_tokens=True)
    whole = Subnet.full(model.decoder.masks.space.parent)
    ends = settings.end_tokens() or frozenset((tokenizer.eos_id,))
    return Served(source, model.eval(), {WHOLE: whole, **named}, tokenizer, ends)


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


def _row(
    config: GenerateConfig, served: Served, prompt: str, prompt_tokens: list[int], text: Generation
) -> dict[str, Any]:
    names = [config.budget or WHOLE] if config.think is None else [config.think, config.answer]
    spoken = text.tokens[:-1] if text.end is End.EOS else text.tokens
    return {
        "prompt": prompt,
        "text": served.decode(spoken),
        "answer": None if text.switch is None else served.decode(spoken[text.switch :]),
        "prompt_tokens": prompt_tokens,
        "tokens": list(text.tokens),
        "end": str(text.end),
        "switch": text.switch,
        "forced_marker": text.forced_marker,
        "parts": [_part(str(name), part) for name, part in zip(names, text.parts, strict=False)],
    }


def _part(name: str, part: Part) -> dict[str, Any]:
    return {
        "name": name,
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


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt_file = {path}: cannot be read as UTF-8 text ({error})") from error
    if not text:
        raise DataError(f"prompt_file = {path}: is empty; give a text to go on from")
    return text
