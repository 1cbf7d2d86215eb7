"""Every example runs, and its result is right."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_your_own_model():
    module = load("your_own_model")
    x, y = module.main(4000)
    for label, centre in enumerate(module.CENTRES):
        cloud = x[y == label]
        assert (cloud.mean(0) - centre).abs().max() < 6 * module.WIDTH / 2000**0.5 + 0.01
        assert (cloud.std(0) / module.WIDTH - 1).abs().max() < 0.1


def test_diffusers_pipeline():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    pytest.importorskip("transformers", reason="diffusers' text-to-image pipelines need transformers")
    before, after = load("diffusers_pipeline").main()
    assert before.shape == (2, 3, 16, 16) and before.std() > 0.05 and (before - after).abs().max() < 1e-5


def test_k_diffusion_loop():
    module = load("k_diffusion_loop")
    results = module.main(4000)
    assert set(results) == {"sample_dpmpp_2m", "sample_heun, churned", "sample_dpmpp_3m_sde, philox"}
    for x in results.values():
        for centre in module.CENTRES:
            cloud = x[(x - centre).norm(dim=1) < 6 * module.WIDTH]
            assert abs(len(cloud) / 4000 - 0.5) < 0.05
            assert (cloud.mean(0) - centre).abs().max() < 6 * module.WIDTH / 2000**0.5 + 0.01
            assert (cloud.std(0) / module.WIDTH - 1).abs().max() < 0.1


def test_complete_digits():
    """The known half is kept, and the other is nearer to the digit's own than to that of the next one."""
    known, mask, completed = load("complete_digits").main(40, steps=10)
    kept, drawn = mask == 0, mask == 1
    assert (completed[..., kept] == known[..., kept]).all()
    distance = lambda others: (completed - others)[..., drawn].square().mean((1, 2))  # noqa: E731
    assert (distance(known) < distance(known.roll(1, 0))).float().mean() > 0.8


def test_bench_your_kernel():
    """The registered benchmark runs; the registered baseline is checked, timed with ours, at the registered shape."""
    from genengine.benchmarks import registry, suite

    adaln = registry.find("adaln")
    shapes, baselines = dict(adaln.shapes), list(adaln.baselines)
    try:
        report = load("bench_your_kernel").main(budget=0.02)
        assert [row["label"] for row in report["rows"]] == ["Llama 8B", "Llama 1B"]
        for row in report["rows"]:
            assert row["accuracy"]["error"] <= row["accuracy"]["allowed"] and set(row["ratios"]) == {"eager"}
        assert adaln.shapes["PixArt"] == (4, 1024, 1152)
        case = next(adaln.cases("cpu", shape=(2, 8, 16), dtypes=("float32",)))
        row = suite.time_one(adaln, case, suite.Options(budget=0.02, compile_modes=()))
        assert "affine layer_norm, per sample" in row["ratios"], row
    finally:
        del registry.ENTRIES["rms_norm"]
        for entry in registry.select("adaln"):
            entry.shapes.pop("PixArt", None)
        adaln.baselines[:] = baselines
        assert adaln.shapes == shapes


def test_every_example_is_tested():
    tested = Path(__file__).read_text()
    assert [p.stem for p in EXAMPLES.glob("*.py") if f'load("{p.stem}")' not in tested] == []


def test_fast_pixelcnn():
    module = load("fast_pixelcnn")
    drawn, expected = module.main(3)
    assert torch.equal(drawn.x, expected) and drawn.x.std() > 0.1
    with torch.no_grad():
        logits = module.network()(drawn.x, torch.arange(3))
    level = torch.round((drawn.x[:, 0] + 1) * 127.5).long()
    log_prob = torch.log_softmax(logits, 1).gather(1, level[:, None])[:, 0]
    torch.testing.assert_close(drawn.log_prob, log_prob, rtol=1e-4, atol=1e-4)
