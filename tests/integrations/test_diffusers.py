"""Fused schedulers as objects: state, classes, dtypes, noise, errors, and the quirks a drop-in keeps."""

import copy
import inspect
import json
import pickle

import pytest
import torch
from diffusers_support import AFFINE, SHAPE, STRICT, diffusers, distance, fused, make, nothing, sample

from genengine.integrations.diffusers import fuse, fused_class

pytestmark = STRICT

# ---- attributes and state ----------------------------------------------------------------------------------------

STATEFUL = (
    "DDPM", "DDIM", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
    "DEISMultistep", "UniPCMultistep", "SASolver", "LMSDiscrete", "IPNDM", "FlowMatchHeunDiscrete",
)  # fmt: skip


def attributes(scheduler):
    hidden = ("_internal_dict", "_schedule", "_run", "_given_up", "_warned", "_config_key", "noise_sampler")
    run = scheduler.__dict__.get("_run")
    names = set(vars(scheduler)) | set(run.lazy_names if run else ())
    return {name: getattr(scheduler, name) for name in sorted(names) if name not in hidden}


# (x - x0)/sigma and its kin: x and x0 agree to 7 digits, of which dividing by the last sigmas, 0.03, leaves the
# scheduler itself fewer
SLOPES = ("prev_derivative", "derivatives", "model_outputs")


def same(a, b, tolerance):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        atol = tolerance * float(1 + b.nan_to_num().abs().max())
        return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (callable(a) or bool(a == b))


@pytest.mark.parametrize("name", STATEFUL)
def test_after_every_step_all_attributes_are_the_scheduler_s_own(name):
    states = [[], []]
    for kind, scheduler in enumerate((make(name, {}), fused(name, {}))):
        remember = lambda k, x, s=scheduler, kept=states[kind]: kept.append(copy.deepcopy(attributes(s))) or x  # noqa: E731
        torch.manual_seed(0)
        sample(scheduler, 8, edit=remember)
    for row, (theirs, ours) in enumerate(zip(*states, strict=True)):
        assert theirs.keys() == ours.keys(), row
        for key in theirs:
            assert same(ours[key], theirs[key], 2e-3 if key in SLOPES else 4e-6), (row, key)


def test_two_schedulers_and_two_runs_do_not_meet():
    alone, _, _ = sample(fused("DPMSolverMultistep", {}), 10)
    a, b = fused("DPMSolverMultistep", {}), fused("DPMSolverMultistep", {})
    b.set_timesteps(7)
    sample_b = lambda k, x: (b.step(x, b.timesteps[k], x) if k < 7 else None, x)[1]  # noqa: E731
    interleaved, _, _ = sample(a, 10, edit=sample_b)
    again, _, _ = sample(a, 10)
    assert torch.equal(interleaved, alone) and torch.equal(again, alone)


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "FlowMatchEulerDiscrete"]
)
@pytest.mark.parametrize("begin", [True, False])
def test_a_run_may_start_anywhere(name, begin):
    results = []
    for scheduler in (make(name, {}), fused(name, {})):
        if begin and hasattr(scheduler, "set_begin_index"):
            set_timesteps = scheduler.set_timesteps
            scheduler.set_timesteps = lambda *a, s=scheduler, f=set_timesteps: (f(*a), s.set_begin_index(6))
        results.append(sample(scheduler, 20, start=6)[0])
    assert distance(results[1], results[0]) <= 2e-6


@pytest.mark.parametrize("name", ["DDIM", "HeunDiscrete", "DPMSolverMultistep", "LMSDiscrete"])
def test_latents_may_be_edited_between_steps(name):
    edit = lambda k, x: x * 0.9 + 0.05 if k % 3 == 1 else x  # noqa: E731
    assert distance(sample(fused(name, {}), 12, edit=edit)[0], sample(make(name, {}), 12, edit=edit)[0]) <= 2e-6


@pytest.mark.parametrize("name", ["UniPCMultistep", "SASolver"])
def test_an_edit_before_a_correction_is_left_to_the_scheduler(name):
    edit = lambda k, x: x * 0.9 + 0.05 if k == 4 else x  # noqa: E731
    torch.manual_seed(0)
    expected = sample(make(name, {}), 12, edit=edit)[0]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="edited between a predictor's step and its correction"):
        actual = sample(fused(name, {}), 12, edit=edit)[0]
    assert distance(actual, expected) <= 2e-6


