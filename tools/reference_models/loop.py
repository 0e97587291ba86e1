"""The training loop: one captured step, a learning rate that follows a time box, EMA, resumable checkpoints."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

__all__ = ["Budget", "Trainer"]

_REPORT_EVERY = 50


@dataclass(kw_only=True)
class Budget:
    """How long to train: `minutes` of wall time, or exactly `steps` (which repeats a run on any machine)."""

    minutes: float | None = None
    steps: int | None = None

    def progress(self, step: int, elapsed: float) -> float:
        """Part of the budget used, 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, elapsed / (60 * self.minutes))


@dataclass(kw_only=True)
class Trainer:
    """Runs `loss_function` (a scalar tensor of a fresh random batch) to the end of the budget."""

    name: str
    modules: dict[str, torch.nn.Module]
    loss_function: Callable[[], torch.Tensor]
    device: torch.device
    folder: Path
    """Where checkpoints go."""
    learning_rate: float = 1e-3
    warm_up_steps: int = 200
    ema_decay: float = 0.999
    save_every_seconds: float = 60.0
    before_step: Callable[[int], None] = lambda step: None
    """Called before each step, outside the captured graph."""
    step: int = field(default=0, init=False)
    elapsed: float = field(default=0.0, init=False)
    losses: list[tuple[int, float]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._parameters = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        self.averaged = copy.deepcopy(self.modules)
        self._averaged = [p for module in self.averaged.values() for p in module.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        self._rate = torch.zeros((), device=self.device)
        self._ema_gain = torch.ones((), device=self.device)
        self._loss_sum = torch.zeros((), device=self.device)
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=on_gpu
        )

    def train(self, budget: Budget) -> dict[str, torch.nn.Module]:
        """Train, resuming from a checkpoint if there is one; returns the averaged modules."""
        self._resume()
        run = self._captured() if self.device.type == "cuda" else self._one_step
        started, last_save = time.monotonic() - self.elapsed, time.monotonic()
        last_report = (self.step, time.monotonic())
        while (progress := budget.progress(self.step, self.elapsed)) < 1:
            warm_up = min(1.0, (self.step + 1) / self.warm_up_steps)
            self._rate.fill_(self.learning_rate * warm_up * 0.5 * (1 + math.cos(math.pi * progress)))
            self._ema_gain.fill_(1 - min(self.ema_decay, (1 + self.step) / (10 + self.step)))
            self.before_step(self.step)
            run()
            self.step += 1
            if self.step % _REPORT_EVERY == 0 or self.step == budget.steps:
                self._take_loss(self.step - last_report[0])  # waits for the device
                self.elapsed = time.monotonic() - started
                self._report(budget, *last_report)
                last_report = (self.step, time.monotonic())
                if time.monotonic() - last_save > self.save_every_seconds:
                    self._save()
                    last_save = time.monotonic()
            elif self.device.type == "cpu":
                self.elapsed = time.monotonic() - started
        self._save()
        return self.averaged

    def _one_step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            loss = self.loss_function()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            self._loss_sum += loss.detach()
            change = torch._foreach_sub(self._parameters, self._averaged)
            torch._foreach_mul_(change, self._ema_gain)
            torch._foreach_add_(self._averaged, change)

    def _captured(self) -> Callable[[], None]:
        """The whole step as one CUDA graph; a few eager steps first, as capture demands."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._one_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._one_step()
        self._loss_sum.zero_()
        return graph.replay

    def _take_loss(self, steps: int) -> None:
        self.losses.append((self.step, self._loss_sum.item() / steps))
        self._loss_sum.zero_()
        if not math.isfinite(self.losses[-1][1]):
            raise FloatingPointError(f"{self.name}: loss is {self.losses[-1][1]} at step {self.step}; lower the rate")

    def _report(self, budget: Budget, last_step: int, last_time: float) -> None:
        if self.step % (10 * _REPORT_EVERY) and self.step != budget.steps:
            return
        per_step = (time.monotonic() - last_time) / (self.step - last_step)
        progress = budget.progress(self.step, self.elapsed)
        left = self.elapsed * (1 - progress) / max(progress, 1e-9)
        print(
            f"{self.name}: step {self.step}, loss {self.losses[-1][1]:.4f}, {1e3 * per_step:.1f} ms/step, "
            f"{left:.0f} s to go",
            flush=True,
        )

    def _checkpoint(self) -> Path:
        return self.folder / f"{self.name}.checkpoint.pt"

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": self.losses,
            "modules": {key: module.state_dict() for key, module in self.modules.items()},
            "averaged": {key: module.state_dict() for key, module in self.averaged.items()},
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
        }
        partial = self._checkpoint().with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint())

    def _resume(self) -> None:
        if not self._checkpoint().exists():
            return
        state = torch.load(self._checkpoint(), map_location=self.device, weights_only=True)
        for key in self.modules:
            self.modules[key].load_state_dict(state["modules"][key])
            self.averaged[key].load_state_dict(state["averaged"][key])
        self._optimizer.load_state_dict(state["optimizer"])
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.losses = [tuple(pair) for pair in state["losses"]]
        torch.set_rng_state(state["random"].cpu())
        if state["random_gpu"] is not None:
            torch.cuda.set_rng_state(state["random_gpu"].cpu())
        print(f"{self.name}: resumed at step {self.step}")
