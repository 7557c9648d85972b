"""The plan's formulas against what is known otherwise: exact parameter counts, live tensors of real layers, torch's own
FLOP formulas."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic.config.load import ConfigError
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ParallelConfig
from elastic.model.model import build_model
from elastic.plan.config import PlanConfig, with_measured
from elastic.plan.flops import backward_flops, forward_flops, layer_flops, model_flops, stage_flops
from elastic.plan.live import LiveBytes, ProductFlops
from elastic.plan.memory import optimizer_bytes, rank_parameters, saved_bytes, stage_memory
from elastic.plan.moved import loss_moved
from elastic.plan.phases import budget_samples, phase_plans
from elastic.plan.run_plan import run_plan
from elastic.plan.search import candidate, chosen, run_problems
from elastic.plan.timing import CAUSES, PASSES, schedule_seconds
from elastic.plan.traffic import micro_batch_traffic, moved_bytes
from elastic.plan.work import KernelSet, LayerWork, MicroBatchWork
from elastic.space.axes import Axis
from elastic.space.cost import layer_cost, shape_cost
from elastic.space.gates import Execution, Gates
from elastic.space.shape import ModelShape, Subnet
from elastic.space.space import AxisChoices, Space
from elastic.verbs.inputs import load_run
from elastic.world.groups import Layout, world
from tests.unit.config.test_conf_files import compose_once

BATCH, LENGTH = 2, 160  # not a multiple of the PyTorch scan's chunk: padding counts


def small_shape(pattern: str) -> ModelShape:
    """A parent whose sizes are all different, so that no term can stand in for another."""
    return ModelShape.uniform(
        pattern, vocab=256, hidden=64, ffn=256, mamba_heads=16, head_channels=12, mamba_groups=4, mamba_state=20,
        conv_kernel=4, attention_heads=8, kv_heads=4, attention_channels=24,
    )  # fmt: skip


def space() -> Space:
    """One layer of each kind, and a choice on every width."""
    choices = {
        Axis.HIDDEN: AxisChoices((64, 48)),
        Axis.FFN: AxisChoices((256, 192), per_layer=True),
        Axis.MAMBA_HEAD: AxisChoices((16, 12)),
        Axis.MAMBA_CHANNEL: AxisChoices((12, 8)),
        Axis.ATTENTION_HEAD: AxisChoices((8, 4)),
    }
    return Space(small_shape("M-*"), choices)


def small_run(execution: Execution, dtype: torch.dtype) -> tuple[MicroBatchWork, Gates]:
    """One micro-batch in one process, at the smaller widths where it is sliced."""
    here = space()
    subnet = here.subnet({axis: (1,) * here.num_slots(axis) for axis in here.elastic_axes()})
    if execution is Execution.SLICE:
        gates = Gates.slice(subnet)
    else:
        sizes = {axis: (here.num_slots(axis), len(here.axes[axis].choices)) for axis in here.elastic_axes()}
        gates = Gates.mask({axis: torch.full(size, 0.5).requires_grad_() for axis, size in sizes.items()})
    layout = Layout(dtype=dtype)
    gated = frozenset(here.elastic_axes())
    work = MicroBatchWork(here.parent, layout, BATCH, LENGTH, execution, subnet, KernelSet.TORCH, here.lanes, gated)
    return work, gates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("execution", list(Execution))
def test_saved_bytes_of_every_layer_are_what_stays_alive(execution: Execution, dtype: torch.dtype) -> None:
    run, gates = small_run(execution, dtype)
    with world(run.layout), LiveBytes() as live:
        model = build_model(space(), run.layout).train()
        for layer_index, layer in enumerate(model.decoder.layers):
            gate = model.decoder.masks.layers(gates)[layer_index]
            x = torch.randn(LENGTH, BATCH, run.hidden, dtype=dtype, requires_grad=True)
            before = live.bytes
            y = layer(x * 1.0, gate)
            kept = live.bytes - before - y.nbytes
            assert saved_bytes(LayerWork(run, layer_index)) == pytest.approx(kept, rel=0.02)
            del y


@pytest.mark.parametrize("execution", list(Execution))
def test_flops_are_what_torch_counts(execution: Execution) -> None:
    """Only products on both sides; attention unfused, as torch's table knows no fused kernel of the CPU."""
    run, gates = small_run(execution, torch.float32)
    with world(run.layout), sdpa_kernel(SDPBackend.MATH):
        model = build_model(space(), run.layout).train()
        for layer_index, layer in enumerate(model.decoder.layers):
            gate = model.decoder.masks.layers(gates)[layer_index]
            x = torch.randn(LENGTH, BATCH, run.hidden, requires_grad=True)
            with ProductFlops() as counted:
                y = layer(x, gate)
            forward = layer_flops(LayerWork(run, layer_index))
            assert forward.total == pytest.approx(counted.flops, rel=0.02)
            with ProductFlops() as counted:
                y.sum().backward()
            backward = backward_flops(forward, run.kernels)
            assert backward.total == pytest.approx(counted.flops, rel=0.02)


