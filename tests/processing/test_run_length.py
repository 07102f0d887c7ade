"""Run-length codes of masks: pycocotools reads back what was encoded, compressed or not."""

import numpy as np
import pytest

from proscale_hf.processing import run_length
from proscale_hf.processing.run_length import decompress_counts, encode_mask, run_lengths


coco_mask = pytest.importorskip("pycocotools.mask")
MASKS = [np.random.default_rng(0).random((7, 9)) < share for share in (0.0, 0.02, 0.3, 0.7, 1.0)]


@pytest.mark.parametrize("mask", MASKS)
def test_a_compressed_code_is_the_mask(mask):
    code = encode_mask(mask)
    assert code["size"] == [7, 9] and isinstance(code["counts"], str)
    assert np.array_equal(coco_mask.decode(code), mask)


@pytest.mark.parametrize("mask", MASKS)
def test_without_pycocotools_counts_are_lengths_of_runs(mask, monkeypatch):
    monkeypatch.setattr(run_length, "coco_mask", None)
    code = encode_mask(mask)
    assert sum(code["counts"]) == mask.size
    assert np.array_equal(coco_mask.decode(coco_mask.frPyObjects(code, *mask.shape)), mask)


def test_runs_go_down_the_columns_and_begin_with_zeros():
    assert run_lengths(np.array([[0, 1, 1], [0, 1, 0]], dtype=np.uint8)) == [2, 3, 1]
    assert run_lengths(np.array([[1, 0]], dtype=np.uint8)) == [0, 1, 1]


def test_decompressed_counts_are_the_lengths_of_runs():
    generator = np.random.default_rng(0)
    for density in (0.0, 0.02, 0.5, 1.0):
        mask = generator.random((70, 90)) < density
        assert decompress_counts(encode_mask(mask)["counts"]) == run_lengths(mask)


@pytest.mark.parametrize(
    ("counts", "message"),
    [("0 0", "characters"), ("00\x7f", "characters"), ("0P", "breaks off"), ("o" * 8, "larger than any image")],
)
def test_damaged_counts_are_refused(counts, message):
    with pytest.raises(ValueError, match=message):
        decompress_counts(counts)
