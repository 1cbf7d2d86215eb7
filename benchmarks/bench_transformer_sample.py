"""transformer_sample: sequences from a decoder-only transformer, against the same network in plain PyTorch.

Shapes are (B, tokens, D, blocks, values of a token). "eager, cached" is the strong form: keys and values preallocated,
`scaled_dot_product_attention` over those there are, weights of the case's dtype. "torch.compile" compiles its step, for
any number of keys. "eager, naive", a pass over all tokens so far for every token, is what people write first; it is
left out where a run would take minutes.
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


class EagerCached:
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

    def eager(self):
        with torch.inference_mode():
            return self.draw(self.step)

    def compiled(self):
        if self.compiled_step is None:
            self.compiled_step = torch.compile(self.step)
        with torch.no_grad():
            return self.draw(self.compiled_step)


class Sampling:
    def __init__(self, case):
        self.net, self.dtype = network(case.shape, case.device), case.dtype
        batch, length = case.shape[:2]
        self.batch, self.weights = batch, self.net.packed(case.dtype)
        self.u = ops.uniform((batch, length), seed=0, device=case.device)
        self.cached = EagerCached(self.net, case.dtype, self.u)
        self.plain = eager.calling(self.net.forward)
        labels = torch.zeros(batch, dtype=torch.int64, device=case.device)
        self.arguments = arguments(self.weights, labels, torch.zeros((), dtype=torch.int64, device=case.device))

    def fused(self):
        return ops.transformer_sample(self.weights, self.batch, seed=0).tokens

    @torch.no_grad()
    def naive(self):
        tokens = torch.zeros_like(self.u, dtype=torch.int64)
        for i in range(tokens.shape[1]):
            sums = torch.softmax(self.plain(tokens[:, : i + 1])[:, i], 1).cumsum(1)
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
            different = int((found.tokens != self.cached.eager()).any(1).sum())
            assert different <= 1 + self.batch // 50, f"{different} of {self.batch} sequences differ"


@register(
    "transformer sampler", group="transformer_sample", kind="models", dtypes=("float32", "bfloat16"), axes={"batch": 0},
    shapes=SHAPES, quick=("digits, 1 sequence",),
)  # fmt: skip
def sampling(case):
    work = Sampling(case)
    variants = {"fused": work.fused, "eager, cached": work.cached.eager, "torch.compile": work.cached.compiled}
    goals = [faster("eager, cached", 1.5), faster("torch.compile", 1.0)]
    if case.shape[1] <= NAIVE_TOKENS and case.dtype == torch.float32:
        variants["eager, naive"] = work.naive
        goals.append(faster("eager, naive", 10.0))
    cost = calls.cost("transformer_sample_out", *work.arguments)
    return Benchmark(
        variants, work.check, cost=cost, elements=case.shape[0] * case.shape[1], goals=tuple(goals)
    )  # fmt: skip
