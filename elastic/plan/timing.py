"""How long a step takes on a cluster: a model of assumed efficiencies, good for ranking layouts, not measured.

Nothing is assumed to overlap: products, elementwise work over GPU memory, tensor-, context- and data-parallel traffic
follow each other on a rank; stages work at the pace of the slowest (1F1B: m + p - 1 turns for m micro-batches).
"""

from dataclasses import dataclass, fields

from elastic.plan.activations import saved_bytes
from elastic.plan.config import ClusterConfig, PlanSection
from elastic.plan.flops import Flops
from elastic.plan.phases import PhasePlan
from elastic.plan.work import FP32_BYTES, MicroBatchWork, distinct

# Ours: a saved tensor is written once and read about twice in forward; backward moves about twice that. The loss
# passes over its fp32 chunks about this many times.
_PASSES, _BACKWARD_PASSES, _LOSS_PASSES = 3, 6, 16
_GROUPS = {"tp": "tensor", "cp": "context", "pp": "pipeline"}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to; `bubble` is the wait for other stages."""

    products: float
    elementwise: float
    tensor: float
    context: float
    pipeline: float
    data: float
    bubble: float

    @property
    def total(self) -> float:
        """Return the whole step."""
        return sum(getattr(self, field.name) for field in fields(self))


def step_time(plan: PhasePlan, cluster: ClusterConfig, assumed: PlanSection) -> StepTime:
    """Estimate one step of a phase from its slowest stage."""
    stages = range(plan.layout.pipeline)
    per_stage = [_micro_batch_time(plan, stage, cluster, assumed) for stage in stages]
    slowest = max(per_stage, key=lambda parts: sum(parts.values()))
    return StepTime(
        **{name: seconds * plan.micro_batches for name, seconds in slowest.items()},
        data=sum(plan.sent_bytes_once(0).values()) / (cluster.network_gb_per_s * 1e9 * assumed.link_efficiency),
        # Teacher and student each fill and drain the pipeline once: together one micro-batch's whole work.
        bubble=sum(slowest.values()) * (plan.layout.pipeline - 1),
    )


def _micro_batch_time(plan: PhasePlan, stage: int, cluster: ClusterConfig, assumed: PlanSection) -> dict[str, float]:
    """Return the seconds of one mean micro-batch on one stage, by kind; a group that fits in a node uses its links.

    Megatron-Core places tensor ranks side by side, then context ranks; stages are farthest apart.
    """
    node, layout = cluster.gpus_per_node, plan.layout
    near = {"tp": layout.tensor <= node, "cp": layout.tensor * layout.context <= node, "pp": False}
    moved = sum(share.weight * elementwise_bytes(share.run, stage) for share in plan.shares)
    seconds = {
        "products": products_time(plan.flops(stage), cluster, assumed),
        "elementwise": moved / (cluster.memory_gb_per_s * 1e9 * assumed.memory_efficiency),
        **dict.fromkeys(_GROUPS.values(), 0.0),
    }
    for (group, _), sent in plan.sent_bytes(stage).items():
        speed = cluster.node_gb_per_s if near[group] else cluster.network_gb_per_s
        seconds[_GROUPS[group]] += sent / (speed * 1e9 * assumed.link_efficiency)
    return seconds


def products_time(flops: Flops, cluster: ClusterConfig, assumed: PlanSection) -> float:
    """Return the seconds of matrix products, each kind at its share of peak."""
    at_peak = (
        flops.matmul / assumed.matmul_efficiency
        + flops.attention / assumed.attention_efficiency
        + flops.scan / assumed.scan_efficiency
    )
    return at_peak / (cluster.peak_tflops * 1e12)


def elementwise_bytes(run: MicroBatchWork, stage: int) -> float:
    """Return the bytes that norms, gates, activations and the loss move through GPU memory for one micro-batch."""
    passes = 2 * _PASSES + _BACKWARD_PASSES + (_PASSES if run.layout.recompute else 0)  # teacher's forward included
    total = sum(count * passes * saved_bytes(layer) for layer, count in distinct(run.layers(stage)))
    if stage == run.layout.pipeline - 1:
        total += _LOSS_PASSES * run.tokens * run.local_vocab * FP32_BYTES
    return total
