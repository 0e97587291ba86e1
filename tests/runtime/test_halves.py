"""Halves of a batch are compared by value."""

import torch

from hybridiff_compiler.runtime.halves import Halves


def test_the_last_question_is_answered() -> None:
    halves = Halves()
    latents = torch.randn(1, 4, 8, 8)
    for other, equal in ((latents, True), (latents + 1, False), (latents.clone(), True), (latents * torch.nan, False)):
        halves.ask(torch.cat([latents, other]))
        assert halves.equal() is equal
        assert halves.equal() is equal
