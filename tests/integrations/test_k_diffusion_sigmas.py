"""get_sigmas_* against k-diffusion's own, bit for bit."""

import pytest
import torch

from genengine.benchmarks import k_diffusion_package
from genengine.integrations import k_diffusion as K


@pytest.fixture(scope="module")
def peer():
    try:
        return k_diffusion_package.load()
    except k_diffusion_package.Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("n", [1, 2, 13])
def test_get_sigmas_are_the_packages(n, peer):
    for name, calls in {
        "karras": [((0.03, 14.6), {}), ((0.1, 80.0), {"rho": 3.0}), ((2.0, 2.0), {})],
        "exponential": [((0.03, 14.6), {})],
        "polyexponential": [((0.03, 14.6), {}), ((0.1, 80.0), {"rho": 0.7})],
        "vp": [((), {}), ((), {"beta_d": 10.0, "beta_min": 0.2, "eps_s": 1e-2})],
    }.items():
        for arguments, options in calls:
            ours, theirs = (getattr(p, f"get_sigmas_{name}")(n, *arguments, **options) for p in (K, peer.sampling))
            assert torch.equal(ours, theirs) and ours[-1] == 0 and len(ours) == n + 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: K.get_sigmas_karras(0, 0.1, 1.0), "get_sigmas_karras: needs n >= 1.*n=0"),
        (lambda: K.get_sigmas_exponential(4, 2.0, 1.0), "0 < sigma_min <= sigma_max"),
        (lambda: K.get_sigmas_polyexponential(4, 0.0, 1.0), "sigma_min=0.0"),
        (lambda: K.get_sigmas_karras(4, 0.1, 1.0, rho=0), "rho=0"),
        (lambda: K.get_sigmas_vp(4, eps_s=0.0), "get_sigmas_vp: needs .*eps_s=0.0"),
    ],
)
def test_get_sigmas_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
