"""Plain inputs for every public op, of a shape and dtype: what `genengine profile OP` runs it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from genengine import ops, paths, rotary, schedules, solvers
from genengine.ops import _panels
from genengine.ops.pixelcnn_sample import PixelCNNShape, PixelCNNWeights
from genengine.ops.transformer_sample import Sizes, pack_transformer


@dataclass(frozen=True)
class Inputs:
    """How an op is called: the default shape, what its numbers mean, and make(draw, shape) -> (args, kwargs).

    draw(*shape) gives normal numbers of the dtype asked for.
    """

    shape: tuple[int, ...]
    letters: str
    make: Callable[[Callable[..., Tensor], tuple[int, ...]], tuple[tuple, dict]]


def build(name: str, shape: tuple[int, ...] | None, dtype: torch.dtype, device: torch.device, seed: int):
    """(args, kwargs, description) of a call of the public op `name`. Raises ValueError on a shape that does not fit."""
    inputs = OPS[name]
    shape = inputs.shape if shape is None else shape
    if len(shape) != len(inputs.shape):
        raise ValueError(
            f"--shape of {name} must be {inputs.letters}, such as {','.join(map(str, inputs.shape))}, got "
            f"{','.join(map(str, shape))}"
        )
    count = iter(range(1 << 30))

    def draw(*size):
        return ops.normal(size, seed=seed, step=next(count), stream="model", device=device).to(dtype)

    args, kwargs = inputs.make(draw, tuple(shape))
    sizes = f"{inputs.letters} = ({', '.join(map(str, shape))})"
    return args, kwargs, f"{name} on normal numbers, {sizes}, {str(dtype).removeprefix('torch.')}"


def _rows(draw, batch, width, count):
    """Strided views into one modulation table, as a network's conditioning layer leaves them."""
    return draw(batch, 6 * width).chunk(6, dim=1)[:count]


def _adaln(draw, shape):
    return (draw(*shape), *_rows(draw, shape[0], shape[2], 2)), {}


def _gated_adaln(draw, shape):
    return (draw(*shape), draw(*shape), *_rows(draw, shape[0], shape[2], 3)), {}


def _attention(draw, shape):
    batch, tokens, heads, dim = shape
    return draw(batch, tokens, 3, heads, dim).unbind(2), {}


def _group_norm_silu(draw, shape):
    x = draw(*shape).contiguous(memory_format=torch.channels_last)
    return (x, draw(shape[1]), draw(shape[1]), min(32, shape[1])), {}


def _add_group_norm_silu(draw, shape):
    (x, *rest), _ = _group_norm_silu(draw, shape)
    return (x, draw(*shape).contiguous(memory_format=torch.channels_last), *rest), {}


def _bias_act(draw, shape):
    return (draw(*shape), draw(shape[1])), {"activation": "lrelu"}


def _qk_norm_rope(draw, shape):
    batch, tokens, heads, dim = shape
    qkv = draw(batch, tokens, 3, heads, dim)
    cos, sin = rotary.rope_table(torch.arange(tokens, device=qkv.device), dim)
    return (qkv, draw(dim), draw(dim), cos, sin), {}


def _diffuse(draw, shape):
    x0 = draw(*shape)
    t = torch.linspace(0.05, 0.95, shape[0], device=x0.device)
    return (x0, 1 - t, t, -torch.ones_like(t), torch.ones_like(t)), {"seed": 0}


def _reparameterize(draw, shape):
    batch, channels, *rest = shape
    return draw(batch, 2 * channels, *rest).chunk(2, dim=1), {"seed": 0}


def _ema_update(draw, shape):
    count, size = shape
    return ([draw(size) for _ in range(count)], [draw(size) for _ in range(count)], 0.999), {}


def _guidance_moments(draw, shape):
    return (draw(2 * shape[0], *shape[1:]),), {}


def _sampler_step(draw, shape):
    """A row of Euler's method with guidance: the state float32, two branches of the dtype, the next input written."""
    table = solvers.euler(paths.RectifiedFlow(), schedules.uniform(50), prediction="velocity", guidance_scale=2.0)
    output = draw(2 * shape[0], *shape[1:])
    device = output.device
    rows, step = (
        torch.from_numpy(table.astype_float32()).to(device),
        torch.zeros(shape[0], dtype=torch.int32, device=device),
    )
    return (draw(*shape).float(), output, rows, step), {"seed": 0, "x_in": torch.empty_like(output)}


