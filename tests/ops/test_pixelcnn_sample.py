"""pixelcnn_sample: the pixels and log-probabilities of a whole forward pass, on every backend, order and grouping."""

import dataclasses
import importlib
import itertools
import os
import pickle
import signal
import threading

import pytest
import torch

from genengine import ops, testing
from genengine.nets.pixelcnn import PixelCNN
from genengine.ops import _panels, _registry
from genengine.ops._categorical import inverse_cdf
from genengine.ops._pixelcnn_reference import Draws, Naive
from genengine.ops.pixelcnn_sample import SAMPLE
from genengine.testing.pixelcnn_sample import NETWORKS, kernels, packed

module = importlib.import_module("genengine.ops.pixelcnn_sample")  # `ops` has the function by that name
CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(
    _registry.why_not(SAMPLE, "cpu", "cpu", torch.float32) is not None, reason="the extension is not built"
)
BACKENDS = ["reference", pytest.param("cpu", marks=needs_kernel)]
SMALL = {"image_size": 6, "in_channels": 1, "num_levels": 5, "num_classes": 3, "dim": 6, "depth": 3, "first_size": 3,
         "head": "categorical", "head_dim": 24}  # fmt: skip
NETS = {
    "grey": {}, "colour": {"in_channels": 3}, "table": {"embedding": 4}, "plain": {"mode": "plain"},
    "wide": {"first_size": 7, "kernel_size": 5}, "unconditional": {"num_classes": 0},
    "mixture": {"in_channels": 3, "head": "logistic_mixture", "components": 3, "num_levels": 256},
}  # fmt: skip


def network(seed=0, scale=0.4, **config):
    """A net with every weight filled, so that a pixel matters to all that come after it."""
    net = PixelCNN.from_config(SMALL | config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return net


def labels_of(net, batch):
    return torch.arange(batch) % (net.config.num_classes + 1) if net.config.num_classes else None


def levels_of(x, levels):
    return torch.round((x + 1) * (0.5 * (levels - 1))).long()


def log_probs(weights, x, labels=None, temperature=1.0, known=None):
    """What a whole forward pass in float64 says of the pixels of x: (B, H, W)."""
    wide = dataclasses.replace(weights, matrices=weights.matrices.double(), vectors=weights.vectors.double())
    probs = torch.zeros(len(x), *x.shape[2:], dtype=torch.float64)
    known = torch.zeros_like(x, dtype=torch.bool) if known is None else known
    naive = Naive(x, probs, wide, Draws(labels, known, torch.tensor(0), torch.arange(len(x)), temperature))
    s = weights.shape
    found = torch.stack([naive.outputs(g) for g in range(s.groups)])  # (groups, B, H, W, O)
    if s.components:
        params = found[0, ..., : s.logits].permute(0, 3, 1, 2)
        return ops.logistic_mixture_log_prob(x.float(), params, bins=s.levels)
    each = torch.log_softmax(found[..., : s.levels] / temperature, -1)
    each = each.gather(-1, levels_of(x, s.levels).movedim(1, 0)[..., None])[..., 0]
    return torch.where(known.movedim(1, 0), 0.0, each).sum(0)


# ---- against the network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_pixels_are_those_that_the_network_puts_out(name, backend):
    """An image is right if the network, shown all of it, puts every pixel where it is: x = F(x) has one solution."""
    net = network(**NETS[name])
    y, ids = labels_of(net, 5), torch.arange(5) + 3
    found = ops.pixelcnn_sample(net.packed(), 5, labels=y, seed=9, sample_ids=ids, backend=backend)
    output, config = net(found.x, y), net.config
    if config.head == "categorical":
        size, c = config.image_size, config.in_channels
        u = ops.uniform((5, size, size, c), seed=9, sample_ids=ids, stream="uniform").permute(0, 3, 1, 2)
        levels = levels_of(found.x, config.num_levels)
        assert torch.equal(inverse_cdf(output, u), levels)
        expected = torch.log_softmax(output, 1).gather(1, levels[:, None])[:, 0].sum(1)
    else:
        drawn = ops.logistic_mixture_sample(output, channels=3, bins=256, seed=9, sample_ids=ids)
        torch.testing.assert_close(drawn, found.x, rtol=0, atol=1e-6)
        expected = ops.logistic_mixture_log_prob(found.x, output)
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-4, atol=1e-4)
    assert found.rows == config.image_size and found.x.std() > 0.1 and found.x.dtype == torch.float32


