"""pixelcnn_sample's block of GPU threads (csrc/cuda/pixelcnn_team.h), run without a GPU: its threads on fibers, which
take turns in a drawn order, and mma as the PTX manual lays it out (tests/emulated)."""

import ctypes
import dataclasses

import pytest
import torch
from emulated_support import build

from genengine import ops
from genengine.ops._pixelcnn_reference import Draws, Naive
from genengine.ops.pixelcnn_sample import default_order, pack_pixelcnn
from genengine.testing.pixelcnn_sample import NETWORKS, packed

pytestmark = pytest.mark.emulated

GUARD = 4096  # bytes around what the kernel may write


class Call(ctypes.Structure):
    """BlockCall of tests/emulated/pixelcnn_block.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("fields", "matrices", "vectors", "x", "log_prob", "known", "labels")),
        ("seed", ctypes.c_void_p), ("ids", ctypes.c_void_p), ("batch", ctypes.c_int64),
        ("state", ctypes.c_void_p), ("scratch", ctypes.c_void_p), ("temperature", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("pairs", "images", "wavefront", "rows", "first_row", "last_row", "omit")),
        ("order", ctypes.c_uint64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def block(tmp_path_factory):
    found = ctypes.CDLL(build("pixelcnn_block.cpp", tmp_path_factory.mktemp("block")))
    found.block_sample.restype = ctypes.c_int64
    return found


class Guarded:
    """Bytes that read as NaN, between bytes that must stay as they are."""

    def __init__(self, count):
        self.whole = torch.full((count + 2 * GUARD + 256,), 0xFF, dtype=torch.uint8)
        self.first = -self.whole[GUARD:].data_ptr() % 256 + GUARD
        self.count = count
        self.address = self.whole.data_ptr() + self.first

    def check(self):
        assert (self.whole[: self.first] == 0xFF).all() and (self.whole[self.first + self.count :] == 0xFF).all()


def run(block, weights, num, *, images=2, wavefront=False, rows=32, order=0, calls=None, labels=None, known=None,
        x=None, first_id=0, temperature=1.0, omit=0):  # fmt: skip
    """Images, log-probabilities and the number of barriers of one block."""
    s = weights.shape
    x = torch.zeros(num, s.channels, s.size, s.size) if x is None else x.clone()
    probs = torch.zeros(num, s.size, s.size)
    fields = torch.tensor(s.fields(), dtype=torch.int32)
    seed, ids = torch.tensor(9), torch.arange(num) + first_id
    pointer = lambda tensor: None if tensor is None else tensor.data_ptr()  # noqa: E731
    call = Call(
        fields.data_ptr(), weights.matrices.data_ptr(), weights.vectors.data_ptr(), x.data_ptr(), probs.data_ptr(),
        pointer(known), pointer(labels), seed.data_ptr(), ids.data_ptr(), num, None, None, temperature,
        weights.dtype == torch.bfloat16, images, wavefront, rows, 0, s.size, omit, order,
    )  # fmt: skip
    sizes = ctypes.c_int64(), ctypes.c_int64()
    block.block_bytes(ctypes.byref(call), *map(ctypes.byref, sizes))
    state, scratch = Guarded(sizes[0].value * -(-num // images)), Guarded(sizes[1].value)
    call.state, call.scratch = state.address, scratch.address
    barriers = 0
    for call.first_row, call.last_row in calls or [(0, s.size)]:
        scratch.whole.fill_(0xFF)  # nothing may be left there for the next launch
        barriers += block.block_sample(ctypes.byref(call))
    state.check(), scratch.check()
    return x, probs, barriers


def exact_log_prob(weights, x, labels=None):
    """What a whole forward pass in float64 says of the pixels of x: (B, H, W)."""
    wide = dataclasses.replace(weights, matrices=weights.matrices.double(), vectors=weights.vectors.double())
    probs = torch.zeros(len(x), *x.shape[2:], dtype=torch.float64)
    every = torch.ones_like(x, dtype=torch.bool)
    naive = Naive(x, probs, wide, Draws(labels, every, torch.tensor(0), torch.arange(len(x)), 1.0))
    s = weights.shape
    outputs = [naive.outputs(g) for g in range(s.groups)]  # (B, H, W, O)
    if s.components:
        return ops.logistic_mixture_log_prob(x, outputs[0][..., : s.logits].movedim(3, 1), bins=s.levels)
    level = torch.round((x + 1) * (0.5 * (s.levels - 1))).long()
    each = [torch.log_softmax(o[..., : s.levels], -1).gather(-1, level[:, c, ..., None]) for c, o in enumerate(outputs)]
    return torch.cat(each, -1).sum(-1)


def labels_of(weights, num):
    return torch.arange(num) % (weights.shape.classes + 1) if weights.shape.classes else None


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_is_the_reference(block, name, fold):
    weights = packed(name, fold=fold)
    labels = labels_of(weights, 3)
    x, probs, _ = run(block, weights, 3, labels=labels, temperature=0.8)
    expected = ops.pixelcnn_sample(weights, 3, labels=labels, seed=9, temperature=0.8, backend="reference")
    torch.testing.assert_close(x, expected.x, rtol=0, atol=1e-6)  # of a mixture, what a channel couples to is rounded
    torch.testing.assert_close(probs, expected.log_prob, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_errs_no_more_than_eager(block, name):
    weights = packed(name, torch.bfloat16)
    labels = labels_of(weights, 3)
    eager = ops.pixelcnn_sample(weights, 3, labels=labels, seed=9, backend="reference")
    x, probs, _ = run(block, weights, 3, labels=labels, images=3)
    errors = [
        float((found - exact_log_prob(weights, drawn, labels)).abs().max())
        for found, drawn in ((probs, x), (eager.log_prob, eager.x))
    ]
    assert errors[0] <= 2 * errors[1] + 2**-8, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_depend_on_nothing_beside_the_image(block, name, dtype):
    """Not on the threads' turns (a race would show), order, group, rows of a product, launches, or the batch."""
    weights = packed(name, dtype)
    labels, size = labels_of(weights, 5), weights.shape.size
    expected, probs, _ = run(block, weights, 5, labels=labels, images=5)
    for change in (
        {"order": 1, "images": 5}, {"order": 2, "wavefront": True}, {"rows": 8, "calls": [(0, 1), (1, 1), (1, size)]},
        {"images": 1, "wavefront": True, "calls": [(0, 2), (2, size)]},
    ):  # fmt: skip
        found, log_prob, _ = run(block, weights, 5, labels=labels, **({"images": 3} | change))
        assert torch.equal(found, expected) and torch.equal(log_prob, probs), change
    part = labels[3:] if labels is not None else None
    assert torch.equal(run(block, weights, 2, labels=part, first_id=3)[0], expected[3:])


