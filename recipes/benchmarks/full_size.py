"""The 12B imported and a 6B extracted at full size, each beside a plain copy of the same files: time, MB/s, memory."""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from elastic.space.shape import ModelShape
from recipes.benchmarks.conversion import WIDTHS, measured, random_folder

PATTERN = "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"
LEFT_OUT = (*range(20, 26), *range(31, 37))
SUBNET = (
    "{{name: cut, hidden: 4096, ffn: [15360], mamba_heads: [96], head_channels: 64, attention_heads: [24], "
    "kept_layers: {kept}}}"
)


def copied(source: Path, target: Path) -> dict[str, float]:
    """Copy a folder with cp, wait until it is on the disk, and remove the copy; returns the seconds."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return {"seconds": seconds}


def run(where: Path | None = None, pattern: str = PATTERN) -> list[dict[str, Any]]:
    """Measure under `where` (default: the folder for temporary files), which takes 75 GB; nothing is left there."""
    rows = []

    def add(what: str, num_bytes: int, figures: dict[str, float]) -> None:
        rows.append({"what": what, "gb": num_bytes / 1e9, "mb_per_s": num_bytes / 1e6 / figures["seconds"], **figures})

    with tempfile.TemporaryDirectory(dir=where) as scratch:
        run = [f"exp_manager.exp_dir={scratch}", "exp_manager.name=run"]
        stock, copy, cut = Path(scratch, "stock"), Path(scratch, "copy"), Path(scratch, "run", "cut", "cut")
        size = random_folder(stock, ModelShape.uniform(pattern, **WIDTHS))
        add("plain copy of the 12B", size, copied(stock, copy))
        add("import_hf", size, measured("import_hf", [f"source={stock}", *run, "exp_manager.version=parent"]))
        shutil.rmtree(stock)
        kept = [layer for layer in range(len(pattern)) if layer not in LEFT_OUT]
        chosen = [f"subnets=[{SUBNET.format(kept=kept)}]", "budget_names=[]", "export.check=values"]
        parent = f"init_from.checkpoint={scratch}/run/parent"
        extracted = measured("extract", [parent, *chosen, *run, "exp_manager.version=cut"])
        size = sum(file.stat().st_size for file in cut.glob("*.safetensors"))
        add("extract", size, extracted)
        add("plain copy of the 6B", size, copied(cut, copy))
    return rows
