"""How much is lost by measuring errors at part of the steps and ages: thin a full measurement and fill it in again.

    hybridiff profile MODEL --full -o full.json
    python tools/check_grid.py full.json

Prints, per grid, the distance between filled-in and measured errors in dB: of single values at ages that can occur, and
of sums over all steps at one age, which is nearer to what a schedule's prediction needs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from hybridiff_compiler.ir import Profile
from hybridiff_compiler.profiler.curves import fill_table
from hybridiff_compiler.profiler.grid import FULL, QUICK, THINNED, Grid

GRIDS = {"full": FULL, "thinned (default)": THINNED, "quick": QUICK}


def main() -> None:
    """Print a table or JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    profile = Profile.load(arguments.profile)
    if profile.sampling is not None and profile.sampling.measured_steps < profile.num_steps - 1:
        parser.error(f"{arguments.profile} was measured at {profile.sampling.measured_steps} of {profile.num_steps} "
                     "steps; give one made with --full")
    rows = {name: losses(profile, grid) for name, grid in GRIDS.items()}
    if arguments.json:
        print(json.dumps({"kind": "grid-check", "profile_sha256": profile.digest(), "grids": rows}, indent=1))
        return
    headings = f"{'mean dB':>9}{'95 % dB':>9}{'worst dB':>10}{'sums, rms dB':>14}{'sums, worst':>13}"
    print(f"{'grid':<20}{'pairs':>7}{headings}")
    for name, row in rows.items():
        print(f"{name:<20}{row['pairs']:>7.0f}{row['mean_db']:>9.2f}{row['p95_db']:>9.2f}{row['worst_db']:>10.2f}"
              f"{row['sum_rms_db']:>14.2f}{row['sum_worst_db']:>13.2f}")


def losses(profile: Profile, grid: Grid) -> dict[str, float]:
    """Distances over all curves of a profile."""
    steps, single, sums = profile.num_steps, [], []
    pairs = [(step, age) for step in range(steps) for age in grid.ages_at(step, steps)]
    for errors in profile.errors:
        for curve in errors.curves:
            if curve.gap is not None:
                continue  # measured at no extra cost, so on every grid
            truth = np.asarray(curve.rmse)
            ages = truth.shape[1]
            known = {(step, age): float(truth[step, age - 1]) for step, age in pairs if age <= ages}
            decibels = 20 * np.log10(fill_table(known, steps, ages) / truth)
            possible = np.arange(steps)[:, None] >= np.arange(1, ages + 1)[None, :]
            single += np.abs(decibels[possible]).tolist()
            filled = truth * 10 ** (decibels / 20)
            sums += [
                20 * float(np.log10(filled[age:, age - 1].sum() / truth[age:, age - 1].sum()))
                for age in range(1, ages + 1)
            ]
    return {
        "pairs": float(len(pairs)), "mean_db": float(np.mean(single)), "p95_db": float(np.quantile(single, 0.95)),
        "worst_db": float(np.max(single)), "sum_rms_db": float(np.sqrt(np.mean(np.square(sums)))),
        "sum_worst_db": float(np.max(np.abs(sums))),
    }


if __name__ == "__main__":
    main()
