"""Bundles doing their work: the same image as the plan, without compiling, with the weights at hand."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile

import pytest
import torch

import hybridiff_compiler as hc
from hybridiff_compiler.backends import BACKENDS as BACKENDS_HERE
from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.backends.cuda_graph import record_plainly
from hybridiff_compiler.backends.hoisting import Hoisted, hoist
from hybridiff_compiler.bundle import Bundle, resolve_plan, write_bundle
from hybridiff_compiler.bundle.writing import distinct_stages
from hybridiff_compiler.ir import WHOLE, InputError, Pattern, PlanMismatchError, UsageError, WorkerError, lower
from hybridiff_compiler.runtime.branch_calls import scale_signature
from hybridiff_compiler.runtime.executor import capture_for
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.segments import SegmentRunner
from hybridiff_compiler.runtime.simulator import Simulator

from .small import PlainPipeline

BACKENDS = ("onnx", "aotinductor")
TOLERANCE = 2e-5
"""On latents of size 3 after 8 steps: other kernels, other order of sums, both in float32."""


def simulate(pipe, plan, backend="eager", prompt=1):
    """A generation of the plan in this process, with graphs from a bundle or as they are."""
    with intercept(pipe, Simulator(plan, pipe.denoiser, backend=backend)):
        return pipe(prompt)


BAN = """
import torch, torch.export, torch.onnx, torch._inductor

def refuse(*args, **kwargs):
    raise AssertionError("something was captured or compiled")

torch.compile = torch.export.export = torch.onnx.export = torch._inductor.aoti_compile_and_package = refuse
"""
"""A worker runs it at its start, when its folder is on the path."""


@pytest.fixture
def ban_compilers(monkeypatch, tmp_path):
    """`ban_compilers()`: from now on whatever captures, compiles or exports fails, here and in workers."""
    (tmp_path / "sitecustomize.py").write_text(BAN)

    def refuse(*args, **kwargs):
        raise AssertionError("something was captured or compiled")

    def ban():
        for owner, name in ((torch, "compile"), (torch.export, "export"), (torch.onnx, "export"),
                            (torch._inductor, "aoti_compile_and_package")):
            monkeypatch.setattr(owner, name, refuse)
        monkeypatch.syspath_prepend(tmp_path)

    return ban


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_image_is_the_plan_s(compiled, pipe, plan, backend, ban_compilers):
    bundle, exact = compiled(backend), simulate(pipe, plan)
    ban_compilers()
    difference = (simulate(pipe, bundle.plan, bundle.backend) - exact).abs().max()
    assert difference <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_parallelize_takes_the_folder(compiled, pipe, plan, backend, ban_compilers):
    """Neither rank captures or compiles; what both return is what one process returns from the bundle."""
    bundle, exact = compiled(backend), simulate(pipe, plan)
    ban_compilers()
    with hc.parallelize(pipe, bundle.folder, threads=1) as parallel:
        image = pipe(1)
        assert parallel.executed == plan.schedule.steps
    assert torch.equal(image, simulate(pipe, plan, bundle.backend))
    assert (image - exact).abs().max() <= TOLERANCE


def test_the_ban_reaches_workers(pipe, plan, ban_compilers):
    """Without a bundle the worker captures, so it fails: the test before would notice."""
    captured = capture_for(plan, pipe.denoiser)
    ban_compilers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hybridiff_compiler.runtime.executor.capture_for", lambda plan, denoiser: captured)
        with pytest.raises(WorkerError, match="something was captured"):
            hc.parallelize(pipe, plan, threads=1)


def test_each_graph_is_compiled_once(compiled, pipe, plan):
    manifest = compiled("onnx").manifest
    assert [artifact.segments for artifact in manifest.artifacts] == [("whole[0]",), ("nested[1]",)]
    assert [artifact.ranks for artifact in manifest.artifacts] == [(0, 1), (0, 1)]
    builds = distinct_stages(plan, pipe.denoiser)
    assert [build.digest for build in builds] == [artifact.graph for artifact in manifest.artifacts]


def test_names_are_the_plan_s(compiled, pipe, plan):
    """Inputs and outputs are called as the plan calls the denoiser's inputs and the values between layers."""
    inputs = {leaf.path for leaf in plan.model.signature.leaves}
    layers = SegmentRunner(pipe.denoiser, plan.model.signature, plan.patterns, plan.partitions).layers
    values = {value.name for value in layers.values}
    for artifact in compiled("onnx").manifest.artifacts:
        assert {spec.name for spec in artifact.inputs} <= inputs | values
        assert {spec.name for spec in artifact.outputs} <= values | {"estimate"}
    outer = compiled("onnx").manifest.artifacts[1]
    assert {spec.name for spec in outer.inputs} & values, "the outer stage reads the inner one's values"


