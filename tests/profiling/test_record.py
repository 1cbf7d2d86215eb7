"""What one pass is recorded as: costs, dataflow through views, the user's line, and what waits for the device."""

import dataclasses
import linecache

import pytest
import torch
import torch.nn.functional as F

from genengine import ops
from genengine.ops import _registry
from genengine.profiling import graph
from genengine.profiling.record import record

X, INDEX, PICTURE = torch.randn(2, 3), torch.tensor([1, 4]), torch.randn(1, 2, 4, 4)


def steps(function):
    return record(function).steps


def line_of(step):
    path, _, number = step.line.rpartition(":")
    return linecache.getline(path, int(number)).strip()


def test_a_step_has_the_line_that_asked_for_it():
    x = torch.randn(4, 4)

    def mine():
        y = torch.relu(x)
        return F.linear(y, x)

    first, second = steps(mine)
    assert line_of(first) == "y = torch.relu(x)" and line_of(second) == "return F.linear(y, x)"
    assert first.stack[-1] == "test_a_step_has_the_line_that_asked_for_it.mine (test_record.py)"


def test_of_our_own_code_the_line_is_the_users():
    (step,) = steps(lambda: ops.bias_gelu(X))
    assert "ops.bias_gelu(" in line_of(step)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_composite_ops_are_recorded_as_what_runs(mode):
    x, weight = torch.randn(2, 5, 8), torch.nn.Parameter(torch.randn(4, 8))
    with mode():
        names = [step.name for step in steps(lambda: F.linear(x, weight).relu())]
    assert names in (["aten::mm", "aten::relu"], ["aten::addmm", "aten::relu"])


def test_composite_ops_are_taken_apart_as_torch_does_it_and_not_in_python():
    with torch.inference_mode():
        (step,) = steps(lambda: F.interpolate(PICTURE, scale_factor=2.0))
    assert step.name == "aten::upsample_nearest2d"


def test_costs_count_every_tensor_once_and_views_not_at_all():
    x = torch.randn(6, 8)
    (step,) = steps(lambda: x.t().reshape(8, 6) * x.t())
    assert step.cost.bytes == 4 * 2 * 48  # x once, the product once
    (step,) = steps(lambda: x + X[0, 0].expand(6, 8))
    assert step.cost.bytes == 4 * (48 + 1 + 48)
    (step,) = steps(lambda: x.mul_(2))
    assert step.cost.bytes == 4 * 2 * 48
    (step,) = steps(lambda: x.zero_())
    assert step.cost.bytes == 4 * 48
    (step,) = steps(lambda: x[:, :2].copy_(x[:, 2:4]))
    assert step.cost.bytes == 4 * 2 * 12
    (step,) = steps(lambda: F.embedding(INDEX, x))
    assert step.cost.bytes == 4 * 16 + 4 * 16 + 16  # rows read, rows written, two indices


TABLE, PICKED = torch.randn(50, 8), torch.tensor([3, 7, 3])  # rows of 32 bytes; an index of 24


@pytest.mark.parametrize(
    ("write", "bytes_moved"),
    [
        (lambda x, values: x.index_put_((PICKED,), values), 24 + 2 * 96),
        (lambda x, values: x.index_put_((PICKED,), values, accumulate=True), 24 + 3 * 96),
        (lambda x, values: x.index_put_((PICKED,), values[0]), 24 + 32 + 96),
        (lambda x, values: torch.ops.aten.index_put_(x, [None, PICKED], values[:, :1].mT), 24 + 12 + 4 * 50 * 3),
        (lambda x, values: x.index_put_((torch.arange(50) < 3,), values), 50 + 2 * 96),
        (lambda x, values: x.index_copy_(0, PICKED, values), 24 + 2 * 96),
        (lambda x, values: x.index_fill_(0, PICKED, 1.0), 24 + 96),
        (lambda x, values: x.index_add_(0, PICKED, values), 24 + 3 * 96),
        (lambda x, values: x.scatter_(0, PICKED[:, None], values), 24 + 2 * 12),
        (lambda x, values: x.scatter_(0, PICKED[:, None], 1.0), 24 + 12),
        (lambda x, values: x.scatter_(0, PICKED[:, None], 2.0, reduce="multiply"), 24 + 2 * 12),
        (lambda x, values: x.scatter_add_(0, PICKED[:, None], values), 24 + 3 * 12),
        (lambda x, values: x.scatter_reduce_(0, PICKED[:, None], values, "sum"), 24 + 3 * 12),
    ],
)
def test_a_write_by_index_costs_what_it_touches_and_not_the_table(write, bytes_moved):
    values = torch.randn(3, 8)
    assert steps(lambda: write(TABLE.clone(), values))[-1].cost.bytes == bytes_moved


@pytest.mark.parametrize("name", ["zeros_like", "ones_like", "randn_like", "rand_like", "full_like"])
def test_of_what_only_gives_its_shape_nothing_is_read(name):
    (step,) = steps(lambda: getattr(torch, name)(TABLE, *([2.0] if name == "full_like" else [])))
    assert step.cost.bytes == 4 * 400 and step.reads == () and step.shapes == "50x8"
    (step,) = steps(lambda: TABLE.new_zeros(3))
    assert step.cost.bytes == 4 * 3


