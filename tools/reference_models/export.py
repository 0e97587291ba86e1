"""Trained weights -> folders in the standard diffusers format, fp16."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file

from .card import write_card
from .models import build_mmdit, build_text_encoder, build_unet, build_vae
from .placeholder import wordless_tokenizer, zero_text_encoder
from .tokenizer import load_tokenizer

__all__ = ["LARGEST_FILE", "export", "export_weights", "noise_scheduler"]

LARGEST_FILE = 16 * 2**20
"""Bytes; weight files must stay under this."""


def noise_scheduler() -> DDIMScheduler:
    """SDXL's own noise schedule, sampled by DDIM; the U-Net is trained on the same one."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def export_weights(name: str, modules: dict[str, torch.nn.Module], out: Path) -> Path:
    """One fp16 safetensors per module: `out/NAME.MODULE.safetensors`."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    for key, module in modules.items():
        state = {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in module.state_dict().items()}
        path = out / f"{name}.{key}.safetensors"
        partial = path.with_suffix(".partial")
        save_file(state, partial)
        partial.replace(path)
    return out


def export(name: str, weights: Path | None, data: Path, out: Path, verdict: str = "not judged yet") -> Path:
    """Write the pipeline folder `out/NAME`; without `weights` the networks keep their random start."""
    pipeline = _pipeline(name, weights, data)
    target = out / name
    partial = out / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(partial, safe_serialization=True)
    for config in partial.glob("text_encoder*/config.json"):
        # transformers loads in the dtype named here; the pipelines are meant to run in fp32 unless asked otherwise.
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for folder in partial.glob("tokenizer*"):
        if folder.name != "tokenizer_3":
            _add_plain_vocabulary(folder)
    for file in (partial / "model_index.json", *partial.glob("tokenizer_3/tokenizer_config.json")):
        # transformers 5's name for the class that 4 knows as well
        file.write_text(file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    for file in partial.rglob("*.safetensors"):
        file.chmod(0o644)
        if file.stat().st_size >= LARGEST_FILE:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, the limit is {LARGEST_FILE}: shrink the model")
    if weights is not None:
        write_card(name, weights, partial, verdict)
    if (target / "sheet.png").exists():
        shutil.copy2(target / "sheet.png", partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return target


def _add_plain_vocabulary(folder: Path) -> None:
    """The two files that transformers 4 reads; transformers 5 reads `tokenizer.json`."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def _pipeline(name: str, weights: Path | None, data: Path) -> DiffusionPipeline:
    tokenizer = load_tokenizer(data / "tokenizer")
    torch.manual_seed(0)

    def filled(key: str, module: torch.nn.Module, owner: str = name) -> torch.nn.Module:
        if weights is not None:
            module.load_state_dict(load_file(weights / f"{owner}.{key}.safetensors"))
        return module.eval()

    vae = filled("vae", build_vae(), owner="vae")
    if name == "unet":
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=filled("text_encoder_2", build_text_encoder(len(tokenizer))),
            tokenizer_2=tokenizer,
            unet=filled("denoiser", build_unet()),
            scheduler=noise_scheduler(),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    if name == "mmdit":
        return StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=filled("text_encoder", build_text_encoder(len(tokenizer))),
            tokenizer=tokenizer,
            text_encoder_2=filled("text_encoder_2", build_text_encoder(len(tokenizer))),
            tokenizer_2=tokenizer,
            text_encoder_3=zero_text_encoder(),
            tokenizer_3=wordless_tokenizer(),
            transformer=filled("denoiser", build_mmdit()),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
    raise ValueError(f"unknown model {name!r}; allowed: unet, mmdit")
