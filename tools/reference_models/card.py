"""The model card of an exported model, written from the records that the trainings left."""

import json
from pathlib import Path

from .prepare import PACKAGE, PACKAGE_SHA256

__all__ = ["write_card"]

_ABOUT = {
    "unet": (
        "StableDiffusionXLPipeline",
        "A U-Net in the plan of SDXL: three levels (16x16, 8x8, 4x4 positions; 96, 96, 128 channels; one resnet on the "
        "way down, two on the way up), cross attention on the two inner levels, size and crop conditioning. Noise "
        "prediction on SDXL's schedule with min-SNR weights (limit 5), sampled by DDIM.",
    ),
    "mmdit": (
        "StableDiffusion3Pipeline",
        "An MMDiT in the plan of Stable Diffusion 3: eight joint blocks of width 160 over 8x8 patches, RMS-normed "
        "queries and keys. Rectified flow, times drawn from a logit-normal, sampled by Euler steps. The third text "
        "encoder is a placeholder that returns zeros; `max_sequence_length=1` keeps its tokens from costing time (the "
        "model was trained on 1 to 256 of them).",
    ),
}
_LIMITS = (
    "It draws emoji-like pictures of things that have an emoji, and nothing else; lettering, crowds and fine print "
    "come out garbled. It exists to measure what cheaper ways of running a denoiser do to an image, not to make art."
)


def write_card(name: str, work: Path, folder: Path, verdict: str) -> Path:
    """Write `folder/README.md` from `work/vae.json`, `work/NAME.json` and what someone said of the sheet."""
    vae, denoiser = (json.loads((work / f"{stage}.json").read_text()) for stage in ("vae", name))
    pipeline, about = _ABOUT[name]
    call = ", max_sequence_length=1" if name == "mmdit" else ""
    text = f"""# bundled:{name}

A small text-to-image model, trained from nothing, that draws 64x64 emoji. {about}

![16 pictures with their prompts](sheet.png)

```python
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("hybridiff_compiler/reference_models/{name}")
pipe("red apple", num_inference_steps=50, guidance_scale=5.0{call}).images[0]
```

{_LIMITS}

## Parameters

| module | parameters |
| --- | --- |
{_parameter_rows(denoiser, vae)}

Weights are stored in fp16 and run in fp32.

## Data

{denoiser["pictures"]} pictures of `{PACKAGE}` (npm; archive sha256 `{PACKAGE_SHA256}`), composited on white, with their
names and short names as captions. Country flags, text symbols, clock faces and gender variants of one picture were left
out. The pictures are Google's Noto emoji, Apache-2.0; the package is MIT (Cal Henderson).

## Training

| | steps | batch | seconds | final loss | seed | device |
| --- | --- | --- | --- | --- | --- | --- |
{_training_row("autoencoder", vae)}
{_training_row("denoiser and text encoder", denoiser)}

AdamW (0.9, 0.99), rate {denoiser["learning_rate"]}, 200 warm-up steps, cosine to zero, gradient norm 1, EMA 0.999,
bf16 autocast, torch {denoiser["torch"]}. A tenth of the captions is the empty one. Every batch draws from a bank of
augmented views (scale, shift, rotation, mirror, hue, saturation) that is renewed all the time, so that pictures depend
on the seed. The rate followed a time box; `--steps` with the figures above gives the same schedule but for the clock's
jitter. Losses: autoencoder L1 + 2 L2 + 5e-4 KL; {_loss_of(name)}.

Loss by step: {", ".join(f"{step}: {loss:.3f}" for step, loss in denoiser["losses"])}.

Verdict on the sheet, by eye: {verdict}.

Made by `python -m tools.reference_models prepare | train vae | train {name} | export {name} | sheet {name}`.
"""
    path = folder / "README.md"
    path.write_text(text)
    return path


def _parameter_rows(denoiser: dict, vae: dict) -> str:
    counts = denoiser["parameters"] | vae["parameters"]
    return "\n".join(f"| {module} | {count:,} |" for module, count in counts.items())


def _training_row(label: str, record: dict) -> str:
    cells = [
        label,
        *(record[key] for key in ("steps", "batch", "seconds", "final_loss", "seed")),
        f"1x {record['device']}",
    ]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _loss_of(name: str) -> str:
    return (
        "denoiser weighted squared error of the noise" if name == "unet" else "denoiser squared error of the velocity"
    )