@pytest.mark.parametrize("name", ["DDPM", "DPMSolverMultistep", "UniPCMultistep"])
@pytest.mark.parametrize("twin", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_a_run_goes_on(name, twin):
    scheduler = fused(name, {})
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps[:4]:
        x = scheduler.step(torch.tanh(x), t, x)[0]
    other = twin(scheduler)
    assert type(other) is type(scheduler) and other.config == scheduler.config
    results = []
    for each in (scheduler, other):
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="copied") if each is other and name != "DDPM" else nothing():
            results.append(each.step(torch.tanh(x), each.timesteps[4], x)[0])
    assert distance(results[1], results[0]) <= 2e-6


# ---- the class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*AFFINE, "PNDM", "SCM"])
def test_it_is_the_class_in_all_but_the_step(name, tmp_path):
    cls = getattr(diffusers, f"{name}Scheduler")
    ours = fused_class(cls)
    assert issubclass(ours, cls) and ours is fused_class(cls) and ours.__name__ == cls.__name__
    for method in ("__init__", "step", "set_timesteps"):
        assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(cls, method))
    scheduler = ours()
    assert dict(scheduler.config) == dict(cls().config)
    assert set(scheduler.compatibles) == set(cls().compatibles)
    scheduler.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == f"{name}Scheduler"
    for loaded in (cls.from_pretrained(tmp_path), ours.from_pretrained(tmp_path)):
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
            k: v for k, v in cls().config.items() if k[0] != "_"
        }
    assert type(ours.from_config(cls().config)) is ours
    assert type(fuse(cls())) is ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["DDIM", "DDPM", "EulerDiscrete", "DPMSolverMultistep", "FlowMatchEulerDiscrete", "UniPCMultistep"]
)
def test_16_bit_latents_err_no_more_than_the_scheduler_s_own(name, dtype):
    exact = sample(make(name, {}), 12, dtype=torch.float32)[0]
    theirs, ours = (sample(s, 12, dtype=dtype)[0] for s in (make(name, {}), fused(name, {})))
    assert ours.dtype == theirs.dtype == dtype
    rounding = torch.finfo(dtype).eps
    assert distance(ours.float(), exact) <= 2 * distance(theirs.float(), exact) + rounding


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscrete", "DDPM", "EulerDiscrete"])
@pytest.mark.parametrize("state, model", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_mixed_dtypes_give_the_scheduler_s_dtype(name, state, model):
    theirs, ours = make(name, {}), fused(name, {})
    x, output = torch.randn(SHAPE).to(state), torch.randn(SHAPE).to(model)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        arguments = {"generator": torch.Generator().manual_seed(0)}
        results.append(scheduler.step(output, scheduler.timesteps[0], x, **arguments)[0])
    assert results[0].dtype == results[1].dtype
    assert distance(results[1].float(), results[0].float()) <= 2 * torch.finfo(torch.bfloat16).eps


def test_channels_last_strided_empty_and_float64():
    for layout in (
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[:0],
        torch.Tensor.double,
    ):
        results = []
        for scheduler in (make("DPMSolverMultistep", {}), fused("DPMSolverMultistep", {})):
            scheduler.set_timesteps(4)
            x = layout(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
            for t in scheduler.timesteps:
                x = scheduler.step(torch.tanh(x), t, x)[0]
            results.append(x)
        assert results[1].shape == results[0].shape and results[1].dtype == results[0].dtype
        assert x.numel() == 0 or distance(results[1], results[0]) <= 2e-6


# ---- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DDPM", "EulerAncestralDiscrete", "LCM"])
def test_torch_noise_from_a_list_of_generators(name):
    arguments = lambda: {"generator": [torch.Generator().manual_seed(i) for i in range(2)]}  # noqa: E731
    results = [sample_with(s, 5, arguments()) for s in (make(name, {}), fused(name, {}))]
    assert distance(results[1], results[0]) <= 2e-6


def sample_with(scheduler, steps, arguments, shape=SHAPE):
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))[: shape[0]] * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(x_in), t, x, **arguments)[0]
    return x


def test_given_noise_is_used():
    noise = torch.randn(SHAPE)
    arguments = {"eta": 1.0, "variance_noise": noise}
    results = [sample_with(s, 5, arguments) for s in (make("DDIM", {}), fused("DDIM", {}), fused("DDIM", {}, "philox"))]
    assert distance(results[1], results[0]) <= 2e-6 and torch.equal(results[1], results[2])


