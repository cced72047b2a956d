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

from rmtdamp.demo._data import DataError

from . import _page
from ._experiment import carry_out
from .experiments import EXPERIMENTS


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
            print(f"{experiment.name:18} {experiment.claim}")
        return 0
    if args.names == ["page"]:
        _page.write_page()
        return 0
    try:
        names = chosen(args.names)
    except ValueError as failure:
        parser.error(str(failure))
    if args.download:
        from ._data import fetch

        for source in ("mnist", "fashion-mnist", "cifar-100", "tinyshakespeare"):
            fetch(source, args.data)
    for name in names:
        experiment = EXPERIMENTS[name]
        scale = args.scale or next(iter(experiment.protocol))
        if scale not in experiment.protocol:
            print(f"{name}: has no scale {scale}, skipped", file=sys.stderr)
            continue
        try:
            conclusion = carry_out(experiment, scale, args.data)
        except DataError as failure:
            print(f"{name}: {failure}", file=sys.stderr)
            return 1
        print(f"{name} ({scale}): {conclusion.verdict}. {conclusion.remark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
