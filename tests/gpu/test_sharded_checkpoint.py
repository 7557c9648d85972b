"""A bf16 run on a GPU, with and without the distributed optimizer, overlapped or not, goes on from its checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic.model.backends import ADAM, missing_parts

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 6
MODEL = dict(
    pattern="M-*-M", vocab=320, hidden=128, ffn=256, mamba_heads=8, head_channels=32, mamba_groups=2,
    mamba_state=32, attention_heads=4, kv_heads=2, attention_channels=32,
)  # fmt: skip
# A process of its own: it joins NCCL as a run under no launcher does.
PRETRAIN = """
import json, sys
from rich.console import Console
from elastic.config.verbs import PretrainConfig
from elastic.config.load import load
from elastic.verbs.training import run_training
run_training(load(PretrainConfig, json.loads(sys.argv[1])), Console(quiet=True))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("psutil", "tensorboard", "tokenizers"):
        pytest.importorskip(package, reason=f"a run needs {package}, which is not installed")
    from recipes._tiny_family import prepare_corpus
    from tests.distributed.training import write_corpus

    folder = tmp_path_factory.mktemp("sharded")
    write_corpus(folder / "corpus")
    prepare_corpus(folder)
    return folder


def pretrain(folder: Path, version: str, optim: dict[str, bool], **trainer: Any) -> list[float]:
    """Train in bf16, or go on; return the cross-entropy of every step so far."""
    values = dict(
        model=MODEL,
        data=dict(path=str(folder / "data"), micro_batch=2, validation_sequences=4),
        optim=optim,
        trainer=dict(precision="bf16", log_every_n_steps=1, checkpoint_every_n_steps=3, **trainer),
        curriculum=[dict(name="pretrain", sequence_length=128, global_batch=4, steps=STEPS, lr=dict(peak=1e-2))],
        exp_manager=dict(exp_dir=str(folder), name="run", version=version),
    )
    command = [sys.executable, "-c", PRETRAIN, json.dumps(values)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=600)
    rows = map(json.loads, (folder / "run" / version / "metrics.jsonl").read_text().splitlines())
    return [row["train/parent/cross_entropy"] for row in rows if "train/parent/cross_entropy" in row]


SHARDED = dict(use_distributed_optimizer=True)
OVERLAPPED = SHARDED | dict(overlap_grad_reduce=True, overlap_param_gather=True)


@pytest.mark.parametrize("optim", [{}, SHARDED, OVERLAPPED], ids=["adam", "adam_sharded", "adam_sharded_overlapped"])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(folder: Path, optim: dict[str, bool]) -> None:
    """Kernels add with atomics, so not to the last digit; a state in the wrong place is far off."""
    if optim and ADAM in dict(missing_parts()):
        pytest.skip("states are sharded by the fused Adam of Transformer Engine or apex: neither is installed")
    name = "_".join(optim)
    whole = pretrain(folder, f"whole_{name}", optim)
    pretrain(folder, f"stopped_{name}", optim, max_steps=3)
    resumed = pretrain(folder, f"stopped_{name}", optim)
    assert len(whole) == len(resumed) == STEPS and whole[-1] < whole[0]
    assert resumed == pytest.approx(whole, rel=1e-2)
