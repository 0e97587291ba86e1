"""Flattening of calls."""

import pytest
import torch
from torch import nn

from hybridiff_compiler.capture import CallSignature, flatten_call
from hybridiff_compiler.ir.errors import UsageError


class Model(nn.Module):
    def forward(self, sample, timestep: torch.Tensor, extra=None, flag: bool = True, scale: float = 1.0, **kwargs):
        return sample


X, T = torch.zeros(2, 3), torch.tensor(5)


def paths(*args, **kwargs):
    signature, tensors = flatten_call(Model(), args, kwargs)
    return [leaf.path for leaf in signature.leaves], list(tensors)


def test_positional_arguments_get_signature_names():
    assert paths(X, T) == (["sample", "timestep"], ["sample", "timestep"])
    assert paths(X, T) == paths(timestep=T, sample=X)


def test_defaults_do_not_count():
    assert (
        flatten_call(Model(), (X, T), {"extra": None, "flag": True, "scale": 1.0})[0]
        == flatten_call(Model(), (X, T), {})[0]
    )
    assert paths(X, T, flag=1)[0] == ["sample", "timestep", "flag"]  # equal to True, but of another type


def test_nested_containers_are_named_and_sorted():
    extra = {"b": X, "a": [T, None], "c": {}}
    leaves, tensors = paths(X, T, extra=extra, other=X)
    assert leaves == ["sample", "timestep", "extra.a.0", "extra.a.1", "extra.b", "extra.c", "other"]
    assert tensors == ["sample", "timestep", "extra.a.0", "extra.b", "other"]
    assert paths(X, T, extra=dict(reversed(extra.items())), other=X) == (leaves, tensors)


def test_leaves_describe_tensors_and_constants():
    signature, tensors = flatten_call(Model(), (X.half(), T), {"flag": False})
    sample, timestep, flag = signature.leaves
    assert (sample.shape, sample.dtype, sample.constant) == ((2, 3), "float16", None)
    assert (timestep.shape, timestep.dtype) == ((), "int64")
    assert (flag.shape, flag.dtype, flag.constant) == (None, None, "False")
    assert tensors["timestep"] is T
    assert CallSignature.model_validate_json(signature.model_dump_json()) == signature


def test_objects_are_described_without_their_address():
    signature, _ = flatten_call(Model(), (X, T), {"extra": object()})
    assert signature.leaves[-1].constant == "<builtins.object>"


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"sample": X[:1], "timestep": T}, "got sample: float32[1,3], expected sample: float32[2,3]"),
        ({"sample": X.half(), "timestep": T}, "got sample: float16[2,3]"),
        ({"sample": X, "timestep": T, "flag": False}, "got flag=False, expected no flag"),
        ({"sample": X, "timestep": T, "extra": {"a": X}}, "got extra.a: float32[2,3], expected no extra.a"),
    ],
)
def test_mismatch_names_the_first_difference(other, text):
    base, changed = flatten_call(Model(), (X, T), {})[0], flatten_call(Model(), (), other)[0]
    assert base.mismatch(base) is None
    assert text in base.mismatch(changed)
    assert "\n" not in base.mismatch(changed)
    assert changed.mismatch(base)


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match=r"missing a required argument: 'timestep'.*\(sample, timestep, extra"):
        flatten_call(Model(), (X,), {})


def test_patched_instances_are_read_by_their_class():
    model = Model()
    model.forward = lambda *args, **kwargs: None
    assert flatten_call(model, (X, T), {})[0] == flatten_call(Model(), (X, T), {})[0]
