"""Cases of pixelcnn_sample: depths, widths, kernels, heads, colours, classes, completion, folded products."""

import torch

from genengine.ops import _registry
from genengine.ops.pixelcnn_sample import SAMPLE, pack_pixelcnn, state_bytes
from genengine.testing._case import Case

# size, channels, levels, classes, dim, depth, reach, first_reach, embedding, head_dim, components, gated
NETWORKS = {
    "grey": (5, 1, 5, 3, 6, 3, 1, 1, 0, 24, 0, True),
    "one layer": (4, 1, 2, 0, 16, 1, 1, 3, 0, 16, 0, True),
    "wide kernels": (6, 1, 17, 0, 24, 2, 2, 3, 0, 40, 0, True),
    "colour": (4, 3, 6, 2, 12, 3, 1, 1, 0, 9, 0, True),
    "codes": (4, 1, 40, 0, 16, 2, 1, 1, 5, 16, 0, True),
    "plain": (5, 1, 4, 0, 10, 3, 1, 2, 0, 8, 0, False),
    "colour codes, plain": (4, 2, 4, 1, 8, 2, 1, 1, 3, 8, 0, False),
    "mixture": (4, 3, 256, 2, 12, 2, 1, 1, 0, 12, 3, True),
    "grey mixture": (5, 1, 32, 0, 20, 2, 1, 2, 0, 12, 4, True),
    "early": (5, 1, 7, 2, 16, 3, 1, 2, 0, 20, 0, True),
}
EARLY = ("early",)  # without positions, and without a ReLU before the head


def kernels(name, generator) -> tuple[dict, dict]:
    """Random kernels of a network, as `pack_pixelcnn` takes them, and its sizes: every pixel matters to those after."""
    size, channels, levels, classes, dim, depth, reach, first, embedding, head_dim, components, gated = NETWORKS[name]
    groups = 1 if components else channels
    outputs = components * (1 + 2 * channels + channels * (channels - 1) // 2) if components else channels * levels
    draw = lambda *shape, scale=1.0: scale * torch.randn(shape, generator=generator)  # noqa: E731

    def triangle(rows, columns, pairs=1, strict=False):
        """A product within a pixel, zero where a channel would see a later one."""
        group = torch.arange(groups).repeat_interleave(rows // groups)
        seen = torch.arange(groups).repeat_interleave(columns // groups).repeat(pairs)
        ahead = seen[:, None] - group[None]
        return draw(columns * pairs, rows, scale=rows**-0.5) * (ahead > 0 if strict else ahead >= 0)

    found = {}
    for i in range(depth):
        side, features = (reach, dim) if i else (first, channels * (embedding or 1))
        scale = (features * side * (2 * side + 1)) ** -0.5
        left = draw(2 * dim, features, 1, side + 1, scale=features**-0.5)
        left[..., 0, -1] = triangle(features, dim, 2, strict=i == 0)
        found |= {
            f"layers.{i}.above": draw(2 * dim, features, side + gated, 2 * side + 1, scale=scale),
            f"layers.{i}.above_bias": draw(2 * dim, scale=0.3), f"layers.{i}.left": left,
            f"layers.{i}.out": triangle(dim, dim), f"layers.{i}.out_bias": draw(dim, scale=0.3),
        }  # fmt: skip
        if gated:
            found[f"layers.{i}.down"] = draw(2 * dim, 2 * dim, scale=dim**-0.5)
    found |= {
        "positions": draw(2, dim, size, size, scale=0.5),
        "hidden": triangle(dim, head_dim), "hidden_bias": draw(head_dim, scale=0.3),
        "logits": triangle(head_dim, outputs), "logits_bias": draw(outputs, scale=0.3),
    }  # fmt: skip
    if classes:
        found["classes"] = draw(classes + 1, depth, 2, 2 * dim, scale=0.5)
    if embedding:
        found["table"] = draw(channels * levels, embedding)
    if name in EARLY:
        found["layers.0.above"][:, :, first:] = 0
        del found["positions"]
    return found, {"size": size, "channels": channels, "levels": levels, "components": components}


def packed(name, dtype=torch.float32, seed=0, fold=False):
    """Weights of one of `NETWORKS`; the same for every dtype, up to its rounding."""
    found, sizes = kernels(name, torch.Generator().manual_seed(seed))
    early = name in EARLY
    return pack_pixelcnn(found, **sizes, dtype=dtype, fold=fold, early=early, rectified=not early)


# Images of a case. "completed": some pixels are given; "folded": a product is split; "wavefront": rows overlap.
WAYS = {"drawn": 3, "completed": 5, "folded": 2, "wavefront": 5}
# For bfloat16, seeds for which no uniform comes nearer than 0.008 to the edge of two levels: a pixel that rounding
# moves would be an error as large as the pixel.
CLEAR_SEEDS = {"grey": 30, "one layer": 21, "plain": 11, "colour codes, plain": 50}


def _cases(generator, device) -> list[Case]:
    found = [_case(generator, device, name, way) for way in WAYS for name in NETWORKS]
    return found + [_case(generator, device, name, "folded", seed) for name, seed in CLEAR_SEEDS.items()]


def _case(generator, device, name, way, clear_seed=None):
    dtype = torch.float32 if clear_seed is None else torch.bfloat16
    weights = packed(name, dtype, fold=way == "folded" and clear_seed is None).to(device)
    s, batch, wavefront, images = weights.shape, WAYS[way], way == "wavefront", 2
    x, known = torch.zeros(batch, s.channels, s.size, s.size), None
    if way == "completed":
        known = (torch.rand(batch, 1, s.size, s.size, generator=generator) < 0.4).expand(x.shape).contiguous()
        level = torch.randint(0, s.levels, x.shape, generator=generator)
        x = torch.where(known, (2 * level - (s.levels - 1)) / (s.levels - 1), 0.0)
        known = known.to(device)
    labels = torch.randint(0, s.classes + 1, (batch,), generator=generator) if s.classes else None
    if clear_seed is not None and s.classes:
        labels = torch.tensor([1, s.classes])
    labels = None if labels is None else labels.to(device)
    seed = torch.tensor(77 if clear_seed is None else clear_seed, device=device)
    kinds = [
        kind
        for kind in ("reference", device.type)
        if _registry.why_not(SAMPLE, kind, device.type, weights.dtype) is None
    ]
    room = max(state_bytes(weights, batch, images, wavefront, kind) for kind in kinds)
    state = torch.empty(2 * room, dtype=torch.uint8, device=device)  # twice: for the reference in float64
    probs = torch.zeros(batch, s.size, s.size, device=device)
    args = (x.to(device), probs, state, weights.matrices, weights.vectors, s.fields(), labels, known, seed,
            torch.arange(batch, device=device) + 10, 0.8 if way == "completed" else 1.0, wavefront, images, 0,
            s.size)  # fmt: skip
    # A log-probability is a difference of two sums of the size of a logit; of bfloat16, eager's largest error of few
    # may be small by chance.
    slack = {1: 64 * torch.finfo(torch.float32).eps if clear_seed is None else 2**-8}
    return Case(f"{name}, {way}, {dtype}", args, mutated=(0, 1), slack=slack)


CASES = {"pixelcnn_sample": _cases}
