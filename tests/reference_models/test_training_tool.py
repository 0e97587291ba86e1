"""What the training of the bundled models rests on: exact stand-ins, folded normalisation, captions, resuming."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
torch = pytest.importorskip("torch")


def test_one_counted_zero_token_equals_many_zero_tokens():
    from tools.reference_models.attention import ends_in_repeated_token
    from tools.reference_models.models import build_mmdit

    torch.manual_seed(0)
    model = build_mmdit().eval()
    latents, text, pooled = torch.randn(2, 4, 16, 16), torch.randn(2, 16, 256), torch.randn(2, 256)
    time = torch.tensor([700.0, 30.0])
    with torch.no_grad():
        many = model(latents, torch.cat([text, torch.zeros(2, 256, 256)], dim=1), pooled, time).sample
        few = model(latents, torch.cat([text, torch.zeros(2, 1, 256)], dim=1), pooled, time).sample
        ends_in_repeated_token(model, 2, torch.device("cpu")).fill_(256.0)
        counted = model(latents, torch.cat([text, torch.zeros(2, 1, 256)], dim=1), pooled, time).sample
    torch.testing.assert_close(counted, many, rtol=1e-4, atol=1e-5)
    assert (few - many).abs().max() > 1e-3


def test_folding_the_normalisation_keeps_the_reconstruction():
    from tools.reference_models.models import build_vae, fold_normalisation

    torch.manual_seed(0)
    vae, pictures = build_vae().eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        wanted = vae.decode(before.mean).sample
        mean, std = before.mean.mean(dim=(0, 2, 3)), before.mean.std(dim=(0, 2, 3))
        fold_normalisation(vae, mean, std)
        after = vae.encode(pictures).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.std * std.view(1, -1, 1, 1), before.std, rtol=1e-3, atol=1e-4)


def test_augmentation_keeps_white_white_and_moves_the_rest():
    from tools.reference_models.augment import augment

    torch.manual_seed(0)
    mirrorable = torch.ones(4, dtype=torch.bool)
    white = torch.ones(4, 3, 64, 64)
    torch.testing.assert_close(augment(white, mirrorable), white, rtol=0, atol=1e-5)
    picture = white.clone()
    picture[:, 0, 20:40, 20:30] = -1
    views = augment(picture, mirrorable)
    assert views.shape == picture.shape
    assert (views[0] - views[1]).abs().max() > 0.5


def test_captions_are_plain_names_and_wordings():
    from tools.reference_models.emoji import captions, sampling_weight

    fox = {
        "name": "FOX FACE", "short_names": ["fox_face"], "category": "Animals & Nature", "subcategory": "animal-mammal",
        "unified": "1F98A", "has_img_google": True,
    }  # fmt: skip
    rows = captions(fox, 16, random.Random(0))
    assert len(rows) == 16
    assert {"fox face", "fox"} <= set(rows)
    assert all(row == row.lower() for row in rows)
    assert sampling_weight(fox) == 1.5
    flag = fox | {"category": "Flags", "subcategory": "country-flag"}
    assert sampling_weight(flag) == 0


def test_training_resumes_where_it_stopped(tmp_path):
    from tools.reference_models.loop import Budget, Trainer

    def trainer() -> Trainer:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)

        def loss() -> torch.Tensor:
            return (layer(torch.randn(8, 3)) - 1).square().mean()

        return Trainer(
            name="tiny", modules={"layer": layer}, loss_function=loss, device=torch.device("cpu"), folder=tmp_path
        )

    first = trainer()
    first.train(Budget(steps=5))
    again = trainer()
    averaged = again.train(Budget(steps=5))  # nothing left to do
    assert again.step == 5
    torch.testing.assert_close(averaged["layer"].weight, first.averaged["layer"].weight)
    longer = trainer()
    longer.train(Budget(steps=7))
    assert longer.step == 7
    assert len(longer.losses) == len(first.losses) + 1
