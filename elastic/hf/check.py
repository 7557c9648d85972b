"""The check at the end of an export: the folder's logits against the subnet's, or every value against the parent's."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor

from elastic.hf.config import ExportError, export_shape
from elastic.hf.folder import HfFolder
from elastic.hf.nested_values import check_values, nested_origins
from elastic.hf.reload import logit_difference, probe_tokens, reload_logits
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


# Judges the folder of a model of a shape when it has been written but is not yet in its place; raises ExportError.
FolderCheck = Callable[[HfFolder, ModelShape], CheckOutcome]


def logit_check(reference_logits: Callable[[Tensor], Tensor], tolerance: float = 1e-4) -> FolderCheck:
    """Return the check that reloads in stock transformers: logits must equal `reference_logits` [B, S] -> [B, S, V].

    `tolerance` is relative to the largest logit of the probe. Needs memory for the reloaded model in fp32.
    """

    def check(written: HfFolder, shape: ModelShape) -> CheckOutcome:
        tokens, expected = probe_tokens(shape.vocab), shape_cost(shape).stored_params
        logits, params = reload_logits(written.path, tokens)
        if params != expected:
            raise ExportError(f"the reloaded model has {params} parameters, expected {expected}")
        max_abs, relative = logit_difference(logits, reference_logits(tokens)[..., : shape.vocab])
        if not relative <= tolerance:  # NaN never is
            raise ExportError(
                f"logits of the reloaded folder differ by {max_abs:.3e} (relative {relative:.3e}, tolerance "
                f"{tolerance:.1e}); nothing was written"
            )
        return CheckOutcome(Verification.LOGITS, max_abs, relative)

    return check


def value_check(parent_tensors: TensorSource, parent: ModelShape, subnet: Subnet, lanes: int) -> FolderCheck:
    """Return the check that compares every value with the parent's tensors, one tensor in memory at a time."""

    def check(written: HfFolder, shape: ModelShape) -> CheckOutcome:
        origins = nested_origins(parent, subnet, lanes, export_shape(shape))
        count = check_values(written.tensors.__getitem__, reader(parent_tensors), origins)
        return CheckOutcome(Verification.VALUES, num_values=count)

    return check
