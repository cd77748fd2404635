import pytest

from benchmarks.data import draw_photographs
from benchmarks.photo_rate import make_train_runner, measure_cpu_rate
from benchmarks.photos import BEFORE, QUALITY, serve_rates_before

pytestmark = pytest.mark.integration


def test_earlier_code_is_measured():
    photographs = draw_photographs(4, QUALITY)
    with serve_rates_before(photographs) as measure_before:
        if measure_before is None:
            pytest.skip(f"git has no commit {BEFORE} here")
        rates = [measure_before() for _ in range(3)]
    # Pillow's resize alone takes longer than all that is done now.
    assert 0 < rates[-1] < measure_cpu_rate(make_train_runner(photographs * 5))
