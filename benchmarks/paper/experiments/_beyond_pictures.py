"""The pictures of `beyond`."""

import numpy as np

from benchmarks.paper._experiment import mean

from ._beyond import (
    FACTORS,
    FASHION,
    KINDS,
    NEAR,
    TASKS,
    TEXT,
    best_of,
    by_method,
    by_task,
    excess_of,
    final,
    flat_of,
    gap_of,
    near_best,
    scaled_table,
    settled_at,
)

MARKS = {"learned": ("D", "C3"), "learned, equivariant": ("s", "C0")}


def _greys(labels):
    return {
        k: str(x)
        for k, x in zip(labels, np.linspace(0.8, 0.1, len(labels)), strict=True)
    }


def draw_tasks(figure, rows):
    """Excess over the best flat damping; where the learner settles; the loss scaled."""
    tasks = by_task(rows)
    left, middle, right = figure.subplots(1, 3, width_ratios=[5, 4, 3])
    for i, methods in enumerate(tasks.values()):
        style = {k: ("o", shade) for k, shade in _greys(flat_of(methods)).items()}
        style |= MARKS
        for j, (label, (mark, colour)) in enumerate(style.items()):
            y = max(100 * excess_of(methods, label), 0.3)
            x = i + 0.12 * (j - 3)
            left.plot(x, y, mark, color=colour, ms=5, label=None if i else label)
        for j, (label, (mark, colour)) in enumerate(MARKS.items()):
            ends = [row["damping_curve"][-1] for row in methods[label]]
            y = i + 0.15 * (j + 1)
            middle.plot(ends, [y] * len(ends), mark, color=colour, ms=4)
        at = lambda label: float(label.split()[1])
        near = [at(k) for k in flat_of(methods) if near_best(methods, k)[0]]
        middle.plot([min(near), max(near)], [i - 0.1] * 2, color="0.7", lw=6)
        middle.plot(at(best_of(methods)), i - 0.1, "k*", ms=8)
    left.axhline(100 * NEAR, color="0.6", lw=0.8, ls="--")
    left.set(yscale="log", ylabel="test loss above the best flat, %")
    names = [TASKS[n][0].replace(", ", "\n") for n in tasks]
    left.set_xticks(range(len(names)), names, fontsize=6)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center",
                  ncols=7, fontsize=7, frameon=False)  # fmt: skip
    middle.set(xscale="log", xlabel="damping at the end")
    middle.set_yticks(range(len(names)), names, fontsize=7)
    middle.set_title("star: best flat; bar: flat within 5 %", fontsize=8)
    scaled = scaled_table(rows)
    for label, (mark, colour) in MARKS.items():
        y = [100 * r["excess"] for r in scaled if r["damping"] == label]
        right.plot(sorted((*FACTORS, 1.0)), y, mark + "-", color=colour, ms=5)
    right.set(xscale="log", xlabel="loss times", ylim=(0, None))
    right.set_title("Fashion-MNIST, excess, %", fontsize=8)


def draw_text(figure, rows):
    """Test loss along the run, the damping along it, and both at the end."""
    methods = by_method(rows, TEXT)
    curves, path, end = figure.subplots(1, 3)
    flat = flat_of(methods)
    style = _greys(flat) | {label: colour for label, (_, colour) in MARKS.items()}
    for label, found in methods.items():
        y = np.mean([r["test_loss"] for r in found], axis=0)
        curves.plot(found[0]["step"], y, color=style[label], lw=1.2, label=label)
    curves.set(xlabel="step", ylabel="test loss, nats per character")
    curves.legend(fontsize=6)
    for label, (_, colour) in MARKS.items():
        for row in methods[label]:
            path.plot(row["step"], row["damping_curve"], color=colour, lw=1)
    path.axhline(float(best_of(methods).split()[1]), color="k", ls=":", lw=1)
    path.set(yscale="log", xlabel="step")
    path.set_title("damping; dotted: best flat", fontsize=8)
    x = [float(label.split()[1]) for label in flat]
    y = [mean(final(found)) for found in flat.values()]
    end.plot(x, y, "o-", color="0.5", label="flat")
    for label, (mark, colour) in MARKS.items():
        found = methods[label]
        end.plot(settled_at(found), mean(final(found)), mark, color=colour, label=label)
    end.set(xscale="log", xlabel="damping at the end", ylabel="final test loss")
    end.legend(fontsize=6)


def draw_layers(figure, rows):
    """Distance to the best flat damping; dampings along the run."""
    tasks = by_task(rows)
    left, *others = figure.subplots(1, 3, width_ratios=[4, 4, 4])
    labels = []
    for name, methods in tasks.items():
        best = best_of(methods)
        per_cent = 100 / mean(final(methods[best]))
        for label in methods:
            if label.startswith("flat") and label != best:
                continue
            gap, error = gap_of(methods, label, best)
            rule = "learned, equivariant" if "equivariant" in label else "learned"
            left.errorbar(
                per_cent * gap,
                len(labels),
                xerr=2 * per_cent * error,
                fmt="o",
                ms=4,
                color="k" if label == best else MARKS[rule][1],
            )
            short = label.replace("learned, equivariant", "equivariant")
            short = short.replace("a layer by ", "")
            task = TASKS[name][0].split(",")[0]
            labels.append(f"{task}: {short}" if label == best else short)
    left.axvline(0, color="k", lw=0.8)
    left.set_yticks(range(len(labels)), labels, fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="test loss above the best flat, %")
    left.set_xscale("symlog", linthresh=10)
    limits = left.get_xlim()
    left.set_xticks([-10, 0, 10, 30, 100, 300], ["−10", "0", "10", "30", "100", "300"])
    left.set_xticks([], minor=True)
    left.set_xlim(limits)
    fashion = tasks[FASHION]
    one = np.mean([row["damping_curve"] for row in fashion["learned"]], axis=0)
    for ax, text in zip(others, KINDS.values(), strict=True):
        found = fashion[f"learned, a layer by {text}"]
        steps = found[0]["step"]
        for i, layer in enumerate(found[0]["damping_curve"]):
            for row in found:
                name = layer if row is found[0] else None
                ax.plot(
                    steps, row["damping_curve"][layer], color=f"C{i}", lw=1, label=name
                )
        ax.plot(steps, one, "k--", lw=1, label="one for all")
        ax.set(yscale="log", ylim=(1e-4, 1.2), xlabel="step")
        ax.set_title(f"damping of a layer by {text}", fontsize=8)
    others[0].legend(fontsize=7)
