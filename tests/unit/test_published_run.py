"""The run of the paper: what is published is what the config says, and its choices reach every budget, legally."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from elastic.compress.hf_config import export_warnings
from elastic.router.draw import GateSource, decide
from elastic.router.phases import Curriculum
from elastic.router.router import Router
from elastic.space.axes import Axis, Space
from elastic.space.budget import Budget
from elastic.space.cost import Metric, shape_cost, subnet_cost
from elastic.space.gates import Execution
from elastic.space.pattern import LayerKind
from elastic.space.reach import sample_subnet, smallest_subnet
from elastic.space.shape import ModelShape
from elastic.space.subnet import Subnet
from elastic.train.config import CostConfig, ElasticConfig, PretrainConfig
from elastic.train.config_load import load
from elastic.train.config_rules import load_and_check
from elastic.train.config_rules_layout import Cluster
from elastic.train.run_cost import start_cost
from recipes._common import CONF
from tests.unit.test_conf_files import STARTED_ON, composed

FAMILY_BUDGETS = sorted(file.stem for file in (CONF / "budgets").glob("nemotron_elastic*.yaml"))
NINE = ("model=nemotron_nano_v2_9b", "space=nemotron_nano_v2_9b", "budgets=nemotron_nano_v2_9b")
TENSOR_PARALLEL = (1, 2, 4, 8)
NANO_4B_PATTERN = "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-"


def priced(*arguments: str) -> CostConfig:
    """Load elastic_12b, changed, as the verb cost does."""
    return load_and_check(CostConfig, composed("elastic_12b", *arguments), Cluster())


@pytest.fixture(scope="module")
def run() -> ElasticConfig:
    """Return the whole run as training checks it on 64 nodes of 8 GPUs."""
    return load_and_check(ElasticConfig, composed("elastic_12b"), STARTED_ON["elastic_12b"])


@pytest.mark.parametrize(
    ("model", "params", "layers"),
    [
        ("nemotron_nano_v2_12b", 12_310_001_152, (28, 28, 6)),
        ("nemotron_nano_v2_9b", 8_888_227_328, (27, 25, 4)),
        ("nemotron_3_nano_4b", 3_973_556_832, (21, 17, 4)),
    ],
)
def test_published_models_count_exactly(model: str, params: int, layers: tuple[int, int, int]) -> None:
    shape = load(PretrainConfig, composed("pretrain_parent", f"model={model}")).parent_shape()
    assert shape_cost(shape).params == params
    kinds = (LayerKind.MAMBA, LayerKind.MLP, LayerKind.ATTENTION)
    assert tuple(len(shape.pattern.layers_of(kind)) for kind in kinds) == layers


def test_phases_are_the_published_ones(run: ElasticConfig) -> None:
    short, long = run.curriculum
    assert [(p.sequence_length, p.global_batch, p.tokens) for p in (short, long)] == [
        (8_192, 1_536, 65_000_000_000),
        (49_152, 512, 45_000_000_000),
    ]
    # 65e9 / (8192 x 1536) = 5165.7, 45e9 / (49152 x 512) = 1788.1: the first whole step that has seen the tokens.
    assert [phase.num_steps for phase in (short, long)] == [5_166, 1_789]
    assert short.budget_weights == {"12b": 1, "9b": 1, "6b": 1}
    assert long.budget_weights == {"12b": 0.5, "9b": 0.3, "6b": 0.2}
    assert (short.temperature, short.logit_scale) == ((1.0, 0.05), (1.0, 10.0))


def test_learning_rates_are_the_published_ones_and_go_on_between_the_phases(run: ElasticConfig) -> None:
    curriculum = run.curriculum_phases()
    short, long = curriculum.phases
    rates = [curriculum.at(step).learning_rate for step in (0, 59, 60, 5_165, 5_166, 5_166 + 1_788)]
    assert rates == pytest.approx([9e-5 / 60, 9e-5, 9e-5, 9e-5, 9e-5, 9e-6])
    router = [curriculum.at(step).router_learning_rate for step in (0, 59, 60, 5_165)]
    assert router == pytest.approx([1e-2 / 60, 1e-2, 1e-2, 1e-2])
    assert (short.learning_rate.warmup_steps, short.router_learning_rate.warmup_steps) == (60, 60)
    ends = [(curriculum.at(step).temperature, curriculum.at(step).logit_scale) for step in (0, 5_165, 5_166)]
    assert ends == [pytest.approx(pair) for pair in ((1.0, 1.0), (0.05, 10.0), (0.05, 10.0))]
    # Ours: the second phase trains decided subnets.
    assert (short.router_frozen, short.execution) == (False, Execution.MASK)
    assert (long.router_frozen, long.execution) == (True, Execution.SLICE)


def test_the_other_reading_of_the_second_phase_is_one_line_of_overrides() -> None:
    overrides = [
        word
        for line in (CONF / "curriculum" / "nemotron_elastic.yaml").read_text(encoding="utf-8").splitlines()
        for word in line.lstrip("# ").split()
        if word.startswith("curriculum.1.")
    ]
    values = composed("elastic_12b", *overrides)
    _, long = load_and_check(ElasticConfig, values, STARTED_ON["elastic_12b"]).curriculum_phases().phases
    assert (long.router_frozen, long.execution, long.router_learning_rate.peak) == (False, Execution.MASK, 1e-2)
    assert len(overrides) == 4 and long.router_learning_rate.minimum == 1e-2


def test_distillation_and_router_are_the_published_ones(run: ElasticConfig) -> None:
    distill, router = run.distill, run.elastic.router
    assert (distill.kl_weight, distill.cross_entropy_weight, distill.temperature) == (1.0, 0.0, 1.0)
    assert (router.hidden_width, router.budget_loss_weight) == (256, 1.0)
    assert (run.optim.adam_beta1, run.optim.adam_beta2) == (0.9, 0.98)
    assert (run.optim.weight_decay, run.optim.clip_grad) == (0.0, 1.0)
    assert [(b.name, b.metric, b.target) for b in run.elastic.budgets] == [
        ("12b", Metric.PARAMS, 12_310_001_152),
        ("9b", Metric.PARAMS, 8.9e9),
        ("6b", Metric.PARAMS, 6.0e9),
    ]


@pytest.mark.parametrize("num_processes", [16, 32, 64, 128, 256, 512])
def test_the_run_starts_on_2_to_64_nodes(num_processes: int) -> None:
    load_and_check(ElasticConfig, composed("elastic_12b"), Cluster(num_processes, has_gpu=True))


def exported(space: Space, hidden: int, ffn: int, heads: int, channels: int, queries: int) -> ModelShape:
    """Return the parent at one width per axis, all layers kept."""
    kinds = space.parent.pattern.kinds
    return Subnet(
        hidden=hidden,
        ffn=(ffn,) * kinds.count(LayerKind.MLP),
        mamba_heads=(heads,) * kinds.count(LayerKind.MAMBA),
        head_channels=channels,
        attention_heads=(queries,) * kinds.count(LayerKind.ATTENTION),
        kept_layers=tuple(range(len(kinds))),
    ).shape(space.parent)


WIDTH_AXES = (Axis.HIDDEN, Axis.FFN, Axis.MAMBA_HEAD, Axis.MAMBA_CHANNEL, Axis.ATTENTION_HEAD)


@pytest.mark.parametrize("ranks", TENSOR_PARALLEL)
def test_every_choice_is_legal_for_the_kernels_at_every_tensor_parallel_size(ranks: int) -> None:
    """All 1,080 combinations. One thing may stay uneven, and only where the space's comment says so: in_proj's rows on
    a rank whose Mamba heads are not a multiple of 8, which costs a copy."""
    space = priced().space()
    for widths in product(*(space.axes[axis].choices for axis in WIDTH_AXES)):
        warnings = export_warnings(exported(space, *widths), ranks)
        uneven = [text for text in warnings if text.startswith("in_proj rows")]
        assert warnings == uneven, (widths, warnings)
        assert bool(uneven) == (widths[2] // ranks % 8 != 0), widths
    clean = {1: {128, 112, 96}, 2: {128, 112, 96}, 4: {128, 96}, 8: {128}}
    assert {heads for heads in space.axes[Axis.MAMBA_HEAD].choices if heads // ranks % 8 == 0} == clean[ranks]


def test_every_choice_splits_over_ranks_in_whole_groups_tiles_and_scales() -> None:
    """Beyond what kernels need: hidden and one of 8 ranks' FFN are whole groups of 128 (int4 scales), heads spread over
    tensor 8 x context 2, and lanes, groups and KV heads over 8 ranks."""
    space = priced().space()
    parent, choices = space.parent, {axis: space.axes[axis].choices for axis in Axis}
    assert all(width % 128 == 0 for width in choices[Axis.HIDDEN])
    assert all(width % (8 * 128) == 0 for width in choices[Axis.FFN]) and space.lanes == 8
    assert all(heads % 16 == 0 and heads % parent.mamba_groups == 0 for heads in choices[Axis.MAMBA_HEAD])
    assert all(channels % 8 == 0 for channels in choices[Axis.MAMBA_CHANNEL])
    assert all(heads % parent.kv_heads == 0 for heads in choices[Axis.ATTENTION_HEAD])
    assert parent.mamba_groups % 8 == 0 and parent.kv_heads % 8 == 0


def test_the_published_neighbours_are_legal_or_say_what_is_not() -> None:
    """The 9B's FFN of 15680 is what the choices leave out: one of 8 ranks has 1960 of it."""
    space = priced().space()
    assert 4480 in space.axes[Axis.HIDDEN].choices and 128 in space.axes[Axis.MAMBA_HEAD].choices
    own = exported(space, 4480, 15_680, 128, 80, 40)
    assert [export_warnings(own, ranks) for ranks in (1, 2, 4)] == [[], [], []]
    (warning,) = export_warnings(own, 8)
    assert warning == "ffn = 15680 is not a multiple of 16 on each of 8 tensor-parallel ranks, which FP8 kernels need"
    assert 15_680 not in space.axes[Axis.FFN].choices and 15_360 in space.axes[Axis.FFN].choices


