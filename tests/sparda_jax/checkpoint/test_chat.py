import time

import pytest

from sparda_jax.checkpoint.chat import ChatTemplate
from sparda_jax.checkpoint.errors import CheckpointError

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
    ],
)
def test_bounds(source):
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="chat template"):
        render(source)
    assert time.monotonic() - start < 20


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
