"""A denoiser is recognised without capturing it, and whatever could change its graph is noticed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hybridiff_compiler.bundle import identity
from hybridiff_compiler.bundle.identity import ModelIdentity
from hybridiff_compiler.ir import PlanMismatchError
from hybridiff_compiler.runtime.handover import pack_skeleton, unpack_skeleton

from .small import PlainDenoiser


class Configured(PlainDenoiser):
    """A denoiser with a configuration, as diffusers' models have."""

    def __init__(self, **config) -> None:
        super().__init__()
        self.config = {"heads": 2, "blocks": ("a", "b"), "_name_or_path": "here"} | config
        self.processor = SimpleNamespace(scale=1.0, mode=None)


def test_equal_models_have_one_identity():
    """Values of weights, device, training mode, hooks and where it was loaded from do not count; nor does JSON."""
    made = ModelIdentity.of(Configured())
    other = Configured(_name_or_path="there", blocks=["a", "b"]).train()
    other.forward = lambda *args: None
    other._diffusers_hook = object()
    made.check(other)
    made.check(Configured().to("meta"))
    skeleton, _ = pack_skeleton(Configured())
    made.check(unpack_skeleton(skeleton, "cpu")[0])
    assert ModelIdentity.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(("change", "match"), [
    (lambda model: PlainDenoiser(), "compiled for a .*Configured, this pipeline has a .*PlainDenoiser"),
    (lambda model: Configured(heads=4), "with heads = 2, this one has 4"),
    (lambda model: Configured(extra=1), "with extra = absent, this one has 1"),
    (lambda model: model.half(), "other names, shapes or dtypes; fuse or unload adapters"),
    (lambda model: model.blocks.append(nn.Linear(2, 2)), "32 parameters and buffers, this one has 34"),
    (lambda model: model.register_buffer("scale", torch.zeros(1)), "fuse or unload"),
    (lambda model: setattr(model.blocks[2], "skip", True), "settings .* are not what they were"),
    (lambda model: setattr(model.processor, "scale", 2.0), "settings"),
    (lambda model: setattr(model, "processor", object()), "settings"),
    (lambda model: setattr(model.head, "stride", (2, 2)), "settings"),
])
def test_changes(change, match):
    model = Configured()
    result = change(model)
    with pytest.raises(PlanMismatchError, match=match):
        ModelIdentity.of(Configured()).check(result if isinstance(result, PlainDenoiser) else model)


def test_other_code(monkeypatch):
    made = ModelIdentity.of(Configured())
    assert {"bundle.small", "runtime.tiny", __name__} <= made.sources.keys()
    assert not any(name.startswith("torch") for name in made.sources)
    monkeypatch.setattr(identity, "_file_digest", lambda file: "0" * 64)
    with pytest.raises(PlanMismatchError, match="install the same versions, or compile the bundle again"):
        made.check(Configured())


def test_diffusers_models(bench):
    """A model that was loaded and one built from its configuration; adding and removing a setting."""
    made = ModelIdentity.of(bench.denoiser)
    assert made.packages.keys() == {"diffusers"}
    with torch.device("meta"):
        built = type(bench.denoiser).from_config(dict(bench.denoiser.config))
    made.check(built)
    built.fuse_qkv_projections()
    with pytest.raises(PlanMismatchError):
        made.check(built)


def test_freeu():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        )
    made = ModelIdentity.of(unet)
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(PlanMismatchError, match="FreeU"):
        made.check(unet)
    unet.disable_freeu()
    made.check(unet)


_SETTINGS = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@given(one=_SETTINGS, other=_SETTINGS)
def test_settings_are_told_apart(one, other):
    """Equal text exactly for equal settings (a tuple counts as a list, and true is not 1)."""
    first, second = (identity._describe(value, set(), -99) for value in (one, other))
    assert (first == second) == (repr_sorted(one) == repr_sorted(other))


def repr_sorted(value):
    """`repr` with sorted keys."""
    if isinstance(value, dict):
        return "dict " + str(sorted((repr(key), repr_sorted(item)) for key, item in value.items()))
    return f"list {[repr_sorted(item) for item in value]}" if isinstance(value, list) else repr(value)
