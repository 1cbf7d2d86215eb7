"""The drop-in samplers against k-diffusion's own, in the same process, with the same noise."""

import inspect

import pytest
import torch

from genengine.benchmarks import k_diffusion_package
from genengine.integrations import k_diffusion as K
from genengine.ops import normal

CHURN = {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 12.0, "s_noise": 1.01}
OPTIONS = {
    "euler": [{}, CHURN],
    "euler_ancestral": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 2.0}],
    "heun": [{}, CHURN],
    "dpm_2": [{}, CHURN],
    "dpm_2_ancestral": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 2.0}],
    "lms": [{}, {"order": 1}, {"order": 2}, {"order": 3}],
    "dpm_fast": [{}, {"eta": 0.7, "s_noise": 1.1}],
    "dpmpp_2s_ancestral": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 2.0}],
    "dpmpp_sde": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}, {"r": 0.3}, {"eta": 2.0}],
    "dpmpp_2m": [{}],
    "dpmpp_2m_sde": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}, {"solver_type": "heun"}],
    "dpmpp_3m_sde": [{}, {"eta": 0.4, "s_noise": 1.1}, {"eta": 0.0}],
}
CASES = [pytest.param(n, o, id="-".join([n, *map(str, o.values())])) for n, all_of in OPTIONS.items() for o in all_of]
CHURNED = ("euler", "heun", "dpm_2")
DETERMINISTIC = ("lms", "dpmpp_2m")
TREES = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
SIGMAS = {"ends in 0": K.get_sigmas_karras(9, 0.03, 14.6), "ends above 0": K.get_sigmas_exponential(7, 0.1, 14.6)[:-1]}
# torchsde warns where a level and its end differ by a rounding, ours and theirs alike
pytestmark = pytest.mark.filterwarnings("ignore:Should have t:UserWarning")


@pytest.fixture(scope="module")
def peer():
    try:
        return k_diffusion_package.load()
    except k_diffusion_package.Unavailable as error:
        pytest.skip(str(error))


def model(x, sigma, shift=0.0):
    """A denoiser that depends on everything it is given, smoothly."""
    assert sigma.shape == (len(x),) and sigma.dtype == x.dtype
    sigma = sigma.view(-1, *[1] * (x.dim() - 1))
    scale = (1 + sigma**2) ** -0.5
    mixed = x * scale + 0.3 * (x * scale).roll(1, -1) - 0.2 * (x * scale).roll(1, 1)
    return x * scale**2 + sigma * scale * torch.tanh(mixed + sigma.log() / 4 + shift)


def noisy(shape=(3, 2, 5, 7), sigma=14.6):
    return torch.randn(shape) * sigma


def levels(name, sigmas):
    """The positional arguments after x."""
    return (float(sigmas[sigmas > 0].min()), float(sigmas.max()), len(sigmas)) if name == "dpm_fast" else (sigmas,)


def run(package, name, x, sigmas, *, of=model, torch_seed=3, **options):
    torch.manual_seed(torch_seed)
    return getattr(package, f"sample_{name}")(of, x, *levels(name, sigmas), disable=True, **options)


def assert_close(ours, theirs, largest=None):
    """Within 32 roundings (2e-6) of the largest entry: a run is 10 to 20 evaluations, each rounded a few times."""
    assert ours.dtype == theirs.dtype == torch.float32 and ours.shape == theirs.shape
    largest = theirs.abs().max() if largest is None else largest
    assert theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 32 * 2**-24 * largest


@pytest.mark.parametrize("name", OPTIONS)
def test_signature_is_the_packages_and_more_by_keyword(name, peer):
    theirs, ours = (
        list(inspect.signature(getattr(module, f"sample_{name}")).parameters.values()) for module in (peer.sampling, K)
    )
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


def test_all_samplers_are_here_or_refused(peer):
    theirs = {name for name in vars(peer.sampling) if name.startswith(("sample_", "get_sigmas_"))}
    assert {f"sample_{name}" for name in OPTIONS} | {"sample_dpm_adaptive"} == {
        name for name in theirs if name.startswith("sample_")
    }
    assert {name for name in theirs if not hasattr(K, name)} == {"sample_dpm_adaptive"}