def test_projections_agree_with_the_cost_table() -> None:
    """`space.cost` counts the same products per token, and beside them a convolution and another view of the scan."""
    run, _ = small_run(Execution.MASK, torch.float32)
    work = LayerWork(run, 1)
    _, per_token = layer_cost(run.parent, work.kind, run.parent.layer_widths(work.layer_index), LENGTH)
    assert layer_flops(work).total == per_token * run.tokens
    fused = replace(run, kernels=KernelSet.FUSED)
    attention = LayerWork(fused, 2)
    _, per_token = layer_cost(run.parent, attention.kind, run.parent.layer_widths(attention.layer_index), LENGTH)
    assert layer_flops(attention).total == per_token * run.tokens


def values(name: str, *arguments: str) -> PlanConfig:
    """Load a run as recipes/plan.py does."""
    plain = OmegaConf.to_container(compose_once(name, arguments), resolve=True, throw_on_missing=False)
    assert isinstance(plain, dict)
    return load_run(PlanConfig, {str(key): value for key, value in plain.items()}, Cluster(), is_main=True)


def parallel(config: PlanConfig, **changes: Any) -> ParallelConfig:
    """Change the config's layout."""
    return replace(config.parallel, **changes)


def test_parameters_of_all_ranks_add_up_to_the_12b() -> None:
    parent = values("plan").model.shape()
    for tensor, pipeline in ((1, 1), (8, 1), (4, 2), (2, 4)):
        stages = [rank_parameters(parent, tensor, pipeline, stage) for stage in range(pipeline)]
        whole = sum(sum(elements.values()) for elements in stages)
        replicated = sum(
            count
            for elements in stages
            for name, count in elements.items()
            if name.endswith("norm.weight") and "mixer.norm" not in name
        )
        assert (whole - replicated) * tensor + replicated == shape_cost(parent).params == 12_310_001_152


def test_adam_by_hand() -> None:
    elements = {"mixer.D": 8, "mlp.linear_fc1.weight": 64}
    bf16, fp32 = Layout(dtype=torch.bfloat16), Layout()
    assert optimizer_bytes(elements, bf16) == 64 * 12 + 8 * 8
    assert optimizer_bytes(elements, fp32) == 72 * 8
    assert optimizer_bytes(elements, bf16, 4) == (64 * 12 + 8 * 8) // 4


def test_stages_keep_what_one_f_one_b_keeps() -> None:
    """Stage s of p holds min(p - s, micro-batches); recompute leaves one stream per layer."""
    run, _ = small_run(Execution.MASK, torch.float32)
    run = replace(run, layout=Layout(pipeline=3, recompute="full"))
    first, middle, last = (stage_memory(run, stage, 8, 1) for stage in range(3))
    stream = BATCH * LENGTH * 64 * 4
    assert first.activations == 3 * (stream + stream)  # the gated embedding, too
    assert middle.activations == 2 * stream
    assert last.activations == stream + stream * 2  # the final norm keeps two
    assert last.teacher_hidden == (8 + 1) * stream and first.teacher_hidden == 0
    short = stage_memory(run, 0, 1, 1)
    assert short.activations == 2 * stream


