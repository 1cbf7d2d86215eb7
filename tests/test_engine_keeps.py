"""Engines with extensions, what an engine keeps and evicts, and what happens when something goes wrong."""

import copy
import pickle
import threading
from dataclasses import dataclass

import pytest
import replayed_graph
import torch
from engine_support import FLOW, GRID, SHAPE, VP, agree, denoiser, guided

import genengine
from genengine import Engine, extensions, solvers
from genengine.extensions import Extension

pytestmark = pytest.mark.usefixtures("graphs")
EULER = solvers.euler(FLOW, GRID, prediction="velocity")
DDPM = solvers.ddpm(VP, GRID, prediction="eps", clip=1.0)


# ---- extensions ----------------------------------------------------------------------------------------------------


def inpaint(noise):
    return extensions.Inpaint((torch.rand(4, 4) > 0.5).float(), torch.rand(SHAPE), VP, noise)


CASES = {
    "rescale": lambda: (extensions.Rescale(),),
    "zero star": lambda: (extensions.CFGZeroStar(),),
    "per channel": lambda: (extensions.PerChannelGuidance(torch.rand(3, 2)),),
    "threshold": lambda: (extensions.DynamicThreshold(0.9),),
    "inpaint": lambda: (inpaint("fixed"),),
    "inpaint by row": lambda: (inpaint("row"),),
    "langevin": lambda: (extensions.Langevin(VP, "eps"),),
    "several": lambda: (extensions.Rescale(), inpaint("fixed"), extensions.DynamicThreshold(0.9)),
}


@pytest.mark.parametrize("capture", ["loop", "step"])
@pytest.mark.parametrize("name", CASES)
def test_extensions_start_anew_and_their_rows_are_replayed(name, capture, graphs):
    engine = Engine(denoiser, capture=capture)
    for seed in (1, 2, 3):
        agree(engine, DDPM, SHAPE, seed=seed, guidance=1.0 + seed, extensions=CASES[name](), **guided(seed))
    assert len(graphs) == 1 and engine.stats.captures == 1


def test_other_options_of_an_extension_are_another_form(graphs):
    engine = Engine(denoiser)
    for phi in (0.2, 0.7, 0.2):
        agree(engine, DDPM, SHAPE, extensions=(extensions.Rescale(phi),), guidance=2.0, **guided())
    agree(engine, DDPM, SHAPE, guidance=2.0, **guided())
    assert len(graphs) == 3 and graphs[0].replays == 2


def test_a_mask_of_another_shape_or_other_times_are_captured_anew(graphs):
    engine = Engine(denoiser)
    for shape in ((4, 4), (3, 1, 4, 4), (4, 4)):
        agree(engine, DDPM, SHAPE, extensions=(extensions.Inpaint(torch.ones(shape), torch.rand(SHAPE), VP),))
    assert len(graphs) == 2
    for power in (1.0, 1.3):  # alpha of its corrections stays on the host
        table = solvers.ddpm(VP, GRID**power, prediction="eps")
        agree(engine, table, SHAPE, extensions=(extensions.Langevin(VP, "eps"),))
    assert len(graphs) == 4


@dataclass
class Momentum(Extension):
    """Keeps a running mean of the outputs, in tensors that its hook binds anew or writes in place."""

    rate: float = 0.5
    bind: bool = True

    def start(self, run):
        self._kept = {"mean": run.buffer().zero_()}

    def before_row(self, run, outputs):
        mean = self.rate * self._kept["mean"] + (1 - self.rate) * outputs[-1]
        if self.bind:
            self._kept["mean"] = mean
        else:
            self._kept["mean"].copy_(mean)
        return (*outputs[:-1], mean)


@pytest.mark.parametrize(("bind", "capture"), [(True, "loop"), (False, "loop"), (False, "step")])
def test_an_extension_s_state_starts_anew_after_the_warm_up_and_for_every_run(bind, capture, graphs):
    engine = Engine(denoiser, capture=capture)
    for seed in (1, 2, 3):
        agree(engine, EULER, SHAPE, seed=seed, extensions=(Momentum(0.5, bind),))
    assert len(graphs) == 1


@dataclass
class Halves(Extension):
    """Has views of its own buffer, of the state, and of a tensor that it shares with others."""

    weight: torch.Tensor

    def start(self, run):
        self._kept, self._x = run.buffer().zero_(), run.x[:, 1:]
        self._first, self._again = self._kept[:, :1], [self._kept]

    def after_row(self, run):
        self._first.add_(self.weight)
        self._x.add_(self._again[0][:, 1:] + self._kept[:, :1])


def test_views_of_one_memory_stay_such(graphs):
    engine = Engine(denoiser)
    for _ in range(3):
        weight = torch.rand(3, 1, 4, 4)
        agree(engine, EULER, SHAPE, extensions=(Halves(weight), Halves(weight)))
    assert len(graphs) == 1
    agree(engine, EULER, SHAPE, extensions=(Halves(weight), Halves(weight + 1)))
    assert len(graphs) == 2


