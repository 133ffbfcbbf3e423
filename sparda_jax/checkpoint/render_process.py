"""A process that renders a chat template within limits of time, memory and output."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import IO, Any

_CHILD = pathlib.Path(__file__).with_name("render_child.py")
_EXIT_MEMORY = 3  # As in `render_child`.
_LENGTH = 8
_MAX_START = 60.0  # Seconds until the clock ends what the processor's limit did not.


class RenderError(Exception):
    """The template failed or went over a limit; the message says which."""


@dataclasses.dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use.

    A long conversation takes more than a short one: each limit grows with the bytes
    of the request. The seconds are for machines that are slow or busy, where the same
    work also takes more processor time: the longest template of all, which one of two
    busy cores compiled in 5.3, has 35. One that computes without end ends all the same.

    Attributes:
      seconds: Of processor time.
      memory: Bytes of address space beyond those of the idle process.
      output: Characters of output.
      seconds_per_mib, memory_per_byte, output_per_byte: What each of them grows by.
      source_seconds_per_mib, source_memory_per_byte: What the template's own length
        adds, since it is compiled before its first rendering.
    """

    seconds: float = 5.0
    memory: int = 80 << 20
    output: int = 8 << 20
    seconds_per_mib: float = 2.0
    memory_per_byte: int = 32
    output_per_byte: int = 4
    source_seconds_per_mib: float = 120.0
    source_memory_per_byte: int = 512

    def of(self, size: int, source_size: int) -> dict[str, Any]:
        """The limits of a request, by its bytes and those of the template."""
        seconds = self.seconds_per_mib * size
        seconds += self.source_seconds_per_mib * source_size
        memory = self.memory_per_byte * size
        memory += self.source_memory_per_byte * source_size
        return {
            "seconds": self.seconds + seconds / (1 << 20),
            "memory": self.memory + memory,
            "max_output": self.output + self.output_per_byte * size,
        }


def _package_folders() -> list[str]:
    """Where the child finds Jinja: the parent's path is not passed on."""
    folders = {}
    for name in ("jinja2", "markupsafe"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise RenderError(f"chat templates need the package {name}")
        folders[str(pathlib.Path(spec.origin).parent.parent)] = None
    return list(folders)


def _stop(process: subprocess.Popen, owner: int) -> None:
    """Ends a child, unless it is that of the process which this one was forked from."""
    ours = os.getpid() == owner
    if ours:
        process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    if ours:
        process.wait()
    else:
        process.returncode = 0  # It is another's to wait for.


def _status(process: subprocess.Popen) -> int:
    """How a child ended that gave no reply."""
    try:
        return process.wait(timeout=_MAX_START)
    except subprocess.TimeoutExpired:  # It said what is no reply.
        process.kill()
        process.wait()
        return 1


def _reason(status: int, limits: Mapping[str, Any], timed_out: bool) -> str:
    if timed_out or status in (-getattr(signal, "SIGPROF", 27), -signal.SIGTERM):
        return f"took more than {limits['seconds']:.1f} seconds"
    if status in (_EXIT_MEMORY, -getattr(signal, "SIGKILL", 9)):
        return f"took more than {limits['memory'] >> 20} MiB of memory"
    if status < 0:
        return f"ended its process with signal {-status}"
    return f"ended its process with status {status}"


class RenderProcess:
    """Renders one template in a child process, which is started when it is needed.

    The child serves renderings until this object goes. One that goes over a limit is
    replaced. Safe under threads, and in a process that was forked from this one.

    Args:
      source: The template.
      limits: What one rendering may use.
    """

    def __init__(self, source: str, limits: RenderLimits | None = None) -> None:
        self._source = source
        self._limits = RenderLimits() if limits is None else limits
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._finalizer: weakref.finalize | None = None

    def close(self) -> None:
        """Ends the child, if there is one; a later rendering starts another."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None

    def render(self, context: Mapping[str, Any]) -> str:
        """Renders the template.

        Args:
          context: Its variables, of what JSON can hold.

        Returns:
          The output.

        Raises:
          RenderError: The template is no valid one, failed, or went over a limit.
        """
        size = len(json.dumps(context, ensure_ascii=False).encode("utf-8"))
        limits = self._limits.of(size, len(self._source))
        request = json.dumps(limits | {"context": context}, ensure_ascii=False)
        if self._owner != os.getpid():
            # Forked: the pipe is the other process's, and so may be who holds the lock.
            self._owner, self._lock = os.getpid(), threading.Lock()
            self.close()
        with self._lock:
            process = self._started()
            # Nothing may be left half read in the pipe, whatever ends this.
            try:
                reply, timed_out = self._exchange(process, request, limits)
            except BaseException:
                self.close()
                raise
            if reply is None:
                status = _status(process)
                self.close()
                raise RenderError(_reason(status, limits, timed_out))
        if reply[:1] != b"T":
            raise RenderError(reply[1:].decode("utf-8", "replace"))
        return reply[1:].decode("utf-8", "replace")

    def _started(self) -> subprocess.Popen:
        process = self._process
        if process is not None:
            if process.poll() is None:
                return process
            self.close()
        if getattr(sys, "frozen", False) or not sys.executable:
            raise RenderError("chat templates need a Python interpreter to run in")
        command = [sys.executable, "-I", "-S", str(_CHILD)]
        try:
            process = subprocess.Popen(
                [*command, *_package_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise RenderError(
                f"the process that renders it cannot be started: {error}"
            ) from error
        self._process = process
        self._finalizer = weakref.finalize(self, _stop, process, self._owner)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # The first reading will tell.
            _send(process.stdin, json.dumps({"source": self._source}))
        return process

    def _exchange(
        self, process: subprocess.Popen, request: str, limits: Mapping[str, Any]
    ) -> tuple[bytes | None, bool]:
        """The reply, None if the child ended; and whether the clock ended it."""
        assert process.stdin is not None and process.stdout is not None
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(_MAX_START + 20 * limits["seconds"], end)
        timer.daemon = True
        timer.start()
        try:
            _send(process.stdin, request)
            length = int.from_bytes(process.stdout.read(_LENGTH), "big")
            # Four bytes a character, and the letter.
            if not 0 < length <= 4 * limits["max_output"] + 2000:
                return None, timed_out.is_set()
            reply = process.stdout.read(length)
            return (reply if len(reply) == length else None), timed_out.is_set()
        except BrokenPipeError:
            return None, timed_out.is_set()
        finally:
            timer.cancel()


def _send(stream: IO[bytes], text: str) -> None:
    data = text.encode("utf-8")
    stream.write(len(data).to_bytes(_LENGTH, "big"))
    stream.write(data)
    stream.flush()
