"""VQ-VAE: a training step, and the search for the nearest codes against distances and one-hots as people write them.

"eager" has every op in its plain form (`eager.ops`) and a codebook by full distances, one-hot products included, as in
the common implementations; "torch.compile" compiles that.
"""

from functools import partial

import torch
import torch.nn.functional as F

from genengine import ops
from genengine.benchmarks import eager
from genengine.benchmarks.registry import Benchmark, faster, register
from genengine.models import VQVAE
from genengine.nets import vq
from genengine.ops._cost import Cost, traffic

SEED = 3


def one_hot_codes(z, codebook):
    """All distances, the nearest, and the codes as a product with a one-hot matrix."""
    distances = z.square().sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)
    index = distances.argmin(1)
    return F.one_hot(index, len(codebook)).to(z.dtype) @ codebook, index


def one_hot_nearest(z, codebook):
    return one_hot_codes(z, codebook)[0]


class Search:
    """The nearest of K codes for N rows."""

    def __init__(self, n, k, d, device):
        self.z = ops.normal((n, d), seed=1, device=device)
        self.codebook = ops.normal((k, d), seed=2, device=device)

    def fused(self):
        return self.codebook[vq.nearest_code(self.z, self.codebook)]

    def eager(self):
        return one_hot_nearest(self.z, self.codebook)

    def check(self):
        ours, theirs = (
            (self.z.double() - codes.double()).square().sum(1) for codes in (self.fused(), self.eager())
        )  # of equally near codes either may be taken
        gap = (ours - theirs).abs().max().item()
        assert gap < 1e-3, f"the codes found are {gap} further away"


class Training:
    """A training step of the autoencoder with the loss's gradients and the codebook's averages.

    Ours also counts perplexity and restarts dead codes in every step, which the eager one does without.
    """

    def __init__(self, config, case):
        device = case.device
        self.vae = VQVAE.from_config({"family": "vqvae", "net": {"name": "vq", "config": config}}).to(device).train()
        batch = case.batch_of(self.vae.image_shape)
        self.x0 = ops.uniform((batch, *self.vae.image_shape), seed=1, device=device) * 2 - 1
        self.vae.terms(self.x0, seed=SEED)  # puts the codes on the data
        self.compiled_loss = None

    def step(self, loss):
        for parameter in self.vae.net.parameters():
            parameter.grad = None
        with torch.enable_grad():
            value = loss()
            value.backward()
        return value.detach()

    def fused(self):
        return self.step(lambda: self.vae.loss(self.x0, seed=SEED))

    def eager_loss(self):
        """The loss and the averages of the codebook by one-hot products."""
        net, book = self.vae.net, self.vae.net.codebook
        z = net.encode(self.x0)
        rows = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        e, index = one_hot_codes(rows, book.weight)
        e = e.detach().view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        loss = (net.decode(z + (e - z).detach()) - self.x0).square().mean()
        loss = loss + self.vae.commitment * (z - e).square().mean()
        with torch.no_grad():
            hot = F.one_hot(index, len(book.use)).to(z.dtype)
            book.use.mul_(book.decay).add_(hot.sum(0), alpha=1 - book.decay)
            book.sums.mul_(book.decay).add_(hot.T @ rows, alpha=1 - book.decay)
            total = book.use.sum()
            smoothed = (book.use + book.eps) / (total + len(book.use) * book.eps) * total
            book.weight.copy_(book.sums / smoothed[:, None])
        return loss

    def eager(self):
        return self.step(eager.calling(self.eager_loss))

    def compiled(self):
        if self.compiled_loss is None:
            self.compiled_loss = torch.compile(eager.calling(self.eager_loss))
        return self.step(self.compiled_loss)

    def check(self):
        kept = {name: value.clone() for name, value in self.vae.net.state_dict().items()}
        found = []
        for run in (self.fused, self.eager):
            self.vae.net.load_state_dict(kept)
            found.append([run(), *(p.grad.clone() for p in self.vae.net.parameters())])
        self.vae.net.load_state_dict(kept)
        for mine, theirs in zip(*found, strict=True):
            gap = (mine - theirs).abs().max().item()
            assert gap <= 5e-3 * theirs.abs().max().item() + 1e-5, f"losses or gradients differ by {gap}"


GOALS = (faster("eager", 1.0), faster("torch.compile", 1.0))


@register(
    "nearest codes", group="vqvae", kind="models",
    shapes={"128 codes": (2048, 128, 16), "1,024 codes": (16384, 1024, 64), "8,192 codes": (16384, 8192, 64)},
)  # fmt: skip
def search(case):
    """Shape: rows, codes, entries of each."""
    work = Search(*case.shape, case.device)
    return Benchmark(
        {"fused": work.fused, "eager": work.eager}, work.check, inputs=(work.z, work.codebook),
        compiles=(one_hot_nearest, (work.z, work.codebook)), elements=work.z.numel(), goals=GOALS,
        cost=Cost(traffic(work.z, work.codebook, work.z), flops=2 * case.shape[0] * case.shape[1] * case.shape[2]),
    )  # fmt: skip


def training(config, case):
    work = Training(config, case)
    variants = {"fused": work.fused, "eager": work.eager, "torch.compile": work.compiled}
    return Benchmark(variants, work.check, elements=case.shape[0], goals=GOALS)


for _config, _shape, _quick in (("tiny", (32, 1, 8, 8), None), ("vq_32", (16, 3, 32, 32), ())):
    register(
        f"VQ-VAE {_config}, training step", group="vqvae", kind="models", quick=_quick, axes={"batch": 0},
        shapes={f"{_shape[0]} images": _shape},
    )(partial(training, _config))  # fmt: skip
