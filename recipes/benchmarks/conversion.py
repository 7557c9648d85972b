"""Import and extract at the widths of the 12B parent: peak memory must not grow with the number of layers."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.hf.config import hf_config
from elastic.hf.export_settings import DtypeRule, HfSettings
from elastic.hf.names import hf_sizes
from elastic.hf.tensor_files import planned, write_tensors
from elastic.space.shape import ModelShape
from recipes.benchmarks.memory import peak_resident_bytes

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = {4: "M-*-", 8: "M-M*-M-M"}
WIDTHS = dict(
    vocab=131072, hidden=5120, ffn=20480, mamba_heads=128, head_channels=80, mamba_groups=8, mamba_state=128,
    conv_kernel=4, attention_heads=40, kv_heads=8, attention_channels=128,
)  # fmt: skip
# A cut along every width, about that of the 6B: hidden, FFN, Mamba heads and query heads.
SUBNET = "{name: cut, hidden: 4096, ffn: [12800], mamba_heads: [112], attention_heads: [32]}"
GIB = 2**30


def random_folder(folder: Path, shape: ModelShape) -> int:
    """Write a stock folder of random bf16 weights, a million over and over, tensor by tensor; returns its bytes."""
    rule, drawn = DtypeRule(torch.bfloat16), torch.empty(2**20).normal_(0.0, 0.02)
    plan = {name: planned(size, rule.of(name)) for name, size in hf_sizes(shape).items()}

    def values() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in plan.items():
            size = tensor.numel()
            yield name, drawn.to(tensor.dtype).repeat(-(-size // len(drawn)))[:size].view(tensor.shape)

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf_config(shape, HfSettings(), torch.bfloat16)))
    return write_tensors(folder, plan, values(), 5_000_000_000)


def measured(verb: str, arguments: Sequence[str]) -> dict[str, float]:
    """Run one verb in a process of its own; returns its wall seconds and the peak of its resident memory in GiB."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / f"{verb}.py"), *arguments]
    started = time.perf_counter()
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    peak = peak_resident_bytes(child)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} left with code {child.returncode}")
    return {"seconds": time.perf_counter() - started, "peak_gib": peak / GIB}


def run(where: Path | None = None) -> list[dict[str, Any]]:
    """Import, cut and delete a model of 4 and of 8 layers under `where` (default: the folder for temporary files)."""
    rows = []
    for num_layers, pattern in PATTERNS.items():
        with tempfile.TemporaryDirectory(dir=where) as scratch:
            run = [f"exp_manager.exp_dir={scratch}", "exp_manager.name=run"]
            source = Path(scratch) / "stock"
            size = random_folder(source, ModelShape.uniform(pattern, **WIDTHS))
            imported = measured("import_hf", [f"source={source}", *run, "exp_manager.version=parent"])
            cut = measured(
                "extract",
                [
                    f"init_from.checkpoint={scratch}/run/parent",
                    f"subnets=[{SUBNET}]",
                    "budget_names=[]",
                    "export.check=values",
                    *run,
                    "exp_manager.version=cut",
                ],
            )
        rows += [
            {"what": what, "num_layers": num_layers, "folder_gib": size / GIB, **figures}
            for what, figures in (("import_hf", imported), ("extract", cut))
        ]
    return rows
