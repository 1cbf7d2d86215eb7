"""An engine's runs are `sample`'s bit for bit, and replayed where only values change; a stand-in takes CUDA's part."""

import pytest
import replayed_graph
import torch

import genengine
from genengine import Engine, paths, schedules, solvers

FLOW, VP = paths.RectifiedFlow(), paths.VPLinear()
SHAPE = (3, 2, 4, 4)
GRID = schedules.uniform(5, t_max=0.99, t_min=0.01)


@pytest.fixture(autouse=True)
def graphs():
    """Every run here is captured by the stand-in."""
    with replayed_graph.using() as made:
        yield made


def denoiser(x, t, y=None, gain=0.3):
    column = lambda v: v.reshape(-1, 1, 1, 1).to(x.dtype)  # noqa: E731
    y = torch.zeros_like(t) if y is None else y
    return torch.tanh(gain * x + column(t) + 0.1 * column(y))


def guided(k=1.0):
    y = k + torch.arange(3.0)
    return {"cond": {"y": y}, "uncond": {"y": torch.zeros(3)}}


def agree(engine, table, *args, **kwargs):
    """The engine's x, equal to that of `sample` uncaptured."""
    found = engine.sample(table, *args, **kwargs)
    expected = genengine.sample(engine.denoiser, table, *args, capture="never", **kwargs)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
    return found


@pytest.mark.parametrize("capture", ["loop", "step"])
@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc"])
def test_replays_are_right_for_other_seeds_guidance_labels_and_tables(name, capture, graphs):
    engine = Engine(denoiser, capture=capture)
    for seed, guidance in ((1, 2.0), (2, torch.tensor([1.0, 2.0, 3.0])), (2**63 + 5, 0.5), (3, torch.zeros(3))):
        table = solvers.SOLVERS[name](VP, GRID, prediction="eps")
        agree(engine, table, SHAPE, seed=seed, guidance=guidance, **guided(seed % 7))
        agree(engine, table, SHAPE, seed=torch.tensor([seed % 9, 4, 5]), guidance=guidance, **guided(2))
    shifted = solvers.SOLVERS[name](paths.Cosine(), GRID**1.2, prediction="eps")
    agree(engine, shifted, SHAPE, guidance=1.5, sample_ids=torch.tensor([7, 1, 2**31]), **guided())
    assert len(graphs) == engine.stats.captures == 2  # with one guidance for all, and with one for each
    assert engine.stats.replays == engine.stats.runs == 9
