"""What the commands of this package say of a wrong option."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line, without its usage."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with that line and status 2."""
        told = message.removeprefix("argument ")
        self.exit(2, f"{told} (see {self.prog} --help)\n")
