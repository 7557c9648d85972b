"""Rules of the verbs that take models out of a checkpoint, and of text generation; each yields Problems.

The parameters of a `check_...` are the sections and fields it reads (rules.py).
"""

from elastic.config.load import Problem, Problems
from elastic.config.rules_elastic import unique_names
from elastic.config.rules_layout import Cluster
from elastic.config.sections import ParallelConfig
from elastic.config.serving import ExportConfig, ServedInput, SubnetConfig

Subnets = tuple[SubnetConfig, ...]


def check_subnets(budget_names: tuple[str, ...] | None, subnets: Subnets) -> Problems:
    """Something is asked for, and subnets given by hand have names of their own, apart from the budgets'."""
    if budget_names == () and not subnets:
        yield Problem("budget_names", [], "names nothing, and no subnets are given", "null takes all budgets")
    yield from unique_names("subnets", [subnet.name for subnet in subnets])


def check_export(export: ExportConfig) -> Problems:
    """Extract must have something to write."""
    if not export.hugging_face and not export.megatron:
        rule = "export.hugging_face and export.megatron must not both be false"
        yield Problem("export.hugging_face", False, rule, "nearest legal value is true")


def check_source(
    init_from: ServedInput, folder: str | None, budget: str | None, think: str | None, answer: str | None
) -> Problems:
    """Weights come from one place, and a Hugging Face folder is one model without budgets."""
    if (init_from.checkpoint is None) == (folder is None):
        rule = "exactly one of init_from.checkpoint and folder must be given"
        remedy = "set init_from.checkpoint=RUN or folder=FOLDER" if folder is None else "set folder=null"
        yield Problem("init_from.checkpoint", init_from.checkpoint, rule, remedy)
    if folder is None:
        return
    if init_from.router is not None:
        rule = "chooses inside a nested checkpoint, and folder holds one model"
        yield Problem("init_from.router", init_from.router, rule, "set init_from.router=null")
    for name, value in {"budget": budget, "think": think, "answer": answer}.items():
        if value is not None:
            rule = "names a part of a nested checkpoint, and folder holds one model"
            yield Problem(name, value, rule, f"set {name}=null or give init_from.checkpoint")


def check_writers(budget: str | None, think: str | None, answer: str | None, subnets: Subnets) -> Problems:
    """One budget writes, or two take turns; every subnet given by hand has a use."""
    yield from unique_names("subnets", [subnet.name for subnet in subnets])
    for index, name in enumerate(subnet.name for subnet in subnets):
        if name not in (budget, think, answer):
            remedy = f"set budget={name}, or think or answer"
            yield Problem(f"subnets.{index}.name", name, "is named by none of budget, think and answer", remedy)
    if (think is None) != (answer is None):
        missing, given = ("answer", think) if answer is None else ("think", answer)
        yield Problem(missing, None, "think and answer go together", f"set {missing}=NAME, or budget={given} alone")
    if budget is not None and (think or answer):
        yield Problem("budget", budget, "contradicts think and answer", "set budget=null")


def check_prompts(prompts: tuple[str, ...], prompt_file: str | None) -> Problems:
    """There is something to go on from."""
    if not prompts and prompt_file is None:
        yield Problem("prompts", [], "there is nothing to go on from", "set prompts='[\"def f(\"]' or prompt_file=FILE")
    for index, prompt in enumerate(prompts):
        if not prompt:
            yield Problem(f"prompts.{index}", prompt, "must not be empty", "give a text to go on from")


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> Problems:
    """What narrows a draw needs one."""
    for name, value in {"top_k": top_k, "top_p": top_p}.items():
        if value is not None and temperature == 0:
            rule = "narrows a draw, and temperature = 0 takes the most likely token"
            yield Problem(name, value, rule, f"set temperature=1.0 or {name}=null")


def check_ranks(parallel: ParallelConfig, cluster: Cluster) -> Problems:
    """One copy of the model, split over tensor-parallel ranks only: single tokens cannot be shared out."""
    for name, value in {"pipeline": parallel.pipeline, "context": parallel.context}.items():
        if value > 1:
            rule = "text is written token by token, which cannot be split this way"
            yield Problem(f"parallel.{name}", value, rule, "nearest legal value is 1; split with parallel.tensor")
    if parallel.sequence:
        rule = "text is written token by token, which cannot be split over ranks"
        yield Problem("parallel.sequence", True, rule, "nearest legal value is false")
    if cluster.num_processes % parallel.model_size == 0 and cluster.num_processes > parallel.model_size:
        rule = f"must be the number of processes = {cluster.num_processes}: there is one copy of the model"
        remedy = f"start {parallel.tensor} process{'es' if parallel.tensor > 1 else ''} or set parallel.tensor"
        yield Problem("parallel.tensor", parallel.tensor, rule, remedy)
