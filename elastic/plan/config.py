"""The config of recipes/plan.py: any run of the main job, and the cluster it is planned for."""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from elastic.config.inputs import PermutedParentInput
from elastic.config.load import ConfigError, Problem
from elastic.config.sections import DataConfig, ParallelConfig
from elastic.config.verbs import CostConfig, ElasticConfig
from elastic.space.ranges import Amount, Decay, Files, Name, Ranks, Sequences, Share, Speed

# Where the assumed figures come from; none is a measurement of this code.
SOURCES = {
    "matmul_efficiency": "assumed: large bf16 products of an H100 under its power limit reach some 650 of 989 TFLOP/s",
    "attention_efficiency": "assumed: causal, both passes; arXiv 2407.08608 reaches 0.5 to 0.75 on an H100",
    "scan_efficiency": "assumed: ours; its products are small and it waits for memory in between",
    "memory_efficiency": "assumed: a copy on an H100 reaches some 2.7 of 3.35 TB/s",
    "launch_us": "assumed: ours; PyTorch and autograd call by call, the launch included",
    "link_efficiency": "assumed: ours",
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """GPUs and what connects them. Peak is dense bf16; links count one direction of one GPU.

    `reserved_gb` is what the CUDA context, NCCL's buffers and the allocator's gaps take; `spare` the share of memory a
    plan leaves free beyond that.
    """

    gpu: Name = "h100"
    num_gpus: Ranks = 512
    gpus_per_node: Ranks = 8
    memory_gb: Speed = 80.0
    reserved_gb: Amount = 3.0
    spare: Decay = 0.1
    peak_tflops: Speed = 989.0
    memory_gb_per_s: Speed = 3350.0
    node_gb_per_s: Speed = 450.0
    network_gb_per_s: Speed = 50.0
    price_per_gpu_hour: Amount = 2.5

    @property
    def budget_bytes(self) -> float:
        """Return what tensors may take on one GPU."""
        return (self.memory_gb * (1.0 - self.spare) - self.reserved_gb) * 1e9

    def spare_share(self, peak_bytes: int) -> float:
        """Return the share of a GPU's memory that stays free beside the reserve."""
        return 1.0 - (peak_bytes / 1e9 + self.reserved_gb) / self.memory_gb


@dataclass(frozen=True, kw_only=True)
class PlanSection:
    """Shares of peak for each kind of work and the time of a launch, assumed (SOURCES); and how far to look.

    `measured` names what `recipes/benchmark.py --only gpu --json FILE` wrote, whose figures take the place of assumed
    ones. `mfu` is the model FLOPs utilisation that days and price are also stated at. `dry_run` traces the layout too.
    """

    measured: str | None = None
    mfu: Share = 0.4
    matmul_efficiency: Share = 0.65
    attention_efficiency: Share = 0.5
    scan_efficiency: Share = 0.15
    memory_efficiency: Share = 0.8
    launch_us: Amount = 6.0
    link_efficiency: Share = 0.7
    search: bool = True
    max_micro_batch: Sequences = 4
    top: Files = 6
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CostConfig):
    """recipes/plan.py: memory, FLOPs, traffic, time and price of a run of the main job, before it starts."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    plan: PlanSection = field(default_factory=PlanSection)

    @property
    def memory_bytes_per_s(self) -> float:
        """Return what a GPU reads and writes a second."""
        return self.cluster.memory_gb_per_s * 1e9 * self.plan.memory_efficiency

    def run_config(self, parallel: ParallelConfig, micro_batch: int) -> ElasticConfig:
        """Return the config of the run itself on a layout, inputs left open, for the rules of its own verb."""
        own = {name: getattr(self, name) for name in ElasticConfig.__dataclass_fields__}
        data = DataConfig(**asdict(self.data) | {"path": "-", "micro_batch": micro_batch})
        given = {"parallel": parallel, "data": data, "init_from": PermutedParentInput(permuted_parent="-")}
        return ElasticConfig(**own | given)


def with_measured(config: PlanConfig) -> tuple[PlanConfig, dict[str, str]]:
    """Put the figures of `plan.measured` in the place of assumed ones; return the config and the source of each figure.

    The file is a JSON object with `card`, a GPU's name, and positive numbers `matmul_tflops` (large bf16 products),
    `copy_tb_per_s` (bytes read and written) and `launch_us` (the host's time for one kernel); other keys are left
    alone. Raises ConfigError for a file that is not so, or from another GPU than `cluster.gpu`.
    """
    path, cluster, wanted = config.plan.measured, config.cluster, ("matmul_tflops", "copy_tb_per_s", "launch_us")
    if path is None:
        return config, dict(SOURCES)
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise _bad_file(path, f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise _bad_file(path, f"is not JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("card"), str):
        raise _bad_file(path, "has no name of a GPU under card")
    if cluster.gpu.lower() not in found["card"].lower():
        raise _bad_file(path, f"was measured on {found['card']}, the cluster has {cluster.gpu} (cluster.gpu)")
    numbers = [found.get(name) for name in wanted]
    matmul, copy, launch = (float(number) if isinstance(number, int | float) else 0.0 for number in numbers)
    if missing := [
        name for name, number in zip(wanted, (matmul, copy, launch), strict=True) if not 0 < number < math.inf
    ]:
        raise _bad_file(path, f"has no positive number under {', '.join(missing)}")
    plan = replace(
        config.plan,
        matmul_efficiency=matmul / cluster.peak_tflops,
        memory_efficiency=copy * 1e3 / cluster.memory_gb_per_s,
        launch_us=launch,
    )
    taken = ("matmul_efficiency", "memory_efficiency", "launch_us")
    return replace(config, plan=plan), SOURCES | dict.fromkeys(taken, f"measured on {found['card']}: {path}")


def _bad_file(path: str, rule: str) -> ConfigError:
    remedy = "write it with recipes/benchmark.py --only gpu --json FILE on the GPU to plan for, or leave it null"
    return ConfigError([Problem("plan.measured", path, rule, remedy)])