def rankings(num_layers: int, count: int) -> list[tuple[int, ...]]:
    """Return the ranking that drops the last layers, that which drops the first, and random ones."""
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(torch.randperm(num_layers, generator=generator).tolist()) for _ in range(count)]
    return [tuple(range(num_layers)), tuple(range(num_layers))[::-1], *drawn]


@pytest.mark.parametrize("file", FAMILY_BUDGETS)
def test_every_budget_is_met_within_a_percent_whichever_layers_leave(file: str) -> None:
    config = priced(f"budgets={file}")
    deployment = config.deployment()
    for ranking in rankings(62, 6):
        space = config.space(ranking)
        for budget in config.budgets():
            sample = sample_subnet(space, budget, deployment)
            used = subnet_cost(space.parent, sample.subnet, deployment)[budget.metric]
            assert abs(used / budget.target - 1) <= 0.01, (file, budget, ranking)
            assert set(sample.subnet.ffn) <= set(space.axes[Axis.FFN].choices)


@pytest.mark.parametrize("file", FAMILY_BUDGETS)
def test_extremes_and_a_fresh_router_lie_around_the_targets(file: str) -> None:
    """The parent meets its own budget exactly (pitfall 10); the router starts between 9b and 6b, so that one budget
    pulls it up and the other down, far from both extremes."""
    config = priced(f"budgets={file}")
    space, deployment = config.space(), config.deployment()
    full, nine, six = config.budgets()
    metric = full.metric
    assert [budget.name for budget in (full, nine, six)] == ["12b", "9b", "6b"]
    assert subnet_cost(space.parent, Subnet.full(space.parent), deployment)[metric] == full.target
    low = subnet_cost(space.parent, smallest_subnet(space), deployment)[metric]
    start = float(start_cost(space, deployment)[metric])
    assert low < 0.9 * six.target and six.target < start < nine.target < 0.9 * full.target