@needs_kernel
@pytest.mark.parametrize("isa", testing.ISAS)
def test_kernel_is_the_reference(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for case in testing.cases("pixelcnn_sample", CPU):
            assert testing.check_case(SAMPLE, "cpu", case) is None


@pytest.mark.parametrize("name", NETWORKS)
def test_cached_is_naive(name):
    for fold in (False, True):
        weights = packed(name, fold=fold)
        labels = torch.tensor([0, weights.shape.classes]) if weights.shape.classes else None
        arguments = {"labels": labels, "seed": 4, "temperature": 0.7}
        naive = ops.pixelcnn_sample(weights, 2, order="naive", **arguments)
        cached = ops.pixelcnn_sample(weights, 2, order="raster", backend="reference", **arguments)
        assert torch.equal(naive.x, cached.x)
        torch.testing.assert_close(naive.log_prob, cached.log_prob, rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("name", NETWORKS)
def test_orders_and_groupings_have_the_same_bits(name):
    weights = packed(name)
    ids = torch.tensor([5, 900, 17, 2**32 - 1, 0, 44, 3])
    labels = ids % (weights.shape.classes + 1) if weights.shape.classes else None
    whole = ops.pixelcnn_sample(weights, 7, labels=labels, seed=1, sample_ids=ids)
    front = ops.pixelcnn_sample(weights, 7, labels=labels, seed=1, sample_ids=ids, order="wavefront")
    assert torch.equal(whole.x, front.x) and torch.equal(whole.log_prob, front.log_prob)
    part = labels[2:5] if labels is not None else None
    some = ops.pixelcnn_sample(weights, 3, labels=part, seed=1, sample_ids=ids[2:5])
    assert torch.equal(whole.x[2:5], some.x) and torch.equal(whole.log_prob[2:5], some.log_prob)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(ops.pixelcnn_sample(weights, 7, labels=labels, seed=1, sample_ids=ids).x, whole.x)
    finally:
        torch.set_num_threads(threads)
    seeds = torch.full((7,), 1)
    assert torch.equal(ops.pixelcnn_sample(weights, 7, labels=labels, seed=seeds, sample_ids=ids).x, whole.x)
    assert not torch.equal(ops.pixelcnn_sample(weights, 7, labels=labels, seed=2, sample_ids=ids).x, whole.x)


@needs_kernel
@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_errs_no_more_than_eager(name, isa):
    weights = packed(name, torch.bfloat16)
    labels = torch.arange(4) % (weights.shape.classes + 1) if weights.shape.classes else None
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        ours, front = (ops.pixelcnn_sample(weights, 4, labels=labels, seed=3, order=o) for o in ("raster", "wavefront"))
    assert torch.equal(ours.x, front.x)
    eager = ops.pixelcnn_sample(weights, 4, labels=labels, seed=3, backend="reference")
    errors = [float((f.log_prob - log_probs(weights, f.x, labels)).abs().max()) for f in (ours, eager)]
    assert errors[0] <= 2 * errors[1] + 2**-8, errors


@pytest.mark.parametrize(("order", "backend"), [("raster", "reference"), ("naive", "reference"),
                                                pytest.param("raster", "cpu", marks=needs_kernel)])  # fmt: skip
@pytest.mark.parametrize("name", ["grey", "mixture"])
def test_autocast_casts_nothing(name, order, backend):
    plain = ops.pixelcnn_sample(packed(name), 3, seed=2, order=order, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.pixelcnn_sample(packed(name), 3, seed=2, order=order, backend=backend)
    assert torch.equal(plain.x, found.x) and torch.equal(plain.log_prob, found.log_prob)


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_that_overflow_show_as_nan(backend):
    """Weights are finite, but their products are not: pixels without a level must not be looked up in the table."""
    net = network(**NETS["mixture"], embedding=4)
    with torch.no_grad():
        net.hidden.conv.weight.mul_(1e30)
        net.out.conv.weight.mul_(1e30)
    found = ops.pixelcnn_sample(net.packed(), 2, seed=2, backend=backend)
    assert found.x.isnan().all() and found.log_prob.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_log_prob_is_exact(name, backend):
    weights = packed(name)
    labels = torch.arange(4) % (weights.shape.classes + 1) if weights.shape.classes else None
    found = ops.pixelcnn_sample(weights, 4, labels=labels, seed=3, backend=backend)
    testing.assert_within(float((found.log_prob - log_probs(weights, found.x, labels)).abs().max()), 2e-5)
    if not weights.shape.components:
        cold = ops.pixelcnn_sample(weights, 4, labels=labels, seed=3, temperature=0.5, backend=backend)
        testing.assert_within(float((cold.log_prob - log_probs(weights, cold.x, labels, 0.5)).abs().max()), 4e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_probabilities_of_a_tempered_mixture_sum_to_one(temperature, backend):
    """Drawn often enough, every value of a pixel comes up; their probabilities are those of a distribution."""
    found, sizes = kernels("mixture", torch.Generator().manual_seed(1))
    sizes |= {"channels": 2, "levels": 3, "size": 4}
    found["layers.0.above"], found["layers.0.left"] = found["layers.0.above"][:, :2], found["layers.0.left"][:, :2]
    per = 1 + 4 + 1
    found["logits"], found["logits_bias"] = found["logits"][: 3 * per], found["logits_bias"][: 3 * per]
    del found["classes"]
    weights = ops.pack_pixelcnn(found, **sizes)
    drawn = ops.pixelcnn_sample(weights, 2000, seed=0, temperature=temperature, backend=backend)
    first, probs = levels_of(drawn.x[:, :, 0, 0], 3), drawn.log_prob[:, 0, 0].exp()  # nothing comes before this pixel
    codes = first[:, 0] * 3 + first[:, 1]
    values = {int(code): float(probs[codes == code].double().mean()) for code in codes.unique()}
    assert all(float(probs[codes == code].std()) < 1e-6 for code in values if (codes == code).sum() > 1)
    assert sum(values.values()) == pytest.approx(1, abs=0.01)
    for code, p in values.items():  # five standard deviations
        assert abs(float((codes == code).double().mean()) - p) < 5 * (p * (1 - p) / 2000) ** 0.5 + 1e-9


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["grey", "colour", "mixture", "plain", "codes"])
def test_completion_keeps_what_is_given(name, backend):
    weights = packed(name)
    s, generator = weights.shape, torch.Generator().manual_seed(0)
    shape = (4, s.channels, s.size, s.size)
    levels = torch.randint(0, s.levels, shape, generator=generator)
    given = (2 * levels - (s.levels - 1)) / (s.levels - 1)
    known = torch.rand(4, 1 if s.components else s.channels, s.size, s.size, generator=generator) < 0.5
    found = ops.pixelcnn_sample(weights, 4, seed=3, given=given, known=known, backend=backend)
    known = known.expand(shape)
    assert torch.equal(found.x[known], given[known]) and not torch.equal(found.x, given)
    expected = log_probs(weights, found.x, known=known)
    if s.components:
        expected = torch.where(known[:, 0], 0.0, expected)
    testing.assert_within(float((found.log_prob - expected).abs().max()), 2e-5)
    near = given + 0.3 / (s.levels - 1)  # taken at the nearest level
    again = ops.pixelcnn_sample(weights, 4, seed=3, given=near, known=known, backend=backend)
    assert torch.equal(again.x, found.x)
    if backend == "cpu":
        front = ops.pixelcnn_sample(weights, 4, seed=3, given=given, known=known, order="wavefront")
        assert torch.equal(front.x, found.x)
    everything = ops.pixelcnn_sample(weights, 4, seed=3, given=given, known=known | True, backend=backend)
    assert torch.equal(everything.x, given) and not everything.log_prob.any()


# ---- rows, callbacks, interruption -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "order"), [("reference", "raster"), ("reference", "naive"),
                                                pytest.param("cpu", "raster", marks=needs_kernel),
                                                pytest.param("cpu", "wavefront", marks=needs_kernel)])  # fmt: skip
def test_callback_and_interruption(backend, order):
    weights, seen = packed("wide kernels"), []
    whole = ops.pixelcnn_sample(weights, 3, seed=1, order=order, backend=backend)
    by_row = ops.pixelcnn_sample(
        weights, 3, seed=1, order=order, backend=backend, callback=lambda *rows: seen.append(rows)
    )
    assert seen == [(i + 1, 6) for i in range(6)] and torch.equal(by_row.x, whole.x)

    def stop(done, rows):
        if done == 4:
            raise KeyboardInterrupt

    partial = ops.pixelcnn_sample(weights, 3, seed=1, order=order, backend=backend, callback=stop)
    assert partial.rows == 4 and torch.equal(partial.x[:, :, :4], whole.x[:, :, :4])
    with pytest.raises(ZeroDivisionError):
        ops.pixelcnn_sample(weights, 3, seed=1, order=order, backend=backend, callback=lambda *rows: 1 // 0)


@pytest.mark.parametrize(("order", "backend"), [("raster", "reference"), ("naive", "reference"),
                                                pytest.param("raster", "cpu", marks=needs_kernel),
                                                pytest.param("wavefront", "cpu", marks=needs_kernel)])  # fmt: skip
@pytest.mark.parametrize("completed", [False, True])
def test_rows_begun_when_interrupted_are_zero_again(order, backend, completed, monkeypatch):
    """Ctrl-C may come when a row has been drawn and not yet counted; the wavefront is in several rows at once."""
    weights, calls = packed("grey"), []
    known = torch.zeros(3, 1, 5, 5, dtype=torch.bool)
    known[:, :, 3, 1:3] = True
    given = {"given": torch.full((3, 1, 5, 5), 0.5), "known": known} if completed else {}
    whole = ops.pixelcnn_sample(weights, 3, seed=1, order=order, backend=backend, **given)
    rows_of, rows = module._rows_of, Naive.rows

    def interrupted(run):
        def until(*args):
            run(*args)
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt

        return until

    monkeypatch.setattr(module, "_rows_of", lambda *args: interrupted(rows_of(*args)))
    monkeypatch.setattr(Naive, "rows", interrupted(rows))
    one_row = lambda *args: None  # noqa: E731
    part = ops.pixelcnn_sample(weights, 3, seed=1, order=order, backend=backend, callback=one_row, **given)
    assert part.rows == 2 and torch.equal(part.x[:, :, :2], whole.x[:, :, :2])
    assert torch.equal(part.x[:, :, 2:], torch.where(known, 0.5, 0.0)[:, :, 2:] * completed)
    assert torch.equal(part.log_prob[:, :2], whole.log_prob[:, :2]) and not part.log_prob[:, 2:].any()


@needs_kernel
def test_sigint_ends_a_call():
    """A real signal, from another thread, while the kernel runs."""
    weights, threads = network(image_size=28, dim=32, depth=6, scale=0.02).packed(), torch.get_num_threads()
    torch.set_num_threads(1)  # half a second and more
    try:
        whole = ops.pixelcnn_sample(weights, 64, seed=1)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        part = ops.pixelcnn_sample(weights, 64, seed=1)
        timer.join()
    finally:
        torch.set_num_threads(threads)
    assert part.rows < 28 and torch.equal(part.x[:, :, : part.rows], whole.x[:, :, : part.rows])
    assert not part.x[:, :, part.rows :].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    found = ops.pixelcnn_sample(packed("colour"), 0, seed=1, backend=backend, labels=torch.empty(0, dtype=torch.int64))
    assert found.x.shape == (0, 3, 4, 4) and found.log_prob.shape == (0, 4, 4) and found.rows == 4


@pytest.mark.parametrize(("depth", "reach", "first", "gated"), [(1, 1, 1, True), (3, 1, 2, True), (2, 2, 1, True),
                                                               (3, 1, 2, False), (2, 2, 1, False)])  # fmt: skip
def test_the_wavefront_waits_no_longer_than_it_must(depth, reach, first, gated):
    """A pixel depends on the row above up to `lag` - 1 columns to its right, and on no column further."""
    size, middle = 16, 6
    net = network(
        image_size=size, depth=depth, kernel_size=2 * reach + 1, first_size=2 * first + 1, scale=0.3, num_classes=0,
        mode="gated" if gated else "plain",
    )  # fmt: skip
    x = torch.zeros(1, 1, size, size, requires_grad=True)
    net(x)[0, :, 0, 8, middle].sum().backward()
    furthest = int(x.grad[0, 0, 7].nonzero().max()) - middle
    shape = net.packed().shape
    if gated or reach <= first:
        assert furthest == shape.lag - 1
    else:  # of the pixel that far right a plain layer reads the features, which do not depend on its value
        assert furthest == shape.lag - 2
    assert shape.steps("wavefront") == shape.lag * (size - 1) + size and shape.steps("raster") == size**2


def test_seven_layers_take_244_steps():
    shape = dataclasses.replace(packed("grey").shape, size=28, depth=7, reach=1, first_reach=1)
    assert shape.steps("wavefront") == 244
    assert dataclasses.replace(shape, depth=15).steps("wavefront") == 460


# ---- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 16), (7, 33), (128, 48)])
def test_panels(k, n, dtype):
    matrix = torch.randn(k, n).to(dtype)
    flat = _panels.pack(matrix)
    assert len(flat) == _panels.numel(k, n) and torch.equal(_panels.unpack(flat, k, n), matrix)
    rows = k + k % 2
    for i, j in itertools.product((0, k - 1), (0, n - 1)):  # as the header says where an element lies
        step = (i // 2 * 16 + j % 16) * 2 + i % 2 if dtype == torch.bfloat16 else i * 16 + j % 16
        assert flat[j // 16 * rows * 16 + step] == matrix[i, j]
    assert flat.float().abs().sum() == pytest.approx(float(matrix.float().abs().sum()), rel=1e-5)  # the rest is zero


def test_packed_weights_follow_the_parameters():
    net = network()
    first = net.packed()
    assert net.packed() is first and net.packed(torch.bfloat16).dtype == torch.bfloat16
    first = net.packed()
    with torch.no_grad():
        net.out.conv.weight.mul_(2)
    assert not torch.equal(net.packed().matrices, first.matrices)
    assert len(pickle.dumps(net)) < 1.1 * len(pickle.dumps(network()))  # of which nothing has been packed
    with torch.inference_mode():  # where nobody counts changes
        net = network()
        first = net.packed()
        net.out.conv.weight.mul_(2)
        assert not torch.equal(net.packed().matrices, first.matrices)


def test_whole_squares_are_taken_if_masked():
    """Masked convolutions keep square kernels: what lies in the future must be zero, and the layer is named."""
    found, sizes = kernels("grey", torch.Generator().manual_seed(0))
    expected = ops.pack_pixelcnn(found, **sizes)
    above, left = found["layers.1.above"], found["layers.1.left"]
    square = found | {
        "layers.1.above": torch.cat([above, torch.zeros_like(above[:, :, :1])], 2),
        "layers.1.left": torch.cat([left, torch.zeros_like(left[..., :1])], 3),
    }
    assert torch.equal(ops.pack_pixelcnn(square, **sizes).matrices, expected.matrices)
    for name, index in (
        ("layers.1.above", (0, 0, 2, 1)),
        ("layers.1.left", (3, 1, 0, 2)),
        ("layers.0.left", (0, 0, 0, 1)),
    ):
        wrong = {**square, name: square[name].clone()}
        wrong[name][index] = 0.1
        with pytest.raises(ValueError, match=f"{name} sees the future: it has 1 weights"):
            ops.pack_pixelcnn(wrong, **sizes)


@pytest.mark.parametrize("name", ["layers.0.left", "layers.2.left", "layers.1.out", "hidden", "logits"])
def test_a_channel_that_sees_a_later_one_is_refused(name):
    found, sizes = kernels("colour", torch.Generator().manual_seed(0))
    index = (0, -1, 0, -1) if "left" in name else (0, -1)
    found[name] = found[name].clone()
    found[name][index] = 1.0
    with pytest.raises(ValueError, match=rf"{name} sees the future.*channels from [01] on of the pixel itself"):
        ops.pack_pixelcnn(found, **sizes)


def test_an_early_stack_must_not_see_its_own_row():
    found, sizes = kernels("grey", torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="positions must be absent for an early"):
        ops.pack_pixelcnn(found, **sizes, early=True)
    del found["positions"]
    with pytest.raises(ValueError, match=r"layers\.0\.above sees the future.* for its own row"):
        ops.pack_pixelcnn(found, **sizes, early=True)
    plain, sizes = kernels("plain", torch.Generator().manual_seed(0))
    del plain["positions"]
    with pytest.raises(ValueError, match="early must be False for a plain network"):
        ops.pack_pixelcnn(plain, **sizes, early=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value):
    found, sizes = kernels("grey", torch.Generator().manual_seed(0))
    found["layers.2.out"][1, 2] = value
    with pytest.raises(ValueError, match=r"layers\.2\.out has values that are not finite"):
        ops.pack_pixelcnn(found, **sizes)


def test_kernels_that_do_not_fit_are_named():
    found, sizes = kernels("grey", torch.Generator().manual_seed(0))
    for change, message in (
        ({"layers.1.down": found["layers.1.down"][:3]}, r"layers\.1\.down must be \(12, 12\), got \(3, 12\)"),
        ({"layers.2.above": found["layers.2.above"][..., :2]}, r"layers\.2\.above must be"),
        ({"positions": found["positions"][..., :4]}, r"positions must be \(2, 6, 5, 5\)"),
        ({"nothing": found["hidden"]}, "unknown kernels nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.pack_pixelcnn(found | change, **sizes)
    with pytest.raises(ValueError, match="hidden_bias is missing"):
        ops.pack_pixelcnn({name: value for name, value in found.items() if name != "hidden_bias"}, **sizes)
    with pytest.raises(TypeError, match="dtype must be one of"):
        ops.pack_pixelcnn(found, **sizes, dtype=torch.float16)
    with pytest.raises(ValueError, match="levels must be 2 to 4096"):
        ops.pack_pixelcnn(found, **(sizes | {"levels": 5000}))


@pytest.mark.parametrize("name", [name for name in NETWORKS if NETWORKS[name][5] > 1])
def test_folded_products_differ_by_rounding_alone(name):
    plain, folded = packed(name), packed(name, fold=True)
    drawn = ops.pixelcnn_sample(plain, 6, seed=8)
    other = ops.pixelcnn_sample(folded, 6, seed=8)
    assert not torch.equal(plain.matrices[: len(folded.matrices)], folded.matrices[: len(plain.matrices)])
    assert torch.equal(drawn.x, other.x)
    testing.assert_within(float((drawn.log_prob - other.log_prob).abs().max()), 2e-5)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named():
    weights, mixture = packed("grey"), packed("mixture")
    draw = lambda *args, w=weights, **kw: ops.pixelcnn_sample(w, *args, **({"seed": 0} | kw))  # noqa: E731
    x, known = torch.zeros(2, 1, 5, 5), torch.ones(2, 1, 5, 5, dtype=torch.bool)
    colour, some = torch.zeros(1, 3, 4, 4), torch.tensor([True, False, True]).view(1, 3, 1, 1)
    for error, match, call in (
        (TypeError, "weights must be PixelCNNWeights", lambda: ops.pixelcnn_sample(network(), 2, seed=0)),
        (TypeError, "num must be an int", lambda: draw(2.0)),
        (ValueError, "num must be at least 0, got -1", lambda: draw(-1)),
        (ValueError, "temperature must be in", lambda: draw(2, temperature=0.0)),
        (ValueError, "order must be one of raster, wavefront, naive", lambda: draw(2, order="zigzag")),
        (TypeError, "callback must be callable", lambda: draw(2, callback=3)),
        (ValueError, r"labels must be in 0 \.\. 3", lambda: draw(2, labels=torch.tensor([0, 4]))),
        (ValueError, r"labels must be \(B,\)", lambda: draw(2, labels=torch.tensor([0]))),
        (ValueError, "network without classes", lambda: draw(1, w=packed("plain"), labels=torch.tensor([0]))),
        (ValueError, r"seed must be in \[0, 2\*\*64\)", lambda: draw(2, seed=-1)),
        (TypeError, "seed must be an int", lambda: draw(2, seed=0.5)),
        (ValueError, r"sample_ids must be \(B,\)", lambda: draw(2, sample_ids=torch.arange(3))),
        (ValueError, "given and known must come together", lambda: draw(2, given=x)),
        (ValueError, r"given must be .* = \(2, 1, 5, 5\), got \(2, 1, 6, 5\)",
         lambda: draw(2, given=torch.zeros(2, 1, 6, 5), known=known)),
        (TypeError, "known must have dtype torch.bool", lambda: draw(2, given=x, known=x)),
        (ValueError, "known must broadcast", lambda: draw(2, given=x, known=known[..., :3])),
        (ValueError, "the same for all channels of a pixel",
         lambda: draw(1, w=mixture, given=colour, known=some)),
        (ValueError, "the reference has no order='wavefront'", lambda: draw(2, backend="reference", order="wavefront")),
        (ValueError, "order='naive' is the reference's", lambda: draw(2, backend="cpu", order="naive")),
        (RuntimeError, "has no triton kernel", lambda: draw(2, backend="triton")),
        (ValueError, "given must have a number wherever known is True, got 50 NaN",
         lambda: draw(2, given=x + torch.nan, known=known)),
        (RuntimeError, "has no backward, but an input requires grad",
         lambda: draw(2, given=x.clone().requires_grad_(), known=known)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    nan = torch.where(known, x, torch.nan)
    assert torch.equal(draw(2, given=nan, known=known).x, draw(2, given=x, known=known).x)


@needs_kernel
def test_a_named_backend_does_not_fall_back_to_naive():
    with ops.backend("cpu"), pytest.raises(ValueError, match="order='naive' is the reference's, got backend='cpu'"):
        ops.pixelcnn_sample(packed("grey"), 1, seed=0, order="naive")


def test_a_compiled_function_may_call_it():
    weights = packed("grey")
    draw = lambda seed: ops.pixelcnn_sample(weights, 2, seed=seed).x + 1  # noqa: E731
    seed = torch.tensor(4)
    assert torch.equal(torch.compile(draw, backend="eager")(seed), draw(seed))
    torch._dynamo.reset()  # what it compiled in parts it would take again
    with pytest.raises(torch._dynamo.exc.Unsupported, match="loops over rows on the host"):
        torch.compile(draw, backend="eager", fullgraph=True)(seed)


@needs_kernel
def test_the_kernel_checks_what_it_is_given():
    case = testing.cases("pixelcnn_sample", CPU)[0]
    run = SAMPLE.overloads["cpu"]
    for index, wrong, message in (
        (2, torch.empty(8, dtype=torch.uint8), "state must hold"), (3, case.args[3][:-1], "weights must hold"),
        (5, case.args[5][:-1], "fields must be"), (12, 0, "groups must be of"), (14, 9, "rows must be within"),
        (6, case.args[6][:-1], "labels must be"), (7, torch.ones(3, 1, 5, 4, dtype=torch.bool), "known must be"),
        (0, case.args[0][:, :, :2], "x must be contiguous"),
    ):  # fmt: skip
        args = [*case.args]
        args[index] = wrong
        with pytest.raises(RuntimeError, match=message):
            run(*args)


def test_opcheck():
    case = testing.cases("pixelcnn_sample", CPU)[1]
    tests = ("test_schema", "test_faketensor")
    for namespace in ("genengine", "genengine_reference"):
        torch.library.opcheck(getattr(torch.ops, namespace).pixelcnn_sample.default, case.args, test_utils=tests)
