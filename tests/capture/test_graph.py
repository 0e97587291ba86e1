"""Capture itself: what it accepts, refuses, and leaves as it was."""

import gc

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from hybridiff_compiler.capture import bind, capture, meta_denoiser
from hybridiff_compiler.ir.errors import InputError, PlanMismatchError, UsageError

from .conftest import SD3, UNET, build_case


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, sample, timestep: torch.Tensor, return_dict: bool = True):
        return (self.last(self.first(sample) * timestep),)


CALL = {"sample": torch.ones(2, 4), "timestep": torch.tensor(3.0)}


def denoiser_of(forward):
    """A `Tiny` whose class has this forward."""
    return type("Custom", (Tiny,), {"forward": forward})()


def test_a_number_for_a_tensor_is_refused(unet):
    with pytest.raises(UsageError, match=r"timestep=981, a Python number.*timestep=torch.tensor\(981\)"):
        capture(unet.denoiser, (), {**unet.kwargs, "timestep": 981})


def test_scalar_timesteps_stay_inputs(unet):
    assert "timestep" in unet.captured.input_names
    stage, later = unet.captured.whole(), {**unet.tensors, "timestep": torch.tensor(11)}
    with torch.no_grad():
        (estimate,) = stage.module(*[later[path] for path in stage.inputs])
        assert torch.equal(estimate, unet.denoiser(**{**unet.kwargs, "timestep": torch.tensor(11)})[0])
    assert not torch.equal(estimate, unet.estimate)


def test_input_names_follow_the_placeholders(unet):
    placeholders = [n for n in unet.captured.graph_module.graph.nodes if n.op == "placeholder"]
    assert [tuple(n.meta["val"].shape) for n in placeholders] == [
        tuple(unet.tensors[path].shape) for path in unet.captured.input_names
    ]
    assert list(unet.captured.input_names) == list(unet.tensors)


@pytest.mark.parametrize("return_dict", [True, False])
def test_outputs_are_rebuilt(sd3, return_dict):
    kwargs = {**sd3.kwargs, "return_dict": return_dict}
    captured = capture(sd3.denoiser, (), kwargs)
    rebuilt = captured.rebuild_output(sd3.estimate)
    with torch.no_grad():
        expected = sd3.denoiser(**kwargs)
    assert type(rebuilt) is type(expected)
    assert rebuilt[0] is sd3.estimate
    assert return_dict == hasattr(rebuilt, "sample")


def test_capture_leaves_no_trace(unet):
    def state():
        modules = list(unet.denoiser.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules)
        flags = [(p.requires_grad, p.grad, id(p)) for p in unet.denoiser.parameters()]
        return [m.training for m in modules], hooks, flags, [sorted(vars(m)) for m in modules]

    unet.denoiser.mid_block.train()
    before, random = state(), torch.get_rng_state()
    try:
        again = capture(unet.denoiser, (), unet.kwargs)
        assert state() == before
        assert torch.equal(torch.get_rng_state(), random)
    finally:
        unet.denoiser.eval()
    assert again.layers == unet.captured.layers
    assert again.layers.fingerprint() == unet.captured.layers.fingerprint()


def test_released_captures_release_the_denoiser():
    import weakref

    denoiser = Tiny()
    alive = weakref.ref(denoiser.first.weight)
    captured = capture(denoiser, (), CALL)
    assert alive() is captured.graph_module.get_parameter("first.weight")
    del denoiser, captured
    gc.collect()
    assert alive() is None


def test_training_mode_is_captured_as_eval():
    class Dropping(Tiny):
        def forward(self, sample, timestep: torch.Tensor):
            return (self.last(nn.functional.dropout(self.first(sample), 0.5, self.training)),)

    denoiser = Dropping().train()
    (estimate,) = capture(denoiser, (), CALL).whole().module(CALL["sample"])
    assert denoiser.training
    assert torch.equal(estimate, denoiser.eval()(**CALL)[0])


