"""Predicted against measured PSNR of random and solved schedules on prompts that the profile has not seen.

    python tools/check_predictions.py PROFILE MODEL --device cuda --random 10 --solved 10 --prompts 32 --json OUT

Schedules run in the single-device simulator (ranks return the same images). Exit code 0 when the mean absolute error of
all schedules is below 1.5 dB and no solved plan falls more than 1 dB short of its target, else 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybridiff_compiler.cli.models import load_model
from hybridiff_compiler.ir import FixedSchedule, Profile, RankSpec
from hybridiff_compiler.planner import Problem, plan, plan_for_steps
from hybridiff_compiler.planner.sampling import random_schedules
from hybridiff_compiler.profiler import Generation
from hybridiff_compiler.quality import MAX_PSNR_DB, psnr
from hybridiff_compiler.quality.measure import simulate
from hybridiff_compiler.runtime.segments import SegmentRunner

MEAN_ERROR_DB = 1.5
SHORTFALL_DB = 1.0


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("model", help="as for `hybridiff profile`")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", help="default: that of the profile")
    parser.add_argument("--gpus", type=int, nargs="+", default=[2], help="ranks to solve for, in turn")
    parser.add_argument("--random", type=int, default=10, help="random schedules")
    parser.add_argument("--solved", type=int, default=10, help="plans solved for targets spread over --targets")
    parser.add_argument("--targets", type=float, nargs=2, default=(24.0, 42.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--least", type=float, default=20.0, help="least predicted dB of a random schedule")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts")
    parser.add_argument("--prompts-file", type=Path, help="one a line; default: the bundled held-out prompts")
    parser.add_argument("--first", type=int, default=0, help="prompt k starts from the profile's seed + first + k")
    parser.add_argument("--batch", type=int, default=16, help="prompts simulated together")
    parser.add_argument("--seed", type=int, default=1000, help="of the random schedules")
    parser.add_argument("--json", type=Path, help="where to write everything")
    arguments = parser.parse_args()
    result = check(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["holds"] else 1


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """All schedules, predicted and measured."""
    begin = time.monotonic()
    profile = Profile.load(arguments.profile)
    loaded = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype or profile.model.dtype)
    prompts = list(loaded.held_out_prompts)
    if arguments.prompts_file:
        prompts = [line.strip() for line in arguments.prompts_file.read_text().splitlines() if line.strip()]
    prompts = prompts[: arguments.prompts]
    generation = Generation(
        pipe=loaded.pipe, num_inference_steps=profile.num_steps, guidance_scale=profile.guidance_scale,
        seed=profile.provenance.seed, options=loaded.options,
    )
    plans = _plans(profile, arguments)
    runners: dict[int, SegmentRunner] = {}
    everything = _with_all_tables(profile, arguments.gpus)

    def images(steps: tuple[str, ...], tables: Any) -> torch.Tensor:
        run = tables.with_steps(steps)
        return simulate(
            generation, run, prompts, first=arguments.first, batch=arguments.batch, runners=runners,
        )[0]

    reference = images((everything.exact,) * profile.num_steps, everything)
    print(f"{arguments.model} on {profile.provenance.device}; {len(prompts)} held-out prompts, "
          f"{profile.num_steps} steps, checked on {arguments.device}")
    print(f"{'schedule':<16}{'target':>8}{'predicted':>11}{'measured':>10}{'difference':>12}{'std':>7}")
    rows = []
    for name, target, predicted, steps in plans:
        values = [min(v, MAX_PSNR_DB) for v in psnr(images(steps, everything), reference)]
        measured = float(np.mean(values))
        rows.append({
            "schedule": name, "target_db": target, "predicted_db": predicted, "measured_db": measured,
            "std_db": float(np.std(values)), "steps": str(FixedSchedule(steps=steps)), "per_prompt_db": values,
        })
        print(f"{name:<16}{'' if target is None else f'{target:.1f}':>8}{predicted:>11.2f}{measured:>10.2f}"
              f"{measured - predicted:>+12.2f}{np.std(values):>7.2f}", flush=True)
    return _summary(arguments, profile, prompts, rows, time.monotonic() - begin)


def _summary(
    arguments: argparse.Namespace, profile: Profile, prompts: list[str], rows: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    def mean_error(kind: str) -> float | None:
        errors = [abs(r["measured_db"] - r["predicted_db"]) for r in rows if r["schedule"].startswith(kind)]
        return float(np.mean(errors)) if errors else None

    shortfalls = [r["target_db"] - r["measured_db"] for r in rows if r["target_db"] is not None]
    worst = max(shortfalls) if shortfalls else None
    overall = mean_error("")
    holds = (overall is None or overall < MEAN_ERROR_DB) and (worst is None or worst <= SHORTFALL_DB)
    result = {
        "kind": "prediction-check", "profile_sha256": profile.digest(), "model": profile.model.name,
        "device": arguments.device, "prompts": len(prompts), "mean_absolute_error_db": overall,
        "mean_absolute_error_random_db": mean_error("random"), "mean_absolute_error_solved_db": mean_error("solved"),
        "worst_shortfall_db": worst, "reserve_db": profile.compounding.reserve_db, "seconds": seconds, "holds": holds,
        "rows": rows,
    }
    words = {name: "-" if result[name] is None else f"{result[name]:.2f}" for name in (
        "mean_absolute_error_db", "mean_absolute_error_random_db", "mean_absolute_error_solved_db",
        "worst_shortfall_db", "reserve_db",
    )}
    print(f"mean absolute error {words['mean_absolute_error_db']} dB (random "
          f"{words['mean_absolute_error_random_db']}, solved {words['mean_absolute_error_solved_db']}; must be below "
          f"{MEAN_ERROR_DB}); worst shortfall of a solved plan {words['worst_shortfall_db']} dB (at most "
          f"{SHORTFALL_DB}); the planner kept {words['reserve_db']} dB in reserve; {seconds:.0f} s: "
          f"{'holds' if holds else 'DOES NOT HOLD'}")
    return result


def _with_all_tables(profile: Profile, gpus: list[int]) -> Any:
    """An exact plan that knows every table of `profile` (the image does not depend on ranks)."""
    problem = Problem(profile, max(gpus))
    ranks = (RankSpec(device="cpu"),) * problem.gpus
    exact = plan_for_steps(problem, (problem.exact.name,) * profile.num_steps, ranks, "")
    fields = dict(exact)
    return type(exact)(**(fields | {"partitions": profile.partitions, "patterns": problem.patterns}))


def _plans(profile: Profile, arguments: argparse.Namespace) -> list[tuple[str, float | None, float, tuple[str, ...]]]:
    """(name, target, predicted PSNR, steps) of every schedule to check."""
    problem = Problem(profile, max(arguments.gpus))
    wanted = profile.compounding.psnr_db
    plans: list[tuple[str, float | None, float, tuple[str, ...]]] = []
    drawn = random_schedules(
        problem, arguments.random, seed=arguments.seed, wanted=lambda error: wanted(error) >= arguments.least
    )
    for number, (steps, error) in enumerate(drawn):
        plans.append((f"random {number}", None, problem.psnr_db(error), steps))
    for number, target in enumerate(np.linspace(*arguments.targets, arguments.solved)):
        gpus = arguments.gpus[number % len(arguments.gpus)]
        solved = plan(profile, gpus=gpus, min_psnr=float(target))
        if solved.predictions.psnr_db is None:
            continue  # nothing but exact steps reaches so much
        assert isinstance(solved.schedule, FixedSchedule)
        plans.append((f"solved {gpus} GPUs", float(target), solved.predictions.psnr_db, solved.schedule.steps))
    return plans


if __name__ == "__main__":
    sys.exit(main())