@pytest.mark.parametrize("sigmas", SIGMAS.values(), ids=SIGMAS)
@pytest.mark.parametrize("name, options", CASES)
def test_parity_with_default_noise_and_the_same_seed(name, options, sigmas, peer):
    x = noisy()
    theirs, their_state = run(peer.sampling, name, x, sigmas, **options), torch.get_rng_state()
    before = x.clone()
    ours, our_state = run(K, name, x, sigmas, **options), torch.get_rng_state()
    assert_close(ours, theirs)
    assert torch.equal(our_state, their_state)  # as many draws, also where they are multiplied by 0
    assert torch.equal(x, before) and not ours.is_inference()


@pytest.mark.parametrize("sigmas", SIGMAS.values(), ids=SIGMAS)
@pytest.mark.parametrize("name, options", CASES)
def test_no_further_from_float64_than_the_package(name, options, sigmas, peer, monkeypatch):
    x = noisy()
    draws = [torch.randn(x.shape) for _ in range(40)]

    def wide(package, x, sigmas):
        noise = iter(draws)
        take = lambda *_: next(noise).to(x.dtype)  # noqa: E731
        monkeypatch.setattr(torch, "randn_like", take)  # the package's churn takes no noise_sampler
        takes_none = name in DETERMINISTIC or (name in CHURNED and package is not K)
        given = {} if takes_none else {"noise_sampler": take}
        return run(package, name, x, sigmas, **options, **given)

    theirs, ours = wide(peer.sampling, x, sigmas), wide(K, x, sigmas)
    torch.set_default_dtype(torch.float64)  # dpm_fast makes tensors of its float arguments
    try:
        exact = wide(peer.sampling, x.double(), sigmas.double())
    finally:
        torch.set_default_dtype(torch.float32)
    error = lambda found: (found.double() - exact).abs().max()  # noqa: E731
    # a 32-bit maximum over few entries: twice the package's, and a few roundings where it was lucky
    assert error(ours) <= 2 * error(theirs) + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


class Log(list):
    """Everything a run asks of its model, noise sampler and callback, in order."""

    def __init__(self, x):
        self.noise = torch.Generator().manual_seed(5)
        self.x = x

    def model(self, x, sigma, **extra):
        self.append(("model", x.clone(), sigma.clone(), extra))
        return model(x, sigma)

    def callback(self, info):
        self.append(("callback", dict(info)))

    def noise_sampler(self, sigma, sigma_next):
        self.append(("noise", sigma, sigma_next))
        return torch.randn(self.x.shape, generator=self.noise)


@pytest.mark.parametrize("name, options", CASES)
def test_calls_of_model_callback_and_noise_sampler_are_the_packages(name, options, peer):
    x = noisy()
    logs = []
    for package in (peer.sampling, K):
        log = Log(x)
        given = {} if name in (*CHURNED, *DETERMINISTIC) else {"noise_sampler": log.noise_sampler}
        run(package, name, x, SIGMAS["ends in 0"], of=log.model, callback=log.callback, **options, **given)
        logs.append(log)
    assert [entry[0] for entry in logs[1]] == [entry[0] for entry in logs[0]]
    largest = x.abs().max()  # the noise of x falls, so what is left of it has the errors of what was subtracted
    for theirs, ours in zip(*logs, strict=True):
        if theirs[0] == "noise":  # the very same numbers
            assert all(torch.equal(a, b) and a.shape == () for a, b in zip(ours[1:], theirs[1:], strict=True))
        elif theirs[0] == "model":
            torch.testing.assert_close(ours[2], theirs[2], rtol=2e-6, atol=0)
            assert_close(ours[1], theirs[1], largest)
        else:
            assert ours[1].keys() == theirs[1].keys() and ours[1]["i"] == theirs[1]["i"]
            for key in ours[1].keys() - {"i", "x", "denoised"}:
                assert torch.equal(ours[1][key], theirs[1][key]), key
            for key in ("x", "denoised"):
                assert_close(ours[1][key], theirs[1][key], largest)


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_callback_keeps_is_its_own(name):
    x, kept = noisy(), []
    run(K, name, x, SIGMAS["ends in 0"], of=lambda x, sigma: x.mul_(0.5), callback=kept.append)
    assert not any(info[key].is_inference() for info in kept for key in ("x", "denoised"))
    pointers = {info["x"].data_ptr() for info in kept} | {info["denoised"].data_ptr() for info in kept}
    assert len(pointers) == 2 * len(kept)


