"""k-diffusion's samplers on a GPU: captured equals uncaptured, and no step waits for the host."""

import pytest
import torch

from genengine.integrations import k_diffusion as K

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CHURNED = ("euler", "heun", "dpm_2")
DETERMINISTIC = ("lms", "dpmpp_2m")
STOCHASTIC = (
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_fast"
)  # fmt: skip


def model(x, sigma):
    sigma = sigma.view(-1, 1, 1, 1)
    return (x + sigma * torch.tanh(x)) / (1 + sigma**2)


def run(name, of=model, sigmas_on=DEVICE, **options):
    x = 14.6 * torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    levels = (0.1, 14.6, 9) if name == "dpm_fast" else (K.get_sigmas_karras(8, 0.1, 14.6, device=sigmas_on),)
    if name in CHURNED:
        options["s_churn"] = 4.0
    return getattr(K, f"sample_{name}")(of, x, *levels, disable=True, **options)


@pytest.mark.parametrize("name", [*CHURNED, *DETERMINISTIC, *STOCHASTIC])
def test_captured_equals_uncaptured(name):
    options = {} if name in DETERMINISTIC else {"noise_sampler": "philox", "seed": 3}
    plain = run(name, **options)
    assert plain.isfinite().all()
    for capture in ("auto", "step", "loop"):
        assert torch.equal(run(name, capture=capture, **options), plain), capture


@pytest.mark.parametrize("noise_sampler", [None, "philox"])
@pytest.mark.parametrize("sigmas_on", ["cpu", DEVICE])
@pytest.mark.parametrize("name", [*CHURNED, *DETERMINISTIC, *STOCHASTIC])
def test_no_host_sync_in_the_loop(name, sigmas_on, noise_sampler):
    if noise_sampler is None and name.endswith("sde"):
        pytest.skip("torchsde's Brownian tree, the default of this sampler, waits for the device")
    options = {} if name in DETERMINISTIC else {"noise_sampler": noise_sampler}
    run(name, sigmas_on=sigmas_on, **options)  # verification and compilation happen here
    started = []

    def watched(x, sigma):
        if not started:
            started.append(torch.cuda.set_sync_debug_mode("error"))
        return model(x, sigma)

    try:
        run(name, of=watched, sigmas_on=sigmas_on, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started
