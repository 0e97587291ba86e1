"""Stage-only weights: every rank holds the parameters of the stages that it evaluates, and stand-ins for all others.

A stand-in has shape, dtype and device of a parameter and the memory of one element, so that the denoiser can be
captured as if it were whole. What a rank needs follows from the plan's tables; nothing else may run the denoiser
meanwhile, so its own forward is closed.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..capture import CapturedDenoiser
from ..ir import WHOLE, Partition, Plan, UsageError, lower
from .handover import raw_bytes
from .transport import Channel, Transport

if TYPE_CHECKING:
    from ..bundle import StoredGraphs

__all__ = ["closed_forward", "held_bytes", "held_numbers", "only_held", "receive_held", "send_held", "stand_in"]

_GUARD = "hybridiff_compiler_stages"


def held_numbers(
    plan: Plan, denoiser: nn.Module, captured: CapturedDenoiser | StoredGraphs, tensors: Sequence[Tensor],
    everywhere: Iterable[Tensor] = (),
) -> list[list[int]]:
    """Per rank: which of `tensors` (positions) the stages read that it evaluates in some pattern.

    Args:
        plan: the tables.
        denoiser: whose tensors they are.
        captured: its graph.
        tensors: all that may be handed over.
        everywhere: those that every rank gets anyway.

    Raises:
        UsageError: the graphs come from a bundle, which does not tell what they read.
    """
    if not isinstance(captured, CapturedDenoiser):
        raise UsageError("a plan with weights='stages' cannot run from a bundle; give the plan itself")
    number = {id(tensor): index for index, tensor in enumerate(tensors)}
    partitions = {p.name: p for p in plan.partitions} | {WHOLE: Partition.whole(captured.layers)}
    layers: list[set[str]] = [set() for _ in plan.ranks]
    for segment in (segment for pattern in plan.patterns for segment in lower(pattern)):
        layers[segment.rank].update(partitions[segment.partition].evaluated(segment.stages))
    held: list[set[int]] = [{number[id(tensor)] for tensor in everywhere} for _ in plan.ranks]
    for node in captured.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        for source in node.all_input_nodes:
            if source.op == "get_attr" and str(source.target) not in captured.constants:
                tensor = operator.attrgetter(str(source.target))(denoiser)
                for rank, names in enumerate(layers):
                    if captured.layer_of[node.name] in names:
                        held[rank].add(number[id(tensor)])
    return [sorted(numbers) for numbers in held]


def stand_in(shape: Iterable[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A tensor that is only looked at from outside; its elements share one place in memory."""
    return torch.zeros((), dtype=dtype, device=device).expand(tuple(shape))


def held_bytes(module: nn.Module) -> int:
    """Memory that parameters and buffers of `module` really take up."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*module.parameters(), *module.buffers()) if tensor.numel()
    }
    return sum(storages.values())


def send_held(transport: Transport, tensors: Sequence[Tensor], held: Sequence[Collection[int]]) -> None:
    """On the driver: give every other rank the tensors that it holds, one after the other.

    Raises:
        PeerError: a rank is gone.
    """
    device = getattr(transport, "device", torch.device("cpu"))
    for rank in range(1, transport.world_size):
        for index in held[rank]:
            if tensors[index].numel():
                data = raw_bytes(tensors[index]).to(device)
                transport.wait(transport.send_bytes(rank, Channel.VALUES, data), rank, "sending to")
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def receive_held(transport: Transport, tensors: Sequence[Tensor], held: Collection[int]) -> None:
    """On another rank: take what `send_held` sends.

    Raises:
        PeerError: the driver is gone.
    """
    for index in held:
        if tensors[index].numel():
            transport.receive_bytes(0, Channel.VALUES, raw_bytes(tensors[index])).wait()


@contextmanager
def only_held(tensors: Sequence[Tensor], held: Collection[int], device: torch.device) -> Iterator[None]:
    """On the driver, while open: the tensors `held` on `device` and stand-ins for the others; all restored after.

    What was on a GPU waits in host memory meanwhile.
    """
    kept = []
    keep = set(held)
    with torch.no_grad():
        for index, tensor in enumerate(tensors):
            own, where = tensor.data, tensor.device
            if index in keep and where == device:
                continue
            tensor.data = own.to(device) if index in keep else stand_in(own.shape, own.dtype, device)
            kept.append((tensor, own.to("cpu"), where))
            del own
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, own, where in kept:
                tensor.data = own.to(where)


@contextmanager
def closed_forward(denoiser: nn.Module) -> Iterator[None]:
    """While open, the denoiser's own forward is refused: this process does not have all of its weights."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Refuse(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            raise UsageError(
                f"the plan does not cover this call of {type(module).__name__}, and with weights='stages' no rank "
                "has the whole of it; call the pipeline as it was planned (size, guidance, inputs), or plan with "
                "weights='whole'"
            )

    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(Refuse(), _GUARD)
    try:
        yield
    finally:
        registry.remove_hook(_GUARD)
