"""A gated PixelCNN of your own, in plain PyTorch with masked convolutions, sampled pixel by pixel and in one call.

The network is written as many are (van den Oord et al. 2016): whole square kernels with zeros in the future, a first
layer that leaves out the pixel itself, logits of 256 levels, classes. Its weights go to `pack_pixelcnn` as they
are, and `pixelcnn_sample` draws the pixels of the naive loop.

    python examples/fast_pixelcnn.py
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

from genengine import ops

SIZE, LEVELS, CLASSES, DIM, DEPTH = 12, 256, 10, 32, 5


def gate(u):
    a, b = u.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class Layer(nn.Module):
    """One gated layer with masks: A (first) leaves out the pixel itself and, above, its row."""

    def __init__(self, features, kernel, first):
        super().__init__()
        reach = kernel // 2
        self.first = first
        self.above = nn.Conv2d(features, 2 * DIM, kernel, padding=reach)
        self.down = nn.Conv2d(2 * DIM, 2 * DIM, 1, bias=False)
        self.left = nn.Conv2d(features, 2 * DIM, (1, kernel), padding=(0, reach), bias=False)
        self.out = nn.Conv2d(DIM, DIM, 1)
        self.classes = nn.Embedding(CLASSES, 2 * DIM)
        with torch.no_grad():  # the masks
            self.above.weight[:, :, reach + (not first) :] = 0
            self.left.weight[..., reach + (not first) :] = 0

    def forward(self, v, h, y):
        bias = self.classes(y)[:, :, None, None]
        u = self.above(v)
        h_out = self.out(gate(self.down(u) + self.left(h) + bias))
        return gate(u + bias), h_out if self.first else h + h_out


class GatedPixelCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(DIM if i else 1, 3 if i else 7, first=i == 0) for i in range(DEPTH))
        self.hidden, self.logits = nn.Conv2d(DIM, 64, 1), nn.Conv2d(64, LEVELS, 1)

    def forward(self, x, y):
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h, y)
        return self.logits(torch.relu(self.hidden(h)))


def packed(net, dtype=torch.float32):
    """The network's weights for `ops.pixelcnn_sample`. Its vertical stack is early: row y saw the rows before y."""
    kernels = {
        "hidden": net.hidden.weight[..., 0, 0], "hidden_bias": net.hidden.bias,
        "logits": net.logits.weight[..., 0, 0], "logits_bias": net.logits.bias,
        # for each class (and for "no class", which this network has not), layer and stack
        "classes": torch.stack([torch.stack([layer.classes.weight] * 2, 1) for layer in net.layers], 1),
    }  # fmt: skip
    kernels["classes"] = F.pad(kernels["classes"], (0, 0, 0, 0, 0, 0, 0, 1))
    for i, layer in enumerate(net.layers):
        kernels |= {
            f"layers.{i}.above": layer.above.weight, f"layers.{i}.above_bias": layer.above.bias,
            f"layers.{i}.down": layer.down.weight[..., 0, 0], f"layers.{i}.left": layer.left.weight,
            f"layers.{i}.out": layer.out.weight[..., 0, 0], f"layers.{i}.out_bias": layer.out.bias,
        }  # fmt: skip
    sizes = {"size": SIZE, "channels": 1, "levels": LEVELS}
    return ops.pack_pixelcnn(kernels, **sizes, dtype=dtype, early=True, rectified=False)


@torch.no_grad()
def naive(net, y, seed):
    """The loop that people write: a whole forward pass for every pixel."""
    x = torch.zeros(len(y), 1, SIZE, SIZE)
    u = ops.uniform((len(y), SIZE, SIZE), seed=seed, stream="uniform")
    for row in range(SIZE):
        for column in range(SIZE):
            p = torch.softmax(net(x, y)[:, :, row, column], dim=1)
            level = (p.cumsum(1)[:, :-1] <= u[:, row, column, None]).sum(1)
            x[:, 0, row, column] = (2 * level - (LEVELS - 1)) / (LEVELS - 1)
    return x


def network(seed=0):
    """Untrained, with outputs made unlike the uniform distribution."""
    torch.manual_seed(seed)
    net = GatedPixelCNN()
    with torch.no_grad():
        net.logits.weight.mul_(8)
    return net.eval()


def main(batch=16, seed=0):
    net, y = network(), torch.arange(batch) % CLASSES
    start = time.perf_counter()
    expected = naive(net, y, seed)
    middle = time.perf_counter()
    drawn = ops.pixelcnn_sample(packed(net), batch, labels=y, seed=seed)
    end = time.perf_counter()
    print(f"{batch} images of {SIZE} x {SIZE}: pixel by pixel {middle - start:.2f} s, in one call {end - middle:.4f} s")
    print(f"pixels that differ: {int((drawn.x != expected).sum())} of {expected.numel()}")
    print(f"bits per pixel of what was drawn: {float(-drawn.log_prob.mean() / 0.6931472):.2f}")
    return drawn, expected


if __name__ == "__main__":
    main()
