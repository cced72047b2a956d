"""VGG-16 on CIFAR-100: the task, its reduction, and rows of final figures."""

from benchmarks.paper._experiment import Scale
from benchmarks.paper._train import train
from benchmarks.shared.checks import cell, groups, mean
from benchmarks.shared.figures import Line, curves
from benchmarks.shared.runs import Row, Run

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
NAMES = {"sgd": "SGD", "adam": "Adam", "kfac": "KFAC"}


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
    """One training run; lambda_1 is measured at its end."""
    small = scale == "small"
    if not small:  # the paper's periods, 100 steps, are the defaults
        method = {k: v for k, v in method.items() if not k.endswith("every")}
    config = {"task": {**(SMALL if small else FULL), "model": model}, "method": method}
    config |= {"learning_rate": learning_rate, "damping": damping, "seed": seed}
    config |= {"weight_decay": weight_decay, "epochs": epochs if small else 300}
    config |= {"batch_size": 128, "eval_every": 2 if small else 5}
    return Run(train, config | {"with_spectral_norm": True})


def sgd(scale: Scale, epochs: int, model: str = "vgg16") -> list[Run]:
    """SGD at the rate that is best at this scale, all seeds."""
    settings = SGD, SGD_RATE[scale], 0.0
    return [run(scale, *settings, s, epochs=epochs, model=model) for s in SEEDS]


def label(row: Row) -> str:
    """An optimiser's name for a table."""
    method, usual = row["method"], {"form": "damping", "schedule": "linear"}
    parts = [NAMES[method["optimizer"]]]
    if method.get("learned"):
        parts.append("learned")
    if method.get("rule", "identity") != "identity":
        parts.append("equivariant rule")
    parts += [f"{method[k]} {k}" for k, v in usual.items() if method.get(k, v) != v]
    return ", ".join(parts)


def by_setting(rows: list[Row]) -> dict[tuple, list[Row]]:
    """(label, rate, damping, weight decay) -> a row for each seed."""
    named = [{**row, "label": label(row)} for row in rows]
    found = groups(named, "label", "learning_rate", "damping", "weight_decay")
    return {k: sorted(v, key=lambda row: row["seed"]) for k, v in found.items()}


def last(rows: list[Row], name: str, factor: float = 100.0) -> list[float]:
    """The final value of a curve, seed by seed; infinite where the run diverged."""
    ends = [row[name][-1] for row in rows]
    return [factor * x if x is not None and x == x else float("inf") for x in ends]


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


def draw(rows: list[Row]):
    """Training and test error by epoch, and the damping where one is learned."""
    learned = any(row["method"].get("learned") for row in rows)
    names = ["train_error", "test_error", *["damping_curve"] * learned]
    lines = {name: [] for name in names}
    for (name, rate, damping, decay), found in by_setting(rows).items():
        text = f"{name}, {rate:g}" + ("" if name == "SGD" else f", {damping:g}")
        text += f", wd {decay:g}" if decay else ""
        for curve in names:
            length = min(len(r[curve]) for r in found)
            if found[0][curve][0] is None:
                continue
            scale = 1.0 if curve == "damping_curve" else 100.0
            values = [scale * mean([r[curve][t] for r in found]) for t in range(length)]
            lines[curve].append(Line(text, found[0]["epoch"][:length], values))
    axes = {
        "train_error": {"ylabel": "training error, %", "yscale": "symlog"},
        "test_error": {"ylabel": "test error, %"},
        "damping_curve": {"ylabel": "damping", "yscale": "log"},
    }
    return [curves(lines[n], xlabel="epoch", **axes[n]) for n in names]
