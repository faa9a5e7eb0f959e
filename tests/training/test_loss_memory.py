"""The contrastive loss keeps no [N, N] and no [b, N]: its peak memory, a quarter of the full-size bounds.

`python -m benchmarks.itc_loss_memory` measures the full sizes: N = 32,768 with b = 1024 under 450 MB, N = b = 16,384
under 700 MB.
"""

from __future__ import annotations

import sys

import pytest

from benchmarks.itc_loss_memory import Case, measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")


def test_one_rank_of_many():
    """32 ranks; the gathered features alone are 67 MB, one [b, N] is 8 MB."""
    row = measure(Case("grouped", 8192, 256))
    assert row["gathered_bytes"] == 67_108_864 < row["peak_bytes"] < 450e6 / 4


def test_many_rows_on_one_rank():
    """One [N, N] would be 67 MB, and autograd's way keeps several."""
    assert 0 < measure(Case("grouped", 4096, 4096))["peak_bytes"] < 700e6 / 4


def test_the_measurement_sees_what_others_keep():
    assert measure(Case("local", 8192, 256))["peak_bytes"] > 450e6 / 4
