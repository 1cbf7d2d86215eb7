"""The weights of a PixelCNN as the samplers of `ops.pixelcnn_sample` read them: which matrices there are, how large, in
which order, and how they come from the network's kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from genengine.ops import _panels
from genengine.ops.logistic_mixture import MAX_CHANNELS, params_per_component

OP = "pack_pixelcnn"
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MAX_LEVELS = 4096


@dataclasses.dataclass(frozen=True)
class PixelCNNShape:
    """Sizes of a PixelCNN: what `csrc/include/genengine/pixelcnn_sample.h` calls by the same names, in the same order.

    Features come in `groups`, one for each ordered colour channel (a single one under a mixture of logistics), each
    filled up to whole panels; the two halves of a gate lie side by side within a group.

    Attributes:
        size: height and width of an image.  channels, levels: of a pixel.  classes: 0 for none; label `classes` is "no
        class".  dim, depth: features of a stack, layers.  reach, first_reach: half the kernel, and of the first layer.
        embedding: features of a level, 0 if it enters as a number.  head_dim: hidden features of the head.
        components: of the mixture of logistics, 0 for a categorical head.  gated: two stacks, or one plain.
        folded: the product of a residual sum is split, W (h + R g) = W h + (W R) g.
        early: the vertical stack has a row above the image.  rectified: the head begins with a ReLU.
    """

    size: int
    channels: int
    levels: int
    classes: int
    dim: int
    depth: int
    reach: int
    first_reach: int
    embedding: int
    head_dim: int
    components: int
    gated: bool
    folded: bool = False
    early: bool = False
    rectified: bool = True

    @property
    def groups(self):
        return 1 if self.components else self.channels

    @property
    def part(self):
        """Features of a group, as stored."""
        return _panels.padded(0, self.dim // self.groups)[1]

    @property
    def width(self):
        return self.groups * self.part

    @property
    def entry(self):
        """Features by which one channel of a pixel enters the first layer."""
        return self.embedding or 1

    @property
    def head_part(self):
        return _panels.padded(0, self.head_dim // self.groups)[1]

    @property
    def logits(self):
        """Numbers that the head puts out for a group."""
        return self.components * params_per_component(self.channels) if self.components else self.levels

    @property
    def outputs(self):
        return _panels.padded(0, self.logits)[1]

    def reach_of(self, layer):
        return self.reach if layer else self.first_reach

    def inputs(self, layer):
        """Features that a layer reads of a pixel."""
        return self.width if layer else self.channels * self.entry

    def rows_above(self, layer):
        return self.reach_of(layer) + self.gated

    def taps(self, layer):
        return 2 * self.reach_of(layer) + 1

    def centre(self, layer, group):
        """Features of a pixel that group `group` may see of itself: in the first layer the earlier channels alone."""
        if layer:
            return (group + 1) * self.part
        return group * self.entry if self.groups > 1 else 0

    @property
    def lag(self):
        """Columns by which the wavefront keeps a row ahead of the next: it sees one fewer of it to the right."""
        if self.gated:  # the vertical stack's reaches add up
            return 1 + self.first_reach + (self.depth - 1) * self.reach
        return 1 + max(self.reach_of(layer) for layer in range(self.depth))

    def steps(self, order) -> int:
        """Serial steps of an image: pixels, or in the wavefront lag (H - 1) + W."""
        return self.lag * (self.size - 1) + self.size if order == "wavefront" else self.size**2

    def fields(self) -> list[int]:
        """The numbers that say all this to the kernels."""
        return [int(value) for value in dataclasses.astuple(self)]

    def matrices(self) -> dict[tuple, tuple[int, int]]:
        """(name, layer, group) -> (K, N), in the order in which they are packed."""
        sizes = {}
        for layer in range(self.depth):
            sizes["above", layer, 0] = self.rows_above(layer) * self.taps(layer) * self.inputs(layer), 2 * self.width
            if self.gated:
                sizes["down", layer, 0] = 2 * self.width, 2 * self.width
            twice = 2 if self.folded and layer else 1
            for group in range(self.groups):
                k = self.reach_of(layer) * self.inputs(layer) + twice * self.centre(layer, group)
                sizes["left", layer, group] = k, 2 * self.part
            for group in range(self.groups):
                sizes["out", layer, group] = (group + 1) * self.part, self.part
        for group in range(self.groups):
            sizes["hidden", 0, group] = (group + 1) * self.part, self.head_part
        for group in range(self.groups):
            sizes["logits", 0, group] = (group + 1) * self.head_part, self.outputs
        return sizes

    def vectors(self) -> dict[tuple, tuple[int, ...]]:
        """(name, layer) -> shape, in the order in which they are packed."""
        shapes = {}
        for layer in range(self.depth):
            shapes["above_bias", layer] = (2 * self.width,)
            shapes["out_bias", layer] = (self.width,)
        shapes["positions", 0] = (2, self.size, self.size, self.width)
        shapes["hidden_bias", 0] = (self.groups, self.head_part)
        shapes["logits_bias", 0] = (self.groups, self.outputs)
        shapes["classes", 0] = (self.classes + 1, self.depth, 2, 2 * self.width)
        shapes["table", 0] = (self.channels, self.levels, self.embedding)
        shapes["zeros", 0] = (2 * self.width,)
        return shapes


@dataclasses.dataclass(frozen=True)
class PixelCNNWeights:
    """Packed weights of a PixelCNN; made by `pack_pixelcnn`.

    Attributes:
        shape: PixelCNNShape.
        matrices: flat, float32, bfloat16 or float64 (the reference alone): panels as in `ops/_panels.py`.
        vectors: flat, float32 (float64 beside float64): biases, positions, classes, levels.
    """

    shape: PixelCNNShape
    matrices: Tensor
    vectors: Tensor

    @property
    def dtype(self):
        return self.matrices.dtype

    @property
    def device(self):
        return self.matrices.device

    def to(self, device) -> PixelCNNWeights:
        return dataclasses.replace(self, matrices=self.matrices.to(device), vectors=self.vectors.to(device))


def unpack(shape: PixelCNNShape, matrices: Tensor, vectors: Tensor) -> tuple[dict, dict]:
    """Matrices (K, N) and vectors by their keys in `PixelCNNShape.matrices` and `.vectors`."""
    found, offset = {}, 0
    for key, (k, n) in shape.matrices().items():
        found[key] = _panels.unpack(matrices[offset : offset + _panels.numel(k, n)], k, n)
        offset += _panels.numel(k, n)
    parts, offset = {}, 0
    for key, sizes in shape.vectors().items():
        count = torch.Size(sizes).numel()
        parts[key] = vectors[offset : offset + count].view(sizes)
        offset += count
    return found, parts


def pack_pixelcnn(
    kernels: Mapping[str, Tensor], *, size: int, channels: int, levels: int, components: int = 0,
    dtype: torch.dtype = torch.float32, fold: bool = False, early: bool = False, rectified: bool = True,
) -> PixelCNNWeights:  # fmt: skip
    """Pack the kernels of a PixelCNN for `pixelcnn_sample`.

    With F features into a layer, D features, and the first D of a gate's 2 D outputs under the tanh, for layer i:

        layers.i.above       (2 D, F, rows, 2 r + 1)   rows up to its own (gated), or those above alone (plain)
        layers.i.above_bias  (2 D)
        layers.i.down        (2 D, 2 D)                from the sums above, a row further up; absent in a plain network
        layers.i.left        (2 D, F, 1, columns)      the r pixels to the left, then the pixel itself
        layers.i.out, .out_bias   (D, D), (D)          from the gates to the residual sum
        hidden, hidden_bias  (P, D), (P)               logits, logits_bias  (O, P), (O)
        positions (2, D, H, W), classes (classes + 1, depth, 2, 2 D), table (channels levels, E)      each optional

    What a `nets.PixelCNN` gives as `kernels()`. Kernels may also be whole squares (2 r + 1 on a side, as masked
    convolutions keep them): then what lies in the future must be zero. So must weights by which a colour channel
    would see a later one.

    size, channels, levels: of an image. components: of a mixture of logistics, 0 for a categorical head. dtype:
    float32, bfloat16 or float64. early: row y of the vertical stack has seen the rows before y, as where the first
    layer's mask leaves out the middle row, and is not moved down on its way to the horizontal one: the same stack, but
    it begins a row above the image, of biases alone. Without positions. rectified: a ReLU before `hidden`. fold: store
    what W (h + R g) = W h + (W R) g needs: one product less between two gates, more work, another rounding.

    Raises ValueError for a kernel of the wrong shape, one that sees the future, a number that is not finite: each with
    its name; TypeError for another dtype.
    """
    if dtype not in DTYPES:
        raise TypeError(f"{OP}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    kernels = {name: value.detach().to(torch.float64) for name, value in kernels.items()}
    for name, value in kernels.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{OP}: {name} has values that are not finite; the network has diverged, load an earlier one"
            )
    if early:
        kernels = _moved_up(kernels)
    options = {"folded": bool(fold), "early": bool(early), "rectified": bool(rectified)}
    shape = _shape_of(kernels, size, channels, levels, components, options)
    _check_shapes(kernels, shape)
    device = kernels["hidden"].device
    found, vectors = _Packing(kernels, shape), shape.vectors()
    matrices = torch.cat([_panels.pack(found.matrix(*key).to(dtype)) for key in shape.matrices()])
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    flat = torch.cat([found.vector(*key, sizes).reshape(-1).to(kind) for key, sizes in vectors.items()])
    return PixelCNNWeights(shape, matrices.to(device), flat.to(device))


# ---- checks ----------------------------------------------------------------------------------------------------------


def _kernel(kernels, name):
    if name not in kernels:
        raise ValueError(f"{OP}: {name} is missing; the kernels are {', '.join(sorted(kernels))}")
    return kernels[name]


def _shape_of(kernels, size, channels, levels, components, options):
    depth = 0
    while f"layers.{depth}.above" in kernels:
        depth += 1
    first = _kernel(kernels, "layers.0.above")
    above = kernels["layers.1.above"] if depth > 1 else first
    table, classes = kernels.get("table"), kernels.get("classes")
    shape = PixelCNNShape(
        size=size, channels=channels, levels=levels, classes=len(classes) - 1 if classes is not None else 0,
        dim=len(first) // 2, depth=depth, reach=above.shape[-1] // 2, first_reach=first.shape[-1] // 2,
        embedding=table.shape[-1] if table is not None else 0, head_dim=len(_kernel(kernels, "hidden")),
        components=components, gated="layers.0.down" in kernels, **options,
    )  # fmt: skip
    if not 2 <= levels <= MAX_LEVELS:
        raise ValueError(f"{OP}: levels must be 2 to {MAX_LEVELS}, got {levels}")
    if components and not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"{OP}: channels must be 1 to {MAX_CHANNELS} for a mixture of logistics, got {channels}")
    if shape.dim % shape.groups or shape.head_dim % shape.groups:
        raise ValueError(
            f"{OP}: D and P must be multiples of the {shape.groups} ordered channels, got {shape.dim} and "
            f"{shape.head_dim}"
        )
    return shape


def _moved_up(kernels):
    """The kernels of an early vertical stack as those of one whose rows count from one less: the first layer's move."""
    name = "layers.0.above"
    above = _kernel(kernels, name)
    if "positions" in kernels:
        raise ValueError(
            f"{OP}: positions must be absent for an early vertical stack, which has a row outside the image"
        )
    if "layers.0.down" not in kernels:
        raise ValueError(f"{OP}: early must be False for a plain network, which has no vertical stack")
    reach = above.shape[-1] // 2
    if above.dim() == 4 and above[:, :, reach:].any():
        count = int((above[:, :, reach:] != 0).sum())
        raise ValueError(
            f"{OP}: {name} sees the future: it has {count} weights for its own row and those below, expected zeros of "
            "an early vertical stack; multiply it by its mask first"
        )
    return {**kernels, name: F.pad(above[:, :, :reach], (0, 0, 1, 0))}


