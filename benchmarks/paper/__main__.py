"""The paper's figures and tables, run again.

    python -m benchmarks.paper list
    python -m benchmarks.paper NAME... [--data FOLDER] [--download]
    python -m benchmarks.paper page

NAME is an experiment's, the beginning of some (`fig11`, `beyond`), or `all`. What is
finished is not made again, so a run can be stopped at any moment and started again.
`page` writes the README of this folder from the results. Data: a folder with mnist,
fashion-mnist, cifar-100-binary and tinyshakespeare in it, in their original formats;
`--download` fetches what is missing.
"""

import argparse
import pathlib
import sys

from benchmarks.shared.data import SOURCES, fetch
from rmtdamp.demo._data import DataError

from ._experiment import carry_out
from ._page import write_page
from .experiments import EXPERIMENTS


def chosen(wanted: list[str]) -> list[str]:
    """The experiments that are meant, by name, by a beginning, or all."""
    if wanted == ["all"]:
        return list(EXPERIMENTS)
    of = lambda x: [n for n in EXPERIMENTS if n == x or n.startswith(f"{x}_")]
    if unknown := [given for given in wanted if not of(given)]:
        known = ", ".join(["all", *EXPERIMENTS])
        raise ValueError(f"no experiment {', '.join(unknown)}: choose from {known}")
    return [name for given in wanted for name in of(given)]


def main() -> int:
    """Read the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__, formatter_class=raw
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument("--download", action="store_true", help="fetch missing data")
    args = parser.parse_args()
    if args.names == ["list"]:
        print("\n".join(f"{x.name:18} {x.text.claim}" for x in EXPERIMENTS.values()))
        return 0
    if args.names == ["page"]:
        write_page()
        return 0
    try:
        names = chosen(args.names)
    except ValueError as failure:
        parser.error(str(failure))
    try:
        for source in SOURCES if args.download else ():
            fetch(source, args.data)
        for name in names:
            record = carry_out(EXPERIMENTS[name], args.data)
            print(f"{name}: {record['verdict']}. {record['remark']}")
    except DataError as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
