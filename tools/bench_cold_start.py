"""Seconds from starting a process to its first image: from a plan (torch.compile, nothing cached), from the plan again
(with the compiler's cache), and from a bundle.

    python tools/bench_cold_start.py sdxl --random-weights --device cuda --pixels 1024 -o cold.json
    python tools/bench_cold_start.py bundled:unet bundled:mmdit --device cpu --one-at-a-time -o cold.json

Every start is a process of its own, with empty caches of the compilers but for the one that starts again. The bundle is
built while the process that starts from the plan compiles, at a lower priority (with `--one-at-a-time` before it);
latencies per image are always timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLL_S = 0.05
_BEFORE = ("import torch", "import diffusers", "weights")
"""Phases that are the same for a plan and a bundle, before `parallelize` is called."""


def main() -> None:
    """Measure every model, or do the part of one process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="as for `hybridiff bench`")
    parser.add_argument("--random-weights", action="store_true", help="names are architectures: sdxl, sd3")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--gpus", type=int, default=1, choices=(1, 2), help="ranks")
    parser.add_argument("--pixels", type=int, help="width and height [default: 1024, or the bundled model's own]")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3, help="timed generations after the first one")
    parser.add_argument("--threads", type=int, help="CPU threads of one rank")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for one model; what is known is reported")
    parser.add_argument("--one-at-a-time", action="store_true", help="for machines of few cores")
    parser.add_argument("--folder", type=Path, help="keeps plans, bundles and images; must not exist")
    parser.add_argument("-o", "--output", type=Path, help="the results (JSON)")
    for name in ("role", "at", "go"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role is not None:
        _child(arguments)
        return
    results: dict[str, Any] = {"schema": 1, "arguments": " ".join(sys.argv[1:]), "models": {}}
    with tempfile.TemporaryDirectory(prefix="hybridiff-cold-") as temporary:
        root = arguments.folder or Path(temporary)
        for model in arguments.models:
            work = root / model.replace(":", "-").replace("/", "-")
            work.mkdir(parents=True)
            results["models"][model] = _measure(arguments, model, work)
            text = json.dumps(results, indent=1) + "\n"
            if arguments.output is not None:
                arguments.output.write_text(text)
    sys.stdout.write(text)
    sys.exit(1 if any(found["failure"] for found in results["models"].values()) else 0)


def _measure(arguments: argparse.Namespace, model: str, work: Path) -> dict[str, Any]:
    """One model: build, start from the plan, start from the bundle, compare; what is known when something fails."""
    started: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + arguments.limit
    failure = None

    def start(role: str) -> subprocess.Popen[bytes]:
        started.append(_start(arguments, model, work, role))
        return started[-1]

    try:
        build = start("build")
        _wait(build, work / "plan.json", deadline)
        if arguments.one_at_a_time:
            _wait(build, work / "built.json", deadline)
        plan = start("plan")
        _wait(plan, work / "plan-started.json", deadline)
        _wait(build, work / "built.json", deadline)
        build.wait()
        (work / "plan-go").touch()
        _wait(plan, work / "plan.result.json", deadline)
        plan.wait()
        for role in ("bundle", "again"):
            (work / f"{role}-go").touch()
            process = start(role)
            _wait(process, work / f"{role}.result.json", deadline)
            process.wait()
    except _Unfinished as error:
        failure = str(error)
    finally:
        for process in started:
            if failure is not None:
                process.kill()
            process.wait()
    found: dict[str, Any] = {"failure": failure, "side_by_side": not arguments.one_at_a_time}
    for name in ("built", "plan-started", "plan.result", "again.result", "bundle-started", "bundle.result"):
        file = work / f"{name}.json"
        if file.exists():
            found[name.removesuffix("-started").removesuffix(".result")] = json.loads(file.read_text())
    if "again" in found:
        found["again_ratio"] = found["plan"]["first_image_s"] / found["again"]["first_image_s"]
    if {"plan", "bundle"} <= found.keys() and (work / "bundle.result.json").exists():
        one, other = found["plan"], found["bundle"]
        found["start_ratio"] = one["first_image_s"] / other["first_image_s"]
        found["own_start_ratio"] = _own_start_s(one) / _own_start_s(other)
        found["latency_ratio"] = other["latency_s"] / one["latency_s"]
        found |= _difference(work)
    return found


def _own_start_s(found: dict[str, Any]) -> float:
    """Seconds from the call of `parallelize` to the first image: what a plan or bundle has an influence on."""
    return sum(seconds for name, seconds in found["phases"].items() if name not in _BEFORE)


def _difference(work: Path) -> dict[str, float]:
    import torch

    one, other = (torch.load(work / f"{role}.pt", weights_only=True).float() for role in ("plan", "bundle"))
    return {"largest_difference": float((one - other).abs().max()), "largest_value": float(one.abs().max())}


def _start(arguments: argparse.Namespace, model: str, work: Path, role: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-X", "faulthandler", os.path.abspath(__file__), model]
    command += [f"--device={arguments.device}", f"--role={role}"]
    command += [f"--gpus={arguments.gpus}", f"--steps={arguments.steps}", f"--repeats={arguments.repeats}"]
    command += [f"--folder={work}", f"--at={time.time()}", f"--go={work / f'{role}-go'}"]
    command += [f"--threads={arguments.threads}"] if arguments.threads else []
    command += ["--random-weights"] if arguments.random_weights else []
    command += [f"--pixels={arguments.pixels}"] if arguments.pixels else []
    if role == "build" and not arguments.one_at_a_time:
        command = ["nice", "-n", "5", *command]
    cache = "plan" if role == "again" else role
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / f"cache-{cache}"), "USE_FLAX": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_CACHE_DIR"}
    root = Path(__file__).resolve().parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.Popen(command, env=environment | caches, stdout=sys.stderr)


class _Unfinished(Exception):
    """A process ended without doing its part, or time is over."""


def _wait(process: subprocess.Popen[bytes], file: Path, deadline: float) -> None:
    while not file.exists():
        if process.poll() is not None and not file.exists():
            raise _Unfinished(f"{file.name} was not written; the process ended with code {process.returncode}")
        if time.monotonic() > deadline:
            raise _Unfinished(f"{file.name} was not written in time")
        time.sleep(POLL_S)


class _Clock:
    """Seconds by phase since the parent started this process."""

    def __init__(self, begin: float) -> None:
        self._begin = self._last = begin
        self.phases: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """The phase `name` ends now."""
        now = time.time()
        self.phases[name] = round(self.phases.get(name, 0.0) + now - self._last, 3)
        self._last = now
        sys.stderr.write(f"  {name} {self.phases[name]:.1f} s\n")

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return round(self._last - self._begin, 3)


def _child(arguments: argparse.Namespace) -> None:
    clock = _Clock(float(arguments.at))
    from hybridiff_compiler.cli.entry import collect_rarely

    collect_rarely()
    import torch  # noqa: F401 - timed

    from hybridiff_compiler.runtime import parallelize  # noqa: F401

    clock.lap("import torch")
    import diffusers.hooks  # noqa: F401

    clock.lap("import diffusers")
    pipe, options = _model(arguments)
    clock.lap("weights")
    if arguments.role == "build":
        _build(arguments, pipe, options, clock)
    else:
        _run(arguments, pipe, options, clock)


def _model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The pipeline, and a function that gives the keyword arguments of one call."""
    import torch

    if arguments.random_weights:
        from hybridiff_compiler.quality.architectures import random_model

        torch.manual_seed(0)
        dtype = torch.float16 if arguments.device == "cuda" else torch.float32
        built = random_model(arguments.models[0], device=arguments.device, dtype=dtype)
        return built.pipe, lambda: built.options(arguments.pixels or 1024, 0)
    from hybridiff_compiler.cli.calls import call_options
    from hybridiff_compiler.cli.models import load_model

    loaded = load_model(arguments.models[0], device=arguments.device)
    options = call_options(loaded, arguments.pixels, arguments.pixels)
    options |= {"output_type": "pt", "guidance_scale": loaded.guidance_scale}
    prompt = loaded.held_out_prompts[0] if loaded.held_out_prompts else "a photograph"
    return loaded.pipe, lambda: options | {"prompt": prompt, "generator": torch.Generator().manual_seed(0)}


def _generate(arguments: argparse.Namespace, pipe: Any, options: Any) -> Any:
    import torch

    image = pipe(num_inference_steps=arguments.steps, **options()).images
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    return image


def _build(arguments: argparse.Namespace, pipe: Any, options: Any, clock: _Clock) -> None:
    from hybridiff_compiler.bundle import write_bundle
    from hybridiff_compiler.runtime.intercept import find_denoiser

    work = arguments.folder
    plan = _plan(arguments, pipe, options)
    plan.save(work / "plan.json")
    clock.lap("plan")
    bundle = write_bundle(plan, find_denoiser(pipe)[1], work / "bundle", backend="aotinductor")
    clock.lap("bundle")
    _save(work / "built.json", {
        "phases": clock.phases, "total_s": clock.total, "artifacts": len(bundle.manifest.artifacts),
        "mib": round(sum(record.size for record in bundle.manifest.files) / 2**20, 1),
    })


def _plan(arguments: argparse.Namespace, pipe: Any, options: Any) -> Any:
    """The exact plan: both branches batched on one rank, or one on each of two."""
    from hybridiff_compiler.ir import WHOLE, FixedSchedule, ModelInfo, Pattern, Plan, RankSpec
    from hybridiff_compiler.runtime.branch_calls import capture_branch
    from hybridiff_compiler.runtime.intercept import find_denoiser, intercept

    class Recorder:
        signature: Any = None

        def start(self, num_steps: int, signature: Any) -> bool:
            self.signature = signature
            return False

        def step(self, call: Any) -> Any:
            raise AssertionError(call)

    recorder, denoiser = Recorder(), find_denoiser(pipe)[1]
    with intercept(pipe, recorder):
        pipe(num_inference_steps=1, **(options() | {"output_type": "latent"}))
    parameter = next(denoiser.parameters())
    table = "u0@0 c0@0 | cfg" if arguments.gpus == 1 else "u0@0 c0@1 | cfg"
    return Plan(
        model=ModelInfo(
            name=arguments.models[0], denoiser=type(denoiser).__name__, dtype=str(parameter.dtype).split(".")[-1],
            fingerprint=capture_branch(denoiser, recorder.signature).layers.fingerprint(),
            parameter_bytes=sum(p.nbytes for p in denoiser.parameters()), signature=recorder.signature,
        ),
        ranks=(RankSpec(device=arguments.device),) * arguments.gpus,
        patterns=(Pattern.parse("exact", table, partition=WHOLE, stages=1),), exact="exact",
        schedule=FixedSchedule(steps=("exact",) * arguments.steps),
    )


def _run(arguments: argparse.Namespace, pipe: Any, options: Any, clock: _Clock) -> None:
    import torch

    from hybridiff_compiler import parallelize
    from hybridiff_compiler.ir.versions import installed_versions

    work, role = arguments.folder, arguments.role
    source, backend = (work / "bundle", None) if role == "bundle" else (work / "plan.json", "inductor")
    building = False

    def on_progress(what: str, done: int, total: int) -> None:
        nonlocal building
        if not building:
            building = True
            clock.lap("workers and checks" if role == "bundle" else "workers and capture")

    with parallelize(
        pipe, source, backend=backend, timeout_s=600.0, threads=arguments.threads, on_progress=on_progress
    ):
        clock.lap("stage graphs")
        image = _generate(arguments, pipe, options)
        clock.lap("first generation")
        first_image_s = clock.total
        _save(work / f"{role}-started.json", {"first_image_s": first_image_s, "phases": clock.phases})
        torch.save(image.cpu(), work / f"{role}.pt")
        while not Path(arguments.go).exists():
            time.sleep(POLL_S)
        times, processor = [], []
        for _ in range(arguments.repeats):
            begin, cpu = time.perf_counter(), time.process_time()
            _generate(arguments, pipe, options)
            times.append(time.perf_counter() - begin)
            processor.append(time.process_time() - cpu)
        on_gpu = arguments.device == "cuda"
        _save(work / f"{role}.result.json", {
            "first_image_s": first_image_s, "phases": clock.phases, "latency_s": round(statistics.median(times), 4),
            "latencies_s": [round(seconds, 4) for seconds in times],
            "processor_s": round(statistics.median(processor), 4),  # what other work on the machine changes less
            "device": torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} processors",
            "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else None,
            "versions": installed_versions("torch", "diffusers"),
        })


def _save(file: Path, values: dict[str, Any]) -> None:
    """Write JSON that whoever waits for the file finds complete."""
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(values))
    temporary.rename(file)


if __name__ == "__main__":
    main()
