"""What the commands share: one-line errors, checked numbers, files written whole."""

import argparse
import math
import os
import pathlib
from collections.abc import Callable


class WriteError(Exception):
    """A file cannot be written; the message says which, and why."""


def write_whole(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Write a file whole or not at all: a kill or a full disk leaves what was there.

    Raises:
        WriteError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WriteError(
            f"cannot write {path}: {error}; what is finished is kept"
        ) from None


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message):
        """One line and exit code 2, without the usage in front."""
        self.exit(2, f"rmtdamp: {message} (--help explains every option)\n")


def number(kind, lower, *, open_=False):
    """A type for argparse: a finite number from `lower` on."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < lower or (open_ and value == lower):
            bound = f"above {lower}" if open_ else f"of at least {lower}"
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} {bound}")
        return value

    return parse
