"""Rows of a data set as documents: a string as it is, a conversation as JSON; and a chat template's tokens of it."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spectrim.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["none", "chat"]
WANTED = {"none": "string", "chat": "list of {role, content} messages"}
"""What a row holds, by ``data.NAME.template``."""

# Some templates write the day on which they are rendered: a fixed one, so that the same rows give the same tokens.
# A macro hides the function of that name which transformers offers.
FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%Y', '2024') | replace('%m', '07') | replace('%d', '26')"
    " | replace('%B', 'July') | replace('%b', 'Jul') | replace('%A', 'Friday') | replace('%a', 'Fri') }}"
    "{% endmacro %}{{ '' }}"
)


def document(value: Any, template: Template) -> str | None:
    """The document that a row's ``value`` is, a conversation as JSON; None where it is not what ``WANTED`` says."""
    if template == "none":
        return value if isinstance(value, str) else None
    messages = isinstance(value, list) and value and all(map(_is_message, value))
    return json.dumps(value, ensure_ascii=False) if messages else None


def require_template(tokenizer: "PreTrainedTokenizerBase", names: Sequence[str]) -> None:
    """Raise DataError where texts of these ``names`` need a chat template that ``tokenizer`` does not have."""
    if not names:
        return
    try:
        tokenizer.get_chat_template()
    except ValueError:
        keys = ", ".join(f"data.{name}.template" for name in names)
        raise DataError(
            f"{keys}: chat, but the model's tokenizer has no chat template; set none and give a text of plain strings, "
            "or give a model that has one"
        ) from None


def written_bos(tokenizer: "PreTrainedTokenizerBase", conversation: str, name: str) -> int | None:
    """The BOS token, where the chat template begins ``conversation`` with it as such: not where it marks a message.

    Raises:
        DataError: a conversation that the template refuses.
    """
    bos = tokenizer.bos_token
    with_it, without = (
        _applied(tokenizer, conversation, name, tokenize=False, **hidden) for hidden in ({}, {"bos_token": ""})
    )
    return tokenizer.bos_token_id if bos and with_it.startswith(bos) and not without.startswith(bos) else None


def chat_tokens(
    tokenizer: "PreTrainedTokenizerBase", conversations: Sequence[str], name: str, bos: int | None
) -> np.ndarray:
    """The tokens of all conversations one behind the other, (tokens,) int32.

    What separates them is what the template writes at their ends. ``bos`` at the beginning of one is taken off: it
    stands before a window, once, where nothing predicts it.

    Args:
        conversations: see ``document``.
        name: of the text, for messages.
        bos: the token that the template, as the tokenizer, begins with; None: it begins with none.

    Raises:
        DataError: a conversation that the template refuses.
    """
    parts = [np.empty(0, np.int32)]
    for conversation in conversations:
        ids = _applied(tokenizer, conversation, name, return_dict=False)
        parts.append(np.array(ids[1:] if ids[:1] == [bos] else ids, np.int32))
    return np.concatenate(parts)


def _applied(tokenizer: "PreTrainedTokenizerBase", conversation: str, name: str, **options: Any) -> Any:
    """``apply_chat_template`` with a fixed date."""
    from jinja2 import TemplateError

    messages = json.loads(conversation)
    try:
        template = FIXED_DATE + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except (TemplateError, TypeError) as error:
        raise DataError(
            f"data.{name}: the chat template refuses a conversation ({error}); its messages are of "
            f"{', '.join(message['role'] for message in messages)}, the first {messages[0]['content'][:60]!r}; leave "
            "it out of the text"
        ) from error


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
