"""What does not have to be computed at every step is taken out of a stage graph.

Prompt embeddings enter a denoiser anew at every step, and with them everything that is made of them alone: keys and
values of every cross-attention, projections of the prompt, embeddings of sizes. It is computed once per generation.

What follows from these and the timestep, such as the modulations of every block of a transformer, is another matter: it
changes with every step, but all timesteps are known from the start. One after the other, such products read all their
weights (a third of those of SD3) for a single vector; for `STEPS` timesteps at a time they read them once.

`hoist` cuts a stage graph into these parts and the rest, which takes their results as further arguments.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..capture import StageGraph
from ..capture.flops import count_flops
from .for_steps import STEPS, for_steps, repeated

__all__ = ["Hoisted", "Parts", "hoist"]


@dataclass(frozen=True)
class Parts:
    """A stage graph cut into parts.

    The arguments of the parts are, in this order, those of the stage, the results of `once`, and one timestep's results
    of `timed`.
    """

    once: StageGraph | None
    """From steady inputs to the values that the others take of them."""
    timed: StageGraph | None
    """From `STEPS` timesteps (the first argument, `[STEPS, ...]`) and what `once` may use and makes, to values for each
    of these timesteps (`[STEPS, ...]`)."""
    each: StageGraph
    """The stage with all these values as last arguments; it still takes all its own."""
    once_takes: tuple[int, ...]
    """Positions of the arguments of `once`."""
    timed_takes: tuple[int, ...]
    """Positions of the arguments of `timed`, the timestep first."""


@dataclass(frozen=True)
class Hoisted:
    """Executables of `Parts`, with the calling convention of the stage that was cut."""

    once: Callable[..., Sequence[Tensor]] | None
    timed: Callable[..., Sequence[Tensor]] | None
    each: Callable[..., Sequence[Tensor]]
    once_takes: tuple[int, ...]
    timed_takes: tuple[int, ...]

    @classmethod
    def build(cls, parts: Parts, compiled: Callable[[StageGraph], Callable[..., Sequence[Tensor]]]) -> Hoisted:
        """Every part compiled."""
        return cls(
            once=None if parts.once is None else compiled(parts.once),
            timed=None if parts.timed is None else compiled(parts.timed),
            each=compiled(parts.each), once_takes=parts.once_takes, timed_takes=parts.timed_takes,
        )

    def __call__(self, *arguments: Tensor) -> Sequence[Tensor]:
        """All parts; whoever calls often may keep the results of `once` and `timed` for as long as what they take
        stays the same."""
        return self.each(*self.given(arguments))

    def given(self, arguments: Sequence[Tensor]) -> list[Tensor]:
        """The arguments of `each`, computed from those of the stage."""
        given = list(arguments)
        if self.once is not None:
            given += self.once(*(given[index] for index in self.once_takes))
        if self.timed is not None:
            timestep, *others = (given[index] for index in self.timed_takes)
            given += [values[0] for values in self.timed(repeated(timestep), *others)]
        return given


def hoist(stage: StageGraph) -> Parts | None:
    """Cut `stage`; None when there is no arithmetic that need not be done at every step.

    Only values that took arithmetic (products, convolutions) are handed over: what is merely rearranged, converted or
    added costs nothing where it is read, and less memory traffic than its result.
    """
    own = len(stage.inputs) + len(stage.values_in)
    once = _cut(stage, {node for node, path in _leaves(stage) if path in stage.steady})
    rest = stage if once is None else once.rest
    timestep = next((node for node, path in _leaves(rest) if path == stage.timestep), None)
    timed, many = None, None
    if timestep is not None:
        steady = {node for node, path in _leaves(rest) if path in stage.steady}
        timed = _cut(rest, {timestep, *steady, *_placeholders(rest)[own:]}, first=timestep)
        many = None if timed is None else for_steps(timed.part)
    if once is None and many is None:
        return None
    return Parts(
        once=None if once is None else once.part, once_takes=() if once is None else once.takes, timed=many,
        timed_takes=() if many is None or timed is None else timed.takes,
        each=rest if many is None or timed is None else timed.rest,
    )


@dataclass(frozen=True)
class _Halves:
    """A stage cut in two."""

    part: StageGraph
    takes: tuple[int, ...]
    """Which of the stage's arguments the part takes."""
    rest: StageGraph
    """The stage with the part's results as further arguments."""