@pytest.mark.parametrize("name", ["colour", "grey mixture"])
def test_known_pixels_stay(block, name):
    weights = packed(name)
    s, labels = weights.shape, labels_of(weights, 3)
    known = (torch.rand(3, 1, s.size, s.size) < 0.4).expand(3, s.channels, -1, -1).contiguous()
    level = torch.randint(0, s.levels, known.shape)
    given = torch.where(known, (2 * level - (s.levels - 1)) / (s.levels - 1), 0.0)
    x, probs, _ = run(block, weights, 3, labels=labels, known=known, x=given)
    arguments = {"given": given, "known": known, "labels": labels, "seed": 9, "backend": "reference"}
    expected = ops.pixelcnn_sample(weights, 3, **arguments)
    assert torch.equal(x[known], given[known]) and not probs[known[:, 0]].any()
    torch.testing.assert_close(x, expected.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(probs, expected.log_prob, rtol=1e-4, atol=1e-4)


def wide(dim, levels, depth=2, size=3, **sizes):
    """Random weights of a grey net: more panels than warps, more k than a block of it, more rows than a tile."""
    draw = lambda *shape: torch.randn(shape) * shape[1] ** -0.5 if len(shape) > 1 else torch.randn(shape)  # noqa: E731
    found = {
        "hidden": draw(dim, dim),
        "hidden_bias": draw(dim),
        "logits": 3 * draw(levels, dim),
        "logits_bias": draw(levels),
    }
    for i in range(depth):
        features = dim if i else 1
        found |= {
            f"layers.{i}.above": draw(2 * dim, features, 2, 3) / 6**0.5, f"layers.{i}.above_bias": draw(2 * dim),
            f"layers.{i}.left": draw(2 * dim, features, 1, 1), f"layers.{i}.down": draw(2 * dim, 2 * dim),
            f"layers.{i}.out": draw(dim, dim), f"layers.{i}.out_bias": draw(dim),
        }  # fmt: skip
    return lambda dtype: pack_pixelcnn(found, size=size, channels=1, levels=levels, dtype=dtype, **sizes)


def test_products_of_many_panels_rows_and_k(block):
    make = wide(72, 300)
    weights = make(torch.float32)
    for images, rows in ((19, 32), (19, 64), (6, 6)):
        x, probs, _ = run(block, weights, 19, images=images, rows=rows)
        expected = ops.pixelcnn_sample(weights, 19, seed=9, backend="reference")
        torch.testing.assert_close(x, expected.x, rtol=0, atol=1e-6)
        torch.testing.assert_close(probs, expected.log_prob, rtol=1e-4, atol=1e-4)
    weights = make(torch.bfloat16)
    x, probs, _ = run(block, weights, 19, images=19, rows=64)
    eager = ops.pixelcnn_sample(weights, 19, seed=9, backend="reference")
    errors = [
        float((found - exact_log_prob(weights, drawn)).abs().max())
        for found, drawn in ((probs, x), (eager.log_prob, eager.x))
    ]
    assert errors[0] <= 2 * errors[1] + 2**-8, errors
    assert torch.equal(run(block, weights, 3, images=1)[0], x[:3])


@pytest.mark.parametrize("name", ["grey", "wide kernels", "one layer"])
def test_the_wavefront_waits_less_often(block, name):
    """What `default_order` goes by: a pixel's step has 5 L + 5 barriers, a layer of the stack of rows above 5."""
    weights = packed(name)
    s, labels = weights.shape, labels_of(weights, 1)
    pixel, above = 5 * s.depth + 5, 5 * s.depth
    raster, front = (run(block, weights, 1, labels=labels, images=1, wavefront=w)[2] for w in (False, True))
    assert raster == 1 + s.size**2 * pixel + (s.size - 1) * above
    assert front <= 1 + s.steps("wavefront") * (pixel + above)


def test_default_order():
    shape = dataclasses.replace(packed("grey").shape, size=28, depth=7)
    assert [default_order(shape, images, "cuda") for images in (1, 4, 5)] == ["wavefront", "wavefront", "raster"]
    assert default_order(dataclasses.replace(shape, depth=15), 1, "cuda") == "raster"  # 460 steps of 784
    assert default_order(shape, 1, "cpu") == default_order(shape, 1, "reference") == "raster"


@pytest.mark.parametrize("omit", [2, 3, 5])
def test_the_emulation_finds_races(block, omit):
    """Or its silence would mean nothing: where barriers are left out, the result depends on the turns."""
    weights = packed("grey mixture")
    found = [run(block, weights, 2, omit=omit, order=order)[1] for order in (0, 1)]
    assert not torch.equal(*found)
