"""The config of recipes/plan.py: any run of the main job, and the cluster it is planned for."""

from dataclasses import asdict, dataclass, field

from elastic.config.sections import DataConfig, ParallelConfig
from elastic.config.verbs import CostConfig, ElasticConfig, PermutedParentInput
from elastic.space.ranges import Amount, Decay, Files, Name, Ranks, Sequences, Share, Speed


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
    """Assumed shares of peak for each kind of work, and how far to look.

    `mfu` is the model FLOPs utilisation that days and price are also stated at. `dry_run` traces the layout too.
    """

    mfu: Share = 0.4
    matmul_efficiency: Share = 0.65
    attention_efficiency: Share = 0.5
    scan_efficiency: Share = 0.15
    memory_efficiency: Share = 0.75
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

    def run_config(self, parallel: ParallelConfig, micro_batch: int) -> ElasticConfig:
        """Return the config of the run itself on a layout, inputs left open, for the rules of its own verb."""
        own = {name: getattr(self, name) for name in ElasticConfig.__dataclass_fields__}
        data = DataConfig(**asdict(self.data) | {"path": "-", "micro_batch": micro_batch})
        given = {"parallel": parallel, "data": data, "init_from": PermutedParentInput(permuted_parent="-")}
        return ElasticConfig(**own | given)
