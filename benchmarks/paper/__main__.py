"""The paper's figures and tables, run again.

    python -m benchmarks.paper list
    python -m benchmarks.paper NAME... [--scale small|full] [--data FOLDER]
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

from benchmarks.shared.sources import fetch
from rmtdamp.demo._data import DataError

from . import _page
from ._experiment import carry_out
from .experiments import EXPERIMENTS

DATA = ("mnist", "fashion-mnist", "cifar-100", "tinyshakespeare")


def chosen(wanted: list[str]) -> list[str]:
    """The experiments that are meant, by name, by a beginning, or all."""
    if wanted == ["all"]:
        return list(EXPERIMENTS)
    found = {
        given: [n for n in EXPERIMENTS if n == given or n.startswith(f"{given}_")]
        for given in wanted
    }
    if unknown := [given for given, names in found.items() if not names]:
        raise ValueError(
            f"no experiment {', '.join(unknown)}: choose from all, "
            f"{', '.join(EXPERIMENTS)}"
        )
    return [name for names in found.values() for name in names]


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--scale", choices=("small", "full"))
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data"))
    parser.add_argument(
        "--download", action="store_true", help="fetch missing data into that folder"
    )
    args = parser.parse_args()
    if args.names == ["list"]:
        for experiment in EXPERIMENTS.values():
            print(f"{experiment.name:18} {experiment.text.claim}")
        return 0
    if args.names == ["page"]:
        _page.write_page()
        return 0
    try:
        names = chosen(args.names)
    except ValueError as failure:
        parser.error(str(failure))
    try:
        for source in DATA if args.download else ():
            fetch(source, args.data)
        for name in names:
            experiment = EXPERIMENTS[name]
            protocols = experiment.text.protocol
            scale = args.scale or next(iter(protocols))
            if scale not in protocols:
                print(f"{name}: has no scale {scale}, skipped", file=sys.stderr)
                continue
            record = carry_out(experiment, scale, args.data)
            print(f"{name} ({scale}): {record['verdict']}. {record['remark']}")
    except DataError as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
