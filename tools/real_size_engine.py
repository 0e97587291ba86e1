"""Build the engine of one stage of a real architecture, here, without a GPU: seconds and memory of both parts.

    python tools/real_size_engine.py sdxl --stage inner --target sm_89 -o sdxl.json

The stage of the nested split is exported as ONNX with random weights (float16, 1024 pixels unless said otherwise), then
TensorRT for RTX builds its engine; each in a process of its own, whose largest resident memory is reported. The builder
is ended when it takes more than `--limit-gib`, or when the machine runs out of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

POLL_S = 0.2
RESERVE_GIB = 1.0
"""Memory that is left to the rest of the machine."""


def main() -> None:
    """Run both parts as children, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("sdxl", "sd3"))
    parser.add_argument("--stage", choices=("inner", "outer"), default="inner")
    parser.add_argument("--partition", default="nested")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--target", default="sm_89")
    parser.add_argument("--limit-gib", type=float, default=18.0)
    parser.add_argument("--folder", type=Path, help="keeps the files; must not exist")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--part", choices=("export", "build"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        (_export if arguments.part == "export" else _build)(arguments)
        return
    with tempfile.TemporaryDirectory(prefix="hybridiff-engine-") as temporary:
        folder = arguments.folder or Path(temporary) / "stage"
        folder.mkdir(parents=True)
        report: dict[str, Any] = {"schema": 1, "arguments": " ".join(sys.argv[1:]), "parts": {}}
        for part in ("export", "build"):
            report["parts"][part] = found = _measure(part, folder, arguments.limit_gib)
            if found["code"] != 0:
                break
    text = json.dumps(report, indent=1) + "\n"
    if arguments.output is not None:
        arguments.output.write_text(text)
    sys.stdout.write(text)
    sys.exit(max(part["code"] != 0 for part in report["parts"].values()))


def _measure(part: str, folder: Path, limit_gib: float) -> dict[str, Any]:
    """Run one part; its facts, seconds and largest resident memory."""
    command = [sys.executable, __file__, *sys.argv[1:], f"--part={part}", f"--folder={folder}"]
    begin, peak, stopped = time.monotonic(), 0.0, None
    process = subprocess.Popen(command)
    while process.poll() is None:
        resident, left = _resident_gib(process.pid), _available_gib()
        peak = max(peak, resident)
        if stopped is None and (resident > limit_gib or left < RESERVE_GIB):
            stopped = f"ended at {resident:.1f} GiB, with {left:.1f} GiB left on this machine"
            process.kill()
        time.sleep(POLL_S)
    facts = folder / f"{part}.json"
    found = json.loads(facts.read_text()) if facts.exists() else {}
    return {
        "code": process.returncode, "seconds": round(time.monotonic() - begin, 1), "peak_gib": round(peak, 2), **found,
        **({} if stopped is None else {"stopped": stopped}),
    }


def _export(arguments: argparse.Namespace) -> None:
    import torch

    from hybridiff_compiler.backends.onnx_file import export_onnx
    from hybridiff_compiler.backends.onnx_weights import OnnxWeights
    from hybridiff_compiler.backends.stage_io import stage_inputs, stage_outputs, stage_weights
    from hybridiff_compiler.planner import candidate_partitions
    from hybridiff_compiler.quality.architectures import random_model
    from hybridiff_compiler.runtime.branch_calls import capture_branch
    from hybridiff_compiler.runtime.intercept import find_denoiser, intercept

    signature: Any = None

    class Done(Exception):
        """The signature is known."""

    class Recorder:
        def start(self, num_steps: int, call: Any) -> bool:
            nonlocal signature
            signature = call
            raise Done

        def step(self, call: Any) -> Any:
            raise AssertionError(call)

    built = random_model(arguments.model, device="cpu", dtype=torch.float16)
    with intercept(built.pipe, Recorder()), contextlib.suppress(Done):
        built.pipe(num_inference_steps=1, **built.options(arguments.pixels, 0))
    captured = capture_branch(find_denoiser(built.pipe)[1], signature)
    layers = captured.layers
    partitions = candidate_partitions(layers, [layer.flops + 1.0 for layer in layers.layers])
    stages = next(partition for partition in partitions if partition.name == arguments.partition).stages
    mine, others = stages if arguments.stage == "inner" else stages[::-1]
    stage = captured.extract(mine, [value.name for value in layers.crossing(mine, others)])
    export_onnx(stage, arguments.folder / "stage.onnx", OnnxWeights(arguments.folder))
    (arguments.folder / "export.json").write_text(json.dumps({
        "layers": len(mine), "of_layers": len(layers.layers), "weights": len(stage_weights(stage)),
        "weights_gib": round(sum(tensor.nbytes for tensor in stage_weights(stage).values()) / 2**30, 2),
    }))
    (arguments.folder / "specs.json").write_text(json.dumps({
        "inputs": [spec.model_dump() for spec in stage_inputs(stage)],
        "outputs": [spec.model_dump() for spec in stage_outputs(stage)],
    }))


def _build(arguments: argparse.Namespace) -> None:
    from hybridiff_compiler.backends.artifact import artifact_backend
    from hybridiff_compiler.backends.stage_io import TensorSpec
    from hybridiff_compiler.backends.tensorrt import build_engine

    specs = json.loads((arguments.folder / "specs.json").read_text())
    inputs, outputs = (tuple(TensorSpec(**spec) for spec in specs[kind]) for kind in ("inputs", "outputs"))
    library = artifact_backend("tensorrt-rtx").library()  # type: ignore[attr-defined]
    engine = build_engine(library, arguments.folder / "stage.onnx", arguments.target, inputs, outputs)
    (arguments.folder / "build.json").write_text(json.dumps({
        "library": f"{library.__name__} {library.__version__}", "target": arguments.target,
        "engine_gib": round(len(engine) / 2**30, 2),
    }))


def _resident_gib(pid: int) -> float:
    """Memory of a process that cannot be had back by dropping file caches."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))}
    return sum(kib.values()) / 2**20


def _available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20


if __name__ == "__main__":
    main()
