"""Autoencoder with a vector-quantised latent grid: convolutions around a codebook.

van den Oord, Vinyals & Kavukcuoglu 2017, "Neural discrete representation learning"; Razavi et al. 2019.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from genengine import ops
from genengine.nets import configs, layers
from genengine.nets.vae import ConvDecoder, ConvEncoder, VAEConfig

UPDATES = ("ema", "loss")
SEARCH_ELEMENTS = 1 << 24  # of scores at a time: 64 MiB of float32, whatever N and K
_NET = "nets/VQNet"


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Shape of an autoencoder with a codebook.

    Attributes:
        image_size: height and width of x, a multiple of 2^(len(widths) - 1).  in_channels: channels of x.
        widths: channels per resolution, halving the size from one to the next; the codes are on the last.
        blocks: residual blocks per resolution.  groups: of the normalisations, divides every width.
        codes: size K of the codebook.  code_dim: elements of a code.
        update: "ema", the codebook follows the average of what falls to each code; "loss", by gradient.
        decay: of that average, in [0, 1).  restart_below: a code whose average use per batch falls below is dead and
            is put on an encoder output; 0 for never.
        num_classes: of the data, for the prior over the codes; the autoencoder does not see them.
    """

    image_size: int = 32
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    groups: int = 8
    codes: int = 512
    code_dim: int = 64
    update: str = "ema"
    decay: float = 0.99
    restart_below: float = 1.0
    num_classes: int = 0

    def __post_init__(self):
        configs.check_ints(_NET, self, ("codes", "code_dim"))
        configs.check_ints(_NET, self, ("num_classes",), least=0)
        configs.check_share(_NET, self, "decay")
        if self.codes < 2:
            raise ValueError(f"{_NET}: codes must be an int >= 2, got {self.codes}")
        if self.update not in UPDATES:
            raise ValueError(f"{_NET}: update must be one of {', '.join(UPDATES)}, got {self.update!r}")
        if not configs.is_number(self.restart_below):
            raise ValueError(f"{_NET}: restart_below must be a finite number >= 0, got {self.restart_below!r}")
        object.__setattr__(self, "widths", self.coder.widths)

    @property
    def coder(self) -> VAEConfig:
        """The shape of encoder and decoder; refuses sizes that do not fit together."""
        return VAEConfig(
            image_size=self.image_size, in_channels=self.in_channels, out_channels=self.in_channels, kind="conv",
            widths=self.widths, latent_dim=self.code_dim, spatial=True, blocks=self.blocks, groups=self.groups,
        )  # fmt: skip

    @property
    def grid(self) -> int:
        """Height and width of the grid of codes."""
        return self.image_size >> (len(self.widths) - 1)


# name -> VQConfig fields: "tiny" for the embedded digits, a grid of 4 x 4 codes.
CONFIGS = {
    "tiny": {
        "image_size": 8, "in_channels": 1, "widths": (32, 64), "blocks": 1, "codes": 128, "code_dim": 16,
        "num_classes": 10,
    },
    "vq_32": {"image_size": 32, "widths": (64, 128, 128)},
    "vq_64": {"image_size": 64, "widths": (64, 128, 256), "codes": 1024},
}  # fmt: skip


