"""What the verb extract writes."""

from dataclasses import dataclass
from typing import Annotated, Literal

from elastic.space import ranges
from elastic.space.ranges import Range

Check = Literal["auto", "logits", "values", "transformers", "mlx", "llama_cpp", "vllm"]
_OWN_CHECKS = ("auto", "logits", "values")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What extract writes, and how it is checked when it is finished.

    `format` fp8 writes the matrices of a Hugging Face folder's layers in E4M3, the rest in bf16; gguf writes files for
    llama.cpp beside the folder, one for each of `gguf_types`. `precision` null keeps the number format of the
    checkpoint. `check` names one of auto, logits and values, and any engines: auto compares logits where the subnet and
    the reloaded folder fit in memory, and every stored value with the parent's where they do not; an engine runs the
    export in an environment of its own, against the subnet's tokens and logits.
    """

    hugging_face: bool = True
    format: Literal["hf", "fp8", "gguf"] = "hf"
    gguf_types: Annotated[tuple[Literal["f32", "f16", "bf16", "q8_0"], ...], Range(low=1)] = ("f16",)
    megatron: bool = False
    precision: Literal["fp32", "bf16"] | None = None
    shard_bytes: ranges.Bytes = 5_000_000_000
    check: Annotated[tuple[Check, ...], Range(low=1)] = ("auto",)
    max_logit_difference: ranges.Weight = 1e-4

    def written_for(self, engine: str) -> bool:
        """Tell whether what an engine reads is written."""
        if engine == "llama_cpp":
            return self.format == "gguf"
        return self.hugging_face and (engine == "vllm" or not self.in_fp8)

    @property
    def engines(self) -> tuple[str, ...]:
        """Return the engines among the checks."""
        return tuple(name for name in self.check if name not in _OWN_CHECKS)

    @property
    def own_checks(self) -> tuple[str, ...]:
        """Return the other checks; auto if there is none."""
        return tuple(name for name in self.check if name in _OWN_CHECKS) or ("auto",)

    @property
    def in_fp8(self) -> bool:
        """Tell whether a Hugging Face folder is written with matrices in FP8."""
        return self.hugging_face and self.format == "fp8"
