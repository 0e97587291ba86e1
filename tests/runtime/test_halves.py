"""Halves of a batch are compared by value."""

import pytest
import torch

from hybridiff_compiler.runtime.halves import Halves


def test_the_last_question_is_answered() -> None:
    halves = Halves()
    latents = torch.randn(1, 4, 8, 8)
    for other, equal in ((latents, True), (latents + 1, False), (latents.clone(), True), (latents * torch.nan, False)):
        halves.ask(torch.cat([latents, other]))
        assert halves.equal() is equal
        assert halves.equal() is equal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_no_number_equals_itself(dtype: torch.dtype, layout: torch.memory_format) -> None:
    halves, latents = Halves(), torch.full((1, 4, 8, 8), torch.nan, dtype=dtype)
    halves.ask(torch.cat([latents] * 2).to(memory_format=layout))
    assert halves.equal()
