"""Profiles of costs of five architectures with random weights, side by side on the GPUs of one host.

Capturing and compiling take minutes and use the CPU, timing takes seconds and wants the GPU alone. So every
architecture has a process of its own with several that build graphs for it, and whoever times stops all others on its
GPU meanwhile. What is not built when the time is nearly over is left out, and the profile says so.

    python tools/gpu_profiles.py OUT [NAME ...] [--device cuda] [--limit SECONDS] [--helpers N]

writes OUT/NAME.json (with the links between the host's GPUs, if it has several) and OUT/profiles.log. Profiles that are
there already are kept. Exit code 1 when one is missing in the end.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("sdxl", "sd3", "flux", "wan", "pixart")
_LARGEST_BYTES = 16 << 20
_QUIET_S = 0.3
_LAST_TURNS_S = 14.0
"""Kept per architecture, of the limit, for the last times: all take them at the end, one after the other."""
_LINKS_S = 35.0


class Turns:
    """Turns at one GPU; each process that takes part leads a process group."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / str(os.getpid())).touch()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for the turn, and stop the other process groups until it ends."""
        with open(self._folder / "turn", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._signal(signal.SIGSTOP)
            try:
                time.sleep(_QUIET_S)  # what they have queued on the GPU runs out
                yield
            finally:
                self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        for entry in self._folder.iterdir():
            if entry.name.isdigit() and entry.name != str(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(entry.name), number)


def child(arguments: argparse.Namespace) -> None:
    """Profile one architecture; takes turns with the others."""
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    from hybridiff_compiler.api import profile_costs
    from hybridiff_compiler.quality.denoisers import random_denoiser
    from hybridiff_compiler.quality.overheads import watched_pipeline

    name, turns = arguments.names[0], Turns(arguments.child)
    last = ""

    def on_progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        if stage != last or done == total:
            say(f"{stage} {done}/{total}")
        last = stage

    say("building")
    built = random_denoiser(name, device=arguments.device)
    with turns.alone():
        watched = watched_pipeline(name, built.denoiser)
    say("built" if watched is None else f"built; a pipeline adds {1e6 * watched.step_overhead(1.0):.0f} us to a step")
    profile = profile_costs(
        built.denoiser, call=built.call, watched=watched, name=name, random_weights=True,
        num_inference_steps=built.spec.steps,
        guidance_scale=built.spec.guidance_scale, layer_method=arguments.method, backend=arguments.backend,
        jobs=arguments.helpers, alone=turns.alone, on_progress=on_progress, on_note=say, quick=arguments.quick,
        max_seconds=max(1.0, arguments.limit - (time.monotonic() - began)),
        threads=1 if arguments.device == "cpu" else None,
    )
    profile.save(arguments.out / f"{name}.json")
    timing = profile.costs.timing
    assert timing is not None
    whole = ", ".join(f"batch {batch} {1e3 * seconds:.2f} ms" for batch, seconds in timing.whole_s.items())
    say(f"done: whole {whole}; layers {timing.method}, sum/whole "
        + ", ".join(f"{ratio:.3f}" for ratio in timing.raw_sum.values())
        + f", stages off by {timing.stage_residual or 0.0:.1%}, fitted {timing.fitted_residual or 0.0:.1%}, rounds "
        f"{timing.rounds}, settled {timing.settled}"
        + (f", MISSING {', '.join(timing.missing)}" if timing.missing else ""))


def run_all(arguments: argparse.Namespace) -> int:
    """Start a process per architecture, wait for all, add links, check what was written."""
    import torch

    arguments.out.mkdir(parents=True, exist_ok=True)
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 1
    names = [name for name in arguments.names if not (arguments.out / f"{name}.json").is_file()]
    began = time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    cores = os.cpu_count() or 2
    helpers = arguments.helpers
    if helpers is None:  # a few more processes than cores: some wait for the GPU
        helpers = max(1, min(8, -(-(cores + 4) // max(1, len(names)))))
    limit = arguments.limit - _LAST_TURNS_S * len(names) / gpus - (_LINKS_S if max(gpus, arguments.ranks) > 1 else 0.0)
    threads = str(max(1, min(3, cores // 2)))
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for index, name in enumerate(names):
            gpu = index % gpus
            folder = root / f"gpu{gpu}"
            folder.mkdir(exist_ok=True)
            command = [
                sys.executable, __file__, str(arguments.out), name, f"--child={folder}", f"--device={arguments.device}",
                f"--helpers={helpers}", f"--limit={limit}", f"--method={arguments.method}",
            ]
            command += [f"--backend={arguments.backend}"] if arguments.backend else []
            command += ["--quick"] if arguments.quick else []
            visible = {"CUDA_VISIBLE_DEVICES": str(gpu)} if gpus > 1 else {}
            with open(root / f"{name}.log", "wb") as log:
                running[name] = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                    env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": "2"} | visible,
                    preexec_fn=functools.partial(os.nice, 2 * index),  # the first ones are the most wanted
                )
        try:
            _wait(running, began + arguments.limit - (_LINKS_S if max(gpus, arguments.ranks) > 1 else 0.0))
        finally:
            for process in running.values():
                _end(process)
        links = _links(arguments, names, gpus)
        report = _report(arguments, root, names, links)
    report.append(f"{time.monotonic() - began:.1f} s in all")
    (arguments.out / "profiles.log").write_text("\n".join(report) + "\n")
    print("\n".join(report)[-11000:])
    return int(any(not (arguments.out / f"{name}.json").is_file() for name in arguments.names))


def _wait(running: dict[str, subprocess.Popen[bytes]], deadline: float) -> None:
    while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in running.values()):
            _wake(running)  # who ended while others were stopped cannot wake them
        time.sleep(0.5)


def _wake(running: dict[str, subprocess.Popen[bytes]]) -> None:
    """Let stopped processes go on when the one whose turn it was has died."""
    for process in running.values():
        failed = process.poll() not in (None, 0)
        if failed and not getattr(process, "woken", False):
            process.woken = True  # type: ignore[attr-defined]
            for other in running.values():
                if other.poll() is None:
                    os.killpg(other.pid, signal.SIGCONT)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _links(arguments: argparse.Namespace, names: list[str], gpus: int) -> list[str]:
    """Measure the links between all GPUs once and note them in every new profile."""
    from hybridiff_compiler.ir import HybridiffError, Profile
    from hybridiff_compiler.profiler.links import with_links

    devices = [f"cuda:{index}" for index in range(gpus)] if arguments.device == "cuda" else ["cpu"] * arguments.ranks
    written = [arguments.out / f"{name}.json" for name in names if (arguments.out / f"{name}.json").is_file()]
    if len(devices) < 2 or not written:
        return []
    try:
        costs = with_links(Profile.load(written[0]).costs, devices)
    except HybridiffError as error:
        return [f"links: {error}"]
    lines = []
    for file in written:
        profile = Profile.load(file)
        update = {"links": costs.links, "broadcasts": costs.broadcasts, "transport": costs.transport}
        profile.model_copy(update={"costs": profile.costs.model_copy(update=update)}).save(file)
    for link in costs.links:
        lines.append(f"link {link.source}->{link.target}: {1e6 * link.latency_s:.1f} us + {link.bytes_per_s / 1e9:.1f} "
                     f"GB/s, spread {link.spread:.1%}, residual {link.residual:.1%}; "
                     + " ".join(f"{size}:{1e6 * seconds:.1f}" for size, seconds in link.points))
    for broadcast in costs.broadcasts:
        lines.append(f"broadcast from {broadcast.root}: {1e6 * broadcast.latency_s:.1f} us + "
                     f"{broadcast.bytes_per_s / 1e9:.1f} GB/s, spread {broadcast.spread:.1%}")
    return lines


def _report(arguments: argparse.Namespace, root: Path, names: list[str], links: list[str]) -> list[str]:
    from hybridiff_compiler.ir import HybridiffError, Profile

    lines = []
    for name in names:
        lines.append(f"== {name}")
        words = (root / f"{name}.log").read_text(errors="replace").splitlines()
        (arguments.out / f"{name}.log").write_text("\n".join(words) + "\n")
        lines += words[-40:]
    for name in arguments.names:
        file = arguments.out / f"{name}.json"
        try:
            profile = Profile.load(file)
        except HybridiffError as error:
            lines.append(f"{name}: MISSING ({error})")
            continue
        size = file.stat().st_size
        lines.append(f"{name}: {size / 2**20:.2f} MiB, {len(profile.graph.layers)} layers, "
                     f"{len(profile.costs.stages)} stage graphs, {len(profile.costs.links)} links"
                     + (" TOO LARGE" if size > _LARGEST_BYTES else ""))
    return [*lines, *links]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", help="eager or inductor [default: inductor on cuda]")
    parser.add_argument("--method", default="compiled", choices=("compiled", "eager"))
    parser.add_argument("--helpers", type=int, help="processes that build graphs, per name [default: by the cores]")
    parser.add_argument("--limit", type=float, default=460.0, help="seconds until what is not done is given up")
    parser.add_argument("--ranks", type=int, default=1, help="processes between which links are measured, on cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments)
        return 0
    return run_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