@pytest.mark.parametrize("name", CHURNED)
def test_churned_samplers_take_a_noise_sampler_too(name, peer):
    x, pairs = noisy(), []

    def noise_sampler(sigma, sigma_hat):
        pairs.append((float(sigma), float(sigma_hat)))
        return torch.randn_like(x)

    given = run(K, name, x, SIGMAS["ends in 0"], noise_sampler=noise_sampler, **CHURN)
    assert torch.equal(given, run(K, name, x, SIGMAS["ends in 0"], **CHURN))
    assert len(pairs) == 9 and all(sigma <= sigma_hat for sigma, sigma_hat in pairs)
    assert {sigma < sigma_hat for sigma, sigma_hat in pairs} == {True, False}  # s_tmin and s_tmax leave some out


@pytest.mark.parametrize("name", OPTIONS)
def test_extra_args_reach_the_model(name, peer):
    x, extra_args = noisy(), {"shift": torch.tensor(0.7)}
    theirs = run(peer.sampling, name, x, SIGMAS["ends in 0"], extra_args=extra_args)
    ours = run(K, name, x, SIGMAS["ends in 0"], extra_args=extra_args)
    assert_close(ours, theirs)
    assert not torch.equal(ours, run(K, name, x, SIGMAS["ends in 0"]))


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, scale=1.0):
        return torch.tanh(self.mix(x)) + 0.1 * torch.cos(t.to(x.dtype) * scale).view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", ["DiscreteEpsDDPMDenoiser", "DiscreteVDDPMDenoiser", "VDenoiser"])
@pytest.mark.parametrize("name", OPTIONS)
def test_denoiser_wrappers(name, kind, peer):
    inner = Inner()
    alphas_cumprod = torch.cumprod(1 - torch.linspace(0.03**0.5, 0.11**0.5, 100) ** 2, 0)
    wrapper = getattr(peer.external, kind)
    wrapped = wrapper(inner) if kind == "VDenoiser" else wrapper(inner, alphas_cumprod, quantize=False)
    sigmas = K.get_sigmas_karras(8, 0.2, 12.0)
    x = noisy(sigma=12.0)
    arguments = {"of": wrapped, "extra_args": {"scale": 0.5}}
    assert_close(run(K, name, x, sigmas, **arguments), run(peer.sampling, name, x, sigmas, **arguments))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_states_are_computed_in_float32(name, dtype):
    """Rounded for the model and at the end only, unlike the package's, whose dtype varies from sampler to sampler."""
    x, draws = noisy().to(dtype), torch.randn(20, *noisy().shape).to(dtype)

    def given():
        noise = iter(draws)
        churn = {"s_churn": 4.0} if name in CHURNED else {}
        return churn | ({} if name in DETERMINISTIC else {"noise_sampler": lambda *_: next(noise)})

    rounding = lambda x, sigma: model(x.to(dtype), sigma.to(dtype)).float()  # noqa: E731
    shown = []
    found = run(K, name, x, SIGMAS["ends in 0"], callback=shown.append, **given())
    assert torch.equal(found, run(K, name, x.float(), SIGMAS["ends in 0"], of=rounding, **given()).to(dtype))
    assert {info[key].dtype for info in shown for key in ("x", "denoised")} == {dtype}


def test_float64_sigmas_and_other_layouts(peer):
    x = noisy((2, 4, 6, 6)).contiguous(memory_format=torch.channels_last)
    sigmas = SIGMAS["ends in 0"].double()
    for name in ("heun", "dpmpp_2m", "euler_ancestral"):
        ours = run(K, name, x, sigmas)
        assert torch.equal(ours, run(K, name, x, sigmas.float()))
        assert ours.is_contiguous(memory_format=torch.channels_last)
    flat = noisy((5, 3)).t()
    assert_close(run(K, "dpmpp_2m", flat, sigmas), run(peer.sampling, "dpmpp_2m", flat, sigmas.float()))


