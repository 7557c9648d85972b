"""Count the bytes of tensors that are alive, of collectives and of elementwise work, on real or fake tensors.

Nothing is patched: all counters are dispatch modes, which see every operation between `with` and its end.
"""

import time
import weakref
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made while it is entered and still alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf.untyped_storage())
        return result

    def settled(self, still_s: float) -> int:
        """Return the bytes alive once nothing was let go of for `still_s`: gloo's threads hold a sent tensor on."""
        known, since = self.bytes, time.monotonic()
        while time.monotonic() - since < still_s:
            time.sleep(0.01)
            if self.bytes != known:
                known, since = self.bytes, time.monotonic()
        return known

    def reset_peak(self) -> None:
        """Start a new peak from what is alive now."""
        self.peak_bytes = self.bytes

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, partial(self._gone, key)), size)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def _gone(self, key: int, _reference: Any) -> None:
        self.bytes -= self._alive.pop(key)[1]


class CollectiveBytes(TorchDispatchMode):
    """Payload bytes of collectives by (group, operation): the whole tensor that is gathered, scattered or reduced.

    A point-to-point exchange counts what is sent. `groups` names the process groups of interest.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self.names = {group.group_name: name for name, group in groups.items()}
        self.payload: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        if name in ("recv", "recv_any_source", "barrier"):
            return
        kind, payload = _COLLECTIVES.get(name, (name, max))
        sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        group = next((dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject)), None)
        name = "other" if group is None else self.names.get(group.group_name, "other")
        self.payload[name, kind] += payload(sizes)


class ProductFlops(TorchDispatchMode):
    """FLOPs of matrix products, from torch's own table of formulas (the one FlopCounterMode uses).

    FlopCounterMode itself hooks every module to say where FLOPs fall, which the pipeline schedule's streams without a
    graph break.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class MovedBytes(TorchDispatchMode):
    """Bytes read and written, by all that is no product, view, allocation or exchange; and kernels, products included.

    Both by the `part` of the work that is going on. What stands in for a kernel says what that moves with `add`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part = "before"
        self.moved: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or func.namespace != "aten" or name.startswith(_NO_KERNEL):
            return result
        read, written = ([t for t in tree_leaves(some) if isinstance(t, torch.Tensor)] for some in (args, result))
        if name in _ONLY_WRITE:
            read = read[1:]
        self.add(*(() if func.overloadpacket in flop_registry else (*read, *written)))
        return result

    def add(self, *tensors: torch.Tensor, launches: int = 1) -> None:
        """Count kernels that read or write each of `tensors` once; an expanded one has no more than its storage."""
        self.launches[self.part] += launches
        self.moved[self.part] += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)


_NO_KERNEL = ("empty", "new_empty", "detach", "_unsafe_view", "promote_types", "lift_fresh", "scalar_tensor")
_ONLY_WRITE = ("copy_", "zero_", "fill_")
_COLLECTIVES: dict[str, tuple[str, Any]] = {
    "allreduce": ("all_reduce", sum),
    "allreduce_coalesced": ("all_reduce", sum),
    "allgather_base": ("all_gather", max),
    "allgather_into_tensor_coalesced": ("all_gather", sum),
    "reduce_scatter_base": ("reduce_scatter", max),
    "alltoall_base": ("all_to_all", max),
    "send": ("send", sum),
}
