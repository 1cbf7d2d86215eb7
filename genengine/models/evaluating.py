"""Networks in evaluation mode for a while."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def evaluating(*networks):
    """`with evaluating(net):` puts the networks into evaluation mode and back into their own after."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for network, mode in zip(networks, modes, strict=True):
            network.train(mode)
