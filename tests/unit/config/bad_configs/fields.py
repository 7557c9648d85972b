"""A bad value of one field: unknown keys, missing and mistyped values, values out of range."""

import math

from elastic.config.verbs import (
    CostConfig,
    ElasticConfig,
    EvaluateConfig,
    ExtractConfig,
    ImportanceConfig,
    ImportConfig,
    PretrainConfig,
)
from elastic.corpus.config import PrepareConfig
from tests.unit.config.configs import BadConfig

# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[BadConfig, ...] = (
    # unknown keys
    (
        ElasticConfig,
        {"modle": {}},
        1,
        "modle = {}: unknown key; did you mean model?",
    ),
    (
        ElasticConfig,
        {"trainer.max_step": 5},
        1,
        "trainer.max_step = 5: unknown key; did you mean trainer.max_steps?",
    ),
    (
        ElasticConfig,
        {"elastic.clip_grad": 1.0},
        1,
        "elastic.clip_grad = 1.0: unknown key; did you mean optim.clip_grad?",
    ),
    (
        PretrainConfig,
        {"parallel.virtual": 2},
        1,
        "parallel.virtual = 2: unknown key; known here: tensor, pipeline, context, sequence, recompute",
    ),
    (
        ElasticConfig,
        {"curriculum.0.lr": {"peek": 0.1}},
        1,
        "curriculum.0.lr.peek = 0.1: unknown key; did you mean curriculum.0.lr.peak?",
    ),
    # missing
    (
        PretrainConfig,
        {"data.path": ""},
        1,
        "data.path = null: missing, it has no default; set data.path=..., the folder recipes/prepare_data.py wrote, or "
        "data.blend",
    ),
    (
        PretrainConfig,
        {"data": {"blend": ["texts"]}},
        1,
        "data.blend.0.weight = null: missing, it has no default; set data.blend.0.weight=..., any number above 0, or "
        "leave the source out",
    ),
    (
        ImportConfig,
        {"source": "???"},
        1,
        "source = null: missing, it has no default; set source=..., a Hugging Face folder with config.json and "
        "safetensors files",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1": {"ratio": 0.7}, "curriculum.0.budget_weights": {}},
        1,
        "elastic.budgets.1.name = null: missing, it has no default; set elastic.budgets.1.name=..., give it a name",
    ),
    # wrong types
    (
        PretrainConfig,
        {"model.hidden": "wide"},
        1,
        'model.hidden = "wide": must be a whole number; the default is 128',
    ),
    (
        PretrainConfig,
        {"model.hidden": 100.5},
        1,
        "model.hidden = 100.5: must be a whole number; nearest legal value is 100",
    ),
    (
        PretrainConfig,
        {"seed": True},
        1,
        "seed = true: must be a whole number; the default is 1234",
    ),
    (
        PretrainConfig,
        {"model.tied_embeddings": "no"},
        1,
        'model.tied_embeddings = "no": must be true or false; the default is false',
    ),
    (
        PretrainConfig,
        {"exp_manager.version": True},
        1,
        "exp_manager.version = true: must be a text; write it in quotes inside quotes, exp_manager.version='\"true\"'",
    ),
    (
        PretrainConfig,
        {"optim.eps": math.nan},
        1,
        "optim.eps = NaN: must be a finite number; the default is 1e-08",
    ),
    (
        PretrainConfig,
        {"parallel": 2},
        1,
        "parallel = 2: must be a section; with keys tensor, pipeline, context, sequence, recompute",
    ),
    (
        ElasticConfig,
        {"elastic.space.ffn.choices": 256},
        1,
        "elastic.space.ffn.choices = 256: must be a list; write [256] for one entry",
    ),
    (
        ElasticConfig,
        {"curriculum.0.temperature": [1.0]},
        1,
        "curriculum.0.temperature = [1.0]: must have 2 entries; the default is [1.0, 0.05]",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": ["full"]},
        1,
        'curriculum.0.budget_weights = ["full"]: must map names to values; it has no default',
    ),
    # illegal values of one field
    (
        PretrainConfig,
        {"data.micro_batch": 0},
        1,
        "data.micro_batch = 0: must be at least 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"model.norm_epsilon": 0},
        1,
        "model.norm_epsilon = 0.0: must be above 0; the default is 1e-05",
    ),
    (
        PretrainConfig,
        {"optim.adam_beta2": 1.0},
        1,
        "optim.adam_beta2 = 1.0: must be below 1; the default is 0.98",
    ),
    (
        PretrainConfig,
        {"trainer.precision": "bf_16"},
        1,
        'trainer.precision = "bf_16": must be one of fp32, bf16; nearest legal value is bf16',
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1": {"name": "small", "metric": "param", "ratio": 0.7}},
        1,
        'elastic.budgets.1.metric = "param": must be one of params, stored_params, weight_bytes, deploy_bytes, '
        "flops_per_token, latency_ms, tokens_per_s; nearest legal value is params",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.ratio": 1.5},
        1,
        "elastic.budgets.1.ratio = 1.5: must be at most 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"curriculum": []},
        1,
        'curriculum = []: must not be empty; the default is [{"name": "pretrain", "sequence_length": 256, '
        '"global_bat...',
    ),
    # a misspelled key of every other verb
    (
        ImportanceConfig,
        {"importance.depths": "none"},
        1,
        'importance.depths = "none": unknown key; did you mean importance.depth?',
    ),
    (CostConfig, {"outptu": "x"}, 1, 'outptu = "x": unknown key; did you mean output?'),
    (EvaluateConfig, {"excution": "mask"}, 1, 'excution = "mask": unknown key; did you mean execution?'),
    (EvaluateConfig, {"budgets": []}, 1, "budgets = []: unknown key; did you mean budget_names?"),
    (ExtractConfig, {"export.chek": "values"}, 1, 'export.chek = "values": unknown key; did you mean export.check?'),
    (ExtractConfig, {"budget_name": ["small"]}, 1, 'budget_name = ["small"]: unknown key; did you mean budget_names?'),
    (ImportConfig, {"sorce": "folder"}, 1, 'sorce = "folder": unknown key; did you mean source?'),
    (
        ImportConfig,
        {"parallel": {}},
        1,
        "parallel = {}: unknown key; known here: exp_manager, source, elastic, vocab_multiple",
    ),
    (PrepareConfig, {"vocab_sze": 300}, 1, "vocab_sze = 300: unknown key; did you mean vocab_size?"),
)
