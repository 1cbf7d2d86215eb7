"""transformer_sample: sequences from a decoder-only transformer, against the same network in plain PyTorch.

Shapes are (B, tokens, D, blocks, values of a token). "eager, cached" is the strongest form we found: keys and values
preallocated, `scaled_dot_product_attention` over those there are, all views made before, sums in place; on a CPU it
takes 0.6 to 0.9 of the time of the same step as one writes it, which is what "torch.compile" compiles, for any number
of keys. Its weights are of the case's dtype; torch's products in bfloat16 may be slower on a CPU than in float32, so
"eager, cached, float32" stands beside them there. "eager, naive", a pass over all tokens so far for every token, is
what people write first; it is left out where a run would take minutes.
"""

import torch
import torch.nn.functional as F

from genengine import ops
from genengine.benchmarks import calls, eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.nets.transformer import Transformer
from genengine.ops.transformer_sample import NORM_EPS
from genengine.testing.transformer_sample import arguments

SHAPES = {
    "digits, 1 sequence": (1, 64, 64, 4, 17), "digits, 100 sequences": (100, 64, 64, 4, 17),
    "16x16 codes, 1 sequence": (1, 256, 256, 6, 512), "16x16 codes, 16 sequences": (16, 256, 256, 6, 512),
}  # fmt: skip
NAIVE_TOKENS = 64  # of a sequence, at most
NATS = {torch.float32: 1e-3, torch.bfloat16: 0.3}  # by which a log-probability may err


