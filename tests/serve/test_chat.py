"""Chat templates: found beside the tokenizer, rendered as transformers does, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megagpt.errors import UserError
from megagpt.serve.api_error import ApiError
from megagpt.serve.chat import ChatTemplate, template_beside

MESSAGES = [{"role": "user", "content": "hi"}]
SOURCE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"


def settings(folder: Path, **values: object) -> list[Path]:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return [folder / "tokenizer.json"]


@pytest.mark.parametrize("template", [SOURCE, [{"name": "default", "template": SOURCE}, {"name": "x", "template": ""}]])
def test_a_template_of_the_settings(tmp_path: Path, template: object):
    found = template_beside(settings(tmp_path, chat_template=template, bos_token={"content": "<s>"}))
    assert found and found.render(MESSAGES) == "<s>[user] hi\n"


def test_a_template_in_a_file_of_its_own(tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}{{ messages | tojson }}")
    found = template_beside(settings(tmp_path, chat_template="old", eos_token="é"))
    assert found and found.render(MESSAGES) == 'é[{"role": "user", "content": "hi"}]'


def test_none_where_there_is_none(tmp_path: Path):
    assert template_beside([]) is None and template_beside([tmp_path / "vocab.json"]) is None


def test_what_the_template_refuses_is_the_clients_fault():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ApiError, match="does not take these messages: roles must alternate") as failed:
        template.render(MESSAGES)
    assert (failed.value.status, failed.value.param) == (400, "messages")


@pytest.mark.parametrize("source", ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}{{ x.y.z }}"])
def test_a_template_reaches_nothing(source: str):
    with pytest.raises(ApiError):
        ChatTemplate(source, {}).render(MESSAGES)


def test_a_damaged_template_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"the chat template of the tokenizer cannot be read"):
        template_beside(settings(tmp_path, chat_template="{% for"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n<{{ m.content }}>\n    {% endif %}\n{% endfor %}end",
        "{% for m in messages %}\n{% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}end",
    ],
)
def test_as_transformers_renders_it(source: str):
    transformers = pytest.importorskip("transformers")
    theirs, _ = transformers.utils.chat_template_utils.render_jinja_template([MESSAGES], chat_template=source)
    assert ChatTemplate(source, {}).render(MESSAGES) == theirs[0]
