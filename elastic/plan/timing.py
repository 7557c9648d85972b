"""How long a step takes on a cluster: a model of assumed efficiencies, good for ranking layouts, not measured.

Nothing is assumed to overlap: products, elementwise work over GPU memory, tensor-, context- and data-parallel traffic
follow each other on a rank; stages work at the pace of the slowest (1F1B: m + p - 1 turns for m micro-batches).
"""

from dataclasses import dataclass, fields

from elastic.plan.activations import saved_bytes
from elastic.plan.config import ClusterConfig, PlanSection
from elastic.plan.flops import Flops
from elastic.plan.phases import PhasePlan
from elastic.plan.traffic import Traffic, micro_batch_traffic, moved_bytes, step_traffic
from elastic.plan.work import FP32_BYTES, MicroBatchWork, distinct

# Ours: a saved tensor is written once and read about twice in forward; backward moves about twice that. The loss
# passes over its fp32 chunks about this many times.
_PASSES, _BACKWARD_PASSES, _LOSS_PASSES = 3, 6, 16


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


def step_time(plan: PhasePlan, cluster: ClusterConfig, assumed: PlanSection, distributed_optimizer: bool) -> StepTime:
    """Estimate one step of a phase from its slowest stage."""
    stages = range(plan.layout.pipeline)
    per_stage = [_micro_batch_time(plan, stage, cluster, assumed) for stage in stages]
    slowest = max(per_stage, key=lambda parts: sum(parts.values()))
    once = step_traffic(plan.shares[0].run, 0, distributed_optimizer)
    link = cluster.network_gb_per_s * 1e9 * assumed.link_efficiency
    ranks = plan.replicas * plan.layout.context
    data = sum(moved_bytes(operation, payload, ranks) for (_, operation), payload in once.items()) / link
    turns = plan.micro_batches
    return StepTime(
        **{name: seconds * turns for name, seconds in slowest.items()},
        data=data,
        # Teacher and student each fill and drain the pipeline once: together one micro-batch's whole work.
        bubble=sum(slowest.values()) * (plan.layout.pipeline - 1),
    )


def _micro_batch_time(plan: PhasePlan, stage: int, cluster: ClusterConfig, assumed: PlanSection) -> dict[str, float]:
    """Return the seconds of one mean micro-batch on one stage, by kind."""
    memory_speed = cluster.memory_gb_per_s * 1e9 * assumed.memory_efficiency
    parts = dict.fromkeys(("products", "elementwise", "tensor", "context", "pipeline"), 0.0)
    parts["products"] = products_time(plan.flops(stage).total, cluster, assumed)
    for share in plan.shares:
        parts["elementwise"] += share.weight * elementwise_bytes(share.run, stage) / memory_speed
        for group, seconds in traffic_time(micro_batch_traffic(share.run, stage), plan, cluster, assumed).items():
            parts[group] += share.weight * seconds
    return parts


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
    total = sum(count * passes * sum(saved_bytes(layer).values()) for layer, count in distinct(run.layers(stage)))
    if stage == run.layout.pipeline - 1:
        total += _LOSS_PASSES * run.tokens * run.local_vocab * FP32_BYTES
    return total


def traffic_time(traffic: Traffic, plan: PhasePlan, cluster: ClusterConfig, assumed: PlanSection) -> dict[str, float]:
    """Return the seconds of one micro-batch's traffic; a group that fits in a node uses its links.

    Megatron-Core places tensor ranks side by side, then context ranks; stages are farthest apart.
    """
    layout = plan.layout
    node = cluster.gpus_per_node
    local = {"tp": layout.tensor <= node, "cp": layout.tensor * layout.context <= node, "pp": False}
    ranks = {"tp": layout.tensor, "cp": layout.context, "pp": layout.pipeline}
    names = {"tp": "tensor", "cp": "context", "pp": "pipeline"}
    seconds = dict.fromkeys(names.values(), 0.0)
    for (group, operation), payload in traffic.items():
        speed = (cluster.node_gb_per_s if local[group] else cluster.network_gb_per_s) * 1e9 * assumed.link_efficiency
        seconds[names[group]] += moved_bytes(operation, payload, ranks[group]) / speed
    return seconds