def test_model_flops_by_hand() -> None:
    """6 N T and causal attention of the student; the embedding looks up."""
    run, _ = small_run(Execution.MASK, torch.float32)
    parameters, tokens = shape_cost(run.parent).params - 256 * 64, BATCH * LENGTH
    pairs = LENGTH if run.kernels is KernelSet.TORCH else LENGTH / 2  # PyTorch's products leave out nothing
    assert model_flops(run) == 6 * parameters * tokens + 3 * 4 * tokens * pairs * 8 * 24


def test_loss_moves_its_logits_and_its_head_by_hand() -> None:
    run, _ = small_run(Execution.MASK, torch.bfloat16)
    tokens, vocab, hidden, chunks = BATCH * LENGTH, 256, 64, 5
    found = loss_moved(run, 64 + 1)  # the last chunk of 320 tokens has 60
    # Two fp32 logits written, read for the statistics and for the gradient; that, in bf16, written and read twice.
    assert found.elementwise == tokens * vocab * (2 * 4 + 2 * 4 + 2 * 4 + 3 * 2)
    # The sum read and written by a product, of a cut head in its columns.
    assert found.accumulation == vocab * hidden * chunks * 8
    cut, _ = small_run(Execution.SLICE, torch.bfloat16)
    assert cut.hidden < hidden
    assert loss_moved(cut, 64 + 1).accumulation == vocab * cut.hidden * chunks * 8


def test_stages_wait_as_1f1b_has_it() -> None:
    """m + p - 1 turns of equal work; and two stages that wait for each other's forward passes, by hand."""
    assert schedule_seconds([[(1.0, 2.0)] * 4] * 6) == pytest.approx((6 + 4 - 1) * 3.0)
    assert schedule_seconds([[(1.0, 2.0)]] * 6) == 18.0
    # Stage 0: F1 to 1, F2 to 4, B1 to 6, B2 from 13 to 19. Stage 1: F1 from 1, B1 from 2 to 4, F2 to 7, B2 to 13.
    small, large = [(1.0, 2.0)] * 2, [(3.0, 6.0)] * 2
    assert schedule_seconds([small, large]) == 19.0
    assert schedule_seconds([small, large, small, large]) > schedule_seconds([small, small, large, large])


def test_seconds_add_up_and_every_cause_is_there() -> None:
    config = values("plan")
    chosen = candidate(config, config.parallel, config.data.micro_batch, budget_samples(config, config.space()))
    for plan in chosen.plans:
        assert {cause for _, cause in plan.time.parts} <= set(CAUSES) and {name for name, _ in plan.time.parts} <= set(
            PASSES
        )
        assert plan.time.total == pytest.approx(sum(plan.time.of(cause) for cause in CAUSES))
        work = [plan.flops(stage).matmul for stage in range(2)]
        products = max(work) * plan.micro_batches / (989e12 * config.plan.matmul_efficiency)
        assert plan.time.of("products") >= 0.8 * products and plan.time.of("waiting") > 0
    # Nothing of these numbers is hidden: a GPU of boundless speed still waits for its host.
    fast = replace(config.cluster, peak_tflops=1e8, memory_gb_per_s=1e8, node_gb_per_s=1e8, network_gb_per_s=1e8)
    (idle, _) = phase_plans(replace(config, cluster=fast), config.parallel, 1, budget_samples(config, config.space()))
    assert idle.time.of("launches") > 0.8 * (idle.time.total - idle.time.of("waiting"))


def test_what_overlaps_is_hidden_and_no_more() -> None:
    """The teacher's pass takes longer than the gather, and one backward pass about as long as the reduction; a replica
    with one micro-batch a step ends with whatever budget it drew."""
    exposed = {}
    for name, overlap, num_gpus in (("off", "false", 512), ("on", "true", 512), ("apart", "true", 8192)):
        config = values(
            "plan", f"optim.overlap_grad_reduce={overlap}", f"optim.overlap_param_gather={overlap}",
            f"cluster.num_gpus={num_gpus}",
        )  # fmt: skip
        plan = phase_plans(config, config.parallel, 1, budget_samples(config, config.space()))[1]
        exposed[name] = [plan.time.of(cause) for cause in ("gradients", "weights")]
    assert min(exposed["off"]) > 0 and exposed["on"] == [0.0, 0.0]
    assert exposed["apart"][0] > 0.9 * exposed["off"][0] and exposed["apart"][1] == 0.0


