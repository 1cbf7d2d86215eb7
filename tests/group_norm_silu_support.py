"""What the tests of group_norm_silu and of add_group_norm_silu share: inputs, and names."""

import torch

NAMES = ("group_norm_silu", "group_norm_silu_backward")
ADDS = ("add_group_norm_silu", "add_group_norm_silu_backward")
NAMESPACES = {"cpu": "genengine", "triton": "genengine_triton", "reference": "genengine_reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def make(shape, dtype=F32, narrow=F32, *, parameters=True, modulated=True, device="cpu"):
    """x, the gradient of y, and the four rows; scale and shift are views into one table."""
    draw = lambda *size, kind: torch.randn(*size).to(device, kind)  # noqa: E731
    batch, channels = shape[:2]
    weight, bias = (draw(channels, kind=narrow) for _ in range(2)) if parameters else (None, None)
    scale, shift = draw(batch, 3 * channels, kind=narrow).split(channels, dim=1)[1:] if modulated else (None, None)
    return 2 * draw(*shape, kind=dtype) + 1, draw(*shape, kind=dtype), (weight, bias, scale, shift)
