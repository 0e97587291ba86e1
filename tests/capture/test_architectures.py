"""Real architectures at 1024 px in fp16, without weights."""

from collections import Counter

import networkx as nx
import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from hybridiff_compiler.capture import capture, meta_denoiser
from hybridiff_compiler.quality.architectures import SD3_TRANSFORMER, SDXL_UNET


def half(*shape):
    return torch.empty(shape, dtype=torch.float16, device="meta")


@pytest.fixture(scope="module")
def sdxl():
    denoiser = meta_denoiser(UNet2DConditionModel, dict(SDXL_UNET), torch.float16)
    call = {"sample": half(1, 4, 128, 128), "timestep": torch.tensor(981), "encoder_hidden_states": half(1, 77, 2048)}
    added = {"text_embeds": half(1, 1280), "time_ids": half(1, 6)}
    return denoiser, capture(denoiser, (), {**call, "added_cond_kwargs": added, "return_dict": False})


@pytest.fixture(scope="module")
def sd3():
    denoiser = meta_denoiser(SD3Transformer2DModel, dict(SD3_TRANSFORMER), torch.float16)
    call = {"hidden_states": half(1, 16, 128, 128), "timestep": half(1), "pooled_projections": half(1, 2048)}
    return denoiser, capture(denoiser, (), {**call, "encoder_hidden_states": half(1, 333, 4096), "return_dict": False})


def check(denoiser, captured, parameters):
    graph = captured.layers
    assert nx.is_directed_acyclic_graph(graph.to_networkx())
    assert {id(p) for p in captured.graph_module.parameters()} == {id(p) for p in denoiser.parameters()}
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    assert sum(layer.parameter_bytes for layer in graph.layers) == sum(t.numel() * t.element_size() for t in tensors)
    assert all(value.dtype == "float16" for value in graph.values)
    assert captured.extract(graph.names).has_estimate


def test_sdxl(sdxl):
    denoiser, captured = sdxl
    check(denoiser, captured, 2_567_463_684)
    graph = captured.layers
    kinds = Counter(layer.kind for layer in graph.layers)
    assert kinds == {
        "BasicTransformerBlock": 70,
        "ResnetBlock2D": 17,
        "Downsample2D": 2,
        "Upsample2D": 2,
        "Linear": 22,
        "TimestepEmbedding": 2,
        "Conv2d": 2,
    }
    assert sum(layer.flops for layer in graph.layers) == pytest.approx(6.76e12, rel=0.01)


def test_nested_split_of_sdxl(sdxl):
    """down_blocks.2 to up_blocks.0 without its upsampler: 2/3 of the work, 4 MB of traffic."""
    _, captured = sdxl
    graph = captured.layers
    inside = ("down_blocks.2", "mid_block", "up_blocks.0")
    inner = [n for n in graph.names if n.startswith(inside) and "upsamplers" not in n]
    outer = [n for n in graph.names if n not in inner]
    assert sum(v.nbytes for v in graph.crossing(outer, inner)) == pytest.approx(1.31e6, rel=0.01)
    assert sum(v.nbytes for v in graph.crossing(inner, outer)) == pytest.approx(2.62e6, rel=0.01)
    work = {layer.name: layer.flops for layer in graph.layers}
    assert sum(work[name] for name in inner) / sum(work.values()) == pytest.approx(0.675, abs=0.005)
    stage = captured.extract(inner, [v.name for v in graph.crossing(inner, outer)])
    assert not stage.has_estimate
    assert stage.inputs == ("encoder_hidden_states",)
    assert len(stage.values_in) == 2


def test_sd3_medium(sd3):
    denoiser, captured = sd3
    check(denoiser, captured, 2_028_328_000)
    assert captured.layers.names == (
        "pos_embed",
        "time_text_embed",
        "context_embedder",
        *(f"transformer_blocks.{index}" for index in range(24)),
        "norm_out",
        "proj_out",
    )
    names = captured.layers.names
    for cut in range(5, 26):
        assert sum(v.nbytes for v in captured.layers.crossing(names[:cut], names[cut:])) < 13.7e6
