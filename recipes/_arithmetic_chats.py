"""Made-up conversations about arithmetic, with thoughts and answers that can be checked: what `make smoke-chat` reads.

A question chains two to four numbers; the thought takes one step a line; the answer is the last result. Later turns go
on from the answer before. Everything is a pure function of the seed. Questions whose hash says so are held out: no
conversation asks them, and `problems` are drawn from them alone.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<|im_end|>", "<|im_start|>", "<think>", "</think>")
VOCAB_TOKENS = 320
LARGEST = 99  # no result is above it, none below 0
QUESTIONS = ("What is {}?", "Compute {}.", "{} = ?")
HELD_OUT_SHARE = 10  # one question of so many
# ChatML with thoughts; the generation markers tell which tokens are the assistant's.
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- '<think>' + (message.reasoning_content or '') + '</think>' + message.content + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@dataclass(frozen=True)
class Problem:
    """A question, the steps to its answer, one a line, and the answer."""

    question: str
    thought: str
    answer: str

    @property
    def num_steps(self) -> int:
        """Return how many steps lead to the answer."""
        return self.thought.count("\n") + 1

    def turns(self) -> list[dict[str, str]]:
        """Return the question and its answer as two messages."""
        asked = {"role": "user", "content": self.question}
        return [asked, {"role": "assistant", "reasoning_content": self.thought, "content": self.answer}]


def _problem(rng: random.Random, terms: int) -> Problem:
    """Make a question of `terms` numbers, worked out from left to right; a product can only come first."""
    product_first = rng.random() < 0.25
    value = rng.randint(2, 9) if product_first else rng.randint(1, LARGEST)
    asked, steps = str(value), []
    for number in range(1, terms):
        sign, other, result = _product(rng, value) if product_first and number == 1 else _sum(rng, value)
        asked += f" {sign} {other}"
        steps.append(f"{value} {sign} {other} = {result}")
        value = result
    return Problem(rng.choice(QUESTIONS).format(asked), "\n".join(steps), str(value))


def _sum(rng: random.Random, value: int) -> tuple[str, int, int]:
    if value == 0 or (value < LARGEST and rng.random() < 0.5):
        other = rng.randint(1, LARGEST - value)
        return "+", other, value + other
    other = rng.randint(1, value)
    return "-", other, value - other


def _product(rng: random.Random, value: int) -> tuple[str, int, int]:
    other = rng.randint(2, 9)
    return "*", other, value * other


def _follow_up(rng: random.Random, before: int) -> Problem:
    """Go on from the answer before."""
    sign, other, result = _sum(rng, before)
    question = f"Now add {other}." if sign == "+" else f"Now take away {other}."
    return Problem(question, f"{before} {sign} {other} = {result}", str(result))


def _is_held_out(problem: Problem) -> bool:
    return hashlib.blake2b(problem.thought.encode(), digest_size=4).digest()[0] % HELD_OUT_SHARE == 0


def conversations(number: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Yield `number` conversations of one to three turns, none of whose questions is held out."""
    rng = random.Random(seed)
    for _ in range(number):
        problem = _problem(rng, rng.randint(2, 4))
        while _is_held_out(problem):
            problem = _problem(rng, rng.randint(2, 4))
        messages, answer = problem.turns(), problem.answer
        for _ in range(rng.randint(0, 2)):
            following = _follow_up(rng, int(answer))
            while _is_held_out(following):  # the words differ, the step is the same
                following = _follow_up(rng, int(answer))
            messages, answer = messages + following.turns(), following.answer
        yield messages


def held_out_problems(number: int, seed: int) -> list[Problem]:
    """Return `number` questions that no conversation asks, as many of two, three and four numbers each."""
    rng, found = random.Random(f"held out {seed}"), dict[str, Problem]()
    while len(found) < number:
        problem = _problem(rng, 2 + len(found) % 3)
        if _is_held_out(problem):
            found.setdefault(problem.thought, problem)
    return list(found.values())


def write_tokenizer(folder: Path, chats: list[list[dict[str, str]]]) -> None:
    """Train a byte-level BPE with one token for each digit, and write it with the chat template."""
    tokenizer = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for chat in chats for message in chat for text in (message["role"] + "\n", message["content"]))
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_chats(folder: Path, number: int, seed: int) -> None:
    """Write chats.jsonl and the tokenizer into `folder`."""
    chats = list(conversations(number, seed))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for chat in chats:
            file.write(json.dumps({"messages": chat}) + "\n")
    write_tokenizer(folder / "tokenizer", chats[:5000])