def _cut(stage: StageGraph, known: Collection[fx.Node], *, first: fx.Node | None = None) -> _Halves | None:
    """Take out what `stage` makes of the arguments `known` alone; None: no arithmetic is made of them, or not of
    `first`, the timestep, which then leads the arguments."""
    nodes = list(stage.module.graph.nodes)
    placeholders = _placeholders(stage)
    names = dict(zip(placeholders, (*stage.inputs, *stage.values_in)))
    inside = _made_of(nodes, known)
    flops = count_flops(stage.module.graph, inside)
    if first is not None:
        inside = _made_of(nodes, known, but=_not_for_steps([node for node in nodes if node in inside], flops))
    heavy: set[fx.Node] = set()
    for node in nodes:
        if node in inside and (node.name in flops or any(source in heavy for source in node.all_input_nodes)):
            heavy.add(node)
    handed: list[fx.Node] = []
    again: set[fx.Node] = set()
    for node in reversed(nodes):
        if node in inside and any(user not in inside or user in again for user in node.users):
            if node.name in flops or (node in heavy and not _is_light(node, heavy, even=first is not None)):
                handed.append(node)
            elif any(user in inside for user in node.users):
                again.add(node)
            else:
                inside.discard(node)
    if not handed:
        return None
    handed.reverse()
    results = tuple(node.name for node in handed)
    taken = [node for node in placeholders if node in known and any(user in inside for user in node.users)]
    if first is not None:
        if first not in taken:
            return None
        taken = [first, *(node for node in taken if node is not first)]
    part = replace(
        stage, module=_part(stage.module, nodes, taken, inside, handed),
        inputs=tuple(names[node] for node in taken if names[node] in stage.inputs),
        values_in=tuple(names[node] for node in taken if names[node] not in stage.inputs),
        values_out=results, has_estimate=False,
    )
    rest = replace(
        stage, module=_rest(stage.module, nodes, inside - again, handed), values_in=(*stage.values_in, *results),
    )
    return _Halves(part, tuple(placeholders.index(node) for node in taken), rest)


def _made_of(
    nodes: Sequence[fx.Node], known: Collection[fx.Node], *, but: Collection[fx.Node] = ()
) -> set[fx.Node]:
    """What can be computed from `known` and weights alone, without the nodes `but`."""
    made: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and node not in but and _is_pure(node) and all(
            source in known or source in made or source.op == "get_attr" for source in node.all_input_nodes
        ):
            made.add(node)
    return made


def _leaves(stage: StageGraph) -> list[tuple[fx.Node, str]]:
    """The arguments that are inputs of the denoiser, with their paths."""
    return list(zip(_placeholders(stage), stage.inputs))


def _placeholders(stage: StageGraph) -> list[fx.Node]:
    return [node for node in stage.module.graph.nodes if node.op == "placeholder"]


def _part(
    module: fx.GraphModule, nodes: Sequence[fx.Node], taken: Sequence[fx.Node], inside: set[fx.Node],
    handed: Sequence[fx.Node],
) -> fx.GraphModule:
    graph = fx.Graph()
    copied = {node: graph.node_copy(node) for node in taken}
    for node in nodes:
        if node in inside or (node.op == "get_attr" and any(user in inside for user in node.users)):
            copied[node] = graph.node_copy(node, copied.__getitem__)
    results = []
    for node in handed:
        result = graph.call_function(torch.ops.aten.contiguous.default, (copied[node],))
        result.meta = {**node.meta, "val": node.meta["val"].contiguous()}
        results.append(result)
    graph.output(tuple(results))
    return fx.GraphModule(module, graph, class_name="Part").eval()


def _rest(
    module: fx.GraphModule, nodes: Sequence[fx.Node], done: set[fx.Node], handed: Sequence[fx.Node]
) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node.op == "placeholder":
            copied[node] = graph.node_copy(node)
    for node in handed:
        copied[node] = graph.placeholder(node.name)
        copied[node].meta = {**node.meta, "val": node.meta["val"].contiguous()}
    for node in nodes:
        read = node.op != "get_attr" or any(user not in done for user in node.users)
        if node not in done and node not in copied and read:
            copied[node] = graph.node_copy(node, copied.__getitem__)
    return fx.GraphModule(module, graph, class_name="Stage").eval()


def _is_pure(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )


def _is_light(node: fx.Node, heavy: Collection[fx.Node], *, even: bool) -> bool:
    """Whether `node`, which is no product, only looks at its input in another way, or makes more of it than there was
    (`even`: or as much)."""
    if node.target is operator.getitem:
        return True
    assert isinstance(node.target, torch._ops.OpOverload)
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return True
    given = sum(_nbytes(source) for source in node.all_input_nodes if source in heavy)
    return bool(given) and (_nbytes(node) > given or (even and _nbytes(node) == given))


def _not_for_steps(nodes: Sequence[fx.Node], products: Container[str]) -> set[fx.Node]:
    """Those of `nodes`, which are in graph order, that had better be done one timestep at a time.

    A product pays if its results for `STEPS` timesteps are smaller than the weights that would be read for each of
    them; others, such as projections of a whole prompt, keep the device busy by themselves. What is made of results of
    such products and is larger than any of them is made of something large as well, and costs little where it is read.
    """
    def pays(node: fx.Node) -> bool:
        return STEPS * _nbytes(node) <= sum(_nbytes(s) for s in node.all_input_nodes if s.op == "get_attr")

    left = {node for node in nodes if node.name in products and not pays(node)}
    kept = {node for node in nodes if node.name in products and node not in left}
    limit = max(map(_nbytes, kept), default=0)
    for node in nodes:
        if any(source in kept for source in node.all_input_nodes):
            (left if _nbytes(node) > limit else kept).add(node)
    return left


def _nbytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
