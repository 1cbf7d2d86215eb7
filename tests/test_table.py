import numpy as np
import pytest

from genengine.table import (
    COLUMNS,
    CoefficientTable,
    Phi,
    Write,
    build_rows,
    pack_flags,
    unpack_flags,
)


def two_rows(**second):
    """A valid table: the first row stores y in H1, the second reads it."""
    first = {"t_model": 1.0, "q": 1.0, "a": 0.5, "b": 0.5, "flags": pack_flags(writes=(Write.Y,))}
    return CoefficientTable(build_rows([first, {"t_model": 0.5, "a": 1.0, "h1": 0.25} | second]), name="two")


def test_columns_are_the_agreed_order():
    assert ",".join(COLUMNS) == "t_model,g1,g2,p,q,r,a,b,c,h1,h2,h3,s,l,c_in,flags"


@pytest.mark.parametrize("phi", Phi)
@pytest.mark.parametrize("writes", [(0, 0, 0), (1, 0, 2), (2, 1, 0), (0, 2, 1), (2, 2, 2)])
def test_flags_round_trip(phi, writes):
    flags = pack_flags(phi, writes)
    assert flags == phi + 4 * writes[0] + 16 * writes[1] + 64 * writes[2]
    assert np.float32(flags) == flags
    assert unpack_flags(flags) == (phi, writes)


@pytest.mark.parametrize("flags", [0.5, -1.0, 3.0, 12.0, 48.0, 256.0, float("nan"), float("inf")])
def test_illegal_flags_are_refused(flags):
    with pytest.raises(ValueError):
        unpack_flags(flags)


def test_pack_flags_refuses():
    with pytest.raises(ValueError):
        pack_flags(3)
    with pytest.raises(ValueError):
        pack_flags(0, (3,))
    with pytest.raises(ValueError, match="at most 3"):
        pack_flags(0, (0, 0, 0, 1))


def test_build_rows_fills_defaults_and_refuses_unknown_columns():
    rows = build_rows([{"a": 2.0, "s": -0.0}])
    assert rows.shape == (1, 1, 16) and rows.dtype == np.float64
    assert {c: v for c, v in zip(COLUMNS, rows[0, 0], strict=True) if v} == {"a": 2.0, "c_in": 1.0}
    assert not np.signbit(rows).any()
    with pytest.raises(ValueError, match="row 1: unknown column 'alpha'"):
        build_rows([{}, {"alpha": 1.0}])


def test_properties():
    table = two_rows(s=0.1)
    assert (table.num_rows, table.batch, table.num_history, table.needs_noise) == (2, 1, 1, True)
    assert not two_rows().needs_noise
    assert two_rows(flags=pack_flags(writes=(0, 0, Write.X))).num_history == 3
    assert CoefficientTable(build_rows([{"a": 1.0}])).num_history == 0
    np.testing.assert_array_equal(table.t_model, [[1.0], [0.5]])
    assert table.validate() is table


@pytest.mark.parametrize(
    "second, message",
    [
        ({"a": np.nan}, r"row 1, sample 0, column a: expected a finite number, got nan"),
        ({"t_model": np.inf}, r"row 1, sample 0, column t_model: expected a finite number, got inf"),
        ({"flags": 3.0}, r"row 1, sample 0, column flags: .*got 3.0; use pack_flags"),
        ({"flags": 2.0**24}, r"column flags: .*below 2\^24"),
        ({"flags": 0.25}, r"column flags"),
        ({"flags": pack_flags(Phi.CLAMP)}, r"row 1, sample 0, column r: expected r > 0"),
        ({"flags": pack_flags(Phi.DYNAMIC_THRESHOLD), "r": -1.0}, r"column r: .*got -1.0"),
        ({"s": -0.5}, r"column s: expected s >= 0, got -0.5"),
        ({"l": 1.0}, r"column l: expected l = 0 where s = 0, got 1.0; l scales noise: set s"),
        ({"l": np.nan, "s": 1.0}, r"column l: expected a finite number"),
        ({"h2": 1.0}, r"row 1, sample 0, column h2: expected an earlier row that writes H2"),
        # written in the same row is too late: everything is read first
        ({"h2": 1.0, "flags": pack_flags(writes=(0, Write.X))}, r"column h2: expected an earlier row"),
    ],
)
def test_validate_names_the_place(second, message):
    with pytest.raises(ValueError, match=message):
        two_rows(**second).validate()


def test_validate_checks_history_of_each_sample():
    good = two_rows()
    bad = CoefficientTable(build_rows([{"a": 1.0}, {"h1": 1.0}]))
    with pytest.raises(ValueError, match="row 1, sample 1, column h1"):
        CoefficientTable.stack([good, bad]).validate()


@pytest.mark.parametrize(
    "table, message",
    [
        (CoefficientTable(np.zeros((1, 1, 16), np.float32)), "float64 array, got float32"),
        (CoefficientTable([[0.0]]), "float64 array, got list"),
        (CoefficientTable(np.zeros((3, 16))), r"\(R, B or 1, 16\).*got \(3, 16\)"),
        (CoefficientTable(np.zeros((0, 1, 16))), "R, B >= 1"),
        (CoefficientTable(build_rows([{}]), init_scale=np.nan), "init_scale must be a finite number"),
        (CoefficientTable(build_rows([{}]), first_c_in=np.ones(2)), "first_c_in must be a finite number or"),
    ],
)
def test_validate_checks_the_layout(table, message):
    with pytest.raises(ValueError, match=message):
        table.validate()


