"""Checkpoints, changed at random where it hurts, are read or refused in one line, within bounds of time and memory."""

import io
import pickle
import pickletools
import zipfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from fuzz_tools import EXTREMES, changed_bytes, fuzz

from proscale_hf.convert import ConversionError
from proscale_hf.convert.model_building import to_float32
from proscale_hf.convert.safe_pickle import load_checkpoint


pytestmark = pytest.mark.slow

LONGEST = 100_000  # bytes of a changed pickle
SNIPPETS = (
    b"cposix\nsystem\n",
    b"cnumpy\ndtype\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nHalfStorage\n",
    b"c_codecs\nencode\n",
    b"\x94" * 100,
    *(bytes([code]) for code in b"()]}NRQbtu.sae0212\x85\x86\x87"),
    *(b"h" + bytes([index]) for index in range(8)),
    *(pickle.dumps(number, protocol=2)[2:-1] for number in EXTREMES),
)


def content():
    shared = torch.arange(30.0)
    state = {"a.weight": torch.ones(3, 4).half(), "b": shared, "c": shared[3:9].view(2, 3), "d": torch.tensor(7)}
    return {"model": state, "optimizer": {"state": {0: {"exp_avg": shared}}}, "iteration": 3}


def zip_of(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def old_torch_of(content):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def arrays_of(content):
    arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
    return pickle.dumps({"model": {**arrays, "again": arrays["b"]}}, protocol=2)


def changed_pickle(random, program):
    """Operations of a pickle, and what it has behind them, are changed as operations."""
    file = io.BytesIO(program)
    try:
        starts = [position for _, _, position in pickletools.genops(file)] + [file.tell()]
    except ValueError:
        return changed_bytes(random, program)
    parts = [program[start:end] for start, end in pairwise(starts)]
    for _ in range(random.randint(1, 5)):
        index = random.randrange(len(parts))
        match random.randrange(5):
            case 0:
                parts[index] = b""
            case 1:
                parts[index] *= random.choice((2, 10, 10_000))
            case 2:
                parts.insert(index, random.choice(SNIPPETS))
            case 3:
                parts.insert(index, parts[random.randrange(len(parts))])
            case 4:
                first = random.randrange(len(parts))
                some = b"".join(parts[min(first, index) : max(first, index)])
                parts.insert(index, some[:1000] * random.choice((2, 50)))
    return b"".join(parts)[:LONGEST] + program[starts[-1] :]


def changed_zip(random, archive):
    """One of the parts is changed, renamed, doubled or taken out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(file, "w") as new:
        parts = [(entry.filename, old.read(entry)) for entry in old.infolist()]
        index = random.randrange(len(parts))
        name, data = parts[index]
        if name.endswith("data.pkl") or random.random() < 0.5:
            index = next(i for i, (name, _) in enumerate(parts) if name.endswith("data.pkl"))
            parts[index] = parts[index][0], changed_pickle(random, parts[index][1])
        else:
            others = [(name.upper(), data), (name, data * 3), (name, data[1:]), (name + "/", data), ("x/" + name, data)]
            parts[index : index + random.randint(0, 1)] = [random.choice(others)]
        for name, data in parts:
            new.writestr(name, data)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("write", "change"),
    [(zip_of, changed_zip), (old_torch_of, changed_pickle), (arrays_of, changed_pickle)],
    ids=["zip", "old torch", "arrays"],
)
def test_changed_checkpoints(tmp_path, write, change):
    path, valid = tmp_path / "checkpoint", write(content())

    def make(random):
        return random.choice((change, change, changed_bytes))(random, valid)

    def read(changed):
        path.write_bytes(changed)
        state = to_float32(load_checkpoint(path))
        assert sum(tensor.numel() for tensor in {id(t): t for t in state.values()}.values()) <= 2 * len(changed) + 4000
        assert all(np.isfinite(tensor.numpy()).all() for tensor in state.values() if tensor.is_floating_point())

    read(valid)
    fuzz(400, make, read, ConversionError)
