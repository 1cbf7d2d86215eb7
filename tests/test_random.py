"""The noise specification itself: known answers, moments, goodness of fit, and that no two streams meet."""

import numpy as np
import pytest

from genengine import random

ONES = 0xFFFFFFFF
# Philox-4x32-10 known-answer vectors published with Random123 (Salmon et al. 2011): counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert tuple(random.philox(np.array(counter, dtype=np.uint32), key)) == words


def test_uniform_is_strictly_inside_the_unit_interval():
    extremes = random._unit(np.array([0, ONES], dtype=np.uint32))
    assert extremes[0] == np.float32(2.0**-24) and extremes[1] == np.float32(1 - 2.0**-24)


def test_log_and_sincos_are_accurate():
    u = random.uniform(1 << 16, seed=3)
    exact = u.astype(np.float64)
    assert np.abs(random.log_unit(u) / np.log(exact) - 1).max() < 3e-7
    s, c = random.sincos_turn(u)
    assert np.abs(s - np.sin(2 * np.pi * exact)).max() < 2e-7
    assert np.abs(c - np.cos(2 * np.pi * exact)).max() < 2e-7


def test_element_does_not_depend_on_the_count():
    long = random.normal(1001, seed=9, sample=4, step=2, stream="step")
    for count in (1, 2, 3, 4, 5, 63, 1000):
        assert np.array_equal(random.normal(count, seed=9, sample=4, step=2, stream="step"), long[:count])


def test_streams_steps_samples_and_seeds_do_not_overlap():
    """All counters and keys differ, so among 24 draws of 4,096 words a repeat would be a 1-in-2^128 accident."""
    draws = [
        random.words(4096, seed=seed, sample=sample, step=step, stream=stream)
        for seed in (0, 1, 1 << 32)
        for sample in (0, 1)
        for step in (0, 1)
        for stream in ("init", "step")
    ]
    quads = np.concatenate(draws)
    assert len(np.unique(quads, axis=0)) == len(quads)


def test_streams_have_distinct_numbers():
    assert len(set(random.STREAMS.values())) == len(random.STREAMS)
    assert random.stream_id("reparameterize") == 2
    with pytest.raises(ValueError, match="stream must be one of init, step"):
        random.stream_id("noise")
    with pytest.raises(ValueError, match="stream must be in"):
        random.stream_id(-1)
