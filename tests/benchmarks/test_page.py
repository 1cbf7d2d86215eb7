"""The page of a report: all that the report says is on it, escaped, in well-formed HTML that needs nothing else."""

import re
import sys
from html.parser import HTMLParser

import pytest
import report_support as made

from genengine.benchmarks import page, plots, results, sweeps, table

pytest.importorskip("matplotlib")
NASTY = """<script>alert("a & b")</script> | $x^2$ ' x="1.23456" id="p_1" url(#p) #d55e00"""
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Parsed(HTMLParser):
    """The elements of a page, with the text of each; raises AssertionError unless every tag is closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(attributes) == len(dict(attributes)), f"<{tag}> has an attribute twice: {attributes}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(" ".join(data.split()))

    def said(self, text):
        return any(text in part for part in self.texts)

    def values(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def every_kind():
    """A report with every kind of row."""
    hot = made.timings(1e-3, {"eager": 0.7, "torch.compile": 1.1, "copy_": 0.4})
    peer = {
        "eager": 2.0,
        "eager, in place": 1.4,
        "torch.compile": 1.0,
        "liger": 0.8,
        "fused, philox": 0.5,
        "copy_": 0.9,
    }
    return made.report([
        made.row("adaln", **made.costly(), accuracy={"error": 2.5e-6, "allowed": 8e-6, "of": "h"}),
        made.row("adaln", others=peer, label=NASTY, dtype="bfloat16",
                 goals=[{"goal": "liger / fused >= 1", "value": 0.8, "reached": False},
                        {"goal": "fused / copy_ <= 1.5", "value": 1.11, "reached": True}]),
        made.row("rows on a GPU", group="attention", device="cuda", hot=hot,
                 **made.costly(10**9, 10**10, 2e-3, "matrix products")),
        made.row(NASTY, group="<&\">", kind="peers", others={}, skipped={"<&\"> peer": "ImportError: no <b>peer</b>"}),
        made.failed("broken", "AssertionError: error 3 <b> exceeds & 2\nsecond line\nthird line", kind="models"),
        made.row("empty", kind="samplers", shape=(), others={"eager": 1.01}),
    ])  # fmt: skip


def test_a_page_says_everything_in_well_formed_html(tmp_path):
    report = every_kind()
    path = page.write(report, tmp_path / "new" / "page.html")
    text = path.read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert list(path.parent.iterdir()) == [path] and text.startswith("<!DOCTYPE html>")
    for said in (
        "5 rows timed, 1 failed; of 9 comparisons with others 6 show a gain and 1 a loss.", NASTY, '<&">',
        "2026-01-02 03:04 UTC", "0123456789ab, clean", "MALLOC_MMAP_THRESHOLD_ 1073741824", "matrix product, bfloat16",
        "3.00×", "2.70 – 3.60", "2 ms", "1.8 ms – 2.4 ms", "19 GB/s", "5 TFLOP/s", "50 %", "2.5e-06", "/ 8e-06",
        "liger / fused >= 1: 0.8", "reached", "missed", "ImportError: no <b>peer</b>", "AssertionError: error 3 <b>",
        "second line third line", "broken", "0.70×", "cold", "hot", "genengine bench ops --device cpu",
        "docs/reading_the_report.md",
    ):  # fmt: skip
        assert parsed.said(said), said
    assert "alert(" not in "".join(re.findall(r"<script>(.*?)</script>", text, re.DOTALL))
    ids = parsed.values("id")
    assert len(ids) == len(set(ids)) and {f"row-{number}" for number in range(1, 7)} <= set(ids)
    drawn = "".join(parsed.values("clip-path")) + "".join(parsed.values("style"))
    for reference in (*parsed.values("href"), *re.findall(r"url\(([^)]*)\)", drawn)):
        assert reference.startswith("#") and reference[1:] in ids, reference


def test_a_page_needs_no_network():
    text = page.render(every_kind())
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"(?m)^// .*$", "", text)), "an address"
    assert "@import" not in text and "src=" not in text


def test_losses_are_as_visible_as_gains():
    parsed = Parsed(page.render(every_kind()))
    cells = [attributes.get("class") for tag, attributes in parsed.elements if tag == "td"]
    assert cells.count("gain") == 6 + 1 and cells.count("loss") == 1 + 1  # + hot, torch.compile and eager
    rows = {a["id"]: a.get("class") for tag, a in parsed.elements if tag == "tr" and "id" in a}
    assert rows["row-2"] == "lost" and rows["row-5"] == "failed" and rows["row-1"] is rows["row-6"] is None
    assert parsed.said("Losses")
    without = Parsed(page.render(made.report([made.row()])))
    assert not without.said("Losses")


def test_yardsticks_and_our_own_variants_do_not_compete():
    count = table.tally(made.report([made.row(others={"copy_": 0.1, "fused, philox": 0.2, "setup of x": 9.0})]))
    assert (count.gains, count.losses, count.even) == (0, 0, 0)
    kinds = table.is_pytorch, table.is_compiled, table.is_peer, table.is_ours, table.is_yardstick
    names = ("eager, in place", "torch, math", "torch.randn", "torch.compile, max-autotune", "liger", "fused, philox",
             "copy_ of q and k")  # fmt: skip
    found = [[kind(name) for kind in kinds] for name in names]
    assert [one.index(True) for one in found] == [0, 0, 0, 1, 2, 3, 4] and all(sum(one) == 1 for one in found)
    count = table.tally(every_kind())
    assert (count.timed, count.failed, count.reached, count.goals) == (5, 1, 1, 2)
    assert (count.gains, count.losses, count.even) == (6, 1, 2)


def test_every_plot_is_there_and_nothing_of_it_is_lost():
    sweep = [
        made.row(label=f"batch {n}", shape=(n, 256, 64), seconds=n * 1e-4, **made.costly(n * 10**6, n * 2 * 10**6))
        for n in (2, 4, 8, 16)
    ]
    drawn = {section.heading: section for section in plots.sections(made.report(sweep, sweep="batch"))}
    assert list(drawn) == ["Roofline", "Speed-up", "Scaling"]
    assert [len(section.drawn) for section in drawn.values()] == [1, 1, 1]
    roofline, bars, scaling = (Parsed(section.drawn[0]) for section in drawn.values())
    assert [f"#row-{number}" in roofline.values("href") for number in range(6)] == [False, *[True] * 4, False]
    assert roofline.said("products in float32, 180 G/s") and roofline.said("exponentials, 3 G/s")
    assert roofline.said("3: adaln, batch 8 (8x256x64), float32: ")
    assert bars.said("3.00×") and bars.said("eager") and bars.said("torch.compile") and not bars.said("copy_")
    assert scaling.said("adaln, float32, batch × 256 × 64") and scaling.said("copy_") and scaling.said("16")


def batches(sizes=(1, 4, 16), published=True, **changes):
    """A sweep whose naive variant takes 100 and 150, 300 times as long as ours, and a cached one a tenth of that."""
    curve = {"label": "A paper & co, 2017", "axis": "batch", "over": "eager, naive", "speedups": {"1": 2.0, "8": 10.0}}
    rows = []
    for size, ratio in zip(sizes, (100.0, 150.0, 300.0), strict=True):
        others = {"eager, naive": ratio, "eager, cached": ratio / 10, "copy_": 0.5, "fused, wide": size / 4}
        more = {"published": [curve]} if published else {}
        more |= {"repeats": {"eager, naive": 784}, "ns_per_element": 2000.0 if size == 4 else 1500.0}
        rows.append(made.row(label=f"batch {size}", shape=(size, 7), others=others, **more, **changes))
    return rows


def test_a_published_curve_stands_beside_ours():
    report = made.report(batches())
    (found,) = sweeps.comparisons(sweeps.timed(report))
    assert (found.axis, found.over, found.sizes) == ("batch", "eager, naive", [1, 4, 8, 16])
    curves = {curve.label: (curve.speedups, curve.published) for curve in found.curves}
    assert curves == {
        "fused": ({1: 100, 4: 150, 16: 300}, False),
        "eager, cached": ({size: pytest.approx(10) for size in (1, 4, 16)}, False),
        "fused, wide": ({1: 400, 4: 150, 16: 75}, False),
        "A paper & co, 2017": ({1: 2, 8: 10}, True),
    }
    (section,) = (s for s in plots.sections(report) if s.heading == "Beside published figures")
    drawn = Parsed(section.drawn[0])
    assert drawn.said("adaln, float32: speed-up over eager, naive") and drawn.said("published: A paper & co, 2017")
    assert all(drawn.said(f"{value}×") for value in (100, 300, 2, 10)) and not drawn.said("copy_")
    assert "stroke-dasharray" in section.drawn[0] and "other hardware" in section.caption
    shown = Parsed(page.render(report))
    assert shown.said("784 passes, one timed") and shown.said("Beside published figures")


def test_a_published_curve_needs_a_sweep_of_its_axis_against_its_baseline():
    def found(rows):
        return sweeps.comparisons(list(enumerate(rows, 1)))

    assert not found(batches(published=False)) and not found(batches()[:1])
    assert not found([row | {"label": row["label"].replace("batch", "size")} for row in batches()])
    assert not found([row | {"ratios": {"copy_": row["ratios"]["copy_"]}} for row in batches()])
    one_without = batches()
    del one_without[1]["ratios"]["eager, naive"]
    (comparison,) = found(one_without)
    assert comparison.curves[0].speedups == {1: 100, 16: 300}


def test_the_terminal_shows_growth_and_published_figures():
    assert sweeps.lines(made.report(batches())) == [
        "adaln, float32, per element by batch: 1.5 us at 1, 2 us at 4, 1.5 us at 16; largest over smallest 1.33",
        "adaln, float32, fused / fused, wide by batch: 4.00 at 1, 1.00 at 4, 0.25 at 16",
        "adaln, float32: speed-up over eager, naive",
        "    batch                            1    4   8   16",
        "    fused                          100  150      300",
        "    eager, cached                   10   10       10",
        "    fused, wide                    400  150       75",
        "    A paper & co, 2017, published    2       10",
        "    published: on other hardware, of the paper's own network, against its own baseline",
    ]
    assert sweeps.lines(made.report([made.row()])) == []
    costly = [row | made.costly(flops=1000 * row["shape"][0], seconds=row["shape"][0]) for row in batches()]
    costly[1]["TFLOP_per_s"] /= 1.1
    assert sweeps.growths([*enumerate(costly)])[0].endswith("largest over smallest 1.33, per operation 1.10")


def test_a_loss_is_named_in_the_bars():
    (section,) = plots.sections(made.report([made.row(others={"eager": 0.6, "liger": 1.2, "quack": 1.1})]))
    bars = Parsed(section.drawn[0])
    assert bars.said("0.60× loss") and bars.said("1.10×") and bars.said("quack") and not bars.said("liger")
    assert "var(--red)" in section.drawn[0] and "var(--purple)" in section.drawn[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (12.34, "12.3"), (999.4, "999"), (999.6, "1,000"), (4812.3, "4,812"), (1e7, "10,000,000")],
)
def test_figures_of_a_gpu_have_no_exponents(value, text):
    assert table.figure(value) == text
    assert table.duration(value * 1e-6).endswith(" us") == (1 <= value < 1000)


def test_groups_with_few_rows_share_a_figure_and_many_rows_take_several():
    def titles(*groups):
        rows = [made.row(group=name, kind=kind) for name, kind, count in groups for _ in range(count)]
        return [re.search('aria-label="speed-up, ([^"]*)"', drawn)[1] for drawn in plots.speedups([*enumerate(rows)])]

    most = plots.ROWS_PER_FIGURE
    assert titles(("a", "ops", 1), ("b", "ops", most - 1), ("c", "ops", 1)) == ["a, b", "c"]
    assert titles(("a", "models", 1), ("b", "ops", 1), ("c", "models", 1)) == ["b", "a, c"]
    assert titles(("a", "ops", 2 * most + 1), ("b", "ops", 1)) == ["a, 1 of 3", "a, 2 of 3", "a, 3 of 3", "b"]


def test_rows_that_only_look_like_a_sweep_are_none():
    def found(*rows):
        return sweeps.sweeps(list(enumerate(rows, 1)))

    two = made.row(label="batch 2", shape=(2, 8)), made.row(label="batch 4", shape=(4, 8))
    assert list(found(*two)) == [("adaln", "float32", "cpu", "batch")]
    assert found(two[0]) == {}
    assert found(two[0], made.row(label="batch 4", shape=(4, 9))) == {}  # two dimensions differ
    assert found(two[0], made.row(label="batch 4", shape=(5, 8))) == {}  # another size than the label says
    assert found(two[0], made.row(label="batch 4", shape=(4, 8), dtype="bfloat16")) == {}
    assert found(two[0], made.row(label="SDXL, batch 4", shape=(4, 8))) == {}


def test_three_hundred_rows_stay_below_two_megabytes():
    others = {"eager, as written": 3.0, "eager, in place": 2.0, "torch.compile": 1.5, "liger": 0.9, "copy_": 0.5}
    rows = [
        made.row(
            f"benchmark {n % 40}", group=f"op {n % 20}", others=others, label=f"model {n}", **made.costly(10**7 + n)
        )
        for n in range(300)
    ]
    text = page.render(made.report(rows))
    assert text.count('<tr id="row-') == 300 and len(text.encode()) < 2_000_000


@pytest.mark.parametrize("rows", [[], [made.failed("broken", "ValueError: no")], [made.row(others={})]])
def test_a_report_without_ceilings_or_costs(rows):
    report = made.report(rows, ceilings=None, environment={"commit": None, "dirty": True})
    parsed = Parsed(page.render(report))
    assert parsed.said("None were measured") and parsed.said("There is nothing to draw")
    assert parsed.said("none, with uncommitted changes")
    with_ceilings = Parsed(page.render(made.report(rows)))
    assert with_ceilings.said("13 GB/s") or with_ceilings.said("GB/s, by bytes moved")


def test_a_ceiling_that_was_not_measured_says_why():
    ceilings = made.CEILINGS | {"exps": None, "missing": {"exps": "RuntimeError: no compiler"}}
    parsed = Parsed(page.render(made.report([made.row()], ceilings=ceilings)))
    assert parsed.said("RuntimeError: no compiler") and not parsed.said("exponentials,")


def test_clocks_and_power_of_a_gpu_are_told():
    gpu = {"name": "H", "driver_version": "580.1", "clocks.sm": "1980 MHz", "power.limit": "700.00 W"}
    facts = dict(page.facts_of(made.report([], environment={"gpu": gpu, "device": "H", "l2_bytes": 52428800})))
    assert facts["driver version"] == "580.1" and facts["clocks sm"] == "1980 MHz" and facts["l2 bytes"] == "52428800"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "genengine bench ops --device cpu"),
        ({"shape": [8, 16], "dtypes": ["bfloat16", "float32"]}, "--shape 8,16 --dtype bfloat16,float32"),
        ({"compile_modes": []}, "--compile none"),
        ({"compile_modes": ["default", "max-autotune"], "budget": 0.5}, "--compile default,max-autotune --budget 0.5"),
        ({"sweep": "batch", "device": "cuda"}, "--sweep batch --device cuda"),
    ],
)
def test_the_command_is_one_that_the_parser_reads_back(options, expected):
    from genengine import cli
    from genengine.cli import _bench

    command = table.command(made.report([], **options))
    assert expected in command
    read = _bench._suite_options(cli._parser().parse_args(command.split()[1:]))
    wanted = made.report([], **options)["options"]
    assert list(read.shape or []) == (wanted["shape"] or []) and list(read.dtypes) == wanted["dtypes"]
    assert (list(read.compile_modes), read.budget, read.sweep) == (
        wanted["compile_modes"], wanted["budget"], wanted["sweep"],
    )  # fmt: skip


def test_without_matplotlib_nothing_is_written_and_the_remedy_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=re.escape("pip install 'genengine[plot]'")) as caught:
        page.write(every_kind(), tmp_path / "page.html")
    assert isinstance(caught.value.__cause__, ImportError) and list(tmp_path.iterdir()) == []


def test_the_commands_write_pages(tmp_path, capsys, monkeypatch):
    from genengine import cli

    stored = results.save(every_kind(), tmp_path / "result.json")
    html, markdown = tmp_path / "a.html", tmp_path / "a.md"
    assert cli.main(["report", str(stored), "--html", str(html), "--markdown", str(markdown)]) == 0
    assert capsys.readouterr().out == "" and html.read_text().count('<tr id="row-') == 6
    assert markdown.read_text().startswith("| work |") and markdown.read_text().count("\n") == 8
    assert cli.main(["report", str(stored)]) == 0
    out = capsys.readouterr().out
    assert "5 rows timed, 1 failed" in out and "broken" in out and "0.80x (0.72-0.96) LOSS" in out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "adaln", "--html", str(html)]) == 2  # before anything is timed
    assert "genengine[plot]" in capsys.readouterr().err
    (tmp_path / "result.json").write_text('{"schema_version": 1}')
    assert cli.main(["report", str(stored), "--html", str(html)]) == 2
    assert "schema version 1" in capsys.readouterr().err


def test_names_survive_as_they_are():
    (section,) = plots.sections(made.report([made.row("a", label=NASTY[-47:], shape=())], ceilings=None))
    assert any(NASTY[-47:] in text for text in Parsed(section.drawn[0]).texts)
    parsed = Parsed(page.render(every_kind()))
    assert sum(NASTY in text for text in parsed.texts) == 3  # a loss, two rows
    assert table.markdown(every_kind()).replace("\\|", "").count("|") == 8 * 8  # eight lines of six cells


def test_failed_rows_and_losses_are_listed_and_many_fold_away():
    rows = [made.row(f"slow {n}", others={"eager": 0.5 + 0.01 * n}) for n in range(15)]
    parsed = Parsed(page.render(made.report([*rows, made.failed("broken", "ValueError: <no>\nmore")], ceilings=None)))
    assert parsed.said("3 more") and parsed.texts.index("0.50") < parsed.texts.index("0.64")
    assert parsed.texts[parsed.texts.index("Failed") + 1] == "broken" and parsed.said(": ValueError: <no>")