def test_causal_attention_on_a_gpu_computes_half_the_scores():
    q = torch.empty(2, 3, 10, 8, device="meta")  # stands for a GPU: the same op
    flops = [
        steps(lambda c=causal: torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.0, c))[0].cost.flops
        for causal in (False, True)
    ]
    assert flops == [2 * (2 * 2 * 3 * 10 * 10 * 8), 2 * 2 * 3 * 10 * 10 * 8]


def test_products_and_attention_have_their_operations():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert steps(lambda: a @ b)[0].cost.flops == 2 * 3 * 5 * 7
    q = torch.randn(2, 3, 10, 8)
    with torch.no_grad():
        step = max(steps(lambda: F.scaled_dot_product_attention(q, q, q)), key=lambda step: step.cost.flops)
    assert step.cost.flops == 2 * (2 * 2 * 3 * 10 * 10 * 8)


def test_our_ops_have_their_own_formula():
    x, scale, shift = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 8)
    (step,) = steps(lambda: ops.adaln(x, scale, shift))
    assert step.name == "genengine::adaln" or step.name == "genengine_reference::adaln"
    assert step.cost == _registry.OPS["adaln"].cost((x, scale, shift, 1e-6), x)


def test_the_backward_and_the_optimiser_are_marked():
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)

    def train():
        optimizer.zero_grad()
        (weight @ weight).sum().backward()
        optimizer.step()

    kinds = [(step.backward, step.optimizer) for step in steps(train)]
    assert kinds[0] == (False, False) and (True, False) in kinds and kinds[-1] == (False, True)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: x.sum().item(), ".item(), bool(), int() or float()"),
        (lambda x: bool((x > 0).any()), ".item(), bool(), int() or float()"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "indexing with a mask"),
        (lambda x: torch.masked_select(x, x > 0), "masked_select"),
        (lambda x: x.unique(), "unique"),
        (lambda x: torch.equal(x, x + 1), "torch.equal"),
        (lambda x: torch.allclose(x, x + 1), "torch.allclose"),
        (lambda x: x.clone().index_put_((x > 0,), torch.ones(1), accumulate=True), "indexing with a mask"),
        (lambda x: torch.repeat_interleave(torch.tensor([2, 1])), "repeat_interleave"),
    ],
)
def test_what_waits_for_the_device_is_named(call, named):
    x = torch.randn(3, 4)
    assert [step.sync for step in steps(lambda: call(x)) if step.sync] == [named]


def test_what_does_not_wait_is_not_named():
    x, index = torch.randn(3, 4), torch.tensor([0, 2])
    mask = x > 0
    calls = (
        lambda: x[index],
        lambda: torch.where(mask, x, 0.0),
        lambda: x.sum(),
        lambda: x.clone().__setitem__(mask, 1.0),  # which torch runs as masked_fill
        lambda: torch.repeat_interleave(index, output_size=2),
    )
    assert not [step.sync for call in calls for step in steps(call) if step.sync]


def test_meta_tensors_are_recorded_in_every_mode():
    x, weight = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert steps(lambda: F.linear(x, weight).relu())[-1].name == "aten::relu"


def test_nested_tensors_are_refused_by_name():
    ragged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    with pytest.raises(ValueError, match="profile: aten::.* takes a nested tensor"):
        steps(lambda: ragged * 2)


class Keeps(torch.nn.Module):
    def forward(self, x):
        self.last = x.exp()
        return self.last.sin()


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    hidden: list


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_kept_elsewhere_outlives_the_function(grad):
    x, kept = torch.randn(4, requires_grad=grad), []

    def lists():
        kept.append(x.exp())
        return kept[-1].sin()

    def fields():
        y = x.exp()
        return Output(y.sin(), [y])

    module = Keeps()
    for function in (lambda: module(x), lists, fields):
        recording = record(function)
        exp, sin = (step.writes[0].storage for step in recording.steps)
        assert recording.returned == {exp, sin}


def test_what_autograd_alone_keeps_is_not_kept():
    x = torch.randn(4, requires_grad=True)
    recording = record(lambda: x.exp().sin().cos())
    assert len(recording.returned) == 1 and recording.steps[-1].writes[0].storage in recording.returned


def test_an_optimisers_own_counter_waits_for_nothing():
    weight = torch.nn.Parameter(torch.randn(4))
    weight.grad = torch.randn(4)
    optimizer = torch.optim.Adam([weight], foreach=False)
    optimizer.step()
    assert not [step.sync for step in steps(optimizer.step) if step.sync]


def test_dataflow_is_followed_through_views_and_versions():
    x = torch.randn(4, 6)

    def write():
        y = x.exp()
        first, second = y.chunk(2, dim=1)
        y.view(-1).mul_(2)
        return first + second.sin()

    exp, mul, sin, add = graph.build(record(write)).nodes
    assert mul.args[0].node is exp and sin.args[0].node is mul and not sin.args[0].whole
    assert add.args[0].node is mul and add.args[1].node is sin


def test_a_slice_written_in_place_says_nothing_of_the_rest():
    x = torch.randn(4, 6)

    def write():
        y = x.exp()
        y[:2].mul_(2)
        return y.sin(), y[:2].cos(), y[2:].tan()

    exp, mul, sin, cos, tan = graph.build(record(write)).nodes
    assert cos.args[0].node is mul
    assert sin.args[0].node is None and tan.args[0].node is None  # by exp and mul, and only by exp: neither is claimed


def test_storages_are_told_apart_after_their_memory_is_reused():
    def write():
        for _ in range(5):
            torch.randn(1000).exp()

    recording = record(write)
    assert len({step.writes[0].storage for step in recording.steps}) == 10
