"""Networks: `nn.Module`s that know ops, not samplers."""

from genengine.nets.dit import CONFIGS, DiT

__all__ = ["CONFIGS", "DiT"]
