"""Sections that name the checkpoints a verb starts from, and subnets inside them."""

from dataclasses import dataclass
from typing import Annotated, Any

from elastic.config.sections import Verification
from elastic.space import ranges
from elastic.space.axes import AXES
from elastic.space.ranges import Range, Required
from elastic.space.shape import ModelShape, Subnet

Checkpoint = Annotated[str, Required("a run folder of an earlier verb, or one checkpoint in it")]
Widths = Annotated[tuple[ranges.Size, ...], Range(low=1)]


@dataclass(frozen=True, kw_only=True)
class CheckpointInput:
    """A checkpoint that is read, and how closely it is looked at first: all checksums, or sizes (and small files)."""

    verify: Verification = "full"


@dataclass(frozen=True, kw_only=True)
class ParentInput(CheckpointInput):
    """The parent to score."""

    parent: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class SubnetConfig:
    """A subnet given by hand. Null is full; one width serves all layers, several go layer by layer.

    `params` instead of widths asks for a subnet of so many parameters, between the budgets next to it.
    """

    name: ranges.MemberName
    params: ranges.Params | None = None
    hidden: ranges.Size | None = None
    ffn: Widths | None = None
    mamba_heads: Widths | None = None
    head_channels: ranges.Heads | None = None
    attention_heads: Widths | None = None
    kept_layers: Annotated[tuple[ranges.Layers, ...], Range(low=1)] | None = None

    def subnet(self, parent: ModelShape) -> Subnet:
        """Return the subnet inside `parent`; raises SubnetError if it does not fit."""
        widths: dict[str, Any] = {}
        for entry in AXES.values():
            full, chosen = getattr(parent, entry.size), getattr(self, entry.size)
            one_for_all = entry.own and chosen is not None and len(chosen) == 1
            widths[entry.size] = full if chosen is None else chosen * len(full) if one_for_all else chosen
        subnet = Subnet(kept_layers=self.kept_layers or tuple(range(len(parent.pattern))), **widths)
        subnet.shape(parent)
        return subnet


@dataclass(frozen=True, kw_only=True)
class OptionalParentInput(CheckpointInput):
    """The permuted parent whose depth ranking says which layers leave (no weight is read); null: the last ones.

    `family`: a trained one that the run goes on from, weights and router. A budget that has the name of one of
    `subnets`, or of an entry of the file they name, starts with that as the router's choice.
    """

    permuted_parent: str | None = None
    family: str | None = None
    subnets: tuple[SubnetConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PermutedParentInput(OptionalParentInput):
    """The permuted parent: the teacher, and where the student starts. Its record carries lanes and depth ranking."""

    permuted_parent: Checkpoint = ""


@dataclass(frozen=True, kw_only=True)
class ServedInput(CheckpointInput):
    """Weights to run, and whose router decides the budgets (null: the router saved beside the weights).

    Weights of the permuted parent with the router of a family show what cutting without training costs.
    """

    checkpoint: str | None = None
    router: str | None = None


@dataclass(frozen=True, kw_only=True)
class MembersInput(ServedInput):
    """The same, where nothing else can be run."""

    checkpoint: Checkpoint = ""
