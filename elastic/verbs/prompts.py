"""What generate writes on from: texts, or conversations up to where the answer begins."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from elastic.config.load import Problem
from elastic.config.verbs import GenerateConfig
from elastic.corpus.chat import ChatError, ChatTemplate, NotSeparable, TemplateRefusal
from elastic.corpus.conversation import Conversation, parse_conversation
from elastic.corpus.files import SkipReason
from elastic.data.manifest import DataError
from elastic.data.tokenizer import LoadedTokenizer, load_tokenizer

REMEDIES = {
    "prompt_file": "give a file with a text to go on from",
    "chat_file": 'a line is {"messages": [..., {"role": "user", "content": ...}]}; tokenizer=FOLDER names another',
}


@dataclass(frozen=True)
class Prompt:
    """A text to go on from, and its tokens."""

    text: str
    tokens: list[int]


def read_prompts(config: GenerateConfig, tokenizer: LoadedTokenizer, folder: Path) -> list[Prompt]:
    """Return all prompts in order: `prompts`, `prompt_file`, `chat_file`; `folder` holds the tokenizer.

    Raises DataError for a file that cannot be read, is empty, or holds a conversation that cannot be answered.
    """
    texts = [unescaped(prompt) for prompt in config.prompts]
    if config.prompt_file is not None:
        texts.append(_read(Path(config.prompt_file)))
    prompts = [Prompt(text, tokenizer.encode_prompt(text)) for text in texts]
    if config.chat_file is not None:
        prompts += _chats(Path(config.chat_file), ChatTemplate(folder, tokenizer, "all", parse_special_tokens=False))
    return prompts


def prompt_problems(config: GenerateConfig, folder: Path) -> Iterator[Problem]:
    """Yield a problem for each file that the tokenizer in `folder` cannot turn into prompts."""
    if config.prompt_file is None and config.chat_file is None:
        return
    tokenizer = load_tokenizer(folder, parse_special_tokens=True)
    texts, chats = replace(config, prompts=(), chat_file=None), replace(config, prompts=(), prompt_file=None)
    for field, alone in (("prompt_file", texts), ("chat_file", chats)):
        try:
            read_prompts(alone, tokenizer, folder)
        except DataError as error:
            yield Problem(field, getattr(config, field), str(error), REMEDIES[field])


def unescaped(prompt: str) -> str:
    """Turn the two letters \\n into a line break and \\t into a tab, which a shell passes on; \\\\ is one \\."""
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], prompt)


def _chats(path: Path, template: ChatTemplate) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        conversation = parse_conversation(line, "all")
        if isinstance(conversation, SkipReason):
            raise DataError(f"{place}: {conversation}")
        prompts.append(_prompt(place, conversation, template))
    if not prompts:
        raise DataError(f"{path}: is empty")
    return prompts


def _prompt(place: str, conversation: Conversation, template: ChatTemplate) -> Prompt:
    if not conversation.ends_without_answer:
        raise DataError(f"{place}: its last message is the assistant's own, so there is nothing to answer")
    try:
        chat = template.render(conversation, prompt=True)
        ((ids, _),) = template.encode([chat])
    except TemplateRefusal as error:
        raise DataError(f"{place}: {SkipReason.REFUSED} ({error})") from error
    except NotSeparable as error:
        raise DataError(f"{place}: {SkipReason.NOT_SEPARABLE}") from error
    except ChatError as error:
        raise DataError(f"{place}: {error}") from error
    return Prompt(chat.text, ids.tolist())


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    if not text:
        raise DataError(f"{path}: is empty")
    return text
