"""What computes a part is what is installed; a run may require all of it."""

import sys
from pathlib import Path

import pytest
import torch

from elastic.config.rules import rule_problems
from elastic.config.rules_layout import Cluster, check_kernels, check_optimizer
from elastic.config.sections import ComputeConfig, DistillConfig, OptimConfig
from elastic.config.verbs import ElasticConfig, EvaluateConfig
from elastic.model import backends
from elastic.model.attention import SdpaCoreAttention
from elastic.model.backends import ADAM, ATTENTION, SCAN, Kernels, import_module, missing_parts
from elastic.model.elementwise import TorchElementwise, TritonElementwise
from elastic.model.state_space import TorchStateSpace

SCAN_MISSING = {SCAN.name: (SCAN.package, SCAN.instead)}


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no kernel package be found, whatever this machine has."""

    def refuse(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(backends, "import_module", refuse)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
def test_a_bare_gpu_runs_on_pytorch_and_our_kernels() -> None:
    assert [part for part, _ in missing_parts()] == [ATTENTION, SCAN, ADAM]
    chosen = Kernels.choose(torch.device("cuda"))
    assert isinstance(chosen.state_space, TorchStateSpace) and chosen.core_attention is SdpaCoreAttention
    assert isinstance(chosen.elementwise, TritonElementwise)


def test_a_cpu_runs_on_pytorch() -> None:
    chosen = Kernels.choose(torch.device("cpu"))
    assert isinstance(chosen.state_space, TorchStateSpace) and type(chosen.elementwise) is TorchElementwise


def test_mamba_ssms_triton_files_are_imported_without_its_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "mamba_ssm" / "ops" / "triton"
    kernels.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda\n")
    (tmp_path / "mamba_ssm" / "ops" / "__init__.py").touch()
    (kernels / "ssd_combined.py").write_text("mamba_chunk_scan_combined = 'the scan'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        assert import_module(SCAN.module).mamba_chunk_scan_combined == "the scan"
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


def test_another_package_that_does_not_load_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_kernels.py").write_text("import an_extension_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="an_extension_that_is_not_there"):
        import_module("broken_kernels")


def test_a_run_may_require_every_package() -> None:
    cluster = Cluster(8, has_gpu=True, missing=SCAN_MISSING)
    (problem,) = check_kernels(ComputeConfig(kernels="required"), cluster)
    assert str(problem) == (
        'trainer.kernels = "required": mamba-ssm is missing or does not load: scan would be PyTorch\'s chunked scan; '
        "install mamba-ssm, or set trainer.kernels=auto"
    )
    assert not list(check_kernels(ComputeConfig(), cluster))
    assert not list(check_kernels(ComputeConfig(kernels="required"), Cluster(8, has_gpu=True)))


def test_a_teacher_in_fp8_asks_for_gpus_that_multiply_it() -> None:
    teacher, old = DistillConfig(teacher_precision="fp8"), Cluster(8, has_gpu=True, multiplies_fp8=False)
    for config, field in (
        (ElasticConfig(distill=teacher), "distill.teacher_precision"),
        (EvaluateConfig(teacher_precision="fp8"), "teacher_precision"),
    ):
        assert field not in {problem.field for problem in rule_problems(config, Cluster(8, has_gpu=False))}
        assert [str(problem) for problem in rule_problems(config, old) if problem.field == field] == [
            f'{field} = "fp8": needs GPUs of compute capability 8.9 or higher (Ada, Hopper and later); nearest legal '
            "value is bf16"
        ]


def test_the_distributed_optimizer_asks_for_a_fused_adam_not_for_a_gpu() -> None:
    sharded, adam = OptimConfig(use_distributed_optimizer=True), {ADAM.name: (ADAM.package, ADAM.instead)}
    (problem,) = check_optimizer(sharded, Cluster(8, has_gpu=True, missing=adam))
    assert problem.field == "optim.use_distributed_optimizer" and "needs a fused Adam" in problem.rule
    assert not list(check_optimizer(sharded, Cluster(8, has_gpu=True, missing=SCAN_MISSING)))
