"""results/hessian.json -> Markdown tables and a picture."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {"mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "transformer": "transformer"}
DTYPES = ("float32", "bfloat16")


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in rows]


def interval(found):
    return f"{found['ratio']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def label(row):
    return f"{NAMES[row['model']]}, {row['batch']}"


def products(rows):
    head = ["model, batch", "dtype", "gradient", "product", "per second"]
    head += ["times gradient", "FLOPs", "time over FLOPs", "FLOP/s of peak"]
    head += ["temporary memory", "residuals"]
    for row in rows:
        for name, what in (("matvec", "linearised"), ("hvp", "`hvp`")):
            found = row[name]
            held = row["residual_bytes"] / row["gradient"]["temp_bytes"]
            yield [
                label(row),
                row["dtype"],
                f"{1e3 * row['gradient']['seconds']:.1f} ms",
                what,
                f"{1 / found['seconds']:.3g}",
                interval(found),
                f"{found['flops_ratio']:.2f}",
                f"{found['over_flops']:.2f}",
                f"{found['of_peak']:.0%}",
                f"{found['temp_ratio']:.2f}",
                f"{held:.2f}" if name == "matvec" else "",
            ]
    return head


def lanczos(rows):
    for row in rows:
        yield [
            label(row),
            f"{1e3 * row['gradient_seconds']:.1f} ms",
            f"{row['flops_ratio']:.2f}",
            interval(row["product"]),
            interval(row["step"]),
            interval(row["step_over_flops"]),
            interval(row["amortised_over_flops"]),
        ]
    head = ["model, batch", "gradient", "FLOPs", "product", "step"]
    return [*head, "step over FLOPs", "the same, linearising shared by 80"]


def density(rows):
    for row in rows:
        for name, found in row["contenders"].items():
            own = row.get("products", {}).get(name)
            top = found["largest_node"]
            yield [
                f"{label(row)}, {row['probes']} x {row['steps']}",
                name,
                f"{found['seconds']:.2f} s",
                interval(found),
                interval(own) if own else "",
                f"{top:.4g}" if top else "",
            ]
    head = ["model, batch, density", "by", "time", "times ours"]
    return [*head, "product, times own gradient", "largest node"]


def large(rows):
    for row in rows:
        yield [
            f"{row['parameters']:,}",
            str(row["steps"]),
            f"{row['seconds']:.1f} s",
            f"{row['vectors_of_a_product']:.1f}",
            f"{row['vectors_of_the_density']:.1f}",
            f"{row['largest_node_error']:.1e}",
            ", ".join(f"{x:.5f}" for x in row["moments"]),
        ]
    head = ["P", "steps", "time", "vectors, one product", "vectors, density"]
    return [*head, "largest error of a node", "moments (1/2, 1/3, 1/4)"]


SECTIONS = {
    "products": ("Products", products),
    "lanczos": ("A Lanczos step, in gradients", lanczos),
    "density": ("Spectral density", density),
    "large": ("A hundred million parameters", large),
}


def collected(generator):
    """The rows that a generator yields, and the head that it returns."""
    rows = []
    while True:
        try:
            rows.append(next(generator))
        except StopIteration as end:
            return end.value, rows


def tables(everything):
    """Markdown, a table per device and section."""
    lines = []
    for device, sections in everything.items():
        for section, (title, make) in SECTIONS.items():
            if sections.get(section):
                found = collected(make(sections[section].values()))
                lines += [f"**{title}, {device}**", "", *table(*found), ""]
    return "\n".join(lines)


def plot(everything, path):
    """A row of panels per device: products in either dtype, then the densities."""
    everything = {
        device: sections
        for device, sections in everything.items()
        if sections.get("products") and sections.get("density")
    }
    if not everything:
        return
    figure, panels = plt.subplots(
        len(everything),
        3,
        figsize=(14, 4.5 * len(everything)),
        squeeze=False,
        layout="constrained",
    )
    for line, (device, sections) in zip(panels, everything.items(), strict=True):
        rows = list(sections.get("products", {}).values())
        for axes, dtype in zip(line, DTYPES, strict=False):
            for i, kind in enumerate(NAMES):
                own = [r for r in rows if (r["model"], r["dtype"]) == (kind, dtype)]
                for name, style in (("matvec", "o-"), ("hvp", "s:")):
                    axes.plot(
                        [r["batch"] for r in own],
                        [r[name]["ratio"] for r in own],
                        style,
                        color=f"C{i}",
                        label=NAMES[kind] if name == "matvec" else None,
                    )
            axes.set(xscale="log", xlabel="batch size", title=f"{device}, {dtype}")
            axes.set(ylabel="product / own gradient, time", ylim=(0, None))
            axes.grid(alpha=0.3)
        line[0].legend(title="solid linearised, dotted hvp", fontsize="small")
        bars = {
            f"{name} ({NAMES[row['model']]})": found["ratio"]
            for row in sections.get("density", {}).values()
            for name, found in row["contenders"].items()
        }
        ours = ["C0" if name.startswith("rmtdamp") else "C7" for name in bars]
        drawn = line[2].barh(list(bars), list(bars.values()), color=ours)
        line[2].bar_label(drawn, fmt="%.2g", fontsize="small", padding=2)
        line[2].invert_yaxis()
        line[2].tick_params("y", labelsize="small")
        line[2].xaxis.set_minor_formatter("")
        line[2].set(xscale="log", xlabel="time / ours", title="spectral density")
        line[2].margins(x=0.15)
    figure.savefig(path, dpi=130)
    plt.close(figure)
