"""The processes that run an export, or what it is compared with: they see no GPU and none of its kernels."""

import shutil
import sys
from pathlib import Path

import pytest

from elastic.checkpoint.find import resolve_checkpoint
from elastic.config.inputs import SubnetConfig
from elastic.hf.config import ExportError
from elastic.hf.reload import run_without_gpu
from elastic.space.shape import Subnet
from elastic.verbs.subnet_logits import logits_in_child, nested_logits
from tests.parity.hf_models import SHAPES, relative_error
from tests.parity.import_extract import BF16, TOKENS, imported, narrowed, stock_folder
from tests.parity.test_export import export


def test_a_child_without_a_gpu_computes_the_same_logits(tmp_path: Path) -> None:
    shape = SHAPES["groups 4, five queries per KV head"]
    stock_folder(tmp_path / "stock", shape, "bf16")
    checkpoint = resolve_checkpoint(imported(tmp_path, tmp_path / "stock"))
    subnet = SubnetConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in narrowed(shape).items()}).subnet(
        shape
    )
    given = checkpoint, subnet, BF16, True
    here, child = (compute(*given, False, TOKENS) for compute in (nested_logits, logits_in_child))
    assert here.shape == (*TOKENS.shape, shape.vocab) and relative_error(child, here) < 1e-6
    activations_too = nested_logits(*given, True, TOKENS)
    assert 1e-3 < relative_error(activations_too, here) < 0.2


def test_a_child_that_fails_is_an_error_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"(?s)^nothing: json\.tool in a child process failed: .*nowhere"):
        run_without_gpu("json.tool", ["nowhere"], {"tokens": TOKENS}, "nothing")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    shape = SHAPES["groups 2, tied head"]
    with pytest.raises(ExportError, match="logits to compare with were not computed: elastic"):
        logits_in_child(tmp_path, Subnet.full(shape), BF16, False, False, TOKENS)


def test_installed_kernels_do_not_touch_the_reload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock code calls mamba_ssm for CPU tensors too if it can import it; the reload must not let it."""
    fake = tmp_path / "packages" / "mamba_ssm"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(fake.parent)
    monkeypatch.setenv("PYTHONPATH", str(fake.parent))
    report = export(tmp_path / "model")
    assert report.outcome.relative is not None and report.outcome.relative < 1e-5