def test_aotinductor_reads_the_live_weights(compiled, plan):
    """An edit in place and exchanged memory are seen by executables that were loaded before."""
    bundle, pipe = compiled("aotinductor"), PlainPipeline()
    simulator = Simulator(bundle.plan, pipe.denoiser, backend=bundle.backend)
    before = _generate(pipe, simulator)
    with torch.no_grad():
        pipe.denoiser.tail.weight.mul_(0.5)
    edited = _generate(pipe, simulator)
    assert (edited - simulate(pipe, plan)).abs().max() <= TOLERANCE
    assert (edited - before).abs().max() > 0.01
    pipe.denoiser.head.weight.data = pipe.denoiser.head.weight.data * 2.0
    assert (_generate(pipe, simulator) - simulate(pipe, plan)).abs().max() <= TOLERANCE


def _generate(pipe, simulator):
    with intercept(pipe, simulator):
        return pipe(1)


def test_weights_inside_must_be_the_model_s(compiled):
    bundle, other = compiled("onnx"), PlainPipeline(seed=1)
    with pytest.raises(PlanMismatchError, match="built with other weights"):
        simulate(other, bundle.plan, bundle.backend)


def test_another_denoiser_is_refused(compiled):
    bundle, other = compiled("onnx"), PlainPipeline()
    del other.denoiser.blocks[-1]
    with pytest.raises(PlanMismatchError, match="profile this model, plan and compile again"):
        hc.parallelize(other, bundle.folder, threads=1)


def test_other_tables_are_refused(compiled, pipe, plan):
    """A pattern, a partition or a call that was not compiled; one pattern alone needs other outputs of its graph."""
    backend = compiled("onnx").backend
    single = Pattern.parse("single", "u0@0 c0@0 | cfg", partition=WHOLE, stages=1)
    nested = plan.partitions[0]
    moved = nested.model_copy(update={"stages": tuple(reversed(nested.stages))})
    signature = scale_signature(plan.model.signature, 1, 2)
    for patterns, partitions, call, message in (
        ((single,), plan.partitions, plan.model.signature, "no artifact for the stage graph whole.0. x2"),
        (plan.patterns[:1], plan.partitions, plan.model.signature, "has other outputs"),
        (plan.patterns, (moved, *plan.partitions[1:]), plan.model.signature, "without the partitions"),
        (plan.patterns, plan.partitions, signature, "another call"),
    ):
        with pytest.raises(PlanMismatchError, match=message):
            SegmentRunner(pipe.denoiser, call, patterns, partitions, backend=backend).prepare(lower(patterns[0]))


def test_a_bundle_has_its_backend(compiled):
    with pytest.raises(UsageError, match="compiled with onnx already"):
        resolve_plan(compiled("onnx"), "inductor")


def test_sources_of_plans(compiled, plan, tmp_path):
    assert resolve_plan(plan, "eager") == (plan, "eager")
    assert resolve_plan(plan.save(tmp_path / "plan.json")) == (plan, None)
    bundle = compiled("onnx")
    assert resolve_plan(bundle.folder) == (plan, bundle.backend)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputError, match="hybridiff compile"):
            resolve_plan(missing)


def test_opened_is_what_was_written(compiled):
    for backend in BACKENDS:
        bundle = compiled(backend)
        assert Bundle.open(bundle.folder) == bundle
        listed = {record.file for record in bundle.manifest.files} | {"manifest.json"}
        assert {file.name for file in bundle.folder.iterdir()} == listed


