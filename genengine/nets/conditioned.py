"""What image networks conditioned on time and class share: net(x, t, y), its checks, and `for_schedule`.

A network derived from `Conditioned` embeds (t, y) into one vector, turns that with one linear layer `modulation`
into everything its blocks need of it, and runs from there: so a sampling run computes each modulation once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genengine.nets import configs, layers


class LastLayer(NamedTuple):
    """A linear layer (weight (F, D), bias (F,) or None) of which F features are a patch: row, column, channel.

    `genengine.sample` can join it to the solver's row.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    patch_size: int


class Conditioned(nn.Module):
    """Base of networks out = net(x, t, y), x (B, C, H, W), t (B,), y (B,) or None.

    A subclass names its frozen dataclass `config_class` and the sizes `configs`; sets `config` (image_size,
    in_channels, num_classes), `t_embedder`, `y_embedder` (None without classes) and `modulation`, a linear layer; and
    writes `_run(x, modulation)`.
    """

    config_class: type
    configs: Mapping[str, Mapping]
    max_table_bytes = 2 << 30  # `for_schedule` keeps all modulation rows up to this size, else recomputes

    def _run(self, x, modulation):
        """The network behind its embeddings: x (B, C, H, W), modulation (B, M)."""
        raise NotImplementedError

    def _tokens(self, x, modulation):
        """`_run` up to `last_layer`: tokens (B, N, D). Of networks that have one."""
        raise NotImplementedError

    def last_layer(self) -> LastLayer | None:
        """The layer that ends `_run`, if it is a product of tokens and nothing but."""
        return None

    @classmethod
    def from_config(cls, config, *, seed=0, **overrides):
        """Build from a name in `configs`, a dict of config fields or a config; overrides replace fields.

        Raises:
            ValueError: unknown name or field, or a value that does not fit.
        """
        return cls(configs.resolve(f"nets/{cls.__name__}", cls.config_class, cls.configs, config, overrides), seed=seed)

    @property
    def null_class(self):
        """The label that means "no class": num_classes."""
        return self.config.num_classes

    def condition(self, t, y=None):
        """silu(time embedding + class embedding): t (B,) float, y (B,) int64 or None (no class) -> (B, D)."""
        layers.check_labels(self._name(), y, len(t), self.config.num_classes)
        c = self.t_embedder(t)
        if self.y_embedder is not None:
            if y is None:
                y = torch.full(t.shape, self.null_class, dtype=torch.int64, device=t.device)
            c = c + self.y_embedder(y)
        return F.silu(c)

    def forward(self, x, t, y=None):
        """Args:
            x: (B, C, H, W), floating point.
            t: (B,) float32, time in [0, 1] (times 1000 / time_scale).
            y: (B,) int64 in 0 .. num_classes, num_classes meaning "no class"; None for no class.
        Returns:
            (B, C or 2C, H, W), x's dtype outside autocast.
        Raises:
            ValueError: x does not fit the config; t or y does not fit x; y given to an unconditional network,
                or out of range (on a CPU: on a GPU a look at the values would stall it).
            TypeError: y is no integer tensor.
        """
        size, channels = self.config.image_size, self.config.in_channels
        if x.ndim != 4 or tuple(x.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"{self._name()}: x must be (B, C, H, W) = (B, {channels}, {size}, {size}), got {tuple(x.shape)}; "
                "resize x or build the network with another image_size"
            )
        if tuple(t.shape) != (len(x),):
            raise ValueError(
                f"{self._name()}: t must be (B,) = ({len(x)},) like x, got {tuple(t.shape)}; expand one time with "
                "t.expand(B)"
            )
        return self._run(x, self.modulation(self.condition(t, y)))

    def for_schedule(self, t_rows, y=None):
        """All modulations of a sampling run in one product, before its loop.

        Equal (t, y) pairs are computed once. The returned function only gathers, so it can be captured in a
        CUDA graph. Above `max_table_bytes` the embeddings are kept instead and each step does one product.
        Call both under the same gradient mode.

        Args:
            t_rows: (R, B) float32, model time of each table row and sample.  y: (B,) int64 or None.
        Returns:
            step_fn(x, row) -> output, with x (B, C, H, W) and row (B,) integer, on the device; rows beyond
            the last are read as the last (a finished sample). step_fn.last_layer, if not None, is what makes the
            output of step_fn.tokens(x, row) -> (B, N, D).
        Raises:
            ValueError, TypeError: y as in `forward`, its values checked on every device.
        """
        num_rows, b = t_rows.shape
        layers.check_labels(self._name(), y, b, self.config.num_classes, may_sync=True)
        labels = torch.full((b,), self.null_class, device=t_rows.device) if y is None else y
        times, place = torch.unique(t_rows, return_inverse=True)
        count = self.null_class + 1
        pairs, place = torch.unique(place * count + labels, return_inverse=True)  # place (R, B)
        c = self.condition(times[pairs // count], pairs % count if self.y_embedder is not None else None)
        size = len(pairs) * self.modulation.out_features * c.element_size()
        table = self.modulation(c) if size <= self.max_table_bytes else None
        # Written anew by each step; out= and autograd exclude each other.
        rows = None if table is None or table.requires_grad else table.new_empty(b, table.shape[1])

        def modulation(row):
            index = place.gather(0, row.long().clamp(max=num_rows - 1).unsqueeze(0)).squeeze(0)
            if table is None:
                return self.modulation(c.index_select(0, index))
            return torch.index_select(table, 0, index, out=rows)

        def step_fn(x, row):
            return self._run(x, modulation(row))

        step_fn.tokens, step_fn.last_layer = lambda x, row: self._tokens(x, modulation(row)), self.last_layer()
        return step_fn

    def _name(self):
        return f"nets/{type(self).__name__}"
