"""Extraction of arbitrary sets of layers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hybridiff_compiler.capture import capture
from hybridiff_compiler.ir.errors import UsageError

from .conftest import build_case


def split(case, chosen):
    """The two stages `chosen` and the rest, each returning what the other reads."""
    graph = case.captured.layers
    rest = [name for name in graph.names if name not in chosen]
    return [
        case.captured.extract(mine, [value.name for value in graph.crossing(mine, others)])
        for mine, others in ((chosen, rest), (rest, chosen))
    ]


def assert_exact(case, stage):
    """On exact boundary values the stage returns exactly the estimate and values of the whole denoiser."""
    outputs = case.run(stage, case.values)
    assert len(outputs) == stage.has_estimate + len(stage.values_out)
    assert not stage.has_estimate or torch.equal(outputs[0], case.estimate)
    for name, output in zip(stage.values_out, outputs[stage.has_estimate :]):
        assert torch.equal(output, case.values[name]), name
        assert output.is_contiguous()


def test_nested_split_of_the_unet(unet):
    graph = unet.captured.layers
    inner = [n for n in graph.names if n.startswith(("down_blocks.1", "mid_block", "up_blocks.0.resnets.0"))]
    outer = [n for n in graph.names if n not in inner]
    inside, outside = split(unet, inner)
    assert graph.crossing(inner, outer)
    assert graph.crossing(outer, inner)
    assert not inside.has_estimate
    assert outside.has_estimate
    assert set(inside.values_in) == set(outside.values_out)
    assert set(outside.values_in) == set(inside.values_out)
    assert_exact(unet, inside)
    assert_exact(unet, outside)


def test_nested_split_runs_as_a_sequence(unet):
    """Outer-front, inner, outer-back, passing only what the stages name: bit-exact, nothing from outside."""
    names = unet.captured.layers.names
    parts = [names[:6], names[6:15], names[15:]]
    values = {}
    for part in parts:
        others = [n for n in names if n not in part]
        stage = unet.captured.extract(part, [v.name for v in unet.captured.layers.crossing(part, others)])
        outputs = unet.run(stage, values)
        values |= dict(zip(stage.values_out, outputs[stage.has_estimate :]))
    assert torch.equal(outputs[0], unet.estimate)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("name", ["unet", "sd3", "wan"])
def test_any_two_stages_agree_with_the_whole(name, data, make_case):
    case = make_case(name)
    names = case.captured.layers.names
    chosen = data.draw(st.sets(st.sampled_from(names[:-1]), min_size=1))
    for stage in split(case, [n for n in names if n in chosen]):
        assert_exact(case, stage)


def test_a_stage_holds_only_what_it_needs(sd3):
    graph = sd3.captured.layers
    name = "transformer_blocks.1"
    stage = sd3.captured.extract([name], [value.name for value in graph.values if value.producer == name])
    parameters = dict(stage.module.named_parameters())
    own = dict(sd3.denoiser.named_parameters())
    assert parameters
    assert all(name.startswith("transformer_blocks.1.") for name in parameters)
    assert all(parameter is own[name] for name, parameter in parameters.items())
    assert stage.inputs == ()


def test_unneeded_nodes_are_left_out(unet):
    whole = unet.captured.whole()
    front = [v for v in unet.captured.layers.values if v.producer == "time_embedding"]
    stage = unet.captured.extract(unet.captured.layers.names[:-1], [front[0].name])
    assert set(stage.inputs) <= {"timestep", "sample"}
    assert len(stage.module.graph.nodes) < len(whole.module.graph.nodes) / 4


def test_weight_edits_are_seen(sd3):
    stage = sd3.captured.whole()
    weight = sd3.denoiser.proj_out.weight
    with torch.no_grad():
        weight.mul_(2)
        try:
            (changed,) = sd3.run(stage, {})
            assert torch.equal(changed, sd3.denoiser(**sd3.kwargs)[0])
            assert not torch.equal(changed, sd3.estimate)
        finally:
            weight.div_(2)


def test_taps_keep_their_order_and_count_once(unet):
    names = [value.name for value in unet.captured.layers.values[:3]]
    stage = unet.captured.whole([*reversed(names), names[0]])
    assert stage.values_out == tuple(reversed(names))
    assert stage.values_in == ()
    assert_exact(unet, stage)


@pytest.mark.parametrize(
    ("layers", "taps", "text"),
    [
        ([], [], "got none"),
        (["nowhere"], [], r"got \['nowhere'\]; it has \d+ layers: pos_embed"),
        (["pos_embed"], [], "without the output layer .'proj_out'. returns nothing"),
        (["proj_out"], ["missing"], "'missing' belongs to 'no layer'"),
    ],
)
def test_impossible_stages_are_refused(sd3, layers, taps, text):
    with pytest.raises(UsageError, match=text):
        sd3.captured.extract(layers, taps)


def test_taps_of_other_layers_are_refused(sd3):
    value = sd3.captured.layers.values[0]
    with pytest.raises(UsageError, match=f"{value.name!r} belongs to {value.producer!r}"):
        sd3.captured.extract([sd3.captured.layers.output], [value.name])


def test_multi_output_operations_are_no_taps(sd3):
    node = next(n for n in sd3.captured.graph_module.graph.nodes if n.target is torch.ops.aten.chunk.default)
    with pytest.raises(UsageError, match=f"tap {node.name!r} has several outputs.*getitem"):
        sd3.captured.whole([node.name])


class Writing(nn.Module):
    """In-place writes through views that cross the border between its blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.SiLU(inplace=True)) for _ in range(3))

    def forward(self, sample, return_dict: bool = True):
        hidden = sample.clone()
        for block in self.blocks:
            view = hidden.transpose(0, 1)[1:3]
            hidden[:, ::2] = block(hidden)[:, 1::2]
            view.add_(1).mul_(hidden.t()[3:5])
            hidden = hidden.view(-1, 6)
        return (hidden.add_(view.sum()),)