@pytest.mark.parametrize("file", FAMILY_BUDGETS)
def test_the_variants_describe_the_same_family(file: str) -> None:
    """Whatever the metric, 9b and 6b come out near 8.9B and 6.0B parameters."""
    config = priced(f"budgets={file}")
    space, deployment = config.space(), config.deployment()
    sizes = {b.name: sample_subnet(space, b, deployment).cost.params / 1e9 for b in config.budgets()}
    assert sizes == {"12b": 12.310001152, "9b": pytest.approx(8.9, rel=0.04), "6b": pytest.approx(6.0, rel=0.04)}


def test_sample_subnets_cut_all_axes_alike() -> None:
    config = priced()
    space = config.space()
    for budget in config.budgets():
        subnet = sample_subnet(space, budget, config.deployment()).subnet
        widths = {
            Axis.HIDDEN: subnet.hidden,
            Axis.FFN: subnet.ffn[0],
            Axis.MAMBA_HEAD: subnet.mamba_heads[0],
            Axis.MAMBA_CHANNEL: subnet.head_channels,
            Axis.ATTENTION_HEAD: subnet.attention_heads[0],
            Axis.DEPTH: len(subnet.kept_layers),
        }
        ends = {axis: (space.axes[axis].choices[0], space.axes[axis].choices[-1]) for axis in widths}
        shares = [(ends[axis][0] - width) / (ends[axis][0] - ends[axis][1]) for axis, width in widths.items()]
        assert max(shares) - min(shares) <= 0.5, (budget.name, widths)


