"""Ids of segments as colours: red lowest, and read back as they were; and what is a crowd."""

import numpy as np
import pytest

from proscale_hf.processing.segment_ids import crowd_flag, encode_ids


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_ids_are_colours(dtype):
    assert encode_ids(np.array([[1 + 2 * 256 + 3 * 65536, 0]], dtype=dtype)).tolist() == [[[1, 2, 3], [0, 0, 0]]]


def test_colours_hold_all_ids():
    ids = np.random.default_rng(0).integers(0, 256**3, (5, 6))
    colors = encode_ids(ids)
    assert colors.dtype == np.uint8 and np.array_equal(colors @ 256 ** np.arange(3), ids)


def test_crowds():
    for value in (0, 0.0, False, "0", np.int64(0), np.False_):
        assert crowd_flag(value) == 0
    for value in (1, 1.0, True, "1", np.uint8(1), np.True_):
        assert crowd_flag(value) == 1
    for value in (2, -1, 0.5, "", "true", None, [], {}, float("nan"), b"0"):
        with pytest.raises(ValueError, match=r'^"iscrowd" must be 0 or 1, got'):
            crowd_flag(value)
