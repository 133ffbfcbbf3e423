"""Scripts that run where JAX has four devices of the host."""

import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]


def on_four_devices(script: str, *words: str) -> Any:
    """What a script prints in a process with four devices."""
    environment = dict(
        os.environ,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
        JAX_PLATFORMS="cpu",
        PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    )
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def always_run(program: str) -> list[str]:
    """The lines of a compiled program's text that are in no branch of a condition."""
    bodies: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in program.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begins:
            name = begins[2]
            entry = name if begins[1] else entry
        bodies.setdefault(name, []).append(line)
    found, left = [], [entry]
    while left:
        body = bodies.pop(left.pop(), [])
        found += body
        for line in body:
            if " conditional(" not in line:
                left += [word for word in re.findall(r"%([\w.\-]+)", line)]
    return found
