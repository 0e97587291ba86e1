"""Small layer graphs for the planner's tests, random and U-Net shaped."""

from __future__ import annotations

from hypothesis import strategies as st

from hybridiff_compiler.ir import Layer, LayerGraph, Value


def graph_of(size: int, edges: list[tuple[int, tuple[int, ...], int]], output: int | None = None) -> LayerGraph:
    """A graph of layers `l0`, `l1`, ... and one value per edge `(producer, consumers, bytes)`."""
    return LayerGraph(
        layers=tuple(Layer(name=f"l{i}") for i in range(size)),
        values=tuple(
            Value(
                name=f"v{k}", producer=f"l{p}", consumers=tuple(f"l{c}" for c in cs), shape=(b,), dtype="int8", nbytes=b
            )
            for k, (p, cs, b) in enumerate(edges)
        ),
        output=f"l{size - 1 if output is None else output}",
    )


def unet_like(depth: int) -> LayerGraph:
    """A time embedding read by all, a way down and a way up with skips; bytes halve with depth."""
    size = 2 * depth + 2
    weight = [4 << max(0, 12 - min(i, size - 1 - i)) for i in range(size)]
    edges = [(0, tuple(range(1, size)), 1)]
    edges += [(i, (i + 1,), weight[i]) for i in range(1, size - 1)]
    edges += [(i, (size - i,), weight[i]) for i in range(2, depth + 1) if size - i > i + 1]
    return graph_of(size, edges)


@st.composite
def graphs(draw: st.DrawFn, max_layers: int = 7) -> LayerGraph:
    """Random acyclic graphs, the output anywhere from the middle on."""
    size = draw(st.integers(2, max_layers))
    edges = []
    for producer in range(size - 1):
        for _ in range(draw(st.integers(0, 2))):
            consumers = draw(st.sets(st.integers(producer + 1, size - 1), min_size=1, max_size=3))
            edges.append((producer, tuple(sorted(consumers)), draw(st.integers(0, 9))))
    return graph_of(size, edges, output=draw(st.integers(size // 2, size - 1)))
