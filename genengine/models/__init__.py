"""Models: a network, a path, `loss()` and `sample()`."""

from genengine.models.flow import FlowMatching

__all__ = ["FlowMatching"]
