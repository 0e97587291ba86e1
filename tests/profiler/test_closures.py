"""Functions defined inside functions travel to another process."""

import pickle

import pytest
import torch

from hybridiff_compiler.profiler.closures import pack


def made(factor, *, shift=0):
    def power(value, times=2, *, extra=shift):
        return value if times == 0 else factor * power(value, times - 1) + extra

    return power


def test_a_closure_keeps_what_it_has_closed_over_and_itself():
    again = pickle.loads(pack(made(3, shift=1)))  # noqa: S301 - our own
    assert again(2, 2) == made(3, shift=1)(2, 2)
    assert (again.__qualname__, again.__defaults__, again.__kwdefaults__) == (
        "made.<locals>.power", (2,), {"extra": 1}
    )


def test_functions_with_a_name_travel_by_name():
    assert pickle.loads(pack(made)) is made  # noqa: S301


def test_what_cannot_travel_is_refused():
    with pytest.raises((pickle.PicklingError, TypeError)):
        pack(made(open(__file__)))  # noqa: SIM115


def test_a_pipeline_that_was_used_can_be_handed_over(bench):
    """Libraries hook text encoders at their first call with functions that plain pickles refuse."""
    bench.image(steps=3)
    again = pickle.loads(pack(bench.pipe))  # noqa: S301
    tokens = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2"):
            encoder = getattr(bench.pipe, name, None)
            if encoder is not None:
                there = getattr(again, name)(tokens, output_hidden_states=True).hidden_states
                here = encoder(tokens, output_hidden_states=True).hidden_states
                assert len(there) == len(here) > 1
                assert all(torch.equal(a, b) for a, b in zip(here, there))
