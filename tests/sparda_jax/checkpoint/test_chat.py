import dataclasses
import datetime
import fractions
import json
import os
import pathlib
import subprocess
import sys
import threading

import jinja2.ext
import jinja2.sandbox
import numpy as np
import pytest
from patience import until

from sparda_jax.checkpoint.chat import ChatTemplate
from sparda_jax.checkpoint.errors import CheckpointError
from sparda_jax.checkpoint.render_process import RenderLimits
from sparda_jax.config import ConfigError

_NESTED = (
    "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}"
    "{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
)
USER = [{"role": "user", "content": 'héllo <b> & "q"'}]


def render(source, messages=USER, **options):
    template = ChatTemplate(source, "model.gguf", {"bos_token": "<s>"})
    return template.render(messages, **options)


def test_usual_helpers():
    assert render("{{ bos_token }}{{ eos_token }}!") == "<s>!"
    assert render("{{ messages[0] | tojson }}") == (
        '{"role": "user", "content": "héllo <b> & \\"q\\""}'
    )
    assert render("{{ messages | tojson(indent=2) }}").startswith('[\n  {\n    "role"')
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{{ messages[0]['content'].strip().upper() }}")[:5] == "HÉLLO"
    loop = "{% for m in messages %}{% if loop.last %}{{ loop.length }}{% endif %}"
    assert render(loop + "{% break %}{% endfor %}") == "1"
    assert render("{% generation %}{{ 1 + 1 }}{% endgeneration %}") == "2"
    assert render("{{ 'a\nb' | indent(2) }}") == "a\n  b"
    assert render("{{ 'a' ~ 1 ~ none }}") == "a1None"
    assert render("{% if tools is none %}{{ add_generation_prompt }}{% endif %}") == (
        "True"
    )
    state = "{% set ns = namespace(n=0) %}{% for x in [1, 2] if x > 1 %}"
    assert render(state + "{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}") == "2"
    nested = "{% for k, v in messages[0].items() recursive %}{{ k }},{% endfor %}"
    assert render(nested) == "role,content,"


def test_blocks_are_trimmed():
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_template_may_refuse():
    with pytest.raises(CheckpointError, match="chat template: roles!"):
        render("{{ raise_exception('roles!') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ ''['__class__']['__base__'] }}",
        "{{ (''|attr('__class__')).__base__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context.environment.compile('x') }}",
        "{{ _counted.__call__.__func__.__globals__ }}",
        "{{ _concat.__globals__['json'] }}",
        "{% for x in messages %}{{ messages.append(1) }}{% endfor %}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ ('{0.__class__.__base__}').format(1) }}",
        "{{ '{0.__class__}' | format(1) }}{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ ('%s' % messages.__class__) }}",
    ],
)
def test_sandbox(source):
    """Either an error, or an empty value: never an object of Python's inside."""
    try:
        text = render(source)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert text == ""
    assert USER == [{"role": "user", "content": 'héllo <b> & "q"'}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 ** 9) %}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 9 ** 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ ('a'|attr('ljust'))(1000000000) }}",
        "{{ 'a'['ljust'](1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% for i in range(90000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% set x=9 %}" + "{% set x=x*x %}" * 45 + "{{ x % 7 }}",
        "{{ []|slice(1000000000000)|list }}",
        "{% for n in [40] recursive %}{% if n %}{{ loop([n-1,n-1]) }}{% endif %}"
        "{% endfor %}",
        "{% set x='a'*60000000 %}{{ x.join(['b']*250)|length }}",
        _NESTED + "{{ ns.l }}",
        _NESTED + "{% set ns.m = [ns.l] %}{{ ns.l == ns.m[0] }}{{ ns.l|string }}",
        "{% set _counted = 5 %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}",
        "{% set x='a'*1000000 %}{{ x|replace('a',x)|length }}",
        "{{ [1]|batch(1000000000,'x')|list|length }}",
        "{{ ('a '*3000000)|wordwrap(1)|length }}",
        "{{ lipsum(10000000) }}",
        "{{ range(99999)|map('string')|join('a'*99999)|length }}",
    ],
)
def test_bounds(source):
    """Refused by the limits of the process: a little of its time and memory."""
    limits = dataclasses.replace(RenderLimits(), seconds=0.2)
    template = ChatTemplate(source, "model.gguf", {}, limits)
    with pytest.raises(CheckpointError, match=r"model\.gguf: chat template: "):
        template.render(USER)
    template.close()


