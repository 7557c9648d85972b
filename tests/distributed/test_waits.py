"""How often a step waits for the device: counted on the CPU, where every read of a tensor's value stands for a wait."""

import inspect
from collections import Counter
from functools import cache
from pathlib import Path
from unittest import mock

import megatron.core
import pytest
import torch
from rich.console import Console
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import elastic
from elastic.config.load import load
from elastic.config.verbs import ElasticConfig
from elastic.model.cpu_backend import use_cpu_backend
from elastic.model.documents import copied
from elastic.train.trainer import Callback
from elastic.verbs.training import run_training
from tests.distributed.harness import run_distributed
from tests.distributed.training import CURRICULUM, elastic_values

# One, and one more where a router that trains is looked at late in its phase (draw.py): two at most.
MOST_WAITS = {1: 1, 2: 2, 4: 1}  # by step, of two phases of three
AGREE = "_local_scalar_dense in signals.py::_agree"  # no device, but all hosts wait for each other
PLACES = [Path(package.__path__[0]) for package in (elastic, megatron.core, torch.optim)]
PULL = ("draw.py", "_pull")  # copies all logits to the host, a wait, and has the choice decided there
DECIDED = ("decide.py", "of logits on the host")
# Numbers that live on the host on any machine: to read one is no wait.
ON_THE_HOST = {
    ("sampler.py", "draw_budgets"),
    ("stream.py", "counts_all"),
    ("stream.py", "num_counted"),
    ("documents.py", "of"),
    ("optimizer.py", "_get_value"),  # of torch.optim: steps are counted on the host
}
# They pin what they copy on a GPU; elsewhere a copy that is not to wait does, if its source is pageable.
PIN_FIRST = {("documents.py", "copied"), ("draw.py", "_copied")}
# Data-dependent by themselves, or reading a value: operations of ATen.
READS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
# On a CPU these read memory without an operation; what makes a tensor on a device from numbers copies them.
CALLS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
FROM_NUMBERS = {torch.tensor, torch.as_tensor}


@cache
def counted_file(path):
    """Return the name of a source file in which a wait is named, None for others."""
    name = Path(path).name
    return name if name != "cpu_backend.py" and any(Path(path).is_relative_to(place) for place in PLACES) else None


class Waits:
    """Counts, by step and place in the code, what would wait for a GPU."""

    def __init__(self):
        self.by_step, self.step = {}, None

    def note(self, what):
        place = self.place()
        if self.step is not None and place != DECIDED and (place not in ON_THE_HOST or what == "to"):
            self.by_step.setdefault(self.step, Counter())[f"{what} in {'::'.join(place)}"] += 1

    @staticmethod
    def place():
        frame, place, deciding = inspect.currentframe(), None, False
        while frame is not None:
            if (file := counted_file(frame.f_code.co_filename)) is not None:
                place = place or (file, frame.f_code.co_name)
                deciding = deciding or file == "decide.py"
                if deciding and (file, frame.f_code.co_name) == PULL:
                    return DECIDED
            frame = frame.f_back
        return place or ("elsewhere", "?")


class CountCalls(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in CALLS or (func in FROM_NUMBERS and kwargs.get("device") and not isinstance(args[0], torch.Tensor)):
            self.waits.note(func.__name__)
        moves = func is torch.Tensor.to and any(isinstance(arg, torch.device | torch.Tensor | str) for arg in args[1:])
        if moves or (func is torch.Tensor.to and "device" in kwargs):
            if not kwargs.get("non_blocking") or self.waits.place() not in PIN_FIRST:
                self.waits.note("to")
        return func(*args, **kwargs)


class CountReads(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        # A mask with a tensor of values asks how many it has; filled with one value it does not.
        by_mask = name == "index" or (name.startswith("index_put") and args[2].numel() > 1)
        by_mask = by_mask and any(chosen is not None and chosen.dtype is torch.bool for chosen in args[1])
        if name in READS or by_mask:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


class Steps(Callback):
    """Tells the count which step runs; before the others, so that what they do after a step counts to the next."""

    def __init__(self, waits):
        self.waits = waits

    def on_start(self, trainer):
        self.waits.step = trainer.step

    def after_step(self, trainer, result):
        self.waits.step = trainer.step

    def on_end(self, trainer):
        self.waits.step = None


def train_and_count(values):
    waits = Waits()
    use_cpu_backend()
    synchronize = mock.patch.object(torch.cuda, "synchronize", lambda *_: waits.note("synchronize"))
    with CountCalls(waits), CountReads(waits), synchronize:
        run_training(load(ElasticConfig, values), Console(quiet=True), [Steps(waits)])
    return {step: dict(places) for step, places in waits.by_step.items()}


@pytest.mark.parametrize("parallel", [{}, dict(tensor=2, pipeline=2, sequence=True, recompute="full")], ids=["1", "4"])
def test_a_step_waits_at_most_twice_for_the_device_between_log_points(start, parallel):
    """Under masks, steps 0 to 2, and under slices, 3 to 5; the router's choice is read once, where its phase begins.

    One process reads a blend, and sums losses by source; four pack isolated documents.
    """
    often = dict(log_every_n_steps=100, val_check_interval=100, checkpoint_every_n_steps=100)
    short = [{**phase, "steps": 3} for phase in CURRICULUM]
    values = elastic_values(start, f"waits{len(parallel)}", parallel=parallel, trainer=often, curriculum=short)
    if not parallel:
        folder = values["data"].pop("path")
        values["data"]["blend"] = [dict(path=folder, name=name, weight=weight) for name, weight in (("a", 1), ("b", 2))]
    else:
        values["data"]["packing"] = "isolated"
    for by_step in run_distributed(train_and_count, 4 if parallel else 1, values):
        for step in MOST_WAITS:
            places = by_step[step]
            assert places.pop(AGREE) == 1
            assert sum(places.values()) == MOST_WAITS[step], f"step {step} waits at {places}"
            assert "tolist in nonfinite.py::nonfinite" in places, "the count sees the one wait that must be"


def test_the_count_sees_what_waits():
    waits = Waits()
    waits.step, value = 0, torch.ones(3)
    with CountCalls(waits), CountReads(waits):
        for wait in (
            lambda: value.sum().item(), lambda: bool(value[0]), lambda: float(value[0]), lambda: int(value[0]),
            value.tolist, value.cpu, value.numpy, value.nonzero, lambda: value[value > 0],
            lambda: torch.tensor(1.0, device="cpu"), lambda: torch.as_tensor(1.0, device="cpu"),
            lambda: value.to("cpu"), lambda: value.to("cpu", non_blocking=True),
            lambda: value.to(value), lambda: value.to(device="cpu"),
            lambda: torch.equal(value, value),
        ):  # fmt: skip
            before = sum(waits.by_step.get(0, {}).values())
            wait()
            assert sum(waits.by_step[0].values()) == before + 1
        copied(value, torch.device("cpu"))
        torch.full((), 3.0, device="cpu")
        assert sum(waits.by_step[0].values()) == before + 1


def test_what_is_copied_to_a_gpu_is_pinned_first():
    host, gpu = mock.Mock(spec=torch.Tensor), torch.device("cuda")
    assert copied(host, gpu) is host.pin_memory().to.return_value
    host.pin_memory().to.assert_called_once_with(gpu, non_blocking=True)
    host.to.assert_not_called()
