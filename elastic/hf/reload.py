"""Run an exported folder in stock transformers on the CPU in fp32, as a user would load it.

Stock transformers calls the `mamba_ssm` and `causal_conv1d` kernels whenever they can be imported, even for tensors
on the CPU. Where they are installed, the folder is therefore run in a child process that cannot see them.
"""

import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from elastic.hf.child import ChildError, run_without_gpu
from elastic.hf.config import TRANSFORMERS, stock_versions

_KERNEL_PACKAGES = ("mamba_ssm", "causal_conv1d")


_STOCK_ERRORS = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError)


class ReloadError(ValueError):
    """Stock transformers could not load or run the folder, or not with exactly the tensors it needs."""


@dataclass(frozen=True)
class Reloaded:
    """What the reloaded model gave: logits [B, S, V] in fp32 and its number of parameters."""

    logits: Tensor
    params: int


def reload_logits(folder: Path, tokens: Tensor) -> Reloaded:
    """Load `folder` with AutoModelForCausalLM and run `tokens` [B, S], all arguments left at their defaults.

    A loss and two generated tokens are tried, too. Raises ReloadError if one of these fails, or for missing, unexpected
    or mismatched tensors.
    """
    if any(importlib.util.find_spec(package) for package in _KERNEL_PACKAGES):
        return _reload_in_child(folder, tokens)
    return stock_logits(folder, tokens)


def stock_logits(folder: Path, tokens: Tensor) -> Reloaded:
    """Do what `reload_logits` says in this process."""
    # Slow to import, and nothing else here needs it.
    from transformers import AutoModelForCausalLM, __version__

    if tuple(map(int, __version__.split(".")[:2])) < tuple(map(int, TRANSFORMERS.split("."))):
        raise ReloadError(f"transformers {__version__} is installed. {stock_versions()}")
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except _STOCK_ERRORS as error:
        raise ReloadError(f"stock transformers cannot load {folder}: {error}") from error
    complaints = [f"{what}: {_some(found)}" for what, found in info.items() if found]
    if complaints:
        raise ReloadError(f"stock transformers loads {folder} with complaints: " + "; ".join(complaints))
    model.eval()
    try:
        # Everything by its default, as most users run it: the folder's own use_cache, generation config and loss.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(tokens, labels=tokens).logits
            model.generate(tokens[:, :8], max_new_tokens=2)
    except _STOCK_ERRORS as error:
        raise ReloadError(f"stock transformers loads {folder}, but does not run it by default: {error}") from error
    return Reloaded(logits, sum(parameter.numel() for parameter in model.parameters()))


def _reload_in_child(folder: Path, tokens: Tensor) -> Reloaded:
    try:
        answer = run_without_gpu("elastic.hf.reload", [str(folder)], {"tokens": tokens})
    except ChildError as error:
        raise ReloadError(f"{folder} was not reloaded: {error}") from error
    return Reloaded(answer["logits"], int(answer["params"]))


def _some(found: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, found))[:4])


def _main(folder: str, tokens: str, answer: str) -> None:
    for package in _KERNEL_PACKAGES:
        # The documented way to make an import fail; this process exists for nothing else.
        sys.modules[package] = None  # type: ignore[assignment]
    reloaded = stock_logits(Path(folder), load_file(tokens)["tokens"])
    save_file({"logits": reloaded.logits.contiguous(), "params": torch.tensor(reloaded.params)}, answer)


if __name__ == "__main__":
    _main(*sys.argv[1:])
