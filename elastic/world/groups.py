"""Start and stop the process groups of one run; what rank 0 finds on a shared disk, or decides, holds for all ranks."""

import datetime
import faulthandler
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ReduceOp

from elastic.world.files import explained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEAVE_TIME_S = 60.0


# Of activations: none, what stands between matrix products (model/recompute.py), or whole layers.
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Layout:
    """How one model copy is spread over ranks, its precision, and which activations are recomputed."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class World:
    """This process's place: its layout, its groups, its device."""

    layout: Layout
    groups: ProcessGroupCollection
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Tell whether this is global rank 0, the one that writes files."""
        return torch.distributed.get_rank() == 0

    @property
    def data_rank(self) -> int:
        """Return this replica's number."""
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        """Return the number of replicas."""
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        """Tell whether this rank holds the head."""
        return self.groups.pp.rank() == self.groups.pp.size() - 1

    def sum_over_replica(self, tensor: Tensor) -> Tensor:
        """Sum in place over the ranks of one replica: tensor, pipeline and context parallel."""
        for group in (self.groups.tp, self.groups.pp, self.groups.cp):
            if group.size() > 1:
                torch.distributed.all_reduce(tensor, op=ReduceOp.SUM, group=group)
        return tensor


@contextmanager
def world(layout: Layout, timeout_s: float = 900.0) -> Iterator[World]:
    """Initialise torch.distributed and Megatron-Core's groups from torchrun's environment; alone without it.

    No exchange between ranks waits longer than `timeout_s` for one of them, and after an error the process ends at the
    latest LEAVE_TIME_S later. Processes that torch.distributed connects already are used as they are, and stay
    connected afterwards.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    connected = torch.distributed.is_initialized()
    if not connected:
        alone: dict[str, Any] = (
            {} if "RANK" in os.environ else dict(store=torch.distributed.HashStore(), rank=0, world_size=1)
        )
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_s), **alone
        )
    try:
        yield join_world(layout, device, timeout_s)
    except BaseException:
        if not connected:
            # Leaving a group whose other ranks hang can hang too; this clock needs no Python thread to run.
            faulthandler.dump_traceback_later(LEAVE_TIME_S, exit=True)
        raise
    finally:
        parallel_state.destroy_model_parallel()
        if not connected:
            torch.distributed.destroy_process_group()
            faulthandler.cancel_dump_traceback_later()


def join_world(layout: Layout, device: torch.device, timeout_s: float = 900.0) -> World:
    """Build Megatron-Core's groups for `layout` over the processes that torch.distributed already connects.

    All ranks call it together. Groups of another layout are ended first: nothing may use them any more.
    """
    if parallel_state.model_parallel_is_initialized():
        torch.distributed.barrier()  # who is behind still reads what a group has sent
        # Their communicators hold memory of the device; Megatron-Core only forgets them. The first entry is no group.
        for group in (parallel_state._global_process_group_list or [None])[1:]:
            torch.distributed.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=timeout_s / 60.0,  # goes into a timedelta: fractions are fine
    )
    return World(layout, ProcessGroupCollection.use_mpu_process_groups(), device)


class SharedFileError(ValueError):
    """A file or folder that rank 0 could not read or write."""


def decided_by_rank_0[T](decide: Callable[[], T], world: World | None) -> T:
    """Call `decide` on rank 0; every rank returns its answer or raises its ValueError. None: one process, no group.

    Nodes may see a shared folder differently for a while after another has changed it, and an error on one rank alone
    would leave the others waiting. All ranks raise SharedFileError, with file and remedy, where rank 0 meets OSError.
    """
    answer: list[Any] = [None, None]
    if world is None or world.is_main:
        try:
            answer[0] = decide()
        except ValueError as error:
            answer[1] = error
        except OSError as error:
            answer[1] = SharedFileError(explained(error, Path()))
    if world is not None:
        torch.distributed.broadcast_object_list(answer, src=0)
    decision, problem = answer
    if problem is not None:
        raise problem
    return decision
