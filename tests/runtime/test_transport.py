"""Layouts, messages between two ranks in one process, and what a silent or lost peer looks like."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hybridiff_compiler.ir import CallSignature, LeafSpec
from hybridiff_compiler.runtime import transport
from hybridiff_compiler.runtime.orders import MAX_MISSED, Order, OrderInbox, OrderOutbox
from hybridiff_compiler.runtime.transport import Channel, Layout, PeerError, Transport

STEPS = 9
SIGNATURE = CallSignature(leaves=(
    LeafSpec(path="sample", shape=(1, 4, 8, 8), dtype="float32"),
    LeafSpec(path="timestep", shape=(), dtype="int64"),
    LeafSpec(path="text.embeds", shape=(1, 5, 8), dtype="float16"),
    LeafSpec(path="return_dict", constant="False"),
))


@pytest.fixture
def pair() -> Iterator[tuple[Transport, Transport]]:
    store = dist.HashStore()
    found: dict[int, Transport] = {}

    def connect(rank: int) -> None:
        found[rank] = Transport(store, rank, 2, timeout_s=1.0)

    other = threading.Thread(target=connect, args=(1,))
    other.start()
    connect(0)
    other.join()
    yield found[0], found[1]
    found[0].close()
    found[1].close()


def test_a_peer_that_never_connects_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_CONNECTING", timedelta(seconds=0.5))
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        Transport(dist.HashStore(), 0, 2, timeout_s=1.0)
    assert time.monotonic() - begin < 60


def test_transfers_have_longer_than_connecting(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Weights take a while."""
    monkeypatch.setattr(transport, "_CONNECTING", timedelta(seconds=2))
    first, second = request.getfixturevalue("pair")
    received = torch.zeros(8, dtype=torch.uint8)
    waiting = threading.Thread(target=second.broadcast, args=([received],))
    waiting.start()
    time.sleep(2.5)
    first.broadcast([torch.ones(8, dtype=torch.uint8)])
    waiting.join()
    assert bool(received.all())


def inputs(step: int, text: torch.Tensor) -> dict:
    sample = torch.full((2, 4, 8, 8), float(step))
    timestep = torch.tensor(step)
    return {
        branch: {"sample": sample[i:i + 1], "timestep": timestep, "text.embeds": text[i:i + 1]}
        for i, branch in enumerate(("uncond", "cond"))
    }


def test_layout_round_trip_of_mixed_types_and_empty_tensors() -> None:
    tensors = [torch.randn(3, 5), torch.tensor(7), torch.randn(0, 4), torch.tensor([True, False]),
               torch.randn(2, 2).half()]
    layout = Layout([(tuple(t.shape), t.dtype) for t in tensors])
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        view.copy_(tensor)
    for view, tensor in zip(layout.views(buffer), tensors, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)


def test_messages_keep_their_order_and_buffers_are_reused(pair) -> None:
    a, b = pair
    layout = Layout([((4,), torch.float32), ((2, 3), torch.int64)])
    seen = set()
    for step in range(6):
        incoming = b.receive(0, Channel.VALUES, layout)
        a.send(1, Channel.VALUES, layout, [torch.full((4,), step), torch.full((3, 2), step).t()])
        first, second = incoming.wait()
        assert torch.equal(first, torch.full((4,), float(step)))
        assert torch.equal(second, torch.full((2, 3), step))
        assert b.owns(first)
        assert b.owns(second[:, 1:])
        assert not b.owns(first.clone())
        seen.add(first.data_ptr())
    assert len(seen) == 2
    kept = b.receive(0, Channel.VALUES, layout, keep=True)
    a.send(1, Channel.VALUES, layout, [torch.zeros(4), torch.zeros(2, 3)])
    assert not b.owns(kept.wait()[0])
    assert a.sent_messages[Channel.VALUES] == 7
    assert a.sent_bytes[Channel.VALUES] == 7 * layout.nbytes


def test_buffers_made_in_inference_mode_serve_outside_of_it(pair) -> None:
    a, b = pair
    layout = Layout([((4,), torch.float32)])
    for mode in (True, False, True, False):
        with torch.inference_mode(mode):
            incoming = b.receive(0, Channel.VALUES, layout)
            a.send(1, Channel.VALUES, layout, [torch.ones(4)])
            assert torch.equal(incoming.wait()[0], torch.ones(4))


def test_silent_peer_times_out(pair) -> None:
    a, _ = pair
    start = time.monotonic()
    with pytest.raises(PeerError) as caught:
        a.receive(1, Channel.VALUES, Layout([((4,), torch.float32)])).wait()
    assert caught.value.timed_out
    assert caught.value.peer == 1
    assert time.monotonic() - start < 5


