"""Triton kernels of logistic_mixture: log-probabilities, their gradient, and samples. Accumulates in float32.

A program takes BLOCK pixels, of one or of many samples, and goes over the components one by one, in any layout. Bytes
per pixel of P parameters: log_prob reads P e + 4 C; the backward goes over the parameters twice, the second time from
cache, and writes P e; sample reads K e and the chosen component.

log(sigmoid(a) - sigmoid(b)) = min(a, 0) - max(b, 0) + log((1 - e^-d) / ((1 + e^-|a|) (1 + e^-|b|))), d = a - b; where a
bin has no end, FAR stands for infinity. The fractions of a component's channels are multiplied up, for one logarithm.
"""

import math

import torch
import triton
import triton.language as tl

from genengine.kernels._launch import DTYPE_NAMES, batch_stride, layout
from genengine.kernels._philox import exp_ieee, log_unit, quad_words, tanh_ieee, unit

BLOCK = 128
NUM_WARPS = 4
_STREAM = 7  # genengine.random.STREAMS["uniform"]
LOWEST_LOG_SCALE = tl.constexpr(-7.0)
FAR = tl.constexpr(1e4)
NOTHING = tl.constexpr(-3e38)  # the largest of no exponents
ROUND = tl.constexpr(12582912.0)


@triton.jit
def place(batch, image, batch_stride, pixel_stride, BLOCK: tl.constexpr):
    """(index of the pixel in the batch, its sample, its pixel there, its offset in params, whether it exists)"""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < batch.to(tl.int64) * image
    sample, pixel = index // image, index % image
    return index, sample, pixel, sample * batch_stride + pixel * pixel_stride, inside


@triton.jit
def nearest_bin(x, last):
    t = (x + 1.0) * (0.5 * last)
    t = tl.where(t < 0.0, 0.0, t)
    t = tl.where(t > last, last, t)
    return (t + ROUND) - ROUND


@triton.jit
def bin_value(index, last):
    return tl.div_rn(2.0 * index - last, index * 0.0 + last)


@triton.jit
def data(x_ptr, sample, pixel, image, channel, inside, last, C: tl.constexpr):
    """A channel's bin and its value."""
    x = tl.load(x_ptr + (sample * C + channel) * image + pixel, mask=inside, other=0.0)
    index = nearest_bin(x, last)
    return index, bin_value(index, last)


