"""A bad curriculum, space, budget or loss of the family."""

from elastic.config.verbs import ElasticConfig, ExtractConfig, PretrainConfig
from tests.unit.config.configs import BadConfig

ONE_BUDGET: dict[str, object] = {
    "elastic.budgets": [{"name": "full", "ratio": 1.0}],
    "curriculum.0.budget_weights": {},
}
# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[BadConfig, ...] = (
    # names that are folders, too
    (
        ElasticConfig,
        {"elastic.budgets": [{"name": "../full", "ratio": 1.0}], "curriculum.0.budget_weights": {}},
        1,
        'elastic.budgets.0.name = "../full": it names a folder, too: letters, digits, _ . + and -, the first a letter, '
        "a digit or _; nearest legal value is full",
    ),
    (
        ExtractConfig,
        {"subnets": [{"name": "/srv/thin", "hidden": 64}]},
        1,
        'subnets.0.name = "/srv/thin": it names a folder, too: letters, digits, _ . + and -, the first a letter, a '
        "digit or _; nearest legal value is srvthin",
    ),
    # the curriculum
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 1, "tokens": 10}]},
        1,
        "curriculum.0.steps = 1: exactly one of steps and tokens must be given; set curriculum.0.steps=null",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a"}]},
        1,
        "curriculum.0.steps = null: exactly one of steps and tokens must be given; set curriculum.0.steps or "
        "curriculum.0.tokens",
    ),
    (
        ElasticConfig,
        {"curriculum.1.name": "short"},
        1,
        'curriculum.1.name = "short": names must differ, this one stands 2 times; choose another, for example short_2',
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 5, "lr": {"peak": 0.1, "min": 0.2, "schedule": "cosine"}}]},
        1,
        "curriculum.0.lr.min = 0.2: must be at most curriculum.0.lr.peak = 0.1; nearest legal value is 0.1",
    ),
    (
        ElasticConfig,
        {"curriculum.0.router_lr": {"warmup_steps": 60}},
        1,
        "curriculum.0.router_lr.warmup_steps = 60: must be at most the 10 steps of phase short; nearest legal value is "
        "10",
    ),
    (
        PretrainConfig,
        {"trainer.max_steps": 101},
        1,
        "trainer.max_steps = 101: must be at most the 100 steps of the curriculum; nearest legal value is 100, null "
        "runs them all",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": {"smal": 1}},
        1,
        "curriculum.0.budget_weights.smal = 1.0: is not a budget of elastic.budgets (full, small); nearest legal name "
        "is small, curriculum.0.budget_weights=null gives all the same weight",
    ),
    (
        PretrainConfig,
        {"curriculum": [{"name": "a", "steps": 5, "lr": {"peak": 0.2, "min": 0.1}}]},
        1,
        "curriculum.0.lr.min = 0.1: says nothing while curriculum.0.lr.schedule = constant; set "
        "curriculum.0.lr.schedule=cosine or curriculum.0.lr.min=0",
    ),
    (
        ElasticConfig,
        {"curriculum.0.budget_weights": {"full": 0}},
        1,
        'curriculum.0.budget_weights = {"full": 0.0}: at least one weight must be above 0; write null for equal '
        "weights",
    ),
    (
        ElasticConfig,
        {"curriculum.0.temperature": [0.1, 1.0]},
        1,
        "curriculum.0.temperature = [0.1, 1.0]: the Gumbel temperature must not rise; nearest legal value is "
        "[0.1, 0.1]",
    ),
    (
        ElasticConfig,
        {"curriculum.1.router_frozen": False},
        1,
        'curriculum.1.execution = "slice": a sliced forward gives the router no gradient, so it needs '
        "curriculum.1.router_frozen = true; nearest legal value is mask",
    ),
    # space, budgets, loss
    (
        ElasticConfig,
        {"elastic.space.ffn.choices": [256, 200, 196]},
        1,
        "elastic.space.ffn.choices = [256, 200, 196]: choice 196 must be a multiple of 8, nearest legal is 192; legal "
        "are the full width 256 first, then smaller multiples, for example [256, 192, 128]",
    ),
    (
        ElasticConfig,
        {"elastic.space.keep_at_least": {"attention": 2}},
        1,
        "elastic.space.keep_at_least.attention = 2: the parent has 1 layers of this kind; nearest legal value is 1",
    ),
    (
        ElasticConfig,
        {"elastic.space.keep_at_least": {"atention": 1}},
        1,
        'elastic.space.keep_at_least.atention = "atention": must be one of mamba, mlp, attention; nearest legal value '
        "is attention",
    ),
    (
        ElasticConfig,
        {"elastic.space.keep_at_least": {"mamba": 2, "mlp": 2}},
        1,
        "elastic.space.depth.choices = [5, 4, 3]: choice 3 is below the 4 layers of keep_at_least; legal are the full "
        "width 5 first, then smaller multiples, for example [5, 3, 2]",
    ),
    (
        ElasticConfig,
        {"elastic.space.depth.choices": [3, 4, 5]},
        1,
        "elastic.space.depth.choices = [3, 4, 5]: the first choice is 3, it must be the full width 5; choices "
        "[3, 4, 5] must be strictly descending; legal are the full width 5 first, then smaller multiples, for example "
        "[5, 3, 2]",
    ),
    (
        ElasticConfig,
        {"elastic.space.lanes": 7, "init_from.permuted_parent": "parent_7"},
        1,
        "model.ffn = 256: must be a multiple of elastic.space.lanes = 7; nearest legal value is 259",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.target": 1000},
        1,
        "elastic.budgets.1.target = 1000.0: exactly one of target and ratio must be given; set "
        "elastic.budgets.1.target=null",
    ),
    (
        ElasticConfig,
        {"elastic.budgets.1.name": "full", "curriculum.0.budget_weights": {}},
        1,
        'elastic.budgets.1.name = "full": names must differ, this one stands 2 times; choose another, for example '
        "full_2",
    ),
    (
        ElasticConfig,
        {"elastic.router.draws_per_step": 3, "data.micro_batch": 2},
        2,
        "elastic.router.draws_per_step = 3: must divide the micro-batches of a step, each of which has one budget: 4 "
        "in short, 4 in long; nearest legal value is 2, null draws one for each micro-batch of a replica",
    ),
    (
        ElasticConfig,
        {"elastic.router.draws_per_step": 2, "elastic.router.noise_draws_per_step": 3},
        1,
        "elastic.router.noise_draws_per_step = 3: must divide the 8 micro-batches of a step in short into whole parts "
        "of the 2 budgets drawn for it; nearest legal value is 2, null draws for every micro-batch",
    ),
    (
        ElasticConfig,
        {"distill.kl_weight": 0},
        1,
        "distill.kl_weight = 0.0: distill.kl_weight and distill.cross_entropy_weight must not both be 0; nearest legal "
        "value is 1.0",
    ),
    (
        ElasticConfig,
        {"distill.num_chunks": 4},
        1,
        "distill.num_chunks = 4: unknown key; known here: kl_weight, cross_entropy_weight, temperature, chunk_tokens, "
        "teacher, teacher_cross_entropy_weight, teacher_precision",
    ),
    (
        ElasticConfig,
        {"distill.teacher": "trained", "distill.teacher_precision": "fp8"},
        1,
        'distill.teacher_precision = "fp8": is for a frozen teacher, and distill.teacher = trained learns in the '
        "student's own weights; nearest legal value is bf16",
    ),
    (
        ElasticConfig,
        {"distill.chunk_tokens": 0},
        1,
        "distill.chunk_tokens = 0: must be at least 1; nearest legal value is 1",
    ),
    # more of the space
    (
        ElasticConfig,
        {"elastic.space": {}, "elastic.budgets": [{"name": "full", "ratio": 1.0}], "curriculum.0.budget_weights": {}},
        1,
        "elastic.space = {}: no axis has a second choice, so the family would be the parent alone; give at "
        "least one axis two, for example elastic.space.hidden.choices=[128, 96, 64]",
    ),
    (
        ElasticConfig,
        {
            "elastic.space": {"hidden": {"choices": [128]}},
            "elastic.budgets": [{"name": "full", "ratio": 1.0}],
            "curriculum.0.budget_weights": {},
        },
        1,
        'elastic.space = {"hidden": [128]}: no axis has a second choice, so the family would be the parent '
        "alone; give at least one axis two, for example elastic.space.hidden.choices=[128, 96, 64]",
    ),
    (
        ElasticConfig,
        {"elastic.space.attention_head": {"choices": [4, 3]}},
        1,
        "elastic.space.attention_head.choices = [4, 3]: choice 3 must be a multiple of 2, nearest legal is "
        "4; legal are the full width 4 first, then smaller multiples, for example [4, 2]",
    ),
    (
        ElasticConfig,
        {"elastic.space.hidden": {"choices": [128, 128]}},
        1,
        "elastic.space.hidden.choices = [128, 128]: choices [128, 128] must be strictly descending; legal "
        "are the full width 128 first, then smaller multiples, for example [128, 96, 64]",
    ),
    (
        ElasticConfig,
        {"elastic.space.depth.per_layer": True},
        1,
        "elastic.space.depth.choices = [5, 4, 3]: one choice serves all layers, per_layer is not allowed; "
        "legal are the full width 5 first, then smaller multiples, for example [5, 3, 2]",
    ),
    (
        ElasticConfig,
        {"elastic.router.mode": "hard"},
        1,
        'elastic.router.mode = "hard": must be one of soft, straight_through; nearest legal value is straight_through',
    ),
    (
        ElasticConfig,
        {"elastic.deployment.batch": 0},
        1,
        "elastic.deployment.batch = 0: must be at least 1; nearest legal value is 1",
    ),
    (
        ElasticConfig,
        {"elastic.space.mamba_heads": {"choices": [8, 4]}},
        1,
        'elastic.space.mamba_heads = {"choices": [8, 4]}: unknown key; did you mean elastic.space.mamba_head?',
    ),
    (
        ElasticConfig,
        {"init_from.subnets": [{"name": "between", "hidden": 96}]},
        1,
        'init_from.subnets.0.name = "between": is none of elastic.budgets (full, small); add a budget of that name',
    ),
    (
        ElasticConfig,
        {"init_from.subnets": [{"name": "small", "params": 10**6}]},
        1,
        "init_from.subnets.0.params = 1000000: is a size, and a start has widths; give widths, or what "
        "recipes/search.py wrote",
    ),
    (
        PretrainConfig,
        {"model.vocab": 299},
        1,
        "model.vocab = 299: must be at least the 300 tokens of the data in text; nearest legal value is 384, "
        "null takes it from the data",
    ),
)
