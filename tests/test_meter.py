import threading
import time

import numpy as np
import pytest

from ftkit.meter import Meter

BIG = 256  # MiB


def allocate() -> np.ndarray:
    block = np.ones(BIG * 2**20, dtype=np.uint8)  # written to, or it would not be resident
    time.sleep(0.1)
    return block


def test_memory_that_was_given_back_before_the_end_is_seen() -> None:
    before = Meter()
    with before:
        pass
    with Meter() as meter:
        block = allocate()
        del block
    assert meter.peak_rss_mib > before.peak_rss_mib + 0.9 * BIG


def test_memory_that_was_given_back_before_the_start_is_not() -> None:
    with Meter() as first:
        block = allocate()
        del block
    with Meter() as second:
        time.sleep(0.05)
    assert second.peak_rss_mib < first.peak_rss_mib - 0.5 * BIG


def test_a_meter_can_be_used_again_and_starts_anew() -> None:
    meter = Meter()
    with meter:
        block = allocate()
        del block
    first = meter.peak_rss_mib
    with meter:
        time.sleep(0.05)
    assert meter.peak_rss_mib < first - 0.5 * BIG
    with meter:
        block = allocate()
        del block
    assert meter.peak_rss_mib > first - 0.5 * BIG


def test_seconds_are_those_of_the_block() -> None:
    outer = time.perf_counter()
    with Meter() as meter:
        inner = time.perf_counter()
        time.sleep(0.05)
        inner = time.perf_counter() - inner
    assert inner <= meter.seconds <= time.perf_counter() - outer


def test_an_error_passes_and_the_thread_ends() -> None:
    threads = threading.active_count()
    meter = Meter()
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert threading.active_count() == threads
    assert meter.seconds > 0
    assert meter.peak_rss_mib > 0
