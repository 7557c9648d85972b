"""The conversations of `make smoke-chat` are right, ask nothing that is held out, and answers are judged one by one."""

import operator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from recipes._arithmetic_chats import LARGEST, Problem, conversations, held_out_problems, write_tokenizer
from recipes._smoke_chat_report import answer_row, draw_accuracy, summary_table

SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def checked(thought: str, before: int | None) -> int:
    """Work every step out, each from the result before; returns the last."""
    for line in thought.splitlines():
        left, sign, right, _, result = line.split()
        assert before in (None, int(left)) and SIGNS[sign](int(left), int(right)) == int(result)
        assert 0 <= int(result) <= LARGEST
        before = int(result)
    assert before is not None
    return before


def test_thoughts_and_answers_are_right_through_all_turns() -> None:
    lengths = set()
    for messages in conversations(300, seed=1):
        before = None
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            assert question["role"] == "user" and answer["role"] == "assistant"
            before = checked(answer["reasoning_content"], before)
            assert answer["content"] == str(before)
        lengths.add(len(messages))
    assert lengths == {2, 4, 6}


def test_no_conversation_asks_a_held_out_question() -> None:
    problems = held_out_problems(60, seed=1)
    held_out = {problem.thought for problem in problems}
    assert len(held_out) == 60 and [problem.num_steps for problem in problems[:3]] == [1, 2, 3]
    chats = list(conversations(3000, seed=1))
    assert not held_out & {answer["reasoning_content"] for messages in chats for answer in messages[1::2]}
    assert chats == list(conversations(3000, seed=1))
    assert problems == held_out_problems(60, seed=1) != held_out_problems(60, seed=2)


def test_a_digit_is_a_token_and_the_template_marks_thoughts_and_answers(tmp_path: Path) -> None:
    chats = list(conversations(50, seed=1))
    write_tokenizer(tmp_path, chats)
    stock = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    assert len(stock("12+345", add_special_tokens=False)["input_ids"]) == 6
    found = stock.apply_chat_template(chats[0], return_dict=True, return_assistant_tokens_mask=True)
    counted = [token for token, counts in zip(found["input_ids"], found["assistant_masks"], strict=True) if counts]
    said = "".join(f"<think>{m['reasoning_content']}</think>{m['content']}<|im_end|>" for m in chats[0][1::2])
    assert stock.decode(counted) == said


def row(name: str, *texts: str) -> dict[str, Any]:
    parts = [{"name": name, "params": 1_000_000, "new_tokens": 10}]
    problems = [
        Problem("1 + 2 = ?", "1 + 2 = 3", "3"),
        Problem("", "1 + 2 = 3\n3 + 4 = 7", "7"),
        Problem("", "\n\n", "9"),
    ]
    return answer_row(name, [{"text": text, "parts": parts} for text in texts], problems)


def test_an_answer_counts_by_what_stands_behind_the_thought() -> None:
    found = row("small", "<think>1 + 2 = 3</think>3", "<think>7</think>8", "9")
    assert (found["right"], found["right_by_steps"]) == (2, {1: 1.0, 2: 0.0, 3: 1.0})
    assert row("small", "<think>1 + 2 = 3", "</think>7</think>", "</think> 9\n")["right"] == 1
    assert found["params_read"] == 10e6 and found["tokens"] == 10


def test_picture_and_table_have_every_writer(tmp_path: Path) -> None:
    summary = {"num_problems": 3, "members": [row("full", "3", "7", "9"), row("small", "3", "8", "1")]}
    draw_accuracy(summary, tmp_path / "accuracy.png")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert list(summary_table(summary).columns[0].cells) == ["full", "small"]
