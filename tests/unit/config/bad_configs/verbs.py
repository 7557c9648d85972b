"""A bad config of a verb that takes out of a family, imports, prices or prepares."""

from elastic.config.verbs import CostConfig, EvaluateConfig, ExtractConfig, ImportConfig, SearchConfig
from elastic.corpus.config import PrepareConfig
from tests.unit.config.configs import BadConfig

# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[BadConfig, ...] = (
    # what is taken out of a family
    (
        EvaluateConfig,
        {"subnets": [{"name": "a"}, {"name": "a", "hidden": 64}]},
        1,
        'subnets.1.name = "a": names must differ, this one stands 2 times; choose another, for example a_2',
    ),
    (
        ExtractConfig,
        {"export.hugging_face": False},
        1,
        "export.hugging_face = false: export.hugging_face and export.megatron must not both be false; nearest legal "
        "value is true",
    ),
    (
        ExtractConfig,
        {"export.format": "fp16"},
        1,
        'export.format = "fp16": must be one of hf, fp8, gguf; nearest legal value is fp8',
    ),
    (
        ExtractConfig,
        {"export.format": "fp8", "export.precision": "fp32"},
        1,
        'export.precision = "fp32": is not what export.format=fp8 leaves beside the matrices; nearest legal value is '
        "bf16",
    ),
    (
        ExtractConfig,
        {"export.format": "fp8", "export.hugging_face": False, "export.megatron": True},
        1,
        'export.format = "fp8": is the format of a Hugging Face folder, and export.hugging_face is false; set '
        "export.hugging_face=true",
    ),
    (
        ExtractConfig,
        {"export.check": "logit"},
        1,
        'export.check.0 = "logit": must be one of auto, logits, values, transformers, mlx, llama_cpp, vllm; nearest '
        "legal value is logits",
    ),
    (
        ExtractConfig,
        {"export.check": ["values", "logits"]},
        1,
        'export.check = ["values", "logits"]: values and logits exclude each other; leave logits out',
    ),
    (
        ExtractConfig,
        {"export.check": "llama_cpp"},
        1,
        'export.check = ["llama_cpp"]: llama_cpp reads GGUF, which is not written; set export.format=gguf, or leave '
        "llama_cpp out",
    ),
    (
        ExtractConfig,
        {"export.check": ["transformers"], "export.format": "gguf", "export.hugging_face": False},
        1,
        'export.check = ["transformers"]: transformers is compared on a Hugging Face folder in fp32 or bf16, which is '
        "not written; leave transformers out",
    ),
    (
        ExtractConfig,
        {"export.format": "gguf", "export.gguf_types": ["f16", "f16"]},
        1,
        'export.gguf_types = ["f16", "f16"]: names one twice; write [f16]',
    ),
    (
        ExtractConfig,
        {"export.shard_bytes": 0},
        1,
        "export.shard_bytes = 0: must be at least 1; nearest legal value is 1",
    ),
    (
        ExtractConfig,
        {"export.shard_bytes": "5GB"},
        1,
        'export.shard_bytes = "5GB": must be a whole number; the default is 5000000000',
    ),
    (
        ExtractConfig,
        {"export.precision": "fp8"},
        1,
        'export.precision = "fp8": must be one of fp32, bf16; nearest legal value is fp32',
    ),
    (
        ExtractConfig,
        {"export.max_logit_difference": -1},
        1,
        "export.max_logit_difference = -1.0: must be at least 0; nearest legal value is 0",
    ),
    (
        ExtractConfig,
        {"budget_names": "small"},
        1,
        'budget_names = "small": must be a list; write ["small"] for one entry',
    ),
    (SearchConfig, {"num_scored": 0}, 1, "num_scored = 0: must be at least 1; nearest legal value is 1"),
    (
        ExtractConfig,
        {"subnets": "nowhere/subnets.json"},
        1,
        'subnets = "nowhere/subnets.json": subnets.json is missing from nowhere; give a list, or the subnets.json of a '
        "run of recipes/search.py",
    ),
    (
        EvaluateConfig,
        {"budget_names": []},
        1,
        "budget_names = []: names nothing, and no subnets are given; null takes all budgets",
    ),
    (
        ExtractConfig,
        {},
        2,
        "number of processes = 2: this verb streams through one process, whatever the layout of the "
        "checkpoint; nearest legal value is 1: leave torchrun out",
    ),
    (
        ImportConfig,
        {},
        2,
        "number of processes = 2: this verb streams through one process, whatever the layout of the "
        "checkpoint; nearest legal value is 1: leave torchrun out",
    ),
    (
        ImportConfig,
        {"source": "folder/deeper/still"},
        1,
        'source = "folder/deeper/still": does not exist; the nearest folder that exists is folder',
    ),
    (
        CostConfig,
        {"init_from.permuted_parent": "nowhere"},
        1,
        'init_from.permuted_parent = "nowhere": does not exist; the nearest folder that exists is .',
    ),
    (CostConfig, {"output": ["a"]}, 1, 'output = ["a"]: must be a text; the default is null'),
    (
        CostConfig,
        {"model.pattern": "M-X"},
        1,
        "model.pattern = \"M-X\": layer pattern 'M-X': character 'X' at position 2 is not one of M - * (and | "
        "between pipeline stages). Mixture-of-experts and multi-token-prediction layers are not supported; "
        "write a pattern like M-M*-",
    ),
    (
        CostConfig,
        {"elastic.budgets": [{"name": "a", "metric": "latency", "ratio": 0.5}]},
        1,
        'elastic.budgets.0.metric = "latency": must be one of params, stored_params, weight_bytes, deploy_bytes, '
        "flops_per_token, latency_ms, tokens_per_s; nearest legal value is latency_ms",
    ),
    (
        PrepareConfig,
        {"document_format": "parquet"},
        1,
        'document_format = "parquet": must be one of text, lines, jsonl, chat; nearest legal value is chat',
    ),
    (
        PrepareConfig,
        {"validation_ratio": -0.1},
        1,
        "validation_ratio = -0.1: must be at least 0; nearest legal value is 0",
    ),
    (
        PrepareConfig,
        {"paths": "python:stdlib"},
        1,
        'paths = "python:stdlib": must be a list; write ["python:stdlib"] for one entry',
    ),
    (PrepareConfig, {"paths": ["nowhere"]}, 1, 'paths = "nowhere": must exist; give a file, a folder or python:stdlib'),
    (
        PrepareConfig,
        {"max_document_bytes": 0},
        1,
        "max_document_bytes = 0: must be at least 1; nearest legal value is 1",
    ),
)
