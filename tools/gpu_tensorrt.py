"""Does TensorRT for RTX run on this GPU? Builds, runs and records the engine of one stage, and says where it fails.

    python tools/gpu_tensorrt.py prepare FOLDER             # here: needs onnx and onnxscript, no GPU
    python tools/gpu_tensorrt.py run FOLDER -o rtx.json     # there: needs a GPU and tensorrt_rtx_bindings, nothing else

`prepare` exports the inner stage of the nested split of a bundled model as ONNX and stores arguments with the results
of the stage graph. `run` builds the engine for the GPU at hand, runs it by the executor that bundles use, compares,
records it as a CUDA graph, replays that on other arguments, and times it. A step that fails is reported with a reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SAMPLES = 2
"""Sets of arguments."""


def main() -> None:
    """Prepare or run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prepare", "run"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="bundled:unet")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--target", default="CURRENT", help="CURRENT or sm_89 and the like (builds without a GPU)")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "prepare":
        _prepare(arguments)
        return
    report = _run(arguments.folder, arguments.target)
    text = json.dumps(report, indent=1) + "\n"
    if arguments.output is not None:
        arguments.output.write_text(text)
    sys.stdout.write(text)
    sys.exit(0 if report["failed_at"] is None else 1)


def _prepare(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from hybridiff_compiler.backends.onnx_file import export_onnx
    from hybridiff_compiler.backends.onnx_weights import OnnxWeights
    from hybridiff_compiler.backends.stage_io import example_arguments, stage_inputs, stage_outputs

    arguments.folder.mkdir(parents=True)
    stage = _stage(arguments.model, arguments.dtype)
    exact = _stage(arguments.model, "float32")
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for sample in range(SAMPLES):
        given = [
            torch.randn(a.shape, generator=generator).to(a.dtype) if a.is_floating_point() else torch.full_like(a, 7)
            for a in example_arguments(stage)
        ]
        with torch.no_grad():
            same = stage.module(*given)
            full = exact.module(*(tensor.float() if tensor.is_floating_point() else tensor for tensor in given))
        for kind, values in (("argument", given), ("result", same), ("exact", full)):
            tensors.update({f"{sample}.{kind}.{i}": value.contiguous() for i, value in enumerate(values)})
    save_file(tensors, arguments.folder / "samples.safetensors")
    export_onnx(stage, arguments.folder / "stage.onnx", OnnxWeights(arguments.folder))
    (arguments.folder / "stage.json").write_text(json.dumps({
        "model": arguments.model, "dtype": arguments.dtype,
        "inputs": [spec.model_dump() for spec in stage_inputs(stage)],
        "outputs": [spec.model_dump() for spec in stage_outputs(stage)],
    }))


def captured_stages(model: str, dtype: str) -> tuple[Any, tuple[Any, ...]]:
    """The captured denoiser of `model`, and the layers of the inner and the outer stage of the nested split."""
    from hybridiff_compiler.capture import capture
    from hybridiff_compiler.cli.models import load_model
    from hybridiff_compiler.planner import candidate_partitions
    from hybridiff_compiler.profiler import Generation
    from hybridiff_compiler.profiler.costs_only import call_of_pipeline

    loaded = load_model(model, device="cpu", dtype=dtype)
    generation = Generation(
        pipe=loaded.pipe, num_inference_steps=1, guidance_scale=loaded.guidance_scale, options=loaded.options
    )
    denoiser, call, _ = call_of_pipeline(generation, "a cat")
    captured = capture(denoiser, (), call)
    layers = captured.layers
    partitions = candidate_partitions(layers, [layer.flops + 1.0 for layer in layers.layers])
    return captured, next(partition for partition in partitions if partition.name == "nested").stages


def _stage(model: str, dtype: str) -> Any:
    """The inner stage of the nested split."""
    captured, (inner, outer) = captured_stages(model, dtype)
    return captured.extract(inner, [value.name for value in captured.layers.crossing(inner, outer)])


def _run(folder: Path, target: str) -> dict[str, Any]:
    from safetensors.torch import load_file

    from hybridiff_compiler.backends.stage_io import TensorSpec

    facts = json.loads((folder / "stage.json").read_text())
    inputs, outputs = (tuple(TensorSpec(**spec) for spec in facts[kind]) for kind in ("inputs", "outputs"))
    report: dict[str, Any] = {
        "schema": 1, "stage": f"inner stage of {facts['model']}, {facts['dtype']}", "target": target,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "torch": torch.__version__,
        "steps": {}, "failed_at": None,
    }
    tensors = load_file(folder / "samples.safetensors", device="cuda" if report["gpu"] else "cpu")
    samples = [_sample(tensors, number) for number in range(SAMPLES)]
    state: dict[str, Any] = {}
    for name, step in (
        ("import", _import), ("build", _build), ("load", _load), ("run", _compare), ("record", _record),
        ("replay", _replay), ("time", _time),
    ):
        begin = time.perf_counter()
        try:
            found = step(state, folder=folder, target=target, inputs=inputs, outputs=outputs, samples=samples)
        except BaseException as error:
            report["failed_at"] = name
            report["steps"][name] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
            break
        report["steps"][name] = {"seconds": round(time.perf_counter() - begin, 3), **found}
    return report


def _sample(tensors: dict[str, torch.Tensor], number: int) -> dict[str, list[torch.Tensor]]:
    kinds: dict[str, list[torch.Tensor]] = {}
    for kind in ("argument", "result", "exact"):
        names = [name for name in tensors if name.startswith(f"{number}.{kind}.")]
        kinds[kind] = [tensors[f"{number}.{kind}.{index}"] for index in range(len(names))]
    return kinds


def _import(state: dict[str, Any], **given: Any) -> dict[str, Any]:
    from hybridiff_compiler.backends.artifact import artifact_backend

    state["library"] = artifact_backend("tensorrt-rtx").library()  # type: ignore[attr-defined]
    return {"library": f"{state['library'].__name__} {state['library'].__version__}"}


def _build(state: dict[str, Any], *, folder: Path, target: str, inputs: Any, outputs: Any, **given: Any) -> dict:
    from hybridiff_compiler.backends.artifact import artifact_backend
    from hybridiff_compiler.backends.tensorrt import build_engine

    arch = artifact_backend("tensorrt-rtx").target("cuda", "float16", target).arch
    state["engine"] = build_engine(state["library"], folder / "stage.onnx", arch, inputs, outputs)
    return {"arch": arch, "mib": round(len(state["engine"]) / 2**20, 2)}


def _load(state: dict[str, Any], *, inputs: Any, outputs: Any, **given: Any) -> dict[str, Any]:
    from hybridiff_compiler.backends.tensorrt_run import EngineStage

    state["stage"] = EngineStage(state["library"], state["engine"], inputs, outputs)
    return {}


def _compare(state: dict[str, Any], *, samples: Any, **given: Any) -> dict[str, Any]:
    return {"errors": [_errors(state["stage"](*sample["argument"]), sample) for sample in samples]}


def _record(state: dict[str, Any], *, inputs: Any, **given: Any) -> dict[str, Any]:
    from hybridiff_compiler.backends.cuda_graph import CudaRecorder, Replay

    device = torch.device("cuda", torch.cuda.current_device())
    specs = [(spec.shape, getattr(torch, spec.dtype)) for spec in inputs]
    state["replay"] = Replay(state["stage"], specs, device, CudaRecorder(device))
    return {}


def _replay(state: dict[str, Any], *, samples: Any, **given: Any) -> dict[str, Any]:
    return {"errors": [_errors(state["replay"](*sample["argument"]), sample) for sample in reversed(samples)]}


def _time(state: dict[str, Any], *, samples: Any, **given: Any) -> dict[str, Any]:
    from hybridiff_compiler.backends.cuda_graph import seconds_per_call

    device = torch.device("cuda", torch.cuda.current_device())
    calls: dict[str, Callable[[], object]] = {
        "call_ms": lambda: state["stage"](*samples[0]["argument"]), "replay_ms": state["replay"].replay,
    }
    return {name: round(seconds_per_call(call, device, 200) * 1e3, 4) for name, call in calls.items()}


def _errors(results: Any, sample: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """Largest differences over all results, relative to the largest value."""
    torch.cuda.synchronize()
    largest = max(float(exact.abs().max()) for exact in sample["exact"])

    def error(values: Any, references: Any) -> float:
        worst = max(float((a.float() - b.float()).abs().max()) for a, b in zip(values, references, strict=True))
        return round(worst / largest, 6)

    return {
        "to_stage_graph": error(results, sample["result"]), "to_float32": error(results, sample["exact"]),
        "stage_graph_to_float32": error(sample["result"], sample["exact"]),
    }


if __name__ == "__main__":
    main()
