import pytest
import torch

from hybridiff_compiler.cli.profile_costs import link_devices, parse_link
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


def test_a_link_is_two_numbers():
    link = parse_link("12,260")
    assert link.latency_s == pytest.approx(12e-6)
    assert link.bytes_per_s == pytest.approx(260e9)
    assert parse_link(None) is None
    for text in ("12", "a,b", "12,0", "1,2,3"):
        with pytest.raises(UsageError, match="microseconds"):
            parse_link(text)