def network(shape, device):
    """Random weights, such that the distributions are neither flat nor sharp."""
    _, length, dim, depth, levels = shape
    sizes = {"length": length, "dim": dim, "depth": depth, "num_levels": levels, "num_heads": max(4, dim // 64)}
    net = Transformer.from_config("small", **sizes)
    for index, parameter in enumerate(net.parameters()):
        parameter.data += 0.05 * ops.normal((1, parameter.numel()), seed=index).view(parameter.shape)
    return net.to(device).eval()


class Plain:
    """The network's cached sampler in plain PyTorch, products in `dtype` and all else in float32."""

    def __init__(self, net, dtype, u):
        config, device = net.config, u.device
        self.config, self.dtype, self.u = config, dtype, u
        cast = lambda linear: (linear.weight.detach().to(dtype), linear.bias.detach().to(dtype))  # noqa: E731
        self.blocks = [
            [cast(linear) for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
            for block in net.blocks
        ]
        self.out = cast(net.out)
        self.levels, self.positions = net.levels.weight.detach(), net.positions.detach()
        self.start = net.start.embedding_table.weight.detach()[net.null_class]
        shape = (len(u), config.num_heads, config.length, config.dim // config.num_heads)
        # Whole tensors: torch.compile writes to a part of one in place, and copies a part of a part.
        self.keys, self.values = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in net.blocks] for _ in range(2)
        )
        self.places = torch.arange(config.length, device=device)
        self.compiled_step = None

    def linear(self, x, layer):
        return F.linear(x.to(self.dtype), *layer)

    def step(self, row, position, seen):
        """The token at `position` (1,) from the embedding of the one before it, with attention to the `seen` keys."""
        heads = self.config.num_heads
        x = row + self.positions[position]
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            q, k, v = self.linear(self.norm(x), block[0]).view(len(x), 3, heads, 1, -1).unbind(1)  # (B, H, 1, D / H)
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            o = F.scaled_dot_product_attention(q, keys[:, :, :seen], values[:, :, :seen])
            x = x + self.linear(o.flatten(1), block[1])
            x = x + self.linear(F.gelu(self.linear(self.norm(x), block[2]), approximate="tanh"), block[3])
        sums = torch.softmax(self.linear(self.norm(x), self.out).float(), 1).cumsum(1)
        return (sums[:, :-1] <= self.u[:, position]).sum(1)

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)

    def draw(self, step):
        tokens = torch.empty(self.u.shape, dtype=torch.int64, device=self.u.device)
        row = self.start.expand(len(tokens), -1)
        for i in range(self.config.length):
            tokens[:, i] = step(row, self.places[i : i + 1], i + 1)
            row = self.levels[tokens[:, i]]
        return tokens

    def written(self):
        with torch.inference_mode():
            return self.draw(self.step)

    def compiled(self):
        if self.compiled_step is None:
            self.compiled_step = torch.compile(self.step)
        with torch.no_grad():
            return self.draw(self.compiled_step)


class Cached(Plain):
    """The same in as few and as cheap calls as we found: all views made before, a biased product in one call, residual
    sums in place, q with k and v straight from one buffer to the cache."""

    def __init__(self, net, dtype, u):
        super().__init__(net, dtype, u)
        (batch, length), config, device = u.shape, self.config, u.device
        self.u_at, self.place = u.T.contiguous()[..., None].unbind(0), self.positions.unbind(0)
        both = [torch.stack(pair) for pair in zip(self.keys, self.values, strict=True)]  # (2, B, H, N, D / H)
        self.slots = [[cache[:, :, :, i : i + 1] for cache in both] for i in range(length)]
        self.seen = [[cache[:, :, :, : i + 1].unbind(0) for cache in both] for i in range(length)]
        self.qkv = torch.empty(batch, 3 * config.dim, dtype=dtype, device=device)
        split = self.qkv.view(batch, 3, config.num_heads, 1, -1)
        self.query, self.new = split[:, 0], split[:, 1:].transpose(0, 1)
        self.products = [[(bias, weight.T) for weight, bias in block] for block in self.blocks]
        self.to_logits = self.out[1], self.out[0].T
        self.cdf = torch.empty(batch, config.num_levels, device=device)
        self.tokens = torch.empty(length, batch, 1, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def __call__(self):
        addmm, gelu, attention, last = torch.addmm, F.gelu, F.scaled_dot_product_attention, self.config.num_levels - 1
        row = self.start.expand(len(self.u), -1)
        for place, u, slots, seen, token in zip(
            self.place, self.u_at, self.slots, self.seen, self.tokens.unbind(0), strict=True
        ):
            x = row + place
            for (qkv, proj, fc1, fc2), slot, (keys, values) in zip(self.products, slots, seen, strict=True):
                addmm(qkv[0], self.entering(x), qkv[1], out=self.qkv)
                slot.copy_(self.new)
                x.add_(addmm(proj[0], attention(self.query, keys, values).flatten(1), proj[1]))
                hidden = gelu(addmm(fc1[0], self.entering(x), fc1[1]), approximate="tanh")
                x.add_(addmm(fc2[0], hidden, fc2[1]))
            logits = addmm(self.to_logits[0], self.entering(x), self.to_logits[1])
            torch.cumsum(torch.softmax(logits.float(), 1), 1, out=self.cdf)
            torch.searchsorted(self.cdf, u, right=True, out=token).clamp_(max=last)
            row = self.levels.index_select(0, token[:, 0])
        return self.tokens[..., 0].T.contiguous()

    def entering(self, x):
        h = torch.layer_norm(x, x.shape[1:], None, None, NORM_EPS)
        return h if self.dtype == torch.float32 else h.to(self.dtype)


class Sampling:
    def __init__(self, case):
        self.net, self.dtype = network(case.shape, case.device), case.dtype
        batch, length = case.shape[:2]
        self.batch, self.weights = batch, self.net.packed(case.dtype)
        self.u = ops.uniform((batch, length), seed=0, device=case.device)
        self.cached, self.plain = (kind(self.net, case.dtype, self.u) for kind in (Cached, Plain))
        narrow = case.dtype == torch.bfloat16 and case.device == "cpu"
        self.wide = Cached(self.net, torch.float32, self.u) if narrow else None
        self.forward = eager.calling(self.net.forward)
        labels = torch.zeros(batch, dtype=torch.int64, device=case.device)
        self.arguments = arguments(self.weights, labels, torch.zeros((), dtype=torch.int64, device=case.device))

    def fused(self):
        return ops.transformer_sample(self.weights, self.batch, seed=0).tokens

    @torch.no_grad()
    def naive(self):
        tokens = torch.zeros_like(self.u, dtype=torch.int64)
        for i in range(tokens.shape[1]):
            sums = torch.softmax(self.forward(tokens[:, : i + 1])[:, i], 1).cumsum(1)
            tokens[:, i] = (sums[:, :-1] <= self.u[:, i : i + 1]).sum(1)
        return tokens

    def check(self):
        """The log-probabilities of what is drawn; and the tokens, where rounding cannot have moved one in ten."""
        found = ops.transformer_sample(self.weights, self.batch, seed=0)
        with torch.no_grad():
            exact = torch.log_softmax(self.net(found.tokens), -1).gather(2, found.tokens[..., None])[..., 0]
        gap = (found.log_prob - exact).abs().max().item()
        assert gap <= NATS[self.dtype], f"log-probabilities err by {gap:.3g}"
        if self.dtype == torch.float32:
            different = int((found.tokens != self.cached()).any(1).sum())
            assert different <= 1 + self.batch // 50, f"{different} of {self.batch} sequences differ"


@register(
    "transformer sampler", group="transformer_sample", kind="models", dtypes=("float32", "bfloat16"), axes={"batch": 0},
    shapes=SHAPES, quick=("digits, 1 sequence",),
)  # fmt: skip
def sampling(case):
    work = Sampling(case)
    variants = {"fused": work.fused, "eager, cached": work.cached, "torch.compile": work.plain.compiled}
    goals = [faster("eager, cached", 1.5), faster("torch.compile", 1.0)]
    if work.wide:
        variants["eager, cached, float32"] = work.wide
        goals.append(faster("eager, cached, float32", 1.0))
    if case.shape[1] <= NAIVE_TOKENS and case.dtype == torch.float32:
        variants["eager, naive"] = work.naive
        goals.append(faster("eager, naive", 10.0))
    cost = calls.cost("transformer_sample_out", *work.arguments)
    return Benchmark(
        variants, work.check, cost=cost, elements=case.shape[0] * case.shape[1], goals=tuple(goals)
    )  # fmt: skip
