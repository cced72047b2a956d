"""What the commands of `python -m rmtdamp` share: one-line errors, checked numbers."""

import argparse
import math


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