@pytest.mark.parametrize("name", ["DDPM", "EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_philox_noise_does_not_depend_on_the_batch(name):
    config = {"algorithm_type": "sde-dpmsolver++"} if name == "DPMSolverMultistep" else {}
    generators = lambda n: {"generator": [torch.Generator().manual_seed(11) for _ in range(n)]}  # noqa: E731
    both = sample_with(fused(name, config, "philox"), 6, generators(2))
    first = sample_with(fused(name, config, "philox"), 6, generators(1), (1, *SHAPE[1:]))
    assert torch.equal(both[:1], first)
    one = {"generator": torch.Generator().manual_seed(11)}
    a, b = (sample_with(fused(name, config, "philox"), 6, one) for _ in range(2))
    assert torch.equal(a, b), "the generator gives the seed and is not advanced"
    plain = sample_with(make(name, config), 6, {"generator": torch.Generator().manual_seed(11)})
    assert 0.5 < float(a.std() / plain.std()) < 2 and not torch.allclose(a, plain)
    torch.manual_seed(0)
    c, d = (sample_with(fused(name, config, "philox"), 6, {}) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(sample_with(fused(name, config, "philox"), 6, {}), c) and not torch.equal(c, d)


# ---- errors, and what is left to the scheduler -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EulerDiscrete", "FlowMatchEulerDiscrete", "CMStochasticIterative", "EDMEuler"])
def test_integer_timesteps_are_refused_where_the_scheduler_refuses_them(name):
    for scheduler in (make(name, {}), fused(name, {})):
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="integer"):
            scheduler.step(torch.zeros(SHAPE), 1, torch.zeros(SHAPE))
    x = torch.ones(SHAPE)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x)[0]
    assert torch.isfinite(x).all(), "and the scheduler goes on after it"


def test_errors_name_what_is_wrong():
    scheduler = fused("DPMSolverMultistep", {})
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(torch.zeros(SHAPE), 999, torch.zeros(SHAPE))
    scheduler.set_timesteps(5)
    with pytest.raises(
        ValueError, match=r"DPMSolverMultistepScheduler.step: model_output must be \(2, 3, 8, 8\) like sample, got"
    ):
        scheduler.step(torch.zeros(2, 4, 8, 8), scheduler.timesteps[0], torch.zeros(SHAPE))
    with pytest.raises(TypeError, match="foo"):
        scheduler.step(torch.zeros(SHAPE), scheduler.timesteps[0], torch.zeros(SHAPE), foo=1)
    flow = fused("FlowMatchEulerDiscrete", {})
    flow.set_timesteps(5)
    with pytest.raises(IndexError, match=r"timestep 123.0 is none of the 5 that are set"):
        flow.step(torch.zeros(SHAPE), torch.tensor(123.0), torch.zeros(SHAPE))


@pytest.mark.parametrize(
    "cls, message",
    [
        ("CogVideoXDPMScheduler", "does not step on"),
        ("RePaintScheduler", "original_image, mask. does not step on"),
        ("ScoreSdeVeScheduler", "must be a scheduler class with set_timesteps and step"),
        ("UNet2DModel", "must be a scheduler class"),
    ],
)
def test_classes_that_cannot_be_fused_are_refused(cls, message):
    with pytest.raises(TypeError, match=message):
        fused_class(getattr(diffusers, cls))


def test_bad_arguments_of_fused_class_and_fuse():
    with pytest.raises(ValueError, match="noise must be one of torch, philox, got 'cuda'"):
        fused_class(diffusers.DDIMScheduler, "cuda")
    with pytest.raises(TypeError, match="fused already"):
        fused_class(fused_class(diffusers.DDIMScheduler))
    with pytest.raises(TypeError, match="expected a diffusers pipeline with a scheduler, or a scheduler, got Linear"):
        fuse(torch.nn.Linear(1, 1))


def test_a_gradient_flows_through_the_scheduler_s_own_step():
    grads = []
    for scheduler in (make("DDIM", {"clip_sample": False}), fused("DDIM", {"clip_sample": False})):
        scheduler.set_timesteps(5)
        x = torch.ones(SHAPE, requires_grad=True)
        with nothing() if not grads else pytest.warns(UserWarning, match="a gradient is to flow through the step"):
            scheduler.step(2 * x, scheduler.timesteps[0], x)[0].sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads)


