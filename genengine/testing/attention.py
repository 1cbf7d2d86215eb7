"""Cases of attention: every split of the head dim, blocks whole and cut, self, cross and causal, packed projections."""

from collections.abc import Callable

import torch

from genengine.ops.attention import reference_attention
from genengine.testing._case import DTYPES, Case

# (queries, keys, D, causal): alone in a block, and some blocks long in both; every launch configuration.
SMALL = ((5, 5, 8, False), (7, 33, 72, False), (33, 7, 40, False), (40, 40, 64, True))
LARGE = (
    (300, 333, 72, False), (333, 300, 64, False), (300, 300, 128, True), (256, 256, 80, False), (257, 257, 96, True),
    (140, 200, 160, False), (140, 140, 192, True), (130, 260, 256, False), (150, 150, 17, True),
    # Hopper's other forms: causal or not, and all queries of a head in one tile
    (256, 256, 72, False), (250, 640, 64, False), (401, 401, 72, True), (450, 450, 64, True), (200, 530, 128, False),
    (300, 300, 80, True), (129, 385, 96, False),
)  # fmt: skip
# torch's CPU kernel adds up weights that are good to some 14 bits where the inputs have 16: lse errs as much.
LSE_SLACK = 2.0**-13


def tensors(generator, device, dtype, queries, keys, dim, batch=2, heads=3):
    """q, k, v, views into one projection where they are equally long; and the gradient of o."""
    fresh = lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)  # noqa: E731
    q = fresh(batch, queries, 3, heads, dim)
    k, v = q.unbind(2)[1:] if keys == queries else fresh(batch, keys, 2, heads, dim).unbind(2)
    return q[:, :, 0], k, v, fresh(batch, queries, heads, dim)


def roundings(q, k, v, grad_o, causal, scale):
    """What each output may err in float32 beyond a multiple of eager's error, over a few keys a matter of luck.

    A score errs by s_err = eps scale |q|.|k|, and so does lse; a weight by s_err times itself; ds = p (dp - delta) by
    eps |grad_o|.|v| where dp and delta cancel. Those errors, through the products that follow.
    """
    eps = torch.finfo(torch.float32).eps
    q, k, v, grad_o = (t.double().transpose(1, 2) for t in (q, k, v, grad_o))  # (B, H, N, D)
    if q.numel() == 0:
        return dict.fromkeys(("o", "lse", "dq", "dk", "dv"), 0.0)
    scores = scale * q @ k.mT
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -float("inf"))
    p = scores.softmax(-1)
    s_err = eps * scale * (q.abs() @ k.abs().mT).amax(-1, keepdim=True)  # (B, H, N, 1)
    ds_err = p * (grad_o.abs() @ v.abs().mT).amax(-1, keepdim=True) * 2 * (eps + s_err)
    errors = {
        "o": s_err * (p @ v.abs()),
        "lse": s_err,
        "dq": scale * ds_err @ k.abs(),
        "dk": scale * ds_err.mT @ q.abs(),
        "dv": (p * s_err).mT @ grad_o.abs(),
    }
    return {name: value.max().item() for name, value in errors.items()}


def _maker(name: str) -> Callable:
    def make(generator, device):
        found = []
        for dtype in DTYPES:
            for queries, keys, dim, causal in (*SMALL, *LARGE):
                large = (queries, keys, dim, causal) in LARGE
                heads = {"batch": 1, "heads": 2} if large else {}  # interpreted, every block takes its time
                q, k, v, grad_o = tensors(generator, device, dtype, queries, keys, dim, **heads)
                scale = dim**-0.5 * 1.5
                args = (q, k, v, causal, scale)
                if name == "attention_backward":
                    args = (grad_o, q, k, v, *reference_attention(*args), causal, scale)
                label = f"{dtype}, (N, M, D) = {(queries, keys, dim)}{', causal' if causal else ''}"
                extra = roundings(q, k, v, grad_o, causal, scale)
                extra["lse"] += LSE_SLACK if dtype.itemsize == 2 else 0.0
                names = ("o", "lse") if name == "attention" else ("dq", "dk", "dv")
                slack = {i: extra[output] for i, output in enumerate(names)}
                found.append(Case(label, args, large=large, dtypes=(dtype, dtype), slack=slack))
        return found

    return make


CASES = {name: _maker(name) for name in ("attention", "attention_backward")}
