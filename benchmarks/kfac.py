"""Does a learned damping save KFAC a grid search? The paper's Figure 11, small.

    python -m benchmarks.kfac run [DATA_FOLDER]      # digits, or idx files' first 5,000
    python -m benchmarks.kfac table

KFAC at the paper's settings (decay 0.95, KL clip 0.01, momentum 0.9, sampled labels),
batch 128, eq. 12 with r = 0.01, 5 paired seeds. Five flat dampings against the learner
of eq. 15 from three first dampings an order apart. `run` writes one line per run to
benchmarks/results/kfac.jsonl as it ends and skips what is there; `table` prints
Markdown: the learner's epochs to the best flat run's final training loss, and the
spread of final test losses over either grid.
"""

import argparse
import json
import math
import pathlib
import statistics

from rich.progress import track

from rmtdamp.demo._data import load_digits, load_idx
from rmtdamp.demo._train import Settings, train

RESULTS = pathlib.Path(__file__).parent / "results" / "kfac.jsonl"
FLAT = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)
FLOORS = (1e-3, 1e-2, 1e-1)
SEEDS = range(5)
BASE = Settings(
    epochs=30,
    batch_size=128,
    width=128,
    learning_rate=0.03,
    sgd_learning_rate=0.05,
    damping=1e-1,
    floor=1e-2,
    every=20,
    rule="identity",
    form="damping",
)
CONFIGURATIONS = [
    *(("kfac", BASE._replace(damping=damping)) for damping in FLAT),
    *(("auto-kfac", BASE._replace(floor=floor)) for floor in FLOORS),
]


def load():
    """All finished runs."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def key(row):
    """What identifies a run."""
    return json.dumps([row["data"], row["method"], row["settings"], row["seed"]])


def run(folder):
    """Every run that is not in the results yet."""
    data = load_idx(folder) if folder else load_digits()
    data = data._replace(train=tuple(x[:5000] for x in data.train))
    done = {key(row) for row in load()}
    RESULTS.parent.mkdir(exist_ok=True)
    runs = [(*c, seed) for c in CONFIGURATIONS for seed in SEEDS]
    for method, settings, seed in track(runs, "runs"):
        row = {"data": data.name, "method": method, "settings": settings._asdict()}
        row["seed"] = seed
        if key(row) in done:
            continue
        records = list(train(data, method, settings, seed))
        for name in ("train_loss", "test_loss", "test_accuracy", "damping"):
            row[name] = [getattr(record, name) for record in records]
        with RESULTS.open("a") as out:
            out.write(json.dumps(row) + "\n")


def cell(values, digits=4):
    """Mean ± standard error; runs that diverged are counted."""
    good = [x for x in values if math.isfinite(x)]
    lost = f", {len(values) - len(good)} diverged" if len(good) < len(values) else ""
    if len(good) < 2:
        return lost.removeprefix(", ") or f"{good[0]:.{digits}f}"
    error = statistics.stdev(good) / len(good) ** 0.5
    return f"{statistics.mean(good):.{digits}f} ± {error:.{digits}f}{lost}"


def epochs_to(losses, target):
    """The first epoch at or below `target`, infinite if there is none."""
    return next((i for i, x in enumerate(losses, 1) if x <= target), math.inf)


def table():
    """The Markdown tables, one per data set."""
    rows = load()
    for data in sorted({row["data"] for row in rows}):
        groups = []
        for method, settings in CONFIGURATIONS:
            found = [
                row
                for row in rows
                if (row["data"], row["method"]) == (data, method)
                and row["settings"] == settings._asdict()
            ]
            if len(found) == len(SEEDS):
                found.sort(key=lambda row: row["seed"])
                groups.append((method, settings, found))
        last = lambda group, name: [row[name][-1] for row in group[2]]

        def mean(group, name, last=last):
            values = last(group, name)
            return statistics.mean(x if math.isfinite(x) else math.inf for x in values)

        flat = [g for g in groups if g[0] == "kfac"]
        learned = [g for g in groups if g[0] == "auto-kfac"]
        best = min(flat, key=lambda g: mean(g, "train_loss"))
        print(f"\n**{data}**\n")
        print(
            "| damping | train loss | test loss | test accuracy, % | final damping "
            "| epochs to the best flat run's train loss |"
        )
        print("|---|---|---|---|---|---|")
        for group in groups:
            method, settings, found = group
            name = f"flat {settings.damping:g}"
            if method == "auto-kfac":
                name = f"learned, floor {settings.floor:g}"
            epochs = [
                epochs_to(row["train_loss"], other["train_loss"][-1])
                for row, other in zip(found, best[2], strict=True)
            ]
            reached = [x for x in epochs if math.isfinite(x)]
            columns = [
                cell(last(group, "train_loss")),
                cell(last(group, "test_loss")),
                cell([100 * x for x in last(group, "test_accuracy")], 1),
                f"{statistics.mean(last(group, 'damping')):.2g}",
                f"{len(reached)} of {len(found)}"
                + (f", median {statistics.median(reached):g}" if reached else ""),
            ]
            print(f"| {name} | {' | '.join(columns)} |")
        spread = lambda groups: (
            max(mean(g, "test_loss") for g in groups)
            - min(mean(g, "test_loss") for g in groups)
        )
        print(
            f"\nSpread of the mean final test losses: learned {spread(learned):.3f}, "
            f"flat {spread(flat):.3f}."
        )


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="train what is not in the results yet")
    runner.add_argument(
        "data", type=pathlib.Path, nargs="?", help="folder of idx files"
    )
    commands.add_parser("table", help="print the Markdown tables")
    args = parser.parse_args()
    if args.command == "run":
        run(args.data)
    else:
        table()


if __name__ == "__main__":
    main()
