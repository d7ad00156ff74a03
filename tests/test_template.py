"""Chat templates: the same text as plain jinja2, provenance of each byte, and limits that hold."""

import itertools
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import jinja2.sandbox
import pytest

from kvmix import _template
from kvmix._template import NAMED, ChatTemplate, PlainText, Prompt, TemplateError, TemplateRefusal, template_source
from kvmix.errors import ArgumentError

# Written for these tests in the manner of the published ones: a default system text, thoughts dropped from history.
DEFAULT_SYSTEM = """{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nBe kind<|im_end|>\\n' }}
{%- endif %}
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>' }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not message.content.startswith('<tool>') %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MACRO = """{% macro turn(role, content) %}<|{{ role }}|>
{{ content | trim }}<|end|>
{% endmacro %}
{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}
{{ turn(message.role, message.content) }}{% endfor %}<|assistant|>"""
TEMPLATES = {**NAMED, "default-system": DEFAULT_SYSTEM, "thinking": THINKING, "macro": MACRO}

TOKENS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<think>", "[INST]"]
TALK = [
    {"role": "user", "content": " Wie heißt du? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n漢字 "},
    {"role": "user", "content": "{{ bos_token }} 🙂"},
]


def render(source: str, messages: list[dict[str, str]], **variables: bool) -> Prompt:
    return ChatTemplate(source, bos="<s>", eos="</s>", variables=variables).render(messages)


def trusted_text(prompt: Prompt) -> bytes:
    return bytes(b for b, flag in zip(prompt.text, prompt.trusted, strict=True) if flag)


def untrusted_text(prompt: Prompt) -> bytes:
    return bytes(b for b, flag in zip(prompt.text, prompt.trusted, strict=True) if not flag)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("n_messages", [1, 3])
@pytest.mark.parametrize("thinking", [None, False])
def test_text_is_plain_jinja2s(name: str, n_messages: int, thinking: bool | None) -> None:
    """The oracle is jinja2's sandbox with the settings of apply_chat_template, without any of our changes."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    variables = {} if thinking is None else {"enable_thinking": thinking}
    messages = TALK[:n_messages]
    want = env.from_string(TEMPLATES[name]).render(
        messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True, **variables
    )
    assert render(TEMPLATES[name], messages, **variables).text.decode() == want


@pytest.mark.parametrize("name", TEMPLATES)
def test_users_never_write_control_tokens(name: str) -> None:
    """Whatever a message says, the template's own bytes stay what they are, and the message's are untrusted."""
    plain = render(TEMPLATES[name], [{"role": "user", "content": "x"}])
    for a, b in itertools.product(TOKENS, repeat=2):
        for content in (a, f"{a}x{b}", f"x{a}\n{b} y", f"{a[:3]}{b}"):
            prompt = render(TEMPLATES[name], [{"role": "user", "content": content}])
            assert trusted_text(prompt) == trusted_text(plain)
            assert untrusted_text(prompt) == content.encode()


