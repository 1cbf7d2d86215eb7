"""The step function of `for_schedule` takes other runs' times and labels into the tensors it has."""

import pytest
import torch

from genengine.nets.dit import DiT
from genengine.nets.unet import UNet

SMALL = {"image_size": 8, "in_channels": 1, "num_classes": 9}
NETS = {
    "dit": lambda: DiT.from_config("tiny", **SMALL),
    "unet": lambda: UNet.from_config("tiny", **SMALL),
}
BATCH, ROWS = 4, 6


def randomised(name):
    net = NETS[name]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def times(rows=ROWS):
    return torch.rand(rows, 1).expand(-1, BATCH)


def addresses(step):
    return {name: value.data_ptr() for name, value in vars(step).items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("limit", [2 << 30, 0], ids=["table", "product per step"])
@pytest.mark.parametrize("name", NETS)
def test_an_updated_step_equals_a_fresh_one_bit_for_bit(name, limit):
    net = randomised(name)
    net.max_table_bytes = limit
    x = torch.randn(BATCH, 1, 8, 8)
    with torch.inference_mode():
        step = net.for_schedule(times(), torch.tensor([0, 1, 9, 9]))
        places = addresses(step)
        for labels, rows in (
            ([5, 7, 9, 9], ROWS),
            ([9, 9, 9, 9], ROWS),
            ([3, 3, 8, 9], ROWS - 2),
            ([0, 1, 9, 9], ROWS),
        ):
            t_rows, y = times(rows), torch.tensor(labels)
            net.modulation.weight.mul_(0.9)  # the weights as they are now count
            assert step.update(t_rows, y) and addresses(step) == places
            fresh = net.for_schedule(t_rows, y)
            for row in (0, rows - 1, rows):
                index = torch.full((BATCH,), row, dtype=torch.int32)
                assert torch.equal(step(x, index), fresh(x, index))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    net, x, row = randomised("dit"), torch.randn(BATCH, 1, 8, 8), torch.zeros(BATCH, dtype=torch.int32)
    with torch.inference_mode():
        t_rows, y = times(), torch.tensor([0, 0, 9, 9])
        step = net.for_schedule(t_rows, y)
        before = step(x, row).clone()
        assert not step.update(times(ROWS + 1), y)  # more rows
        assert not step.update(torch.rand(ROWS, BATCH + 1), torch.zeros(BATCH + 1, dtype=torch.int64))
        assert step.update(t_rows, torch.tensor([0, 1, 9, 9])) is False  # 18 pairs where there is room for 16
        net.max_table_bytes = 0
        assert not step.update(t_rows, y)  # a fresh one would not keep the table
        assert torch.equal(step(x, row), before)
        with pytest.raises(ValueError, match="y must be"):
            step.update(t_rows, torch.tensor([0, 1, 9, 12]))


def test_with_gradients_it_serves_one_run():
    net, y = randomised("dit"), torch.zeros(BATCH, dtype=torch.int64)
    step = net.for_schedule(times(), y)
    assert not step.update(times(), y)
    step(torch.randn(BATCH, 1, 8, 8), torch.zeros(BATCH, dtype=torch.int32)).sum().backward()
    assert net.modulation.weight.grad.isfinite().all()
