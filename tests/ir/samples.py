"""Random and hand-made data for the tests of the ir package."""

from __future__ import annotations

from hypothesis import strategies as st

from hybridiff_compiler.ir import (
    BRANCHES,
    CallSignature,
    Combine,
    Costs,
    ErrorCurve,
    FixedSchedule,
    Guidance,
    Layer,
    LayerGraph,
    LeafSpec,
    Link,
    ModelInfo,
    Partition,
    Pattern,
    PatternErrors,
    Plan,
    Profile,
    Provenance,
    RankSpec,
    Read,
    StageCost,
    Unit,
    Value,
)

BRANCH = Pattern.parse("branch", "u0@0 c0@1 | cfg")
SINGLE = Pattern.parse("single", "u0@0 c0@0 | cfg")
REUSE = Pattern.parse("reuse", "- | last")
PAPER = Pattern.parse("paper:nested", "u0@0(c1~) c1@1(u0~) | mirror", partition="nested", stages=2)
COND_PIPE = Pattern.parse("cond-pipe:nested", "c0@0(c1~) c1@1(c0~) | delta", partition="nested", stages=2)
BRANCH_REUSE = Pattern.parse("branch-reuse:nested", "u1@0(u0~) c1@1(c0~) | cfg", partition="nested", stages=2)
ALL = (SINGLE, BRANCH, PAPER, COND_PIPE, BRANCH_REUSE, REUSE)

GRAPH = LayerGraph(
    layers=tuple(Layer(name=name, parameter_bytes=4, flops=8.0) for name in "abcd"),
    values=(
        Value(name="v0", producer="a", consumers=("b", "c"), shape=(1, 2), dtype="float16", nbytes=4),
        Value(name="v1", producer="b", consumers=("c",), shape=(1, 4), dtype="float16", nbytes=8),
        Value(name="v2", producer="c", consumers=("d",), shape=(1, 4), dtype="float16", nbytes=8),
        Value(name="v3", producer="a", consumers=("d",), shape=(1, 8), dtype="float16", nbytes=16),
    ),
    output="d",
)
NESTED = Partition(name="nested", stages=(("b", "c"), ("a", "d")))
SIGNATURE = CallSignature(leaves=(
    LeafSpec(path="sample", shape=(1, 4, 8, 8), dtype="float16"),
    LeafSpec(path="return_dict", constant="False"),
))
MODEL = ModelInfo(
    name="tiny", denoiser="Net", fingerprint=GRAPH.fingerprint(), parameter_bytes=16, dtype="float16",
    signature=SIGNATURE,
)


def make_plan(steps: tuple[str, ...] = ("branch", "paper:nested", "reuse", "branch"), **changes: object) -> Plan:
    """A plan over all sample patterns."""
    fields: dict[str, object] = {
        "model": MODEL, "ranks": (RankSpec(device="cpu"),) * 2, "partitions": (NESTED,), "patterns": ALL,
        "exact": "branch", "schedule": FixedSchedule(steps=steps),
    }
    return Plan.model_validate(fields | changes)


def make_profile(num_steps: int = 3) -> Profile:
    """A profile with every kind of entry."""
    curve = ErrorCurve(source="activations", rmse=tuple((0.1 / (i + 1), 0.3) for i in range(num_steps)))
    return Profile(
        model=MODEL, graph=GRAPH,
        costs=Costs(
            layers={1: (0.1, 0.2, 0.3, 0.4), 2: (0.2, 0.4, 0.6, 0.7)},
            stages=(StageCost(partition="nested", stages=(0,), batch=1, seconds=0.45, spread=0.01),),
            step_overhead_s=0.01, links=(Link(source=0, target=1, latency_s=1e-5, bytes_per_s=1e9),),
        ),
        num_steps=num_steps, scheduler="DDIMScheduler", guidance_scale=5.0,
        guidance=Guidance(rel_mae=((0.3, 0.2, 0.1)[:num_steps],)), partitions=(NESTED,), patterns=ALL,
        errors=(PatternErrors(pattern="paper:nested", curves=(curve,)),),
        provenance=Provenance(
            created="2026-01-01T00:00:00+00:00", device="none", backend="eager", threads=1, versions={"x": "1"}, seed=0,
            prompts=1, prompts_sha256="0" * 64,
        ),
    )


@st.composite
def patterns(draw: st.DrawFn) -> Pattern:
    """Random valid tables of up to three stages on up to four ranks."""
    stages = draw(st.integers(1, 3))
    combine = draw(st.sampled_from(list(Combine)))
    estimated = {
        Combine.CFG: BRANCHES, Combine.LAST: (), Combine.MIRROR: (draw(st.sampled_from(BRANCHES)),),
    }.get(combine, ("cond",))
    keys = [(b, s) for b in BRANCHES for s in range(stages - 1)] if combine is not Combine.LAST else []
    keys = [key for key in keys if draw(st.booleans())] + [(b, stages - 1) for b in estimated]
    computed = set(keys)
    units = []
    for branch, stage in draw(st.permutations(keys)):
        reads = []
        for other in range(stages):
            if other == stage:
                continue
            choices = [Read(stage=other, branch=b, stale=True) for b in BRANCHES]
            choices += [Read(stage=other, branch=b, stale=False) for b in BRANCHES if (b, other) in computed]
            read = draw(st.sampled_from(choices))
            if read != Read(stage=other, branch=branch, stale=False):
                reads.append(read)
        units.append(Unit(branch=branch, stage=stage, rank=draw(st.integers(0, 3)), reads=tuple(reads)))
    name = draw(st.from_regex(r"[a-z][a-z0-9.:@+-]{0,6}", fullmatch=True))
    return Pattern(
        name=name, partition="whole" if stages == 1 else "split", stages=stages, units=tuple(units), combine=combine
    )
