import pytest

from hybridiff_compiler.planner import plan
from hybridiff_compiler.profiler.generate import Generation

from .fabricated import STEPS, bundled_unet, unet_profile


@pytest.fixture
def unet():
    return bundled_unet()


@pytest.fixture
def profile():
    return unet_profile()


@pytest.fixture
def cheap_plan(profile):
    return plan(profile, speedup=2.5)


@pytest.fixture
def exact_plan(profile):
    return plan(profile, policy="exact")


@pytest.fixture
def generation(unet):
    return Generation(pipe=unet, num_inference_steps=STEPS, guidance_scale=5.0)
