"""Cases of qk_norm_rope, in place too, and its backward: heads of every size, pairings, rotary dims and weights."""

import itertools

import torch

from genengine.testing._case import DTYPES, Case

# (B, N, H, D): fewer than a vector, odd, whole vectors and not; more rows than one task of the backward takes
_SMALL = (
    (2, 3, 2, 5),
    (1, 5, 3, 16),
    (2, 3, 1, 40),
    (1, 2, 3, 64),
    (1, 3, 2, 72),
    (1, 2, 2, 128),
    (1, 2, 1, 255),
    (1, 2, 2, 256),
)
_LARGE = ((2, 37, 8, 24), (1, 150, 3, 33), (3, 90, 2, 128))
# (norm, weights, share of D that is rotated, interleaved, table per sample)
_KINDS = tuple(
    (norm, weights, share, interleaved, per_sample)
    for norm, weights in ((True, True), (True, False), (False, False))
    for share, interleaved, per_sample in (
        (0, True, False),
        (1, True, False),
        (1, False, True),
        (0.5, True, True),
        (0.5, False, False),
    )
    if norm or share
)


def rotary_half(dim: int, share: float) -> int:
    """R/2 for a share of D that is rotated; 0: no rotation."""
    return min(dim // 2, max(1, round(share * dim / 2))) if share else 0


def make_arguments(draw, dtype, weight_dtype, size, kind) -> list:
    """qkv, then the options of the dispatcher ops; draw(*shape): a float32 tensor."""
    (batch, tokens, heads, dim), (norm, weighted, share, interleaved, per_sample) = size, kind
    weights = [draw(dim).to(weight_dtype) if weighted else None for _ in range(2)]
    tables = [None, None]
    if half := rotary_half(dim, share):
        angle = 3 * draw(batch if per_sample else 1, tokens, half)
        tables = [angle.cos(), angle.sin()]
    return [draw(batch, tokens, 3, heads, dim).to(dtype), *weights, *tables, 1e-6, norm, interleaved]


def backward_slack(args) -> dict[int, float]:
    """Float32 roundings, at their largest, of terms that may cancel: two of dx's, one of the sums that dweight are."""
    grad, qkv, *weights = (t.double() if torch.is_tensor(t) else t for t in args[:4])
    eps, norm = args[6:8]
    if not norm or qkv.numel() == 0:
        return {}
    rstd = torch.rsqrt(qkv[:, :, :2].square().mean(-1, keepdim=True) + eps)
    x_hat = qkv[:, :, :2] * rstd
    # a rotation keeps the length of a pair: its larger element grows by sqrt(2) at most; the head's largest bounds it
    g = 2**0.5 * grad[:, :, :2].abs().amax(-1, keepdim=True).expand_as(x_hat)
    one = torch.finfo(torch.float32).eps
    if weights[0] is None:
        return {0: 2 * one * (rstd * g).max().item()}
    total = (g * x_hat.abs()).sum((0, 1, 3)).max().item()
    scaled = rstd * g * torch.stack(weights)[:, None].abs()
    return {0: 2 * one * scaled.max().item(), 1: one * total, 2: one * total}


def _maker(name: str):
    def make(generator, device) -> list[Case]:
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
        found = []
        pairs = [*((d, d) for d in DTYPES), (torch.bfloat16, torch.float32)]
        for i, ((dtype, weight_dtype), size) in enumerate(itertools.product(pairs, (*_SMALL, *_LARGE))):
            for kind in _KINDS[i % 4 :: 4]:  # every fourth, each in turn
                args = make_arguments(draw, dtype, weight_dtype, size, kind)
                slack = {}
                if name == "qk_norm_rope_backward":
                    args.insert(0, draw(*args[0].shape).to(dtype))
                    slack = backward_slack(args)
                names = "(norm, weights, share, interleaved, per sample)"
                label = f"{dtype}/{weight_dtype}, (B, N, H, D) = {size}, {names} = {kind}"
                mutated = (0,) if name == "qk_norm_rope_" else ()
                found.append(Case(label, tuple(args), mutated, False, size in _LARGE, (dtype, weight_dtype), slack))
        return found

    return make


CASES = {name: _maker(name) for name in ("qk_norm_rope", "qk_norm_rope_", "qk_norm_rope_backward")}
