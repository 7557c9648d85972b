"""A bad size of the model, parallel layout, batch, optimizer or run folder."""

from elastic.config.verbs import ElasticConfig, EvaluateConfig, ImportanceConfig, PretrainConfig
from tests.unit.config.configs import BadConfig

# On GPUs without Transformer Engine.
BAD_ON_GPUS: tuple[BadConfig, ...] = (
    (
        ElasticConfig,
        {"curriculum.1.parallel": {"context": 2}},
        2,
        "curriculum.1.parallel.context = 2: transformer-engine is missing or does not load, and PyTorch's flash "
        "attention takes whole sequences; install transformer-engine, or set curriculum.1.parallel.context=1 and "
        "curriculum.1.parallel.tensor higher",
    ),
    (
        ElasticConfig,
        {
            "model.mamba_heads": 16,
            "elastic.space.mamba_head.choices": [16, 8],
            "distill.teacher_precision": "fp8",
            "curriculum.1.parallel": {"tensor": 2},
        },
        2,
        'distill.teacher_precision = "fp8": takes rows and columns in multiples of 16, and '
        "curriculum.1.parallel.tensor = 2 leaves mixer.in_proj.weight 296 x 128; nearest legal value is bf16, or set "
        "curriculum.1.parallel.tensor=1",
    ),
)
# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[BadConfig, ...] = (
    # sizes of the model
    (
        PretrainConfig,
        {"model.mamba_heads": 9},
        1,
        "model.mamba_heads = 9: must be a multiple of model.mamba_groups = 2; nearest legal value is 8",
    ),
    (
        PretrainConfig,
        {"model.attention_heads": 5},
        1,
        "model.attention_heads = 5: must be a multiple of model.kv_heads = 2; nearest legal value is 4",
    ),
    (
        PretrainConfig,
        {"model.pattern": "ME*"},
        1,
        "model.pattern = \"ME*\": layer pattern 'ME*': character 'E' at position 1 is not one of M - * (and | between "
        "pipeline stages). Mixture-of-experts and multi-token-prediction layers are not supported; write a pattern "
        "like M-M*-",
    ),
    # the parallel layout
    (
        PretrainConfig,
        {"parallel.tensor": 2},
        3,
        "parallel.tensor x pipeline x context = 2: must divide the number of processes = 3; nearest legal value is 1, "
        "or start 4 processes",
    ),
    (
        PretrainConfig,
        {"parallel.sequence": True},
        1,
        "parallel.sequence = true: splits the sequence over tensor-parallel ranks and needs parallel.tensor > 1; "
        "nearest legal value is false",
    ),
    # the layout of one phase
    (
        ElasticConfig,
        {"curriculum.1.parallel": {"tensor": 4}},
        4,
        "curriculum.1.parallel.tensor = 4: must divide model.mamba_groups = 2, model.kv_heads = 2; nearest legal value "
        "is 2",
    ),
    (
        ElasticConfig,
        {"curriculum.1.parallel": {"pipeline": 3}},
        4,
        "curriculum.1.parallel.tensor x pipeline x context = 3: must divide the number of processes = 4; nearest legal "
        "value is 2, or start 6 processes",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "parallel": {"sequence": True}}]},
        1,
        "curriculum.0.parallel.sequence = true: splits the sequence over tensor-parallel ranks and needs "
        "curriculum.0.parallel.tensor > 1; nearest legal value is false",
    ),
    (
        ElasticConfig,
        {"curriculum.0.micro_batch": 3, "data.validation_sequences": 63},
        1,
        "curriculum.0.global_batch = 8: must be a multiple of curriculum.0.micro_batch x data-parallel size = 3 x 1 = "
        "3; nearest legal value is 9",
    ),
    (
        ElasticConfig,
        {"curriculum.1.micro_batch": 2, "data.validation_sequences": 63},
        1,
        "data.validation_sequences = 63: must be a multiple of curriculum.1.micro_batch x data-parallel size = 2 x 1 = "
        "2; nearest legal value is 64",
    ),
    (
        ElasticConfig,
        {"curriculum.1.parallel": {"contxt": 2}},
        1,
        "curriculum.1.parallel.contxt = 2: unknown key; did you mean curriculum.1.parallel.context?",
    ),
    (
        PretrainConfig,
        {"parallel.tensor": 4, "model.vocab": 512},
        4,
        "parallel.tensor = 4: must divide model.mamba_groups = 2, model.kv_heads = 2; nearest legal value is 2",
    ),
    (
        PretrainConfig,
        {"parallel.tensor": 2, "model.vocab": 511},
        2,
        "parallel.tensor = 2: must divide model.vocab = 511; nearest legal value is 1",
    ),
    (
        ElasticConfig,
        {"parallel.tensor": 2, "elastic.space.lanes": 1, "init_from.permuted_parent": "parent_1"},
        2,
        "parallel.tensor = 2: must divide lanes = 1; nearest legal value is 1",
    ),
    (
        PretrainConfig,
        {"parallel.pipeline": 6},
        6,
        "parallel.pipeline = 6: must be at most the number of layers = 5; nearest legal value is 5",
    ),
    (
        PretrainConfig,
        {"parallel.pipeline": 2, "model.pattern": "M-|M*|-"},
        2,
        "parallel.pipeline = 2: must be the 3 stages the | in model.pattern mark; nearest legal value is 3",
    ),
    (
        PretrainConfig,
        {"parallel.context": 3, "curriculum": [{"name": "a", "steps": 1, "sequence_length": 258}]},
        3,
        "parallel.context = 3: must divide, or be a multiple of, the Mamba groups of one tensor-parallel rank = 2; "
        "nearest legal value is 2",
    ),
    (
        ElasticConfig,
        {"parallel.context": 4},
        4,
        "elastic.space.mamba_head.choices.1 = 6: must be a multiple of parallel.tensor x parallel.context = 4; nearest "
        "legal value is 8",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "sequence_length": 255}], "parallel.context": 2},
        2,
        "curriculum.0.sequence_length = 255: must be a multiple of what parallel.context and parallel.sequence split "
        "it into = 4; nearest legal value is 256",
    ),
    # batches
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "global_batch": 7}]},
        2,
        "curriculum.0.global_batch = 7: must be a multiple of data.micro_batch x data-parallel size = 1 x 2 = 2; "
        "nearest legal value is 8",
    ),
    (
        PretrainConfig,
        {"data.validation_sequences": 15, "data.micro_batch": 4},
        2,
        "data.validation_sequences = 15: must be a multiple of data.micro_batch x data-parallel size = 4 x 2 = 8; "
        "nearest legal value is 16",
    ),
    (
        ImportanceConfig,
        {"importance.num_sequences": 30},
        1,
        "importance.num_sequences = 30: must be a multiple of importance.micro_batch x data-parallel size = 4 x 1 = 4; "
        "nearest legal value is 32",
    ),
    (
        ImportanceConfig,
        {"importance.depth_sequences": 128},
        1,
        "importance.depth_sequences = 128: must be at most importance.num_sequences = 64; nearest legal value is 64",
    ),
    (
        EvaluateConfig,
        {"sequence_length": 30, "parallel.context": 4},
        4,
        "sequence_length = 30: must be a multiple of what parallel.context and parallel.sequence split it into = 8; "
        "nearest legal value is 32",
    ),
    # optimizer and run folder
    (
        PretrainConfig,
        {"optim.use_distributed_optimizer": True},
        1,
        "optim.use_distributed_optimizer = true: needs GPUs (resuming it with torch's AdamW on the CPU is broken "
        "upstream); nearest legal value is false",
    ),
    (
        PretrainConfig,
        {"optim.overlap_param_gather": True},
        1,
        "optim.overlap_param_gather = true: every rank steps all its weights with optim.use_distributed_optimizer = "
        "false, so there is nothing to gather; nearest legal value is false",
    ),
    (
        PretrainConfig,
        {"exp_manager.keep_milestones_every_n_steps": 250},
        1,
        "exp_manager.keep_milestones_every_n_steps = 250: must be a multiple of trainer.checkpoint_every_n_steps = 100"
        "; nearest legal value is 200",
    ),
    (
        PretrainConfig,
        {"trainer.watchdog_timeout_s": 900},
        1,
        "trainer.watchdog_timeout_s = 900.0: must be below trainer.collective_timeout_s = 900; two thirds of it, 600, "
        "leaves time for the report",
    ),
    (
        PretrainConfig,
        {"exp_manager.overwrite": True},
        1,
        "exp_manager.overwrite = true: contradicts exp_manager.resume_if_exists = true; nearest legal value is false",
    ),
)
