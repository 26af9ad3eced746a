"""Pairs of texts and conversations, from JSON lines: runs of text that are to be learnt, or not.

    pairs           {"source": "...", "target": "..."}, or the fields that the data names
    conversations   {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

A conversation becomes text by the chat template of the tokenizer (Hugging Face's, jinja2 in a sandbox), or where it has none by
the plain one below. Raises MLM0702 to MLM0704 and MLM0709 for lines that cannot be read, MLM0714 for conversations that are
none, MLM0715 for templates that fail.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NoReturn

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.config import Data
from mlmdsl.runtime.documents import json_lines, sources, text_of
from mlmdsl.runtime.tokenizer import TextTokenizer

Run = tuple[str, bool]  # text, and whether it is learnt
Message = Mapping[str, str]

# "User: ...", a line each; the assistant's end in the end-of-text token, so that a model learns where to stop.
PLAIN = (
    "{% for message in messages %}{{ message['role'].capitalize() }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


def records(data: Data, tokenizer: TextTokenizer) -> Iterator[list[Run]]:
    """Every record of the data, in order."""
    for path in sources(data):
        try:
            for place, record in json_lines(path):
                yield _pair(place, record, data) if data.kind == "pairs" else _conversation(place, record, data, tokenizer)
        except OSError as error:
            _fail("MLM0708", f"{path}: {error.strerror or error}")


def _pair(place: str, record: dict[str, Any], data: Data) -> list[Run]:
    found = [text_of(place, record, name, f'pairs("...", {key} = ') for key, name in _fields(data).items()]
    return [(found[0], False), (found[1], True)]


def _fields(data: Data) -> dict[str, str]:
    return {"source": data.source or "source", "target": data.target or "target"}


def _conversation(place: str, record: dict[str, Any], data: Data, tokenizer: TextTokenizer) -> list[Run]:
    """Text up to each of the assistant's messages, then the message with all that the template puts after it up to the next."""
    name = data.field or "messages"
    messages = record.get(name)
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        help = f'write {{"{name}": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}'
        _fail("MLM0714", f'{place}: "{name}" is no list of messages', help)
    runs: list[Run] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendered(messages[:index], tokenizer, place, prompt=True)
        through = rendered(messages[: index + 1], tokenizer, place)
        if not before.startswith(done) or not through.startswith(before):
            _fail("MLM0715", f"{place}: the chat template changes what stands before a message when more follow")
        runs += [(before[len(done) :], False), (through[len(before) :], True)]
        done = through
    if not runs:
        _fail("MLM0714", f"{place}: no message is the assistant's", "there is nothing to learn from it")
    return runs


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def rendered(messages: Sequence[Message], tokenizer: TextTokenizer, place: str = "", *, prompt: bool = False) -> str:
    """The conversation as text; with `prompt` up to where the assistant's next message begins."""
    import jinja2

    try:
        return _compiled(tokenizer.template or PLAIN).render(
            messages=list(messages), add_generation_prompt=prompt, eos_token=tokenizer.end, bos_token=tokenizer.begin
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        _fail("MLM0715", f"{place or 'the conversation'}: the chat template fails: {error}")


@cache
def _compiled(template: str) -> Any:
    """In a sandbox: templates come with tokenizers from anywhere. Line ends as transformers has them."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def complain(message: str) -> NoReturn:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.globals["raise_exception"] = complain  # pyright: ignore[reportArgumentType]
    return environment.from_string(template)


def _fail(code: str, message: str, help: str = "") -> NoReturn:
    raise RunError([Diagnostic(code, message, help=help)])
