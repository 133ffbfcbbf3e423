"""What a command has measured, a JSON line each, as soon as it is there."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any


def say(row: Mapping[str, Any], out: pathlib.Path | None) -> None:
    """Prints a row as a line of JSON and adds it to a file.

    Args:
      row: What was measured.
      out: The file, made if it is not there; None to print alone.
    """
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
