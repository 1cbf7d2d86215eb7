"""logistic_mixture: log-probabilities and samples of a discretised mixture of logistics, all of a pixel in one pass."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine import random
from genengine.ops import _check, _layout, _registry
from genengine.ops._cost import per_element, traffic
from genengine.ops.normal import UNIFORM_FLOPS, exp_ieee, log_unit, reference_uniform, tanh_ieee

_STREAM = random.STREAMS["uniform"]
LOWEST_LOG_SCALE = -7.0
MAX_CHANNELS, MAX_BINS = 4, 1 << 16


def logistic_mixture_log_prob(x: Tensor, params: Tensor, *, bins: int = 256, backend: str | None = None) -> Tensor:
    """The log-probability of every pixel under a discretised mixture of logistics, as PixelCNN++ puts out.

        log p(pixel) = logsumexp_k (log_softmax(logits)_k + sum_c log(sigmoid(a_ck) - sigmoid(b_ck)))
        a, b = (x_c - m_ck +- h) e^-s_ck,    h = 1 / (bins - 1),    s = max(log_scale, -7)
        m_ck = mean_ck + sum_{j<c} tanh(coupling_cjk) x_j

    The lowest bin reaches down to -infinity (sigmoid(b) = 0), the highest up to infinity (sigmoid(a) = 1). The
    difference is never formed: log(sigmoid(a) - sigmoid(b)) = -softplus(-a) - softplus(b) + log(1 - e^(b - a)).

    x: (B, C, ...), C = 1..4, in [-1, 1], float32 or params' dtype: data, taken at the nearest of the values
    -1 + 2 i / (bins - 1); it has no gradient. params: (B, P, ...) of one of float32, float16, bfloat16 or float64,
    P = K (1 + 2 C + C (C - 1) / 2) in the order logits (K), means (C, K), log-scales (C, K), couplings
    (C (C - 1) / 2, K) of the pairs (c, j) = (1, 0), (2, 0), (2, 1), (3, 0), ...; contiguous or channels_last (other
    strides are copied).
    A logit may be -infinity, but not all of a pixel's. bins: 2 to 65536.

    Returns (B, ...) in nats, float32 (float64 of float64). Differentiable once, in params.
    Raises TypeError or ValueError on bad arguments, RuntimeError if x requires grad.
    Cost: reads x, params, writes the log-probabilities; per pixel, with J = C (C - 1) / 2 couplings, K (18 C + 3 J + 8)
    + 5 C + 4 flops, of them K (7 C + J + 2) + 2 exponentials. Backward: reads grad, x, params, writes dparams;
    K (34 C + 7 J + 13) + 5 C + 2 flops, of them K (10 C + J + 2) + 1 exponentials. Bins count as inner ones.
    Salimans, Karpathy, Chen & Kingma 2017, "PixelCNN++", section 2.1 and 2.2.
    """
    op = "logistic_mixture_log_prob"
    _check.dtype(op, "params", params)
    _check.dtype(op, "x", x, tuple(dict.fromkeys((torch.float32, params.dtype))))
    _check.same_device(op, "x", x, "params", params)
    if x.dim() < 2 or params.dim() < 2 or x.shape[:1] + x.shape[2:] != params.shape[:1] + params.shape[2:]:
        raise ValueError(
            f"{op}: x must be (B, C, ...) and params (B, P, ...) of the same batch and pixels, got {tuple(x.shape)} "
            f"and {tuple(params.shape)}"
        )
    _check_sizes(op, params, x.shape[1], bins)
    _check.no_grad_needed(op, (x,), "x is data, only params is differentiable: detach x")
    x = x.to(_wide_dtype(params)).contiguous()
    kernel = _registry.resolve(LOG_PROB, params.device, params.dtype, backend)
    return kernel(x, _dense(params), bins)


def logistic_mixture_sample(
    params: Tensor,
    *,
    channels: int,
    bins: int = 256,
    temperature: float = 1.0,
    seed: int | Tensor,
    sample_ids: Tensor | None = None,
    step: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Draw every pixel from the discretised mixture whose log-probabilities `logistic_mixture_log_prob` gives.

        u   = uniform(seed, sample_ids[b], step, stream "uniform")[pixel (1 + C) + j],    j = 0..C
        k   = the component in which u_0 falls, of weights exp(logits / temperature)
        x_c = the bin nearest to m_ck + temperature e^s_ck log(u_{1+c} / (1 - u_{1+c}))

    Each channel is put on its bin before it enters the means of the next, and clamped to [-1, 1]: at temperature 1
    this is an exact sample. The same bits on every backend, for any batch size or split.

    params: (B, P, ...) as for `logistic_mixture_log_prob`; channels: C. temperature: above 0. seed: int in [0, 2^64) or
    int64 tensor () or (B,). sample_ids: int64 (B,), default 0..B-1. step: in [0, 2^32); one for each call, where
    a model calls this for one pixel after another.

    Returns x (B, C, ...), float32, contiguous, on the values -1 + 2 i / (bins - 1). Not differentiable.
    Raises TypeError or ValueError on bad arguments, RuntimeError if params requires grad.
    Cost: reads a pixel's K logits and the 2 C + J other parameters of the component drawn, J = C (C - 1) / 2, seed,
    sample_ids, writes x; per pixel 4 K + 15 C + 3 J + 3 flops, of them K + 3 C + J exponentials.
    Salimans, Karpathy, Chen & Kingma 2017, "PixelCNN++".
    """
    op = "logistic_mixture_sample"
    _check.dtype(op, "params", params)
    if params.dim() < 2:
        raise ValueError(f"{op}: params must be (B, P, ...), got {tuple(params.shape)}")
    if not isinstance(channels, int):
        raise TypeError(f"{op}: channels must be an int, got {type(channels).__name__}")
    _check_sizes(op, params, channels, bins)
    temperature = _check.temperature(op, temperature)
    _check.no_grad_needed(op, (params,))
    seed = _check.seed_tensor(op, seed, params.device, params.shape[0])
    sample_ids = _check.sample_ids(op, sample_ids, params.device, params.shape[0])
    kernel = _registry.resolve(SAMPLE, params.device, params.dtype, backend)
    options = (channels, bins, temperature, seed, sample_ids, _check.counter(op, "step", step))
    return kernel(_dense(params), *options)


