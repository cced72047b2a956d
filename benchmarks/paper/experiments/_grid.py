"""VGG-16 on CIFAR-100: the task, its reduction, and rows of final figures."""

import itertools
from collections.abc import Sequence

from benchmarks.paper._experiment import Scale, cell, mean
from benchmarks.paper._runs import Row, Run
from benchmarks.paper._train import train

SMALL = {
    "dataset": "cifar-100",
    "model": "vgg16",
    "width": 0.125,
    "coarse": True,
    "num_classes": 5,
    "num_train": 2560,
    "num_test": 2500,
    "pool": 2,
}
FULL = {"dataset": "cifar-100", "model": "vgg16", "augmented": True}
SEEDS = (0, 1, 2)
SGD, SGD_RATE = {"optimizer": "sgd"}, {"small": 0.02, "full": 0.01}
REDUCTION = (
    "Reduced: VGG-16 at an eighth of its width (0.24 million parameters), CIFAR-100's"
    " first five coarse classes (2,560 training and 2,500 test images) at 16 x 16"
    " pixels, no augmentation, {epochs} epochs in place of 300, eq. 12 with r = 0.01,"
    " batch 128, 3 seeds."
)
FULL_PROTOCOL = (
    "The paper's: VGG-16 at full width on all of CIFAR-100, crops and flips, 300"
    " epochs, eq. 12 with r = 0.01, batch 128, 3 seeds."
)


def protocol(epochs: int, more: str = "") -> dict[Scale, str]:
    """What is run at either scale."""
    reduced = REDUCTION.format(epochs=epochs)
    return {
        "small": f"{reduced} {more}".strip(),
        "full": f"{FULL_PROTOCOL} {more}".strip(),
    }


def run(
    scale: Scale,
    method: Row,
    learning_rate: float,
    damping: float,
    seed: int,
    *,
    epochs: int,
    weight_decay: float = 0.0,
    model: str = "vgg16",
) -> Run:
    """One training run of the grid; lambda_1 is measured at its end."""
    small = scale == "small"
    if not small:  # the paper's periods, 100 steps, are the defaults
        method = {k: v for k, v in method.items() if not k.endswith("every")}
    return Run(
        train,
        {
            "task": {**(SMALL if small else FULL), "model": model},
            "method": method,
            "learning_rate": learning_rate,
            "damping": damping,
            "weight_decay": weight_decay,
            "epochs": epochs if small else 300,
            "batch_size": 128,
            "seed": seed,
            "eval_every": 2 if small else 5,
            "with_spectral_norm": True,
        },
    )


def sgd(scale: Scale, epochs: int, model: str = "vgg16") -> list[Run]:
    """SGD at the rate that is best at this scale, all seeds."""
    return [
        run(scale, SGD, SGD_RATE[scale], 0.0, seed, epochs=epochs, model=model)
        for seed in SEEDS
    ]


def label(row: Row) -> str:
    """An optimiser's name for a table."""
    method = row["method"]
    name = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC"}[method["optimizer"]]
    extra = []
    if method.get("learned"):
        extra.append("learned")
        if method.get("rule", "identity") != "identity":
            extra.append("equivariant rule")
    if method.get("form", "damping") != "damping":
        extra.append(f"{method['form']} form")
    if method.get("schedule", "linear") != "linear":
        extra.append(f"{method['schedule']} schedule")
    return ", ".join([name, *extra])


def key(row: Row) -> tuple:
    """What rows share that differ in their seed alone."""
    return label(row), row["learning_rate"], row["damping"], row["weight_decay"]


def by_setting(rows: list[Row]) -> dict[tuple, list[Row]]:
    """Rows of one setting, all seeds."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def last(rows: list[Row], name: str, factor: float = 100.0) -> list[float]:
    """The final value of a curve, seed by seed; infinite where the run diverged."""
    ends = [row[name][-1] for row in sorted(rows, key=lambda r: r["seed"])]
    return [factor * x if x is not None and x == x else float("inf") for x in ends]


def is_falling(values: Sequence[float]) -> bool:
    """Does no value exceed the one before it?"""
    return all(a >= b for a, b in itertools.pairwise(values))


def table(rows: list[Row]) -> list[Row]:
    """A line per setting."""
    lines = []
    for (name, rate, damping, decay), found in by_setting(rows).items():
        line: Row = {"optimiser": name, "alpha": rate}
        line["delta"] = None if name.startswith("SGD") else damping
        if any(row["weight_decay"] for row in rows):
            line["weight decay"] = decay
        line |= {
            "train loss": cell(last(found, "train_loss", 1.0), 4),
            "train error, %": cell(last(found, "train_error"), 1),
            "test error, %": cell(last(found, "test_error"), 1),
            "test loss": cell(last(found, "test_loss", 1.0), 2),
            "lambda_1": cell([row["spectral_norm"] for row in found], 1),
        }
        if any(row["method"].get("learned") for row in rows):
            line["final delta"] = None
            if not name.startswith("SGD"):
                line["final delta"] = f"{mean(last(found, 'damping_curve', 1.0)):.2g}"
        lines.append(line)
    return lines


def draw_curves(figure, rows: list[Row], *, damping: bool = False) -> None:
    """Training and test error by epoch (and the damping), a colour per setting."""
    axes = figure.subplots(1, 3 if damping else 2)
    names = ["train_error", "test_error", *(["damping_curve"] if damping else [])]
    for i, (setting, found) in enumerate(by_setting(rows).items()):
        name, rate, floor, decay = setting
        text = f"{name}, {rate:g}"
        text += "" if name.startswith("SGD") else f", {floor:g}"
        text += f", wd {decay:g}" if decay else ""
        for ax, curve in zip(axes, names, strict=True):
            length = min(len(r[curve]) for r in found)
            epochs = found[0]["epoch"][:length]
            if found[0][curve][0] is None:
                continue
            scale = 1.0 if curve == "damping_curve" else 100.0
            values = [scale * mean([r[curve][t] for r in found]) for t in range(length)]
            ax.plot(
                epochs,
                values,
                color=f"C{i % 10}",
                ls="-" if i < 10 else "--",
                lw=1.2,
                label=text,
            )
    axes[0].set(xlabel="epoch", ylabel="training error, %", yscale="symlog")
    axes[0].set_ylim(bottom=0)
    axes[1].set(xlabel="epoch", ylabel="test error, %")
    if damping:
        axes[2].set(xlabel="epoch", ylabel="damping", yscale="log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
