"""Several hosts: processes that meet, and then run the same calls."""

import hashlib
import json
import socket
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparda_jax.checks import (
    ConfigError,
    integer,
    one_line,
    optional,
    require,
    shown,
    text,
)
from sparda_jax.mesh import present_devices


def join_hosts(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of a run; nothing where this one is alone.

    Args:
      coordinator: Address of the first process, HOST:PORT; None where there is one.
      count: How many processes there are.
      index: Which of them this is.

    Raises:
      ConfigError: The flags do not fit together, or the processes did not meet.
    """
    if coordinator is None:
        for field, value in (("--num-processes", count), ("--process-id", index)):
            require(value is None, field, value, "given together with --coordinator")
        return
    count = optional(integer(1))("--num-processes", count)
    index = optional(integer(0))("--process-id", index)
    if count is not None and index is not None:
        require(index < count, "--process-id", index, f"below --num-processes={count}")
    address = _address(coordinator)
    if index == 0:
        _refuse_port_in_use(coordinator)
    try:
        jax.distributed.initialize(address, count, index)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--coordinator={shown(coordinator)} is not allowed: it must be an address "
            f"that all processes reach ({one_line(str(error), 300)})"
        ) from error


def _address(written: str) -> str:
    """HOST:PORT; JAX ends the process on anything else."""
    written = text("--coordinator", written)
    host, _, port = written.rpartition(":")
    number = port.isascii() and port.isdecimal() and len(port) <= 5
    require(
        bool(host) and number and 0 < int(port) < 2**16,
        "--coordinator",
        written,
        "HOST:PORT, with a port from 1 to 65535",
    )
    return written


def _refuse_port_in_use(coordinator: str) -> None:
    """The first process listens at the port, on every address of its machine.

    JAX ends the process, with a trace of its own, where it cannot.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(coordinator.rpartition(":")[2])
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise ConfigError(
            f"--coordinator={shown(coordinator)} is not allowed: port {port} of this "
            f"machine cannot be listened at ({error.strerror}); take another one"
        ) from error


def speaks() -> bool:
    """Whether this process is the one that prints what all have found."""
    return jax.process_index() == 0


def check_same_words(words: Sequence[str]) -> None:
    """Refuses processes that were not all asked for the same.

    Every process must call it; one that runs alone may.

    Args:
      words: What this process was asked for.

    Raises:
      ConfigError: Another process was asked for something else; all of them say so.
        Or JAX cannot start its devices.
    """
    present_devices()
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(list(words)).encode()).digest()
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    first = bytes(np.asarray(found[0]))
    other = [at for at, one in enumerate(found) if bytes(np.asarray(one)) != first]
    if other:
        raise ConfigError(
            f"process {other[0]} was asked for something else than process 0: options "
            "(but --process-id), model and prompt must be the same"
        )
