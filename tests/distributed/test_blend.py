"""A run on several sources: loss by source, the same at any layout, and gone on with after new weights."""

import json
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from elastic.blend.shares import Shares
from elastic.config.load import load
from elastic.config.verbs import PretrainConfig
from elastic.data.tokens import TokenStream
from elastic.verbs.training import run_training
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.distributed.training import MODEL, place, rows

NAMES = ("foreign", "own")


def pretrain(values):
    run_training(load(PretrainConfig, values), Console(quiet=True))


PHASES = [
    dict(name="one", sequence_length=32, global_batch=8, steps=2, lr=dict(peak=3e-3)),
    dict(name="two", sequence_length=64, global_batch=4, steps=3, lr=dict(peak=3e-3),
         blend_weights=dict(foreign=2, own=1)),
]  # fmt: skip


def values(start, version, weights, **manager):
    pair = dict(path=str(start / "pair"), tokenizer=str(start / "data"), name="foreign", validation=str(start / "pair"))
    own = dict(path=str(start / "data"), name="own")
    blend = [entry | dict(weight=weight) for entry, weight in zip((pair, own), weights, strict=True)]
    return dict(
        model=MODEL, data=dict(blend=blend, micro_batch=2, validation_sequences=8),
        trainer=dict(log_every_n_steps=1, val_check_interval=100, checkpoint_every_n_steps=4),
        curriculum=[dict(name="one", sequence_length=32, global_batch=8, steps=8, lr=dict(peak=3e-3))],
        exp_manager=place(start, version) | manager,
    )  # fmt: skip


@pytest.fixture(scope="module")
def blended(start):
    """Write pairs beside the prepared data, and train on both with one replica."""
    tokens = TokenStream(start / "data" / "train").read(0, 4000).numpy()
    writer = IndexedDatasetBuilder(f"{start / 'pair'}.bin", np.uint16)
    writer.add_document(tokens[::-1].copy(), [len(tokens)])
    writer.finalize(f"{start / 'pair'}.idx")
    run_distributed(pretrain, 1, values(start, "blend1", (0.3, 0.7)))
    return rows(start, "blend1")


def test_the_loss_of_a_step_is_the_mean_of_its_sources_in_their_numbers(blended):
    shares = Shares((0.3, 0.7))
    for step in range(1, 9):
        row, counts = blended[step], np.subtract(shares.counts(8 * step), shares.counts(8 * step - 8))
        by_source = [row.get(f"train/parent/cross_entropy/{name}") for name in NAMES]
        mean = sum(count * loss for count, loss in zip(counts, by_source, strict=True) if count) / 8
        assert mean == pytest.approx(row["train/parent/cross_entropy"], rel=1e-6)
        assert row["epochs/foreign"] == pytest.approx(shares.counts(8 * step)[0] / (3999 // 32))
    assert {f"validation/parent/loss/{name}" for name in NAMES} <= blended[8].keys()


def test_two_replicas_and_an_interruption_change_nothing_and_new_weights_hold_from_there_on(start, blended):
    first = values(start, "blend2", (3, 7))
    first["trainer"]["max_steps"] = 4
    run_distributed(pretrain, 2, first)
    with pytest.raises(DistributedRunError, match=r'data\.blend = "foreign 0\.9, own 0\.1", .* has "foreign 0\.3'):
        run_distributed(pretrain, 1, values(start, "blend2", (9, 1)))
    run_distributed(pretrain, 2, values(start, "blend2", (9, 1), accept_changes=["data.blend"]))
    found = rows(start, "blend2")
    for step in range(1, 5):
        for name in ("train/parent/cross_entropy", *(f"train/parent/cross_entropy/{name}" for name in NAMES)):
            assert found[step].get(name) == pytest.approx(blended[step].get(name), rel=1e-5)
    length = (TokenStream(start / "data" / "train").num_tokens - 1) // 32
    own = [found[step]["epochs/own"] * length for step in range(4, 9)]
    before = Shares((0.3, 0.7)).counts(32)[1]
    assert own == pytest.approx([before + Shares((0.9, 0.1)).counts(8 * n)[1] for n in range(5)])
    state = json.loads((Path(start) / "run/blend2/checkpoints/step_00000008/state.json").read_text())
    assert state["origin"]["blend"] == dict(
        phase=0, sample=32, consumed=dict(foreign=32 - before, own=before), before=[]
    )


def test_other_weights_of_a_second_phase_read_the_same_at_tp2_pp2_and_cp2_and_over_an_interruption_in_it(
    start, blended
):
    def run(version, size, max_steps, parallel):
        told = values(start, version, (0.3, 0.7)) | dict(curriculum=PHASES, parallel=parallel)
        told["trainer"] |= dict(max_steps=max_steps)
        run_distributed(pretrain, size, told)
        return rows(start, version)

    alone = run("phases", 1, 5, {})
    read = Shares((0.3, 0.7)).counts(16)[0] / (3999 // 32) + Shares((2, 1)).counts(12)[0] / (3999 // 64)
    assert alone[5]["epochs/foreign"] == pytest.approx(read)
    for axis in ("tensor", "pipeline", "context"):
        run(axis, 2, 4, {axis: 2})
        found = run(axis, 2, 5, {axis: 2})
        assert found.keys() == alone.keys()
        for step in alone:
            for key in (key for key in alone[step] if "cross_entropy" in key or "epochs" in key):
                assert found[step][key] == pytest.approx(alone[step][key], rel=1e-5), (axis, step, key)
