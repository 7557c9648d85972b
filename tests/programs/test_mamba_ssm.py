"""mamba-ssm's kernels compute what the PyTorch scan computes over isolated documents, without a GPU.

`pip download --no-deps --no-binary :all: --no-build-isolation mamba-ssm` (with MAMBA_SKIP_CUDA_BUILD=TRUE) brings the
source; unpacked, its folder is what MAMBA_SSM_SOURCE names. It must not be importable where the other tests run.
"""

import json
import os
import subprocess
import sys

import pytest

SOURCE = os.environ.get("MAMBA_SSM_SOURCE")


@pytest.mark.skipif(SOURCE is None, reason="MAMBA_SSM_SOURCE names no unpacked source of mamba-ssm")
def test_the_kernels_begin_anew_at_each_document_as_our_scan_does() -> None:
    command = [sys.executable, "-m", "tests.programs.mamba_ssm_interpreted", str(SOURCE)]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["leak"] == 0.0
    assert len(found["errors"]) == 4
    for case, errors in found["errors"].items():
        for name, (kernels, plain) in errors.items():
            assert 0 < kernels <= 8 * max(plain, 1e-7), (case, name)
