import mmap
import threading
import time

import pytest

from ftkit.training.monitor import Meter

BIG = 256  # MiB

pytestmark = pytest.mark.alone


def allocate_and_free() -> None:
    """Take fresh pages from the system: an allocator might hand out what the process holds already."""
    with mmap.mmap(-1, BIG * 2**20) as block:
        block.write(b"x" * len(block))  # or it would not be resident
        time.sleep(0.1)


def test_memory_that_was_given_back_before_the_end_is_seen() -> None:
    before = Meter()
    with before:
        pass
    with Meter() as meter:
        allocate_and_free()
    assert meter.peak_rss_mib > before.peak_rss_mib + 0.9 * BIG


def test_memory_that_was_given_back_before_the_start_is_not() -> None:
    with Meter() as first:
        allocate_and_free()
    with Meter() as second:
        time.sleep(0.05)
    assert second.peak_rss_mib < first.peak_rss_mib - 0.5 * BIG


def test_a_meter_can_be_used_again_and_starts_anew() -> None:
    meter = Meter()
    with meter:
        allocate_and_free()
    first = meter.peak_rss_mib
    with meter:
        time.sleep(0.05)
    assert meter.peak_rss_mib < first - 0.5 * BIG
    with meter:
        allocate_and_free()
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
