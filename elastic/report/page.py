"""One page about a run, from what its folder holds: curves of metrics.jsonl, events, phases, members."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from elastic.report.charts import Chart, Points, number_text, table_html
from elastic.space.axes import AXES, Axis
from elastic.space.cost import Budget, Deployment, in_figures, subnet_cost
from elastic.space.shape import ModelShape, Subnet

Row = Mapping[str, Any]
_MOST_EVENTS = 50
_STYLE = """
:root{color-scheme:light dark;--line:#8884;--text:#1f2937;--soft:#6b7280;--back:#fff;--card:#f8fafc}
@media(prefers-color-scheme:dark){:root{--text:#e5e7eb;--soft:#9ca3af;--back:#111827;--card:#1f2937}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--text);background:var(--back)}
body{margin:24px auto;max-width:1240px;padding:0 16px}
h1{font-size:22px;margin:0}h2{font-size:16px;margin:28px 0 8px}p{margin:4px 0;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px}
figcaption{font-weight:600;margin-bottom:4px}svg{width:100%;height:auto;display:block}
svg text{font:10.5px system-ui,sans-serif;fill:var(--soft)}.grid{stroke:var(--line)}
.phase{stroke:var(--soft);stroke-dasharray:3 3}text.phase{stroke:none}.level{stroke:var(--soft);stroke-dasharray:6 3}
.hover{fill:transparent}.legend span{margin-right:14px;white-space:nowrap}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
table{border-collapse:collapse;display:block;overflow-x:auto}
th,td{padding:4px 12px 4px 0;text-align:right;white-space:nowrap}
th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left}
"""


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a log: JSON objects with a step. A line that a kill cut off, or a note, is none."""
    found: list[Row] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.append(row)
    return found


def curve(rows: Sequence[Row], key: str) -> Points:
    """Return the finite numbers of one column over the steps."""
    return [
        (row["step"], float(row[key])) for row in rows if type(row.get(key)) in (int, float) and math.isfinite(row[key])
    ]


def phase_starts(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Return the first logged step of each phase."""
    found: list[tuple[int, str]] = []
    for row in rows:
        name = row.get("phase")
        if isinstance(name, str) and (not found or found[-1][1] != name):
            found.append((row["step"], name))
    return found


def charts(rows: Sequence[Row]) -> Iterator[Chart]:
    """Yield what a run logged, as far as it did: losses per budget, the router's choices, costs, rates, skips."""
    phases, keys = phase_starts(rows), list(dict.fromkeys(key for row in rows for key in row))

    def of(pattern: str) -> dict[str, Points]:
        matches = ((key, re.fullmatch(pattern, key)) for key in keys)
        return {match[1]: curve(rows, key) for key, match in matches if match is not None}

    yield Chart("training: KL to the parent, nats per token", of(r"train/([^/]+)/kl"), phases)
    yield Chart("training: cross-entropy, nats per token", of(r"train/([^/]+)/cross_entropy"), phases)
    yield Chart("held-out loss, nats per token", of(r"validation/([^/]+)/loss"), phases)
    yield Chart("held-out loss by source", of(r"validation/(.+/loss/.+)"), phases)
    yield Chart("what each budget uses of its target", of(r"router/([^/]+)/cost_ratio"), phases, levels=(1.0,))
    yield Chart("the router's loss per budget", of(r"router/([^/]+)/budget_loss"), phases)
    for axis in Axis:
        over = ", mean over layers" if axis is not Axis.DEPTH and AXES[axis].own else ""
        yield Chart(f"the router's choice: {axis.replace('_', ' ')}{over}", of(rf"router/([^/]+)/width/{axis}"), phases)
    for key in (
        "learning_rate",
        "router_learning_rate",
        "temperature",
        "grad_norm",
        "skipped_steps",
        "tokens_per_s",
        "fill",
    ):
        yield Chart(key.replace("_per_s", " per second").replace("_", " "), {key: curve(rows, key)}, phases)
    yield Chart("epochs of each source", of("epochs/(.+)"), phases)


def member_table(
    parent: ModelShape,
    members: Sequence[tuple[str, Subnet, Budget | None]],
    deployment: Deployment,
    losses: Mapping[str, float],
) -> str:
    """Return the table of (name, subnet, budget): what each costs, what the router chose, its last held-out loss."""
    sizes = [entry.size for entry in AXES.values()]
    rows = []
    for name, subnet, budget in members:
        cost = subnet_cost(parent, subnet, deployment)
        used = "-" if budget is None else f"{float(cost[budget.metric]) / budget.limit:.1%}"
        target = "-" if budget is None else f"{in_figures(budget.metric, budget.limit)} {budget.metric}"
        loss = f"{losses[name]:.4f}" if name in losses else "-"
        widths = [_widths(getattr(subnet, size)) for size in sizes]
        deployed = f"{float(cost.deploy_bytes) / 2**20:,.1f}"
        rows.append(
            (name, target, used, f"{int(cost.params):,}", deployed, loss, str(len(subnet.kept_layers)), *widths)
        )
    headings = ("member", "target", "used", "parameters", "MiB deployed", "held-out loss", "layers")
    return table_html((*headings, *(size.replace("_", " ") for size in sizes)), rows)


def _widths(width: int | tuple[int, ...]) -> str:
    each = sorted(set(width)) if isinstance(width, tuple) else [width]
    return "-" if not each else str(each[0]) if len(each) == 1 else f"{each[0]} to {each[-1]}"


def last_losses(rows: Sequence[Row]) -> dict[str, float]:
    """Return the newest held-out loss of each member."""
    keys = {match[1]: key for row in rows for key in row if (match := re.fullmatch("validation/([^/]+)/loss", key))}
    return {name: points[-1][1] for name, key in keys.items() if (points := curve(rows, key))}


def event_table(events: Sequence[Row]) -> str:
    """Return the newest events: skipped steps, loss spikes."""
    rows = []
    for row in events[-_MOST_EVENTS:]:
        told = [f"{key} {_short(value)}" for key, value in row.items() if key not in ("event", "step")]
        rows.append((str(row.get("event")), f"{row['step']:,}", ", ".join(told)))
    return table_html(("event", "step", "what"), rows) if rows else ""


def _short(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    return number_text(value) if type(value) is float and math.isfinite(value) else str(value)[:80]


def phase_table(config: Mapping[str, Any]) -> str:
    """Return the phases of a run's config."""
    columns = ("name", "steps", "tokens", "sequence_length", "global_batch", "execution", "router_frozen")
    given = config.get("curriculum")
    phases = [phase for phase in given if isinstance(phase, dict)] if isinstance(given, list) else []
    rows = [["-" if phase.get(key) is None else _cell(phase[key]) for key in columns] for phase in phases]
    return table_html([column.replace("_", " ") for column in columns], rows) if rows else ""


def _cell(value: Any) -> str:
    return f"{value:,}" if type(value) in (int, float) else str(value)


def page(title: str, state: str, rows: Sequence[Row], sections: Mapping[str, str]) -> str:
    """Return the whole page: sections of HTML by heading, those that are empty left out, and all charts."""
    drawn = "".join(chart.svg() for chart in charts(rows))
    parts = {**sections, "Curves": f'<div class="charts">{drawn}</div>' if drawn else ""}
    body = "".join(f"<h2>{escape(heading)}</h2>{content}" for heading, content in parts.items() if content)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1><p>{escape(state)}</p>{body}</body></html>\n"
    )
