"""Families that sample by the loop keep an engine where there are graphs: the same images, captured once."""

import copy
import pickle

import pytest
import torch

from genengine.models.ddpm import DDPM
from genengine.models.flow import FlowMatching

NET = {"name": "dit", "config": "tiny", "depth": 1, "dim": 32, "num_classes": 3}


def build(name):
    learned = {"net": NET | {"learn_sigma": True}, "variance": "learned", "prediction": "x0"}
    configs = {
        "flow": (FlowMatching, {"net": NET}),
        "ddpm": (DDPM, {"net": NET, "prediction": "v"}),
        "learned": (DDPM, learned),
    }
    family, config = configs[name]
    model = family.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("name", ["flow", "ddpm", "learned"])
def test_samples_are_the_same_and_captured_once(name, request):
    model, solver = build(name), "euler"
    calls = [
        {"labels": labels, "seed": seed, "steps": steps, "guidance": 1.5, "solver": solver}
        for seed, labels, steps in ((1, [0, 1, 2], 6), (2, [2, 1, 0], 4), (3, [1, 1, 2], 6))
    ]
    expected = [model.sample(3, **call) for call in calls]
    assert not model._engines
    graphs = request.getfixturevalue("graphs")
    for call, x in zip(calls, expected, strict=True):
        assert torch.equal(model.sample(3, **call), x)
    assert len(graphs) == 1
    assert torch.equal(model.sample(3, **calls[0], check_finite=True), expected[0])
    seen = []
    assert torch.equal(model.sample(3, **calls[0], callback=lambda info: seen.append(info.row)), expected[0])
    assert len(graphs) == 1 and len(seen) == 6
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.sample(3, **calls[1]), expected[1])
    for free in (model.train, lambda: model.to("cpu")):
        assert len(model._engines) == 1
        free()
        assert not model._engines and torch.equal(model.sample(3, **calls[2]), expected[2])
