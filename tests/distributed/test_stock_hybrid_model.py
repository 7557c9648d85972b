"""The parent's checkpoint names are Megatron-Core's own: a stock HybridModel reads an elastic checkpoint and back."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.initialize import named_global_parameters
from elastic.model.model import ElasticModel
from elastic.space.axes import Axis
from elastic.space.space import AxisChoices, Space
from elastic.world.groups import Layout
from tests.distributed.harness import run_distributed
from tests.parity.model_factory import (
    build_lively,
    build_stock,
    fill,
    lively_tensor,
    one_process,
    relative_error,
    shape_of,
    tokens_for,
)

PATTERN = "M-M*-M-"


@dataclass(frozen=True)
class Case:
    """A checkpoint: which model saves it, at which layout; the other model reads it on one process."""

    name: str
    saved_by: str
    layout: Layout = field(default_factory=Layout)
    tied: bool = False

    @property
    def world_size(self) -> int:
        return self.layout.tensor * self.layout.pipeline


CASES = [
    Case("elastic at one process", "elastic"),
    Case("stock at one process", "stock"),
    Case("elastic, tied head, at PP2", "elastic", Layout(pipeline=2), tied=True),
    Case("stock at TP2", "stock", Layout(tensor=2)),
    Case("elastic at TP2 x PP2", "elastic", Layout(tensor=2, pipeline=2)),
]


def _space(tied: bool = False) -> Space:
    shape = shape_of(PATTERN, vocab=60, tied_embeddings=tied)
    choices = {Axis.HIDDEN: AxisChoices((24, 12)), Axis.FFN: AxisChoices((16, 8), per_layer=True)}
    return Space(shape, choices, lanes=4)


@pytest.fixture(scope="module", autouse=True)
def process_groups() -> Iterator[None]:
    with one_process():
        yield


def _model(kind: str, tied: bool, layout: Layout | None = None) -> HybridModel:
    """Build this rank's part of the elastic or of the stock model, both with the same lively weights."""
    space = _space(tied)
    if kind == "elastic":
        return build_lively(space, layout)
    stock = build_stock(space.parent, layout)
    fill(stock, {name: lively_tensor(name, space.parent) for name, _ in named_global_parameters(stock)}, space.parent)
    return stock


def _parameters(model: HybridModel) -> dict[str, Any]:
    """Shard a model's parameters; stock linears add empty `_extra_state` objects for FP8, elastic ones do not."""
    sharded = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
    return {name: entry for name, entry in sharded.items() if not name.endswith("_extra_state")}


def _save_ranks(cases: list[Case], folder: str) -> None:
    """Save from processes of their own, where torch is adapted to a machine without a GPU."""
    use_cpu_backend()
    get_write_results_queue("fork")  # the writer's own would be in a new interpreter, with all its imports
    for case in cases:
        parallel_state.initialize_model_parallel(case.layout.tensor, case.layout.pipeline)
        sharded = _parameters(_model(case.saved_by, case.tied, case.layout))
        path = Path(folder) / case.name
        path.mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(sharded, str(path))
        parallel_state.destroy_model_parallel()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save every case, all of one world size in one run."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for world_size in sorted({case.world_size for case in CASES}):
        run_distributed(_save_ranks, world_size, [c for c in CASES if c.world_size == world_size], str(folder))
    return folder


def _load_strictly(model: HybridModel, folder: str) -> None:
    """Load so that a missing, unexpected or wrongly sized tensor on either side raises, and none is left as it was."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    loaded = dist_checkpointing.load(_parameters(model), folder, strict="raise_all")
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected and all(name.endswith("_extra_state") for name in missing)


def _logits(model: HybridModel, tokens: Tensor) -> Tensor:
    if isinstance(model, ElasticModel):
        return (model(tokens) @ model.head_weight().T).transpose(0, 1)
    return model(tokens, position_ids=None, attention_mask=None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pitfall_22_each_reads_the_others_checkpoint_of_any_layout(case: Case, checkpoints: Path) -> None:
    """Layers keep their global numbers and every block of a sharded dimension finds its place again."""
    tokens = tokens_for(_space(case.tied).parent)
    loaded = _model("stock" if case.saved_by == "elastic" else "elastic", case.tied)
    _load_strictly(loaded, str(checkpoints / case.name))
    assert relative_error(_logits(loaded, tokens), _logits(_model(case.saved_by, case.tied), tokens)) <= 1e-5


def test_names_and_sizes_are_those_of_the_stock_model() -> None:
    elastic, stock = _model("elastic", False), _model("stock", False)
    sizes = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in (elastic, stock)]
    assert sizes[0] == sizes[1] and sizes[0]
    buffers = set(elastic.state_dict()) - set(stock.state_dict())
    assert not buffers, "mask tables must stay out of checkpoints"
