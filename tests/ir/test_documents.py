"""Documents as files: exact round trips, and one clear error for whatever is wrong with a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hybridiff_compiler.ir import (
    AdaptiveSchedule,
    Certificate,
    Document,
    FixedSchedule,
    InputError,
    Plan,
    Predictions,
    Profile,
    RankSpec,
    SwitchedSchedule,
    parse_steps,
    write_text_atomically,
)

from .samples import ALL, MODEL, make_plan, make_profile


@pytest.mark.parametrize("document", [make_plan(), make_profile()], ids=["plan", "profile"])
def test_files_round_trip_exactly(document: Document, tmp_path: Path) -> None:
    file = document.save(tmp_path / "document.json")
    again = type(document).load(file)
    assert again == document
    assert again.digest() == document.digest()
    assert again.save(tmp_path / "again.json").read_bytes() == file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "document.json"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([p.name for p in ALL]), max_size=8), st.none() | st.floats(0.001, 1e6))
def test_random_plans_round_trip(steps: list[str], latency: float | None) -> None:
    plan = make_plan(("branch", *steps), predictions=Predictions(latency_s=latency))
    assert Plan.parse(plan.model_dump_json()) == plan


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.sampled_from([Plan, Profile]))
def test_every_truncation_is_one_clear_error(part: float, kind: type[Document]) -> None:
    document: Document = make_plan() if kind is Plan else make_profile()
    text = document.model_dump_json()
    with pytest.raises(InputError) as error:
        kind.parse(text[: int(part * len(text))], source="file.json")
    assert "\n" not in str(error.value)
    assert "truncated or damaged" in str(error.value)
    assert str(error.value).startswith("file.json: ")


def edited(document: Document, *path: Any, value: Any) -> str:
    payload = json.loads(document.model_dump_json())
    target = payload
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return json.dumps(payload)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("kind",), "profile", "kind: Input should be 'plan'"),
        (("schema_version",), 2, "schema_version: Input should be 1"),
        (("surprise",), 1, "surprise: Extra inputs are not permitted"),
        (("ranks",), [], "ranks: "),
        (("partitions", 0, "name"), "other", "expects partition 'nested' with 2 stages"),
        (("ranks",), [{"device": "cpu"}], "needs 2 ranks, the plan has 1"),
        (("exact",), "paper:nested", "is named as the exact one, but its table is not exact"),
        (("exact",), "magic", r"unknown patterns \['magic'\]"),
        (("schedule", "steps", 1), "magic", r"unknown patterns \['magic'\]"),
        (("schedule", "steps", 0), "reuse", "step 0: pattern reuse"),
        (("schedule", "steps"), [], "schedule.fixed.steps"),
        (("schedule", "kind"), "other", "schedule"),
        (("partitions",), [], "expects partition 'nested' with 2 stages"),
        (("patterns", 2, "stages"), 3, "reads u2 fresh, which no unit computes"),
        (("patterns", 2, "name"), "branch", "pattern names must be unique"),
        (("patterns", 2, "units", 0, "reads"), [], "reads u1 fresh, which no unit computes"),
        (("model", "fingerprint"), "abc", "model.fingerprint"),
        (("predictions", "latency_s"), "fast", "predictions.latency_s"),
    ],
)
def test_hand_edited_plans_are_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        Plan.parse(edited(make_plan(), *path, value=value), source="plan.json")
    assert str(error.value).startswith("plan.json: not a valid plan: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("costs", "layers", "1"), [0.1], "list 1 layers, the graph has 4"),
        (("errors", 0, "pattern"), "magic", "errors of unknown pattern 'magic'"),
        (("num_steps",), 9, "must have 9 rows"),
        (("errors", 0, "curves", 0, "rmse", 1), [0.1], "rows of equal length"),
        (("guidance", "rel_mae"), [[0.1]], "guidance curves must have 3 steps"),
        (("partitions", 0, "stages", 0), ["b"], "1 layers missing"),
        (("costs", "stages", 0, "seconds"), 0, "costs.stages.0.seconds"),
        (("provenance",), None, "provenance"),
    ],
)
def test_hand_edited_profiles_are_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Profile.parse(edited(make_profile(), *path, value=value))


def test_not_a_number_is_refused() -> None:
    text = make_profile().model_dump_json().replace('"guidance_scale":5.0', '"guidance_scale":NaN')
    with pytest.raises(InputError, match="guidance_scale"):
        Profile.parse(text)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"plan"', "{}", "\x00", "{'kind': 'plan'}"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        Plan.parse(text)


def test_many_problems_are_summed_up() -> None:
    with pytest.raises(InputError, match=r"\(and \d+ more\)$"):
        Plan.parse("{}")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give the path of a plan JSON file"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read as a plan"):
        Plan.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a plan"):
        Plan.load(tmp_path / "binary")
    with pytest.raises(InputError, match="cannot be written"):
        make_plan().save(tmp_path / "no-folder" / "plan.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    write_text_atomically(file, "old")
    with pytest.raises(TypeError):
        write_text_atomically(file, 3)  # type: ignore[arg-type]
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_adaptive_plans_are_checked_for_the_earliest_and_latest_window() -> None:
    rule = AdaptiveSchedule(
        num_steps=20, warmup="branch", window="paper:nested", history=3, eps=0.1, k=4, tau_cap=9
    )
    plan = make_plan(schedule=rule)
    assert plan.num_steps == 20
    assert not plan.is_exact
    assert Plan.parse(plan.model_dump_json()) == plan
    with pytest.raises(ValidationError, match="step 0: pattern reuse"):
        make_plan(schedule=rule.model_copy(update={"warmup": "reuse"}))


def test_idle_ranks_are_those_that_no_possible_step_uses() -> None:
    assert make_plan().idle_ranks == ()
    wide = make_plan(ranks=(RankSpec(device="cpu"),) * 3)
    assert wide.idle_ranks == (2,)
    assert wide.with_steps(("single",)).idle_ranks == (1, 2)


def test_switched_plans_are_checked_choice_by_choice() -> None:
    def plan(*choices: str, measured: int = 1) -> Plan:
        fixed = tuple(FixedSchedule(steps=parse_steps(text)) for text in choices)
        rule = SwitchedSchedule(choices=fixed, thresholds=(0.5,), measured=measured)
        return make_plan(schedule=rule)

    made = plan("branch*2 reuse branch", "branch*4")
    assert Plan.parse(made.model_dump_json()) == made
    assert not made.is_exact
    with pytest.raises(ValidationError, match="step 0: pattern reuse"):
        plan("reuse branch*3", "reuse branch*3")
    with pytest.raises(ValidationError, match="step 1 runs 'reuse', but the discrepancy of the first 2 steps"):
        plan("branch reuse branch*2", "branch reuse branch*2", measured=2)


def test_certificates_tell_the_gap() -> None:
    known = Certificate(objective="latency_s", value=1.1, lower_bound=1.0, states=3, labels=9)
    assert known.gap == pytest.approx(0.1)
    plan = make_plan(certificate=known)
    assert Plan.parse(plan.model_dump_json()) == plan
    older = json.loads(plan.model_dump_json())
    del older["certificate"]
    assert Plan.parse(json.dumps(older)).certificate is None
    assert plan.with_steps(("branch", "branch")).certificate is None
    proven = Certificate(objective="error", value=0.0, lower_bound=0.0, states=1, labels=1)
    assert proven.gap == 0


def test_other_steps_drop_the_predictions() -> None:
    plan = make_plan(predictions=Predictions(latency_s=1.0))
    other = plan.with_steps(("branch", "branch"))
    assert other.is_exact
    assert other.predictions == Predictions()
    assert other.world_size == 2
    with pytest.raises(ValidationError, match="step 0"):
        plan.with_steps(("reuse",))


def test_data_is_frozen_and_copies_forget_what_was_remembered() -> None:
    profile = make_profile()
    with pytest.raises(ValidationError):
        profile.num_steps = 9  # type: ignore[misc]
    assert list(profile.errors_by_pattern) == ["paper:nested"]
    assert profile.model_copy(update={"errors": ()}).errors_by_pattern == {}
    assert profile.partition("whole").stages == (("a", "b", "c", "d"),)
    assert profile.partition("nested").name == "nested"
    assert profile.model == MODEL
    assert profile.guidance is not None
    assert profile.guidance.mean == pytest.approx((0.3, 0.2, 0.1))
    assert profile.costs.stage_seconds("nested", (0,), 1) == 0.45
    assert profile.costs.stage_seconds("nested", (1,), 1) is None


@pytest.mark.parametrize(("field", "value", "message"), [
    (("costs", "layers", "1", 0), -1.0, r"costs\.layers\.1\.0: Input should be greater than or equal to 0"),
    (("costs", "layers"), {}, "costs.layers"),
    (("errors", 0, "curves", 0, "rmse", 0, 0), -1e-3, r"errors\.0\.curves\.0\.rmse\.0\.0"),
    (("errors", 0, "curves", 0, "rmse"), [[]] * 3, "must have 3 rows of equal length"),
    (("partitions", 0, "name"), "other", "expects partition"),
    (("patterns", 0, "stages"), 10**9, "reads u1 fresh, which no unit computes"),
    (("num_steps",), 10**12, "num_steps: Input should be less than or equal to 10000"),
    (("guidance", "rel_mae"), [], "guidance curves must have 3 steps, of one prompt or more"),
    (("redundancy",), {"change": {"nothing": [0.1] * 2}}, "redundancy of 'nothing', which is no value of the graph"),
    (("model", "name"), "\ud800", "surrogates not allowed"),
])
def test_profiles_with_impossible_fields_are_refused_by_name(field: tuple, value: object, message: str) -> None:
    """Each of them once led to a plan of wrong numbers, or to an error deep inside the planner or the tables."""
    document = json.loads(make_profile().model_dump_json())
    place = document
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = value
    with pytest.raises(InputError, match=message):
        Profile.parse(json.dumps(document))
