"""The samplers of k-diffusion, on the fused loop: change one import, keep the model, the noise levels and the callback.

    python examples/k_diffusion_loop.py

k-diffusion itself is not needed. The model is the exact denoiser of two Gaussian blobs, so the result can be checked.
"""

import torch

from genengine.integrations import k_diffusion as K  # instead of: from k_diffusion import sampling as K

CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
WIDTH = 0.3
SIGMA_MAX = 20.0


def denoiser(x, sigma, shift=0.0):
    """E[x0 | x, sigma]: given the blob, x0 is Gaussian; the blobs are weighted by how likely they made x."""
    variance = WIDTH**2 + sigma[:, None] ** 2
    distance = x[:, None] - CENTRES - shift  # (B, blob, 2)
    weight = (-(distance**2).sum(-1) / (2 * variance)).softmax(-1)[..., None]
    guess = CENTRES + shift + WIDTH**2 * distance / variance[..., None]
    return (weight * guess).sum(1)


def main(num=2000):
    """Draw `num` points with three samplers; returns {name: (num, 2)}."""
    torch.manual_seed(0)
    sigmas = K.get_sigmas_karras(30, 0.01, SIGMA_MAX)
    x = SIGMA_MAX * torch.randn(num, 2)
    steps = []
    results = {
        "sample_dpmpp_2m": K.sample_dpmpp_2m(denoiser, x, sigmas, extra_args={"shift": 0.0}, callback=steps.append),
        "sample_heun, churned": K.sample_heun(denoiser, x, sigmas, s_churn=10.0, s_tmin=0.05, s_tmax=10.0),
    }
    assert [step["i"] for step in steps] == list(range(30))
    # noise that is a function of (seed, sample index): the same samples for every split of the batch
    philox = {"noise_sampler": "philox", "seed": 7}
    whole = K.sample_dpmpp_3m_sde(denoiser, x, sigmas, **philox)
    part = K.sample_dpmpp_3m_sde(denoiser, x[5:9], sigmas, **philox, sample_ids=torch.arange(5, 9))
    assert (part - whole[5:9]).abs().max() < 1e-5  # the model may round differently, the noise does not
    return results | {"sample_dpmpp_3m_sde, philox": whole}


if __name__ == "__main__":
    for name, x in main().items():
        for centre in CENTRES:
            cloud = x[(x - centre).norm(dim=1) < 6 * WIDTH]
            print(f"{name}: {len(cloud)} of {len(x)} near {centre.tolist()}, mean {cloud.mean(0).tolist()}")