class Reader(Extension):
    """Decides by the table on the host, in every row."""

    def after_row(self, run):
        run.x.mul_(float(run.table.t_model.mean()))


def test_a_row_that_looks_at_the_host_s_table_is_captured_for_every_table(graphs):
    engine = Engine(denoiser)
    for power in (1.0, 1.0, 1.5):
        agree(engine, solvers.euler(FLOW, GRID**power, prediction="velocity"), SHAPE, extensions=(Reader(),))
    assert len(graphs) == 2 and graphs[0].replays == 2


class Counter(Extension):
    """A number on the host that is another in every run."""

    count = 0

    def start(self, run):
        Counter.count += 1
        self._by = Counter.count

    def after_row(self, run):
        run.x.mul_(self._by)


def test_host_values_of_an_extension_that_change_are_captured_anew(graphs):
    engine = Engine(denoiser)
    for _ in range(2):
        Counter.count = 0
        engine.sample(EULER, SHAPE, extensions=(Counter(),))  # the warm-up starts it once more
        Counter.count = 1
        expected = genengine.sample(denoiser, EULER, SHAPE, capture="never", extensions=(Counter(),))
        Counter.count = 0
    Counter.count = 1
    assert torch.equal(engine.sample(EULER, SHAPE, extensions=(Counter(),)), expected)  # 2 was captured last
    assert len(graphs) >= 2


@dataclass(slots=True)
class Slots(Extension):
    factor: float
    offset: torch.Tensor

    def after_row(self, run):
        run.x.mul_(self.factor).add_(self.offset)


class Hidden(Extension):
    __slots__ = ("__factor",)

    def __init__(self, factor):
        self.__factor = factor

    def after_row(self, run):
        run.x.mul_(self.__factor)


def test_an_extension_with_slots_has_attributes_too(graphs):
    engine = Engine(denoiser)
    for factor in (0.9, 0.9, 0.8):
        agree(engine, EULER, SHAPE, extensions=(Slots(factor, torch.rand(SHAPE)),))
        agree(engine, EULER, SHAPE, extensions=(Hidden(factor),))
    assert len(graphs) == 4


# ---- bounds --------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_form_goes_first(graphs):
    engine = Engine(denoiser, max_graphs=2)
    for batch in (1, 2, 1, 3):
        agree(engine, EULER, (batch, 2, 4, 4))
    assert engine.stats.evictions == 1 and len(graphs) == 3
    assert [graph.calls is None for graph in graphs] == [False, True, False]
    agree(engine, EULER, (1, 2, 4, 4))
    assert len(graphs) == 3
    agree(engine, EULER, (2, 2, 4, 4))
    assert len(graphs) == 4 and engine.stats.graphs == 2


def test_the_bound_counts_buffers_and_graphs_and_the_last_form_stays(graphs):
    engine = Engine(denoiser)
    agree(engine, EULER, SHAPE)
    one = engine.stats.bytes
    x_alone = 4 * 3 * 2 * 4 * 4
    assert one > graphs[0].nbytes + 2 * x_alone
    bounded = Engine(denoiser, max_bytes=2 * one)
    for guidance in range(4):
        agree(bounded, EULER, SHAPE, cond={"gain": float(guidance)})
        assert bounded.stats.bytes <= 2 * one
    assert bounded.stats.evictions > 0
    none = Engine(denoiser, max_bytes=0)
    agree(none, EULER, SHAPE)
    agree(none, EULER, SHAPE)
    assert none.stats.graphs == 1 and none.stats.captures == 1


def test_clear_stats_and_repr(graphs):
    engine = Engine(denoiser, max_graphs=3, max_bytes=2**20)
    agree(engine, EULER, SHAPE)
    agree(engine, EULER, SHAPE)
    text = repr(engine)
    assert text.startswith(
        "Engine(denoiser, capture='auto': 1 of 3 forms, 1 graphs, 0.0 of 1.0 MiB; 2 runs, 1 captures"
    )
    stats = engine.stats
    stats.runs = 100
    assert engine.stats.runs == 2
    engine.clear()
    assert engine.stats.graphs == engine.stats.bytes == 0 and graphs[0].calls is None
    agree(engine, EULER, SHAPE)
    assert len(graphs) == 2


