"""Hooks of single objects: their copies are free of them, and they go as they came."""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from diffusers import DDIMScheduler

from hybridiff_compiler.ir import CallSignature
from hybridiff_compiler.runtime.instance_hooks import InstanceHook
from hybridiff_compiler.runtime.intercept import GuidedCall, intercept

from .tiny import TinyPipeline


def hooked() -> tuple[DDIMScheduler, InstanceHook, list[int]]:
    scheduler, calls = DDIMScheduler(), []
    original = scheduler.set_timesteps

    def set_timesteps(count: int) -> None:
        calls.append(count)
        original(count)

    return scheduler, InstanceHook.put(scheduler, "set_timesteps", set_timesteps), calls


def test_copies_have_a_method_of_their_own() -> None:
    """Pipelines with sound copy their scheduler."""
    scheduler, _, calls = hooked()
    scheduler.set_timesteps(4)
    for other in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):  # noqa: S301
        other.set_timesteps(7)
        assert (len(other.timesteps), len(scheduler.timesteps)) == (7, 4)
    assert calls == [4]


def test_a_copied_state_keeps_the_hook() -> None:
    """Some pipelines keep the state of their scheduler, one per view, and put it back."""
    scheduler, _, calls = hooked()
    state = copy.deepcopy(scheduler.__dict__)
    scheduler.__dict__.update(state)
    scheduler.set_timesteps(3)
    assert calls == [3]
    assert len(scheduler.timesteps) == 3


def test_the_signature_is_the_method_s() -> None:
    scheduler, hook, _ = hooked()
    assert inspect.signature(scheduler.set_timesteps) == inspect.signature(DDIMScheduler().set_timesteps)
    hook.remove()
    assert "set_timesteps" not in scheduler.__dict__


def test_what_others_put_there_stays() -> None:
    scheduler, calls = DDIMScheduler(), []
    scheduler.set_timesteps = calls.append
    hook = InstanceHook.put(scheduler, "set_timesteps", lambda count: None)
    later = InstanceHook.put(scheduler, "set_timesteps", lambda count: calls.append(-count))
    hook.remove()
    scheduler.set_timesteps(5)
    assert calls == [-5]
    later.remove()
    hook.remove()
    scheduler.set_timesteps(6)
    assert calls == [-5, 6]


class Starts:
    """A step handler that covers nothing and counts generations."""

    def __init__(self) -> None:
        self.count = 0

    def start(self, num_steps: int, signature: CallSignature) -> bool:
        """Count it."""
        self.count += 1
        return False

    def step(self, call: GuidedCall) -> None:
        """Never called."""
        raise AssertionError


def test_two_pipelines_with_one_scheduler() -> None:
    one, other = TinyPipeline(), TinyPipeline(1)
    other.scheduler = one.scheduler
    first, second = intercept(one, Starts()), intercept(other, starts := Starts())
    first.__enter__()
    second.__enter__()
    other(1)
    first.__exit__(None, None, None)
    other(2)
    assert starts.count == 2
    second.__exit__(None, None, None)
    assert torch.equal(other(2), TinyPipeline(1)(2))