def test_measured_figures_take_the_place_of_assumed_ones(tmp_path: Path) -> None:
    config, file = values("plan"), tmp_path / "gpu.json"
    assert with_measured(config)[0] is config
    measured = {"card": "NVIDIA H100 80GB HBM3", "matmul_tflops": 494.5, "copy_tb_per_s": 1.675, "launch_us": 3.5}
    file.write_text(json.dumps(measured | {"cases": []}))
    config = replace(config, plan=replace(config.plan, measured=str(file)))
    plan, sources = with_measured(config)
    found = plan.plan.matmul_efficiency, plan.plan.memory_efficiency, plan.plan.launch_us
    assert found == pytest.approx((0.5, 0.5, 3.5)) and plan.plan.scan_efficiency == config.plan.scan_efficiency
    names = {name for name, source in sources.items() if source.startswith("measured on NVIDIA H100 80GB HBM3")}
    assert names == {"matmul_efficiency", "memory_efficiency", "launch_us"}
    assert all(sources[name].startswith("assumed: ") for name in sources.keys() - names)
    for bad, message in (
        (measured | {"card": "NVIDIA H200"}, r"measured on NVIDIA H200, the cluster has h100 \(cluster.gpu\)"),
        (measured | {"launch_us": 0}, "no positive number under launch_us"),
        (measured | {"matmul_tflops": "650"}, "no positive number under matmul_tflops"),
        ([], "no name of a GPU under card"),
        (None, "is not JSON"),
    ):
        file.write_text("{" if bad is None else json.dumps(bad))
        with pytest.raises(ConfigError, match=rf"plan\.measured = .*{message}"):
            run_plan(config, Console(file=io.StringIO()))
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        with_measured(config)


def test_a_slice_does_less_and_a_mask_does_not() -> None:
    mask, slice_ = (small_run(execution, torch.float32)[0] for execution in (Execution.MASK, Execution.SLICE))
    full = replace(slice_, subnet=Subnet.full(mask.parent))
    assert stage_flops(mask, 0) == stage_flops(full, 0)
    assert forward_flops(slice_, 0).total < 0.75 * forward_flops(mask, 0).total
    assert slice_.teacher == mask.teacher


def test_traffic_by_hand() -> None:
    """One MLP layer between the ends: streams of T x D, gathered twice in backward under sequence parallelism."""
    run, _ = small_run(Execution.MASK, torch.float32)
    middle = replace(run, layout=Layout(tensor=2, pipeline=3, sequence=True))
    stream, half = BATCH * LENGTH * 64 * 4, BATCH * LENGTH * 64 * 4 // 2
    assert micro_batch_traffic(middle, 1) == {
        ("tp", "all_gather"): 4 * stream,  # teacher, student, backward: the gradient and the input again
        ("tp", "reduce_scatter"): 3 * stream,
        ("pp", "send"): 3 * half,
    }
    plain = replace(run, layout=Layout(tensor=2, pipeline=3))
    assert micro_batch_traffic(plain, 1)["tp", "all_reduce"] == 3 * stream
    assert moved_bytes("all_reduce", 100.0, 4) == 150.0 and moved_bytes("all_gather", 100.0, 4) == 75.0


@pytest.mark.parametrize("num_gpus", [16, 64, 256, 512])
def test_the_12b_run_fits_with_a_tenth_to_spare(num_gpus: int) -> None:
    one_for_both = ("curriculum.0.parallel=null", "curriculum.1.parallel=null") if num_gpus < 64 else ()
    config = values("plan", f"cluster.num_gpus={num_gpus}", *one_for_both)
    assert run_problems(config) == ()
    own = chosen(config, budget_samples(config, config.space()))
    assert max(plan.phase.sequence_length for plan in own.plans) == 49_152
    assert own.peak_bytes / 1e9 + 3.0 <= 0.9 * 80.0
    short, long = own.plans
    if one_for_both:
        return
    assert short.layout.context == 1 and short.layout.recompute != "full" and short.layout != long.layout
    assert num_gpus < 512 or short.time.total <= 5.5
