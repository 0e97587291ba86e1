"""The state of an unfinished profile: kept, found again, refused when it is of something else."""

import pytest
import torch
from torch import nn

from hybridiff_compiler.ir import InputError, PlanMismatchError
from hybridiff_compiler.profiler.partial import Partial, weights_digest

SETTINGS = {"seed": "0", "steps": "50"}


def test_parts_survive_the_file(tmp_path):
    file = tmp_path / "p.json.partial"
    first = Partial(file, SETTINGS)
    first.put("one", {"a": [1, 2.5]}, {"x": torch.arange(3.0)})
    first.put("two", [1])
    again = Partial(file, SETTINGS)
    assert again.found == 2
    tensors, data = again.get("one")
    assert data == {"a": [1, 2.5]}
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert again.get("two") == ({}, [1])
    assert again.get("three") is None
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_other_settings_are_refused(tmp_path):
    file = tmp_path / "p.json.partial"
    Partial(file, SETTINGS).put("one", 1)
    with pytest.raises(PlanMismatchError, match=r"its seed is 0, this one's is 1; delete it \(or pass --restart\)"):
        Partial(file, SETTINGS | {"seed": "1"})


def test_damage_is_refused(tmp_path):
    file = tmp_path / "p.json.partial"
    file.write_bytes(b"no safetensors")
    with pytest.raises(InputError, match="no readable state"):
        Partial(file, SETTINGS)


def test_without_a_file_parts_stay_in_memory():
    partial = Partial(None, SETTINGS)
    partial.put("one", 1)
    partial.remove()
    assert partial.get("one") == ({}, 1)


def test_digest_tells_weights_apart():
    torch.manual_seed(0)
    model = nn.Linear(30, 40)
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.weight *= 1.001
    assert weights_digest(model) != before
