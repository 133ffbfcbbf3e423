"""The program that renders one chat template, in a process of its own.

It is started as a script by `render_process`, not imported: it needs Jinja and the
standard library alone. Requests and replies are frames, eight bytes of length and then
the bytes. The first request is the template, each further one the context of a
rendering; each reply is one letter and a text: `T` the output, `E` why there is none.

The template is a program out of a file that anyone may have made. It can use all the
time and memory there is in many ways, so both are limited for the process as a whole,
by the operating system: what runs over ends here, and only here.
"""

import datetime
import json
import os
import signal
import sys
import types
from typing import Any, BinaryIO

_EXIT_MEMORY = 3  # As in `render_process`.
_LENGTH = 8


def _read(stream: BinaryIO, size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        # The other side is gone: nothing is left to do.
        os._exit(0)
    return data


def _receive(stream: BinaryIO) -> dict[str, Any]:
    length = int.from_bytes(_read(stream, _LENGTH), "big")
    return json.loads(_read(stream, length))


def _send(stream: BinaryIO, kind: str, text: str) -> None:
    data = kind.encode() + text.encode("utf-8", "backslashreplace")
    stream.write(len(data).to_bytes(_LENGTH, "big") + data)
    stream.flush()


def _address_space() -> int:
    """Bytes of address space in use, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _limits() -> types.ModuleType | None:
    try:
        import resource
    except ImportError:  # Not a Unix: the parent's clock is the only limit.
        return None
    # No file may grow, none may be left behind.
    for name in ("RLIMIT_CORE", "RLIMIT_FSIZE"):
        resource.setrlimit(getattr(resource, name), (0, 0))
    return resource


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}`: prints what is between."""

        tags = {"generation"}  # noqa: RUF012 - the library reads it from the class.

        def parse(self, parser: Any) -> Any:
            """Returns the body between the two tags."""
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML characters, which a prompt must not have.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: object) -> None:
        raise jinja2.TemplateError(str(message))

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", Generation],
    )
    environment.filters["tojson"] = to_json
    names: Any = environment.globals  # The library's own type knows only its own.
    names["raise_exception"] = raise_exception
    names["strftime_now"] = strftime_now
    return environment


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error)[:2000].split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"


def _rendered(template: Any, context: dict[str, Any], max_output: int) -> str:
    parts, length = [], 0
    for part in template.generate(context):
        length += len(part)
        if length > max_output:
            raise ValueError(f"the output grew over {max_output} characters")
        parts.append(part)
    return "".join(parts)


def main() -> None:
    """Serves until the other side closes the pipe or a limit ends the process."""
    # A Ctrl-C is the parent's to handle; it ends this process when it wants to.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.path += sys.argv[1:]
    resource = _limits()
    environment = _environment()
    base = _address_space()
    source, template = _receive(requests)["source"], None
    while True:
        request = _receive(requests)
        if resource is not None and base:
            size = base + request["memory"]
            hard = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (size, hard))
        if hasattr(signal, "setitimer"):
            # Processor time: on a busy machine the clock would say nothing. The
            # signal's default ends the process, wherever it is.
            signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            template = template or environment.from_string(source)
            text = _rendered(template, request["context"], request["max_output"])
            kind = "T"
        except MemoryError:
            os._exit(_EXIT_MEMORY)
        # The template is a program of its own: it can raise whatever Python raises.
        except Exception as error:
            kind, text = "E", _one_line(error)
        _send(replies, kind, text)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(_EXIT_MEMORY)
