"""Several mistakes at once: all in one message, each once."""

import re

from elastic.config.verbs import ElasticConfig, ExtractConfig, ImportanceConfig, PretrainConfig
from elastic.corpus.config import PrepareConfig
from tests.unit.config.bad_configs import family, fields, generate, layout, verbs
from tests.unit.config.configs import VERBS, ProblemsOf, legal, values_of


def test_unreachable_budget_names_the_nearest_reachable_target(problems_of: ProblemsOf) -> None:
    (line,) = problems_of(ElasticConfig, {"elastic.budgets.1.ratio": 0.01})
    assert line.startswith("elastic.budgets.1.ratio = 0.01: target ")
    (found,) = re.findall(r"; nearest reachable is ([\d,]+), a ratio of ([\d.]+)$", line)
    # Both remedies really are legal, and nothing below them is.
    for name, nearest in (("target", int(found[0].replace(",", ""))), ("ratio", float(found[1]))):
        legal(ElasticConfig, values_of(ElasticConfig, {"elastic.budgets.1": {"name": "small", name: nearest}}))
        assert problems_of(ElasticConfig, {"elastic.budgets.1": {"name": "small", name: nearest * 0.99}})


def test_all_problems_come_in_one_error(problems_of: ProblemsOf) -> None:
    changes: dict[str, object] = {
        "trainr": {},
        "model.mamba_heads": 9,
        "data.micro_batch": 0,
        "optim.adam_beta1": 2,
        "elastic.router.hidden_width": "wide",
        "distill.kl_weight": 0,
        "parallel.sequence": True,
    }
    lines = problems_of(ElasticConfig, changes)
    assert sorted(line.partition(" = ")[0] for line in lines) == sorted(
        [
            "trainr",
            "model.mamba_heads",
            "data.micro_batch",
            "optim.adam_beta1",
            "elastic.router.hidden_width",
            "distill.kl_weight",
            "parallel.sequence",
        ]
    )


def test_entries_of_a_list_are_all_reported(problems_of: ProblemsOf) -> None:
    lines = problems_of(ElasticConfig, {"elastic.space.ffn.choices": [256, -8, "x"]})
    assert [line.partition(":")[0] for line in lines] == [
        "elastic.space.ffn.choices.1 = -8",
        'elastic.space.ffn.choices.2 = "x"',
    ]


def test_one_mistake_is_not_reported_twice(problems_of: ProblemsOf) -> None:
    """A rule between sections stays silent while one of them is already known to be wrong."""
    lines = problems_of(ElasticConfig, {"model.ffn": "big"})
    assert lines == ['model.ffn = "big": must be a whole number; the default is 256']


def test_every_section_of_a_run_can_be_wrong_at_once(problems_of: ProblemsOf) -> None:
    changes: dict[str, object] = {
        "model.hidden": 0,
        "data.path": "nowhere",
        "optim.adam_beta2": "high",
        "parallel.tensor": -1,
        "trainer.precision": "fp8",
        "exp_manager.create_tensorbord_logger": True,
        "curriculum": [{"name": "a", "steps": 0}],
    }
    assert sorted(problems_of(PretrainConfig, changes)) == [
        "curriculum.0.steps = 0: must be at least 1; nearest legal value is 1",
        'data.path = "nowhere": does not exist; the nearest folder that exists is .',
        "exp_manager.create_tensorbord_logger = true: unknown key; did you mean exp_manager.create_tensorboard_logger?",
        "model.hidden = 0: must be at least 1; nearest legal value is 1",
        'optim.adam_beta2 = "high": must be a finite number; the default is 0.98',
        "parallel.tensor = -1: must be at least 1; nearest legal value is 1",
        'trainer.precision = "fp8": must be one of fp32, bf16; nearest legal value is fp32',
    ]


def test_rules_between_fields_and_missing_folders_come_together(problems_of: ProblemsOf) -> None:
    changes: dict[str, object] = {
        "importance.num_sequences": 30,
        "importance.depth_sequences": 64,
        "importance.sequence_length": 1,
        "init_from.parent": "gone/version_0",
    }
    assert [line.partition(" = ")[0] for line in problems_of(ImportanceConfig, changes)] == [
        "importance.sequence_length",
        "init_from.parent",
    ]
    # The length is what kept the other rules of its section silent.
    del changes["importance.sequence_length"]
    assert [line.partition(" = ")[0] for line in problems_of(ImportanceConfig, changes)] == [
        "importance.num_sequences",
        "importance.depth_sequences",
        "init_from.parent",
    ]


def test_all_problems_of_an_export_and_of_a_preparation_come_in_one_error(problems_of: ProblemsOf) -> None:
    export: dict[str, object] = {
        "export": {"hugging_face": False, "check": "all", "shard_bytes": 0, "precision": "int4"},
        "subnets": [{"name": "a", "hidden": "x"}, {"name": ""}],
    }
    assert [line.partition(" = ")[0] for line in problems_of(ExtractConfig, export)] == [
        "subnets.0.hidden",
        "subnets.1.name",
        "export.precision",
        "export.shard_bytes",
        "export.check.0",
    ]
    preparation: dict[str, object] = {"document_format": "csv", "vocab_size": 1, "suffixes": [], "output_dir": ""}
    assert [line.partition(" = ")[0] for line in problems_of(PrepareConfig, preparation)] == [
        "document_format",
        "suffixes",
        "output_dir",
        "vocab_size",
    ]


def test_at_least_forty_different_mistakes_are_in_the_tables() -> None:
    rows = [row for file in (fields, layout, family, verbs, generate) for row in file.BAD]
    assert len({(kind, line) for kind, *_, line in rows}) == len(rows) >= 100
    for kind, _, _, line in rows:
        value, _, rest = line.partition(": ")
        rule, _, remedy = rest.rpartition("; ")
        assert " = " in value and rule and remedy, f"{kind.__name__}: {line}"
    assert {kind.__name__ for kind, *_ in rows} == {kind.__name__ for kind in VERBS}
