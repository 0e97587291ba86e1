import pytest
import torch

from hybridiff_compiler.cli.profile_costs import link_devices
from hybridiff_compiler.ir import UsageError


def test_links_are_measured_between_the_ranks_asked_for(monkeypatch):
    assert link_devices("cpu", None, quick=False) == ("cpu", "cpu")
    assert link_devices("cpu", 3, quick=True) == ("cpu", "cpu", "cpu")
    assert link_devices("cpu", None, quick=True) == ()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert link_devices("cuda", None, quick=False) == ("cuda:0", "cuda:1")
    assert link_devices("cuda", 1, quick=False) == ("cuda:0",)
    with pytest.raises(UsageError, match="got --gpus 4, this machine has 2"):
        link_devices("cuda", 4, quick=False)
