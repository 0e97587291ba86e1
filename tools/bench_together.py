"""Benchmark several architectures on one machine: graphs are built side by side, rows are measured one model at a time.

Building takes minutes of one CPU core per model and little of the GPUs, measuring needs them alone.

    python tools/bench_together.py OUT_FOLDER sd3 sdxl@eager:single-compiled,branch --build-limit 280
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

POLL_S = 0.2


def main() -> None:
    """Start one process per model and give them turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where NAME.json is written")
    parser.add_argument("models", nargs="+", help="NAME, NAME@BACKEND, NAME:ROW,ROW,... or NAME@BACKEND:ROW,...")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--build-limit", type=float, default=600.0, help="seconds after which no model is waited for")
    parser.add_argument("--wait-for", type=Path, help="measure only once this file exists")
    parser.add_argument("--profiles", type=Path, help="folder of NAME.json: use their partitions and predictions")
    parser.add_argument("--loop-only", action="store_true", help="pipelines without a VAE")
    parser.add_argument("--decoder", default="pipeline", help="as for `hybridiff bench`")
    parser.add_argument("--trace", type=Path, help="folder for traces of the row `branch`")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _measure(arguments)
    else:
        _take_turns(arguments)


def _take_turns(arguments: argparse.Namespace) -> None:
    begin = time.monotonic()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    common = [f"--pixels={arguments.pixels}", f"--steps={arguments.steps}", f"--device={arguments.device}", "--child"]
    common += [f"--decoder={arguments.decoder}", *(["--loop-only"] if arguments.loop_only else [])]
    common += [] if arguments.profiles is None else [f"--profiles={arguments.profiles}"]
    common += [] if arguments.trace is None else [f"--trace={arguments.trace}"]
    waiting = {
        model: subprocess.Popen([sys.executable, __file__, str(arguments.folder), model, *common])
        for model in arguments.models
    }
    while any(p.poll() is None and not _mark(arguments.folder, m, "built").exists() for m, p in waiting.items()):
        if time.monotonic() - begin > arguments.build_limit:
            break
        time.sleep(POLL_S)
    while arguments.wait_for is not None and not arguments.wait_for.exists():
        time.sleep(POLL_S)
    while waiting:
        ready = [m for m, p in waiting.items() if p.poll() is not None or _mark(arguments.folder, m, "built").exists()]
        if ready:
            _mark(arguments.folder, ready[0], "go").touch()
            waiting.pop(ready[0]).wait()
            for what in ("built", "go"):
                _mark(arguments.folder, ready[0], what).unlink(missing_ok=True)
        time.sleep(POLL_S)


def _measure(arguments: argparse.Namespace) -> None:
    import torch

    from hybridiff_compiler.ir import Profile
    from hybridiff_compiler.quality.architectures import random_model
    from hybridiff_compiler.quality.bench import ROWS, Bench, bench_results
    from hybridiff_compiler.quality.overheads import watched_pipeline
    from hybridiff_compiler.runtime.intercept import find_denoiser

    (model,) = arguments.models
    label, _, chosen = model.partition(":")
    name, _, backend = label.partition("@")
    begin, stages = time.monotonic(), set()

    def say(text: str) -> None:
        sys.stdout.write(f"[{label} {time.monotonic() - begin:6.1f} s] {text}\n")
        sys.stdout.flush()

    def on_progress(stage: str, done: int, total: int) -> None:
        if (stage, done) not in stages:
            stages.add((stage, done))
            say(f"{stage} {done}/{total}")

    torch.manual_seed(0)
    built = random_model(
        name, device=arguments.device, dtype=torch.float16 if arguments.device == "cuda" else torch.float32,
        vae=not arguments.loop_only,
    )
    profile = None if arguments.profiles is None else Profile.load(arguments.profiles / f"{name}.json")
    if profile is not None and not profile.costs.step_overhead_s:  # made without a pipeline
        watched = watched_pipeline(name, find_denoiser(built.pipe)[1], pixels=arguments.pixels)
        assert watched is not None
        profile = profile.model_copy(update={"costs": watched.added_to(profile.costs)})
        say(f"a pipeline adds {1e6 * profile.costs.step_overhead_s:.0f} us to a step")
        profile.save(arguments.folder / f"{name}-profile.json")
    bench = Bench(
        built.pipe, built.options(arguments.pixels, 0), name=name, pixels=arguments.pixels, steps=arguments.steps,
        rows=chosen.split(",") if chosen else ROWS, backend=backend or None, decode=arguments.decoder,
        profile=profile, traces=arguments.trace,
    )
    rows = []
    with bench.open(on_progress) as measure:
        say("built")
        _mark(arguments.folder, model, "built").touch()
        while not _mark(arguments.folder, model, "go").exists():
            time.sleep(POLL_S)
        for row in measure():
            rows.append(row)
            say(row.model_dump_json())
            results = bench_results({name: tuple(rows)}, device=arguments.device, gpus=2, seed=0, random_weights=True)
            results.save(arguments.folder / (label.replace("@", "-") + ".json"))


def _mark(folder: Path, model: str, what: str) -> Path:
    return folder / f".{model.partition(':')[0]}.{what}"


if __name__ == "__main__":
    main()