def params_per_component(channels: int) -> int:
    """1 logit, C means, C log-scales and a coupling for every pair of channels."""
    return 1 + 2 * channels + channels * (channels - 1) // 2


def _check_sizes(op, params, channels, bins):
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"{op}: C must be 1 to {MAX_CHANNELS}, got {channels}")
    per = params_per_component(channels)
    if params.shape[1] == 0 or params.shape[1] % per:
        raise ValueError(
            f"{op}: params must be (B, P, ...) with P = K (1 + 2 C + C (C - 1) / 2), a multiple of {per} for "
            f"C = {channels}, got P = {params.shape[1]}"
        )
    if not isinstance(bins, int) or isinstance(bins, bool):
        raise TypeError(f"{op}: bins must be an int, got {type(bins).__name__}")
    if not 2 <= bins <= MAX_BINS:
        raise ValueError(f"{op}: bins must be 2 to {MAX_BINS}, got {bins}")


def _dense(params):
    return params if _layout.dense(params) or _layout.channels_last(params) else params.contiguous()


def _wide_dtype(params):
    return torch.float64 if params.dtype == torch.float64 else torch.float32


# ---- reference -------------------------------------------------------------------------------------------------------


def reference_log_prob(x, params, bins):
    m = _Mixture(x, params, bins)
    return torch.logsumexp(m.joint(), dim=1)


def reference_log_prob_backward(grad, x, params, bins):
    """With responsibilities r = softmax_k(joint) and g = grad: dlogits = g (r - softmax(logits)), and g r times

    dm = -e^-s (sigmoid(-a) - sigmoid(b)),    ds = -a sigmoid(-a) + b sigmoid(b) - d / (e^d - 1),    d = a - b

    (without the terms of an end that lies at infinity; ds = 0 below the lowest log-scale);
    dcoupling_cj = dm_c x_j (1 - tanh^2).
    """
    m = _Mixture(x, params, bins)
    responsibility = grad[:, None] * torch.softmax(m.joint(), dim=1)
    above = torch.where(m.highest, 0.0, torch.sigmoid(-m.a))
    below = torch.where(m.lowest, 0.0, torch.sigmoid(m.b))
    inside = torch.where(m.lowest | m.highest, 0.0, torch.where(m.d > 1e-6, m.d / torch.expm1(m.d), 1 - m.d / 2))
    weight = responsibility[:, None]
    dmeans = weight * -m.inverse * (above - below)
    dlog_scales = torch.where(m.clamped, 0.0, weight * (-m.a * above + m.b * below - inside))
    dcouplings = [
        dmeans[:, c] * m.x[:, j : j + 1] * (1 - torch.tanh(coupling).square())
        for (c, j), coupling in zip(pairs(m.x.shape[1]), m.couplings.unbind(1), strict=True)
    ]
    dlogits = responsibility - grad[:, None] * torch.softmax(m.logits, dim=1)
    parts = torch.cat([dlogits, dmeans.flatten(1, 2), dlog_scales.flatten(1, 2), *dcouplings], dim=1)
    return torch.empty_like(params).copy_(parts)