@pytest.mark.parametrize("name", OPTIONS)
def test_empty_batch_and_no_steps(name):
    assert run(K, name, noisy((0, 2, 3)), SIGMAS["ends in 0"]).shape == (0, 2, 3)
    if name != "dpm_fast":
        x = noisy()
        assert torch.equal(run(K, name, x, torch.tensor([3.0])), x)


@pytest.mark.parametrize("n", range(1, 12))
def test_dpm_fast_for_every_number_of_evaluations(n, peer):
    x, calls = noisy(), []
    counted = lambda x, sigma: calls.append(sigma) or model(x, sigma)  # noqa: E731
    ours = K.sample_dpm_fast(counted, x, 0.1, 14.6, n, disable=True)
    assert len(calls) == n
    theirs = peer.sampling.sample_dpm_fast(model, x, 0.1, 14.6, n, disable=True)
    assert_close(ours, theirs, largest=x.abs().max())  # few steps subtract most of x at once


def test_a_model_may_take_gradients_of_its_own(peer):
    def guided(x, sigma):
        denoised = model(x, sigma)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient = torch.autograd.grad((leaf.sin() * denoised).sum(), leaf)[0]
        return denoised + 0.01 * gradient

    x = noisy()
    for name in ("euler", "dpmpp_2m", "dpmpp_2s_ancestral"):
        ours = run(K, name, x.clone().requires_grad_(), SIGMAS["ends in 0"], of=guided)
        assert_close(ours, run(peer.sampling, name, x, SIGMAS["ends in 0"], of=guided))
        assert not ours.requires_grad


@pytest.mark.parametrize("name", OPTIONS)
def test_in_the_callers_inference_mode(name):
    x = noisy()
    with torch.inference_mode():
        inside = run(K, name, x, SIGMAS["ends in 0"])
    assert torch.equal(inside, run(K, name, x, SIGMAS["ends in 0"]))


# ---- differences, on purpose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "euler_ancestral"])
def test_steep_ancestral_steps_are_those_of_float64(name, peer):
    """In float32 sigma_down of this step is 0: then the package's DPM-2 adds no noise at all."""
    x, noise = noisy(sigma=80.0), torch.randn(3, 2, 5, 7)
    sigmas = torch.tensor([80.0, 0.01])
    exact, theirs, ours = (
        run(
            package, name, x.to(dtype), sigmas.to(dtype), noise_sampler=lambda *_, dtype=dtype: noise.to(dtype)
        ).double()
        for package, dtype in ((peer.sampling, torch.float64), (peer.sampling, torch.float32), (K, torch.float32))
    )
    # DPM-2's eps is a difference of numbers near 1, divided by 0.01 and multiplied by the step's 80
    assert (ours - exact).abs().max() < 80 / 0.01 * 2**-20
    if name == "dpm_2_ancestral":
        assert (theirs - exact).abs().max() > 1


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_a_single_step_to_zero(name, peer):
    x, sigmas = noisy(), torch.tensor([14.6, 0.0])
    with pytest.raises(UnboundLocalError):
        run(peer.sampling, name, x, sigmas, noise_sampler=lambda *_: None)
    denoised = model(x, torch.full((3,), 14.6))
    torch.testing.assert_close(run(K, name, x, sigmas), denoised)


# ---- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in DETERMINISTIC])
def test_philox_noise_does_not_depend_on_the_batch_split(name):
    x, sigmas = noisy((5, 2, 3, 3)), SIGMAS["ends in 0"]
    options = {"s_churn": 4.0} if name in CHURNED else {"eta": 1.0}
    elementwise = lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2)  # noqa: E731

    def part(rows, seed=7):
        ids = torch.arange(5)[rows] + 2**31
        options_of = {"noise_sampler": "philox", "sample_ids": ids, **options}
        return getattr(K, f"sample_{name}")(elementwise, x[rows], *levels(name, sigmas), seed=seed, **options_of)

    state = torch.get_rng_state()
    whole = part(slice(None))
    assert torch.equal(torch.cat([part(slice(0, 1)), part(slice(1, 5))]), whole)
    assert torch.equal(torch.get_rng_state(), state)  # nothing hidden is drawn
    assert not torch.equal(part(slice(None), seed=8), whole)
    per_sample = part(slice(None), seed=torch.tensor([7, 8, 7, 7, 7]))
    assert torch.equal(per_sample[0], whole[0]) and not torch.equal(per_sample[1], whole[1])