def _check_shapes(kernels, s):
    d = s.dim
    wanted = {
        "hidden": (s.head_dim, d), "hidden_bias": (s.head_dim,),
        "logits": (s.groups * s.logits, s.head_dim), "logits_bias": (s.groups * s.logits,),
        "positions": (2, d, s.size, s.size), "classes": (s.classes + 1, s.depth, 2, 2 * d),
        "table": (s.channels * s.levels, s.embedding),
    }  # fmt: skip
    optional = {"positions", "classes", "table"}
    for i in range(s.depth):
        features = d if i else s.channels * s.entry
        above, left = _kernel(kernels, f"layers.{i}.above"), _kernel(kernels, f"layers.{i}.left")
        rows, columns = (t.shape[axis] if t.dim() == 4 else 0 for t, axis in ((above, 2), (left, 3)))
        rows = rows if rows == s.taps(i) else s.rows_above(i)
        columns = columns if columns in (s.reach_of(i), s.reach_of(i) + 1, s.taps(i)) else s.reach_of(i) + 1
        wanted |= {
            f"layers.{i}.above": (2 * d, features, rows, s.taps(i)), f"layers.{i}.above_bias": (2 * d,),
            f"layers.{i}.left": (2 * d, features, 1, columns), f"layers.{i}.out": (d, d), f"layers.{i}.out_bias": (d,),
        }  # fmt: skip
        if s.gated:
            wanted[f"layers.{i}.down"] = (2 * d, 2 * d)
    for name, expected in wanted.items():
        if name in optional and name not in kernels:
            continue
        if tuple(_kernel(kernels, name).shape) != expected:
            raise ValueError(f"{OP}: {name} must be {expected}, got {tuple(kernels[name].shape)}")
    if unknown := sorted(set(kernels) - set(wanted)):
        raise ValueError(f"{OP}: unknown kernels {', '.join(unknown)}; there are {', '.join(sorted(wanted))}")


