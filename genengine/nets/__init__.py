"""Networks: `nn.Module`s that know ops, not samplers."""

from genengine.nets.dit import CONFIGS, DiT
from genengine.nets.unet import UNet

__all__ = ["CONFIGS", "DiT", "UNet"]
