"""Cases of transformer_sample: every branch of its products and heads, odd sizes, known tokens, both dtypes."""

import torch

from genengine.ops.transformer_sample import Sizes, TransformerWeights, cache_numel, pack_transformer
from genengine.testing._case import Case

# (sizes, B): heads of a vector, less, and more; a width and a hidden one that fill no vector, odd; more samples than go
# together; several panels of keys.
_SIZES = (
    (Sizes(32, 2, 2, 64, 5, 9, 3), 3),
    (Sizes(15, 3, 2, 7, 19, 21, 0), 4),
    (Sizes(64, 1, 1, 96, 40, 37, 10), 19),
    (Sizes(70, 1, 1, 33, 16, 18, 1), 1),
)
# bfloat16 loses 2^-9 of what enters a product; over two blocks and logits of some units that makes up to as much as
# this, more or less by luck.
BFLOAT_SLACK = 2.0**-7


def tensors(generator, sizes: Sizes, device=None, gain: float = 2.0) -> dict[str, torch.Tensor]:
    """Random weights by their names, such that logits spread over some units."""
    found = {f"{name}.weight": (columns, rows) for name, rows, columns in sizes.products()} | dict(sizes.vectors())
    scale = lambda name, shape: gain / shape[1] ** 0.5 if name.endswith("weight") else 0.5  # noqa: E731
    return {
        name: (scale(name, shape) * torch.randn(shape, generator=generator)).to(device) for name, shape in found.items()
    }


def arguments(
    weights: TransformerWeights, labels, seed, *, ids=None, given=None, known=None, last=None, temperature=1.0
):
    """Those of the dispatcher op, for a call from the first token on."""
    sizes, batch = weights.sizes, len(labels)
    tokens = torch.zeros(batch, sizes.length, dtype=torch.int64, device=labels.device)
    tokens = tokens if known is None else torch.where(known, given, tokens)
    log_prob = torch.zeros(batch, sizes.length, dtype=weights.vectors.dtype, device=labels.device)
    cache = weights.matrices.new_empty(cache_numel(sizes, batch))
    last = sizes.length if last is None else last
    return (
        weights.matrices, weights.vectors, *sizes[:5], labels, temperature, seed, ids, known, 0, last, True, tokens,
        log_prob, cache,
    )  # fmt: skip


def _cases(generator, device) -> list[Case]:
    found = []
    for i, (sizes, batch) in enumerate(_SIZES):
        labels = (torch.arange(batch, device=device) * 3) % (sizes.num_classes + 1)
        seed = torch.tensor(7 + i) if i % 2 else torch.arange(batch) - 1
        ids = torch.arange(batch, device=device) + 2**32 - batch if i % 2 else None
        given = torch.randint(0, sizes.num_levels, (batch, sizes.length), generator=generator).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            named = tensors(generator, sizes, device, 1.0 if dtype == torch.bfloat16 else 2.0)
            known = torch.rand(batch, sizes.length, generator=generator) < 0.3
            if dtype == torch.bfloat16:  # whose rounding moves one draw in some hundreds, and all after it: few draws
                known.fill_(True)[:, [sizes.length // 3, sizes.length - 1 - i]] = False
            known = known.to(device)
            options = {"ids": ids, "given": given, "known": known if dtype == torch.bfloat16 or i % 2 else None}
            options |= {"last": sizes.length - i, "temperature": (1.0, 0.8, 1.5)[i % 3]}
            weights, wide = (
                pack_transformer(named, num_heads=sizes.num_heads, dtype=d) for d in (dtype, torch.float64)
            )
            if dtype == torch.bfloat16:
                rounded = {name: t.bfloat16() if name.endswith("weight") else t for name, t in named.items()}
                wide = pack_transformer(rounded, num_heads=sizes.num_heads, dtype=torch.float64)
            args, oracle = (arguments(w, labels, seed.to(device), **options) for w in (weights, wide))
            slack = {1: BFLOAT_SLACK} if dtype == torch.bfloat16 else {1: 1e-5}
            label = f"{dtype}, {sizes}, {batch=}"
            found.append(Case(label, args, mutated=(15, 16), dtypes=(dtype, dtype), slack=slack, oracle=oracle))
    return found


CASES = {"transformer_sample_out": _cases}
