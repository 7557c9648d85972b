"""Memory of serving at the widths of the 12B parent: the parent alone, three budgets from one copy, three models.

Each case answers one prompt per budget in a process of its own. What counts is the peak of the resident memory while
answering, beyond what the process held before the weights came.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from elastic.generate.sampling import Sampling
from elastic.generate.text import generate
from elastic.model.model import ElasticModel, build_model
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import Space
from elastic.world.groups import Layout, world
from recipes.benchmarks.conversion import GIB, PATTERNS, ROOT, WIDTHS
from recipes.benchmarks.memory import resident_bytes

PARENT = ModelShape.uniform(PATTERNS[8], **WIDTHS)
LANES = 8
# About the widths of 12B, 9B and 6B, with one and two of the eight layers left out.
CUTS: tuple[dict[str, Any], ...] = (
    {},
    dict(hidden=4480, ffn=17408, mamba_heads=112, attention_heads=32, kept_layers=(0, 1, 2, 3, 4, 6, 7)),
    dict(hidden=4096, ffn=15360, mamba_heads=96, head_channels=64, attention_heads=24, kept_layers=(0, 1, 3, 4, 6, 7)),
)
CASES = ("parent", "family", "models")
PROMPT, NEW_TOKENS = tuple(range(64)), 8


def run() -> list[dict[str, Any]]:
    """Run every case; returns memory in GiB and as a ratio to the parent alone."""
    rows: list[dict[str, Any]] = []
    for case in CASES:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "recipes.benchmarks.serving", case]
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"what": case, "gib": float(answer.stdout.split()[-1])})
    return [row | {"ratio": row["gib"] / rows[0]["gib"]} for row in rows]


def subnets() -> list[Subnet]:
    """Return the three budgets as subnets of the parent, the same width in every layer."""
    full = vars(Subnet.full(PARENT))
    found = []
    for cut in CUTS:
        per_layer = {name: (cut[name],) * len(full[name]) for name in ("ffn", "mamba_heads", "attention_heads") if cut}
        found.append(Subnet(**(full | cut | per_layer)))
    return found


def serve(case: str) -> float:
    """Serve one case in this process; returns GiB."""
    chosen = subnets()
    with world(Layout()):
        before = resident_bytes("VmRSS")
        if case == "models":
            served = [(_model(shape), Subnet.full(shape)) for shape in (subnet.shape(PARENT) for subnet in chosen)]
        else:
            parent = _model(PARENT)
            served = [(parent, subnet) for subnet in (chosen[:1] if case == "parent" else chosen)]
        # Filling the weights took more memory than serving them does: forget that peak.
        Path("/proc/self/clear_refs").write_text("5")
        for model, subnet in served:
            generate(model, subnet, PROMPT, Sampling(), NEW_TOKENS)
        return (resident_bytes("VmHWM") - before) / GIB


@torch.no_grad()
def _model(shape: ModelShape) -> ElasticModel:
    model = build_model(Space(shape, {}, lanes=LANES), Layout(dtype=torch.bfloat16), seed=None).eval()
    for parameter in model.parameters():  # drawing billions of them takes longer than all the rest
        parameter.fill_(0.01)
    return model


if __name__ == "__main__":
    print(serve(sys.argv[1]))