class _Mixture:
    """Everything that a pixel's log-probability is made of: logits (B, K, ...), the rest (B, C, K, ...)."""

    def __init__(self, x, params, bins):
        self.h = 1 / (bins - 1)
        index = torch.round((x + 1) * (0.5 * (bins - 1))).clamp(0, bins - 1)
        self.x = (2 * index - (bins - 1)) / (bins - 1)
        self.lowest, self.highest = ((index == end)[:, :, None] for end in (0, bins - 1))
        self.logits, means, log_scales, self.couplings = split_params(params.to(_wide_dtype(params)), x.shape[1])
        means = means.clone()
        for (c, j), coupling in zip(pairs(x.shape[1]), self.couplings.unbind(1), strict=True):
            means[:, c] += torch.tanh(coupling) * self.x[:, j : j + 1]
        self.clamped = log_scales < LOWEST_LOG_SCALE
        self.s = log_scales.clamp_min(LOWEST_LOG_SCALE)
        self.inverse = torch.exp(-self.s)
        centred = self.x[:, :, None] - means
        self.a, self.b = ((centred + side) * self.inverse for side in (self.h, -self.h))
        self.d = 2 * self.h * self.inverse

    def joint(self):
        """log p(k, pixel) (B, K, ...)"""
        # of a tiny d, which may even underflow: log(1 - e^-d) = log d - d / 2 + d^2 / 24 - ...
        tiny = math.log(2 * self.h) - self.s - self.d / 2
        width = torch.where(self.d > 1e-6, torch.log(-torch.expm1(-self.d)), tiny)
        above, below = -F.softplus(-self.a), -F.softplus(self.b)
        log_p = torch.where(self.lowest, above, torch.where(self.highest, below, above + below + width))
        return torch.log_softmax(self.logits, dim=1) + log_p.sum(1)