def test_replacing_and_refusing_folders(pipe, plan, tmp_path, monkeypatch):
    """What is there already stays until the new bundle is complete; what is no bundle is never touched."""
    from hybridiff_compiler.backends import onnx_file

    missing = artifact_backend("onnx").missing()
    if missing is not None:
        pytest.skip(f"onnx {missing}")
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no bundle"):
        write_bundle(plan, pipe.denoiser, target, backend="onnx")
    (target / "thesis.txt").unlink()

    def quick(stage, file, weights):
        file.write_bytes(b"first")
        return file

    monkeypatch.setattr(onnx_file, "export_onnx", quick)
    first = write_bundle(plan, pipe.denoiser, target, backend="onnx")

    def fail(stage, file, weights):
        file.write_bytes(b"half")
        raise InputError("no more")

    monkeypatch.setattr(onnx_file, "export_onnx", fail)
    with pytest.raises(InputError, match="no more"):
        write_bundle(plan, pipe.denoiser, target, backend="onnx")
    assert Bundle.open(target) == first
    monkeypatch.setattr(onnx_file, "export_onnx", lambda stage, file, weights: (file.write_bytes(b"2"), file)[1])
    assert write_bundle(plan, pipe.denoiser, target, backend="onnx").manifest != first.manifest
    assert list(tmp_path.iterdir()) == [target]


def test_a_worker_imports_no_compiler(compiled, plan):
    """Loading and running a bundle takes neither torch's compilers nor diffusers."""
    script = f"""
import sys
from bundle.small import PlainPipeline
from hybridiff_compiler.runtime import worker
from hybridiff_compiler.bundle import Bundle, open_graphs
from hybridiff_compiler.ir import lower
from hybridiff_compiler.runtime.segments import SegmentRunner
bundle, denoiser = Bundle.open({str(compiled("aotinductor").folder)!r}), PlainPipeline().denoiser
plan = bundle.plan
runner = SegmentRunner(denoiser, plan.model.signature, plan.patterns, plan.partitions, backend=bundle.backend)
runner.prepare(segment for pattern in plan.patterns for segment in lower(pattern))
loaded = {{name.partition(".")[0] for name in sys.modules}} | {{".".join(name.split(".")[:2]) for name in sys.modules}}
print(sorted(loaded & {{"torch._dynamo", "torch._inductor", "torch.onnx", "onnx", "diffusers", "transformers"}}))
"""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=variables)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_timed_parts_are_computed_once_per_generation(pipe, plan, monkeypatch):
    """From the scheduler's timesteps to the graphs, without a compiler: the parts run as they are."""
    calls = []

    def hoisted(stage):
        parts = hoist(stage)
        assert parts is not None

        def compiled(part):
            if part is not parts.timed:
                return part.module
            return lambda *given: (calls.append(stage), part.module(*given))[1]

        return Hoisted.build(parts, compiled)

    exact = simulate(pipe, plan)
    monkeypatch.setitem(BACKENDS_HERE, "eager", hoisted)
    for recorder in (None, record_plainly):
        simulator = Simulator(plan, pipe.denoiser, recorder=recorder)
        _generate(pipe, simulator)
        for _ in range(2):
            calls.clear()
            assert (_generate(pipe, simulator) - exact).abs().max() <= TOLERANCE
            # The whole denoiser's and the outer stage's; both branches share what follows from the timestep alone.
            assert len({id(stage) for stage in calls}) == len(calls) == 2


def test_nothing_unpacked_is_left_behind(compiled, plan, tmp_path, monkeypatch):
    """Packages are unpacked to be loaded; workers end without tidying up."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    pipe = PlainPipeline()
    with parallelize(pipe, compiled("aotinductor"), threads=1) as parallel:
        pipe(1)
        assert list(tmp_path.rglob("*.so"))  # the worker's; this process may use another folder already
    del parallel
    gc.collect()
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
    assert len(list(tmp_path.iterdir())) <= 1  # this process's own
