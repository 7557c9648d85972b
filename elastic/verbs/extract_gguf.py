"""Checks of an export by the engines that run it, and the part of the verb extract that writes GGUF files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import Tensor

from elastic.config.export import ExportConfig
from elastic.engines.check import ENGINES, LOGIT_BOUND, check_in_engine
from elastic.hf.card import CardInfo
from elastic.hf.export import CheckOutcome, ExportReport, FolderCheck
from elastic.hf.export_settings import ExportSettings
from elastic.hf.folder import HfFolder
from elastic.hf.gguf import export_gguf, gguf_bytes, gguf_check
from elastic.rank.slicing import submodel_source
from elastic.space.shape import ModelShape
from elastic.verbs.import_hf import transfer_progress
from elastic.verbs.members import Member, OpenCheckpoint

Reference = Callable[[Tensor], Tensor]


def also_in_engines(
    check: FolderCheck, export: ExportConfig, reference: Reference, rounded: Reference | None
) -> FolderCheck:
    """Return the check that runs a Hugging Face folder in the engines that read one, too, against `reference`, and
    against `rounded` logits where they round activations (engines/check.py).
    """
    engines = [name for name in export.engines if ENGINES[name].reads == "hf"]

    def checked(written: HfFolder, shape: ModelShape) -> CheckOutcome:
        outcome = check(written, shape)
        for name in engines:
            report = check_in_engine(name, written.path, shape.vocab, reference, rounded=rounded)
            outcome = _told(outcome, report.sentence)
        return outcome

    return checked


def export_member_gguf(
    opened: OpenCheckpoint,
    member: Member,
    folder: Path,
    card: CardInfo,
    carried: ExportSettings,
    export: ExportConfig,
    reference: Reference,
    console: Console,
) -> ExportReport:
    """Write one member's GGUF files, compare every value with the parent's, and run them in the engines that read them.

    `reference` are logits of the subnet with the checkpoint's own values. Files in other formats than f32 round
    otherwise, and llama.cpp computes with what they hold: there, tokens that differ are counted and not refused.
    """
    parent, lanes, stored = opened.space.parent, opened.space.lanes, opened.tensors()
    bar, kinds = transfer_progress(console), export.gguf_types

    def written(num_bytes: int, total: int) -> None:
        bar.update(writing, advance=num_bytes, total=total * len(kinds))

    def check(path: Path, kind: str, shape: ModelShape) -> CheckOutcome:
        """Compare a file; large ones take about as long to be read back as to be written."""
        task = bar.add_task(f"comparing {path.name}", total=gguf_bytes(shape, [kind]))
        outcome = gguf_check(
            path, stored, parent, member.subnet, lanes, shape, lambda num_bytes: bar.advance(task, num_bytes)
        )
        for name in export.engines:
            if ENGINES[name].reads == "gguf":
                bound = LOGIT_BOUND if kind == "f32" else None
                said = check_in_engine(name, path, shape.vocab, reference, bound).sentence
                outcome = _told(outcome, f"{path.name}: {said}")
        return outcome

    with bar:
        writing = bar.add_task(f"writing {member.name} as GGUF", total=None)
        return export_gguf(
            submodel_source(stored, parent, member.subnet, lanes),
            member.subnet.shape(parent),
            folder,
            card,
            carried,
            member.name,
            kinds,
            check,
            written,
        )


def _told(outcome: CheckOutcome, sentence: str) -> CheckOutcome:
    return replace(outcome, sentence=f"{outcome.sentence} {sentence}", engines=(*outcome.engines, sentence))