def test_the_9b_as_a_parent_holds_the_published_4b() -> None:
    """Its space contains the one published outcome of a router, layer for layer and parameter for parameter."""
    config = priced(*NINE)
    pattern = str(config.parent_shape().pattern)
    kept: list[int] = []
    for kind in NANO_4B_PATTERN:
        kept.append(pattern.index(kind, kept[-1] + 1 if kept else 0))
    space = config.space((*kept, *(layer for layer in range(56) if layer not in kept)))
    published = {
        Axis.HIDDEN: 3136, Axis.FFN: 12_544, Axis.MAMBA_HEAD: 96, Axis.MAMBA_CHANNEL: 80,
        Axis.ATTENTION_HEAD: 40, Axis.DEPTH: 42,
    }  # fmt: skip
    chosen = {axis: (space.axes[axis].choices.index(w),) * space.num_slots(axis) for axis, w in published.items()}
    subnet = space.subnet(chosen)
    assert str(subnet.shape(space.parent).pattern) == NANO_4B_PATTERN
    assert subnet_cost(space.parent, subnet).params == 3_973_556_832
    for ranking in rankings(56, 4):
        for budget in config.budgets():
            sample = sample_subnet(config.space(ranking), budget, config.deployment())
            assert abs(sample.cost.params / budget.target - 1) <= 0.01


def test_each_budget_file_says_its_bytes_per_element() -> None:
    """bf16 2, FP8 1, int4 half a byte and a 2-byte scale for each 128; the state-space state stays fp32."""
    assert len(FAMILY_BUDGETS) == 5
    settings = {
        file.removeprefix("nemotron_elastic"): priced(f"budgets={file}").deployment() for file in FAMILY_BUDGETS
    }
    bytes_of = {name: (d.weight_bytes, d.kv_bytes, d.ssm_bytes, d.conv_bytes) for name, d in settings.items()}
    assert bytes_of == {
        "": (2, 2, 4, 2),
        "_weight_bytes": (2, 2, 4, 2),
        "_deploy_bf16": (2, 2, 4, 2),
        "_deploy_fp8": (1, 1, 4, 2),
        "_deploy_int4": (0.5 + 2 / 128, 1, 4, 2),
    }
    deployed = [settings[f"_deploy_{precision}"] for precision in ("bf16", "fp8", "int4")]
    assert {(d.batch, d.length_tokens) for d in deployed} == {(8, 32_768)}


def test_the_parent_costs_what_paper_and_pencil_say() -> None:
    """KV: 6 layers x keys and values x 8 heads x 128; state: 28 layers x 10,240 x 128; 4 taps of 12,288 channels."""
    config = priced("budgets=nemotron_elastic_deploy_bf16")
    tokens = 8 * 32_768
    caches = 6 * 2 * 8 * 128 * tokens * 2 + 28 * 10_240 * 128 * 8 * 4 + 28 * 12_288 * 4 * 8 * 2
    assert config.budgets()[0] == Budget("12b", Metric.DEPLOY_BYTES, 2 * 12_310_001_152 + caches)


def test_comments_name_only_options_that_exist() -> None:
    """What the comments tell the user to type is there."""
    for file in Path(CONF).rglob("nemotron_*.yaml"):
        for word in file.read_text(encoding="utf-8").replace(",", " ").split():
            group, _, option = word.rstrip(").").lstrip("(").partition("=")
            if (CONF / group).is_dir() and group and option:
                assert (CONF / group / f"{option}.yaml").is_file(), f"{file.name}: {word}"


@pytest.mark.slow
@pytest.mark.parametrize("file", FAMILY_BUDGETS)
def test_a_router_reaches_every_budget_of_the_12b(file: str) -> None:
    """Only the budget loss pulls: in 400 steps, of 5,166 in the first phase, the choices end within 1% of all three."""
    config = priced(f"budgets={file}")
    space, deployment, budgets = config.space(), config.deployment(), config.budgets()
    curriculum = Curriculum((replace(config.curriculum_phases().phases[0], num_steps=400),))
    settings = config.elastic.router
    router = Router(space, len(budgets), settings.hidden_width)
    source = GateSource(
        router, space, budgets, deployment, settings.mode, settings.budget_loss_weight, settings.entropy_weight, None, 0
    )
    optimizer = torch.optim.AdamW(router.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(400):
        place = curriculum.at(step)
        optimizer.param_groups[0]["lr"] = place.router_learning_rate
        optimizer.zero_grad()
        loss = source.draw(place, 1, 0, 1).router_loss
        assert loss is not None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(router.parameters(), config.optim.clip_grad)
        optimizer.step()
    for index, budget in enumerate(budgets):
        used = subnet_cost(space.parent, decide(router, space, index), deployment)[budget.metric]
        assert used == pytest.approx(budget.target, rel=0.01), budget.name
