"""`python -m rmtdamp`: train under four optimisers and see what the damping did.

`python -m rmtdamp spectrum module:function` is another command: `rmtdamp.spectrum`.
"""

import argparse
import pathlib
import sys

if __name__ == "__main__" and sys.argv[1:2] == ["spectrum"]:
    # Before the imports of the main job: this command does without them.
    from rmtdamp.spectrum._command import main as spectrum

    sys.exit(spectrum(sys.argv[2:]))

try:
    import flax.nnx  # noqa: F401
    import matplotlib  # noqa: F401
    import rich.console
    import rich.progress
    import sklearn  # noqa: F401
except ModuleNotFoundError as _lost:
    sys.exit(f"rmtdamp: the main job needs {_lost.name}: pip install 'rmtdamp[demo]'")

from rmtdamp._cli import Parser, WriteError, number
from rmtdamp.demo._data import DataError, Dataset, load_digits, load_idx
from rmtdamp.demo._report import ReportError, Runs, table, write_report
from rmtdamp.demo._train import DEFAULT_METHODS, METHODS, RULES, Settings, train


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = Settings()
    out = Parser(
        prog="python -m rmtdamp",
        description="Train a small Flax network on real data under SGD, Adam and Adam "
        "whose damping is learned from the Hessian, both also at a hundred times "
        "the learning rate (-fast). Prints a table and writes a report folder: "
        "report.png, report.json. Interrupt it at any time; the same command goes on "
        "where it stopped.",
        epilog="For a page about your own model's Hessian: python -m rmtdamp spectrum "
        "--help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = out.add_argument
    unset = argparse.SUPPRESS  # keeps "(default: None)" out of the help
    add(
        "--data",
        type=pathlib.Path,
        metavar="FOLDER",
        default=unset,
        help="folder with MNIST, Fashion-MNIST or other data as four idx files, "
        "gzipped or not (default: scikit-learn's digits, which need no download)",
    )
    add(
        "--out",
        type=pathlib.Path,
        metavar="FOLDER",
        default="rmtdamp-report",
        help="report folder; finished runs in it are not repeated",
    )
    add(
        "--methods",
        "--optimizer",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=unset,
        help=f"optimisers to compare, of {', '.join(METHODS)} (default: the first "
        f"{len(DEFAULT_METHODS)}; the others want a --learning-rate of their own)",
    )
    add(
        "--seeds",
        type=number(int, 1),
        metavar="N",
        default=3,
        help="runs per method; a seed fixes weights and data order",
    )
    add(
        "--train-size",
        type=number(int, 2),
        metavar="N",
        default=unset,
        help="use the first N training examples only (default: all)",
    )
    positive = number(float, 0, open_=True)
    options = {
        "epochs": (number(int, 1), "passes over the training data"),
        "batch_size": (number(int, 2), "examples per step"),
        "width": (number(int, 1), "units in each of the two hidden layers"),
        "learning_rate": (positive, "of all but SGD; eq. 12 anneals it to 1 %%"),
        "sgd_learning_rate": (positive, "of SGD with momentum 0.9, annealed likewise"),
        "damping": (
            number(float, 0),
            "flat damping of adam-shrinkage, in the unit of a gradient, and of kfac",
        ),
        "floor": (
            number(float, 0),
            "of the learners: the first damping, added to each measured one",
        ),
        "every": (number(int, 1), "of the learners: steps between measurements"),
    }
    for name, (kind, text) in options.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=kind, metavar="X", default=getattr(default, name), help=text)
    add(
        "--rule",
        choices=RULES,
        default=default.rule,
        help="of the learners: stability-floor (as little as is stable), identity "
        "(eq. 15) or scaled-identity (Ledoit-Wolf; follows the loss's scale)",
    )
    add(
        "--form",
        choices=("damping", "shrinkage"),
        default=default.form,
        help="of both damped Adams: m/(sqrt(v)+d), or (1+d/target) times that",
    )
    return out


def _load(args) -> Dataset:
    data = load_idx(args.data) if args.data else load_digits()
    if args.train_size:
        if args.train_size > len(data.train[1]):
            raise DataError(
                f"--train-size is {args.train_size}, and {data.name} has "
                f"{len(data.train[1])} training examples"
            )
        images, labels = data.train
        data = data._replace(
            name=f"{data.name} ({args.train_size} examples)",
            train=(images[: args.train_size], labels[: args.train_size]),
        )
    if args.batch_size > len(data.train[1]):
        raise DataError(
            f"--batch-size is {args.batch_size}, and {data.name} has "
            f"{len(data.train[1])} training examples"
        )
    return data


def _run(args, console) -> None:
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    data = _load(args)
    runs = Runs(args.out, data.name, settings)
    results = {method: [] for method in args.methods}
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        total = progress.add_task("runs", total=args.seeds * len(args.methods), note="")
        for method in args.methods:
            for seed in range(args.seeds):
                records = runs.load(method, seed)
                if records is None:
                    records = []
                    bar = progress.add_task(
                        f"{method}, seed {seed}", total=settings.epochs, note=""
                    )
                    kept = runs.unfinished(method, seed)
                    for record in train(data, method, settings, seed, kept):
                        records.append(record)
                        seen = f"test loss {record.test_loss:.4f}"
                        note = "diverged" if record.diverged else seen
                        progress.update(bar, advance=1, note=note)
                    progress.remove_task(bar)
                    runs.save(method, seed, records)
                    kept.remove()
                results[method].append(records)
                progress.advance(total)
    write_report(results, runs)
    console.print(table(results, data.name))
    console.print(f"{args.out / 'report.png'}\n{args.out / 'report.json'}")


def main(argv: list[str] | None = None) -> int:
    """Run the main job, or the command `argv` begins with; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["spectrum"]:
        from rmtdamp.spectrum._command import main as spectrum

        return spectrum(argv[1:])
    args = argparse.Namespace(data=None, train_size=None, methods=list(DEFAULT_METHODS))
    parser().parse_args(argv, args)
    console = rich.console.Console()
    try:
        _run(args, console)
    except (DataError, ReportError, WriteError) as error:
        print(f"rmtdamp: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print(  # noqa: T201
            "rmtdamp: interrupted; the same command goes on where it stopped",
            file=sys.stderr,
        )
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
