"""How long a step takes: seconds by pass and cause, which add up to it.

Counts over efficiencies, measured or assumed (`plan.*`), good for ranking layouts. Nothing is assumed to overlap but
what the run's config says (`optim.overlap_...`), and the host, which launches ahead of its GPU: only what its
kernels take longer to launch than to run counts. Stages wait for each other as 1F1B's order has it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.plan.config import PlanConfig
from elastic.plan.flops import Flops, pass_flops
from elastic.plan.moved import Moved, loss_moved, num_chunks, stage_moved, step_moved
from elastic.plan.traffic import moved_bytes, pass_traffic, step_traffic
from elastic.plan.work import MicroBatchWork

PASSES = ("teacher", "forward", "loss", "recompute", "backward", "once")
CAUSES = (
    "products", "attention", "scan", "elementwise", "copies", "accumulation", "launches", "tensor", "context",
    "pipeline", "gradients", "weights", "waiting",
)  # fmt: skip
_FP8_OVER_BF16 = 2.0  # products a second, by the data sheets of Hopper and Ada
_GROUPS = {"tp": "tensor", "cp": "context", "pp": "pipeline"}
Seconds = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by (pass, cause): those of its busiest stage, and what that waits for others.

    `gradients` and `weights` are the reduction and the gather between replicas where nothing hides them.
    """

    parts: Seconds

    @property
    def total(self) -> float:
        """Return the whole step."""
        return sum(self.parts.values())

    def of(self, *causes: str) -> float:
        """Return what all passes take for some causes."""
        return sum(seconds for (_, cause), seconds in self.parts.items() if cause in causes)


def micro_batch_seconds(config: PlanConfig, run: MicroBatchWork, stage: int) -> Seconds:
    """Return the seconds of one micro-batch on one stage."""
    flops, moved, traffic = pass_flops(run, stage), stage_moved(run, stage), pass_traffic(run, stage)
    if "loss" in flops:
        moved["loss"] = loss_moved(run, config.distill.chunk_tokens)
    found = dict[tuple[str, str], float]()
    for name, passed in moved.items():
        seconds = _computing(config, flops.get(name, Flops()), passed)
        if name == "teacher" and config.distill.teacher_precision == "fp8":
            seconds["products"] /= _FP8_OVER_BF16
        if name == "loss":  # products with few tokens take as long as it takes to read both heads again
            heads = 2 * run.hidden + run.parent.hidden
            chunks = num_chunks(run, config.distill.chunk_tokens)
            weights = chunks * run.local_vocab * heads * run.element_bytes
            seconds["products"] = max(seconds["products"], weights / config.memory_bytes_per_s)
        for (group, operation), payload in traffic.get(name, {}).items():
            sent = moved_bytes(operation, payload, getattr(run.layout, _GROUPS[group]))
            seconds[_GROUPS[group]] += sent / _link_bytes_per_s(config, run, group)
        seconds["launches"] = max(0.0, passed.launches * config.plan.launch_us * 1e-6 - sum(seconds.values()))
        found |= {(name, cause): amount for cause, amount in seconds.items() if amount}
    return found


def once_seconds(
    config: PlanConfig, run: MicroBatchWork, stage: int, replicas: int, backward: float, teacher: float
) -> Seconds:
    """Return what comes once a step: gradients, the part of their reduction that `backward` seconds of the last
    micro-batch do not hide, the optimizer, and what `teacher` seconds do not hide of the gather of new weights."""
    ranks, distributed = replicas * run.layout.context, config.optim.use_distributed_optimizer
    seconds = _computing(config, Flops(), step_moved(run, stage, ranks if distributed else 1))
    for (_, operation), payload in step_traffic(run, stage, distributed).items():
        cause = "weights" if operation == "all_gather" else "gradients"
        seconds[cause] += moved_bytes(operation, payload, ranks) / _link_bytes_per_s(config, run, "dp", ranks)
    if config.optim.overlap_grad_reduce:
        seconds["gradients"] = max(0.0, seconds["gradients"] - backward)
    if config.optim.overlap_param_gather:
        seconds["weights"] = max(0.0, seconds["weights"] - teacher)
    return {("once", cause): amount for cause, amount in seconds.items() if amount}


def _computing(config: PlanConfig, flops: Flops, moved: Moved) -> defaultdict[str, float]:
    peak, assumed, speed = config.cluster.peak_tflops * 1e12, config.plan, config.memory_bytes_per_s
    seconds = {
        "products": flops.matmul / (peak * assumed.matmul_efficiency),
        "attention": flops.attention / (peak * assumed.attention_efficiency),
        "scan": flops.scan / (peak * assumed.scan_efficiency),
    }
    return defaultdict(
        float, seconds | {cause: getattr(moved, cause) / speed for cause in ("elementwise", "copies", "accumulation")}
    )


def _link_bytes_per_s(config: PlanConfig, run: MicroBatchWork, group: str, ranks: int = 0) -> float:
    """Return what one rank of a group sends a second.

    Megatron-Core places tensor ranks side by side, then context ranks, then replicas; stages are farthest apart. A
    group inside a node uses the node's links. Rings over nodes use the ports of all their ranks in a node.
    """
    cluster, layout = config.cluster, run.layout
    node, ports = cluster.gpus_per_node, 1
    near = {"tp": layout.tensor <= node, "cp": layout.tensor * layout.context <= node}.get(group, False)
    if group == "dp":
        near, ports = layout.tensor * ranks <= node and layout.pipeline == 1, max(1, min(ranks, node // layout.tensor))
    across = min(cluster.node_gb_per_s, ports * cluster.network_gb_per_s)
    return (cluster.node_gb_per_s if near else across) * 1e9 * config.plan.link_efficiency


def schedule_seconds(work: Sequence[Sequence[tuple[float, float]]]) -> float:
    """Return how long stages take for micro-batches in order under 1F1B; `work` has the seconds (forward, backward) of
    each on each stage. Stage s of p runs p - s - 1 forward passes first, then forward and backward in turn.
    """
    count, stages = len(work), len(work[0])
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, count)
        steady = [pair for k in range(count - ahead) for pair in ((0, k + ahead), (1, k))]
        orders.append([(0, k) for k in range(ahead)] + steady + [(1, k) for k in range(count - ahead, count)])
    done, free, place = dict[tuple[int, int, int], float](), [0.0] * stages, [0] * stages
    while len(done) < 2 * count * stages:
        for stage, order in enumerate(orders):
            while place[stage] < len(order):
                backward, k = order[place[stage]]
                before = (backward, k, stage + (1 if backward else -1))
                if backward and stage == stages - 1:
                    before = (0, k, stage)
                if before not in done and (backward or stage > 0):
                    break
                free[stage] = max(free[stage], done.get(before, 0.0)) + work[k][stage][backward]
                done[backward, k, stage], place[stage] = free[stage], place[stage] + 1
    return max(free)
