"""Callers of a fused scheduler that do more than a pipeline: they set attributes, start anywhere, keep results."""

import copy

import pytest
import torch
from diffusers_support import SHAPE, STRICT, distance, fused, make, nothing

from genengine.integrations.diffusers import _schedule, fuse

pytestmark = STRICT


def steps_of(scheduler, x, timesteps, **options):
    for t in timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(0.5 * torch.tanh(scaled), t, x, **options)[0]
    return x


def noisy():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def agree(name, caller, warns=None):
    torch.manual_seed(0)
    expected = caller(make(name, {}))
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=warns) if warns else nothing():
        assert distance(caller(fused(name, {})), expected) < 2e-6


def test_two_schedulers_of_one_config_and_unlike_alphas_do_not_share_their_rows():
    def caller(scheduler, power):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**power
        scheduler.set_timesteps(5)
        return steps_of(scheduler, noisy(), scheduler.timesteps)

    for power in (1.0, 1.5):
        agree("DDIM", lambda scheduler, power=power: caller(scheduler, power))


def test_timesteps_put_in_place_of_those_set_keep_their_number_of_steps():
    five = make("DDIM", {})
    five.set_timesteps(5)

    def caller(scheduler):
        scheduler.set_timesteps(10)
        scheduler.timesteps = five.timesteps.clone()
        return steps_of(scheduler, noisy(), scheduler.timesteps)

    steps_of(twin := fused("DDIM", {}), noisy(), (twin.set_timesteps(5), twin.timesteps)[1])
    agree("DDIM", caller)


@pytest.mark.parametrize(
    ("name", "warns"),
    [("EulerDiscrete", None), ("DDIM", None), ("DPMSolverMultistep", "the config was set during a run")],
)
def test_noise_levels_and_config_may_change_during_a_run(name, warns):
    def caller(scheduler):
        scheduler.set_timesteps(8)
        x = steps_of(scheduler, noisy(), scheduler.timesteps[:3])
        scheduler.register_to_config(prediction_type="v_prediction")
        x = steps_of(scheduler, x, scheduler.timesteps[3:5])
        if hasattr(scheduler, "sigmas"):
            scheduler.sigmas = 0.9 * scheduler.sigmas
        return steps_of(scheduler, x, scheduler.timesteps[5:])

    agree(name, caller, warns)


def test_a_run_from_a_begin_index_goes_on_when_options_change_or_it_is_copied():
    def caller(scheduler):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(3)
        x = steps_of(scheduler, noisy(), scheduler.timesteps[3:5])
        x = steps_of(scheduler, x, scheduler.timesteps[5:7], s_noise=1.1)
        return steps_of(copy.deepcopy(scheduler), x, scheduler.timesteps[7:])

    agree("EulerDiscrete", caller)


def test_a_begin_index_set_late_and_a_step_index_set_early_are_what_they_are_in_diffusers():
    def late(scheduler):
        scheduler.set_timesteps(8)
        x = steps_of(scheduler, noisy(), scheduler.timesteps[:4])
        scheduler.set_begin_index(0)
        return steps_of(scheduler, x, scheduler.timesteps[4:])

    def early(scheduler):
        scheduler.set_timesteps(8)
        scheduler._step_index = 2
        return steps_of(scheduler, noisy(), scheduler.timesteps[2:])

    def again(scheduler):
        scheduler.set_timesteps(8)
        x = steps_of(scheduler, noisy(), scheduler.timesteps)
        scheduler._step_index = None
        return steps_of(scheduler, x, scheduler.timesteps)

    for caller in (late, early, again):
        agree("EulerDiscrete", caller)
    agree("DPMSolverMultistep", again, "_step_index was set during a run")
    agree("DPMSolverMultistep", late)


def test_a_scheduler_fused_in_the_middle_of_a_run_spoils_no_other():
    scheduler = make("DPMSolverMultistep", {})
    scheduler.set_timesteps(9)
    x = steps_of(scheduler, noisy(), scheduler.timesteps[:3])
    expected = steps_of(copy.deepcopy(scheduler), x, scheduler.timesteps[3:])
    with pytest.warns(UserWarning, match="it was fused in the middle of a run"):
        assert torch.equal(steps_of(fuse(scheduler), x, scheduler.timesteps[3:]), expected)
    fresh = fused("DPMSolverMultistep", {})
    fresh.set_timesteps(9)
    steps_of(fresh, noisy(), fresh.timesteps)
    assert fresh._given_up is None


