"""Are engines of TensorRT for RTX the same when they are built again? Every stage of a model, for several GPUs, twice.

    python tools/rebuild_engines.py bundled:unet bundled:mmdit -o engines.json

Needs no GPU. Both stages of the nested split are exported as ONNX once; each engine is then built in two processes, and
their bytes are compared: size, seconds, and how many bytes differ in how many runs of neighbours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_tensorrt import captured_stages  # beside this file

TARGETS = ("sm_86", "sm_89", "sm_120")
STAGES = ("inner", "outer")


def main() -> None:
    """Export and compare, or build one engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="bundled:unet, bundled:mmdit, or a diffusers folder")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS, metavar=("ONNX", "TARGET", "FILE"))
    arguments = parser.parse_args()
    if arguments.engine is not None:
        _build(*arguments.engine)
        return
    report: dict[str, Any] = {"schema": 1, "arguments": " ".join(sys.argv[1:]), "engines": []}
    with tempfile.TemporaryDirectory(prefix="hybridiff-engines-") as temporary:
        for index, model in enumerate(arguments.models):
            folder = Path(temporary) / str(index)
            folder.mkdir()
            for stage in _export(model, arguments.dtype, folder):
                for target in arguments.targets:
                    found = {"model": model, "stage": stage, "target": target} | _compare(folder, stage, target)
                    report["engines"].append(found)
                    sys.stderr.write(f"{found}\n")
    text = json.dumps(report, indent=1) + "\n"
    if arguments.output is not None:
        arguments.output.write_text(text)
    sys.stdout.write(text)


def _export(model: str, dtype: str, folder: Path) -> list[str]:
    """Write the stages of the nested split of `model` to the folder; returns their names."""
    from hybridiff_compiler.backends.onnx_file import export_onnx
    from hybridiff_compiler.backends.onnx_weights import OnnxWeights
    from hybridiff_compiler.backends.stage_io import stage_inputs, stage_outputs

    captured, stages = captured_stages(model, dtype)
    layers = captured.layers
    weights = OnnxWeights(folder)
    for name, mine, others in zip(STAGES, stages, stages[::-1], strict=True):
        stage = captured.extract(mine, [value.name for value in layers.crossing(mine, others)])
        export_onnx(stage, folder / f"{name}.onnx", weights)
        (folder / f"{name}.json").write_text(json.dumps({
            "inputs": [spec.model_dump() for spec in stage_inputs(stage)],
            "outputs": [spec.model_dump() for spec in stage_outputs(stage)],
        }))
    return list(STAGES)


def _compare(folder: Path, stage: str, target: str) -> dict[str, Any]:
    """Build one engine in two processes."""
    contents, seconds = [], []
    for attempt in range(2):
        file, begin = folder / f"{attempt}.engine", time.monotonic()
        command = [sys.executable, __file__, "-", "--engine", str(folder / f"{stage}.onnx"), target, str(file)]
        subprocess.run(command, check=True)
        seconds.append(round(time.monotonic() - begin, 1))
        contents.append(file.read_bytes())
    one, other = contents
    places = [i for i, (a, b) in enumerate(zip(one, other)) if a != b] if one != other else []
    return {
        "mib": round(len(one) / 2**20, 2), "seconds": seconds, "same_size": len(one) == len(other),
        "different_bytes": len(places),
        "in_runs": sum(1 for before, here in zip([-2, *places], places) if here != before + 1),
    }


def _build(onnx: str, target: str, file: str) -> None:
    from hybridiff_compiler.backends.artifact import artifact_backend
    from hybridiff_compiler.backends.stage_io import TensorSpec
    from hybridiff_compiler.backends.tensorrt import build_engine

    specs = json.loads(Path(onnx).with_suffix(".json").read_text())
    inputs, outputs = (tuple(TensorSpec(**spec) for spec in specs[kind]) for kind in ("inputs", "outputs"))
    library = artifact_backend("tensorrt-rtx").library()  # type: ignore[attr-defined]
    Path(file).write_bytes(build_engine(library, Path(onnx), target, inputs, outputs))


if __name__ == "__main__":
    main()