def test_philox_noise_of_the_first_churn_is_a_place_of_its_own():
    x = noisy((2, 3))
    sigmas = torch.tensor([2.0, 1.0])
    zero = lambda x, sigma: 0 * x  # noqa: E731
    out = K.sample_euler(zero, x, sigmas, s_churn=1.0, s_noise=1.5, noise_sampler="philox", seed=9)
    gamma = 2**0.5 - 1
    noise = normal((2, 3), seed=9, step=1, stream="step")
    expected = (x + 1.5 * 2.0 * ((1 + gamma) ** 2 - 1) ** 0.5 * noise) / (2 * (1 + gamma))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("seed", [None, 11, [4, 5, 6]])
def test_brownian_tree_is_the_packages(seed, peer):
    x = noisy()
    samplers = []
    for package in (K, peer.sampling):
        torch.manual_seed(2)
        samplers.append(package.BrownianTreeNoiseSampler(x, 0.1, 10.0, seed=seed, transform=lambda s: s.log()))
    for pair in ((10.0, 3.0), (3.0, 0.1), (5.0, 2.0), (2.0, 5.0)):
        ours, theirs = (sampler(*map(torch.tensor, pair)) for sampler in samplers)
        assert torch.equal(ours, theirs)


def test_brownian_tree_errors(monkeypatch):
    with pytest.raises(ValueError, match="one per sample, got 2 for 3"):
        K.BrownianTreeNoiseSampler(noisy(), 0.1, 10.0, seed=[1, 2])
    monkeypatch.setitem(__import__("sys").modules, "torchsde", None)
    with pytest.raises(ImportError, match="needs torchsde; pip install torchsde, or pass noise_sampler='philox'"):
        K.sample_dpmpp_3m_sde(model, noisy(), SIGMAS["ends in 0"])
    K.sample_dpmpp_3m_sde(model, noisy(), SIGMAS["ends in 0"], eta=0.0)  # no noise, no tree


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_noise_where_a_step_goes_down_to_zero_is_the_packages(name):
    """With all noise fresh (eta = 2) DPM-2 adds none after a single evaluation, DPM-Solver++(2S) does."""
    sigmas, calls = torch.tensor([4.0, 1.0]), []
    sampler = lambda *pair: calls.append(pair) or torch.ones(2, 3)  # noqa: E731
    zero = lambda x, sigma: 0 * x  # noqa: E731
    out = run(K, name, torch.ones(2, 3), sigmas, of=zero, eta=2.0, noise_sampler=sampler)
    adds = name == "dpmpp_2s_ancestral"
    assert torch.equal(out, torch.ones(2, 3) * adds) and len(calls) == adds
    philox = run(K, name, torch.ones(2, 3), sigmas, of=zero, eta=2.0, noise_sampler="philox")
    assert bool(philox.any()) == adds


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sample_dpm_adaptive", "log_likelihood"])
def test_adaptive_samplers_are_refused_by_name(name):
    with pytest.raises(AttributeError, match=f"{name} is not provided: adaptive step control"):
        getattr(K, name)
    with pytest.raises(AttributeError, match="no attribute 'sample_magic'"):
        _ = K.sample_magic