def test_hooked_denoisers_are_captured_through_their_own_forward(sd3):
    class Refusing(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            raise AssertionError("the hook must not be traced")

    registry = HookRegistry.check_if_exists_or_initialize(sd3.denoiser)
    registry.register_hook(Refusing(), "refusing")
    try:
        hooked = sd3.denoiser.forward
        again = capture(sd3.denoiser, (), sd3.kwargs)
        assert sd3.denoiser.forward is hooked
    finally:
        registry.remove_hook("refusing")
    assert again.layers == sd3.captured.layers


def forward_two(self, sample, timestep):
    return self.first(sample), self.last(sample)


def forward_none(self, sample, timestep):
    return (sample,)


def forward_stateful(self, sample, timestep):
    self.seen.add_(1)
    return (self.first(sample) + self.seen,)


def forward_writing(self, sample, timestep):
    sample.mul_(2)
    return (self.first(sample),)


def forward_branching(self, sample, timestep):
    return (self.first(sample) if timestep.item() > 500 else self.last(sample),)


def forward_strided(self, sample, timestep):
    return (self.first(sample).as_strided((4, 2), (1, 4)),)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (forward_two, r"returns 2 tensors \(2 computed\)"),
        (forward_none, r"returns 1 tensors \(0 computed\)"),
        (forward_stateful, "changes its buffer 'seen'"),
        (forward_writing, "changes its user_input 'sample'"),
        (forward_branching, "must not branch on tensor values"),
        (forward_strided, "depends on memory layout"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(forward, text):
    denoiser = denoiser_of(forward)
    with pytest.raises(InputError, match=text) as caught:
        capture(denoiser, (), CALL)
    assert "\n" not in str(caught.value)
    assert "Custom" in str(caught.value)
    assert denoiser.training


def test_wrong_shapes_are_refused():
    with pytest.raises(InputError, match=r"cannot be captured by torch\.export at these inputs"):
        capture(Tiny(), (), {**CALL, "sample": torch.ones(2, 5)})


def forward_autocast(self, sample, timestep):
    with torch.autocast("cpu", enabled=False):
        hidden = self.first(sample) * timestep
    return (self.last(hidden + torch.tensor([1.0, 2.0, 3.0, 4.0], device=sample.device)),)


def test_autocast_regions_and_constants_are_inlined():
    case = build_case(
        denoiser_of(lambda self, sample, timestep, return_dict=True: forward_autocast(self, sample, timestep)), CALL
    )
    assert torch.equal(case.run(case.captured.whole(), {})[0], case.estimate)


def test_tied_parameters_stay_tied():
    denoiser = Tiny()
    denoiser.last.weight = denoiser.first.weight
    case = build_case(denoiser, CALL)
    front, back = case.captured.layers.names
    (value,) = case.captured.layers.values
    first = case.captured.extract([front], [value.name]).module
    last = case.captured.extract([back]).module
    shared = {id(p) for p in first.parameters()} & {id(p) for p in last.parameters()}
    assert shared == {id(denoiser.first.weight)}


@pytest.mark.parametrize(
    ("cls", "config", "name"),
    [
        (UNet2DConditionModel, UNET, "unet"),
        (SD3Transformer2DModel, SD3, "sd3"),
    ],
)
def test_meta_capture_equals_real_capture_and_binds(cls, config, name, make_case):
    case = make_case(name)
    meta = meta_denoiser(cls, config, torch.float32)
    assert all(p.is_meta for p in meta.parameters())
    captured = capture(meta, (), case.kwargs)
    assert captured.layers == case.captured.layers
    assert captured.layers.fingerprint() == case.captured.layers.fingerprint()
    assert captured.signature == case.captured.signature
    bound = bind(captured, case.denoiser)
    assert {id(p) for p in bound.graph_module.parameters()} == {id(p) for p in case.denoiser.parameters()}
    assert torch.equal(case.run(bound.whole(), {})[0], case.estimate)
    names = bound.layers.names
    nested = bound.extract(names[3:6], [value.name for value in bound.layers.values if value.producer == names[5]])
    for value, output in zip(nested.values_out, case.run(nested, case.values)):
        assert torch.equal(output, case.values[value])


def test_constants_survive_binding():
    """A constant made on the host is bound with its value; one made on the meta device has none, and says so."""

    def forward_host(self, sample, timestep, return_dict=True):
        return (self.first(sample) * torch.tensor(2.0),)

    for forward, ok in ((forward_host, True), (forward_autocast, False)):
        cls = type("Custom", (Tiny,), {"forward": forward})
        real = cls().eval()
        with torch.device("meta"):
            meta = cls()
        captured = capture(meta, (), CALL)
        if not ok:
            with pytest.raises(PlanMismatchError, match=r"made during the forward.*capture the real denoiser"):
                bind(captured, real)
            continue
        stage = bind(captured, real).whole()
        with torch.no_grad():
            assert torch.equal(stage.module(*[CALL[path] for path in stage.inputs])[0], real(**CALL)[0])


def test_binding_another_model_is_refused(sd3):
    other = SD3Transformer2DModel(**{**SD3, "joint_attention_dim": 28})
    with pytest.raises(PlanMismatchError, match=r"context_embedder.weight is torch.float32 \[32, 28\], captured as"):
        bind(sd3.captured, other)
    unrelated = Tiny()
    with pytest.raises(PlanMismatchError, match="Tiny has no tensor 'pos_embed"):
        bind(sd3.captured, unrelated)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_meta_denoisers_have_the_dtypes_of_real_ones(name, make_case):
    denoiser = make_case(name).denoiser
    real = type(denoiser).from_config(denoiser.config).to(dtype=torch.bfloat16)
    meta = meta_denoiser(type(denoiser), denoiser.config, "bfloat16")
    assert {n: t.dtype for n, t in meta.state_dict().items()} == {n: t.dtype for n, t in real.state_dict().items()}
    assert torch.get_default_dtype() is torch.float32


def test_meta_denoisers_keep_what_the_class_keeps_in_float32(make_case):
    denoiser = make_case("wan").denoiser
    dtypes = {n: t.dtype for n, t in meta_denoiser(type(denoiser), denoiser.config, "bfloat16").state_dict().items()}
    assert dtypes["patch_embedding.weight"] is dtypes["blocks.0.attn1.to_q.weight"] is torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] is dtypes["blocks.1.norm2.weight"] is torch.float32


def test_meta_denoisers_refuse_bad_input():
    with pytest.raises(InputError, match="floating-point"):
        meta_denoiser(SD3Transformer2DModel, SD3, torch.int8)
    with pytest.raises(InputError, match="not a torch dtype"):
        meta_denoiser(SD3Transformer2DModel, SD3, "half-ish")
    with pytest.raises(InputError, match="cannot be built from this config"):
        meta_denoiser(UNet2DConditionModel, {**UNET, "block_out_channels": (32,)})
    assert torch.get_default_dtype() is torch.float32
