"""Engines by TensorRT for RTX, built without a GPU; classic TensorRT shares the code and is not installed here."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from hybridiff_compiler.backends import tensorrt
from hybridiff_compiler.backends.artifact import Job, artifact_backend
from hybridiff_compiler.backends.onnx_file import export_onnx
from hybridiff_compiler.backends.onnx_weights import OnnxWeights
from hybridiff_compiler.backends.stage_io import stage_inputs, stage_outputs
from hybridiff_compiler.backends.tensorrt import RTX_ARCHITECTURES, build_engine, load_library
from hybridiff_compiler.backends.tensorrt_run import EngineStage
from hybridiff_compiler.ir import InputError, PlanMismatchError, UsageError

ARCHITECTURES = ("sm_86", "sm_89", "sm_120")


@pytest.fixture(scope="session")
def onnx_file(need, small_stages, tmp_path_factory):
    """The second small stage as ONNX."""
    need("tensorrt-rtx")
    folder = tmp_path_factory.mktemp("engine")
    return export_onnx(small_stages[1], folder / "stage.onnx", OnnxWeights(folder))


def bindings(stage):
    return stage_inputs(stage), stage_outputs(stage)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_engines_of_a_small_stage(need, onnx_file, small_stages, arch):
    """Two builds have the same size; the builder chooses among equal names by chance, so a few bytes may differ."""
    library = need("tensorrt-rtx").library()
    engine = build_engine(library, onnx_file, arch, *bindings(small_stages[1]))
    again = build_engine(library, onnx_file, arch, *bindings(small_stages[1]))
    assert len(engine) == len(again) > 10_000
    assert sum(a != b for a, b in zip(engine, again)) < 0.01 * len(engine)


def test_engines_differ_by_architecture(need, onnx_file, small_stages):
    library = need("tensorrt-rtx").library()
    engines = {build_engine(library, onnx_file, arch, *bindings(small_stages[1])) for arch in ("sm_86", "sm_120")}
    assert len(engines) == 2


def test_one_stage_of_each_bundled_model(bench, split, need, tmp_path):
    backend = need("tensorrt-rtx")
    target = backend.target("cuda", "float32", "sm_89")
    job = Job(stage=split[0], folder=tmp_path, name="inner", target=target, weights=OnnxWeights(tmp_path))
    file = backend.build(job)
    assert file.stat().st_size > sum(p.nbytes for p in split[0].module.parameters()) * 0.9
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
def test_every_stage_for_every_architecture(bench, split, need, tmp_path):
    library, weights = need("tensorrt-rtx").library(), OnnxWeights(tmp_path)
    for index, stage in enumerate(split):
        file = export_onnx(stage, tmp_path / f"{index}.onnx", weights)
        for arch in ARCHITECTURES:
            assert build_engine(library, file, arch, *bindings(stage))


def test_bindings_are_checked(need, onnx_file, small_stages):
    library = need("tensorrt-rtx").library()
    inputs, outputs = bindings(small_stages[1])
    for wrong in (inputs[:-1], (inputs[0].model_copy(update={"dtype": "float16"}), *inputs[1:])):
        with pytest.raises(InputError, match="the engine's inputs are"):
            build_engine(library, onnx_file, "sm_86", wrong, outputs)
    renamed = (outputs[0].model_copy(update={"name": "other"}), *outputs[1:])
    with pytest.raises(InputError, match="the engine's outputs are"):
        build_engine(library, onnx_file, "sm_86", inputs, renamed)


def test_unparsable_files_are_refused(need, small_stages, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(InputError, match="cannot parse the stage"):
        build_engine(need("tensorrt-rtx").library(), tmp_path / "broken.onnx", "sm_86", *bindings(small_stages[1]))


def test_targets(need, monkeypatch):
    backend = need("tensorrt-rtx")
    assert backend.target("cuda", "float16", "sm_120").versions.keys() == {"torch", "tensorrt-rtx"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, arch, message in (
        ("cpu", "sm_89", "run on GPUs and the plan is for ranks on 'cpu'"), ("cuda", "sm_90", "got sm_90"),
        ("cuda", None, "name one with --target"), ("cuda", "current", "name one with --target"),
    ):
        with pytest.raises(UsageError, match=message):
            backend.target(device, "float16", arch)
    assert "sm_90" not in RTX_ARCHITECTURES
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for arch in (None, "CURRENT", "sm_90"):
        assert backend.target("cuda", "float16", arch).arch == "sm_90"
    assert backend.target("cuda", "float16", "sm_89").arch == "sm_89"
    with pytest.raises(UsageError, match="got sm_100"):
        backend.target("cuda", "float16", "sm_100")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="use --backend tensorrt-rtx"):
        artifact_backend("tensorrt").target("cuda", "float16", None)


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorrt", "tensorrt-rtx", "onnx"):
        assert "pip install" in artifact_backend(name).missing()
    with pytest.raises(UsageError, match="is installed"):
        load_library(("tensorrt",))
    with pytest.raises(UsageError, match="bundles are built with"):
        artifact_backend("tvm")


def test_torch_tensorrt_is_used_where_it_is_installed(small_stages, monkeypatch, tmp_path):
    """Against a stand-in: the call as torch-tensorrt documents it, the bytes written as they come."""
    calls = []

    def convert(program, **options):
        calls.append(options)
        return b"engine"

    stand_in = SimpleNamespace(dynamo=SimpleNamespace(convert_exported_program_to_serialized_trt_engine=convert))
    monkeypatch.setattr(tensorrt.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: stand_in)
    target = artifact_backend("onnx").target("cuda", "float32", None)
    job = Job(stage=small_stages[1], folder=tmp_path, name="s", target=target, weights=OnnxWeights(tmp_path))
    assert artifact_backend("tensorrt").build(job).read_bytes() == b"engine"
    assert calls[0].keys() == {"arg_inputs", "use_explicit_typing", "require_full_compilation"}


class Library:
    """A stand-in for TensorRT whose engine adds one to its first input, on the host."""

    __name__, __version__ = "stand-in", "0"
    TensorIOMode = SimpleNamespace(INPUT=0, OUTPUT=1)

    class ILogger:
        ERROR = 1

    def __init__(self, specs, gives, accepts=True):
        self.specs, self.gives, self.accepts, self.addresses = specs, gives, accepts, {}

    def Runtime(self, logger):
        def load(data):
            logger.log(2, "a warning")
            if not self.accepts:
                logger.log(1, "compute capability 9.0 is not supported")
            return self if self.accepts else None

        return SimpleNamespace(deserialize_cuda_engine=load)

    @property
    def num_io_tensors(self):
        return len(self.specs)

    def get_tensor_name(self, index):
        return self.specs[index].name

    def get_tensor_mode(self, name):
        return 1 if name in self.gives else 0

    def get_tensor_shape(self, name):
        return next(spec.shape for spec in self.specs if spec.name == name)

    def create_execution_context(self):
        return self

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        return True


def test_the_executor_binds_static_buffers(small_stages, arguments):
    """Every binding gets a fixed address, whatever order the engine lists them in; never run on a GPU."""
    stage = small_stages[1]
    inputs, outputs = bindings(stage)
    library = Library([*reversed(outputs), *reversed(inputs)], {spec.name for spec in outputs})
    executable = EngineStage(library, b"engine", inputs, outputs, device="cpu")
    given = arguments(stage)
    results = executable(*given)
    assert [tuple(result.shape) for result in results] == [spec.shape for spec in outputs]
    assert [result.data_ptr() for result in results] == [library.addresses[spec.name] for spec in outputs]
    for spec, buffer, argument in zip(inputs, executable._buffers, given):
        assert library.addresses[spec.name] == buffer.data_ptr()
        assert torch.equal(buffer, argument)
    with pytest.raises(InputError, match="compiled for"):
        executable(*[argument.double() for argument in given])


def test_the_executor_refuses_other_engines(small_stages):
    inputs, outputs = bindings(small_stages[1])
    gives = {spec.name for spec in outputs}
    with pytest.raises(PlanMismatchError, match=r"does not accept .* \(compute capability 9.0 is not supported\)"):
        EngineStage(Library([], gives, accepts=False), b"", inputs, outputs, device="cpu")
    with pytest.raises(InputError, match="the engine's inputs are"):
        EngineStage(Library([*inputs[1:], *outputs], gives), b"", inputs, outputs, device="cpu")
    flat = [spec.model_copy(update={"shape": (1,)}) for spec in outputs]
    with pytest.raises(InputError, match="has shape"):
        EngineStage(Library([*inputs, *flat], gives), b"", inputs, outputs, device="cpu")
