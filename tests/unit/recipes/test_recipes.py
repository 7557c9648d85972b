"""How a recipe ends: user errors in plain words with code 2, our bugs with a traceback, nothing left lying about."""

import sys

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from elastic.config.sections import ComputeConfig
from elastic.config.verbs import EvaluateConfig
from elastic.space.shape import LayerPattern
from recipes import _common


@pytest.fixture
def plain_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `run` see a command line without arguments, on one process."""
    monkeypatch.setattr(sys, "argv", ["recipe.py"])
    for name in ("RANK", "WORLD_SIZE", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("plain_command_line")
def test_user_error_is_printed_without_traceback_and_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _common.run(lambda: LayerPattern.parse("MX"))
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert "character 'X' at position 1" in printed.err and "Traceback" not in printed.err
    assert printed.out == ""


@pytest.mark.usefixtures("plain_command_line")
def test_our_own_bug_keeps_its_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        _common.run(lambda: int("x"))


@pytest.mark.usefixtures("plain_command_line")
def test_wrong_config_leaves_before_the_body_runs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _common.load_config(OmegaConf.create({"seed": "x", "budget": []}), EvaluateConfig)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    for line in ('seed = "x": must be a whole number', "budget = []: unknown key; did you mean budget_names?"):
        assert line in error


@pytest.mark.usefixtures("plain_command_line")
def test_other_ranks_wait_so_that_rank_0_can_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(SystemExit):
        _common.leave("too small")
    assert waited == [_common.WAIT_FOR_RANK_0_S]
    assert "too small" in capsys.readouterr().err


def test_process_is_set_up_as_the_trainer_section_says() -> None:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        _common.set_up_process(ComputeConfig(num_threads=threads + 1, deterministic=True))
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
        _common.set_up_process(ComputeConfig(num_threads=None, deterministic=False))
        assert torch.get_num_threads() == threads + 1
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("plain_command_line")
def test_an_alias_that_holds_itself_is_named_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    values = yaml.safe_load("prompts: &itself [*itself]")
    with pytest.raises(SystemExit) as left:
        _common.run(lambda: OmegaConf.create(values))
    assert left.value.code == 2 and "prompts: the YAML file gives it an alias of itself" in capsys.readouterr().err
    with pytest.raises(RecursionError):
        _common.run(endless)


def endless() -> None:
    """Recurse without end, as a fault of ours would."""
    endless()
