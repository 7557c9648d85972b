"""Run an export in one engine: `python run_engine.py ENGINE MODEL TOLD ANSWER`, in that engine's environment.

Imports nothing of this project. TOLD is JSON with `prompts`, lists of token numbers, and `new_tokens`; ANSWER becomes
an npz file with `version`, the greedy `tokens` [B, new_tokens] and, where the engine shows them, the `logits` [S, V]
along the first prompt. Everything is computed in fp32 on the CPU, whatever format a folder's weights are stored in.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

Prompts = list[list[int]]
Answer = tuple[str, list[list[int]], Any]  # package whose version counts, tokens, logits or None


def transformers(model: str, prompts: Prompts, new_tokens: int) -> Answer:
    for package in ("mamba_ssm", "causal_conv1d"):  # their CUDA kernels would be called, even for tensors on the CPU
        sys.modules[package] = None  # type: ignore[assignment]
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = loaded(torch.tensor(prompts[:1])).logits[0].numpy()
        # Nothing may end a text or leave tokens out: the folder's own settings, where generate looks for what is None.
        loaded.generation_config.eos_token_id = loaded.generation_config.suppress_tokens = None
        tokens = torch.tensor(prompts)
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens}
        written = loaded.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    return "transformers", written[:, len(prompts[0]) :].tolist(), logits


def mlx(model: str, prompts: Prompts, new_tokens: int) -> Answer:
    from pathlib import Path

    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    loaded, _ = load_model(Path(model))
    loaded.update(tree_map(lambda weight: weight.astype(mx.float32), loaded.parameters()))

    def read(tokens: list[int], cache: Any) -> Any:
        return np.array(loaded(mx.array([tokens]), cache=cache)[0])

    written, along_first = [], None
    for prompt in prompts:
        cache = make_prompt_cache(loaded)
        logits = read(prompt, cache)
        along_first = logits if along_first is None else along_first
        written.append(_greedy(logits[-1], new_tokens, lambda token, kept: read([token], kept)[-1], cache))
    return "mlx-lm", written, along_first


def llama_cpp(model: str, prompts: Prompts, new_tokens: int) -> Answer:
    from llama_cpp import GGML_TYPE_F32, Llama

    length = len(prompts[0]) + new_tokens
    kept = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # keys and values; f16 by default
    loaded = Llama(model, n_ctx=length, n_batch=length, logits_all=True, verbose=False, **kept)

    def read(tokens: list[int]) -> Any:
        loaded.eval(tokens)
        return loaded.scores[loaded.n_tokens - len(tokens) : loaded.n_tokens]

    written, along_first = [], None
    for prompt in prompts:
        loaded.reset()
        loaded._ctx.kv_cache_clear()  # what a sequence leaves in the recurrent layers
        logits = read(prompt)
        along_first = logits.copy() if along_first is None else along_first
        written.append(_greedy(logits[-1], new_tokens, lambda token, _: read([token])[-1]))
    return "llama-cpp-python", written, along_first


def _greedy(logits: Any, new_tokens: int, read: Callable[[int, Any], Any], cache: Any = None) -> list[int]:
    """Return the likeliest token after `logits`, and each after reading the one before."""
    tokens = [int(logits.argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(read(tokens[-1], cache).argmax()))
    return tokens


ENGINES = {"transformers": transformers, "mlx": mlx, "llama_cpp": llama_cpp}


def main(engine: str, model: str, told: str, answer: str) -> None:
    with open(told, encoding="utf-8") as file:
        content = json.load(file)
    package, tokens, logits = ENGINES[engine](model, content["prompts"], content["new_tokens"])
    found = {"version": np.array(version(package)), "tokens": np.array(tokens)}
    np.savez(answer, **found if logits is None else {**found, "logits": logits.astype(np.float32)})


if __name__ == "__main__":
    main(*sys.argv[1:])
