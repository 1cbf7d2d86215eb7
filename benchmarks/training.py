"""A training step of a model with one network, against the step as a PyTorch tutorial writes it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from genengine.benchmarks import eager
from genengine.ops import ema_update, normal


class TrainingStep:
    """One AdamW step with a moving average on one batch: ours, eager, and the eager network compiled.

    Args:
        make: make() -> a new model with a network `net`, the same each time.
        plain_loss: plain_loss(net, model, x0, labels, draw) -> the loss in plain PyTorch, with torch's own draws, or
            with those of ours that draw, a dict of seed and step, names.
        batch: images in the batch.
    """

    def __init__(self, make: Callable, plain_loss: Callable, batch: int):
        self.make, self.plain_loss = make, plain_loss
        self.ours, self.theirs, self.traced = (self._state() for _ in range(3))
        model = self.ours[0]
        self.labels = torch.arange(batch, device=model.device) % model.num_classes
        self.x0 = normal((batch, *model.image_shape), seed=1, device=model.device).clamp(-1, 1)
        self.net, self.compiled_net = eager.calling(self.theirs[0].net.forward), None

    def _state(self):
        model = self.make().train()
        return model, self.make(), torch.optim.AdamW(model.net.parameters(), lr=1e-6)

    @torch.enable_grad()
    def fused(self):
        model, average, optimizer = self.ours
        optimizer.zero_grad(set_to_none=True)
        model.loss(self.x0, self.labels, seed=0).backward()
        optimizer.step()
        with torch.no_grad():
            ema_update(list(average.net.parameters()), list(model.net.parameters()), 0.999)

    @torch.enable_grad()
    def _plain_step(self, net, state):
        model, average, optimizer = state
        optimizer.zero_grad(set_to_none=True)
        self.plain_loss(net, model, self.x0, self.labels, None).backward()
        optimizer.step()
        with torch.no_grad():
            for kept, current in zip(average.net.parameters(), model.net.parameters(), strict=True):
                kept.lerp_(current, 0.001)

    def eager(self):
        with eager.ops():
            self._plain_step(self.net, self.theirs)

    def compiled(self):
        if self.compiled_net is None:
            self.compiled_net = torch.compile(eager.calling(self.traced[0].net.forward))
        with eager.ops():
            self._plain_step(self.compiled_net, self.traced)

    @torch.enable_grad()
    def check(self):
        """The same draws give the same loss and, to rounding, the same gradients."""
        model, draw = self.make(), {"seed": 3, "step": 5}
        parameters = list(model.net.parameters())
        ours = model.loss(self.x0, self.labels, **draw)
        with eager.ops(same_noise=True):
            theirs = self.plain_loss(model.net, model, self.x0, self.labels, draw)
            expected = torch.autograd.grad(theirs, parameters)
        assert abs(ours.item() - theirs.item()) < 1e-4 * theirs.item(), f"losses {ours.item()} and {theirs.item()}"
        for got, want in zip(torch.autograd.grad(ours, parameters), expected, strict=True):
            difference = (got - want).abs().max().item()
            assert difference < 1e-3 * want.abs().max().item() + 1e-6, f"gradients differ by {difference}"
