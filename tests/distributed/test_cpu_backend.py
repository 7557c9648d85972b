"""Each adaptation of torch to a machine without a GPU is still needed: without it, one training step fails."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from elastic.config.sections import DistillConfig, OptimConfig
from elastic.data.stream import Batch
from elastic.model.cpu_backend import ADAPTATIONS, use_cpu_backend
from elastic.space.space import Space
from elastic.train.optimizer import build_optimizer, wrap_for_training
from elastic.train.pipeline import PipelineRunner
from elastic.world.groups import Layout, World
from tests.distributed.harness import DistributedRunError, run_distributed
from tests.parity.model_factory import build_lively, shape_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the adaptations are not installed beside a GPU")


def _train_one_step_and_save(left_out: list[str], tied: bool, folder: str) -> bool:
    """Do everything that the training loop asks of Megatron-Core, on two pipeline stages."""
    use_cpu_backend(without=left_out)
    layout = Layout(pipeline=2, recompute="full")
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    here = World(layout, ProcessGroupCollection.use_mpu_process_groups(), torch.device("cpu"))
    model = build_lively(Space(shape_of("M-*-", tied_embeddings=tied), {}), layout)
    wrapped = wrap_for_training(model, OptimConfig())
    optimizer = build_optimizer(wrapped, OptimConfig(clip_grad=1.0), here)
    runner = PipelineRunner(here, wrapped, DistillConfig(kl_weight=0.0, cross_entropy_weight=1.0))
    tokens = torch.arange(9).view(1, 9)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.arange(1))
    wrapped.zero_grad_buffer()
    runner.forward_backward([runner.share(batch), runner.share(batch)])
    updated, norm, _ = optimizer.step()
    sharded = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group(None))
    get_write_results_queue("fork")  # the writer's own would be in a new interpreter, with all its imports
    dist_checkpointing.save(sharded, folder)
    return updated and norm > 0


def test_with_all_adaptations_a_step_runs(tmp_path: Path) -> None:
    assert run_distributed(_train_one_step_and_save, 2, [], True, str(tmp_path)) == [True, True]
    assert list(tmp_path.glob("*.distcp"))


# What asks, in Megatron-Core's own names, so that a test fails when another place turns out to be the reason.
ASKED_BY = [
    ("current_device", False, "distributed_data_parallel.py"),
    ("current_stream", False, "start_grad_sync"),
    ("synchronize", False, "dist_checkpointing"),
    ("tensor_literals", False, "get_megatron_optimizer"),
    ("zeros_literals", False, "forward_backward_pipelining"),
    ("to_cuda", True, "setup_embeddings_and_output_layer"),
    ("type_names", False, "clip_grad_by_total_norm_fp32"),
]


@pytest.mark.parametrize(("name", "tied", "asked_by"), ASKED_BY)
def test_without_one_adaptation_a_step_fails(name: str, tied: bool, asked_by: str, tmp_path: Path) -> None:
    with pytest.raises(DistributedRunError, match=asked_by):
        run_distributed(_train_one_step_and_save, 2, [name], tied, str(tmp_path))


def test_every_adaptation_is_tried() -> None:
    assert {name for name, _, _ in ASKED_BY} == ADAPTATIONS.keys()


def _facts_after_installing() -> dict[str, bool]:
    before = torch.cuda.is_available()
    use_cpu_backend()
    first = torch.cuda.current_device, torch.cuda.synchronize
    use_cpu_backend()
    return {
        "still says that there is no GPU": torch.cuda.is_available() is before is False,
        "a second call changes nothing": first == (torch.cuda.current_device, torch.cuda.synchronize),
        "a CUDA literal is the CPU": torch.zeros(2, device="cuda").device.type == "cpu",
        "other devices are left alone": torch.zeros(2, device="meta").device.type == "meta",
    }


def test_installing_is_idempotent_and_honest() -> None:
    facts = run_distributed(_facts_after_installing, 1)[0]
    assert all(facts.values()), facts


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="streams"):
        use_cpu_backend(without=["streams"])
