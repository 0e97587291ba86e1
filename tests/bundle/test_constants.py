"""Tensors that a denoiser's forward makes from Python values: the bundle brings them along."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hybridiff_compiler.bundle import Bundle, write_bundle
from hybridiff_compiler.bundle.files import record_file
from hybridiff_compiler.bundle.graphs import CONSTANTS_FILE
from hybridiff_compiler.ir import InputError, PlanMismatchError

from .small import PlainDenoiser, PlainPipeline, small_plan
from .test_running import TOLERANCE, simulate


class ScaledDenoiser(PlainDenoiser):
    """Its estimate is scaled channel by channel, by numbers that are in the code."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        """As the parent's."""
        (estimate,) = super().forward(sample, timestep, encoder_hidden_states)
        return (estimate * torch.tensor([0.5, 1.0, 1.5, 2.0]).reshape(1, 4, 1, 1),)


@pytest.fixture(scope="module")
def pipe():
    made = PlainPipeline()
    made.denoiser = ScaledDenoiser().eval()
    return made


@pytest.fixture(scope="module", params=["onnx", pytest.param("aotinductor", marks=pytest.mark.slow)])
def bundle(request, pipe, tmp_path_factory):
    return write_bundle(small_plan(pipe), pipe.denoiser, tmp_path_factory.mktemp("c") / "b", backend=request.param)


def test_they_are_in_the_bundle(bundle, pipe):
    (constant,) = load_file(bundle.folder / CONSTANTS_FILE).values()
    assert constant.tolist() == [0.5, 1.0, 1.5, 2.0]
    difference = simulate(pipe, bundle.plan, bundle.backend) - simulate(pipe, bundle.plan)
    assert difference.abs().max() <= TOLERANCE


def test_damaged_ones_are_refused(bundle, pipe, reseal, tmp_path):
    import shutil

    for number, write in enumerate((
        lambda file: file.write_bytes(b"no tensors"),
        lambda file: save_file({"another": torch.zeros(4)}, file),
        lambda file: save_file(dict.fromkeys(load_file(file), torch.zeros(5)), file),
    )):
        folder = shutil.copytree(bundle.folder, tmp_path / str(number))
        write(folder / CONSTANTS_FILE)
        with pytest.raises(InputError, match="manifest says"):
            Bundle.open(folder)
        shared = tuple(record_file(folder / record.file) for record in bundle.manifest.shared)
        changed = reseal(folder, shared=shared)
        with pytest.raises((InputError, PlanMismatchError), match=r"is no file of tensors|the compiled denoiser reads"):
            simulate(pipe, changed.plan, changed.backend)
