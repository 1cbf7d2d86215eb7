"""The samplers of k-diffusion on the fused loop: the same names, signatures, callbacks and noise.

    from genengine.integrations import k_diffusion as K
    x = K.sample_dpmpp_2m(model, x, K.get_sigmas_karras(20, 0.03, 14.6))

k-diffusion itself is not needed; its Denoiser wrappers are models like any other. All samplers share these arguments:
    model: model(x, sigma, **extra_args) -> denoised (B, ...), of x = x0 + sigma eps with sigma (B,) in x's dtype. It is
        called without gradients but may enable them for guidance of its own; x and sigma are buffers that the next
        step overwrites.
    x: (B, ...) float32, float16 or bfloat16, at noise level sigmas[0]; float64 is refused, the state is float32 (also
        for 16-bit x, which is rounded for the model and in the result alone).
    sigmas: (num_steps + 1,) strictly falling, the last may be 0. Read to the host once per call, which on a GPU is its
        only wait; rising or repeated levels are refused.
    extra_args: a dict of keyword arguments for the model.
    callback: called as callback({'x', 'i', 'sigma', 'sigma_hat', 'denoised'}) after the first evaluation of each step,
        before the step is taken; x (churned if there is churn) and denoised are copies, to keep but not to steer by.
    disable: no progress bar; None: one only on a terminal.
    eta: the share of fresh noise, >= 0. s_noise: the factor on all noise, >= 0.
    noise_sampler: noise_sampler(sigma, sigma_next) -> (B, ...), called as often and in the order of k-diffusion. By
        default what k-diffusion draws: `torch.randn_like(x)` (also where its factor is 0), or for the three SDE
        samplers a Brownian tree (needs torchsde): with the same global seed the samples agree. Or "philox": noise
        drawn in the kernel, the same for every batch split and number of devices, with
    seed: an int in [0, 2^64) or int64 (B,), by default 0, and
    sample_ids: int64 (B,) global indices of the samples; only with "philox".
    capture: as in `genengine.sample`, but "never" by default: a captured model's Python runs only a few times. Needs a
        model without state, no callback, and no noise or "philox".
They return x (B, ...) in x's dtype, and raise TypeError or ValueError naming the argument.

Where they differ from k-diffusion on purpose: coefficients are computed in float64, not in the dtype of sigmas, where
an ancestral step's sigma_down loses digits as sigma_next/sigma falls (and vanishes below 1/4000); the result has x's
dtype, where k-diffusion's may be that of sigmas; the SDE samplers also take a single step to 0. Not here:
`sample_dpm_adaptive` and `log_likelihood`, whose step size depends on the data, so that no table holds them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from genengine.integrations import _k_diffusion as _k
from genengine.integrations._k_diffusion import Call

_ABSENT = ("sample_dpm_adaptive", "log_likelihood")


def __getattr__(name):
    if name in _ABSENT:
        raise AttributeError(
            f"k_diffusion.{name} is not provided: adaptive step control decides on the step from the data, which is no "
            "affine row; use a fixed-step sampler (sample_dpm_fast, sample_dpmpp_2m), or k-diffusion's own function"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- noise levels ------------------------------------------------------------------------------------------------


def get_sigmas_karras(n, sigma_min, sigma_max, rho=7.0, device="cpu") -> Tensor:
    """n levels equally spaced in sigma^(1/rho), then 0 (Karras 2022, eq. 5).

    sigma_i = (sigma_max^(1/rho) + i/(n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.

    Args:
        n: number of steps, >= 1.
        sigma_min, sigma_max: the last and the first level, 0 < sigma_min <= sigma_max.
        rho: > 0; the larger, the more levels near sigma_min.
        device: of the result.

    Returns:
        (n + 1,) float32.

    Raises:
        ValueError: on an argument out of range.
    """
    _check_levels("get_sigmas_karras", n, sigma_min, sigma_max, rho)
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _then_zero((first + torch.linspace(0, 1, n) * (last - first)) ** rho).to(device)


def get_sigmas_exponential(n, sigma_min, sigma_max, device="cpu") -> Tensor:
    """n levels equally spaced in log sigma, then 0. Arguments, returns and errors: as `get_sigmas_karras`."""
    _check_levels("get_sigmas_exponential", n, sigma_min, sigma_max)
    return _then_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(n, sigma_min, sigma_max, rho=1.0, device="cpu") -> Tensor:
    """n levels with log sigma = log sigma_min + u^rho log(sigma_max/sigma_min), u from 1 to 0, then 0.

    Arguments, returns and errors: as `get_sigmas_karras`.
    """
    _check_levels("get_sigmas_polyexponential", n, sigma_min, sigma_max, rho)
    low, high = math.log(sigma_min), math.log(sigma_max)
    return _then_zero((torch.linspace(1, 0, n, device=device) ** rho * (high - low) + low).exp())


def get_sigmas_vp(n, beta_d=19.9, beta_min=0.1, eps_s=1e-3, device="cpu") -> Tensor:
    """n levels of the VP SDE at times from 1 to eps_s, then 0 (Song 2021; Karras 2022, table 1).

    sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1).

    Args:
        n: number of steps, >= 1.
        beta_d, beta_min: slope and start of beta(t), >= 0 and not both 0.
        eps_s: the last time, in (0, 1].
        device: of the result.

    Returns:
        (n + 1,) float32.

    Raises:
        ValueError: on an argument out of range.
    """
    if n < 1 or not 0 < eps_s <= 1 or not (beta_d >= 0 and beta_min >= 0 and beta_d + beta_min > 0):
        raise ValueError(
            "get_sigmas_vp: needs n >= 1, 0 < eps_s <= 1, beta_d and beta_min >= 0 and not both 0, "
            f"got n={n!r}, eps_s={eps_s!r}, beta_d={beta_d!r}, beta_min={beta_min!r}"
        )
    t = torch.linspace(1, eps_s, n, device=device)
    return _then_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


# ---- noise -------------------------------------------------------------------------------------------------------


class BrownianTreeNoiseSampler:
    """Noise of one Brownian path W: (W(t') - W(t))/sqrt(|t' - t|), the same for any steps that meet at t and t'.

    Args:
        x: (B, ...), whose shape, dtype and device the noise takes.
        sigma_min, sigma_max: the levels between which the path is asked for.
        seed: an int, or one per sample, each with a path of its own; None draws one from torch's global generator.
        transform: maps sigma to the time of the path.

    The path is built (by torchsde, in Python, waiting for the device at every call) when it is first asked for.
    Raises ValueError where seeds and batch differ, ImportError without torchsde. Li 2020 (Scalable gradients for SDEs),
    section 4.
    """

    def __init__(self, x, sigma_min, sigma_max, seed=None, transform=lambda x: x):
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, ()).item()
        self._batched = not isinstance(seed, int)
        self._seeds = list(seed) if self._batched else [seed]
        if self._batched and len(self._seeds) != len(x):
            raise ValueError(
                f"BrownianTreeNoiseSampler: seed must be an int or one per sample, got {len(self._seeds)} for {len(x)}"
            )
        self._transform, self._zero, self._trees = transform, torch.zeros_like(x), None
        self._ends = [transform(torch.as_tensor(sigma)) for sigma in (sigma_min, sigma_max)]

    def __call__(self, sigma, sigma_next):
        """The noise of the step from sigma to sigma_next, (B, ...), standard normal."""
        if self._trees is None:
            self._trees = self._build()
        t, t_next = (self._transform(torch.as_tensor(level)) for level in (sigma, sigma_next))
        low, high, sign = _ordered(t, t_next)
        increments = [tree(low, high) for tree in self._trees]
        total = torch.stack(increments) if self._batched else increments[0]
        return total * (sign * _ordered(*self._ends)[2]) / (t_next - t).abs().sqrt()

    def _build(self):
        try:
            import torchsde
        except ImportError as error:
            raise ImportError(
                "k_diffusion: a Brownian tree, the default noise of the SDE samplers, needs torchsde; "
                "pip install torchsde, or pass noise_sampler='philox' or a function of (sigma, sigma_next)"
            ) from error
        low, high, _ = _ordered(*self._ends)
        start = self._zero[0] if self._batched else self._zero
        return [torchsde.BrownianTree(low, start, high, entropy=seed) for seed in self._seeds]


# ---- samplers: the argument lists are k-diffusion's ---------------------------------------------------------------


def sample_euler(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
    s_noise=1.0, *, noise_sampler=None, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """Euler's method with churn: `solvers.edm(method="euler")`. Karras 2022, Alg. 2 without its correction.

    noise_sampler here takes (sigma, sigma_hat). Arguments, returns and errors: see the module and `solvers.edm`.
    """
    call = Call("sample_euler", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _churned(call, "euler", sigmas, (s_churn, s_tmin, s_tmax), s_noise, noise_sampler)


def sample_heun(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
    s_noise=1.0, *, noise_sampler=None, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """Heun's method with churn: `solvers.edm(method="heun")`. Karras 2022, Alg. 2.

    noise_sampler here takes (sigma, sigma_hat). Arguments, returns and errors: see the module and `solvers.edm`.
    """
    call = Call("sample_heun", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _churned(call, "heun", sigmas, (s_churn, s_tmin, s_tmax), s_noise, noise_sampler)


def sample_dpm_2(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"),
    s_noise=1.0, *, noise_sampler=None, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 with churn: `solvers.edm(method="dpm_2")`. Lu 2022 (DPM-Solver), Karras 2022, Alg. 2.

    noise_sampler here takes (sigma, sigma_hat). Arguments, returns and errors: see the module and `solvers.edm`.
    """
    call = Call("sample_dpm_2", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _churned(call, "dpm_2", sigmas, (s_churn, s_tmin, s_tmax), s_noise, noise_sampler)


def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """Euler's method with ancestral noise: `solvers.euler_ancestral`. Arguments, returns and errors: see the module."""
    call = Call("sample_euler_ancestral", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _ancestral(call, "euler_ancestral", sigmas, eta, s_noise, noise_sampler)


def sample_dpm_2_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 with ancestral noise: `solvers.dpm_2_ancestral`, but no noise is added where sigma_down = 0.

    Arguments, returns and errors: see the module.
    """
    call = Call("sample_dpm_2_ancestral", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _ancestral(call, "dpm_2_ancestral", sigmas, eta, s_noise, noise_sampler)


def sample_dpmpp_2s_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) with ancestral noise: `solvers.dpmpp_2s_ancestral`.

    Arguments, returns and errors: see the module.
    """
    call = Call("sample_dpmpp_2s_ancestral", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _ancestral(call, "dpmpp_2s_ancestral", sigmas, eta, s_noise, noise_sampler)


def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4, *, capture="never") -> Tensor:
    """Linear multistep of order 1 to 4: `solvers.lms`. Arguments, returns and errors: see the module."""
    call = Call("sample_lms", model, x, extra_args, callback, disable, capture=capture)
    return _deterministic(call, "lms", sigmas, order=order)


def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, capture="never") -> Tensor:
    """DPM-Solver++(2M): `solvers.dpmpp_2m`. Arguments, returns and errors: see the module."""
    call = Call("sample_dpmpp_2m", model, x, extra_args, callback, disable, capture=capture)
    return _deterministic(call, "dpmpp_2m", sigmas)


def sample_dpmpp_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None, r=1 / 2,
    *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """DPM-Solver++ for the SDE, singlestep, with its second evaluation at r: `solvers.dpmpp_sde`.

    Arguments, returns and errors: see the module.
    """
    call = Call("sample_dpmpp_sde", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    levels = _k.host_sigmas(call.name, sigmas)
    if len(levels) == 1:
        return call.x
    options = {"eta": _k.as_number(call.name, "eta", eta, least=0), "r": _k.as_number(call.name, "r", r)}
    plan = _plan(call, "dpmpp_sde", levels, s_noise, options)
    t = sigmas.log().neg()  # the levels handed to noise_sampler pass through the logarithm, as in k-diffusion
    middles = (t[:-1] + (t[1:] - t[:-1]) * r).neg().exp().unbind()
    through = t.neg().exp().unbind()
    pairs = []
    for begin, end in zip(plan.begins, plan.ends, strict=True):
        last = end is not None
        i = end if last else begin
        pairs.append((through[i], through[i + 1] if last else middles[i]) if levels[i + 1] > 0 else None)
    sampler = call.sampler(noise_sampler, lambda: _brownian(call.x, sigmas, levels))
    return call.run(plan, call.x.float(), _shown(sigmas), call.given(sampler, pairs))


def sample_dpmpp_2m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    solver_type="midpoint", *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(2M): `solvers.dpmpp_2m_sde(form=solver_type)`. Arguments, returns and errors: see the module."""
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"sample_dpmpp_2m_sde: solver_type must be 'midpoint' or 'heun', got {solver_type!r}")
    call = Call("sample_dpmpp_2m_sde", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _multistep_sde(call, "dpmpp_2m_sde", sigmas, eta, s_noise, noise_sampler, form=solver_type)


def sample_dpmpp_3m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None,
    *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """SDE-DPM-Solver++(3M): `solvers.dpmpp_3m_sde`. Arguments, returns and errors: see the module."""
    call = Call("sample_dpmpp_3m_sde", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    return _multistep_sde(call, "dpmpp_3m_sde", sigmas, eta, s_noise, noise_sampler)


def sample_dpm_fast(
    model, x, sigma_min, sigma_max, n, extra_args=None, callback=None, disable=None, eta=0.0, s_noise=1.0,
    noise_sampler=None, *, seed=None, sample_ids=None, capture="never",
) -> Tensor:  # fmt: skip
    """DPM-Solver-fast with n model evaluations: `solvers.dpm_fast` on levels equally spaced in log sigma.

    Steps of order 3, then 2 and 1 where 3 divides n, else n mod 3. It ends at sigma_min, not at 0; the callback also
    sees t and t_up, minus the logarithm of sigma and sigma_hat.

    Args, besides those of the module:
        sigma_min, sigma_max: the last and the first noise level, 0 < sigma_min < sigma_max.
        n: number of model evaluations, >= 1.

    Returns and errors: see the module. Lu 2022 (DPM-Solver), section 3.4.
    """
    call = Call("sample_dpm_fast", model, x, extra_args, callback, disable, seed, sample_ids, capture)
    low, high = (float(sigma) for sigma in (sigma_min, sigma_max))
    if not 0 < low < high < math.inf or n != int(n) or n < 1:
        raise ValueError(
            f"sample_dpm_fast: needs 0 < sigma_min < sigma_max and n >= 1 evaluations, "
            f"got sigma_min={low!r}, sigma_max={high!r}, n={n!r}"
        )
    n = int(n)
    orders = (3,) * (n // 3 - 1) + (2, 1) if n % 3 == 0 else (3,) * (n // 3) + (n % 3,)
    ends = [-torch.tensor(sigma).log().item() for sigma in (high, low)]
    t = torch.linspace(*ends, len(orders) + 1, device=x.device)
    spread = [math.log(high) + i / len(orders) * math.log(low / high) for i in range(len(orders) + 1)]
    options = {"eta": _k.as_number(call.name, "eta", eta, least=0), "orders": orders}
    plan = _plan(call, "dpm_fast", tuple(math.exp(level) for level in spread), s_noise, options)
    sigmas, t = t.neg().exp().unbind(), t.unbind()
    shown = [{"sigma": sigmas[i], "sigma_hat": sigmas[i], "t": t[i], "t_up": t[i]} for i in range(len(orders))]
    pairs = [None if i is None else (sigmas[i], sigmas[i + 1]) for i in plan.ends]
    sampler = call.sampler(noise_sampler, lambda: _randn(call.x))
    return call.run(plan, call.x.float(), shown, call.given(sampler, pairs))


# ---- what they share ---------------------------------------------------------------------------------------------


def _churned(call, method, sigmas, churn, s_noise, noise_sampler):
    levels = _k.host_sigmas(call.name, sigmas)
    if len(levels) == 1:
        return call.x
    s_churn, s_tmin, s_tmax = churn
    options = {"method": method, "s_churn": _k.as_number(call.name, "s_churn", s_churn, least=0)}
    for name, bound in (("s_tmin", s_tmin), ("s_tmax", s_tmax)):
        # rounded like sigmas: a level given as 0.1 is not below a bound of 0.1
        options[name] = torch.tensor(_k.as_number(call.name, name, bound), dtype=sigmas.dtype).item()
    plan = _plan(call, "edm", levels, s_noise, options)
    each = sigmas.unbind()
    raised = [sigma * (gamma + 1) if gamma else sigma for sigma, gamma in zip(each[:-1], plan.gammas, strict=True)]
    sampler = call.sampler(noise_sampler, lambda: _randn(call.x))
    # the noise of a step is drawn before it: with the last row of the step before
    pairs = [(each[i + 1], raised[i + 1]) if i is not None and i + 1 < len(raised) else None for i in plan.ends]
    with torch.no_grad():
        x = call.start(plan, None if sampler is None else lambda: sampler(each[0], raised[0]))
    return call.run(plan, x, _shown(sigmas, raised), call.given(sampler, pairs))


def _ancestral(call, solver, sigmas, eta, s_noise, noise_sampler):
    levels = _k.host_sigmas(call.name, sigmas)
    if len(levels) == 1:
        return call.x
    options = {"eta": _k.as_number(call.name, "eta", eta, least=0)}
    draws = [sigma > 0 for sigma in levels[1:]]
    if solver == "dpm_2_ancestral":  # k-diffusion adds no noise after a step of one evaluation
        draws = [count == 2 for count in _k.rows_per_step(solver, levels, options)]
    plan = _plan(call, solver, levels, s_noise, options, tuple(draws))
    sampler = call.sampler(noise_sampler, lambda: _randn(call.x))
    return call.run(plan, call.x.float(), _shown(sigmas), call.given(sampler, _steps_that_draw(sigmas, plan, draws)))


def _multistep_sde(call, solver, sigmas, eta, s_noise, noise_sampler, **options):
    levels = _k.host_sigmas(call.name, sigmas)
    if len(levels) == 1:
        return call.x
    eta = _k.as_number(call.name, "eta", eta, least=0)
    plan = _plan(call, solver, levels, s_noise, {"eta": eta, **options})
    draws = [sigma > 0 and eta > 0 for sigma in levels[1:]]
    sampler = call.sampler(noise_sampler, lambda: _brownian(call.x, sigmas, levels))
    return call.run(plan, call.x.float(), _shown(sigmas), call.given(sampler, _steps_that_draw(sigmas, plan, draws)))


def _deterministic(call, solver, sigmas, **options):
    levels = _k.host_sigmas(call.name, sigmas)
    if len(levels) == 1:
        return call.x
    plan = _k.plan(solver, levels, 1.0, (), tuple(options.items()))
    return call.run(plan, call.x.float(), _shown(sigmas), None)


def _plan(call, solver, levels, s_noise, options, draws=()):
    s_noise = _k.as_number(call.name, "s_noise", s_noise, least=0)
    return _k.plan(solver, levels, s_noise, draws, tuple(options.items()))


def _steps_that_draw(sigmas, plan, draws):
    """(sigma, sigma_next) for the rows that end a step which draws noise."""
    each = sigmas.unbind()
    return [(each[i], each[i + 1]) if i is not None and draws[i] else None for i in plan.ends]


def _shown(sigmas, raised=None):
    """What a callback sees of the noise levels of each step."""
    each = sigmas.unbind()[:-1]
    return [{"sigma": sigma, "sigma_hat": hat} for sigma, hat in zip(each, raised or each, strict=True)]


def _randn(x):
    """What `torch.randn_like(x)` draws, in one buffer for all steps."""
    drawn = torch.empty_like(x)
    return lambda sigma, sigma_next: drawn.normal_()


def _brownian(x, sigmas, levels):
    smallest = len(levels) - 1 if levels[-1] > 0 else len(levels) - 2
    return BrownianTreeNoiseSampler(x, sigmas[smallest], sigmas[0])


def _then_zero(sigmas):
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _ordered(t, t_next):
    """(the smaller, the larger, +1 if they were in this order, else -1)."""
    return (t, t_next, 1) if t < t_next else (t_next, t, -1)


def _check_levels(name, n, sigma_min, sigma_max, rho=1.0):
    if n < 1 or not 0 < sigma_min <= sigma_max < math.inf or not rho > 0:
        raise ValueError(
            f"{name}: needs n >= 1, 0 < sigma_min <= sigma_max and rho > 0, "
            f"got n={n!r}, sigma_min={sigma_min!r}, sigma_max={sigma_max!r}, rho={rho!r}"
        )
