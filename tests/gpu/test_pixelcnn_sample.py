"""pixelcnn_sample on a GPU: a block of threads draws what eager PyTorch does, whatever the batch, order or launches."""

import dataclasses

import pytest
import torch

from genengine import ops, testing
from genengine.ops import _registry
from genengine.ops._pixelcnn_reference import Draws, Naive
from genengine.ops.pixelcnn_sample import SAMPLE, default_order, group_size
from genengine.testing.pixelcnn_sample import NETWORKS, packed

DEVICE = torch.device("cuda")


def missing():
    return _registry.why_not(SAMPLE, "cuda", "cuda", torch.float32)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing() is not None, reason=f"no CUDA kernel: {missing()}")]


def network(name, dtype=torch.float32, **options):
    return packed(name, dtype, **options).to(DEVICE)


def labels_of(weights, num):
    classes = weights.shape.classes
    return torch.arange(num, device=DEVICE) % (classes + 1) if classes else None


def sample(weights, num, **options):
    options = {"labels": labels_of(weights, num), "seed": 5, "backend": "cuda"} | options
    return ops.pixelcnn_sample(weights, num, **options)


def exact_log_prob(weights, x, labels):
    """What a whole forward pass in float64 says of the pixels of x: (B, H, W)."""
    wide = dataclasses.replace(weights, matrices=weights.matrices.double(), vectors=weights.vectors.double())
    probs, every = x.new_zeros(len(x), *x.shape[2:], dtype=torch.float64), torch.ones_like(x, dtype=torch.bool)
    ids = torch.arange(len(x), device=DEVICE)
    naive = Naive(x, probs, wide, Draws(labels, every, torch.tensor(0, device=DEVICE), ids, 1.0))
    s = weights.shape
    outputs = [naive.outputs(g) for g in range(s.groups)]  # (B, H, W, O)
    if s.components:
        params = outputs[0][..., : s.logits].movedim(3, 1).contiguous()
        return ops.logistic_mixture_log_prob(x, params, bins=s.levels, backend="reference")
    level = torch.round((x + 1) * (0.5 * (s.levels - 1))).long()
    each = [torch.log_softmax(o[..., : s.levels], -1).gather(-1, level[:, c, ..., None]) for c, o in enumerate(outputs)]
    return torch.cat(each, -1).sum(-1)


