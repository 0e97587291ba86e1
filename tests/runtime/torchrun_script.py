"""A user's script as torchrun starts it; run by test_torchrun.py."""

from __future__ import annotations

import os
import sys

import torch

from hybridiff_compiler.ir import WorkerError
from hybridiff_compiler.runtime.intercept import intercept
from hybridiff_compiler.runtime.parallelize import parallelize
from hybridiff_compiler.runtime.simulator import Simulator
from runtime.tiny import FAIL_RAISE, TinyPipeline, tiny_plan


def main(how: str) -> None:
    """Compare two generations with the simulator, or let another rank fail."""
    pipe = TinyPipeline(seed=int(os.environ["RANK"]))  # other weights in every rank: rank 0's are handed over
    plan = tiny_plan(pipe, "branch paper pipe branch-reuse reuse swapped branch")
    if how == "fails":
        with parallelize(pipe, plan, threads=1):
            try:
                pipe(3, code=FAIL_RAISE)
            except WorkerError as error:
                sys.stdout.write(f"refused: {str(error).splitlines()[0]}\n")
                sys.stdout.flush()
        return
    expected = []
    with intercept(pipe, Simulator(plan, pipe.denoiser)):
        expected = [pipe(3), pipe(4, images=2)]
    for _ in range(2):  # plans one after the other meet in stores of their own
        with parallelize(pipe, plan, threads=1, batch_sizes=(1, 2)) as kept:  # closing does not wait for garbage
            assert torch.equal(pipe(3), expected[0])
            assert torch.equal(pipe(4, images=2), expected[1])
        assert not kept.is_open
    sys.stdout.write(f"rank {os.environ['RANK']} finished\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