def test_longest_template():
    """It is compiled within its own limits: those of a short one would not do."""
    line = "{% if messages[0].role == 'r' and tools %}{{ 'x' + messages[0].content|trim"
    line += " }}{% for t in tools %}{{ t|tojson }}{% endfor %}{% else %}y{% endif %}"
    template = ChatTemplate(line * ((1 << 18) // len(line)), "f", {})
    assert set(template.render(USER)) == {"y"}
    template.close()


def test_process_over_a_limit_is_replaced():
    source = "{% if n %}{{ 'a' * n }}{% else %}{% for i in range(99999) %}"
    source += "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    limits = dataclasses.replace(RenderLimits(), seconds=1.0)
    template = ChatTemplate(source, "f", {}, limits)
    assert template.render(USER, n=2) == "aa"
    # What a request of a hundred bytes adds is less than is told.
    seconds = limits.of(100, len(source))["seconds"]
    over = (0, f"more than {seconds:.1f} seconds"), (10**9, "MiB of memory")
    for n, reason in over:
        with pytest.raises(CheckpointError, match=f"f: chat template: took .*{reason}"):
            template.render(USER, n=n)
        assert template.render(USER, n=2) == "aa"
    with pytest.raises(CheckpointError, match="output grew over"):
        template.render(USER, n=10**7)
    template.close()


@pytest.mark.parametrize(
    "source",
    ["{% if %}", "{{ x", "{% unknown %}", "{{ 1 | nofilter }}", "{" * 300_000],
)
def test_no_template(source):
    with pytest.raises(CheckpointError, match=r"model\.gguf: chat template: "):
        render(source)


@pytest.mark.parametrize("messages", [[], [{}], [{"role": 1}]])
def test_malformed_messages(messages):
    with pytest.raises(ValueError, match="messages"):
        render("x", messages)


def test_undefined_values_are_empty():
    assert render("{{ nothing }}{{ messages[0].nothing }}") == ""
    with pytest.raises(CheckpointError, match="undefined"):
        render("{{ nothing.inside }}")


class _Generation(jinja2.ext.Extension):
    tags = {"generation"}  # noqa: RUF012 - read from the class.

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _reference(source, variables):
    """The same rendering inside this process, set up as transformers does it."""

    def fail(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **({"ensure_ascii": False} | options)
    )
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = datetime.datetime.now().strftime
    return environment.from_string(source).render(**variables)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <numbers> & more",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}}},
        },
    }
]
TALK = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": 'What is 1 < 2?\n"é" & 😀'},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nTrue.",
        "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "user", "content": [{"type": "text", "text": "And 2?"}, {"type": "x"}]},
]
FAMILIES = {
    "chatml": """
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0].content | trim %}
{%- endif %}
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.content is string %}{{ m.content }}{% else %}
        {%- for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
{{- '<|im_end|>\n' }}
{% endfor %}
{%- if first is defined %}[{{ first }}]{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""",
    "thinking": """
{%- set ns = namespace(last=messages|length - 1, tools=false) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if m.role == 'user' and not ns.tools %}
        {%- set ns.tools = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set text = m.content.split('</think>')[-1].lstrip('\n') %}
        {%- set why = '' %}
        {%- if '</think>' in m.content %}
            {%- set why = m.content.split('</think>')[0].rstrip('\n') %}
            {%- set why = why.split('<think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last or (loop.last and why) %}{{ why }}{% endif %}
        {%- generation %}{{ text }}{% endgeneration %}
        {%- for call in m.tool_calls %}
            {{- '\n<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}
        {{- '<tool_response>%s</tool_response>' % m.content }}
        {%- continue %}
    {%- else %}
        {{- '{}:{}'.format(m.role, loop.index) }}
    {%- endif %}
{%- endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
{%- endif %}
""",
    "tools": """
{%- macro show(type, many=false) -%}
    {%- if type == 'object' -%}{{ 'object' }}{%- elif many -%}{{ type ~ '[]' }}
    {%- else -%}{{ type }}{%- endif -%}
{%- endmacro -%}
{{- bos_token }}
{%- if tools is not none and tools | length > 0 %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {%- for name, p in tool.function.parameters.properties.items() %}
            {{- '// %s: %s' | format(name, show(p.type, many=true)) }}
        {%- endfor %}
        {{- tool.function.parameters | dictsort | list | length }}
    {%- endfor %}
{%- endif %}
{{- 'Date: ' + strftime_now('%Y') + (date_string or '') }}
{%- set roles = messages | map(attribute='role') | unique | list %}
{{- roles | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list
    | length }} {{ messages[1].content | upper | replace('\n', ' ') | e }}
{%- for m in messages recursive %}{{ loop.depth }}{{ loop.cycle('a', 'b') }}{% endfor %}
{{- '%-12s|' % 'left' }}{{ 'x'.center(9) }}{{ '{:>8}'.format(eos_token) }}
""",
    "strict": """
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for m in rest -%}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) and not tools -%}
        {{- raise_exception('roles must alternate: ' ~ m['role']) -%}
    {%- endif -%}
    {%- if loop.first and system is defined -%}<<SYS>>{{ system }}<</SYS>>{%- endif -%}
    [INST] {{ m['content'] | string | trim }} [/INST]
{%- endfor -%}
""",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_renders_as_transformers_does(name):
    """Constructs of known families, with and without tools and other variables."""
    template = ChatTemplate(FAMILIES[name], "f", {"bos_token": "<s>", "eos_token": "e"})
    for variables in ({}, {"tools": TOOLS, "enable_thinking": False, "n": 1.5}):
        whole = {"tools": None, "documents": None, "add_generation_prompt": True}
        whole |= {"bos_token": "<s>", "eos_token": "e", "messages": TALK} | variables
        try:
            expected = _reference(FAMILIES[name], whole)
        except jinja2.TemplateError as error:
            with pytest.raises(CheckpointError) as found:
                template.render(TALK, **variables)
            assert str(found.value) == f"f: chat template: {error}"
        else:
            assert template.render(TALK, **variables) == expected
    template.close()


def test_limits_grow_with_the_conversation():
    """A document of many megabytes goes through."""
    content = "é😀" * 2_000_000
    talk = [{"role": "user", "content": content}]
    source = "{{ messages[0].content | trim ~ '!' }}{{ messages[0].content | tojson }}"
    assert render(source, talk) == f'{content}!"{content}"'


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"tools": [len]}, r"tools\[0\] = <built-in"),
        ({"x": {1: 2}}, "x has the key 1"),
        ({"x": "\ud800"}, "valid Unicode"),
        ({"x": {"\ud800": 1}}, "valid Unicode"),
        ({"x": 10**30}, "not below"),
        ({"x": {2}}, "x = .2. is not allowed"),
        ({"x": fractions.Fraction(10**400)}, "not below"),
        ({"tokenize": np.ones(2)}, "tokenize = "),
    ],
)
def test_variables_that_are_no_json(variables, message):
    with pytest.raises(ConfigError, match=message):
        render("x", **variables)
    nested = []
    nested.append(nested)
    with pytest.raises(ConfigError, match="deep"):
        render("x", [{"role": "user", "content": nested}])


def test_threads_share_a_process():
    template = ChatTemplate("{{ messages[0].content }}", "f", {})
    wrong = []

    def work(number):
        for _ in range(30):
            if template.render([{"role": "user", "content": number}]) != str(number):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    template.close()


def _alive(pid):
    """Whether the process runs; one that only waits to be waited for does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


_PROGRAM = """
import sys
from sparda_jax.checkpoint.chat import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}", "f", {})
text = template.render([{"role": "user", "content": "é"}])
print(ascii(text), template._process._process.pid, flush=True)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("ending", "given"),
    [("", "-c"), ("import os; os.kill(os.getpid(), 9)", "-c"), ("1 / 0", "-")],
)
def test_nothing_is_left_behind(ending, given):
    """However the program ends; also one that comes from standard input."""
    program = _PROGRAM + ending
    command = [sys.executable, given, *([program] if given == "-c" else [])]
    done = subprocess.run(
        command,
        input=None if given == "-c" else program,
        stdin=subprocess.DEVNULL if given == "-c" else None,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    text, pid = done.stdout.split()
    assert text == ascii("é")
    until(lambda: not _alive(pid), "the process that renders still runs")