def test_inplace_writes_are_functionalised():
    case = build_case(Writing(), {"sample": torch.randn(4, 6)})
    assert len(case.captured.layers.layers) == 3
    before = case.tensors["sample"].clone()
    for cut in (1, 2):
        for stage in split(case, case.captured.layers.names[:cut]):
            assert_exact(case, stage)
    assert torch.equal(case.tensors["sample"], before)


class Transposing(nn.Module):
    """A value that crosses with permuted strides and is then viewed."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(16, 16)

    def forward(self, sample, return_dict: bool = True):
        hidden = self.first(sample).permute(0, 2, 3, 1)
        hidden = hidden + 1  # keeps the permuted strides
        hidden = hidden.permute(0, 3, 1, 2).view(1, 8, 16)
        return (self.last(hidden),)


@pytest.mark.parametrize("copy", [True, False])
def test_boundary_values_may_have_any_strides(copy):
    case = build_case(Transposing(), {"sample": torch.randn(1, 3, 4, 4)})
    front, back = case.captured.layers.names
    (name,) = (value.name for value in case.captured.layers.values)
    (sent,) = case.run(case.captured.extract([front], [name]), {})
    assert torch.equal(case.run(case.captured.extract([back]), {name: sent}, copy=copy)[0], case.estimate)
    for value in (sent.contiguous(), sent.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(case.run(case.captured.extract([back]), {name: value}, copy=False)[0], case.estimate)


def test_stages_are_compilable(sd3):
    stage = sd3.captured.extract(
        ["transformer_blocks.1"], [v.name for v in sd3.captured.layers.values if v.producer == "transformer_blocks.1"]
    )
    compiled = torch.compile(stage.module, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        outputs = compiled(*[sd3.values[name] for name in stage.values_in])
    for name, output in zip(stage.values_out, outputs):
        assert torch.allclose(output, sd3.values[name], atol=1e-5)


def test_capture_of_a_stage_input_order_is_stable(sd3):
    again = capture(sd3.denoiser, (), sd3.kwargs)
    for name in sd3.captured.layers.names[3:5]:
        taps = [v.name for v in sd3.captured.layers.values if v.producer == name]
        one, two = sd3.captured.extract([name], taps), again.extract([name], taps)
        assert (one.inputs, one.values_in, one.values_out) == (two.inputs, two.values_in, two.values_out)