# ---- packing ---------------------------------------------------------------------------------------------------------


class _Packing:
    """The matrices (K, N) and vectors of a network, features grouped and filled up with zeros."""

    def __init__(self, kernels, shape):
        self.kernels, self.s = kernels, shape
        s = shape
        self.features = _spread(s.dim, s.groups, s.part)
        # of a gate: for each group the tanh's half, then the sigmoid's
        halves = self.features.view(s.groups, 1, s.part)
        self.gates = torch.cat([halves, torch.where(halves < 0, -1, halves + s.dim)], dim=1).flatten()
        self.hidden = _spread(s.head_dim, s.groups, s.head_part)
        self.outputs = _spread(s.groups * s.logits, s.groups, s.outputs)

    def inputs(self, layer):
        s = self.s
        return self.features if layer else torch.arange(s.channels * s.entry)

    def matrix(self, name, layer, group):
        return getattr(self, f"_{name}")(layer, group)

    def _above(self, layer, _):
        s, name = self.s, f"layers.{layer}.above"
        kernel = self.kernels[name]  # (2 D, F, rows, columns)
        self._refuse(kernel[:, :, s.rows_above(layer) :], name, "rows below those it may see")
        kernel = kernel[:, :, : s.rows_above(layer)].permute(2, 3, 1, 0)
        return _take(kernel, self.inputs(layer), self.gates).flatten(0, 2)

    def _down(self, layer, _):
        return _take(self.kernels[f"layers.{layer}.down"].T, self.gates, self.gates)

    def _left(self, layer, group):
        s, name = self.s, f"layers.{layer}.left"
        kernel, reach = self.kernels[name][:, :, 0].permute(2, 1, 0), self.s.reach_of(layer)  # (columns, F, 2 D)
        self._refuse(kernel[reach + 1 :], name, "pixels to the right")
        columns = self.gates.view(s.groups, -1)[group]
        kernel = _take(kernel, self.inputs(layer), columns)
        centre = kernel[reach] if len(kernel) > reach else kernel.new_zeros(kernel.shape[1:])
        seen = s.centre(layer, group)
        what = "the pixel itself" if s.groups == 1 else f"channels from {group + (layer > 0)} on of the pixel itself"
        self._refuse(centre[seen:], name, what)
        parts = [kernel[:reach].flatten(0, 1), centre[:seen]]
        if s.folded and layer:
            before = _take(self.kernels[f"layers.{layer - 1}.out"].T, self.features, self.features)
            parts.append((before @ centre)[:seen])
        return torch.cat(parts)

    def _out(self, layer, group):
        name = f"layers.{layer}.out"
        return self._triangle(name, self.features, self.features, self.s.part, group)

    def _hidden(self, _, group):
        return self._triangle("hidden", self.features, self.hidden, self.s.part, group)

    def _logits(self, _, group):
        return self._triangle("logits", self.hidden, self.outputs, self.s.head_part, group)

    def _triangle(self, name, rows, columns, part, group):
        matrix = _take(self.kernels[name].T, rows, columns.view(self.s.groups, -1)[group])
        self._refuse(matrix[(group + 1) * part :], name, f"channels from {group + 1} on of the pixel itself")
        return matrix[: (group + 1) * part]

    def _refuse(self, weights, name, what):
        if weights.any():
            raise ValueError(
                f"{OP}: {name} sees the future: it has {int((weights != 0).sum())} weights for {what}, expected zeros; "
                "multiply it by its mask first"
            )

    def vector(self, name, layer, sizes):
        index = {
            "above_bias": self.gates, "out_bias": self.features, "positions": self.features, "hidden_bias": self.hidden,
            "logits_bias": self.outputs, "classes": self.gates,
        }  # fmt: skip
        full = f"layers.{layer}.{name}" if name in ("above_bias", "out_bias") else name
        if full not in self.kernels:
            return torch.zeros(sizes, dtype=torch.float64, device=self.kernels["hidden"].device)
        value = self.kernels[full]
        if name == "table":
            return value.view(sizes)
        if name == "positions":
            value = value.permute(0, 2, 3, 1)
        return _take(value[..., None, :], torch.zeros(1, dtype=torch.int64), index[name])


def _spread(count, groups, part):
    """For each feature as stored the one it is, or -1 for filling: `groups` groups of `part`."""
    index = torch.arange(count).view(groups, -1)
    return F.pad(index, (0, part - index.shape[1]), value=-1).flatten()


def _take(matrix, rows, columns):
    """matrix[..., rows, columns], -1 standing for zeros."""
    rows, columns = rows.to(matrix.device), columns.to(matrix.device)
    return F.pad(matrix, (0, 1, 0, 1))[..., rows, :][..., columns]
