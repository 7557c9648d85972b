"""Run an exported folder in stock transformers on the CPU in fp32, as a user would load it, and compare logits.

Stock transformers calls the `mamba_ssm` and `causal_conv1d` kernels whenever they can be imported, even for tensors
on the CPU. Where they are installed, the folder is therefore run in a child process that cannot see them.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

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


@dataclass(frozen=True)
class LogitDifference:
    """Largest absolute difference, and the same divided by the largest reference logit."""

    max_abs: float
    relative: float

    @classmethod
    def between(cls, logits: Tensor, reference: Tensor) -> "LogitDifference":
        """Compare logits [B, S, V] with a reference of the same size; raises ValueError if the sizes differ."""
        if logits.shape != reference.shape:
            raise ValueError(f"logits are {tuple(logits.shape)}, the reference gives {tuple(reference.shape)}")
        reference = reference.detach().to("cpu", torch.float32)
        difference = (logits.detach().to("cpu", torch.float32) - reference).abs().max().item()
        return cls(difference, difference / max(reference.abs().max().item(), 1e-30))

    def within(self, tolerance: float) -> bool:
        """Tell whether the relative difference is at most `tolerance`; NaN never is."""
        return self.relative <= tolerance


def probe_tokens(vocab: int, batch: int = 2, length: int = 320, seed: int = 1234) -> Tensor:
    """Draw the fixed random token batch [B, S] on which functions are compared.

    The default length is longer than two scan chunks of 128, so a state carried over a whole chunk is compared too:
    stock transformers 5.6 to 5.13 is right in the first chunk and wrong behind it.
    """
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


class ChildError(ValueError):
    """A child process that failed; the message ends with the end of its stderr."""


def run_without_gpu(module: str, arguments: Sequence[str], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run `python -m MODULE ARGUMENTS... GIVEN ANSWER`: GIVEN holds `given`, and ANSWER is read back, both safetensors.

    Raises ChildError if it ends with another code than 0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        tensors, answer = Path(scratch) / "given.safetensors", Path(scratch) / "answer.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, tensors)
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # It is alone: torchrun's variables would make it wait for other ranks.
        inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        environment = {**inherited, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", module, *arguments, str(tensors), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ChildError(f"{module} in a child process failed: {done.stderr.strip()[-2000:]}")
        return load_file(answer)


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
