"""Estimates for hardware that is not at hand: the fit finds what made the data, and carries over."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planner.profiles import make_profile

from hybridiff_compiler.ir import Costs, InputError, LayerGraph, Profile, UsageError
from hybridiff_compiler.planner import candidate_partitions, measured_patterns, plan
from hybridiff_compiler.profiler.devices import DEVICES, find_device, recognise
from hybridiff_compiler.profiler.roofline import (
    DEFAULT,
    Efficiency,
    estimate_layers,
    estimate_profile,
    fit_efficiency,
)


def tables(graph, seconds):
    partitions = candidate_partitions(graph, seconds, (2,))
    return partitions, measured_patterns(partitions, (2,))


def loaded_graph(seed=0):
    """A U-Net shaped graph whose layers have arithmetic and traffic."""
    rng = np.random.default_rng(seed)
    graph = make_profile().graph
    layers = tuple(
        layer.model_copy(update={
            "flops": float(rng.uniform(1e9, 1e12)), "parameter_bytes": int(rng.integers(10**5, 10**8)),
            "traffic_bytes": int(rng.integers(10**8, 10**9)),
        })
        for layer in graph.layers
    )
    return LayerGraph(layers=layers, values=graph.values, output=graph.output)


def measured(graph, device, efficiency, name="NVIDIA H100 80GB HBM3"):
    profile = make_profile()
    layers = {batch: tuple(estimate_layers(graph, "float16", batch, device, efficiency)) for batch in (1, 2)}
    model = profile.model.model_copy(update={"fingerprint": graph.fingerprint()})
    return profile.model_copy(update={
        "graph": graph, "model": model, "costs": profile.costs.model_copy(update={"layers": layers, "stages": ()}),
        "provenance": profile.provenance.model_copy(update={"device": name}), "errors": (), "partitions": (),
        "patterns": (),
    })


@given(st.floats(1.05, 5), st.floats(0.3, 5), st.floats(0, 2e-5))
def test_the_fit_finds_the_efficiency(arithmetic, memory, start):
    graph = loaded_graph()
    profile = measured(graph, DEVICES["h100"], Efficiency(arithmetic, memory, start, "made up"))
    found = fit_efficiency(profile)
    assert (found.arithmetic, found.memory) == pytest.approx((arithmetic, memory), rel=0.02)
    assert found.start_s == pytest.approx(start, abs=1e-6)


def test_a_measured_profile_carries_over_layer_by_layer():
    graph = loaded_graph()
    wanted = Efficiency(1.7, 1.2, 3e-6, "made up")
    here = measured(graph, DEVICES["h100"], wanted)
    noise = np.random.default_rng(1).uniform(0.7, 1.4, len(graph.layers))
    noisy = here.model_copy(update={"costs": here.costs.model_copy(update={
        "layers": {batch: tuple(np.array(times) * noise) for batch, times in here.costs.layers.items()},
    })})
    there = estimate_profile(here.model, graph, DEVICES["h200"], tables, fit=noisy)
    truth = estimate_layers(graph, "float16", 1, DEVICES["h200"], wanted) * noise
    assert sum(there.costs.layers[1]) == pytest.approx(truth.sum(), rel=0.05)
    assert there.provenance.estimated.startswith("roofline: fitted on")
    assert there.costs.timing.method == "roofline"
    assert {(link.source, link.target) for link in there.costs.links} == {(0, 1), (1, 0)}


def test_an_estimated_profile_can_be_planned_with(tmp_path):
    graph = loaded_graph()
    profile = estimate_profile(make_profile().model.model_copy(update={"fingerprint": graph.fingerprint()}), graph,
                               DEVICES["rtx3090"], tables)
    assert plan(profile, gpus=2, policy="exact").predictions.speedup > 1.5
    assert Profile.load(profile.save(tmp_path / "estimate.json")) == profile
    assert DEFAULT.source in profile.provenance.estimated
    with pytest.raises(InputError, match="on an estimated profile"):
        fit_efficiency(profile)


def test_a_faster_device_is_faster():
    graph = loaded_graph()
    whole = {name: estimate_layers(graph, "float16", 1, device, DEFAULT).sum() for name, device in DEVICES.items()}
    assert whole["h200"] < whole["h100"] < whole["a100"] < whole["rtx3090"] < whole["t4"]
    assert whole["rtx3090"] == whole["rtx3090-pcie3"]


def test_devices_are_found_by_name():
    assert recognise("NVIDIA H100 80GB HBM3") is DEVICES["h100"]
    assert recognise("NVIDIA H100 PCIe") is DEVICES["h100-pcie"]
    assert recognise("NVIDIA GeForce RTX 3090") is DEVICES["rtx3090"]
    assert recognise("NVIDIA H200") is DEVICES["h200"]
    assert recognise("NVIDIA A100-SXM4-80GB") is DEVICES["a100"]
    assert recognise("NVIDIA RTX A6000") is DEVICES["a6000"]
    assert recognise("Tesla T4") is DEVICES["t4"]
    assert recognise("AMD EPYC 7763") is None
    with pytest.raises(UsageError, match="no peak figures of 'gtx1080'"):
        find_device("gtx1080")


@pytest.mark.parametrize("name", [
    "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 NVL", "NVIDIA GH200 480GB",
    "NVIDIA H200 NVL", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA T400", "NVIDIA GeForce GT 430", "NVIDIA L40",
])
def test_relatives_with_other_peaks_are_not_taken_for_a_device(name):
    assert recognise(name) is None


def test_dtypes_without_a_rate_are_refused():
    assert DEVICES["t4"].flops("float16") == 65e12
    assert DEVICES["h100"].flops("bfloat16") == DEVICES["h100"].flops("float16")
    with pytest.raises(InputError, match="no peak arithmetic of Tesla T4 in bfloat16; it is known in float16, float32"):
        estimate_layers(loaded_graph(), "bfloat16", 1, DEVICES["t4"], DEFAULT)
    with pytest.raises(InputError, match="in float64"):
        DEVICES["h100"].flops("float64")


def test_a_profile_without_times_cannot_be_fitted_on():
    here = measured(loaded_graph(), DEVICES["h100"], DEFAULT)
    costs = Costs(layers={1: (0.0,) * len(here.graph.layers)})
    with pytest.raises(InputError, match="without layer times"):
        fit_efficiency(here.model_copy(update={"costs": costs}))


def test_unknown_devices_cannot_be_fitted_on():
    with pytest.raises(InputError, match="no peak figures of 'synthetic'"):
        fit_efficiency(make_profile())
