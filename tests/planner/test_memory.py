"""Memory of ranks by hand."""

from __future__ import annotations

from hypothesis import given

from hybridiff_compiler.ir import CallSignature, Layer, LayerGraph, LeafSpec, Partition, Pattern, Value
from hybridiff_compiler.planner import plan, plan_memory
from hybridiff_compiler.planner.memory import latent_bytes, leaf_bytes, segment_activations

from .graphs import graph_of, graphs
from .profiles import make_profile

SIGNATURE = CallSignature(leaves=(
    LeafSpec(path="encoder_hidden_states", shape=(1, 3), dtype="float16"),
    LeafSpec(path="sample", shape=(1, 5), dtype="float32"),
    LeafSpec(path="guidance", constant="None"),
))
CALL, SAMPLE = 26, 20
CHAIN = LayerGraph(
    layers=tuple(
        Layer(name=f"l{i}", parameter_bytes=100 * (i + 1), traffic_bytes=100 * (i + 1) + 2 * i) for i in range(3)
    ),
    values=tuple(
        Value(name=f"v{i}", producer=f"l{i}", consumers=(f"l{i + 1}",), shape=(b,), dtype="int8", nbytes=b)
        for i, b in enumerate((10, 40))
    ),
    output="l2",
)
HALVES = Partition(name="linear", stages=(("l0",), ("l1", "l2")))
BRANCH = Pattern.parse("branch", "u0@0 c0@1 | cfg")
SINGLE = Pattern.parse("single", "u0@0 c0@0 | cfg")
PAPER = Pattern.parse("paper", "u0@0(u1~) c1@1(u0~) | mirror", partition="linear", stages=2)


def test_bytes_of_a_call() -> None:
    assert (leaf_bytes(SIGNATURE), latent_bytes(SIGNATURE)) == (CALL, SAMPLE)


def test_values_live_until_their_last_reader_inside() -> None:
    # Layer 1 reads 10 and writes 40 and has 1 of its own; layer 2 reads 40 and has 2.
    assert segment_activations(CHAIN, CHAIN.names) == 10 + 40 + 1
    assert segment_activations(CHAIN, ("l1", "l2")) == 40 + 2
    assert segment_activations(CHAIN, ("l2",)) == 2, "what comes from outside is no activation"
    skip = graph_of(4, [(0, (1, 3), 7), (1, (2,), 1), (2, (3,), 1)])
    assert segment_activations(skip, skip.names) == 9
    assert segment_activations(skip, ("l0", "l1", "l2")) == 8


@given(graphs())
def test_more_layers_need_no_less(graph: LayerGraph) -> None:
    for size in range(1, len(graph.names)):
        assert segment_activations(graph, graph.names[:size]) <= segment_activations(graph, graph.names[: size + 1])


def _total(patterns, **options):  # type: ignore[no-untyped-def]
    return plan_memory(CHAIN, SIGNATURE, patterns, (HALVES,), ranks=2, parameter_bytes=600, **options)


def test_without_recording_a_rank_needs_its_largest_graph() -> None:
    first, second = _total([BRANCH], recorded=False)
    assert (first.parameters, first.graphs) == (600, 51 + SAMPLE)
    assert first == second
    batched, idle = _total([SINGLE], recorded=False)
    assert batched.graphs == 2 * (51 + SAMPLE)
    assert (idle.graphs, idle.buffers) == (0, 0)


def test_recorded_graphs_share_a_pool_and_keep_their_ends() -> None:
    one, two = (_total(patterns)[0] for patterns in ([SINGLE], [SINGLE, BRANCH]))
    # The second graph warms up beside the pool of the first, whose results stay.
    assert two.graphs - one.graphs == 51 + SAMPLE
    assert two.buffers - one.buffers >= CALL


def test_what_does_not_run_at_every_step_is_kept_twice_or_more() -> None:
    layers = [
        layer.model_copy(update={"once_bytes": 1000, "timed_bytes": 64_000, "takes_timestep": layer.name == "l0"})
        for layer in CHAIN.layers
    ]
    graph = CHAIN.model_copy(update={"layers": tuple(layers)})

    def more(patterns, **options):  # type: ignore[no-untyped-def]
        arguments = {"ranks": 2, "parameter_bytes": 600} | options
        with_and_without = [
            plan_memory(each, SIGNATURE, patterns, (HALVES,), **arguments) for each in (graph, CHAIN)  # type: ignore[arg-type]
        ]
        return [a.total - b.total for a, b in zip(*with_and_without)]

    # A rank's one branch: 3 layers' results where they are made and where they are read, and two tables of them.
    assert more([BRANCH]) == [2 * 3000 + 2 * 3 * 64_000] * 2
    assert more([SINGLE]) == [2 * (2 * 3000 + 2 * 3 * 64_000), 0]
    assert more([BRANCH, SINGLE])[0] == more([BRANCH])[0] + more([SINGLE])[0]
    # The second stage does not read the timestep.
    assert more([PAPER]) == [2 * 1000 + 2 * 64_000, 2 * 2000]
    # One graph for both branches in turn keeps what belongs to either.
    relay = Pattern.parse("relay", "u0@0(u1-) c0@0(c1-) u1@1 c1@1 | cfg", partition="linear", stages=2)
    assert more([relay]) == [4 * 1000 + 3 * 64_000, 4 * 2000]
    assert more([BRANCH], recorded=False) == [0, 0]


def test_weights_of_own_stages_only() -> None:
    held = [memory.parameters for memory in _total([PAPER], stage_weights=True)]
    assert held == [100, 500]
    assert [memory.parameters for memory in _total([PAPER])] == [600, 600]


def test_images_scale_everything_but_parameters() -> None:
    one, three = (_total([PAPER], images=images, recorded=False)[0] for images in (1, 3))
    assert (three.graphs, three.buffers) == (3 * one.graphs, 3 * one.buffers)


def test_plans_say_what_every_rank_needs() -> None:
    made = plan(make_profile(), gpus=2, min_psnr=30)
    assert len(made.predictions.peak_bytes) == 2
    assert all(peak > 0 for peak in made.predictions.peak_bytes)