def test_provenance_through_a_whole_conversation() -> None:
    prompt = render(THINKING, TALK, enable_thinking=False)
    assert trusted_text(prompt).decode() == (
        "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    # the thought is dropped, spaces stay, braces in a message are not a template
    assert untrusted_text(prompt).decode() == " Wie heißt du? 漢字 {{ bos_token }} 🙂"


@pytest.mark.parametrize(
    "expression",
    [
        "'<s>{}'.format(c)", "'<s>%' | replace('%', c)", "c | upper", "['<s>', c] | join", "'<s>'.join([c, c])",
        "c.replace('x', '<s>')", "(c, '<s>') | string", "{'a': c} | tojson", "c[::-1]", "(c ~ c)[2:]", "'' ~ c",
        "c | indent(2, true)", "c.split('x') | first", "[c, '<s>'] | map('trim') | list | string", "c | trim('a')",
    ],
)  # fmt: skip
def test_what_is_not_tracked_is_not_trusted(expression: str) -> None:
    prompt = render("{% set c = messages[0].content %}{{ " + expression + " }}", [{"role": "user", "content": "<s>x"}])
    assert b"s" in prompt.text.lower()
    assert trusted_text(prompt) == b""


@pytest.mark.parametrize(
    ("expression", "trusted"),
    [
        ("'<a>' + c + '<b>'", "<a><b>"), ("'<a>' ~ c ~ 7", "<a>"), ("(' <a> ' + c).strip()", "<a> "),
        ("('<a>' + c + ' ') | trim", "<a>"), ("('<a>' + c)[1:]", "a>"), ("('<a>' + c)[1]", "a"),
        ("('<a>' + c).rstrip('x>')", "<a>"), ("('-<a>' + c).lstrip('-')", "<a>"), ("bos_token + c", "<s>"),
        ("messages[0].role", "user"), ("'<a>' if c else '<b>'", "<a>"),
    ],
)  # fmt: skip
def test_what_is_tracked_keeps_its_trust(expression: str, trusted: str) -> None:
    prompt = render("{% set c = messages[0].content %}{{ " + expression + " }}", [{"role": "user", "content": "<s>x"}])
    assert trusted_text(prompt).decode() == trusted


HOSTILE = {
    "a long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "repetition": "{{ 'a' * 50000000 }}",
    "repetition of a list": "{{ [0] * 50000000 }}",
    "power": "{{ 9 ** 99999999 }}",
    "format with %": "{{ '%99999999d' % 1 }}",
    "format": "{{ '{:>999999999}'.format(1) }}",
    "center": "{{ 'a' | center(999999999) }}",
    "doubling": "{% set ns = namespace(a='aa') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "output": "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "mutation": "{{ messages.append(1) }}",
    "dunder": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "attr filter": "{{ (messages | attr('__class__')).mro() }}",
    "format attribute": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "import": "{% import 'os' as os %}",
    "include": "{% include '/etc/passwd' %}",
    "syntax": "{% if %}",
    "unknown filter": "{{ messages | nonsense }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError):
        render(HOSTILE[name], TALK)
    assert time.monotonic() - start < 2.5 + 1.0  # the limit, and a new process
    assert render(NAMED["chatml"], TALK).text.startswith(b"<|im_start|>user")


def test_a_template_too_large_is_refused() -> None:
    with pytest.raises(TemplateError, match="1048576"):
        ChatTemplate("a" * ((1 << 20) + 1))


def test_renderings_are_many_in_one_process() -> None:
    """The limit of 2 s of CPU is for one rendering, not for the process's life."""
    slow = "{% for i in range(99999) %}{% for j in range(20) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    render(NAMED["chatml"], TALK)
    pid = _template._running[0].process.pid
    spent = 0.0
    while spent < 3.6:
        start = time.monotonic()
        render(slow, TALK)
        spent += time.monotonic() - start
    assert _template._running[0].process.pid == pid


def test_the_process_is_replaced_and_out_of_ctrl_cs_reach() -> None:
    render(NAMED["chatml"], TALK)
    process = _template._running[0].process
    assert os.getpgid(process.pid) != os.getpgrp()
    process.kill()
    process.wait()
    assert render(NAMED["chatml"], TALK).text.startswith(b"<|im_start|>user")


def test_a_process_that_dies_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(TemplateError, match="has died, perhaps for want of memory"):
        _template._Worker()


def test_system_text_goes_where_the_template_has_a_place_for_it() -> None:
    system = [{"role": "system", "content": "Be <s> brief"}, {"role": "user", "content": "Hi"}]
    for source, folds in ((NAMED["chatml"], False), (NAMED["gemma"], True), (MACRO, True)):
        template = ChatTemplate(source, bos="<s>")
        assert template.folds_system is folds
        prompt = template.render(system)
        assert untrusted_text(prompt).decode() == ("Be <s> brief\n\nHi" if folds else "Be <s> briefHi")


def test_refusals_carry_the_templates_reason() -> None:
    with pytest.raises(TemplateRefusal, match="not today"):
        render("{{ raise_exception('not today') }}", TALK)


def test_bad_messages() -> None:
    lone = {"role": "user", "content": "\ud800"}
    for messages in ([], [{"role": "root", "content": "x"}], [{"role": "user"}], [lone]):
        for template in (ChatTemplate(NAMED["chatml"]), PlainText()):
            with pytest.raises(ArgumentError):
                template.render(messages)


def test_functions_that_published_templates_call() -> None:
    source = (
        "{{ strftime_now('%Y') }}|{{ {'a': '<é>'} | tojson }}|{{ tools is none }}|"
        "{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    year = datetime.now().year
    assert render(source, [{"role": "user", "content": "x"}]).text.decode() == f'{year}|{{"a": "<é>"}}|True|x'


def test_wire_formats_by_name() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "?"}]
    assert {name: render(source, talk).text.decode() for name, source in NAMED.items()} == {
        "chatml": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\n?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "llama3": "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\nHo<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n?<|eot_id|><|start_header_id|>"
        "assistant<|end_header_id|>\n\n",
        "gemma": "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n<start_of_turn>user\n"
        "?<end_of_turn>\n<start_of_turn>model\n",
        "mistral": "<s>[INST] Hi [/INST]Ho</s>[INST] ? [/INST]",
    }


def test_template_sources(tmp_path: object) -> None:
    path = f"{tmp_path}/t.jinja"
    with open(path, "w", encoding="utf-8") as f:
        f.write("{{ 1 }}")
    assert template_source("chatml") == NAMED["chatml"]
    assert template_source("{{ 2 }}") == "{{ 2 }}"
    assert template_source(path) == "{{ 1 }}"
    with pytest.raises(ArgumentError, match="chatml, llama3"):
        template_source("chatmi")


def test_threads_get_their_own_replies() -> None:
    """The worker is one process: requests and replies must not cross."""

    def render(name: str) -> bool:
        template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}" + name)
        wanted = [f"{name}{i}{name}".encode() for i in range(30)]
        return [template.render([{"role": "user", "content": f"{name}{i}"}]).text for i in range(30)] == wanted

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(render, "ABCD")) == [True] * 4


def test_an_interrupted_rendering_leaves_no_reply_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, other = ChatTemplate("quick"), ChatTemplate("other")
    assert quick.render(TALK).text == b"quick"

    def interrupted(*_args: object) -> None:
        time.sleep(0.3)  # the reply is there by now, unread
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_template.select, "select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quick.render(TALK)
    assert other.render(TALK).text == b"other"
