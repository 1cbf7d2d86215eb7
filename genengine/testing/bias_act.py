"""Cases of bias_act and its backwards: short and long rows of biases and planes, every activation."""

import torch

from genengine.testing._case import DTYPES, Case

_ACTIVATIONS = ("linear", "relu", "lrelu", "silu", "gelu", "gelu_tanh", "tanh", "sigmoid")
# (outer, C, inner): channels innermost, odd and of whole vectors; planes, short and long
_SMALL = ((5, 7, 1), (40, 64, 1), (2, 3, 29), (2, 3, 320))
_LARGE = ((300, 1152, 1), (2, 5, 4099), (1, 2, 20000), (70, 24, 16))


def _maker(name):
    def make(generator, device):
        found = []
        for dtype in DTYPES:
            for number, (shape, activation) in enumerate(_pairs()):
                draw = lambda kind, *size: torch.randn(*size, generator=generator).to(device, kind)  # noqa: E731
                narrow = torch.float32 if number % 3 == 0 else dtype
                bias = None if number % 5 == 4 else draw(narrow, shape[1])
                grad_dbias = None if bias is None or number % 7 == 6 else draw(narrow, shape[1])
                x, grad, grad_dx = (draw(dtype, *shape) for _ in range(3))
                options = (activation, 0.2, 1.4, 1.1 if number % 2 else None)
                args = {
                    "bias_act": (x, bias, *options),
                    "bias_act_backward": (grad, x, bias, *options),
                    "bias_act_backward_backward": (grad_dx, grad_dbias, grad, x, bias, *options),
                }[name]
                label = f"{dtype}, {shape}, {activation}, clamp {options[3]}, bias {'no' if bias is None else narrow}"
                found.append(Case(label, args, large=shape in _LARGE, dtypes=(dtype, narrow)))
        return found

    return make


def _pairs():
    yield from ((_SMALL[i % len(_SMALL)], name) for i, name in enumerate(_ACTIVATIONS))
    yield from ((shape, "gelu") for shape in _SMALL)
    yield from ((shape, _ACTIVATIONS[i + 2]) for i, shape in enumerate(_LARGE))


CASES = {name: _maker(name) for name in ("bias_act", "bias_act_backward", "bias_act_backward_backward")}
