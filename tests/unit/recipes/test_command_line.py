"""Mistakes at Hydra's level: the message names the argument and what there is to choose from, before anything runs."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from elastic.config.verbs import ElasticConfig
from recipes import _common
from recipes._arguments import argument_problems, with_quotes

RUNS = ", ".join(path.stem for path in sorted(_common.CONF.glob("*.yaml")))
LAYOUTS = "none, tp2_pp2, tp2_pp2_cp4, tp8_cp2"
BUDGETS = ", ".join(path.stem for path in sorted((_common.CONF / "budgets").glob("*.yaml")))
NO_OVERRIDE = "is not KEY=VALUE as Hydra reads it"


@pytest.fixture
def message_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what starts a recipe in this process, composed as Hydra does, and gives the message it leaves with."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def started(*arguments: str, conf: Path = _common.CONF, name: str = "train_elastic") -> str:
        def recipe() -> None:
            overrides = [word for word in sys.argv[1:] if not word.startswith(("hydra.", "--", "-cn"))]
            with initialize_config_dir(config_dir=str(conf), version_base=None):
                cfg = compose(name, overrides)
            assert isinstance(cfg, DictConfig)
            _common.load_config(cfg, ElasticConfig)
            pytest.fail("the mistake went unnoticed")

        monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            _common.run(recipe)
        assert caught.value.code == 2
        assert not torch.distributed.is_initialized()
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        return printed.err

    return started


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "--config-name=elastic_13b",
            f'--config-name = "elastic_13b": is no file of conf/; nearest is elastic_12b, there are {RUNS}',
        ),
        (
            "parallel=unknown",
            f'parallel = "unknown": is no file of conf/parallel/; nearest is none, there are {LAYOUTS}',
        ),
        (
            "parallel=[none,nine]",
            f'parallel = "nine": is no file of conf/parallel/; nearest is none, there are {LAYOUTS}',
        ),
        (
            "budgets=[{name: small, ratio: 0.5}]",
            'budgets = [{"name": "small", "ratio": 0.5}]: is a group of files and takes the name of one; '
            f"there are {BUDGETS}; a field of it is set as budgets.FIELD=VALUE",
        ),
        (
            "trainer=null",
            "trainer = null: is a group of files and takes the name of one; there are cpu, gpu; a field of it is "
            "set as trainer.FIELD=VALUE",
        ),
        ("data.path", f"data.path = null: {NO_OVERRIDE}; write data.path=VALUE"),
        (
            "data.path=folder=7",
            f'data.path = "folder=7": {NO_OVERRIDE}; put the value in quotes, \'data.path="folder=7"\'',
        ),
        (
            "elastic.space.ffn.choices=[256,192",
            f'elastic.space.ffn.choices = "[256,192": {NO_OVERRIDE}; put the value in quotes, '
            "'elastic.space.ffn.choices=\"[256,192\"'",
        ),
        ("=3", 'command line = "=3": has no key before the =; write KEY=VALUE'),
        (
            "seed=1,2",
            'seed = "1,2": is several values, which only --multirun runs one after the other; '
            "write seed=[1,2] for a list",
        ),
        (
            "elastic.space.keep_at_least={}",
            "elastic.space.keep_at_least = {}: is merged with the entries that are there, and changes nothing; "
            "write elastic.space.keep_at_least=null for none of them, or the entries that differ",
        ),
    ],
)
def test_mistake_is_named_with_what_there_is_to_choose_from(
    message_of: Callable[..., str], argument: str, line: str
) -> None:
    assert message_of(argument).splitlines() == ["1 problem in the configuration:", f"  {line}"]


def test_mistakes_of_several_arguments_come_together(message_of: Callable[..., str]) -> None:
    lines = message_of("-cn", "train_elastik", "budgets=smok", "seed", "parallel=2", "data.path=a").splitlines()
    assert lines[0] == "4 problems in the configuration:"
    assert [line.strip().partition(": ")[0] for line in lines[1:]] == [
        '--config-name = "train_elastik"',
        'budgets = "smok"',
        "seed = null",
        "parallel = 2",
    ]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("modle=smoke", 'modle = "smoke": unknown key; did you mean model?'),
        ("model.hidden=[1,2]", "model.hidden = [1, 2]: must be a whole number; the default is 128"),
        ("seed={a: 1}", 'seed = {"a": 1}: must be a whole number; the default is 1234'),
        ("model.hidden.width=3", 'model.hidden = {"width": 3}: must be a whole number; the default is 128'),
    ],
)
def test_wrong_key_or_value_comes_with_everything_left_unset(
    message_of: Callable[..., str], argument: str, line: str
) -> None:
    heading, *lines = [line.strip() for line in message_of(argument).splitlines()]
    assert heading == "3 problems in the configuration:"
    assert line in lines
    for unset in ("data.path", "init_from.permuted_parent"):
        assert any(line.startswith(f"{unset} = null: missing, it has no default; set {unset}=...,") for line in lines)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("~nothing", ("nothing", "does not exist")),
        ("+seed=3", ("already at 'seed'", "++seed=3")),
        ("seed=${nowhere}", ("nowhere", "not found", "seed")),
    ],
)
def test_what_hydra_itself_explains_is_passed_on(
    message_of: Callable[..., str], argument: str, words: tuple[str, ...]
) -> None:
    message = message_of(argument)
    assert all(word in message for word in words)


def test_own_config_that_is_no_yaml_is_named_with_its_line(message_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 1\nmodel: [1, 2\nmore: 3\n")
    message = message_of(f"--config-dir={tmp_path}", conf=tmp_path, name="mine")
    assert "mine.yaml" in message and "line 3" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config-name", "smoke_elastic", "seed=3"],
        ["--config-name=elastic_12b.yaml", "budgets=smoke", "~exp_manager.version"],
        ["-cn", "mine", "-cp", "own", "parallel=mine"],
        ["hydra.searchpath=[file://own]", "parallel=mine"],
        ["--multirun", "seed=1,2"],
        ["--cfg", "job", "--info", "defaults", "data.path='a=b'", "exp_manager.name=a b", "elastic.space.ffn=null"],
        ["budgets=nemotron_nano_v2_9b", "budget_names=[a,b]", "+extra=1", "++seed=2", "~budgets"],
        ["curriculum.0.lr.peak=1e-3", 'init_from.permuted_parent="with, comma"', "data.path=s3-like/path-1_2.x"],
    ],
)
def test_legal_arguments_pass(arguments: list[str]) -> None:
    assert list(argument_problems(arguments, _common.CONF)) == []


def test_own_configs_stand_beside_those_of_the_project(message_of: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "parallel").mkdir()
    (tmp_path / "place").mkdir()
    for name in ("mine", "parallel/wide", "place/here"):
        (tmp_path / f"{name}.yaml").write_text("tensor: 1\n")
    own = ["--config-dir", str(tmp_path)]
    legal = ["-cn=mine", "parallel=wide", "parallel=none", "budgets=smoke"]
    assert list(argument_problems([*own, *legal], _common.CONF)) == []
    assert _common.hydra_arguments([*own, "place=here"])[-2] == "place=here"  # their groups are groups, too
    wrong = list(argument_problems([*own, "-cn=mind", "parallel=wider", "budgets=smok"], _common.CONF))
    assert [problem.remedy.partition(",")[0] for problem in wrong] == [
        "nearest is mine", "nearest is wide", "nearest is smoke",
    ]  # fmt: skip
    lines = message_of("--config-dir=nowhere").splitlines()
    assert lines[1:] == ['  --config-dir = "nowhere": is no folder; name the folder that holds your own YAML files']


def test_a_constraint_is_a_text_to_hydra() -> None:
    quoted = with_quotes(["constraint=params<=7e9,flops_per_token>=2", 'constraint="params<=1"', "seed=1"])
    assert quoted == ['constraint="params<=7e9,flops_per_token>=2"', 'constraint="params<=1"', "seed=1"]
    assert not list(argument_problems(quoted, _common.CONF))
    overrides = [word for word in _common.hydra_arguments(quoted) if "hydra." not in word]
    with initialize_config_dir(config_dir=str(_common.CONF), version_base=None):
        assert compose("search", overrides[:1]).constraint == "params<=7e9,flops_per_token>=2"
