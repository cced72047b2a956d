"""What the library costs: ratios measured side by side, in one run.

    python -m benchmarks.costs SECTION... [--quick] [--fresh]

Sections: steps, refreshes, by-hand (the damping); kfac; products, lanczos, density (of
Hessians). Set OPENBLAS_NUM_THREADS=1 for kfac: OpenBLAS threads that wait for a busy
core make an eigendecomposition a hundred times slower.

Rows go to benchmarks/results/costs.json as they are measured, under the device's name,
and a row that is there is not measured again unless --fresh; costs.md has them as
tables. --quick is a rehearsal that writes nothing. Matrix products are at precision
"highest", the gradient's too; on a CPU that is what float32 is anyway.
"""

import argparse
import json
import os
import pathlib

import jax

from benchmarks.shared.report import cost_table

from . import hessian, overhead
from .timing import Effort, on_cpu

RESULTS = pathlib.Path(__file__).parents[1] / "results"
SECTIONS = {**overhead.SECTIONS, **hessian.SECTIONS}
QUICK = Effort(least=0.005, budget=0.5, rounds=2, pairs=3)


def main():
    """Measure what is missing, and print the tables."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("sections", nargs="+", choices=SECTIONS, metavar="SECTION")
    parser.add_argument("--quick", action="store_true", help="a rehearsal")
    parser.add_argument("--fresh", action="store_true", help="measure rows again")
    args = parser.parse_args()
    jax.config.update("jax_default_matmul_precision", "highest")
    effort = QUICK if args.quick else Effort()
    path, cores = RESULTS / "costs.json", len(os.sched_getaffinity(0))
    found = json.loads(path.read_text()) if path.exists() and not args.quick else {}
    device = f"{cores} CPU cores" if on_cpu() else jax.devices()[0].device_kind
    for section in args.sections:
        cases, measure, _ = SECTIONS[section]
        done = found.setdefault(device, {}).setdefault(section, {})
        for case in cases:
            name = ", ".join(map(str, case))
            if name not in done or args.fresh:
                done[name] = {"jax": jax.__version__, **measure(effort, *case)}
                if not args.quick:
                    path.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(
        f"**{section}, {device}**\n\n{cost_table(of, SECTIONS[section][2])}\n"
        for device, sections in found.items()
        for section, of in sections.items()
    )
    if not args.quick:
        (RESULTS / "costs.md").write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    main()
