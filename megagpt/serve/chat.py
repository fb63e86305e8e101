"""Chat templates as transformers keeps them beside a tokenizer: Jinja, run in its sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megagpt.data.tokenizers.files import read_tokenizer_file
from megagpt.errors import UserError
from megagpt.hf.tokenizer_folder import CHAT_TEMPLATE, settings_in
from megagpt.serve.api_error import ApiError


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`, which marks for training what a model says: as if it were not there."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block without its marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """From messages to the text of a prompt.

    source: the template.  specials: bos_token, eos_token and such, by name, as text.
    Raises UserError where it is no template.
    """

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        self.source, self.specials = source, specials
        # As transformers sets it up (utils/chat_template_utils.py): what is written for it reads alike here.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise UserError(f"the chat template of the tokenizer cannot be read ({error})", remedy="mend it") from None

    def render(self, messages: Sequence[Mapping[str, Any]], answer_follows: bool = True) -> str:
        """The prompt of an answer, or all that was said.

        Raises ApiError 400 where the template has no place for these messages.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=answer_follows, tools=None, **self.specials
            )
        except (TemplateError, TypeError, ValueError) as error:
            message = f"the model's chat template does not take these messages: {error}"
            raise ApiError(400, message, "messages") from None


def template_beside(files: Sequence[Path]) -> ChatTemplate | None:
    """The template in the folder of a tokenizer's files, None where there is none.

    Raises UserError where it cannot be read.
    """
    folders = [file.parent for file in files[:1]]
    for folder in folders:
        settings = settings_in(folder)
        found = settings.get("chat_template")
        if (folder / CHAT_TEMPLATE).exists():
            found = read_tokenizer_file(folder / CHAT_TEMPLATE).decode(errors="replace")
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
        if isinstance(found, str):
            return ChatTemplate(found, _specials(settings))
    return None


def _specials(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that settings name: as text, or as objects that hold it."""
    named = {name: value for name, value in settings.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