def test_a_copy_starts_with_nothing_captured(graphs):
    engine = Engine(torch.nn.Tanh(), max_graphs=3, capture="step")
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))):
        assert (other.max_graphs, other.max_bytes, other.capture) == (3, None, "step")
        assert isinstance(other.denoiser, torch.nn.Tanh) and other.denoiser is not engine.denoiser


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"denoiser": 3}, TypeError, "denoiser must be callable, got int"),
        ({"max_graphs": 0}, ValueError, "max_graphs must be an int >= 1, got 0"),
        ({"max_bytes": -1}, ValueError, "max_bytes must be an int >= 0, got -1"),
        ({"max_bytes": 0.5}, ValueError, "max_bytes must be an int >= 0, got 0.5"),
        ({"max_loop_rows": True}, ValueError, "max_loop_rows must be an int >= 0, got True"),
        ({"capture": "always"}, ValueError, "capture must be one of auto, loop, step, never, got 'always'"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        Engine(**({"denoiser": denoiser} | change))


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_denoiser_that_reads_the_device_cannot_be_captured_and_the_engine_goes_on(graphs):
    bad = [True]

    def model(x, t):
        return x * float(t[0]) if bad[0] else denoiser(x, t)

    engine = Engine(model)
    with pytest.raises(RuntimeError, match="not permitted when a stream is capturing"):
        engine.sample(EULER, SHAPE)
    assert engine.stats.graphs == 0 and engine.stats.bytes == 0
    bad[0] = False
    agree(engine, EULER, SHAPE)
    bad[0] = True
    agree(engine, EULER, SHAPE, check_finite=True)


def test_without_memory_the_other_forms_are_given_up(graphs):
    engine = Engine(denoiser)
    agree(engine, EULER, SHAPE)
    agree(engine, DDPM, SHAPE)
    replayed_graph.ReplayedGraph.fail_next.append(torch.OutOfMemoryError("full"))
    agree(engine, EULER, (2, 2, 4, 4))
    assert engine.stats.evictions == 2 and engine.stats.graphs == 1 and engine.stats.captures == 3
    replayed_graph.ReplayedGraph.fail_next += [torch.OutOfMemoryError("full")] * 2
    with pytest.raises(torch.OutOfMemoryError):
        engine.sample(EULER, (1, 2, 4, 4))
    assert engine.stats.graphs == 0
    agree(engine, EULER, SHAPE)


def test_what_fails_before_the_rows_leaves_no_half_of_a_run(graphs):
    class Scheduled:
        fail = False

        def for_schedule(self, t_rows, y):
            if self.fail:
                raise ValueError("not this one")
            sample, held = torch.arange(t_rows.shape[1]), (t_rows.clone(), y.clone())

            class Step:
                def __call__(self, x, row):
                    return denoiser(x, held[0][row.long(), sample], y=held[1])

                def update(self, t_rows, y):
                    held[0].copy_(t_rows)
                    held[1].copy_(y)
                    if Scheduled.fail:
                        raise ValueError("not this one")
                    return True

            return Step()

        def __call__(self, x, t, y):
            return denoiser(x, t, y)

    engine = Engine(Scheduled())
    agree(engine, EULER, SHAPE, cond={"y": torch.rand(3)})
    Scheduled.fail = True
    with pytest.raises(ValueError, match="not this one"):
        engine.sample(EULER, SHAPE, cond={"y": torch.rand(3)})
    Scheduled.fail = False
    agree(engine, EULER, SHAPE, cond={"y": torch.rand(3)})
    assert len(graphs) == 2
    with pytest.raises(ValueError, match="sample_ids must be"):
        engine.sample(EULER, SHAPE, cond={"y": torch.rand(3)}, sample_ids=torch.zeros(2, dtype=torch.int64))
    agree(engine, EULER, SHAPE, cond={"y": torch.rand(3)})
    assert len(graphs) == 2


def test_a_callback_may_raise_but_not_run_its_own_engine():
    engine = Engine(denoiser)

    def interrupt(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.sample(EULER, SHAPE, callback=interrupt)
    for call in (lambda info: engine.sample(EULER, SHAPE), lambda info: engine.clear()):
        with pytest.raises(RuntimeError, match="must not be called by its own callback or denoiser"):
            engine.sample(EULER, SHAPE, callback=call)
    agree(engine, EULER, SHAPE, seed=1)


def test_within_another_capture_it_uses_buffers_of_its_own(graphs):
    """Those of the engine may be evicted while the other graph lives."""
    engine, found = Engine(denoiser), []
    agree(engine, EULER, SHAPE, seed=1)
    before = engine.stats
    replayed_graph.ReplayedGraph(
        lambda: found.append(engine.sample(EULER, SHAPE, seed=1)), lambda: None, lambda: None
    )  # fmt: skip
    assert len(found) == 1 and engine.stats == before
    agree(engine, EULER, SHAPE, seed=2)
    assert engine.stats.captures == 1


def test_threads_take_turns(graphs):
    engine, errors = Engine(denoiser), []
    expected = [genengine.sample(denoiser, EULER, SHAPE, seed=seed, capture="never") for seed in range(4)]

    def work(seed):
        for _ in range(5):
            if not torch.equal(engine.sample(EULER, SHAPE, seed=seed), expected[seed]):
                errors.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(graphs) == 1 and engine.stats.runs == 20