def _patch_step(draw, shape):
    """The same row behind the last layer of a DiT of 384 features, patches of 2 (of 1 where H or W is odd)."""
    batch, channels, height, width = shape
    patch = 1 if height % 2 or width % 2 else 2
    (x, output, rows, step), options = _sampler_step(draw, shape)
    h = draw(2 * batch, (height // patch) * (width // patch), 384)
    weight, bias = draw(patch**2 * channels, 384) / 384**0.5, draw(patch**2 * channels)
    return (x, h, weight, bias, rows, step), options | {"patch_size": patch}


def _log_prob(draw, shape):
    batch, channels, *rest = shape
    components = 10 * (1 + 2 * channels + channels * (channels - 1) // 2)
    return (draw(*shape).float().clamp(-1, 1), draw(batch, components, *rest)), {}


def _mixture_sample(draw, shape):
    return _log_prob(draw, shape)[0][1:], {"channels": shape[1], "seed": 0}


def _pixelcnn_sample(draw, shape):
    """Seven gated layers of 64 features, kernels of three, 256 levels."""
    batch, channels, size = shape
    sizes = PixelCNNShape(size, channels, 256, 0, 64 * channels, 7, 1, 1, 0, 64 * channels, 0, True)
    like = draw(1)
    count = sum(_panels.numel(*size) for size in sizes.matrices().values())
    vectors = sum(torch.Size(size).numel() for size in sizes.vectors().values())
    weights = PixelCNNWeights(sizes, 0.05 * draw(count), torch.zeros(vectors, device=like.device))
    # A callback makes every row a call, whatever the time it takes.
    return (weights, batch), {"seed": 0, "callback": lambda *rows: None}


def _transformer_sample(draw, shape):
    """Six blocks, heads of 64 features or one, and codes of 512 values."""
    batch, length, dim = shape
    sizes = Sizes(dim, max(1, dim // 64) if dim % 64 == 0 else 1, 6, 4 * dim, 512, length, 0)
    shapes = {f"{name}.weight": (columns, rows) for name, rows, columns in sizes.products()} | dict(sizes.vectors())
    tensors = {name: draw(*size) * size[-1] ** -0.5 for name, size in shapes.items()}
    return (pack_transformer(tensors, num_heads=sizes.num_heads), batch), {"seed": 0}


def _noise(draw, shape):
    like = draw(1)
    return (shape,), {"seed": 0, "dtype": like.dtype, "device": like.device}


_IMAGE = ((64, 3, 64, 64), "(B, C, H, W)")
_HIDDEN = ((16, 256, 4608), "(B, N, D)")
_HEADS = ((16, 256, 16, 72), "(B, N, H, D)")
OPS: dict[str, Inputs] = {
    "adaln": Inputs((16, 256, 1152), "(B, N, D)", _adaln),
    "gated_adaln": Inputs((16, 256, 1152), "(B, N, D)", _gated_adaln),
    "attention": Inputs(*_HEADS, _attention),
    "qk_norm_rope": Inputs(*_HEADS, _qk_norm_rope),
    "group_norm_silu": Inputs((4, 256, 64, 64), "(B, C, H, W)", _group_norm_silu),
    "add_group_norm_silu": Inputs((4, 256, 64, 64), "(B, C, H, W)", _add_group_norm_silu),
    "bias_act": Inputs((16, 256, 32, 32), "(B, C, H, W)", _bias_act),
    "bias_gelu": Inputs(*_HIDDEN, lambda draw, s: ((draw(*s), draw(s[-1])), {"approximate": "tanh"})),
    "geglu": Inputs(*_HIDDEN, lambda draw, s: ((draw(*s),), {})),
    "swiglu": Inputs(*_HIDDEN, lambda draw, s: ((draw(*s),), {})),
    "diffuse": Inputs(*_IMAGE, _diffuse),
    "reparameterize": Inputs((64, 4, 32, 32), "(B, C, H, W)", _reparameterize),
    "sampler_step": Inputs(*_IMAGE, _sampler_step),
    "patch_step": Inputs((16, 4, 32, 32), "(B, C, H, W)", _patch_step),
    "guidance_moments": Inputs(*_IMAGE, _guidance_moments),
    "ema_update": Inputs((200, 65536), "(tensors, elements of each)", _ema_update),
    "logistic_mixture_log_prob": Inputs((16, 3, 32, 32), "(B, C, H, W)", _log_prob),
    "logistic_mixture_sample": Inputs((16, 3, 32, 32), "(B, C, H, W)", _mixture_sample),
    "pixelcnn_sample": Inputs((16, 1, 28), "(B, C, H)", _pixelcnn_sample),
    "transformer_sample": Inputs((16, 256, 256), "(B, N, D)", _transformer_sample),
    "normal": Inputs(*_IMAGE, _noise),
    "uniform": Inputs(*_IMAGE, _noise),
}  # fmt: skip