@pytest.mark.parametrize("order", ["raster", "wavefront"])
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_draws_what_eager_draws(name, order):
    """But where a uniform lies at the edge of two levels: then the image differs from that pixel on."""
    weights, num = network(name), 64
    found = sample(weights, num, order=order)
    expected = sample(weights, num, backend="reference")
    same = ((found.x - expected.x).abs() < 1e-6).flatten(1).all(1)
    print(f"{name}, {order}: {int((~same).sum())} of {num} images differ")
    assert (~same).sum() <= 1
    torch.testing.assert_close(found.log_prob[same], expected.log_prob[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_errs_no_more_than_eager(name):
    weights = network(name, torch.bfloat16)
    labels = labels_of(weights, 32)
    ours, eager = sample(weights, 32), sample(weights, 32, backend="reference")
    errors = [float((f.log_prob - exact_log_prob(weights, f.x, labels)).abs().max()) for f in (ours, eager)]
    testing.assert_within(errors[0], 2 * errors[1] + 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_depend_on_nothing_beside_the_image(name, dtype):
    weights = network(name, dtype)
    whole = sample(weights, 700)  # several images to a block
    labels, seen = labels_of(weights, 700), []
    ids = torch.arange(400, 417, device=DEVICE)
    options = {"labels": labels[400:417] if labels is not None else None, "sample_ids": ids}
    for order in ("raster", "wavefront"):  # an image to a block, rows by rows
        some = sample(weights, 17, order=order, callback=lambda done, of: seen.append((done, of)), **options)
        assert torch.equal(some.x, whole.x[400:417]) and torch.equal(some.log_prob, whole.log_prob[400:417])
    size = weights.shape.size
    assert seen == 2 * [(row, size) for row in range(1, size + 1)]
    again = sample(weights, 700)
    assert torch.equal(again.x, whole.x) and torch.equal(again.log_prob, whole.log_prob)


@pytest.mark.parametrize("name", ["grey", "colour", "mixture"])
def test_known_pixels_stay(name):
    weights = network(name)
    s = weights.shape
    known = (torch.rand(6, 1, s.size, s.size, device=DEVICE) < 0.4).expand(6, s.channels, -1, -1)
    level = torch.randint(0, s.levels, known.shape, device=DEVICE)
    given = torch.where(known, (2 * level - (s.levels - 1)) / (s.levels - 1), 0.0)
    found, expected = (sample(weights, 6, given=given, known=known, backend=b) for b in ("cuda", "reference"))
    assert torch.equal(found.x[known], given[known]) and not found.log_prob[known[:, 0]].any()
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)


def large(dim, levels, depth=1, size=3):
    """A net whose step takes more room than a multiprocessor has, or needs fewer rows to a product."""
    draw = lambda *shape: torch.randn(shape) * shape[1] ** -0.5 if len(shape) > 1 else torch.randn(shape)  # noqa: E731
    found = {
        "hidden": draw(dim, dim),
        "hidden_bias": draw(dim),
        "logits": draw(levels, dim),
        "logits_bias": draw(levels),
    }
    for i in range(depth):
        features = dim if i else 1
        found |= {
            f"layers.{i}.above": draw(2 * dim, features, 2, 3) / 6**0.5, f"layers.{i}.above_bias": draw(2 * dim),
            f"layers.{i}.left": draw(2 * dim, features, 1, 1), f"layers.{i}.down": draw(2 * dim, 2 * dim),
            f"layers.{i}.out": draw(dim, dim), f"layers.{i}.out_bias": draw(dim),
        }  # fmt: skip
    return ops.pack_pixelcnn(found, size=size, channels=1, levels=levels)


@pytest.mark.parametrize("dim, levels", [(128, 256), (512, 1024), (64, 4096)])
def test_networks_too_large_for_shared_memory(dim, levels):
    weights = large(dim, levels, depth=2).to(DEVICE)
    found, expected = (sample(weights, 5, backend=backend) for backend in ("cuda", "reference"))
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)


def test_the_case_set_passes():
    problems = [testing.check_case(SAMPLE, "cuda", case) for case in testing.cases("pixelcnn_sample", DEVICE)]
    assert [problem for problem in problems if problem] == []


def test_the_default_is_the_kernel_or_the_cached_reference():
    weights = network("grey")
    name = _registry.choose(SAMPLE, DEVICE, torch.float32)
    assert name in ("cuda", "reference")
    found = sample(weights, 3, backend=None)
    assert torch.equal(found.x, sample(weights, 3, backend=name).x)


def test_groups_fill_the_multiprocessors():
    workers = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert group_size(1, "cuda", DEVICE) == group_size(workers, "cuda", DEVICE) == 1
    assert group_size(workers + 1, "cuda", DEVICE) == 2 and group_size(10**6, "cuda", DEVICE) == 16


def test_errors():
    weights = network("grey")
    here, on_host = torch.tensor(1, device=DEVICE), torch.tensor(1)
    s, images, wavefront = weights.shape, 1, default_order(weights.shape, 1, "cuda") == "wavefront"
    x, probs = torch.zeros(1, 1, s.size, s.size, device=DEVICE), torch.zeros(1, s.size, s.size, device=DEVICE)
    count = torch.ops.genengine.pixelcnn_state.default(weights.matrices, s.fields(), images, wavefront)
    run = torch.ops.genengine.pixelcnn_sample.default

    def call(state, seed):
        ids = torch.arange(1, device=DEVICE)
        run(x, probs, state, weights.matrices, weights.vectors, s.fields(), None, None, seed, ids, 1.0, wavefront,
            images, 0, s.size)  # fmt: skip

    state = torch.empty(count, dtype=torch.uint8, device=DEVICE)
    call(state, here)
    with pytest.raises(RuntimeError, match="seed must be on CUDA device"):
        call(state, on_host)
    with pytest.raises(RuntimeError, match="state must hold"):
        call(state[:-1], here)
