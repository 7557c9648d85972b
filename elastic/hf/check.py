"""The check at the end of an export: the folder's logits against the subnet's, or every value against the parent's."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from elastic.hf.config import ExportError, export_shape
from elastic.hf.folder import HfFolder
from elastic.hf.nested_values import NestedValueError, check_values, nested_origins
from elastic.hf.reload import LogitDifference, probe_tokens, reload_logits
from elastic.rank.slicing import TensorSource, reader
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape, Subnet


class Verification(StrEnum):
    """How an export was checked."""

    LOGITS = "logits of the reloaded folder against the subnet's"
    VALUES = "every stored value against the parent's at its nested index"


@dataclass(frozen=True)
class CheckOutcome:
    """What a check found: the largest logit difference, absolute and relative, or the number of values compared."""

    verification: Verification
    max_abs_logit_diff: float | None = None
    relative: float | None = None
    num_values: int | None = None

    def __str__(self) -> str:
        if self.verification is Verification.VALUES:
            return (
                f"All {self.num_values:,} stored values were read back and compared with the parent's values at their "
                f"nested index; logits were not compared."
            )
        return (
            f"The folder was reloaded with stock transformers on the CPU in fp32 and its logits compared with the "
            f"elastic model's: largest difference {self.max_abs_logit_diff:.2e}, relative {self.relative:.2e}."
        )


class FolderCheck(Protocol):
    """Judges a folder that has been written but not yet put in its place."""

    def __call__(self, written: HfFolder, shape: ModelShape) -> CheckOutcome:
        """Check the folder of a model of `shape`; raises ExportError if it is not what was meant to be written."""


@dataclass(frozen=True)
class LogitCheck:
    """Reload the folder in stock transformers; its logits must equal `reference_logits` [B, S] -> [B, S, V].

    `tolerance` is relative to the largest logit. Needs memory for the reloaded model in fp32.
    """

    reference_logits: Callable[[Tensor], Tensor]
    tolerance: float = 1e-4

    def __call__(self, written: HfFolder, shape: ModelShape) -> CheckOutcome:
        """Compare on the fixed probe tokens."""
        tokens, expected = probe_tokens(shape.vocab), shape_cost(shape).stored_params
        reloaded = reload_logits(written.path, tokens)
        if reloaded.params != expected:
            raise ExportError(f"the reloaded model has {reloaded.params} parameters, expected {expected}")
        difference = LogitDifference.between(reloaded.logits, self.reference_logits(tokens)[..., : shape.vocab])
        if not difference.within(self.tolerance):
            raise ExportError(
                f"logits of the reloaded folder differ by {difference.max_abs:.3e} (relative "
                f"{difference.relative:.3e}, tolerance {self.tolerance:.1e}); nothing was written"
            )
        return CheckOutcome(Verification.LOGITS, difference.max_abs, difference.relative)


@dataclass(frozen=True)
class ValueCheck:
    """Compare every value of the folder with the parent's tensors, one tensor in memory at a time."""

    parent_tensors: TensorSource
    parent: ModelShape
    subnet: Subnet
    lanes: int

    def __call__(self, written: HfFolder, shape: ModelShape) -> CheckOutcome:
        """Compare all tensors."""
        origins = nested_origins(self.parent, self.subnet, self.lanes, export_shape(shape))
        try:
            count = check_values(written.tensors.__getitem__, reader(self.parent_tensors), origins)
        except NestedValueError as error:
            raise ExportError(f"{error}; nothing was written") from error
        return CheckOutcome(Verification.VALUES, num_values=count)
