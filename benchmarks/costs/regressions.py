"""Two runs of the costs, side by side: what has become worse.

A timed ratio is worse where it is a tenth larger and the intervals of both runs do not
meet; a count or an amount of memory where it is a tenth larger; an error of rounding,
which any other order of sums draws anew, where it is twice as large; what is said in
words, such as the collectives of a program, where it is not the same.
"""

from typing import Any

MARGIN, ERROR_MARGIN = 1.1, 2.0
# Of the machine, or a part of the timed ratio.
IGNORED = ("jax", "pairs", "ratio", "low", "high", "of_peak", "over_flops")
# What ours is measured beside.
IGNORED += ("over reverse", "matfree, jvp(grad)", "matfree, our matvec")


def worse(before: dict[str, Any], now: dict[str, Any]) -> list[dict[str, Any]]:
    """What is worse, of all that both runs have.

    Args:
        before: sections, rows, figures and what they are made of, nested.
        now: the same of another run.

    Returns:
        Rows of a table.
    """
    return list(_changes(before, now, ()))


def unmatched(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Rows that only one of the two runs has, so that nothing is said of them.

    Args:
        before: sections and their rows.
        now: the same of another run, its sections those that were asked for.

    Returns:
        "section: row: why" of each.
    """
    found = []
    for section, rows in now.items():
        old = before.get(section, {})
        found += [
            f"{section}: {row}: not measured now" for row in old if row not in rows
        ]
        found += [f"{section}: {row}: not kept" for row in rows if row not in old]
    return found


def _changes(before, now, path):
    if "ratio" in before and "ratio" in now:
        apart = now["low"] > before["high"]
        if apart and now["ratio"] > MARGIN * before["ratio"]:
            yield _row((*path, "ratio"), before["ratio"], now["ratio"])
    for key in sorted(before.keys() & now.keys() - set(IGNORED)):
        old, new, place = before[key], now[key], (*path, key)
        if isinstance(old, dict):
            yield from _changes(old, new, place)
        elif isinstance(old, str):
            if old != new:
                yield _row(place, old, new)
        elif "seconds" not in key:
            margin = ERROR_MARGIN if path[0] == "precision" else MARGIN
            if new > margin * old:
                yield _row(place, old, new)


def _row(path, old, new) -> dict[str, Any]:
    short = lambda x: x if isinstance(x, str) else f"{x:.3g}"
    return {"figure": ": ".join(path), "before": short(old), "now": short(new)}
