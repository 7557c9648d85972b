"""What a checkpoint says of the optimizer: bf16 beside fp32 weights, no step yet, and settings that changed since."""

from unittest import mock

import pytest
from rich.console import Console

from elastic.checkpoint.find import list_checkpoints
from elastic.checkpoint.read import read_metadata
from elastic.config.load import load
from elastic.config.training import ElasticConfig
from elastic.train import trainer as loop
from elastic.train.callbacks import NoCallback
from elastic.train.nonfinite import Finite
from elastic.verbs.training import run_elastic
from tests.distributed.harness import run_distributed
from tests.distributed.training import elastic_values, rows, train

HALF = dict(precision="bf16", checkpoint_every_n_steps=3)


@pytest.fixture(scope="module")
def half(start):
    """Rows of an uninterrupted run in bf16."""
    run_distributed(train, 1, elastic_values(start, "half_whole", trainer=HALF))
    return rows(start, "half_whole")


def main_weights(folder):
    """List the weights of which the newest checkpoint of a run holds a copy in fp32."""
    keys = read_metadata(list_checkpoints(folder)[-1]).state_dict_metadata
    return [key for key in keys if key.startswith("optimizer.state.fp32_param.")]


def test_bf16_with_fp32_weights_among_them_goes_on_to_the_last_digit(start, half):
    """A_log and D stay in fp32; an optimizer that counts the bf16 weights alone mixes all of them up."""
    run_distributed(train, 1, elastic_values(start, "half", trainer=dict(HALF, max_steps=4)))
    copies = main_weights(start / "run" / "half")
    assert len(copies) > 10 and not [name for name in copies if name.endswith(("A_log", ".D"))]
    run_distributed(train, 1, elastic_values(start, "half", trainer=HALF))
    assert {step: rows(start, "half")[step] for step in range(5, 10)} == {step: half[step] for step in range(5, 10)}


def test_bf16_is_gone_on_with_at_another_layout(start, half):
    values = elastic_values(start, "half_split", parallel=dict(tensor=2), trainer=dict(HALF, max_steps=4))
    run_distributed(train, 2, values)
    run_distributed(train, 1, elastic_values(start, "half_split", trainer=HALF))
    found = rows(start, "half_split")[9]
    for name in ("validation/full/loss", "validation/half/loss"):
        assert found[name] == pytest.approx(half[9][name], rel=1e-3)


def skip_all(values):
    """Train as if every gradient had a NaN in it."""
    with mock.patch.object(loop, "finite_on_all_ranks", lambda *arguments: Finite(False, True, True)):
        train(values)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_checkpoint_from_before_the_first_step_is_gone_on_with(start, precision):
    version, trainer = f"no_step_{precision}", dict(precision=precision, max_steps=2)
    run_distributed(skip_all, 1, elastic_values(start, version, trainer=trainer))
    run_distributed(train, 1, elastic_values(start, version, trainer=dict(precision=precision, max_steps=4)))
    assert list(rows(start, version)) == [1, 2, 3, 4]


class Groups(NoCallback):
    """Checks what the model's and the router's Adam compute with."""

    def __init__(self, optim):
        self.optim = optim

    def on_start(self, trainer):
        groups = trainer.optimizer.param_groups
        assert {group["weight_decay"] for group in groups} == {0.0, self.optim["weight_decay"]}
        for group in (*groups, *trainer.router_optimizer.param_groups):
            assert tuple(group["betas"]) == (0.9, self.optim["adam_beta2"]) and group["eps"] == self.optim["eps"]


def train_and_look(values, optim):
    run_elastic(load(ElasticConfig, values), Console(quiet=True), [Groups(optim)])


def test_accepted_settings_of_the_optimizer_are_those_it_computes_with(start):
    run_distributed(train, 1, elastic_values(start, "settings", trainer=dict(max_steps=3)))
    optim = dict(weight_decay=0.3, adam_beta2=0.9, eps=1e-6)
    values = elastic_values(start, "settings", optim=optim, trainer=dict(max_steps=4))
    values["exp_manager"]["accept_changes"] = [f"optim.{name}" for name in optim]
    run_distributed(train_and_look, 1, values, optim)
    assert list(rows(start, "settings")) == [1, 2, 3, 4]
