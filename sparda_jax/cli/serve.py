"""`sparda serve`: a server in the form of OpenAI's API."""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args

from sparda_jax.checks import integer, non_empty_text, require
from sparda_jax.cli.cache_options import add_cache_options, cache_config
from sparda_jax.cli.console import note, waiting
from sparda_jax.cli.model_options import add_model_options, load_model
from sparda_jax.cli.options import HelpFormatter, Parser, add_option
from sparda_jax.cli.packages import needs
from sparda_jax.engine.placement import refuse_in_session
from sparda_jax.runtime import configure_offload
from sparda_jax.serving.settings import SETTING_CHECKS, OnTerm, ServeSettings

if TYPE_CHECKING:
    from sparda_jax.serving.server import Serving

_EXAMPLES = """\
examples:
  sparda serve --model smollm2-135m --max-context 4096
      on http://127.0.0.1:8000, to this machine only
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
       -d '{"prompt": "Once upon a time", "max_tokens": 32, "stream": true}'
      tokens as they come
  SPARDA_SERVE_API_KEY=secret sparda serve --host 0.0.0.0 --attention sparda \\
       --cache offload --max-batch 16 --max-context 32768
      to the network, with a key; the KV cache in host memory
endpoints:
  /v1/completions, /v1/chat/completions, /v1/models, /tokenize, /detokenize,
  /tokenizer_info, /metrics (Prometheus), /health (ready), /live, /version, / (status
  page), DELETE /v1/requests/ID
"""
_PREFIX = "SPARDA_SERVE_"
_SETTINGS = (
    ("max_batch", "B", "outputs that run at a time"),
    ("max_context", "T", "tokens of a request, prompt and output (the model's)"),
    ("max_new_tokens", "N", "most output tokens of a request"),
    (
        "prefill_chunk",
        "N",
        "tokens of a prompt that run between two decode steps of the others: the "
        "pause that a long prompt makes",
    ),
    (
        "decode_steps",
        "N",
        "most tokens that rows decode in a call, as far as a fifth of a second holds "
        "them; 1: one, so that a cancelled row is freed within a step",
    ),
    ("max_waiting", "N", "outputs that may wait for a row; more are refused (503)"),
    ("top_logprobs", "N", "most likeliest tokens that a request can ask for"),
    (
        "prefix_bytes",
        "N",
        "host memory for beginnings of prompts that other prompts share, in whole "
        "pieces of --prefill-chunk tokens; 0 is none",
    ),
    ("request_timeout", "S", "seconds after which a request is ended (never)"),
    (
        "client_timeout",
        "S",
        "seconds that a client may take to send a request, or to take what is there "
        "for it",
    ),
    ("max_body_bytes", "N", "largest body of a request"),
    ("max_connections", "N", "open sockets; more are closed"),
    (
        "api_key",
        "KEY",
        "what clients must bring as a bearer token; better given "
        f"as {_PREFIX}API_KEY, which other users of the machine do not see",
    ),
)
_OFF, _ON = ("0", "false", "no", ""), ("1", "true", "yes")


def add_serve_parser(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "serve",
        help="serve a model to clients of OpenAI's API",
        description="Serve a model to clients of OpenAI's API: requests join and leave "
        "one running batch, and each gets the tokens that it would get alone. Memory "
        "is taken and everything compiled before the first request. Every option is an "
        f"environment variable as well: --max-batch is {_PREFIX}MAX_BATCH; what is "
        "written on the command line goes before it.",
        epilog=_EXAMPLES,
        formatter_class=HelpFormatter,
    )
    _add_options(parser)
    parser.set_defaults(run=_serve)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_cache_options(parser)
    _add_server_options(parser)
    _take_environment(parser, os.environ)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    add_option(
        group,
        "--host",
        non_empty_text,
        metavar="H",
        default="127.0.0.1",
        help="where to listen; 0.0.0.0 is everywhere (then give --api-key)",
    )
    add_option(
        group,
        "--port",
        integer(0, 65535),
        metavar="P",
        default=8000,
        help="0: a free one",
    )
    add_option(
        group,
        "--model-name",
        non_empty_text,
        metavar="NAME",
        help="how clients call the model (as --model)",
    )
    defaults = {f.name: f.default for f in dataclasses.fields(ServeSettings)}
    for name, metavar, help in _SETTINGS:
        add_option(
            group,
            "--" + name.replace("_", "-"),
            SETTING_CHECKS[name],
            metavar=metavar,
            default=defaults[name],
            help=help,
        )
    add_option(
        group,
        "--on-term",
        SETTING_CHECKS["on_term"],
        words=get_args(OnTerm),
        default="finish",
        help="at SIGTERM: finish the requests that were accepted, or abort them",
    )


def _take_environment(
    parser: argparse.ArgumentParser, environment: Mapping[str, str]
) -> None:
    """Takes the defaults of options from the environment, where they are set there."""
    for action in parser._actions:
        value = environment.get(_PREFIX + action.dest.upper())
        if value is None or isinstance(action, argparse._HelpAction):
            continue
        if action.nargs == 0:
            parser.set_defaults(**{action.dest: value.lower()})
        else:
            # Text: argparse puts it through the option's check when it parses.
            parser.set_defaults(**{action.dest: value})


def _settle_flags(arguments: argparse.Namespace) -> None:
    """Flags from the environment are words until here."""
    for name, value in vars(arguments).items():
        variable = _PREFIX + name.upper()
        if isinstance(value, str) and name == "no_compilation_cache":
            words = ", ".join((*_ON, *_OFF[:-1]))
            require(value in (*_ON, *_OFF), variable, value, f"one of {words}")
            setattr(arguments, name, value in _ON)


def serving_from_environment() -> "Serving":
    """A server told by the environment alone, for a host that has sockets of its own.

    Memory is taken and everything compiled; `scheduler.start` comes next.

    Raises:
      ConfigError: If a variable is not allowed, or the settings do not fit.
    """
    configure_offload()
    parser = Parser(prog="sparda serve")
    _add_options(parser)
    return _ready(parser.parse_args([]))


def _server_module() -> ModuleType:
    with needs("serve"):
        from sparda_jax.serving import server
    return server


def _ready(arguments: argparse.Namespace) -> "Serving":
    """The server of some options, warm."""
    _settle_flags(arguments)
    module = _server_module()
    given = {name: getattr(arguments, name) for name in SETTING_CHECKS}
    given["model_name"] = arguments.model_name or arguments.model
    settings = ServeSettings(**given)
    cache = cache_config(arguments)
    allowed = "resident, offload or auto: prompts come in pieces"
    require(cache.kind != "evict", "--cache", cache.kind, allowed)
    refuse_in_session(cache, arguments.mesh)
    lm = load_model(arguments, arguments.attention)
    lm = dataclasses.replace(lm, cache=cache)
    with waiting(f"serve: taking memory for {settings.max_batch} rows"):
        serving = module.Serving(lm, settings)
    with waiting("serve: compiling"):
        programs = serving.warm_up()
    note(f"serve: compiled {', '.join(programs)}; nothing is compiled from here on")
    return serving


def _serve(arguments: argparse.Namespace) -> None:
    module = _server_module()
    # Before minutes of loading: an address that is in use is told at once.
    with module.bind(arguments.host, arguments.port) as listening:
        serving = _ready(arguments)
        module.log_to_stderr()
        serving.scheduler.start()
        server = serving.uvicorn(arguments.host, arguments.port)
        try:
            url = module.url_of(listening)
            note(f"serve: {serving.settings.model_name} on {url}")
            server.run(sockets=[listening])
        finally:
            serving.scheduler.stop(abort=True)
