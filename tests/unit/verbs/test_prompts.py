"""Conversations as prompts: the ids of stock apply_chat_template; what cannot be answered is refused by its line."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from elastic.config.verbs import GenerateConfig
from elastic.data.manifest import DataError
from elastic.data.tokenizer import load_tokenizer
from elastic.verbs.prompts import Prompt, prompt_problems, read_prompts
from tests.unit.data.chatting import ANSWER, CHATML, USER, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CHATML)
    return folder


def prompts_of(folder: Path, *records: object, **more: object) -> list[Prompt]:
    """Write the records as lines and read them as generate does."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = GenerateConfig(chat_file=str(folder / "chats.jsonl"), **more)
    return read_prompts(config, load_tokenizer(folder, parse_special_tokens=True), folder)


def test_a_conversation_becomes_what_stock_transformers_asks(folder: Path) -> None:
    stock = PreTrainedTokenizerFast.from_pretrained(str(folder))
    chats = [[USER], [USER, ANSWER, {"role": "user", "content": "sure?\n  yes"}]]
    found = prompts_of(folder, {"messages": chats[0]}, "", {"messages": chats[1]}, prompts=("a\\nb",))
    assert found[0].text == "a\nb"
    for prompt, messages in zip(found[1:], chats, strict=True):
        assert prompt.tokens == stock.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert prompt.text == stock.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def test_a_special_token_in_a_question_stays_letters(folder: Path) -> None:
    spelled = {"role": "user", "content": "what is <|im_end|>?"}
    (prompt,) = prompts_of(folder, {"messages": [spelled]})
    end = load_tokenizer(folder, parse_special_tokens=True).tokenizer.token_to_id("<|im_end|>")
    assert prompt.tokens.count(end) == 1 and prompt.text.count("<|im_end|>") == 2


def test_a_line_ends_where_jsonl_ends_it_and_a_byte_order_mark_is_none_of_it(folder: Path) -> None:
    content = "one\u2028two\u2029three\x85four"
    line = json.dumps({"messages": [{"role": "user", "content": content}]}, ensure_ascii=False)
    first, second = prompts_of(folder, f"\ufeff{line}\r", line)
    assert content in first.text and first == second


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "chats.jsonl:2: invalid_json"),
        ({"messages": []}, "chats.jsonl:2: empty"),
        ({"messages": [USER, ANSWER]}, "chats.jsonl:2: its last message is the assistant's own"),
        ({"messages": [{"content": "hi"}]}, "chats.jsonl:2: missing_role"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_a_model_is_loaded(folder: Path, line: object, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        prompts_of(folder, {"messages": [USER]}, line)
    (problem,) = prompt_problems(GenerateConfig(chat_file=str(folder / "chats.jsonl")), folder)
    assert problem.field == "chat_file" and reason.split("jsonl")[1] in problem.rule


@pytest.mark.parametrize("field", ["prompt_file", "chat_file"])
@pytest.mark.parametrize(
    ("content", "rule"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff", "cannot be read as UTF-8")]
)
def test_a_file_that_gives_no_prompt_is_named_with_its_field(
    folder: Path, tmp_path: Path, field: str, content: bytes | None, rule: str
) -> None:
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    (problem,) = prompt_problems(GenerateConfig(**{field: str(tmp_path / "file")}), folder)
    assert problem.field == field and f"file: {rule}" in problem.rule and problem.remedy


def test_an_empty_file_and_a_tokenizer_without_template_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        prompts_of(folder, " ")
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="no chat template"):
        prompts_of(tmp_path, {"messages": [USER]})
