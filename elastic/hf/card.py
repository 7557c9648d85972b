"""Render the README.md of an exported folder: what was cut, what it costs, where it comes from, how it was checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from elastic.hf.config import STOCK_VERSIONS, export_shape, export_warnings, stock_notes
from elastic.hf.export_settings import DTYPE_NAMES, ExportSettings
from elastic.space.cost import Budget, Deployment, in_figures, shape_cost, subnet_cost
from elastic.space.shape import ModelShape, Subnet


@dataclass(frozen=True)
class CardInfo:
    """What the card says beside the sizes: the cut, and where it comes from (free text).

    A model that was not cut is the full subnet of itself. `fp8` is for the card of a folder in FP8: what that means.
    """

    title: str
    parent: ModelShape
    subnet: Subnet
    budget: Budget | None = None
    deployment: Deployment = field(default_factory=Deployment)
    provenance: Mapping[str, str] = field(default_factory=dict)
    fp8: str | None = None


def model_card(info: CardInfo, shape: ModelShape, exports: ExportSettings, verification: str, num_bytes: int) -> str:
    """Return the card of a Hugging Face folder, whose tensors have `num_bytes`, as Markdown with front matter."""
    notes = "".join(f" {note[0].upper()}{note[1:]}." for note in stock_notes(shape))
    warnings = export_warnings(shape)
    stored = [
        _padding(shape),
        "" if info.fp8 is None else f"## FP8\n\n{info.fp8}",
        "\n- ".join(["## Kernel notes\n", *warnings]) if warnings else "",
    ]
    use = (
        f"{STOCK_VERSIONS}{notes}\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n```'
    )
    number_format = DTYPE_NAMES[exports.dtypes.main] + ("" if info.fp8 is None else ", matrices of the layers in FP8")
    padded = "parameters stored, with zero padding and a tied head's copy (`stored_params`)"
    sizes = [(padded, f"{shape_cost(shape).stored_params:,}"), *_stored_rows(info, shape, {number_format: num_bytes})]
    reader = "transformers", "stock transformers"
    return _card(info, shape, exports, reader, number_format, sizes, stored, verification, use)


def gguf_card(
    info: CardInfo,
    shape: ModelShape,
    exports: ExportSettings,
    files: Mapping[str, str],
    verification: str,
    num_bytes: Mapping[str, int],
) -> str:
    """Return the card of a folder of GGUF files: name of each file, and the format of its matrices; the bytes of the
    tensors in a file of each format.
    """
    use = (
        "Matrices have the format in a file's name (rows that Q8_0 cannot cut into blocks of 32 have f16), vectors, "
        "norms, convolutions, A and D have f32. Nothing is padded: FFN widths stand layer by layer.\n\n"
        f"```text\nllama-cli -m {next(iter(files))} -p TEXT\n```"
    )
    number_format = ", ".join(f"{kind} ({name})" for name, kind in files.items())
    sizes = _stored_rows(info, shape, {f"{kind}, {name}": num_bytes[kind] for name, kind in files.items()})
    return _card(info, shape, exports, ("gguf", "llama.cpp"), number_format, sizes, [], verification, use)


def _card(
    info: CardInfo,
    shape: ModelShape,
    exports: ExportSettings,
    reader: tuple[str, str],
    number_format: str,
    sizes: list[tuple[str, str]],
    stored: Sequence[str],
    verification: str,
    use: str,
) -> str:
    """Return the card: what all formats share, and between it what a format's reader (tag, name) must know, and rows of
    what is stored.
    """
    tags = [f"library_name: {reader[0]}", "pipeline_tag: text-generation", "tags:", "- nemotron_h", "- elastic"]
    front = ["---", *(f"{key}: {value}" for key, value in exports.settings.license.items()), *tags, "---"]
    sections = [
        "\n".join(front),
        f"# {info.title}\n\nA hybrid of Mamba-2, attention and MLP layers, loadable with {reader[1]}.",
        "## Sizes\n\n" + _table(_size_rows(info, shape, number_format)),
        "## Cost\n\n" + _table(_cost_rows(info, shape, sizes)),
        *stored,
        "## Provenance\n\n" + (_table(list(info.provenance.items())) if info.provenance else "Not given."),
        f"## Verification\n\n{verification}",
        f"## Use\n\n{use}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _table(rows: list[tuple[str, str]], head: tuple[str, str] = ("what", "value")) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in [head, ("---", "---"), *rows])


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
    parents, kept = _sizes(info.parent), info.subnet.kept_layers
    dropped = [str(layer) for layer in range(len(info.parent.pattern)) if layer not in kept]
    return [
        *(
            (name, size if size == parents[name] else f"{size} (parent {parents[name]})")
            for name, size in _sizes(shape).items()
        ),
        ("number format", dtype),
        ("parent layers left out", ", ".join(dropped) or "none"),
    ]


def _stored_rows(info: CardInfo, shape: ModelShape, num_bytes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return what the weights take as they are stored, by format, and with the caches of the deployment."""
    deployment = info.deployment
    used = shape_cost(shape, deployment)
    caches = float(used.kv_bytes + used.ssm_bytes + used.conv_bytes)
    elements = f"{deployment.kv_bytes:g}, {deployment.ssm_bytes:g} and {deployment.conv_bytes:g} bytes a number"
    where = f"{_where(deployment)}, KV, SSM and conv of {elements}"
    rows = [(f"weights as stored ({name})", _size(own)) for name, own in num_bytes.items()]
    return rows + [
        (f"weights as stored ({n}) and caches ({where})", _size(own + caches)) for n, own in num_bytes.items()
    ]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.3f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.2f} MiB"


def _where(deployment: Deployment) -> str:
    return f"batch {deployment.batch}, {deployment.length_tokens} tokens"


def _cost_rows(info: CardInfo, shape: ModelShape, sizes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    cost, deployment = shape_cost(shape, info.deployment), info.deployment
    where = _where(deployment)
    rows = [
        ("parameters (what budgets in `params` count)", f"{cost.params:,}"),
        *sizes,
        ("forward FLOPs per token", f"{cost.flops_per_token:.3e}"),
    ]
    if (table := deployment.latency) is not None and cost.latency_ms is not None:
        times = f"{cost.latency_ms:.4g} ms, {cost.tokens_per_s:,.4g} tokens/s"
        rows.append((f"{deployment.timed} ({where}), by times of layers on {table.machine.device}", times))
    if (budget := info.budget) is not None:
        # The budget was met by the subnet as trained; its vocabulary may hold rows that the export leaves out.
        share = subnet_cost(info.parent, info.subnet, deployment)[budget.metric] / budget.limit
        rows.insert(
            0, (f"budget {budget.name}", f"{in_figures(budget.metric, budget.limit)} {budget.metric}, used {share:.1%}")
        )
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
    return f"## Padding\n\n{text}\n\n" + _table(rows, ("width", "layers as chosen -> as stored"))
