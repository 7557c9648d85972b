"""Run an exported folder in stock transformers on the CPU in fp32, as a user would load it, and compare logits.

Stock transformers calls the `mamba_ssm` and `causal_conv1d` kernels whenever they can be imported, even for tensors
on the CPU. Where they are installed, the folder is therefore run in a child process that cannot see them.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.hf.config import STOCK_VERSIONS, TRANSFORMERS, ExportError
from elastic.hf.export import CheckOutcome, FolderCheck
from elastic.hf.folder import HfFolder
from elastic.space.cost import shape_cost
from elastic.space.shape import ModelShape

_KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")
_STOCK_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError)


def reads_fp8() -> bool:
    """Tell whether stock transformers can load a folder in FP8 here."""
    return importlib.util.find_spec("compressed_tensors") is not None


def logit_check(reference_logits: Callable[[Tensor], Tensor], tolerance: float = 1e-4) -> FolderCheck:
    """Return the check that reloads in stock transformers: logits must equal `reference_logits` [B, S] -> [B, S, V].

    `tolerance` is relative to the largest logit of the probe. Needs memory for the reloaded model in fp32.
    """

    def check(written: HfFolder, shape: ModelShape) -> CheckOutcome:
        tokens, expected = probe_tokens(shape.vocab), shape_cost(shape).stored_params
        logits, params = reload_logits(written.path, tokens)
        if params != expected:
            raise ExportError(f"the reloaded model has {params} parameters, expected {expected}")
        max_abs, relative = logit_difference(logits, reference_logits(tokens)[..., : shape.vocab])
        if not relative <= tolerance:  # NaN never is
            raise ExportError(
                f"logits of the reloaded folder differ by {max_abs:.3e} (relative {relative:.3e}, tolerance "
                f"{tolerance:.1e}); nothing was written"
            )
        sentence = (
            f"The folder was reloaded with stock transformers on the CPU in fp32 and its logits compared with the "
            f"elastic model's: largest difference {max_abs:.2e}, relative {relative:.2e}."
        )
        return CheckOutcome("logits of the reloaded folder against the subnet's", sentence, max_abs, relative)

    return check


def logit_difference(logits: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the largest difference of logits [B, S, V], absolute and divided by the largest reference logit.

    A NaN among them makes both NaN. Raises ValueError if the sizes differ.
    """
    if logits.shape != reference.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}, the reference gives {tuple(reference.shape)}")
    reference = reference.detach().to("cpu", torch.float32)
    largest = (logits.detach().to("cpu", torch.float32) - reference).abs().max().item()
    return largest, largest / max(reference.abs().max().item(), 1e-30)


def probe_tokens(vocab: int) -> Tensor:
    """Draw the fixed random token batch [2, 320] on which functions are compared.

    It is longer than two scan chunks of 128, so a state carried over a whole chunk is compared too: stock transformers
    5.6 to 5.13 is right in the first chunk and wrong behind it.
    """
    return torch.randint(vocab, (2, 320), generator=torch.Generator().manual_seed(1234))


def run_without_gpu(module: str, arguments: list[str], given: dict[str, Tensor], failed: str) -> dict[str, Tensor]:
    """Run `python -m MODULE ARGUMENTS... GIVEN ANSWER`: GIVEN holds `given`, and ANSWER is read back, both safetensors.

    Raises ExportError if it ends with another code than 0: `failed`, and the end of its stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors, answer = Path(scratch) / "given.safetensors", Path(scratch) / "answer.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, tensors)
        paths = [str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        # It is alone: torchrun's variables would make it wait for other ranks.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", module, *arguments, str(tensors), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ExportError(f"{failed}: {module} in a child process failed: {done.stderr.strip()[-2000:]}")
        return load_file(answer)


def reload_logits(folder: Path, tokens: Tensor) -> tuple[Tensor, int]:
    """Load `folder` with AutoModelForCausalLM and run `tokens` [B, S], all arguments left at their defaults.

    Returns logits [B, S, V] in fp32 and the number of parameters. A loss and two generated tokens are tried, too.
    Raises ExportError if one of these fails, or for missing, unexpected or mismatched tensors.
    """
    if not any(importlib.util.find_spec(package) for package in _KERNEL_PACKAGES):
        return stock_logits(folder, tokens)
    answer = run_without_gpu("elastic.hf.reload", [str(folder)], {"tokens": tokens}, f"{folder} was not reloaded")
    return answer["logits"], int(answer["params"])


def stock_logits(folder: Path, tokens: Tensor) -> tuple[Tensor, int]:
    """Do what `reload_logits` says in this process."""
    # Slow to import, and nothing else here needs it.
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig, __version__

    if tuple(map(int, __version__.split(".")[:2])) < tuple(map(int, TRANSFORMERS.split("."))):
        raise ExportError(f"transformers {__version__} is installed. {STOCK_VERSIONS}")
    here: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)
    try:
        if hasattr(AutoConfig.from_pretrained(folder, **here), "quantization_config"):
            # The numbers that are stored; by default activations are rounded, too, and no two sums round alike.
            here["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, **here, dtype=torch.float32, output_loading_info=True
        )
    except _STOCK_ERRORS as error:
        raise ExportError(f"stock transformers cannot load {folder}: {error}") from error
    if complaints := [f"{what}: {', '.join(sorted(map(str, found))[:4])}" for what, found in info.items() if found]:
        raise ExportError(f"stock transformers loads {folder} with complaints: " + "; ".join(complaints))
    model.eval()
    try:
        # Everything by its default, as most users run it: the folder's own use_cache, generation config and loss.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(tokens, labels=tokens).logits
            model.generate(tokens[:, :8], max_new_tokens=2)
    except _STOCK_ERRORS as error:
        raise ExportError(f"stock transformers loads {folder}, but does not run it by default: {error}") from error
    return logits, sum(parameter.numel() for parameter in model.parameters())


def _main(folder: str, tokens: str, answer: str) -> None:
    for package in _KERNEL_PACKAGES:
        # The documented way to make an import fail; this process exists for nothing else.
        sys.modules[package] = None  # type: ignore[assignment]
    logits, params = stock_logits(Path(folder), load_file(tokens)["tokens"])
    save_file({"logits": logits.contiguous(), "params": torch.tensor(params)}, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
