"""Render the README.md of an exported folder: what was cut, what it costs, where it comes from, how it was checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from elastic.hf.config import export_shape, export_warnings, stock_notes, stock_versions
from elastic.space.cost import Budget, Deployment, shape_cost, subnet_cost
from elastic.space.shape import ModelShape, Subnet


@dataclass(frozen=True)
class CardInfo:
    """What the card says beside the sizes. `provenance` is free text: parent checkpoint, tokens trained, data.

    `parent` and `subnet` describe the cut; leave both out for a model that was not cut. `license` holds license fields
    of the front matter.
    """

    title: str
    parent: ModelShape | None = None
    subnet: Subnet | None = None
    budget: Budget | None = None
    deployment: Deployment = field(default_factory=Deployment)
    provenance: Mapping[str, str] = field(default_factory=dict)
    license: Mapping[str, str] = field(default_factory=dict)


def model_card(info: CardInfo, shape: ModelShape, dtype: str, verification: str) -> str:
    """Return the card as Markdown with front matter."""
    sections = [
        _front_matter(info),
        f"# {info.title}\n\nA hybrid of Mamba-2, attention and MLP layers, loadable with stock transformers.",
        "## Sizes\n\n" + _table(("what", "value"), _size_rows(info, shape, dtype)),
        "## Cost\n\n" + _table(("what", "value"), _cost_rows(info, shape)),
        _padding(shape),
        _warnings(shape),
        "## Provenance\n\n" + (_table(("what", "value"), list(info.provenance.items())) or "Not given."),
        f"## Verification\n\n{verification}",
        f"## Use\n\n{stock_versions()}{_notes(shape)}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```',
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(info: CardInfo) -> str:
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- nemotron_h", "- elastic"]
    return "\n".join(["---", *(f"{key}: {value}" for key, value in info.license.items()), *lines, "---"])


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows]]
    return "\n".join(lines) if rows else ""


def _widths(widths: tuple[int, ...]) -> str:
    return str(widths[0]) if len(set(widths)) == 1 else ", ".join(map(str, widths)) or "none"


def _sizes(shape: ModelShape) -> dict[str, str]:
    return {
        "layers": str(len(shape.pattern)),
        "pattern": f"`{shape.pattern}`",
        "hidden": str(shape.hidden),
        "FFN neurons": _widths(shape.ffn),
        "Mamba heads": _widths(shape.mamba_heads),
        "Mamba channels of a head": str(shape.head_channels),
        "Mamba groups, state": f"{shape.mamba_groups}, {shape.mamba_state}",
        "query heads": _widths(shape.attention_heads),
        "KV heads, channels": f"{shape.kv_heads}, {shape.attention_channels}",
        "vocabulary": f"{shape.vocab}" + (", tied head" if shape.tied_embeddings else ""),
    }


def _size_rows(info: CardInfo, shape: ModelShape, dtype: str) -> list[tuple[str, str]]:
    """Return one row per size; a size that was cut also shows the parent's."""
    ours = _sizes(shape)
    parents = _sizes(info.parent) if info.parent is not None else ours
    rows = [
        (name, size if size == parents[name] else f"{size} (parent {parents[name]})") for name, size in ours.items()
    ]
    rows.append(("number format", dtype))
    if info.subnet is not None and info.parent is not None:
        kept = set(info.subnet.kept_layers)
        dropped = [str(layer) for layer in range(len(info.parent.pattern)) if layer not in kept]
        rows.append(("parent layers left out", ", ".join(dropped) or "none"))
    return rows


def _cost_rows(info: CardInfo, shape: ModelShape) -> list[tuple[str, str]]:
    cost, deployment = shape_cost(shape, info.deployment), info.deployment
    where = f"batch {deployment.batch}, {deployment.length_tokens} tokens"
    rows = [
        ("parameters (what budgets in `params` count)", f"{cost.params:,}"),
        ("parameters stored, with zero padding and a tied head's copy (`stored_params`)", f"{cost.stored_params:,}"),
        (f"weights and caches ({where})", f"{cost.deploy_bytes / 2**30:.3f} GiB"),
        ("forward FLOPs per token", f"{cost.flops_per_token:.3e}"),
    ]
    if info.budget is not None:
        budget = info.budget
        # The budget was met by the subnet as trained; its vocabulary may hold rows that the export leaves out.
        if info.parent is not None and info.subnet is not None:
            cost = subnet_cost(info.parent, info.subnet, deployment)
        share = cost[budget.metric] / budget.limit
        rows.insert(0, (f"budget {budget.name}", f"{budget.limit:,.0f} {budget.metric}, used {share:.1%}"))
    return rows


def _padding(shape: ModelShape) -> str:
    padded = export_shape(shape)
    if padded == shape:
        return ""
    rows = [
        ("FFN neurons", f"{_widths(shape.ffn)} -> {_widths(padded.ffn)}"),
        ("query heads", f"{_widths(shape.attention_heads)} -> {_widths(padded.attention_heads)}"),
    ]
    text = (
        "Stock code knows one width for all layers of a kind. Narrower layers carry zeros up to the widest (FFN "
        "neurons and query heads whose output is exactly 0): the function is the subnet's, the stored size that of "
        "the padded layers."
    )
    return f"## Padding\n\n{text}\n\n" + _table(("width", "layers as chosen -> as stored"), rows)


def _notes(shape: ModelShape) -> str:
    return "".join(f" {note[0].upper()}{note[1:]}." for note in stock_notes(shape))


def _warnings(shape: ModelShape) -> str:
    warnings = export_warnings(shape)
    return "## Kernel notes\n\n" + "\n".join(f"- {warning}" for warning in warnings) if warnings else ""