def test_attributes_of_ones_own_stay():
    tags = []
    for tag in "ab":
        scheduler = fused("DDIM", {})
        scheduler.tag = tag
        scheduler.set_timesteps(7)
        steps_of(scheduler, noisy(), scheduler.timesteps)
        tags.append(scheduler.tag)
    assert tags == ["a", "b"]


def test_further_fields_may_be_read_after_the_run():
    def caller(scheduler):
        scheduler.set_timesteps(6)
        x, results = noisy(), []
        for t in scheduler.timesteps:
            results.append(scheduler.step(0.5 * torch.tanh(x), t, x))
            x = results[-1].prev_sample
        return torch.stack([result.pred_original_sample for result in results])

    agree("DDIM", caller)
    agree("EulerDiscrete", caller)


def test_fields_of_an_output_edited_since_are_refused():
    scheduler = fused("DDIM", {})
    scheduler.set_timesteps(6)
    output = noisy()
    result = scheduler.step(output, scheduler.timesteps[0], noisy())
    output.zero_()
    with pytest.raises(RuntimeError, match="the model_output given to step was edited in place"):
        result.pred_original_sample  # noqa: B018


@pytest.mark.parametrize("name", ["DDPM", "DDIM", "EulerDiscrete"])
def test_different_timesteps_in_a_batch_are_not_taken_for_one(name):
    results = []
    for scheduler in (make(name, {}), fused(name, {})):
        scheduler.set_timesteps(6)
        with pytest.raises(RuntimeError) as error:
            scheduler.step(noisy(), scheduler.timesteps[[1, 3]], noisy())
        results.append(str(error.value))
    assert results[0] == results[1]


def test_wuerstchen_takes_a_timestep_for_each_sample():
    def caller(scheduler):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)
        return scheduler.step(noisy(), scheduler.timesteps[[3, 1]], noisy(), generator=generator)[0]

    agree("DDPMWuerstchen", caller, "the samples of a batch are at different timesteps")


def test_philox_noise_of_two_runs_without_set_timesteps_differs():
    scheduler = fused("DDPM", {}, "philox")
    scheduler.set_timesteps(4)
    seeded = [
        steps_of(scheduler, noisy(), scheduler.timesteps, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2, 1)
    ]
    assert torch.equal(seeded[0], seeded[2]) and not torch.equal(seeded[0], seeded[1])
    first, second = (steps_of(scheduler, noisy(), scheduler.timesteps) for _ in range(2))
    assert not torch.equal(first, second)


def test_arguments_that_step_refuses():
    scheduler = fused("DDIM", {})
    scheduler.set_timesteps(6)
    t, noise = scheduler.timesteps[0], noisy()
    with pytest.raises(ValueError, match="Cannot pass both generator and variance_noise"):
        scheduler.step(noise, t, noise, eta=1.0, generator=torch.Generator(), variance_noise=noise)
    with pytest.raises(TypeError, match="takes 8 arguments, got 10"):
        scheduler.step(noise, t, noise, 0.0, False, None, None, True, 1, 2)


def test_edits_that_inference_mode_hides_are_not_missed():
    def caller(scheduler):
        scheduler.set_timesteps(8)
        x = noisy()
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = steps_of(scheduler, x, t[None]).mul_(0.9)
        return x

    agree("UniPCMultistep", caller, "in inference mode this cannot be seen")
    agree("DPMSolverMultistep", caller)


def test_a_refused_schedule_is_traced_once(monkeypatch):
    traced = []
    monkeypatch.setattr(_schedule, "Plan", lambda *args, plan=_schedule.Plan: traced.append(1) or plan(*args))
    scheduler = fused("PNDM", {"skip_prk_steps": False})
    for _ in range(2):
        scheduler.set_timesteps(13)
        with pytest.warns(UserWarning, match="PNDM"):
            steps_of(scheduler, noisy(), scheduler.timesteps[:2])
        scheduler.__dict__.pop("_warned")
    assert len(traced) == 1
