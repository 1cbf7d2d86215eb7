"""Networks in evaluation mode for a while."""

from __future__ import annotations

import contextlib


@contextlib.contextmanager
def evaluating(*networks):
    """`with evaluating(net):` puts the networks into evaluation mode and back into training after.

    One that is evaluating already is left alone: to walk through its modules would take longer than a small network.
    """
    training = [network for network in networks if network.training]
    for network in training:
        network.eval()
    try:
        yield
    finally:
        for network in training:
            network.train()
