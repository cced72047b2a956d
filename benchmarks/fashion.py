"""Does the learned damping come near the best flat one? Fashion-MNIST, 5,000 images.

    python -m benchmarks.fashion run DATA_FOLDER [--learning-rate 1e-3]
    python -m benchmarks.fashion table

MLP 784-256-256-10, batch 128, 30 epochs, eq. 12 with r = 0.01, 5 paired seeds, two
learning rates. Flat dampings against the learner with three floors, both rules and both
forms. `run` writes one line per run to benchmarks/results/fashion.jsonl as it ends and
skips what is there, so it can be stopped at any moment; `table` prints Markdown.
"""

import argparse
import itertools
import json
import pathlib
import statistics

from rich.progress import track

from rmtdamp.demo._data import load_idx
from rmtdamp.demo._train import Settings, train

RESULTS = pathlib.Path(__file__).parent / "results" / "fashion.jsonl"
FLAT = (1e-8, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FLOORS = (1e-5, 1e-4, 1e-3)
RULES = ("identity", "scaled-identity")
FORMS = ("damping", "shrinkage")
SEEDS = range(5)
# Every field, so that finished runs stay valid when the main job's defaults change.
BASE = Settings(
    epochs=30,
    batch_size=128,
    width=256,
    learning_rate=1e-3,
    sgd_learning_rate=0.05,
    damping=1e-2,
    floor=1e-4,
    every=100,
    rule="identity",
    form="damping",
)


def configurations(rate):
    """(method, settings) of every row at one learning rate."""
    base = BASE._replace(learning_rate=rate)
    for damping in FLAT:
        yield "adam-shrinkage", base._replace(damping=damping)
    for rule, form, floor in itertools.product(RULES, FORMS, FLOORS):
        yield "auto-adam", base._replace(rule=rule, form=form, floor=floor)


def key(row):
    """What identifies a run."""
    return json.dumps([row["method"], row["settings"], row["seed"]])


def load():
    """All finished runs."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def run(folder, rates):
    """Every run that is not in the results yet."""
    data = load_idx(folder)
    data = data._replace(train=tuple(x[:5000] for x in data.train))
    done = {key(row) for row in load()}
    runs = [
        (method, settings, seed)
        for rate in rates
        for method, settings in configurations(rate)
        for seed in SEEDS
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    for method, settings, seed in track(runs, "runs"):
        row = {"method": method, "settings": settings._asdict(), "seed": seed}
        if key(row) in done:
            continue
        records = list(train(data, method, settings, seed))
        last = records[-1]
        row |= {
            "train_loss": last.train_loss,
            "final_loss": last.test_loss,
            "final_accuracy": last.test_accuracy,
            "best_loss": min(r.test_loss for r in records),
            "best_accuracy": max(r.test_accuracy for r in records),
            "damping": [r.damping for r in records],
            "measured_variance": [r.measured_variance for r in records],
        }
        with RESULTS.open("a") as out:
            out.write(json.dumps(row) + "\n")


def cell(values, digits=3):
    """Mean ± standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def table():
    """The Markdown tables, and the distance of each learner to the best flat row."""
    rows = load()
    rates = sorted({row["settings"]["learning_rate"] for row in rows})
    for rate in rates:
        print(f"\n**Learning rate {rate:g}**\n")
        print(
            "| damping | train loss | final test loss | best test loss "
            "| final accuracy, % | best accuracy, % | final damping | to best flat |"
        )
        print("|---|---|---|---|---|---|---|---|")
        groups = []
        for method, settings in configurations(rate):
            found = [
                row
                for row in rows
                if row["method"] == method and row["settings"] == settings._asdict()
            ]
            found.sort(key=lambda row: row["seed"])
            if len(found) == len(SEEDS):
                groups.append((method, settings, found))
        flat = [g for g in groups if g[0] == "adam-shrinkage"]
        mean = lambda g: statistics.mean(row["final_loss"] for row in g[2])
        best = min(flat, key=mean)
        for method, settings, found in groups:
            name = f"flat {settings.damping:g}"
            distance = "**best flat**" if (method, settings) == best[:2] else ""
            if method == "auto-adam":
                name = (
                    f"learned, {settings.rule}, {settings.form} form, "
                    f"floor {settings.floor:g}"
                )
                distance = cell(
                    [
                        a["final_loss"] - b["final_loss"]
                        for a, b in zip(found, best[2], strict=True)
                    ]
                )
            columns = [
                cell([row["train_loss"] for row in found]),
                cell([row["final_loss"] for row in found]),
                cell([row["best_loss"] for row in found]),
                cell([100 * row["final_accuracy"] for row in found], 1),
                cell([100 * row["best_accuracy"] for row in found], 1),
                f"{statistics.mean(row['damping'][-1] for row in found):.2g}",
                distance,
            ]
            print(f"| {name} | {' | '.join(columns)} |")


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what is not in the results yet")
    runner.add_argument("data", type=pathlib.Path, help="folder with the idx files")
    runner.add_argument(
        "--learning-rate",
        type=float,
        action="append",
        help="one of the two learning rates (default: both)",
    )
    commands.add_parser("table", help="print the Markdown tables")
    args = parser.parse_args()
    if args.command == "run":
        run(args.data, args.learning_rate or [1e-3, 1e-2])
    else:
        table()


if __name__ == "__main__":
    main()
