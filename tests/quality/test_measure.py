import pytest
import torch

from hybridiff_compiler.ir import PlanMismatchError
from hybridiff_compiler.quality.contenders import all_tables, contenders
from hybridiff_compiler.quality.coverage import check_covered
from hybridiff_compiler.quality.measure import generate, simulate, split_batch_plan


def test_times_and_images(generation):
    sample = generate(generation, ["a cat", "a dog"])
    assert sample.images.shape == (2, 3, 64, 64)
    assert 0 <= float(sample.images.min()) <= float(sample.images.max()) <= 1
    assert 0 < sample.loop_s < sample.call_s
    scheduler = generation.pipe.scheduler
    assert "step" not in vars(scheduler), "the scheduler must be left as it was"


def test_prompts_keep_their_seeds_in_a_batch(generation):
    together = generate(generation, ["a cat", "a dog"]).images
    alone = generate(generation, ["a dog"], first=1).images
    assert float((together[1] - alone[0]).abs().max()) < 1e-3


def test_simulated_batches_equal_single_prompts(generation, cheap_plan):
    prompts = ["a cat", "a dog", "a fox"]
    images, executed = simulate(generation, cheap_plan, prompts, batch=2)
    alone, _ = simulate(generation, cheap_plan, prompts, batch=1)
    assert float((images - alone).abs().max()) < 1e-3
    assert executed == [cheap_plan.schedule.steps] * 3


def test_split_batch_reference_is_the_exact_plan(generation, exact_plan, cheap_plan):
    reference, _ = simulate(generation, split_batch_plan(cheap_plan), ["a cat"])
    exact, _ = simulate(generation, exact_plan, ["a cat"])
    assert torch.equal(reference, exact)
    plain = generate(generation, ["a cat"]).images
    assert 0 <= float((plain - exact).abs().max()) < 1e-3


def changed(plan, **model):
    return plan.model_copy(update={"model": plan.model.model_copy(update=model)})


def test_a_plan_is_refused_for_another_call(generation, exact_plan):
    check_covered(generation, exact_plan, "a cat")
    with pytest.raises(PlanMismatchError, match="SD3Transformer2DModel"):
        check_covered(generation, changed(exact_plan, denoiser="SD3Transformer2DModel"), "a cat")
    leaves = exact_plan.model.signature.leaves
    larger = leaves[0].model_copy(update={"shape": (1, 4, 32, 32)})
    signature = exact_plan.model.signature.model_copy(update={"leaves": (larger, *leaves[1:])})
    with pytest.raises(PlanMismatchError, match=r"got .*16,16.*expected .*32,32"):
        check_covered(generation, changed(exact_plan, signature=signature), "a cat")
    with pytest.raises(PlanMismatchError, match="has 7 steps, this generation 4"):
        check_covered(generation, exact_plan.with_steps(("branch",) * 7), "a cat")


def test_contenders_have_rows_of_equal_cost(profile):
    rows = {row.name: row.plan for row in contenders(profile)}
    assert list(rows) == [
        "branch", "paper", "planned-as-paper", "planned-30", "fewer-steps-30", "alternating-reuse-30", "planned-35",
        "fewer-steps-35", "alternating-reuse-35", "planned-40",
    ]
    fewer = rows["fewer-steps-30"]
    assert fewer.is_exact
    assert fewer.predictions.ideal_speedup == pytest.approx(
        rows["branch"].predictions.ideal_speedup * profile.num_steps / fewer.num_steps
    )
    tables = all_tables(list(rows.values()))
    assert {p.name for plan in rows.values() for p in plan.patterns} == {p.name for p in tables.patterns}
