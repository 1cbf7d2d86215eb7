"""Models: networks with a loss, samples and, where there is one, a likelihood.

`FAMILIES` is the registry: a family is one class and one line here, and everything else follows from the class.
"""

from genengine.models.base import Model, Option, Turn
from genengine.models.ddpm import DDPM
from genengine.models.flow import FlowMatching
from genengine.models.gan import GAN
from genengine.models.pixelcnn import PixelCNN
from genengine.models.vae import VAE
from genengine.models.vqvae import VQVAE

FAMILIES = {model.family: model for model in (DDPM, FlowMatching, VAE, VQVAE, GAN, PixelCNN)}


def family(name: str) -> type[Model]:
    """The class of a family.

    Raises:
        ValueError: no such family.
    """
    if name not in FAMILIES:
        raise ValueError(f"models/family: family must be one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def load(path, *, device="cpu") -> Model:
    """Read a model file of whatever family.

    Raises:
        FileNotFoundError, ValueError: as `Model.load`.
    """
    from genengine.models import checkpoint

    _, config = checkpoint.read(path)
    return family(config.get("family", "")).load(path, device=device)


__all__ = [
    "DDPM", "FAMILIES", "FlowMatching", "GAN", "Model", "Option", "PixelCNN", "Turn", "VAE", "VQVAE", "family", "load",
]  # fmt: skip
