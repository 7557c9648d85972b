"""Bad configs of what runs a checkpoint or a folder: text generation, evaluation by tasks."""

from elastic.config.tasks import EvaluateTasksConfig
from elastic.config.verbs import GenerateConfig
from tests.unit.config.configs import BadConfig

# verb, changes, number of processes, the one line of the error: field = value: rule; remedy
BAD: tuple[BadConfig, ...] = (
    # text
    (
        GenerateConfig,
        {"init_from.checkpoint": None},
        1,
        "init_from.checkpoint = null: exactly one of init_from.checkpoint and folder must be given; set "
        "init_from.checkpoint=RUN or folder=FOLDER",
    ),
    (
        GenerateConfig,
        {"folder": "export"},
        1,
        'init_from.checkpoint = "family": exactly one of init_from.checkpoint and folder must be given; set '
        "folder=null",
    ),
    (
        GenerateConfig,
        {"init_from.checkpoint": None, "folder": "export", "budget": "9b"},
        1,
        'budget = "9b": names a part of a nested checkpoint, and folder holds one model; set budget=null or give '
        "init_from.checkpoint",
    ),
    (
        GenerateConfig,
        {"init_from.checkpoint": None, "folder": "export", "init_from.router": "family"},
        1,
        'init_from.router = "family": chooses inside a nested checkpoint, and folder holds one model; set '
        "init_from.router=null",
    ),
    (
        GenerateConfig,
        {"think": "9b"},
        1,
        "answer = null: think and answer go together; set answer=NAME, or budget=9b alone",
    ),
    (
        GenerateConfig,
        {"budget": "6b", "think": "9b", "answer": "12b"},
        1,
        'budget = "6b": contradicts think and answer; set budget=null',
    ),
    (
        GenerateConfig,
        {"think": "9b", "answer": "12b", "marker": ""},
        1,
        "marker = null: missing, it has no default; set marker=..., the text that ends the thinking",
    ),
    (
        GenerateConfig,
        {"subnets": [{"name": "thin"}]},
        1,
        'subnets.0.name = "thin": is named by none of budget, think and answer; set budget=thin, or think or answer',
    ),
    (
        GenerateConfig,
        {"prompts": []},
        1,
        "prompts = []: there is nothing to go on from; set prompts='[\"def f(\"]', prompt_file=FILE or chat_file=FILE",
    ),
    (
        GenerateConfig,
        {"prompts": ["once", ""]},
        1,
        'prompts.1 = "": must not be empty; give a text to go on from',
    ),
    (
        GenerateConfig,
        {"top_k": 5},
        1,
        "top_k = 5: narrows a draw, and temperature = 0 takes the most likely token; set temperature=1.0 or top_k=null",
    ),
    (
        GenerateConfig,
        {"temperature": 0.7, "top_p": 1.5},
        1,
        "top_p = 1.5: must be at most 1; nearest legal value is 1",
    ),
    (
        GenerateConfig,
        {"parallel.pipeline": 2},
        2,
        "parallel.pipeline = 2: text is written token by token, which cannot be split this way; nearest legal value "
        "is 1; split with parallel.tensor",
    ),
    (
        GenerateConfig,
        {"parallel.context": 2},
        2,
        "parallel.context = 2: text is written token by token, which cannot be split this way; nearest legal value "
        "is 1; split with parallel.tensor",
    ),
    (
        GenerateConfig,
        {"parallel.tensor": 2, "parallel.sequence": True},
        2,
        "parallel.sequence = true: text is written token by token, which cannot be split over ranks; nearest legal "
        "value is false",
    ),
    (
        GenerateConfig,
        {"parallel.tensor": 2},
        4,
        "parallel.tensor = 2: must be the number of processes = 4: there is one copy of the model; start 2 processes "
        "or set parallel.tensor",
    ),
    # tasks
    (
        EvaluateTasksConfig,
        {"tasks": []},
        1,
        "tasks = null: missing, it has no default; set tasks=..., names of tasks, as in tasks=[arc_easy]",
    ),
    (
        EvaluateTasksConfig,
        {"init_from.checkpoint": None},
        1,
        "init_from.checkpoint = null: exactly one of init_from.checkpoint and folder must be given; set "
        "init_from.checkpoint=RUN or folder=FOLDER",
    ),
    (
        EvaluateTasksConfig,
        {"init_from.checkpoint": None, "folder": "export", "budget_names": ["9b"]},
        1,
        'budget_names = ["9b"]: names parts of a nested checkpoint, and folder holds one model; leave budget_names '
        "out, or give init_from.checkpoint",
    ),
    (
        EvaluateTasksConfig,
        {"init_from.checkpoint": None, "folder": "export", "parallel.tensor": 2},
        2,
        "parallel.tensor = 2: lm-eval's own hf runs a folder, in one process; nearest legal value is 1",
    ),
    (
        EvaluateTasksConfig,
        {"latency_ms.small": 0.0},
        1,
        "latency_ms.small = 0.0: must be above 0; it has no default",
    ),
    (
        EvaluateTasksConfig,
        {"parallel.pipeline": 2},
        2,
        "parallel.pipeline = 2: text is written token by token, which cannot be split this way; nearest legal value "
        "is 1; split with parallel.tensor",
    ),
)
