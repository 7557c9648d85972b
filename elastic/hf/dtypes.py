"""Which number format each tensor of a folder has: one for the matrices, and the vectors that differ from it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from elastic.hf.names import PREFIX
from elastic.hf.safe_files import listed, shown
from elastic.hf.tensor_index import StoredTensor
from elastic.space.layers import FP32_PARAMETERS

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_BY_NAME = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_QUANTISED = ("F8_", "F6_", "F4", "I", "U", "BOOL")


class DtypeError(ValueError):
    """Number formats that this project does not read or write."""


@dataclass(frozen=True)
class DtypeRule:
    """The format of every tensor of a folder: `main`, except for vectors named by what follows `layers.i.`.

    Only fp32 and bf16 are known, the formats of this project's checkpoints. Raises DtypeError for others.
    """

    main: torch.dtype
    exceptions: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for dtype in (self.main, *self.exceptions.values()):
            if dtype not in _BY_NAME.values():
                raise DtypeError(f"number format {dtype} is not supported; use float32 or bfloat16")

    @classmethod
    def trained(cls, main: torch.dtype) -> "DtypeRule":
        """Return the rule of exports without a source: A_log and D in fp32.

        Training holds them in fp32 and inference engines compute with fp32; rounding them would only lose accuracy.
        """
        return cls(main, {} if main == torch.float32 else dict.fromkeys(FP32_PARAMETERS, torch.float32))

    def of(self, name: str) -> torch.dtype:
        """Return the format of a tensor given by its name in the file."""
        return self.exceptions.get(kind_of_tensor(name), self.main)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object from which `from_json` makes an equal value."""
        return {
            "main": str(self.main).removeprefix("torch."),
            "exceptions": {key: str(dtype).removeprefix("torch.") for key, dtype in self.exceptions.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "DtypeRule":
        """Undo `to_json`; raises DtypeError for another form or format."""
        try:
            exceptions = {str(key): _BY_NAME[name] for key, name in content["exceptions"].items()}
            return cls(_BY_NAME[content["main"]], exceptions)
        except (KeyError, TypeError, AttributeError) as error:
            raise DtypeError(f"number formats cannot be read: {shown(content)}") from error


def checked_dtypes(stored: Mapping[str, StoredTensor]) -> tuple[DtypeRule | None, list[str]]:
    """Return the rule that the tensors of a folder follow, or None, and every problem.

    All matrices must have one format, fp32 or bf16; vectors (norms, biases, A_log, D, dt_bias) may be fp32 beside
    bf16, each kind in all layers alike.
    """
    problems = _foreign_formats(stored)
    plain = {name: tensor for name, tensor in stored.items() if tensor.dtype in DTYPES}
    matrices = defaultdict(set)
    for name, tensor in plain.items():
        if len(tensor.size) > 1:
            matrices[tensor.dtype].add(name)
    if len(matrices) > 1:
        mixed = "; ".join(f"{dtype}: {listed(names, 2)}" for dtype, names in sorted(matrices.items()))
        problems.append(f"matrices have two number formats ({mixed}); save the model again in one")
    if problems or not matrices:
        return None, problems
    main = next(iter(matrices))
    kinds = defaultdict(set)
    for name, tensor in plain.items():
        kinds[kind_of_tensor(name)].add(tensor.dtype)
    for kind, formats in kinds.items():
        if len(formats) > 1:
            problems.append(f"{shown(kind)} is F32 in some layers, BF16 in others; save the model again in one format")
        elif main == "F32" and formats != {main}:
            problems.append(f"{shown(kind)} is BF16 beside matrices in F32; save the model again in one format")
    exceptions = {kind: DTYPES[dtype] for kind, formats in kinds.items() for dtype in formats if dtype != main}
    return (None if problems else DtypeRule(DTYPES[main], exceptions)), problems


def _foreign_formats(stored: Mapping[str, StoredTensor]) -> list[str]:
    foreign = defaultdict(set)
    for name, tensor in stored.items():
        if tensor.dtype not in DTYPES:
            foreign[tensor.dtype].add(name)
    return [
        f"{len(names)} tensors are {dtype} ({listed(names, 2)}), which {_remedy(dtype)}"
        for dtype, names in sorted(foreign.items())
    ]


def _remedy(dtype: str) -> str:
    if dtype == "F16":
        # Kept in bf16 they would lose bits, and checkpoints here are fp32 or bf16.
        return "checkpoints of this project cannot keep; load the model with dtype=torch.float32 and save it again"
    if dtype.startswith(_QUANTISED):
        return "is quantised; dequantise the folder to bf16 first"
    return "is not supported; save the model in F32 or BF16"


def kind_of_tensor(name: str) -> str:
    """Return what a tensor is in its layer, `mixer.A_log` for `backbone.layers.3.mixer.A_log`."""
    head, _, rest = name.removeprefix(PREFIX + "layers.").partition(".")
    return rest if head.isdigit() and name.startswith(PREFIX + "layers.") else name
