"""qk_norm_rope: heads of every size, both pairings, norm and rotation alone, in place and out, and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support import BACKENDS, LAYOUTS, laid_out, skip_unless_available
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from genengine import testing
from genengine.ops import EXTENSION, _registry, _verify, qk_norm_rope
from genengine.rotary import rope_table
from genengine.testing.qk_norm_rope import backward_slack, make_arguments, rotary_half

NAMES = ("qk_norm_rope", "qk_norm_rope_", "qk_norm_rope_backward")
NAMESPACES = {"genengine": "cpu", "genengine_triton": "triton", "genengine_reference": "reference"}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# (norm, weights, share of D that is rotated, interleaved, table per sample)
KINDS = (
    (True, True, 1, True, False),
    (True, False, 0.5, False, True),
    (False, False, 1, True, True),
    (True, True, 0, True, False),
)
needs_extension = pytest.mark.skipif(not EXTENSION.loaded, reason=f"no compiled kernels: {EXTENSION.reason}")


def make(size=(2, 3, 2, 16), kind=KINDS[0], dtype=F32, weight_dtype=None, device="cpu"):
    """Arguments of the public function, by name."""
    draw = lambda *shape: torch.randn(shape).to(device)  # noqa: E731
    qkv, *weights, cos, sin, eps, norm, interleaved = make_arguments(draw, dtype, weight_dtype or dtype, size, kind)
    tables = (cos, sin) if cos is None or kind[4] else (cos[0], sin[0])
    return dict(
        zip(
            ("qkv", "q_weight", "k_weight", "cos", "sin", "eps", "norm", "interleaved"),
            (qkv, *weights, *tables, eps, norm, interleaved),
            strict=True,
        )
    )


def check(backend, arguments):
    """Forward, in place, and backward through the public function, against the same-dtype and the float64 reference."""
    qkv = arguments["qkv"]
    grad = torch.randn(qkv.shape).to(qkv)
    results = {}
    for name, run, wide in ((backend, backend, False), ("plain", "reference", False), ("oracle", "reference", True)):
        own = {k: v.detach().double() if wide and torch.is_tensor(v) else v for k, v in arguments.items()}
        with torch.no_grad():
            changed = laid_out(own["qkv"], "sliced")
            assert qk_norm_rope(**own | {"qkv": changed}, inplace=True, backend=run) is changed
        leaves = {k: own[k].detach().requires_grad_() for k in ("qkv", "q_weight", "k_weight") if own[k] is not None}
        out = qk_norm_rope(**own | leaves, backend=run)
        grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))
        results[name] = [out.detach(), changed, *grads]
    options = [arguments[k] for k in ("q_weight", "k_weight", "cos", "sin", "eps")]
    slack = backward_slack([grad, qkv, *options, arguments["norm"]])
    for i, (got, plain, exact) in enumerate(zip(results[backend], results["plain"], results["oracle"], strict=True)):
        assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape
        allowed = testing.tolerance(plain, exact) + slack.get(i - 2, 0.0)
        assert testing.error(got, exact) <= allowed, f"output {i}: {testing.error(got, exact)} > {allowed}"
    out, changed = results[backend][:2]
    assert (
        out.is_contiguous() and torch.equal(out[:, :, 2], qkv[:, :, 2]) and torch.equal(changed[:, :, 2], qkv[:, :, 2])
    )
    return results[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_case_set(backend, name):
    device = skip_unless_available(name, backend)
    assert _verify.run(_registry.OPS[name], backend, device) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F16, F16), (BF16, BF16), (BF16, F32)], ids=str)
def test_against_float64(backend, dtypes, kind):
    device = skip_unless_available("qk_norm_rope", backend)
    for size in ((2, 3, 2, 33), (1, 5, 3, 72)):
        check(backend, make(size, kind, *dtypes, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [1, 2, 15, 17, 31, 48])
def test_short_and_odd_heads(backend, dim):
    device = skip_unless_available("qk_norm_rope", backend)
    kinds = [kind for kind in KINDS if dim > 1 or not kind[2]]
    for kind in (*kinds, (True, True, 1 if dim > 1 else 0, False, False)):
        check(backend, make((2, 2, 3, dim), kind, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout):
    device = skip_unless_available("qk_norm_rope", backend)
    for kind in (KINDS[0], KINDS[1]):
        arguments = make((2, 3, 2, 24), kind, device=device)
        arguments = {k: laid_out(v, layout) if torch.is_tensor(v) else v for k, v in arguments.items()}
        if layout == "expanded":  # weights too would be one number, repeated
            arguments |= {k: v.contiguous() for k, v in arguments.items() if k.endswith("weight") and v is not None}
        check(backend, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_view_of_the_projection_is_not_copied(backend):
    device = skip_unless_available("qk_norm_rope", backend)
    wide = torch.randn(2, 5, 3 * 2 * 24 + 8, device=device)
    arguments = make((2, 5, 2, 24), device=device) | {"qkv": wide[..., 8:].unflatten(-1, (3, 2, 24))}
    check(backend, arguments)
    before = wide.clone()
    with torch.no_grad():
        qk_norm_rope(**arguments, inplace=True, backend=backend)
    assert torch.equal(wide[..., :8], before[..., :8]) and not torch.equal(wide[..., 8:], before[..., 8:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(backend, size):
    device = skip_unless_available("qk_norm_rope", backend)
    for kind in KINDS:
        arguments = make(size, kind, device=device)
        found = check(backend, arguments)
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in found[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_without_elements(backend):
    device = skip_unless_available("qk_norm_rope", backend)
    qkv = torch.zeros(2, 3, 3, 2, 0, device=device)
    assert qk_norm_rope(qkv, backend=backend).shape == qkv.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_not_a_number_stays_where_it_is(backend, interleaved):
    """In its head under the norm; without it in its pair, and alone where nothing is rotated."""
    device = skip_unless_available("qk_norm_rope", backend)
    arguments = make((1, 3, 2, 72), (False, False, 0.5, interleaved, False), device=device)
    half = arguments["cos"].shape[-1]
    qkv = arguments["qkv"]
    qkv[0, 0, 0, 1, 5] = qkv[0, 1, 1, 0, 2 * half + 1] = qkv[0, 2, 2, 0, 3] = float("nan")
    pair = 4 if interleaved else 5 + half
    lost = [[0, 0, 0, 1, min(5, pair)], [0, 0, 0, 1, max(5, pair)], [0, 1, 1, 0, 2 * half + 1], [0, 2, 2, 0, 3]]
    assert qk_norm_rope(**arguments, backend=backend).isnan().nonzero().tolist() == lost
    lost = qk_norm_rope(**arguments | {"norm": True}, backend=backend).isnan()
    assert lost.sum() == 2 * 72 + 1 and lost[0, 0, 0, 1].all() and lost[0, 1, 1, 0].all() and lost[0, 2, 2, 0, 3]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_as_users_write_it(backend, interleaved):
    """F.rms_norm and a complex product; the products of q and k depend on the distance of their positions alone."""
    device = skip_unless_available("qk_norm_rope", backend)
    arguments = make((2, 6, 2, 24), (True, True, 1, interleaved, False), device=device)
    cos, sin = rope_table(torch.arange(6, device=device), 24)
    arguments |= {"cos": cos, "sin": sin}
    out = qk_norm_rope(**arguments, backend=backend)
    for part, name in ((0, "q_weight"), (1, "k_weight")):
        y = F.rms_norm(arguments["qkv"][:, :, part], (24,), arguments[name], 1e-6)
        pairs = y.unflatten(-1, (12, 2)) if interleaved else torch.stack(y.chunk(2, -1), -1)
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[:, None])
        expected = turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1)
        torch.testing.assert_close(out[:, :, part], expected)
    same = arguments | {"qkv": arguments["qkv"][:1, :1].expand(1, 6, -1, -1, -1)}
    q, k, _ = qk_norm_rope(**same, backend=backend)[0, :, :, 0].unbind(1)
    scores = q @ k.T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reruns_are_equal_and_a_token_does_not_depend_on_its_batch(backend):
    device = skip_unless_available("qk_norm_rope", backend)
    arguments = make((3, 20, 2, 40), device=device)
    out, again = (qk_norm_rope(**arguments, backend=backend) for _ in range(2))
    assert torch.equal(out, again)
    with torch.no_grad():
        changed = qk_norm_rope(**arguments | {"qkv": arguments["qkv"].clone()}, inplace=True, backend=backend)
    assert torch.equal(out, changed)
    alone = qk_norm_rope(**arguments | {"qkv": arguments["qkv"][1:2]}, backend=backend)
    assert torch.equal(alone[0], out[1])


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape_and_strides(data):
    skip_unless_available("qk_norm_rope", "cpu")
    small = st.integers(0, 4)
    size = (data.draw(small), data.draw(st.integers(0, 20)), data.draw(small), data.draw(st.integers(1, 256)))
    norm = data.draw(st.booleans(), label="norm")
    weighted = norm and data.draw(st.booleans(), label="weights")
    share = data.draw(st.floats(0, 1) if norm else st.floats(0.01, 1), label="share") if size[3] > 1 else 0
    if not (norm or rotary_half(size[3], share)):
        return
    kind = (
        norm,
        weighted,
        share,
        data.draw(st.booleans(), label="interleaved"),
        data.draw(st.booleans(), label="per sample"),
    )
    dtypes = data.draw(st.sampled_from([(F32, F32), (F16, F16), (BF16, BF16), (F16, F32), (BF16, F32)]), label="dtypes")
    arguments = make(size, kind, *dtypes)
    layouts = st.sampled_from(LAYOUTS)
    arguments["qkv"] = laid_out(arguments["qkv"], data.draw(layouts, label="qkv"))
    for name in ("cos", "sin", "q_weight"):
        if arguments[name] is not None:
            arguments[name] = laid_out(
                arguments[name], data.draw(st.sampled_from(["plain", "sliced", "unaligned", "permuted"]))
            )
    check("cpu", arguments)


@needs_extension
@pytest.mark.parametrize("isa", testing.ISAS)
def test_every_instruction_set(isa):
    with testing.cpu_isa(isa) as in_use:
        if in_use != isa:
            pytest.skip(f"this CPU has no {isa}")
        for name in NAMES:
            assert _verify.run(_registry.OPS[name], "cpu", torch.device("cpu")) == []


@needs_extension
@pytest.mark.parametrize(("dtype", "dim"), [(F32, 72), (BF16, 72), (F32, 128)], ids=str)
def test_threads_and_streaming_stores_change_no_bit(dtype, dim):
    arguments = make((3, 2000, 10, dim), (True, True, 1, dim == 72, False), dtype)  # more than the caches hold
    grad, positional = torch.randn_like(arguments["qkv"]), list(arguments.values())
    positional[3:5] = (table[None] for table in positional[3:5])

    def run(part):
        ops = torch.ops.genengine
        out = ops.qk_norm_rope(positional[0][part], *positional[1:])
        return out, *ops.qk_norm_rope_backward(grad[part], positional[0][part], *positional[1:])

    whole = run(slice(None))
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(None)), strict=True))
    finally:
        torch.set_num_threads(1)
    part = run(slice(1))  # less than a streamed output
    assert torch.equal(whole[0][:1], part[0]) and torch.equal(whole[1][:1], part[1])


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (*KINDS, (True, True, 1, False, False)), ids=str)
def test_gradcheck(kind):
    arguments = make((2, 3, 1, 6), kind, F64)
    leaves = {
        k: v.requires_grad_() for k, v in arguments.items() if k in ("qkv", "q_weight", "k_weight") and v is not None
    }

    def run(*values):
        return qk_norm_rope(**arguments | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_a_rotation_keeps_no_input():
    arguments = make(kind=KINDS[2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        out = qk_norm_rope(**arguments | {"qkv": arguments["qkv"].requires_grad_()})
    assert arguments["qkv"].data_ptr() not in saved
    (grad,) = torch.autograd.grad(out.sum(), arguments["qkv"])  # an expanded gradient
    torch.testing.assert_close(grad[:, :, 2], torch.ones_like(grad[:, :, 2]))


def test_what_has_no_gradient_is_refused():
    arguments = make()
    qkv = arguments["qkv"].requires_grad_()
    with pytest.raises(RuntimeError, match="qk_norm_rope with inplace=True: has no backward, .*pass inplace=False"):
        qk_norm_rope(**arguments, inplace=True)
    with pytest.raises(RuntimeError, match="only qkv and the weights are differentiable: detach cos and sin"):
        qk_norm_rope(**arguments | {"cos": arguments["cos"].requires_grad_()})
    arguments["cos"].requires_grad_(False)
    with pytest.raises(RuntimeError, match="qk_norm_rope_backward: has no backward, .*drop create_graph=True"):
        torch.autograd.grad(qk_norm_rope(**arguments).sum(), qkv, create_graph=True)


# ---- torch's own checks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["plain", "sliced", "permuted", "rotation", "empty", "requires_grad"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(namespace, kind, name):
    skip_unless_available(name, NAMESPACES[namespace])
    if kind == "permuted" and name == "qk_norm_rope_" and namespace != "genengine_reference":
        pytest.skip("the public function gives the kernels rows with an innermost stride of 1 to write")
    arguments = make((0, 3, 2, 8) if kind == "empty" else (2, 3, 2, 8), KINDS[2] if kind == "rotation" else KINDS[0])
    if kind != "rotation":  # a table for all samples
        arguments |= {k: arguments[k][None] for k in ("cos", "sin")}
    arguments["qkv"] = laid_out(arguments["qkv"], kind)
    args = list(arguments.values())
    if kind == "requires_grad":
        if name != "qk_norm_rope":
            pytest.skip("has no backward: the public function and the first backward refuse")
        args[:3] = (t.clone().requires_grad_() for t in args[:3])
    if name == "qk_norm_rope_backward":
        args.insert(0, torch.randn_like(args[0]))
    opcheck(getattr(getattr(torch.ops, namespace), name).default, tuple(args))


def test_fullgraph_compile():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def block(qkv, q_weight, k_weight, cos, sin):
        out = qk_norm_rope(qkv, q_weight, k_weight, cos, sin)
        with torch.no_grad():
            return out, qk_norm_rope(out.detach() + 1, cos=cos, sin=sin, inplace=True)

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for tokens in range(2, 12):
        arguments = list(make((2, tokens, 2, 8)).values())[:5]
        leaves = [t.requires_grad_() for t in arguments[:3]]
        got, expected = compiled(*arguments), block(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        grads = [torch.autograd.grad(out[0].sum(), leaves) for out in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert counter.frame_count <= 2


def test_long_heads_run_on_the_reference():
    qkv = torch.randn(1, 2, 3, 1, 300)
    assert torch.equal(qk_norm_rope(qkv), qk_norm_rope(qkv, backend="reference"))
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run here: D must be at most 256, got 300"):
        qk_norm_rope(qkv, backend="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"qkv": torch.zeros(2, 3, 2, 2, 8)}, ValueError, "qkv must be \\(B, N, 3, H, D\\), got"),
        ({"qkv": torch.zeros(2, 3, 48)}, ValueError, "view the projection's"),
        ({"qkv": torch.zeros(2, 3, 3, 2, 8).int()}, TypeError, "qkv must have dtype"),
        ({"q_weight": None}, ValueError, "q_weight and k_weight must be given both or neither, got k_weight alone"),
        ({"q_weight": torch.zeros(9)}, ValueError, "q_weight must be \\(D,\\) = \\(8,\\), got \\(9,\\)"),
        ({"k_weight": torch.zeros(8).half()}, TypeError, "k_weight must have dtype torch.float32, got torch.float16"),
        ({"norm": False}, ValueError, "q_weight must be None with norm=False"),
        ({"sin": None}, ValueError, "cos and sin must be given both or neither, got cos alone"),
        ({"cos": torch.zeros(3, 5)}, ValueError, "with 2 <= R <= D = 8, got \\(3, 5\\)"),
        ({"cos": torch.zeros(4, 4)}, ValueError, "cos must be \\(N, R/2\\) = \\(3, 4\\), got \\(4, 4\\)"),
        ({"sin": torch.zeros(3, 3)}, ValueError, "sin must be cos's shape = \\(3, 4\\), got \\(3, 3\\)"),
        ({"sin": torch.zeros(3, 4).half()}, TypeError, "sin must have dtype torch.float32, got torch.float16"),
        ({"eps": -1}, ValueError, "eps must be at least 0, got -1"),
        ({"eps": "1"}, TypeError, "eps must be a float, got str"),
        (
            {"inplace": True, "qkv": torch.zeros(1, 1, 3, 1, 8).expand(2, 3, 3, 2, 8)}, ValueError,
            "must not be expanded",
        ),
        (
            {"norm": False, "q_weight": None, "k_weight": None, "cos": None, "sin": None}, ValueError,
            "norm must be True without cos and sin",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    good = {
        "qkv": torch.zeros(2, 3, 3, 2, 8), "q_weight": torch.ones(8), "k_weight": torch.ones(8),
        "cos": torch.ones(3, 4), "sin": torch.zeros(3, 4),
    }  # fmt: skip
    with pytest.raises(error, match=f"qk_norm_rope: .*{message}"):
        qk_norm_rope(**(good | change))