def test_lost_peer_is_noticed(pair) -> None:
    a, b = pair
    incoming = a.receive(1, Channel.VALUES, Layout([((4,), torch.float32)]))
    b.close()
    with pytest.raises(PeerError) as caught:
        incoming.wait()
    assert not caught.value.timed_out


def test_orders_carry_only_what_changed(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    text = torch.randn(2, 5, 8).half()
    sizes = []
    for step in range(3):
        outbox.note(inputs(step, text))
        before = a.sent_bytes[Channel.ORDERS]
        outbox.send(1, Order(1, step, 2, None, (1,) * step), ("cond",))
        sizes.append(a.sent_bytes[Channel.ORDERS] - before)
        order = inbox.receive()
        assert order == Order(1, step, 2, None, (1,) * step)
        assert torch.equal(inbox.inputs["cond"]["sample"], torch.full((1, 4, 8, 8), float(step)))
        assert inbox.inputs["cond"]["timestep"] == step
        assert torch.equal(inbox.inputs["cond"]["text.embeds"], text[1:])
        assert not inbox.inputs["uncond"]
    assert sizes[0] - sizes[1] == 128  # the embeddings, 80 bytes, aligned
    assert sizes[1] == sizes[2]


def test_the_timesteps_of_all_steps_travel_once_per_generation(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    text = torch.randn(2, 5, 8).half()
    for generation, length in enumerate((STEPS, STEPS, STEPS - 4)):
        timesteps, sizes = torch.arange(length) + generation, []
        for step in range(3):
            outbox.note(inputs(step, text), timesteps)
            before = a.sent_bytes[Channel.ORDERS]
            outbox.send(1, Order(generation, step, 0, None, has_timesteps=True), ("cond",))
            sizes.append(a.sent_bytes[Channel.ORDERS] - before)
            moment = inbox.moment(inbox.receive())
            assert moment is not None
            assert moment.step == step
            assert torch.equal(moment.timesteps[:length], timesteps)
        assert sizes[0] > sizes[1] == sizes[2]
    outbox.note(inputs(0, text))
    outbox.send(1, Order(3, 0, 0, None), ("cond",))
    assert inbox.moment(inbox.receive()) is None, "they are unknown in this generation"


def test_a_branch_that_is_needed_later_arrives_then(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    text = torch.randn(2, 5, 8).half()
    for step, branches in enumerate([("cond",), ("cond", "uncond"), (), ("uncond",)]):
        outbox.note(inputs(step, text))
        outbox.send(1, Order(1, step, 0, 3), branches)
        assert inbox.receive() == Order(1, step, 0, 3)
        for branch in branches:
            row = 0 if branch == "uncond" else 1
            assert torch.equal(inbox.inputs[branch]["text.embeds"], text[row:row + 1])
            assert inbox.inputs[branch]["timestep"] == step
            assert torch.equal(inbox.inputs[branch]["sample"], torch.full((1, 4, 8, 8), float(step)))


def test_in_place_edits_and_inference_tensors_travel(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    text = torch.zeros(2, 5, 8).half()
    for step in range(4):
        text.add_(1)
        outbox.note(inputs(0, text))
        outbox.send(1, Order(1, step, 0, None), ("uncond",))
        inbox.receive()
        assert torch.equal(inbox.inputs["uncond"]["text.embeds"], text[:1])
    with torch.inference_mode():
        hidden = torch.zeros(2, 5, 8).half()
        for step in range(3):
            hidden.add_(1)
            outbox.note(inputs(0, hidden))
            outbox.send(1, Order(1, step, 0, None), ("uncond",))
            inbox.receive()
            assert torch.equal(inbox.inputs["uncond"]["text.embeds"], hidden[:1])


def test_inputs_outlive_their_message(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    text = torch.randn(2, 5, 8).half()
    kept = []
    for step in range(4):
        outbox.note(inputs(step, text))
        outbox.send(1, Order(1, step, 0, None), ("cond",))
        inbox.receive()
        kept.append(inbox.inputs["cond"]["sample"])
    assert [float(t[0, 0, 0, 0]) for t in kept] == [0, 1, 2, 3]


def test_catching_up_only(pair) -> None:
    a, b = pair
    outbox, inbox = OrderOutbox(a, SIGNATURE, STEPS), OrderInbox(b, SIGNATURE, STEPS)
    order = Order(3, 70, None, None, tuple(range(MAX_MISSED)))
    outbox.send(1, order, ())
    assert inbox.receive() == order