BAD_SIGMAS = [
    (torch.tensor([1.0, 2.0, 0.0]), ValueError, "fall strictly, got rising sigmas\\[0\\] = 1.0.*flip"),
    (torch.tensor([2.0, 2.0, 0.0]), ValueError, "got equal sigmas\\[0\\].*drop the repeated"),
    (torch.tensor([2.0, -1.0]), ValueError, "finite numbers >= 0"),
    (torch.tensor([float("inf"), 1.0]), ValueError, "finite numbers >= 0"),
    (torch.tensor([[2.0, 1.0]]), TypeError, "sigmas must be a floating-point tensor"),
    (torch.tensor([2, 1]), TypeError, "got torch.int64"),
    (torch.tensor([]), TypeError, "got torch.float32 \\(0,\\)"),
    ([2.0, 1.0], TypeError, "got list"),
]


@pytest.mark.parametrize("sigmas, error, message", BAD_SIGMAS)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "dpm_fast"])
def test_bad_sigmas(name, sigmas, error, message):
    with pytest.raises(error, match=f"sample_{name}: .*{message}"):
        getattr(K, f"sample_{name}")(model, noisy(), sigmas)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpmpp_2m_sde", {"solver_type": "rk4"}, "solver_type must be 'midpoint' or 'heun', got 'rk4'"),
        ("lms", {"order": 5}, "order must be 1, 2, 3 or 4, got 5"),
        ("euler", {"s_churn": -1.0}, "s_churn must be a finite number >= 0, got -1.0"),
        ("heun", {"s_tmin": "low"}, "s_tmin must be a number, got 'low'"),
        ("dpm_2", {"s_tmax": float("nan")}, "s_tmax must be a number, got nan"),
        ("euler", {"s_noise": -1.0}, "s_noise must be a finite number >= 0"),
        ("euler_ancestral", {"eta": -0.1}, "eta must be a finite number >= 0, got -0.1"),
        ("dpmpp_3m_sde", {"eta": float("inf")}, "eta must be a finite number >= 0, got inf"),
        ("dpmpp_sde", {"r": 0.0}, "r must be in \\(0, 1\\], got 0.0"),
        ("dpmpp_sde", {"noise_sampler": "normal"}, "noise_sampler must be None, 'philox' or a function"),
        ("euler_ancestral", {"seed": 3}, "pass noise_sampler='philox', or leave them out"),
        ("euler", {"sample_ids": torch.arange(3)}, "seed and sample_ids choose in-kernel noise"),
        ("dpmpp_2m", {"capture": "step", "callback": print}, "a callback was given; leave capture at 'never'"),
        (
            "euler",
            {"noise_sampler": lambda s, s_next: torch.zeros(1), "s_churn": 1.0},
            "noise_sampler's result must be x's shape",
        ),
        ("euler_ancestral", {"noise_sampler": lambda s, s_next: torch.zeros(1)}, "noise must be"),
        ("dpmpp_2m", {"of": lambda x, sigma: x[:, :1]}, "model must return denoised \\(3, 2, 5, 7\\) like its input"),
        ("dpmpp_2m", {"of": lambda x, sigma: (x,)}, "model must return denoised .*, got tuple"),
        ("dpmpp_2m", {"of": lambda x, sigma: x.double()}, "model must return torch.float32 like its input"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(K, name, noisy(), SIGMAS["ends in 0"], **options)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "x", [noisy().double(), torch.ones(2, 3, dtype=torch.int64), torch.tensor(1.0), [1.0]], ids=type
)
def test_bad_x(name, x):
    with pytest.raises(TypeError, match=f"sample_{name}: x must be a float32, float16 or bfloat16 tensor.*x.float()"):
        getattr(K, f"sample_{name}")(model, x, *levels(name, SIGMAS["ends in 0"]))


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 4), (2.0, 1.0, 4), (0.1, 1.0, 0), (0.1, 1.0, 2.5)])
def test_bad_dpm_fast_arguments(arguments):
    with pytest.raises(ValueError, match="sample_dpm_fast: needs 0 < sigma_min < sigma_max and n >= 1"):
        K.sample_dpm_fast(model, noisy(), *arguments)


def test_progress_bar(capsys):
    K.sample_dpmpp_2m(model, noisy(), SIGMAS["ends in 0"])
    assert capsys.readouterr().err == ""  # not a terminal
    K.sample_dpmpp_2m(model, noisy(), SIGMAS["ends in 0"], disable=False)
    assert "sample_dpmpp_2m" in capsys.readouterr().err
