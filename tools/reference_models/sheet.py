"""Contact sheets: what the exported pipelines draw, with the prompt under each picture."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

__all__ = ["SHEET_PROMPTS", "draw", "sheet"]

SHEET_PROMPTS = (
    "red apple", "banana", "strawberry", "hamburger", "fox", "penguin", "octopus", "butterfly",
    "rocket", "sailboat", "house", "sunflower", "ghost", "crown", "soccer ball", "red heart",
)  # fmt: skip
_LABEL_HEIGHT = 14


def draw(
    folder: Path, prompts: list[str], *, seed: int = 0, steps: int = 50, guidance: float = 5.0, batch: int = 16
) -> list[Image.Image]:
    """One picture per prompt, each with its own generator, so that the batch size does not matter."""
    from diffusers import DiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    more = {"max_sequence_length": 1} if hasattr(pipeline, "transformer") else {}
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        generators = [torch.Generator("cpu").manual_seed(seed + start + k) for k in range(len(part))]
        images += pipeline(
            part, generator=generators, num_inference_steps=steps, guidance_scale=guidance, **more
        ).images
    return images


def sheet(images: list[Image.Image], labels: list[str], out: Path, *, columns: int = 4, scale: int = 2) -> Path:
    """Write the pictures as one palette PNG; an empty label leaves the picture unnamed."""
    labelled = any(labels)
    side, pad = 64 * scale, 6
    cell = side + (_LABEL_HEIGHT if labelled else 0)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + pad) + pad, rows * (cell + pad) + pad), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = pad + index % columns * (side + pad), pad + index // columns * (cell + pad)
        page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        if labelled:
            pen.text((left + side / 2, top + side), label, fill="black", font=font, anchor="ma")
    out.parent.mkdir(parents=True, exist_ok=True)
    page.save(out, optimize=True)
    return out