@pytest.mark.parametrize(
    "name, config, reason",
    [
        ("PNDM", {}, "more than 3 tensors of history"),
        ("UniPCMultistep", {"solver_type": "bh1"}, "row 9 is not a number"),
        ("DDPM", {"variance_type": "learned"}, "learned variance"),
    ],
)
def test_what_is_no_table_is_left_to_the_scheduler_and_says_why(name, config, reason):
    torch.manual_seed(0)
    expected = sample(make(name, config), 10)[0]
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=reason):
        actual = sample(fused(name, config), 10)[0]
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_per_token_timesteps_are_left_to_the_scheduler():
    results = []
    for scheduler in (make("FlowMatchEulerDiscrete", {}), fused("FlowMatchEulerDiscrete", {})):
        scheduler.set_timesteps(5)
        x, tokens = torch.ones(2, 7, 4), torch.rand(2, 7, generator=torch.Generator().manual_seed(0)) * 1000
        with nothing() if not results else pytest.warns(UserWarning, match="per_token_timesteps"):
            results.append(scheduler.step(torch.tanh(x), scheduler.timesteps[0], x, per_token_timesteps=tokens)[0])
    assert torch.equal(*results)


# ---- quirks of diffusers that a drop-in has to keep ---------------------------------------------------------------


def test_flow_matching_shifts_its_last_sigma_twice():
    scheduler = fused("FlowMatchEulerDiscrete", {"shift": 3.0})
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[-2].item() == pytest.approx(0.00893, abs=1e-5)


def test_flow_matching_ignores_churn():
    plain = sample(fused("FlowMatchEulerDiscrete", {}), 5)[0]
    assert torch.equal(sample(fused("FlowMatchEulerDiscrete", {}), 5, {"s_churn": 5.0})[0], plain)


def test_of_equal_timesteps_the_second_is_taken():
    results = []
    for scheduler in (make("HeunDiscrete", {}), fused("HeunDiscrete", {})):
        scheduler.set_timesteps(6)
        t, x = scheduler.timesteps[1], torch.ones(SHAPE)
        assert t == scheduler.timesteps[2]
        results.append(scheduler.step(torch.tanh(x), t, x)[0])
        assert scheduler.step_index == 3
    assert distance(results[1], results[0]) <= 2e-6


def test_ddim_steps_by_whole_strides_not_by_its_list():
    for kind in (make, fused):
        scheduler = kind("DDIM", {"timestep_spacing": "linspace", "clip_sample": False})
        scheduler.set_timesteps(7)
        x = torch.ones(SHAPE)
        t, stride = int(scheduler.timesteps[2]), 1000 // 7
        before, after = (scheduler.alphas_cumprod[i].double() for i in (t, t - stride))
        x0 = (1 - (1 - before) ** 0.5 * 0.5) / before**0.5
        expected = after**0.5 * x0 + (1 - after) ** 0.5 * 0.5
        assert torch.allclose(scheduler.step(0.5 * x, t, x)[0].double(), expected.expand(SHAPE), rtol=1e-5)


def test_fixed_large_log_is_not_a_number_here_as_there():
    for scheduler in (
        make("DDPM", {"variance_type": "fixed_large_log"}),
        fused("DDPM", {"variance_type": "fixed_large_log"}),
    ):
        scheduler.set_timesteps(10)
        x = torch.ones(SHAPE)
        with (
            nothing() if type(scheduler) is diffusers.DDPMScheduler else pytest.warns(UserWarning, match="not a number")
        ):
            result = scheduler.step(torch.tanh(x), scheduler.timesteps[0], x)[0]
        assert result.isnan().any()


def test_lengths_of_timesteps():
    for name, length in (("HeunDiscrete", 19), ("KDPM2Discrete", 19), ("FlowMatchHeunDiscrete", 19), ("DDIM", 10)):
        scheduler = fused(name, {})
        scheduler.set_timesteps(10)
        assert len(scheduler.timesteps) == length
    pndm = fused("PNDM", {"skip_prk_steps": True})
    pndm.set_timesteps(10)
    assert len(pndm.timesteps) == 11


@pytest.mark.parametrize(
    "layouts", [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)], ids=str
)
def test_noise_is_laid_out_like_the_sample_whatever_the_output_s_layout(layouts):
    state, model = layouts
    for arguments in ({}, {"variance_noise": torch.randn(SHAPE)}):
        results = []
        for scheduler in (make("DDIM", {}), fused("DDIM", {})):
            scheduler.set_timesteps(4)
            torch.manual_seed(0)
            x = torch.randn(SHAPE)
            for t in scheduler.timesteps:
                x, output = x.contiguous(memory_format=state), torch.tanh(x).contiguous(memory_format=model)
                x = scheduler.step(output, t, x, eta=1.0, **arguments)[0]
            results.append(x)
        assert distance(results[1], results[0]) <= 2e-6
