"""ONNX stages: the checker's and onnxruntime's verdict against the stage graph, names, shared weights, dtypes."""

from __future__ import annotations

import pytest
import torch
from bundle.small import PlainDenoiser
from runtime.tiny import WIDTH

from hybridiff_compiler.backends.artifact import artifact_backend
from hybridiff_compiler.backends.onnx_file import export_onnx
from hybridiff_compiler.backends.onnx_weights import WEIGHTS_FILE, OnnxWeights
from hybridiff_compiler.backends.stage_io import stage_inputs, stage_interface, stage_outputs, stage_weights
from hybridiff_compiler.backends.tensorrt import build_engine
from hybridiff_compiler.capture import capture
from hybridiff_compiler.ir import InputError


class Joining(torch.nn.Module):
    """Concatenates two dtypes, as the embeddings of SDXL in half precision do."""

    def __init__(self, join):
        super().__init__()
        self.linear, self.join = torch.nn.Linear(16, 4), join

    def forward(self, sample, other):
        """(B, 8) of two dtypes -> (B, 4)."""
        return self.linear(self.join([sample, other], 1).to(self.linear.weight.dtype)) + other[:, :4]


def whole(denoiser, *arguments):
    return capture(denoiser.eval(), arguments, {}).whole()


def test_stages_of_the_bundled_models(bench, split, need, arguments, tmp_path):
    """Both stages, checked and run, with weights in one file that holds every tensor once."""
    backend, weights = need("onnx"), OnnxWeights(tmp_path)
    import onnx

    for index, stage in enumerate(split):
        file = export_onnx(stage, tmp_path / f"{index}.onnx", weights)
        model = onnx.load(file, load_external_data=False)
        assert [value.name for value in model.graph.input] == [spec.name for spec in stage_inputs(stage)]
        assert [value.name for value in model.graph.output] == [spec.name for spec in stage_outputs(stage)]
        assert {value.name for value in model.graph.initializer} & set(stage_weights(stage))
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {WEIGHTS_FILE}
        given = arguments(stage)
        with torch.no_grad():
            expected = stage.module(*given)
        for got, want in zip(backend.load(file, stage_interface(stage))(*given), expected, strict=True):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    size = (tmp_path / WEIGHTS_FILE).stat().st_size
    again = export_onnx(split[0], tmp_path / "again.onnx", weights)
    assert (tmp_path / WEIGHTS_FILE).stat().st_size == size, "weights of a stage exported twice are stored once"
    assert again.read_bytes() == (tmp_path / "0.onnx").read_bytes(), "exports are reproducible"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 4e-3), ("bfloat16", None)])
def test_half_precision(need, arguments, tmp_path, dtype, tolerance):
    """onnxruntime runs float16 on CPUs; for bfloat16 it has no convolution, so there the file is checked only."""
    backend, dtype = need("onnx"), getattr(torch, dtype)
    denoiser = PlainDenoiser().to(dtype)
    call = torch.zeros(1, 4, 8, 8, dtype=dtype), torch.tensor(5.0, dtype=dtype), torch.zeros(1, 5, WIDTH, dtype=dtype)
    stage = whole(denoiser, *call)
    file = export_onnx(stage, tmp_path / "stage.onnx", OnnxWeights(tmp_path))
    if tolerance is None:
        return
    given = arguments(stage)
    with torch.no_grad():
        (expected,) = stage.module(*given)
    (got,) = backend.load(file, stage_interface(stage))(*given)
    assert got.dtype == dtype
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("join", [torch.cat, torch.concat], ids=["cat", "concat"])
def test_concatenation_of_two_dtypes(need, arguments, tmp_path, join):
    """torch casts by itself; the file must say so, or TensorRT refuses it."""
    backend = need("onnx")
    import onnx

    stage = whole(Joining(join).half(), torch.zeros(2, 8, dtype=torch.float16), torch.zeros(2, 8))
    file = export_onnx(stage, tmp_path / "stage.onnx", OnnxWeights(tmp_path))
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    dtypes = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input)}
    (concat,) = (node for node in graph.node if node.op_type == "Concat")
    assert {dtypes[name] for name in concat.input} == {onnx.TensorProto.FLOAT}
    if artifact_backend("tensorrt-rtx").missing() is None:
        library = artifact_backend("tensorrt-rtx").library()
        assert build_engine(library, file, "sm_89", stage_inputs(stage), stage_outputs(stage))
    given = arguments(stage)
    with torch.no_grad():
        expected = stage.module(*given)
    for got, want in zip(backend.load(file, stage_interface(stage))(*given), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_files_name_nothing_of_this_machine(need, small_stages, tmp_path):
    need("onnx")
    file = export_onnx(small_stages[0], tmp_path / "stage.onnx", OnnxWeights(tmp_path))
    data = file.read_bytes()
    for trace in (b".py", b"site-packages", b"nn_module_stack", str(tmp_path).encode()):
        assert trace not in data


def test_refusals(need, small_stages, tmp_path):
    backend = need("onnx")
    (tmp_path / WEIGHTS_FILE).write_bytes(b"somebody else's")
    with pytest.raises(InputError, match="export to an empty folder"):
        export_onnx(small_stages[0], tmp_path / "stage.onnx", OnnxWeights(tmp_path))
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(InputError, match="onnxruntime cannot run it"):
        backend.load(tmp_path / "broken.onnx", stage_interface(small_stages[0]))
    (tmp_path / WEIGHTS_FILE).unlink()
    file = export_onnx(small_stages[0], tmp_path / "stage.onnx", OnnxWeights(tmp_path))
    with pytest.raises(InputError, match="the plan needs"):
        backend.load(file, stage_interface(small_stages[1]))
