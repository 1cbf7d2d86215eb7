"""What the launchers share: layouts as numbers a kernel can use, typed placeholders, the choice of warps."""

import torch

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def layout(x):
    """(channels, pixels) of dense channels_last samples, (1, 0) of samples in C order; anything else is refused."""
    expected = 1
    in_order = True
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        in_order &= size == 1 or stride == expected
        expected *= size
    if in_order:
        return 1, 0
    if x.dim() == 4:
        _, channels, height, width = x.shape
        strides = (1, width * channels, channels)
        pairs = zip(x.shape[1:], x.stride()[1:], strides, strict=True)
        if all(size == 1 or stride == wanted for size, stride, wanted in pairs):
            return channels, height * width
    raise RuntimeError(f"samples must be dense, in C order or channels_last, got strides {x.stride()}")


def require_layout(op, name, x, channels):
    """Refuse a tensor whose samples are not laid out like the op's output."""
    got = layout(x)[0] if x.dim() > 1 else 1
    degenerate = x.dim() != 4 or x.shape[1] == 1 or x.shape[2] * x.shape[3] == 1
    if got != channels and not degenerate:
        raise RuntimeError(f"{op}: {name} must be laid out like out, got strides {x.stride()}")


def per_sample(x):
    return x[:1].numel() if x.shape[0] else 0


def batch_stride(x):
    return x.stride(0) if x.shape[0] > 1 else per_sample(x)
