import pytest

import hybridiff_compiler as hc
from hybridiff_compiler.quality.measure import QualityError
from hybridiff_compiler.quality.verify import check_verification


def test_exact_plan_on_its_ranks(unet, exact_plan):
    report = hc.verify(unet, exact_plan, prompts=["a cat", "a dog"], repeats=2)
    assert report.psnr_db is None
    assert report.psnr_db_min is None
    assert report.max_abs_diff < 1e-3
    assert report.split_batch_max_abs_diff == 0
    assert report.simulator_max_abs_diff == 0
    assert report.speedup == pytest.approx(report.single_latency_s / report.latency_s)
    assert [item.prompt for item in report.prompts] == ["a cat", "a dog"]
    check_verification(report, min_psnr=40)


def test_cheap_plan_in_the_simulator(unet, cheap_plan):
    report = hc.verify(unet, cheap_plan, prompts=["a cat"], simulated=True, repeats=1)
    assert report.simulated
    assert report.latency_s is None
    assert report.simulator_max_abs_diff is None
    assert report.psnr_db == report.psnr_db_min == report.prompts[0].psnr_db
    with pytest.raises(QualityError, match="below the 99 dB asked"):
        check_verification(report, min_psnr=99)


def test_no_prompts(unet, exact_plan):
    with pytest.raises(hc.UsageError, match="no prompts"):
        hc.verify(unet, exact_plan, prompts=[])