def nearest_code(z, codebook) -> Tensor:
    """The index of the code nearest to each row: argmin_k |z_n - e_k|^2 = argmax_k <z_n, e_k> - |e_k|^2 / 2.

    Rows are taken so many at a time that the scores never exceed `SEARCH_ELEMENTS`. Of equal distances the first.

    Args:
        z: (N, D).  codebook: (K, D).
    Returns:
        (N,) int64.
    """
    if not len(z):
        return torch.empty(0, dtype=torch.int64, device=z.device)
    z, codebook = z.detach().float(), codebook.detach().float()
    half = 0.5 * codebook.square().sum(1)
    rows = max(1, SEARCH_ELEMENTS // len(codebook))
    with torch.autocast(z.device.type, enabled=False):  # scores of 16 bits would find other codes
        return torch.cat([(part @ codebook.T - half).argmax(1) for part in z.split(rows)])


class Codebook(nn.Module):
    """K vectors, moved by the average of what falls to them ("ema") or by gradient ("loss").

    With n_k of a batch's N rows nearest to code k and s_k their sum (van den Oord et al. 2017, appendix A.1):
        N_k <- decay N_k + (1 - decay) n_k,   m_k <- decay m_k + (1 - decay) s_k
        e_k  = m_k / N'_k,   N'_k = (N_k + eps) / (sum N + K eps) sum N
    A code with N_k below `restart_below` is dead: e_k becomes row floor(u_k N) of the batch, u uniform of (seed, step,
    stream "model"), and N_k = 1. All of this state is buffers, so a stopped run goes on to the same bits.
    """

    eps = 1e-5

    def __init__(self, config):
        super().__init__()
        self.decay, self.restart_below, self.learned = config.decay, config.restart_below, config.update == "loss"
        table = torch.zeros(config.codes, config.code_dim)
        if self.learned:
            self.weight = nn.Parameter(table)
        else:
            self.register_buffer("weight", table)
            self.register_buffer("sums", torch.zeros(config.codes, config.code_dim))
        self.register_buffer("use", torch.zeros(config.codes))

    @torch.no_grad()
    def update(self, z, index, *, seed, step) -> None:
        """Move the codebook after a batch: z (N, D) encoder outputs, index (N,) their codes."""
        z = z.detach().float()
        # accumulated in the order of the rows on a CPU, sorted by code on a GPU: the same bits every time
        count = torch.bincount(index, minlength=len(self.use)).to(z.dtype)
        self.use.mul_(self.decay).add_(count, alpha=1 - self.decay)
        if not self.learned:
            sums = torch.zeros_like(self.sums).index_put_((index,), z, accumulate=True)
            self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
            total = self.use.sum()
            smoothed = (self.use + self.eps) / (total + len(self.use) * self.eps) * total
            self.weight.copy_(self.sums / smoothed[:, None].clamp_min(1e-12))
        if self.restart_below:
            u = ops.uniform((1, len(self.use)), seed=seed, step=step, stream="model", device=z.device)[0]
            chosen = z[(u.double() * len(z)).long()]
            dead = self.use < self.restart_below
            self.weight.copy_(torch.where(dead[:, None], chosen, self.weight))
            self.use.copy_(torch.where(dead, max(1.0, self.restart_below), self.use))
            if not self.learned:
                self.sums.copy_(torch.where(dead[:, None], chosen * self.use[:, None], self.sums))


class VQNet(nn.Module):
    """`encode` to a grid of vectors, `quantise` to the nearest codes, `decode` to an image.

    Args:
        config: VQConfig.
        seed: int in [0, 2^64) of the initial weights and codes (stream "model"); no global generator is touched.
    """

    def __init__(self, config, *, seed=0):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = ConvEncoder(config.coder, config.code_dim), ConvDecoder(config.coder)
        self.codebook = Codebook(config)
        self.reset_parameters(seed)

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from a name in `CONFIGS`, a dict of `VQConfig` fields or a VQConfig, fields replaced by `overrides`.

        Raises:
            ValueError: unknown name or field, or values that do not fit together.
        """
        return cls(configs.resolve(_NET, VQConfig, CONFIGS, config, overrides), seed=seed)

    @torch.no_grad()
    def reset_parameters(self, seed):
        """Glorot-uniform products, zero biases, norms as the identity, N(0, 1) codes."""
        index = 0
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            elif not name.startswith("codebook"):
                layers.init_xavier_(parameter, seed=seed, index=index)
        layers.init_normal_(self.codebook.weight, 1.0, seed=seed, index=index + 1)

    def encode(self, x) -> Tensor:
        """(B, C, H, W) -> (B, code_dim, h, w) float32. Raises ValueError if x does not fit the config."""
        config = self.config
        if x.ndim != 4 or tuple(x.shape[1:]) != (config.in_channels, config.image_size, config.image_size):
            raise ValueError(
                f"{_NET}: x must be (B, C, H, W) = (B, {config.in_channels}, {config.image_size}, "
                f"{config.image_size}), got {tuple(x.shape)}; resize x or build the network with another image_size"
            )
        return self.encoder(x).float()

    def quantise(self, z):
        """The nearest codes of a grid of vectors.

        Args:
            z: (B, D, h, w).
        Returns:
            straight: (B, D, h, w), the codes, with the gradient of z: z + sg[e - z].
            e: (B, D, h, w), the codes, with the gradient of the codebook ("loss").
            index: (B, h, w) int64.
        """
        b, d, h, w = z.shape
        rows = z.permute(0, 2, 3, 1).reshape(b * h * w, d)
        index = nearest_code(rows, self.codebook.weight)
        e = self.codebook.weight[index].view(b, h, w, d).permute(0, 3, 1, 2)
        return z + (e - z).detach(), e, index.view(b, h, w)

    def look_up(self, index) -> Tensor:
        """Codes of an index grid: (B, h, w) int64 -> (B, D, h, w)."""
        return self.codebook.weight[index].permute(0, 3, 1, 2)

    def decode(self, z) -> Tensor:
        """(B, code_dim, h, w) -> (B, C, H, W)."""
        return self.decoder(z)

    def forward(self, x):
        """The reconstruction of x through the codebook."""
        return self.decode(self.quantise(self.encode(x))[0])