@triton.jit
def parameter(params_ptr, offset, row, param_stride, inside):
    return tl.load(params_ptr + offset + row * param_stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def ends(x, index, mean, log_scale, last, h):
    """e^-s, a, b and d of a channel of a component."""
    inverse = exp_ieee(-tl.where(log_scale < LOWEST_LOG_SCALE, LOWEST_LOG_SCALE, log_scale))
    lowest, highest = index == 0.0, index == last
    a = tl.where(highest, FAR, (x - mean + h) * inverse)
    b = tl.where(lowest, -FAR, (x - mean - h) * inverse)
    return inverse, a, b, tl.where(lowest | highest, FAR, 2.0 * h * inverse)


@triton.jit
def relative_width(d):
    """(1 - e^-d) / d for d <= 1/2, to d^7."""
    p = d * -2.4801587e-5 + 1.9841270e-4
    p = p * d - 1.3888889e-3
    p = p * d + 8.3333333e-3
    p = p * d - 4.1666667e-2
    p = p * d + 1.6666667e-1
    p = p * d - 0.5
    return p * d + 1.0


@triton.jit
def factors(a, b, d):
    """1 + e^-|a|, 1 + e^-|b|, and 1 - e^-d or, of a narrow bin, that over d."""
    width = tl.where(d > 0.5, 1.0 - tl.exp(-d), relative_width(d))
    return 1.0 + tl.exp(-tl.abs(a)), 1.0 + tl.exp(-tl.abs(b)), width


@triton.jit
def conditioned_mean(
    params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last,
    c: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    mean = parameter(params_ptr, offset, components * (1 + c) + k, param_stride, inside)
    for j in tl.static_range(c):
        row = components * (1 + 2 * C + c * (c - 1) // 2 + j) + k
        _, x = data(x_ptr, sample, pixel, image, j, inside, last, C)
        mean += tanh_ieee(parameter(params_ptr, offset, row, param_stride, inside)) * x
    return mean


@triton.jit
def joint(
    params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last, h, log_width,
    C: tl.constexpr,
):  # fmt: skip
    """log p(k, pixel) but for the logarithm of the logits' sum, and the logit."""
    logit = parameter(params_ptr, offset, k, param_stride, inside)
    linear, numerator, denominator = logit, tl.full(logit.shape, 1.0, tl.float32), tl.full(logit.shape, 1.0, tl.float32)
    for c in tl.static_range(C):
        mean = conditioned_mean(
            params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last, c, C
        )
        log_scale = parameter(params_ptr, offset, components * (1 + C + c) + k, param_stride, inside)
        index, x = data(x_ptr, sample, pixel, image, c, inside, last, C)
        _, a, b, d = ends(x, index, mean, log_scale, last, h)
        one_a, one_b, width = factors(a, b, d)
        s = tl.where(log_scale < LOWEST_LOG_SCALE, LOWEST_LOG_SCALE, log_scale)
        linear += tl.where(d > 0.5, 0.0, log_width - s) + (tl.where(a < 0.0, a, 0.0) - tl.where(b > 0.0, b, 0.0))
        numerator *= width
        denominator *= one_a * one_b
    return linear + tl.log(tl.div_rn(numerator, denominator)), logit


@triton.jit
def add_exponential(largest, sum, value):
    finite = tl.where(value < NOTHING, NOTHING, value)
    gap = finite - largest
    less = tl.exp(-tl.abs(gap))
    grows = gap > 0.0
    return tl.where(grows, finite, largest), tl.where(grows, sum * less + 1.0, sum + less)


@triton.jit
def sums(
    params_ptr, x_ptr, offset, sample, pixel, image, components, param_stride, inside, last, h, log_width,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of e^joint and e^logit over the components, each as (largest exponent, sum)."""
    largest, total = tl.full((BLOCK,), NOTHING, tl.float32), tl.zeros((BLOCK,), tl.float32)
    logit_largest, logit_total = tl.full((BLOCK,), NOTHING, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k in range(components):
        value, logit = joint(
            params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last, h, log_width, C
        )
        largest, total = add_exponential(largest, total, value)
        logit_largest, logit_total = add_exponential(logit_largest, logit_total, logit)
    return largest, total, logit_largest, logit_total


@triton.jit(do_not_specialize=["batch", "image", "components", "batch_stride", "param_stride", "pixel_stride"])
def log_prob_kernel(
    x_ptr, params_ptr, log_prob_ptr, batch, image, components, batch_stride, param_stride, pixel_stride,
    last, h, log_width, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, sample, pixel, offset, inside = place(batch, image, batch_stride, pixel_stride, BLOCK)
    param_stride = param_stride.to(tl.int64)
    largest, total, logit_largest, logit_total = sums(
        params_ptr, x_ptr, offset, sample, pixel, image, components, param_stride, inside, last, h, log_width, C, BLOCK
    )
    result = (largest - logit_largest) + tl.log(tl.div_rn(total, logit_total))
    tl.store(log_prob_ptr + index, result, mask=inside)


@triton.jit
def put(dparams_ptr, offset, row, param_stride, value, inside):
    tl.store(dparams_ptr + offset + row * param_stride, value.to(dparams_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "batch", "image", "components", "batch_stride", "param_stride", "pixel_stride", "grad_batch_stride",
    ]
)  # fmt: skip
def log_prob_backward_kernel(
    grad_ptr, x_ptr, params_ptr, dparams_ptr, batch, image, components, batch_stride, param_stride, pixel_stride,
    grad_batch_stride, last, h, log_width, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, sample, pixel, offset, inside = place(batch, image, batch_stride, pixel_stride, BLOCK)
    param_stride = param_stride.to(tl.int64)
    to = sample * grad_batch_stride + pixel * pixel_stride
    largest, total, logit_largest, logit_total = sums(
        params_ptr, x_ptr, offset, sample, pixel, image, components, param_stride, inside, last, h, log_width, C, BLOCK
    )
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0)
    joint_weight, logit_weight = grad / total, grad / logit_total
    for k in range(components):
        value, logit = joint(
            params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last, h, log_width, C
        )
        weight = tl.exp(value - largest) * joint_weight
        put(dparams_ptr, to, k, param_stride, weight - tl.exp(logit - logit_largest) * logit_weight, inside)
        for c in tl.static_range(C):
            mean = conditioned_mean(
                params_ptr, x_ptr, offset, sample, pixel, image, k, components, param_stride, inside, last, c, C
            )
            log_scale = parameter(params_ptr, offset, components * (1 + C + c) + k, param_stride, inside)
            bin, x = data(x_ptr, sample, pixel, image, c, inside, last, C)
            inverse, a, b, d = ends(x, bin, mean, log_scale, last, h)
            one_a, one_b, width = factors(a, b, d)
            above = tl.where(a > 0.0, one_a - 1.0, 1.0) / one_a  # sigmoid(-a)
            below = tl.where(b > 0.0, 1.0, one_b - 1.0) / one_b  # sigmoid(b)
            inner = tl.where(d > 0.5, d, 1.0) * tl.exp(-d) / width  # d / (e^d - 1)
            dmean = weight * (inverse * (below - above))
            dlog_scale = tl.where(log_scale < LOWEST_LOG_SCALE, 0.0, weight * (b * below - a * above - inner))
            put(dparams_ptr, to, components * (1 + c) + k, param_stride, dmean, inside)
            put(dparams_ptr, to, components * (1 + C + c) + k, param_stride, dlog_scale, inside)
            for j in tl.static_range(c):
                row = components * (1 + 2 * C + c * (c - 1) // 2 + j) + k
                t = tanh_ieee(parameter(params_ptr, offset, row, param_stride, inside))
                _, x_j = data(x_ptr, sample, pixel, image, j, inside, last, C)
                put(dparams_ptr, to, row, param_stride, dmean * x_j * (1.0 - t * t), inside)


# ---- sampling: IEEE operations alone, in the order of the reference -------------------------------------------------


@triton.jit
def draw(pixel, j, seed, sample_id, step, stream, EACH: tl.constexpr):
    element = pixel * EACH + j
    zero = (pixel * 0).to(tl.uint32)
    w0, w1, w2, w3 = quad_words(element // 4, seed, zero + sample_id.to(tl.uint32), step, stream)
    position = element % 4
    low, high = tl.where(position == 1, w1, w0), tl.where(position == 3, w3, w2)
    return unit(tl.where(position >= 2, high, low))


@triton.jit
def choose(params_ptr, offset, components, param_stride, inside, u, inverse_temperature, BLOCK: tl.constexpr):
    """The component of each pixel, and the sum of the weights."""
    largest = parameter(params_ptr, offset, 0, param_stride, inside)
    for k in range(1, components):
        logit = parameter(params_ptr, offset, k, param_stride, inside)
        largest = tl.where(logit > largest, logit, largest)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(components):
        logit = parameter(params_ptr, offset, k, param_stride, inside)
        total = total + exp_ieee((logit - largest) * inverse_temperature)
    target = u * total
    partial, chosen = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.int32)
    for k in range(components - 1):
        logit = parameter(params_ptr, offset, k, param_stride, inside)
        partial = partial + exp_ieee((logit - largest) * inverse_temperature)
        chosen += (partial <= target).to(tl.int32)
    return chosen, total


@triton.jit
def sample_channel(mean, log_scale, u, temperature, last):
    log_scale = tl.where(log_scale < LOWEST_LOG_SCALE, LOWEST_LOG_SCALE, log_scale)
    scale = exp_ieee(log_scale) * temperature
    return bin_value(nearest_bin(mean + scale * (log_unit(u) - log_unit(1.0 - u)), last), last)


@triton.jit(
    do_not_specialize=[
        "batch", "image", "components", "batch_stride", "param_stride", "pixel_stride", "seed_stride", "step", "stream",
    ]
)  # fmt: skip
def sample_kernel(
    params_ptr, seed_ptr, ids_ptr, x_ptr, batch, image, components, batch_stride, param_stride, pixel_stride,
    seed_stride, step, stream, temperature, inverse_temperature, last,
    C: tl.constexpr, HAS_IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index, sample, pixel, offset, inside = place(batch, image, batch_stride, pixel_stride, BLOCK)
    param_stride = param_stride.to(tl.int64)
    seed = tl.load(seed_ptr + sample * seed_stride, mask=inside, other=0)
    sample_id = tl.load(ids_ptr + sample, mask=inside, other=0) if HAS_IDS else sample
    u = draw(pixel, 0, seed, sample_id, step, stream, 1 + C)
    k, total = choose(params_ptr, offset, components, param_stride, inside, u, inverse_temperature, BLOCK)
    x0, x1, x2 = total * 0.0, total * 0.0, total * 0.0  # the channels before c
    for c in tl.static_range(C):
        mean = parameter(params_ptr, offset, components * (1 + c) + k, param_stride, inside)
        mean = mean + total * 0.0  # NaN of NaN logits
        for j in tl.static_range(c):
            row = components * (1 + 2 * C + c * (c - 1) // 2 + j) + k
            coupling = tanh_ieee(parameter(params_ptr, offset, row, param_stride, inside))
            mean = mean + coupling * (x0 if j == 0 else (x1 if j == 1 else x2))
        log_scale = parameter(params_ptr, offset, components * (1 + C + c) + k, param_stride, inside)
        x = sample_channel(mean, log_scale, draw(pixel, 1 + c, seed, sample_id, step, stream, 1 + C), temperature, last)
        tl.store(x_ptr + (sample * C + c) * image + pixel, x, mask=inside)
        if c == 0:
            x0 = x
        if c == 1:
            x1 = x
        if c == 2:
            x2 = x


# ---- launchers -------------------------------------------------------------------------------------------------------


def logistic_mixture_log_prob(x, params, bins):
    log_prob = torch.empty((x.shape[0], *x.shape[2:]), dtype=torch.float32, device=x.device)
    if log_prob.numel() == 0:
        return log_prob
    sizes, grid = _sizes(params, x.shape[1]), (triton.cdiv(log_prob.numel(), BLOCK),)
    with torch.cuda.device_of(params):
        log_prob_kernel[grid](x, params, log_prob, *sizes, *_bins(bins), C=x.shape[1], **_OPTIONS)
    return log_prob


def logistic_mixture_log_prob_backward(grad, x, params, bins):
    dparams = torch.empty_like(params)
    if dparams.numel() == 0:
        return dparams
    sizes, grid = _sizes(params, x.shape[1]), (triton.cdiv(grad.numel(), BLOCK),)
    with torch.cuda.device_of(params):
        log_prob_backward_kernel[grid](
            grad, x, params, dparams, *sizes, batch_stride(dparams), *_bins(bins), C=x.shape[1], **_OPTIONS
        )
    return dparams


def logistic_mixture_sample(params, channels, bins, temperature, seed, sample_ids, step):
    x = torch.empty((params.shape[0], channels, *params.shape[2:]), dtype=torch.float32, device=params.device)
    if x.numel() == 0:
        return x
    sizes, grid = _sizes(params, channels), (triton.cdiv(x.numel() // channels, BLOCK),)
    with torch.cuda.device_of(params):
        sample_kernel[grid](
            params, seed, seed if sample_ids is None else sample_ids, x, *sizes, seed.stride(0) if seed.dim() else 0,
            step, _STREAM, temperature, 1 / temperature, float(bins - 1),
            C=channels, HAS_IDS=sample_ids is not None, **_OPTIONS,
        )  # fmt: skip
    return x


# No fused multiply-adds: the samples' bits must be everyone's, and the rest is bound by its exponentials.
_OPTIONS = {"BLOCK": BLOCK, "num_warps": NUM_WARPS, "enable_fp_fusion": False}


def _sizes(params, channels):
    """batch, image, components, and the strides of the batch, a parameter and a pixel."""
    batch, count = params.shape[:2]
    image = params[:1, :1].numel()
    components = count // (1 + 2 * channels + channels * (channels - 1) // 2)
    last = layout(params)[0] > 1
    return batch, image, components, batch_stride(params), 1 if last else image, count if last else 1


def _bins(bins):
    """bins - 1, half a bin, and the logarithm of a bin"""
    return float(bins - 1), 1 / (bins - 1), math.log(2 / (bins - 1))


def variants():
    """What `make inspect` compiles ahead of time."""
    kernels = {"log_prob": log_prob_kernel, "log_prob_backward": log_prob_backward_kernel, "sample": sample_kernel}
    return [
        _variant(f"logistic_mixture_{name}_{DTYPE_NAMES[dtype]}_{channels}", kernel, dtype, channels)
        for name, kernel in kernels.items()
        for dtype, channels in ((torch.float32, 3), (torch.bfloat16, 1), (torch.bfloat16, 4))
    ]


_FLOATS = ("x_ptr", "log_prob_ptr", "grad_ptr")
_SCALARS = ("last", "h", "log_width", "temperature", "inverse_temperature")


def _variant(name, kernel, dtype, channels):
    kinds = {argument: "i32" for argument in kernel.arg_names} | dict.fromkeys(_SCALARS, "fp32")
    kinds |= {argument: f"*{DTYPE_NAMES[dtype]}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    kinds |= dict.fromkeys(_FLOATS, "*fp32") | {"seed_ptr": "*i64", "ids_ptr": "*i64"}
    kinds |= dict.fromkeys(("C", "HAS_IDS", "BLOCK"), "constexpr")
    signature = {argument: kinds[argument] for argument in kernel.arg_names}
    constants = {"C": channels, "HAS_IDS": True, "BLOCK": BLOCK}
    return {
        "name": name,
        "fn": kernel,
        "signature": signature,
        "constexprs": {argument: value for argument, value in constants.items() if argument in signature},
        "divisible": [argument for argument, kind in signature.items() if kind.startswith("*")],
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": False,
        "streaming": False,  # a thread for each pixel: 4-byte accesses that coalesce
    }
