"""Fused schedulers against the classes of the installed diffusers: same images, same fields, same draws."""

import pytest
import torch
from diffusers_support import AFFINE, STRICT, distance, fused, make, sample

pytestmark = STRICT


def case(name, steps=20, step=None, schedule=None, tolerance=2e-6, **config):
    label = ",".join([name, *(f"{k}={v}" for k, v in (config | (schedule or {}) | (step or {})).items()), f"{steps}"])
    return pytest.param(name, config, steps, step or {}, schedule or {}, tolerance, id=label)


DEFAULTS = [
    case(name, steps) for name in AFFINE for steps in (20, 50) if (name, steps) != ("CMStochasticIterative", 50)
]
DEFAULTS += [case("PNDM", steps, skip_prk_steps=True) for steps in (20, 50)] + [
    case("SCM", 2),
    case("DDPM", 1000, tolerance=1e-5),
]
PREDICTIONS = [
    case(name, prediction_type=prediction)
    for name in ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "DPMSolverMultistep",
                 "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "LCM", "TCD", "SASolver", "KDPM2Discrete",
                 "KDPM2AncestralDiscrete", "LMSDiscrete", "DDIMInverse", "DPMSolverMultistepInverse")
    for prediction in ("v_prediction", "sample")
    if not (prediction == "sample" and ("KDPM2" in name or name in ("EulerAncestralDiscrete", "DDIMInverse")))
]  # fmt: skip
OPTIONS = [
    *(case("DDPM", variance_type=v) for v in ("fixed_small_log", "fixed_large")),
    case("DDPM", clip_sample=False),
    case("DDPM", clip_sample_range=0.5),
    case("DDPM", thresholding=True, sample_max_value=1.5),
    *(case("DDPM", beta_schedule=b) for b in ("scaled_linear", "squaredcos_cap_v2", "sigmoid")),
    *(case("DDPM", timestep_spacing=s, steps_offset=o) for s, o in (("linspace", 0), ("leading", 1), ("trailing", 0))),
    case("DDPM", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
    *(case("DDIM", step={"eta": eta}, clip_sample=clip) for eta in (0.3, 1.0) for clip in (True, False)),
    case("DDIM", step={"eta": 0.5, "use_clipped_model_output": True}),
    case("DDIM", thresholding=True, clip_sample=False, sample_max_value=2.0),
    case("DDIM", set_alpha_to_one=False, steps_offset=1),
    case("DDIM", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
    case("EulerDiscrete", step={"s_churn": 4.0, "s_noise": 1.01}, use_karras_sigmas=True),
    *(case("EulerDiscrete", **{f"use_{kind}_sigmas": True}) for kind in ("karras", "exponential", "beta")),
    case("EulerDiscrete", final_sigmas_type="sigma_min", timestep_spacing="trailing"),
    case("EulerDiscrete", interpolation_type="log_linear", steps_offset=1, timestep_spacing="leading"),
    case("EulerDiscrete", rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"),
    case("EulerAncestralDiscrete", timestep_spacing="leading", steps_offset=1),
    case("HeunDiscrete", clip_sample=True, clip_sample_range=0.7),
    case("HeunDiscrete", use_karras_sigmas=True),
    *(case("DPMSolverMultistep", solver_order=o, algorithm_type=a) for o in (1, 2, 3)
      for a in ("dpmsolver++", "sde-dpmsolver++")),
    *(case("DPMSolverMultistep", solver_order=o, algorithm_type=a, final_sigmas_type="sigma_min")
      for o, a in ((1, "dpmsolver"), (2, "dpmsolver"), (3, "dpmsolver"), (1, "sde-dpmsolver"), (2, "sde-dpmsolver"))),
    case("DPMSolverMultistep", solver_type="heun", algorithm_type="sde-dpmsolver++"),
    case("DPMSolverMultistep", thresholding=True, sample_max_value=1.4),
    case("DPMSolverMultistep", thresholding=True, algorithm_type="sde-dpmsolver++"),
    *(case("DPMSolverMultistep", **{f"use_{kind}": True}) for kind in ("karras_sigmas", "exponential_sigmas",
      "beta_sigmas", "lu_lambdas")),
    case("DPMSolverMultistep", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    case("DPMSolverMultistep", 10, euler_at_final=True),
    case("DPMSolverMultistep", 10, tolerance=5e-6, lower_order_final=False, final_sigmas_type="sigma_min",
         solver_order=3),
    case("DPMSolverMultistep", final_sigmas_type="sigma_min"),
    case("DPMSolverMultistep", variance_type="learned_range"),
    *(case("DPMSolverSinglestep", solver_order=o) for o in (1, 2, 3)),
    case("DPMSolverSinglestep", solver_order=2, algorithm_type="sde-dpmsolver++"),
    *(case("DEISMultistep", solver_order=o) for o in (1, 2, 3)),
    *(case("EDMDPMSolverMultistep", solver_order=o, algorithm_type=a)
      for o, a in ((2, "dpmsolver++"), (3, "dpmsolver++"), (2, "sde-dpmsolver++"))),
    *(case("UniPCMultistep", solver_order=o) for o in (1, 2, 3)),
    *(case("UniPCMultistep", solver_order=o, solver_type="bh1", final_sigmas_type="sigma_min") for o in (1, 2, 3)),
    case("UniPCMultistep", predict_x0=False, final_sigmas_type="sigma_min"),
    case("UniPCMultistep", disable_corrector=[0, 1, 2]),
    case("UniPCMultistep", thresholding=True),
    case("UniPCMultistep", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
    *(case("SASolver", predictor_order=p, corrector_order=c) for p, c in ((1, 1), (2, 2), (2, 1), (1, 2))),
    case("SASolver", tau_func=None),
    case("FlowMatchEulerDiscrete", shift=3.0),
    case("FlowMatchEulerDiscrete", stochastic_sampling=True),
    case("FlowMatchEulerDiscrete", use_dynamic_shifting=True, schedule={"num_inference_steps": 12, "mu": 0.9}),
    case("FlowMatchEulerDiscrete", schedule={"sigmas": [1.0, 0.8, 0.5, 0.2]}),
    case("FlowMatchEulerDiscrete", use_karras_sigmas=True),
    case("FlowMatchEulerDiscrete", invert_sigmas=True),
    case("FlowMatchEulerDiscrete", shift_terminal=0.1, use_dynamic_shifting=True,
         schedule={"num_inference_steps": 12, "mu": 0.9}),
    case("FlowMatchHeunDiscrete", shift=3.0, step={"s_noise": 1.01}),
    case("DDPM", schedule={"timesteps": [999, 700, 400, 100, 10]}),
    case("EDMEuler", step={"s_churn": 4.0}),
    case("EDMEuler", prediction_type="v_prediction", sigma_schedule="exponential"),
    case("UnCLIP", variance_type="learned_range"),
    case("DDPM", variance_type="learned_range"),
    case("DDPM", variance_type="learned_range", thresholding=True),
    case("LCM", thresholding=True),
    case("LCM", clip_sample=True),
    case("LCM", 4),
    case("TCD", 4, step={"eta": 0.0}),
    case("LMSDiscrete", use_karras_sigmas=True),
    case("CosineDPMSolverMultistep", solver_order=1),
    case("DPMSolverSDE", use_karras_sigmas=True, noise_sampler_seed=3),
    case("IPNDM", 5),
]  # fmt: skip


@pytest.mark.parametrize("name, config, steps, step, schedule, tolerance", DEFAULTS + PREDICTIONS + OPTIONS)
def test_samples_fields_and_draws_are_the_scheduler_s_own(name, config, steps, step, schedule, tolerance):
    torch.manual_seed(3)
    x, results, drawn = sample(make(name, config), steps, step, schedule)
    after = torch.rand(1).item()
    torch.manual_seed(3)
    ours, our_results, our_drawn = sample(fused(name, config), steps, step, schedule)
    assert torch.isfinite(x).all()
    assert distance(ours, x) <= tolerance
    assert our_drawn == drawn and torch.rand(1).item() == after, "as many draws, from the same generators"
    assert type(our_results[-1]).__name__ == type(results[-1]).__name__ and isinstance(
        our_results[-1], type(results[-1])
    )
    assert list(our_results[-1].keys()) == list(results[-1].keys())
    for field in results[-1]:
        assert distance(our_results[-1][field], results[-1][field]) <= 2 * tolerance, field
