"""The three trainings: autoencoder first, then each denoiser together with its text encoders."""

import json
import platform
from pathlib import Path

import torch

from .data import Emoji, LatentBank
from .export import export_weights, noise_scheduler
from .loop import Budget, Trainer
from .models import build_mmdit, build_text_encoder, build_unet, build_vae, fold_normalisation, parameter_count
from .objectives import mmdit_loss, unet_loss, vae_loss

__all__ = ["STAGES", "train"]

STAGES = ("vae", "unet", "mmdit")
_REFRESH_EVERY = 25
_BATCH = {"vae": 256, "unet": 512, "mmdit": 512}


def train(
    stage: str,
    budget: Budget,
    *,
    data: Path,
    work: Path,
    seed: int = 0,
    batch: int | None = None,
    views: int = 64,
    compile_denoiser: bool = True,
) -> dict:
    """Train one stage; fp16 weights and `STAGE.json` land in `work`, resumable checkpoints beside them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed({"vae": seed, "unet": seed + 1, "mmdit": seed + 2}[stage])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    emoji = Emoji(data, device)
    batch = batch or _BATCH[stage]
    modules = {key: module.to(device).train() for key, module in _build(stage, emoji.vocabulary_size).items()}
    before_step = _no_refresh
    if stage == "vae":
        loss = vae_loss(emoji, modules["vae"], batch)
    else:
        bank = LatentBank(emoji, _trained_vae(work, device), views)
        before_step = _refresher(bank)
        if stage == "unet":
            loss = unet_loss(emoji, bank, modules, noise_scheduler(), batch)
        else:
            loss = mmdit_loss(emoji, bank, modules, batch)
    trainer = Trainer(
        name=stage, modules=modules, loss_function=loss, device=device, folder=work, before_step=before_step
    )
    if compile_denoiser and device.type == "cuda" and "denoiser" in modules:
        modules["denoiser"].compile()
    averaged = trainer.train(budget)
    if stage == "vae":
        fold_normalisation(averaged["vae"], *_latent_statistics(emoji, averaged["vae"]))
    export_weights(stage, averaged, work)
    return _record(trainer, work, seed=seed, batch=batch, emoji=emoji)


def _build(stage: str, vocabulary_size: int) -> dict[str, torch.nn.Module]:
    if stage == "vae":
        return {"vae": build_vae()}
    if stage == "unet":
        return {"denoiser": build_unet(), "text_encoder_2": build_text_encoder(vocabulary_size)}
    return {
        "denoiser": build_mmdit(zero_output=True),
        "text_encoder": build_text_encoder(vocabulary_size),
        "text_encoder_2": build_text_encoder(vocabulary_size),
    }


def _no_refresh(step: int) -> None:
    pass


def _refresher(bank: LatentBank):
    def refresh(step: int) -> None:
        if step % _REFRESH_EVERY == 0:
            bank.refresh()

    return refresh


def _trained_vae(work: Path, device: torch.device) -> torch.nn.Module:
    from safetensors.torch import load_file

    path = work / "vae.vae.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run `train vae` first")
    vae = build_vae()
    vae.load_state_dict(load_file(path))
    return vae.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _latent_statistics(emoji: Emoji, vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel over two thousand views."""
    means = []
    for _ in range(8):
        views = emoji.views(emoji.draw(256))
        means.append(vae.encode(views).latent_dist.mean.float())
    latents = torch.cat(means)
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))


def _record(trainer: Trainer, work: Path, *, seed: int, batch: int, emoji: Emoji) -> dict:
    losses = trainer.losses
    tail = [loss for _, loss in losses[-20:]]
    record = {
        "stage": trainer.name,
        "steps": trainer.step,
        "batch": batch,
        "seconds": round(trainer.elapsed, 1),
        "seed": seed,
        "pictures": len(emoji),
        "learning_rate": trainer.learning_rate,
        "final_loss": round(sum(tail) / max(len(tail), 1), 5),
        "losses": [(step, round(loss, 5)) for step, loss in losses[:: max(1, len(losses) // 20)]],
        "parameters": {key: parameter_count(module) for key, module in trainer.modules.items()},
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
    }
    (work / f"{trainer.name}.json").write_text(json.dumps(record, indent=2))
    print(json.dumps({key: value for key, value in record.items() if key != "losses"}))
    return record
