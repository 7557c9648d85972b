"""The page about a run: what is drawn where, what of a log is read, and that the page needs and runs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from elastic.report.charts import Chart, number_text, thin, ticks
from elastic.report.page import member_table
from elastic.router.decide import RouterError
from elastic.space.cost import Budget, Deployment, Metric, subnet_cost
from elastic.space.shape import Subnet
from elastic.space.space import Space
from elastic.verbs.report import ReportError, write_report
from tests.shapes import UNEVEN, random_table

EVIL = "<img onerror=alert(1)>"
WIDTH = "router/a/width/hidden"
ROWS = [
    {"step": 10, "phase": "short", "learning_rate": 1e-3, "skipped_steps": 0, "train/a/kl": 2.0, WIDTH: 64},
    {"step": 20, "phase": "short", "learning_rate": 5e-4, "skipped_steps": 1, "train/a/kl": "nan", WIDTH: 48},
    {"step": 20, "validation/a/loss": 3.25, f"validation/{EVIL}/loss": 3.5},
    {"step": 30, "phase": "long", "learning_rate": 2.5e-4, "skipped_steps": 1, "train/a/kl": 1.0, WIDTH: 32},
    {"step": 30, "validation/a/loss": 3.125, "validation/a/loss/b/c": 3.0},
]
CONFIG = {"curriculum": [{"name": "short", "steps": 20, "sequence_length": 4096}, {"name": "long", "tokens": 10_000}]}
EVENT = {"event": "skipped_step", "step": 13, "why": EVIL, "first_step": 1_234_567}


class Page(HTMLParser):
    """Text of the page, and every tag with its attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def written(folder: Path, log: str) -> Page:
    (folder / "metrics.jsonl").write_text(log)
    return Page(write_report(folder))


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_page_shows_what_was_logged_and_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "events.jsonl").write_text(lines([EVENT]))
    page = written(tmp_path, lines(ROWS[:2]) + "a note\n[1]\n" + lines(ROWS[2:]) + '{"step": 40, "train/a')
    text = " ".join(page.text)
    titles = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert titles == [
        "training: KL to the parent, nats per token",
        "held-out loss, nats per token",
        "held-out loss by source",
        "the router's choice: hidden",
        "learning rate",
        "skipped steps",
    ]
    assert (
        "step 30, not finished" in text
        and "skipped_step" in text
        and "first_step 1,234,567" in text
        and "4,096" in text
        and "10,000" in text
    )
    hovers = [part for part in page.text if ", step " in part]
    assert {
        "a, step 10: 2",
        "a, step 30: 1",
        "a, step 20: 3.25",
        f"{EVIL}, step 20: 3.5",
        "a/loss/b/c, step 30: 3",
    } <= set(hovers)
    assert "a, step 20: nan" not in hovers, "a value that is no number is not drawn"
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe"})
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import|\bsrc=|\bhref=", html)
    (tmp_path / "finished.json").write_text(json.dumps({"step": 30, "reason": "the curriculum's end"}))
    assert "step 30, ended: the curriculum's end" in " ".join(written(tmp_path, lines(ROWS)).text)


def test_a_limit_in_milliseconds_keeps_its_digits() -> None:
    table = random_table(Space(UNEVEN, {}, lanes=1), torch.Generator().manual_seed(0))
    deployment = Deployment(length_tokens=8192, latency=table)
    whole = subnet_cost(UNEVEN, Subnet.full(UNEVEN), deployment).latency_ms
    budget = Budget("fast", Metric.LATENCY_MS, target=0.4321)
    html = member_table(UNEVEN, [("fast", Subnet.full(UNEVEN), budget)], deployment, {})
    assert f"<td>fast</td><td>0.4321 latency_ms</td><td>{whole / 0.4321:.1%}</td>" in html


def test_a_router_that_chooses_nothing_leaves_the_members_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a run's end nothing of it may fail for its page."""

    def damaged(*arguments: object, **options: object) -> None:
        raise RouterError("its logits are NaN")

    monkeypatch.setattr("elastic.verbs.report.open_checkpoint", damaged)
    assert "step 30, not finished" in " ".join(written(tmp_path, lines(ROWS)).text)


def test_values_stand_where_the_axis_says() -> None:
    svg = Chart("t", {"up": [(0, 0.0), (10, 1.0), (20, 2.0)], "flat": [(0, 1.0), (20, 1.0)]}, [(10, "next")]).svg()
    up, flat = (
        [tuple(map(float, point.split(","))) for point in path.split()] for path in re.findall(r'points="([^"]+)"', svg)
    )
    (x0, y0), (x1, y1), (x2, y2) = up
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11) and y0 > y2
    assert flat[0][1] == flat[1][1] == y1
    assert f'x1="{x1:.1f}" x2="{x1:.1f}"' in svg and ">next</text>" in svg
    labels = re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
    assert labels and all(
        float(y) - 3.5 == pytest.approx(y0 + (y2 - y0) * float(value) / 2, abs=0.11) for y, value in labels
    )
    assert Chart("empty", {"a": []}).svg() == ""
    assert "<polyline" in Chart("one point", {"a": [(5, 0.0)]}).svg()


def test_long_curves_are_thinned_to_means() -> None:
    points = [(step, float(step % 2)) for step in range(1, 23_001)]
    found = thin(points)
    assert 400 < len(found) <= 500 and found[-1][0] == 23_000
    assert {value for _, value in found} == {0.5}
    assert list(thin(points[:500])) == points[:500]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.61, 3.75), (-2, 5e6), (1e-7, 2e-7), (0.99, 1.01), (10, 150)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and all(low - 1e-12 <= value <= high + 1e-12 for value in found)
    step = found[1] - found[0]
    assert float(f"{step:.3e}".partition("e")[0]) in (1, 2, 2.5, 5)
    assert all(abs(value / step - round(value / step)) < 1e-6 for value in found)


def test_numbers_have_the_digits_that_count() -> None:
    texts = [number_text(value) for value in (0, 3.61994, 0.0105, 128, 2309.077, 5e-5, 47_598_335.0, -1.5)]
    assert texts == ["0", "3.62", "0.0105", "128", "2,309", "5e-05", "4.76e+07", "-1.5"]


def test_a_folder_that_is_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"holds no metrics\.jsonl with a row of a training run; give the folder"):
        written(tmp_path, "a note\n")
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(ReportError, match=r"run = .*nowhere.*: holds no metrics\.jsonl"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="cannot be read: File name too long"):
        write_report(tmp_path / ("x" * 300))
