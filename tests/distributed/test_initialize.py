"""Every layout starts from the same model: a rank's initial parameters are the shards of one full set."""

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.initialize import named_global_parameters
from elastic.model.model import build_model
from elastic.model.sharding import shard_tensor
from elastic.space.space import Space
from elastic.world.groups import Layout
from tests.distributed.harness import run_distributed
from tests.unit.model.test_initialize import SEED, SHAPE, STD, draw


def _stage(layout: Layout) -> dict[str, Tensor]:
    use_cpu_backend()  # a tied head on another stage is copied through .cuda()
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline)
    model = build_model(Space(SHAPE, {}, lanes=2), layout, seed=SEED, init_std=STD)
    return {name: parameter.detach().clone() for name, parameter in named_global_parameters(model)}


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, pipeline=2)], ids=["one process", "TP2 x PP2"])
def test_pitfall_22_every_layout_starts_from_the_same_model(layout: Layout) -> None:
    """Names are global; a rank's part is the shard of the one full tensor; a tied head equals the embedding."""
    stages = run_distributed(_stage, layout.tensor * layout.pipeline, layout)
    for rank, stage in enumerate(stages):
        for name, values in stage.items():
            expected = shard_tensor(draw(name), name, SHAPE, rank % layout.tensor, layout.tensor)
            assert torch.equal(values, expected), (rank, name)
    layers = [{int(name.split(".")[2]) for name in stage if ".layers." in name} for stage in stages]
    assert set.union(*layers) == set(range(5))
    embedding = "embedding.word_embeddings.weight"
    first_and_last = (stages[0], stages[-1])
    assert all(embedding in stage for stage in first_and_last)