def split_params(params, channels):
    """Logits (B, K, ...), and means, log-scales and couplings (B, count, K, ...)."""
    k = params.shape[1] // params_per_component(channels)
    counts = (1, channels, channels, channels * (channels - 1) // 2)
    parts = params.split([count * k for count in counts], dim=1)
    return parts[0], *(part.unflatten(1, (count, k)) for part, count in zip(parts[1:], counts[1:], strict=True))


def pairs(channels):
    """The channels (c, j), j < c, that a coupling belongs to, in the order of the couplings."""
    return [(c, j) for c in range(channels) for j in range(c)]


def reference_sample(params, channels, bins, temperature, seed, sample_ids, step):
    batch, _, *spatial = params.shape
    pixels = torch.Size(spatial).numel()
    u = torch.empty(batch, pixels * (1 + channels), dtype=torch.float32, device=params.device)
    reference_uniform(u, seed, sample_ids, step, _STREAM)
    return sample_by(params, channels, bins, temperature, u.view(batch, pixels, 1 + channels))


def sample_by(params, channels, bins, temperature, u):
    """`reference_sample` with the uniforms (B, pixels, 1 + C) given."""
    batch, _, *spatial = params.shape
    logits, means, log_scales, couplings = (t.flatten(-len(spatial)) if spatial else t[..., None] for t in
                                            split_params(params.float(), channels))  # (B, ..., K, pixels)  # fmt: skip
    pixels = logits.shape[-1]
    chosen, total = _choose(logits, u[..., 0], 1 / temperature)
    pick = lambda t: t.gather(1, chosen[:, None])[:, 0]  # noqa: E731
    x = torch.empty(batch, channels, pixels, dtype=torch.float32, device=params.device)
    last = torch.full_like(total, bins - 1)
    pair = 0
    for c in range(channels):
        m = pick(means[:, c]) + total * 0.0  # NaN of NaN logits
        for j in range(c):
            m = m + tanh_ieee(pick(couplings[:, pair])) * x[:, j]
            pair += 1
        s = pick(log_scales[:, c])
        scale = exp_ieee(torch.where(s < LOWEST_LOG_SCALE, LOWEST_LOG_SCALE, s)) * temperature
        logit = log_unit(u[..., 1 + c]) - log_unit(1.0 - u[..., 1 + c])
        index = (m + scale * logit + 1.0) * (0.5 * (bins - 1))
        index = torch.where(index < 0, 0.0, index)
        index = torch.where(index > last, last, index)
        x[:, c] = (2.0 * ((index + random.ROUND) - random.ROUND) - last) / last
    return x.view(batch, channels, *spatial)


def _choose(logits, u, inverse_temperature):
    """The component of each pixel (B, pixels) and the sum of the weights, which are added in the order of k."""
    largest = logits[:, 0]
    for k in range(1, logits.shape[1]):
        largest = torch.where(logits[:, k] > largest, logits[:, k], largest)
    weights = exp_ieee((logits - largest[:, None]) * inverse_temperature)
    sums = [weights[:, 0]]
    for k in range(1, logits.shape[1]):
        sums.append(sums[-1] + weights[:, k])
    target = u * sums[-1]
    chosen = torch.zeros_like(u, dtype=torch.int64)
    for partial in sums[:-1]:
        chosen += partial <= target
    return chosen, sums[-1]


# ---- shapes, gradients, schemas --------------------------------------------------------------------------------------


def _fake_log_prob(x, params, bins):
    return x.new_empty((x.shape[0], *x.shape[2:]))


def _fake_log_prob_backward(grad, x, params, bins):
    return torch.empty_like(params)


def _fake_sample(params, channels, bins, temperature, seed, sample_ids, step):
    return params.new_empty((params.shape[0], channels, *params.shape[2:]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, params, ctx.bins = inputs
    ctx.save_for_backward(x, params)


def _grads(ops, ctx, grad):
    x, params = ctx.saved_tensors
    once = "it is differentiable once: drop create_graph=True"
    _check.no_grad_needed("logistic_mixture_log_prob_backward", (grad, params), once)
    return None, ops.logistic_mixture_log_prob_backward(grad.contiguous(), x, params, ctx.bins), None


# With a softplus of 3 flops and 2 exponentials, a sigmoid of 3 and 1; in the order of the formulas above.


def _cost_log_prob(arguments, results):
    x, params, _ = arguments
    c, j, k, pixels = _sizes(params, x.shape[1])
    flops = k * (18 * c + 3 * j + 8) + 5 * c + 4  # a channel of a component, a coupling, the softmaxes; the bin of x
    exps = k * (7 * c + j + 2) + 2
    return per_element(traffic(x, params, results), pixels, flops, exps)


def _cost_log_prob_backward(arguments, results):
    grad, x, params, _ = arguments
    c, j, k, pixels = _sizes(params, x.shape[1])
    flops = k * (34 * c + 7 * j + 13) + 5 * c + 2
    exps = k * (10 * c + j + 2) + 1
    return per_element(traffic(grad, x, params, results), pixels, flops, exps)


def _cost_sample(arguments, results):
    params, channels, _, _, seed, sample_ids, _ = arguments
    c, j, k, pixels = _sizes(params, channels)
    flops = 4 * k + 13 * c + 3 * j + 1 + UNIFORM_FLOPS * (1 + c)
    moved = pixels * (k + 2 * c + j) * params.element_size() + traffic(seed, sample_ids, results)
    return per_element(moved, pixels, flops, exps=k + 3 * c + j)


def _sizes(params, channels):
    """C, its pairs, K and the number of pixels."""
    per = params_per_component(channels)
    return channels, channels * (channels - 1) // 2, params.shape[1] // per, params.numel() // params.shape[1]


_registry.define(
    "logistic_mixture_log_prob_backward(Tensor grad, Tensor x, Tensor params, SymInt bins) -> Tensor",
    reference_log_prob_backward,
    fake=_fake_log_prob_backward,
    module="logistic_mixture",
    cost=_cost_log_prob_backward,
)
LOG_PROB = _registry.define(
    "logistic_mixture_log_prob(Tensor x, Tensor params, SymInt bins) -> Tensor",
    reference_log_prob,
    fake=_fake_log_prob,
    setup_context=_setup_context,
    backward=_grads,
    module="logistic_mixture",
    cost=_cost_log_prob,
)
SAMPLE = _registry.define(
    "logistic_mixture_sample(Tensor params, SymInt channels, SymInt bins, float temperature, Tensor seed, "
    "Tensor? sample_ids, SymInt step) -> Tensor",
    reference_sample,
    fake=_fake_sample,
    module="logistic_mixture",
    cost=_cost_sample,
)
