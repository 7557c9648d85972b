"""What rank 0 finds on a shared disk, or decides, holds for all ranks.

Nodes may see a folder differently for a while after another node has changed it, and an error on one rank alone would
leave the others waiting.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from elastic.world.files import explained
from elastic.world.groups import World


class SharedFileError(ValueError):
    """A file or folder that rank 0 could not read or write."""


def decided_by_rank_0[T](decide: Callable[[], T], world: World | None) -> T:
    """Call `decide` on rank 0; every rank returns its answer or raises its ValueError. None: one process, no group.

    All ranks raise SharedFileError, with the file and a remedy, where rank 0 meets an OSError.
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
