"""What the verb extract writes."""

from dataclasses import dataclass
from typing import Literal

from elastic.space import ranges


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What extract writes, and how a finished folder is checked.

    `format` fp8 writes the matrices of a Hugging Face folder's layers in E4M3, the rest in bf16. `precision` null keeps
    the number format of the checkpoint. `check` auto compares logits where the subnet and the reloaded folder fit in
    memory, and every stored value with the parent's where they do not.
    """

    hugging_face: bool = True
    format: Literal["hf", "fp8"] = "hf"
    megatron: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    shard_bytes: ranges.Bytes = 5_000_000_000
    check: Literal["auto", "logits", "values"] = "auto"
    max_logit_difference: ranges.Weight = 1e-4

    @property
    def in_fp8(self) -> bool:
        """Tell whether a Hugging Face folder is written with matrices in FP8."""
        return self.hugging_face and self.format == "fp8"
