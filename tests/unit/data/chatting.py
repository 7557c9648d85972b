"""Chat templates, a tokenizer with their special tokens, and made conversations, for the tests of chats."""

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from elastic.corpus.chat import ChatTemplate
from elastic.corpus.config import PrepareConfig
from elastic.corpus.conversation import Conversation, LossOn, parse_conversation
from elastic.data.tokenizer import load_tokenizer, train_tokenizer

SPECIAL = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>",
]  # fmt: skip
USER, ANSWER = {"role": "user", "content": "how many?"}, {"role": "assistant", "content": "two"}
PLAIN_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens of their own, and no special ones

# Each is written with generation markers around what the assistant says. Without them the same template is one that the
# answers must be found in, and stock transformers' own mask of the marked one is what must be found.
GENERATION, END = "{%- generation %}", "{%- endgeneration %}"
CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
LLAMA3 = """
{{- '<|begin_of_text|>' }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{{- raise_exception('no such role') }}{%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
# Thoughts stand in the content; of earlier turns they are dropped, and the prompt opens a thought.
NEMOTRON = """
{{- '<SPECIAL_10>System\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}
{{- '\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<SPECIAL_11>User\n' + message.content | trim + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if message.reasoning_content %}
            {%- set content = '<think>\n' + message.reasoning_content + '\n</think>\n\n' + content %}
        {%- endif %}
        {%- if not loop.last and '</think>' in content %}{%- set content = content.split('</think>')[-1] %}{%- endif %}
        {%- set content = content | trim %}
        {{- '<SPECIAL_11>Assistant\n' }}
        {%- if content[:8] == '<think>\n' %}{{- '<think>\n' }}{%- set content = content[8:] %}{%- endif %}
        {%- generation %}{{- content + '\n<SPECIAL_12>' }}{%- endgeneration %}
        {{- '\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<SPECIAL_11>Assistant\n<think>\n' }}{%- endif %}"""
# Thoughts stand in a field of their own; only those since the last question are written.
QWEN = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last %}
            {{- '<think>\n' + (message.reasoning_content or '') | trim + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.last and message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""


def unmarked(template: str) -> str:
    """Take the generation markers out."""
    return template.replace(GENERATION, "").replace(END, "")


MARKED = {"chatml": CHATML, "llama3": LLAMA3, "nemotron": NEMOTRON, "qwen": QWEN, "tools": TOOLS, "marked": CHATML}
TEMPLATES = {name: template if name == "marked" else unmarked(template) for name, template in MARKED.items()}


WORDS = [
    "the",
    "sum",
    "of",
    "two",
    "and",
    "three",
    "is",
    "five",
    "während",
    "雨",
    "🙂",
    "<b>",
    "x = 1;",
    "\n\n",
    "  tab\t",
]


def write_tokenizer(folder: Path, template: str | None, vocab_size: int = 400) -> Path:
    """Train a tokenizer with the special tokens of all templates, and give it one of them."""
    train_tokenizer([" ".join(WORDS) * 3, *TEMPLATES.values()], vocab_size, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def made_text(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, 12))) + generator.choice(["", "\n", " ", "."])


def conversation(generator: random.Random, style: str) -> dict[str, Any]:
    """Make a conversation that a template can render: one to four questions, thoughts, calls, maybe cut off."""
    messages: list[dict[str, Any]] = []
    if generator.random() < 0.4:
        messages.append({"role": "system", "content": made_text(generator)})
    for _ in range(generator.randint(1, 4)):
        messages.append({"role": "user", "content": "Q " + made_text(generator)})
        answer: dict[str, Any] = {"role": "assistant", "content": "A" + made_text(generator)}
        if style == "tools" and generator.random() < 0.5:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": generator.randint(0, 99)}}}
            asked: dict[str, Any] = {"role": "assistant", "tool_calls": [call] * generator.randint(1, 2)}
            if generator.random() < 0.5:
                asked |= {"content": "one moment", "reasoning_content": "I call it."}
            results = [{"role": "tool", "content": made_text(generator)} for _ in asked["tool_calls"]]
            messages += [asked, *results]
        if style in ("nemotron", "qwen", "tools") and generator.random() < 0.6:
            answer["reasoning_content"] = "so: " + made_text(generator)
        messages.append(answer)
    if generator.random() < 0.2:
        messages.append({"role": "user", "content": "and then " + made_text(generator)})
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    return {"messages": messages, "id": generator.random()} | ({"tools": tools} if style == "tools" else {})


def conversations(style: str, count: int) -> list[dict[str, Any]]:
    generator = random.Random(f"chats {style}")
    return [conversation(generator, style) for _ in range(count)]


def write_chats(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def opened(folder: Path, loss_on: LossOn = "response", *, parse_special_tokens: bool = False) -> ChatTemplate:
    return ChatTemplate(folder, load_tokenizer(folder), loss_on, parse_special_tokens=parse_special_tokens)


def parsed(record: dict[str, Any], loss_on: LossOn = "response") -> Conversation:
    found = parse_conversation(json.dumps(record), loss_on)
    assert isinstance(found, Conversation), found
    return found


def chat_config(tmp_path: Path, source: Path, tokenizer: Path, **changes: Any) -> PrepareConfig:
    settings: dict[str, Any] = {"validation_ratio": 0.2, "document_format": "chat", "tokenizer_path": str(tokenizer)}
    place = {"output_dir": str(tmp_path / "data"), "paths": [str(source)]}
    return PrepareConfig(**settings | place | changes)
