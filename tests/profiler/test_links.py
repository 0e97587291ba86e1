"""Links: the fit on made-up messages, and a real measurement between processes."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridiff_compiler.ir import Costs, Link, UsageError, WorkerError
from hybridiff_compiler.profiler.links import SIZES, fit_alpha_beta, links_from_samples, measure_links, with_links

LATENCIES = st.floats(1e-6, 1e-2)
BANDWIDTHS = st.floats(1e8, 1e12)


@given(LATENCIES, BANDWIDTHS)
def test_exact_lines_are_found(latency, bandwidth):
    seconds = [latency + size / bandwidth for size in SIZES]
    fitted, rate, residual = fit_alpha_beta(SIZES, seconds)
    predicted = [fitted + size / rate for size in SIZES]
    assert predicted == pytest.approx(seconds, rel=1e-3)
    assert residual < 1e-3


@given(st.floats(1e-5, 1e-4), st.floats(1e9, 1e11), st.integers(0, len(SIZES) - 1), st.integers(0, 2**32 - 1))
def test_noise_and_one_disturbed_size_bend_the_line_little(latency, bandwidth, disturbed, seed):
    exact = latency + np.array(SIZES) / bandwidth
    seconds = exact * np.random.default_rng(seed).uniform(0.97, 1.03, len(SIZES))
    seconds[disturbed] *= 3
    fitted, rate, _ = fit_alpha_beta(SIZES, seconds)
    others = np.arange(len(SIZES)) != disturbed
    assert (np.abs((fitted + np.array(SIZES) / rate) / exact - 1)[others] < 0.35).all()


def test_directions_are_kept_apart():
    def chain(out):
        return {size: [2 * 1e-5 + size / out] * 3 for size in (64, *SIZES)}

    links, broadcasts = links_from_samples({"1>0": chain(2e9), "0>1": chain(8e9), "0*": chain(4e9)}, 2)
    assert [(link.source, link.target) for link in links] == [(0, 1), (1, 0)]
    assert [link.bytes_per_s for link in links] == pytest.approx([8e9, 2e9], rel=1e-2)
    assert [link.latency_s for link in links] == pytest.approx([1e-5, 1e-5], rel=2e-2)
    assert (broadcasts[0].root, broadcasts[0].ranks) == (0, 2)
    assert broadcasts[0].bytes_per_s == pytest.approx(4e9, rel=1e-2)
    assert links[0].seconds(8_000_000) == pytest.approx(1e-3, rel=2e-2)


def test_three_processes_measure_every_pair():
    links, broadcasts = measure_links(["cpu"] * 3, sizes=(4096, 1 << 18), repeats=3)
    assert {(link.source, link.target) for link in links} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert [broadcast.root for broadcast in broadcasts] == [0, 1, 2]
    assert all(x.bytes_per_s > 0 and x.latency_s >= 0 and len(x.points) == 3 for x in (*links, *broadcasts))


def test_a_measurement_that_takes_too_long_is_given_up():
    before = _children()
    with pytest.raises(WorkerError, match=r"did not answer within 0\.2 s"):
        measure_links(["cpu"] * 2, timeout_s=0.2)
    assert _children() <= before


def test_bad_requests_are_refused():
    with pytest.raises(UsageError, match="got 1 device"):
        measure_links(["cpu"])
    with pytest.raises(UsageError, match="all on cpu or all on cuda"):
        measure_links(["cpu", "cuda:0"])
    with pytest.raises(UsageError, match="two different ones"):
        measure_links(["cpu", "cpu"], sizes=(4096, 4096))


def test_one_device_has_no_links():
    costs = Costs(layers={1: (1.0,)}, links=(Link(source=0, target=1, latency_s=0, bytes_per_s=1),))
    assert with_links(costs, ["cpu"]) == costs


def _children():
    return {pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == os.getpid()}


def _parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return None
