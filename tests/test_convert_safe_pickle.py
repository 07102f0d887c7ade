"""Checkpoints are read without running code from them, in all three formats."""

import builtins
import collections
import os
import pickle

import numpy as np
import pytest
import torch

from convert import ConversionError
from convert.safe_pickle import load_checkpoint


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "a.count": torch.tensor(7),
        "b.weight": torch.randn(2, 5, generator=generator).half().t(),
    }


def write_zip(path, content):
    torch.save(content, path)


def write_old_torch(path, content):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content, protocol=2))


WRITERS = pytest.mark.parametrize("write", [write_zip, write_old_torch, write_pickle])


@WRITERS
@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state, "iteration": 3, "optimizer": {}}])
def test_reads_every_format(tmp_path, write, wrap):
    write(tmp_path / "checkpoint", wrap(collections.OrderedDict(tensors())))
    loaded = load_checkpoint(tmp_path / "checkpoint")
    assert list(loaded) == list(tensors())
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_pickled_arrays(tmp_path, protocol):
    arrays = {name: tensor.numpy() for name, tensor in tensors().items()}
    content = {"model": arrays, "__author__": "somebody", "matching_heuristics": True}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = load_checkpoint(tmp_path / "model.pkl")
    for name, tensor in tensors().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_reads_arrays_of_python_2(tmp_path):
    data = b"".join(
        (
            b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff",
            b"K\x00tb\x89U\x08\x00\x00\x80?\x00\x00\x80\xbftbs.",
        )
    )
    (tmp_path / "model.pkl").write_bytes(data)
    assert load_checkpoint(tmp_path / "model.pkl")["w"].tolist() == [1.0, -1.0]


@WRITERS
@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda marker: Call(os.system, f"touch {marker}"), "system"),
        (lambda marker: Call(builtins.eval, f"open({str(marker)!r}, 'w').close()"), "eval"),
        (lambda marker: Call(torch.load, str(marker)), "torch.serialization.load"),
    ],
    ids=["system", "eval", "torch.load"],
)
def test_refuses_to_call(tmp_path, write, call, name):
    marker, path = tmp_path / "marker", tmp_path / "checkpoint"
    write(path, {"model": tensors(), "extra": call(marker)})
    with pytest.raises(ConversionError, match=rf"refused: reading it would call \S*{name}\b") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_nested_torch_file_runs_nothing(tmp_path):
    """A plain pickle of tensors holds files of torch, whose own reader would run code."""
    marker = tmp_path / "marker"
    write_old_torch(tmp_path / "inner", Call(os.system, f"touch {marker}"))
    inner = (tmp_path / "inner").read_bytes()
    write_pickle(tmp_path / "model.pkl", {"w": Call(torch.storage._load_from_bytes, inner)})
    with pytest.raises(ConversionError, match=r"refused: reading it would call \w+\.system"):
        load_checkpoint(tmp_path / "model.pkl")
    assert not marker.exists()


@WRITERS
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_damaged_file(tmp_path, write, share):
    path = tmp_path / "checkpoint"
    write(path, {"model": tensors()})
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConversionError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"no pickle at all", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04"])
def test_other_files(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(ConversionError, match="damaged"):
        load_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no state dict"),
        ({}, "no state dict"),
        ({"model": {}}, "no state dict"),
        ({"state_dict": {"w": np.ones(2)}, "epoch": 3}, "no tensors: state_dict, epoch"),
        ({"model": {"w": np.ones(2), "names": np.array(["a"])}}, "no tensors: names"),
    ],
)
def test_without_state_dict(tmp_path, content, message):
    write_pickle(tmp_path / "model.pkl", content)
    with pytest.raises(ConversionError, match=message):
        load_checkpoint(tmp_path / "model.pkl")


def test_missing_file(tmp_path):
    with pytest.raises(ConversionError, match="no checkpoint file"):
        load_checkpoint(tmp_path / "nothing.pth")
