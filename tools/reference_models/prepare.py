"""Emoji package -> one npz with images, token rows and sampling weights, plus the tokenizer beside it."""

import hashlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from .emoji import captions, is_mirrorable, sampling_weight
from .tokenizer import MAX_TOKENS, load_tokenizer, train_tokenizer

__all__ = ["PACKAGE", "PACKAGE_SHA256", "prepare"]

PACKAGE = "emoji-datasource-google@16.0.0"
PACKAGE_SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
CAPTIONS_PER_IMAGE = 16
_SAME_PICTURE = 4.0
"""Mean absolute difference, of 255, under which two emoji count as one picture."""


def prepare(archive: Path | None, out: Path, seed: int = 0) -> Path:
    """Write `out/data.npz` and `out/tokenizer/`; fetches the package with npm when no archive is given."""
    out.mkdir(parents=True, exist_ok=True)
    archive = archive or _fetch(out)
    _check(archive)
    rng = random.Random(seed)
    with tarfile.open(archive) as tar:
        entries = json.load(tar.extractfile("package/emoji.json"))
        kept = _load_pictures(tar, [entry for entry in entries if sampling_weight(entry) > 0])
    texts = [captions(entry, CAPTIONS_PER_IMAGE, rng) for entry, _ in kept]
    train_tokenizer([text for row in texts for text in row], out / "tokenizer")
    tokenizer = load_tokenizer(out / "tokenizer")
    rows = [tokenizer(row, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids for row in texts]
    path = out / "data.npz"
    np.savez_compressed(
        path,
        images=np.stack([picture for _, picture in kept]),
        tokens=np.array(rows, dtype=np.int16),
        empty_tokens=np.array(tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids, dtype=np.int16),
        weights=np.array([sampling_weight(entry) for entry, _ in kept], dtype=np.float32),
        mirrorable=np.array([is_mirrorable(entry) for entry, _ in kept]),
        names=np.array([entry["name"].lower() for entry, _ in kept]),
        texts=np.array(texts),
    )
    print(f"{len(kept)} pictures, {len(tokenizer)} tokens, longest caption {_longest(rows)} tokens -> {path}")
    return path


def _fetch(out: Path) -> Path:
    done = subprocess.run(["npm", "pack", PACKAGE], cwd=out, check=True, capture_output=True, text=True)
    return out / done.stdout.split()[-1]


def _check(archive: Path) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != PACKAGE_SHA256:
        raise ValueError(
            f"{archive} has sha256 {found}, but {PACKAGE} has {PACKAGE_SHA256}; remove the file and run `prepare` again"
        )


def _load_pictures(tar: tarfile.TarFile, entries: list[dict]) -> list[tuple[dict, np.ndarray]]:
    """Pictures on white, without those that look like one already taken."""
    kept: list[tuple[dict, np.ndarray]] = []
    for entry in entries:
        data = tar.extractfile(f"package/img/google/64/{entry['image']}").read()
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
        if pixels.shape != (64, 64, 3):
            raise ValueError(f"{entry['image']} is {pixels.shape}, expected 64x64 pixels in 3 channels")
        if kept:
            others = np.stack([other for _, other in kept]).astype(np.int16)
            if np.abs(others - pixels).mean(axis=(1, 2, 3)).min() < _SAME_PICTURE:
                continue
        kept.append((entry, pixels))
    return kept


def _longest(rows: list[list[list[int]]]) -> int:
    return max(len(dict.fromkeys(enumerate(row))) - row.count(row[-1]) + 1 for group in rows for row in group)
