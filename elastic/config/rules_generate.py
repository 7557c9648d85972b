"""Rules of text generation: whose weights, who writes, what from, on which ranks; each yields Problems."""

from collections.abc import Iterator

from elastic.config.load import Problem
from elastic.config.rules_elastic import unique_names
from elastic.config.rules_layout import Cluster
from elastic.config.serving import GenerateConfig


def check_source(config: GenerateConfig, cluster: Cluster) -> Iterator[Problem]:
    """Weights come from one place, and a Hugging Face folder is one model without budgets."""
    source, folder = config.init_from, config.folder
    if (source.checkpoint is None) == (folder is None):
        rule = "exactly one of init_from.checkpoint and folder must be given"
        remedy = "set init_from.checkpoint=RUN or folder=FOLDER" if folder is None else "set folder=null"
        yield Problem("init_from.checkpoint", source.checkpoint, rule, remedy)
    if folder is None:
        return
    if source.router is not None:
        rule = "chooses inside a nested checkpoint, and folder holds one model"
        yield Problem("init_from.router", source.router, rule, "set init_from.router=null")
    for name in ("budget", "think", "answer"):
        value = {"budget": config.budget, "think": config.think, "answer": config.answer}[name]
        if value is not None:
            rule = "names a part of a nested checkpoint, and folder holds one model"
            yield Problem(name, value, rule, f"set {name}=null or give init_from.checkpoint")


def check_writers(config: GenerateConfig, cluster: Cluster) -> Iterator[Problem]:
    """One budget writes, or two take turns; every subnet given by hand has a use."""
    yield from unique_names("subnets", [subnet.name for subnet in config.subnets])
    names = (config.budget, config.think, config.answer)
    for index, subnet in enumerate(config.subnets):
        if subnet.name not in names:
            remedy = f"set budget={subnet.name}, or think or answer"
            yield Problem(f"subnets.{index}.name", subnet.name, "is named by none of budget, think and answer", remedy)
    if (config.think is None) != (config.answer is None):
        missing, given = ("answer", config.think) if config.answer is None else ("think", config.answer)
        rule = "think and answer go together"
        yield Problem(missing, None, rule, f"set {missing}=NAME, or budget={given} alone")
    if config.budget is not None and (config.think or config.answer):
        yield Problem("budget", config.budget, "contradicts think and answer", "set budget=null")


def check_prompts(config: GenerateConfig, cluster: Cluster) -> Iterator[Problem]:
    """There is something to go on from."""
    if not config.prompts and config.prompt_file is None:
        yield Problem("prompts", [], "there is nothing to go on from", "set prompts='[\"def f(\"]' or prompt_file=FILE")
    for index, prompt in enumerate(config.prompts):
        if not prompt:
            yield Problem(f"prompts.{index}", prompt, "must not be empty", "give a text to go on from")


def check_sampling(config: GenerateConfig, cluster: Cluster) -> Iterator[Problem]:
    """What narrows a draw needs one."""
    for name, value in (("top_k", config.top_k), ("top_p", config.top_p)):
        if value is not None and config.temperature == 0:
            rule = "narrows a draw, and temperature = 0 takes the most likely token"
            yield Problem(name, value, rule, f"set temperature=1.0 or {name}=null")


def check_ranks(config: GenerateConfig, cluster: Cluster) -> Iterator[Problem]:
    """One copy of the model, split over tensor-parallel ranks only: single tokens cannot be shared out."""
    parallel = config.parallel
    for name, value in (("pipeline", parallel.pipeline), ("context", parallel.context)):
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