def test_describe_shows_what_matters():
    table = two_rows(s=0.125, r=2.0, flags=pack_flags(Phi.CLAMP, (Write.KEEP, Write.X))).with_guidance(7.5)
    header, names, first, second = table.describe().split("\n")
    assert header.startswith("two: nfe 2, guidance 7.5, noise in 1 of 2 rows, history 2")
    assert names.split()[:-2] == ["row", "t_model", "g1", "q", "r", "a", "b", "h1", "s"]
    assert first.split() == ["0", "1", "7.5", "1", "0", "0.5", "0.5", "0", "0", "H1<-y"]
    assert second.split() == ["1", "0.5", "7.5", "0", "2", "1", "0", "0.25", "0.125", "clamp,", "H2<-x"]
    assert len({len(line) for line in (names, first, second)}) == 1


def test_a_learned_variance_is_valid_where_there_is_noise_and_described():
    table = two_rows(s=0.5, l=-0.25).validate()
    assert table.learned_variance and not two_rows(s=0.5).learned_variance
    names, _, second = table.describe().split("\n")[1:]
    assert names.split()[-4:-2] == ["s", "l"] and second.split()[-3:-1] == ["0.5", "-0.25"]


def test_with_guidance_interval():
    """Half open, as in the paper: t_low is outside, t_high inside; the model's time counts."""
    rows = build_rows([{"t_model": t, "a": 1.0, "b": 0.1} for t in (0.9, 0.6, 0.4, 0.2)])
    table = CoefficientTable(rows).with_guidance(np.array([3.0, 5.0]), 0.5)
    inside = table.with_guidance_interval(0.2, 0.6)
    np.testing.assert_array_equal(inside.column("g1"), [[1, 1], [3, 5], [3, 5], [1, 1]])
    np.testing.assert_array_equal(inside.column("g2"), np.array([[0, 0.5, 0.5, 0]] * 2).T)
    np.testing.assert_array_equal(inside.rows[..., 3:], table.rows[..., 3:])
    assert np.all(table.column("g2") == 0.5), "the original is untouched"
    with pytest.raises(ValueError, match="with_guidance_interval: needs t_low < t_high, got 0.6 and 0.6"):
        table.with_guidance_interval(0.6, 0.6)


def test_describe_of_one_sample():
    table = two_rows().with_guidance(np.array([1.0, 3.0]))
    assert "guidance 3," in table.describe(sample=1) and "(sample 1 of 2)" in table.describe(sample=1)


def test_with_guidance():
    table = two_rows()
    assert table.with_guidance(2.0, 0.5).rows.shape == (2, 1, 16)
    assert np.all(table.column("g1") == 0), "the original is untouched"
    per_sample = table.with_guidance(np.array([1.0, 2.0, 3.0]), 0.5)
    assert per_sample.batch == 3
    np.testing.assert_array_equal(per_sample.column("g1"), [[1, 2, 3]] * 2)
    assert np.all(per_sample.column("g2") == 0.5)
    np.testing.assert_array_equal(per_sample.rows[:, 2, 3:], table.rows[:, 0, 3:])
    per_sample.validate()
    for bad in (np.ones((2, 2)), np.inf):
        with pytest.raises(ValueError, match="g1 must be a finite number or"):
            table.with_guidance(bad)
    with pytest.raises(ValueError, match="agree on one batch"):
        per_sample.with_guidance(np.ones(2))


def test_astype_float32_is_a_fresh_contiguous_array():
    table = two_rows()
    array = table.astype_float32()
    assert array.dtype == np.float32 and array.flags.c_contiguous and array.shape == (2, 1, 16)
    array[:] = 7
    assert table.rows[0, 0, 0] == 1.0


def test_stack_pads_with_identity_rows():
    short = CoefficientTable(build_rows([{"t_model": 0.3, "a": 0.1}]), 80.0, 0.5, "short")
    table = CoefficientTable.stack([two_rows().with_guidance(np.array([1.0, 2.0])), short]).validate()
    assert table.rows.shape == (2, 3, 16) and table.name == "two | short"
    np.testing.assert_array_equal(table.init_scale, [1, 1, 80])
    np.testing.assert_array_equal(table.first_c_in, [1, 1, 0.5])
    padding = dict(zip(COLUMNS, table.rows[1, 2], strict=True))
    assert {c: v for c, v in padding.items() if v} == {"t_model": 0.3, "a": 1.0, "c_in": 1.0}
    np.testing.assert_array_equal(table.rows[:, 1, 3:], two_rows().rows[:, 0, 3:])
    assert "init_scale 80" in table.describe(sample=2)
    with pytest.raises(ValueError, match="at least one table"):
        CoefficientTable.stack([])


def test_stack_of_one_table_can_still_get_per_sample_guidance():
    CoefficientTable.stack([two_rows()]).with_guidance(np.ones(4)).validate().describe(sample=3)


def test_noise_scale_and_read_only_rows():
    table = CoefficientTable(build_rows([{"a": 1.0, "s": 0.5}, {"a": 1.0, "s": 0.2}]))
    np.testing.assert_allclose(table.with_noise_scale(2.0).column("s")[:, 0], [1.0, 0.4])
    np.testing.assert_allclose(table.with_noise_scale(np.array([0.0, 1.0])).column("s")[:, 0], [0.0, 0.2])
    assert not table.with_noise_scale(0.0).needs_noise and table.needs_noise
    for scale in (-1.0, np.inf, np.ones(3)):
        with pytest.raises(ValueError, match="with_noise_scale: scale must be >= 0"):
            table.with_noise_scale(scale)
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0, 0, 0] = 2.0
    source = build_rows([{"a": 1.0}])
    table = CoefficientTable(source)
    source[...] = np.nan
    assert table.validate() is table.validate(), "the table has rows of its own"
