import math

import pytest
import torch

from hybridiff_compiler.quality import mean_psnr, psnr, ssim

torch.manual_seed(0)
IMAGES = torch.rand(3, 3, 16, 16)


def test_equal_images():
    assert psnr(IMAGES, IMAGES) == [math.inf] * 3
    assert mean_psnr(IMAGES, IMAGES) == 100.0
    assert ssim(IMAGES, IMAGES) == pytest.approx([1.0] * 3)


def test_psnr_of_a_constant_error():
    assert psnr(IMAGES + 0.1, IMAGES) == pytest.approx([20.0] * 3, abs=1e-4)


def test_ssim_against_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    noisy = (IMAGES + 0.2 * torch.rand_like(IMAGES)).clamp(0, 1)
    for image, reference, value in zip(noisy, IMAGES, ssim(noisy, IMAGES)):
        expected = torchmetrics.structural_similarity_index_measure(
            image[None], reference[None], data_range=1.0, gaussian_kernel=False, kernel_size=7
        )
        assert value == pytest.approx(float(expected), abs=0.02)  # it pads the border, we leave it out
