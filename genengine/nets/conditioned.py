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
            A `Scheduled`: step_fn(x, row) -> output, with x (B, C, H, W) and row (B,) integer, on the device; rows
            beyond the last are read as the last (a finished sample). Its last_layer, if not None, makes the output of
            its tokens(x, row) -> (B, N, D).
        Raises:
            ValueError, TypeError: y as in `forward`, its values checked on every device.
        """
        return Scheduled(self, t_rows, y)

    def _pairs(self, t_rows, y):
        """The distinct (t, y) of a run: t (n,), y (n,) or None, and the number (R, B) of each row and sample's."""
        b = t_rows.shape[1]
        layers.check_labels(self._name(), y, b, self.config.num_classes, may_sync=True)
        labels = torch.full((b,), self.null_class, device=t_rows.device) if y is None else y
        times, place = torch.unique(t_rows, return_inverse=True)
        count = self.null_class + 1
        pairs, place = torch.unique(place * count + labels, return_inverse=True)
        return times[pairs // count], pairs % count if self.y_embedder is not None else None, place

    def _name(self):
        return f"nets/{type(self).__name__}"


class Scheduled:
    """step_fn(x, row) -> output of `Conditioned.for_schedule`, whose tensors stay where they are from run to run.

    They have room for more distinct (t, y) than the first run's, up to the next power of two, so that a captured graph
    goes on serving where labels change.
    """

    def __init__(self, net, t_rows, y):
        self._net = net
        t, y, self._place = net._pairs(t_rows, y)
        c = net.condition(t, y)
        self._product = self._affordable(c)
        rows = net.modulation(c) if self._product else c
        self._fixed, self._table, self._rows = rows.requires_grad, rows, None
        if self._fixed:  # out= and autograd exclude each other
            return
        self._table = rows.new_empty(self._room(rows), rows.shape[1])
        self._table[: len(rows)] = rows
        self._rows = rows.new_empty(t_rows.shape[1], rows.shape[1])  # written anew by each step

    def __call__(self, x, row):
        return self._net._run(x, self._modulation(row))

    def tokens(self, x, row):
        """What `last_layer` makes the output of: (B, N, D)."""
        return self._net._tokens(x, self._modulation(row))

    @property
    def last_layer(self) -> LastLayer | None:
        return self._net.last_layer()

    def _modulation(self, row):
        index = row.long().clamp(max=len(self._place) - 1).unsqueeze(0)
        index = self._place.gather(0, index).squeeze(0)
        if self._fixed:
            rows = self._table.index_select(0, index)
        else:
            rows = torch.index_select(self._table, 0, index, out=self._rows)
        return rows if self._product else self._net.modulation(rows)

    def update(self, t_rows, y=None):
        """Take another run's times and labels, and the weights as they are now; False where they do not fit.

        Args:
            t_rows: (R, B) float32.  y: (B,) int64 or None.
        Returns:
            Whether they fit: B as before, no more rows, and distinct (t, y) that there is room for, in the same mode.
        Raises:
            ValueError, TypeError: as `for_schedule`.
        """
        if self._fixed or t_rows.shape[1] != self._place.shape[1] or len(t_rows) > len(self._place):
            return False
        t, y, place = self._net._pairs(t_rows, y)
        if len(t) > len(self._table):
            return False
        c = self._net.condition(t, y)
        if self._affordable(c) != self._product:
            return False
        rows = self._net.modulation(c) if self._product else c
        if rows.dtype != self._table.dtype or rows.requires_grad:
            return False
        self._table[: len(rows)] = rows
        self._place[: len(place)] = place
        self._place[len(place) :] = place[-1:]
        return True

    def _affordable(self, c):
        """Whether the modulations of all c (n, D) are kept."""
        return len(c) * self._net.modulation.out_features * c.element_size() <= self._net.max_table_bytes

    def _room(self, rows):
        """The power of two from len(rows) up, but no more than there can be or is affordable."""
        count = len(rows)
        most = self._net.max_table_bytes // (rows.shape[1] * rows.element_size()) if self._product else count
        return max(count, min(1 << max(count - 1, 0).bit_length(), self._place.numel(), most))
