"""Checkpoints are read without running code from them, in all formats, and never take more than they hold."""

import builtins
import collections
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from proscale_hf.convert import ConversionError, pickle_machine
from proscale_hf.convert.model_building import to_float32
from proscale_hf.convert.safe_pickle import load_checkpoint


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


def refusal(path):
    """The message, one line, of a checkpoint that is refused with little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ConversionError) as error:
            load_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    message = str(error.value)
    assert message.startswith(("There is no checkpoint", str(path)))
    assert message.isprintable()
    return message


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: it is empty"),
        (b"no pickle at all", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"PK\x03\x04", "damaged"),
        (b"\x80\x02}", "damaged"),
        (b"\n <!DOCTYPE html><html>", "is a web page, not a checkpoint"),
        (b"<html>", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "run `git lfs pull`"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
    ],
)
def test_other_files(tmp_path, content, message):
    (tmp_path / "model.pth").write_bytes(content)
    assert message in refusal(tmp_path / "model.pth")


def test_other_things_than_files(tmp_path):
    assert "no checkpoint file" in refusal(tmp_path / "nothing.pth")
    assert "is a folder, not a checkpoint file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a device or pipe, not a checkpoint file" in refusal(tmp_path / "pipe.pth")


def test_reads_safetensors(tmp_path):
    expected = {name: tensor.contiguous() for name, tensor in tensors().items()}
    save_file(expected, tmp_path / "model.pth")
    loaded = load_checkpoint(tmp_path / "model.pth")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[:-3])
    assert "damaged" in refusal(tmp_path / "model.pth")


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


@pytest.mark.parametrize(
    ("write", "extra"),
    [(write_zip, 300_000), (write_old_torch, 300_000), (write_pickle, 0)],
    ids=["zip", "old torch", "pickle"],
)
def test_everything_but_the_model_is_left_out(tmp_path, write, extra):
    content = {
        "model": tensors(),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(extra)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "scheduler": {"milestones": collections.Counter([3, 5]), "last_epoch": 4},
        "ema_state": tensors(),
        "iteration": 2**70,
    }
    if write is write_pickle:
        del content["scheduler"]["milestones"]
    write(tmp_path / "checkpoint", content)
    assert load_checkpoint(tmp_path / "checkpoint").keys() == tensors().keys()


def test_parameters(tmp_path):
    for write in (write_zip, write_old_torch, write_pickle):
        write(tmp_path / "checkpoint", {"w": torch.nn.Parameter(torch.ones(2))})
        assert not load_checkpoint(tmp_path / "checkpoint")["w"].requires_grad


@WRITERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(tmp_path, write, value):
    state = tensors()
    state["b.weight"][1, 1] = value
    state["empty"] = torch.empty(0)
    write(tmp_path / "checkpoint", {"model": state})
    assert refusal(tmp_path / "checkpoint").endswith("weights that are infinite or no numbers: b.weight.")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.eye(3).to_sparse(), "torch._utils._rebuild_sparse_tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "torch._utils._rebuild_qtensor"),
        (lambda: torch.ones(3, device="meta"), "torch._utils._rebuild_meta_tensor_no_storage"),
        (lambda: torch.ones(3, dtype=torch.complex64), "torch.ComplexFloatStorage"),
    ],
)
def test_tensors_of_other_kinds(tmp_path, make, name):
    for write in (write_zip, write_old_torch):
        write(tmp_path / "checkpoint", {"model": {"w": make()}})
        assert f"refused: reading it would call {name}," in refusal(tmp_path / "checkpoint")


EVIL = b"cposix\nsystem\n"
SHORT = b"\x8c\x05posix\x94\x8c\x06system\x94"  # two memoised texts


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (EVIL + b"(S'true'\ntR.", "would call posix.system,"),
        (EVIL + b".", "would call posix.system,"),
        (b"(S'true'\niposix\nsystem\n.", "would call posix.system,"),
        (b"(" + EVIL + b"S'true'\no.", "would call posix.system,"),
        (b"\x80\x02" + EVIL + b")\x81.", "would call posix.system,"),
        (b"\x80\x04" + SHORT + b"\x93.", "would call posix.system,"),
        (b"\x80\x04" + SHORT + b"}h\x00h\x01\x93.", "would call posix.system,"),
        (b"\x80\x04\x8c\x02os\x8c\x0csystem\x1b[31m\n\x93.", r"would call os.system\x1b[31m\n,"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0dcore.multiarr\x93.", "would call numpy.core.multiarr,"),
        (b"cnumpy\ndtype.__class__\n.", "would call numpy.dtype.__class__,"),
        (b"(icollections\nOrderedDict\n.", "makes an instance of collections.OrderedDict,"),
        (b"ccollections\nOrderedDict\n)\x81.", "uses pickle's operation NEWOBJ,"),
        (b"\x80\x02\x82\x01.", "uses pickle's operation EXT1,"),
        (b"\x80\x02}Q.", "uses pickle's operation BINPERSID,"),
        (b"\x80\x02Pid\n.", "uses pickle's operation PERSID,"),
        (b"\x80\x02}(]K\x01s.", "damaged"),  # a list is no key
        (b"\x80\x02}(]K\x01u.", "has a dictionary key of type list"),
        (b"\x80\x02}(K\x01K\x02K\x03u.", "damaged"),  # a key without a value
        (b"\x80\x02S'text'\n)R.", "damaged"),  # calls a text
        (b"\x80\x02]K\x01b.", "damaged"),  # gives a list a state
        (b"\x80\x02h\x05.", "damaged"),  # nothing was memoised
        (b"\x80\x02u.", "damaged"),  # nothing was marked
    ],
)
def test_programs(tmp_path, program, message):
    (tmp_path / "model.pkl").write_bytes(program)
    assert message in refusal(tmp_path / "model.pkl")


def test_a_call_is_refused_in_front_of_other_faults(tmp_path):
    """In each of the pickles of torch's older format."""
    write_old_torch(tmp_path / "good.pth", {"w": torch.ones(2)})
    content = (tmp_path / "good.pth").read_bytes()
    positions = [0]
    stream = io.BytesIO(content)
    for _ in range(5):
        list(pickletools.genops(stream))
        positions.append(stream.tell())
    for position in positions[1:5]:
        (tmp_path / "bad.pth").write_bytes(content[:position] + EVIL + content[position:])
        assert "would call posix.system," in refusal(tmp_path / "bad.pth")


def nested_tuples(depth):
    """A key of `2**depth` parts that takes a few bytes, and forever to hash."""
    return b"K\x01" + b"q\x00h\x00\x86" * depth


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02}" + nested_tuples(60) + b"K\x01s.", "has a dictionary key of type tuple"),
        (
            b"\x80\x02ccollections\nOrderedDict\n]" + nested_tuples(60) + b"K\x01\x86a\x85R.",
            "has a dictionary key of type tuple",
        ),
        (b"\x80\x02" + nested_tuples(60) + b".", "no state dict"),
        (b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".", "no state dict"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "no state dict"),  # memoised at a very high index
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"few.", "damaged"),  # bytes
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"few.", "damaged"),  # text
        (b"\x80\x05\x96" + struct.pack("<Q", 2**63 - 1) + b"few.", "damaged"),  # a byte array
        (b"\x80\x04\x95" + struct.pack("<Q", 2**63 - 1) + b"}.", "no state dict"),  # a frame
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "damaged"),  # a number
        (b"L" + b"9" * 100_000 + b"L\n.", "damaged"),
        (b"\x80\x02}\x8a\x08" + (2**61 - 1).to_bytes(8, "little") + b"K\x00s.", "a very large number"),  # hashed as 0
    ],
)
def test_bombs(tmp_path, program, message):
    (tmp_path / "model.pkl").write_bytes(program)
    assert message in refusal(tmp_path / "model.pkl")


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "repeated",
    [
        b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R",  # text as bytes
        b"ctorch.storage\n_load_from_bytes\nh\x02\x85R",  # reads a storage
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01K\x01\x85NNh\x00tb",  # an array of the same bytes
        b"ccollections\nOrderedDict\nh\x01\x85R",
        b"cnumpy.core.multiarray\n_reconstruct\nh\x03R",  # with very many arguments
    ],
)
def test_same_parts_again_and_again(tmp_path, repeated):
    write_old_torch(tmp_path / "storage", torch.ones(2000).storage())
    storage = (tmp_path / "storage").read_bytes()
    parts = (
        b"X" + struct.pack("<L", 5000) + b"a" * 5000 + b"q\x00",
        b"](" + b"K\x01K\x01\x86" * 5000 + b"eq\x01",
        b"B" + struct.pack("<L", len(storage)) + storage + b"q\x02",
        b"(" + b"K\x01" * 5000 + b"tq\x03",
    )
    (tmp_path / "model.pkl").write_bytes(b"\x80\x03](" + b"".join(parts) + repeated * 20 + b"e.")
    assert "it grows by using the same parts again" in refusal(tmp_path / "model.pkl")


@pytest.mark.parametrize("kind", ["array", "tensor", "storage", "key"])
def test_nested_tuples_that_would_be_shown(tmp_path, kind):
    """Neither their text nor their hash is ever made."""
    nested = nested_tuples(60)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01"
        + nested
        + b"cnumpy\ndtype\nX\x02\x00\x00\x00f4\x85R\x89C\x00tb"
    )
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(N" + nested + nested + nested + b"tR"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n" + nested + b"K\x00K\x01tQ"
    start = b"".join(pickle.dumps(number, protocol=2) for number in (0x1950A86A20F9469CFC6C, 1001, {}))
    content = {
        "array": b"\x80\x02}X\x01\x00\x00\x00w" + array + b"s.",
        "tensor": start + b"\x80\x02" + tensor + b".",
        "storage": start + b"\x80\x02" + storage + b".",
        "key": start + b"\x80\x02}.\x80\x02]" + nested + b"a.",
    }[kind]
    (tmp_path / "checkpoint").write_bytes(content)
    assert ("no storage of numbers" if kind == "storage" else "damaged") in refusal(tmp_path / "checkpoint")


def test_persistent_ids_of_many_parts(tmp_path, zip_path):
    """They are not copied."""
    ids = b"\x80\x02(" + b"N" * 5000 + b"tq\x00Q" + b"h\x00Q" * 1000 + b"."
    rewrite_zip(zip_path, tmp_path / "bad.pth", lambda _: ids)
    assert "something that is no storage" in refusal(tmp_path / "bad.pth")


@WRITERS
def test_one_tensor_with_many_names(tmp_path, write):
    """It is read once, and stays one when it is converted."""
    shared = torch.arange(50_000).half()
    write(tmp_path / "checkpoint", {f"name {index}": shared for index in range(1000)} | {"part": shared[5:8]})
    tracemalloc.start()
    loaded = load_checkpoint(tmp_path / "checkpoint")
    converted = to_float32(dict(loaded))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert len({tensor.data_ptr() for name, tensor in loaded.items() if name != "part"}) == 1
    assert len({tensor.data_ptr() for name, tensor in converted.items() if name != "part"}) == 1
    assert torch.equal(converted["name 7"], shared.float())
    assert converted["part"].tolist() == [5, 6, 7]


def test_arrays_with_many_names(tmp_path):
    array = np.arange(50_000, dtype=np.float32)
    write_pickle(tmp_path / "model.pkl", {f"name {index}": array for index in range(1000)})
    loaded = load_checkpoint(tmp_path / "model.pkl")
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 1
    assert torch.equal(loaded["name 7"], torch.from_numpy(array))


def test_very_many_tensors_that_overlap(tmp_path):
    large = torch.ones(50_000)
    write_zip(tmp_path / "checkpoint", {str(index): large[index:] for index in range(100)})
    assert "very many tensors that overlap" in refusal(tmp_path / "checkpoint")


def test_too_many_operations(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_machine, "MAXIMUM_OPERATIONS", 1000)
    (tmp_path / "model.pkl").write_bytes(b"\x80\x02" + b"N" * 1000 + b".")
    assert "has more than 1,000 pickle operations" in refusal(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    ("shape", "data"),
    [((2**40,), b"1234"), ((-1,), b"1234"), ((2, 3), bytes(20)), ((0, 2**60), b"1234"), ((2,), bytes(12))],
)
def test_absurd_arrays(tmp_path, shape, data):
    state = (1, shape, np.dtype("f4"), False, data)
    reconstruct, arguments, _ = np.empty(0).__reduce__()
    with (tmp_path / "model.pkl").open("wb") as file:
        pickler = pickle.Pickler(file)
        array = Call(None)
        array.reduced = (reconstruct, arguments, state)
        pickler.dump({"w": array})
    assert f"has an array of shape {shape} with {len(data)} bytes" in refusal(tmp_path / "model.pkl")


def test_arrays_of_either_byte_and_element_order(tmp_path):
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    for array in (expected.astype(">f4"), np.asfortranarray(expected), expected[:, ::-1][:, ::-1]):
        for protocol in (2, 5):
            (tmp_path / "model.pkl").write_bytes(pickle.dumps({"w": array}, protocol=protocol))
            assert load_checkpoint(tmp_path / "model.pkl")["w"].tolist() == expected.tolist()


class ClaimedTensor:
    """Pickles as a tensor with another shape, stride or offset than it has."""

    def __init__(self, tensor, offset, shape, strides):
        self.view = tensor.storage(), offset, shape, strides, False, collections.OrderedDict()

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.view


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@WRITERS
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (2**40,), (1,)),
        (0, (2**40,), (0,)),  # an expanded tensor, which takes memory when it is copied
        (3, (2,), (1,)),
        (0, (2,), (4,)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (-2,), (1,)),
    ],
)
def test_tensors_outside_of_their_storage(tmp_path, write, offset, shape, strides):
    write(tmp_path / "checkpoint", {"model": {"w": ClaimedTensor(torch.ones(4), offset, shape, strides)}})
    message = refusal(tmp_path / "checkpoint")
    assert f"tensor of shape {shape}, strides {strides} and offset {offset} in a storage of 4 elements" in message


def rewrite_zip(source, target, change=None, compression=zipfile.ZIP_STORED, **extra):
    """Copy a zip file; `change` takes the content of its main pickle."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if change and entry.filename.endswith("data.pkl") else data)
        for name, data in extra.items():
            new.writestr(name, data)


@pytest.fixture
def zip_path(tmp_path):
    write_zip(tmp_path / "good.pth", {"model": {"w": torch.ones(1000)}})
    return tmp_path / "good.pth"


def test_storage_that_the_zip_does_not_have(tmp_path, zip_path):
    claims = {b"M\xe8\x03": b"M\xe9\x03", b"X\x01\x00\x00\x000": b"X\x01\x00\x00\x005"}  # 1001 elements; another key
    for found, claimed in claims.items():
        rewrite_zip(zip_path, tmp_path / "bad.pth", lambda data, pair=(found, claimed): data.replace(*pair))
        assert "bytes for the storage" in refusal(tmp_path / "bad.pth")


def test_zip_with_parts_that_differ_in_case(tmp_path, zip_path):
    """Readers differ in which of the two they take; here it is the one that was checked."""
    for extra in ({"good/DATA.pkl": EVIL + b"."}, {"good/DATA/0": b"\0" * 4000}):
        rewrite_zip(zip_path, tmp_path / "both.pth", **extra)
        assert load_checkpoint(tmp_path / "both.pth")["w"].tolist() == [1.0] * 1000
    rewrite_zip(zip_path, tmp_path / "evil.pth", lambda data: EVIL + b".", **{"good/DATA.pkl": b"\x80\x02}."})
    assert "would call posix.system," in refusal(tmp_path / "evil.pth")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_with_two_parts_of_one_name(tmp_path, zip_path):
    rewrite_zip(zip_path, tmp_path / "bad.pth", **{"good/data/0": b"\0" * 10})
    assert "its parts overlap" in refusal(tmp_path / "bad.pth")


def test_zip_whose_parts_are_elsewhere(tmp_path, zip_path):
    """The directory and the parts' own headers both say where their bytes are."""
    content = zip_path.read_bytes()
    with zipfile.ZipFile(zip_path) as archive:
        header = archive.getinfo("good/data/0").header_offset
    for position, value in ((header, b"X"), (header + 28, b"\xff\xff")):  # the mark of a header, the length of its end
        (tmp_path / "bad.pth").write_bytes(content[:position] + value + content[position + len(value) :])
        assert "damaged" in refusal(tmp_path / "bad.pth")


def test_numbers_of_the_other_byte_order(tmp_path, zip_path):
    with zipfile.ZipFile(zip_path) as old, zipfile.ZipFile(tmp_path / "big.pth", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("/data/0"):
                data = np.arange(1000, dtype=">f4").tobytes()
            new.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else data)
    assert load_checkpoint(tmp_path / "big.pth")["w"].tolist() == list(range(1000))


def test_compressed_zip(tmp_path, zip_path):
    rewrite_zip(zip_path, tmp_path / "bad.pth", compression=zipfile.ZIP_DEFLATED)
    assert "compressed, which torch never does" in refusal(tmp_path / "bad.pth")


def test_zip_with_overlapping_parts(tmp_path, zip_path):
    content = bytearray(zip_path.read_bytes())
    start = content.index(b"PK\x01\x02")
    with zipfile.ZipFile(zip_path) as archive:
        largest = next(entry for entry in archive.infolist() if entry.file_size == 4000)
    for position in range(start, len(content) - 46):  # all parts are where the largest one is
        if content[position : position + 4] == b"PK\x01\x02":
            content[position + 20 : position + 28] = struct.pack("<LL", 4000, 4000)
            content[position + 42 : position + 46] = struct.pack("<L", largest.header_offset)
    (tmp_path / "bad.pth").write_bytes(content)
    assert "its parts overlap" in refusal(tmp_path / "bad.pth")


def test_zip_with_very_many_parts(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    content = (tmp_path / "bad.pth").read_bytes()
    end = content.index(b"PK\x05\x06")
    directory = content[content.index(b"PK\x01\x02") : end]
    count = 2**22 // len(directory) + 1
    record = content[end : end + 12] + struct.pack("<LLH", count * len(directory), end - len(directory), 0)
    (tmp_path / "bad.pth").write_bytes(content[: end - len(directory)] + directory * count + record)
    assert f"the directory of this zip file claims {count * len(directory)} bytes" in refusal(tmp_path / "bad.pth")


def test_other_zip_files(tmp_path, zip_path):
    np.savez(tmp_path / "model.npz", w=np.ones(3))
    rewrite_zip(zip_path, tmp_path / "two.pth", **{"other/data.pkl": b""})
    for name in ("model.npz", "two.pth"):
        assert "was not written by torch.save" in refusal(tmp_path / name)
    rewrite_zip(zip_path, tmp_path / "script.pth", **{"good/constants.pkl": b""})
    assert "is a TorchScript program" in refusal(tmp_path / "script.pth")


def test_storage_that_the_old_file_does_not_have(tmp_path):
    write_old_torch(tmp_path / "checkpoint", {"w": torch.ones(1000)})
    content = (tmp_path / "checkpoint").read_bytes()
    length = struct.pack("<Q", 2**40)
    assert content.count(b"M\xe8\x03") == 2  # the storage's length, and the tensor's
    content = content.replace(b"M\xe8\x03", b"\x8a\x08" + length, 1).replace(struct.pack("<Q", 1000), length)
    (tmp_path / "checkpoint").write_bytes(content)
    assert f"claims {2**42} bytes for the storage" in refusal(tmp_path / "checkpoint")


def test_numbers_that_are_no_sizes(tmp_path):
    """Their product is not computed."""
    size = b"\x8b" + struct.pack("<L", 3_000_000) + b"\x7f" * 3_000_000 + b"q\x00" + b"h\x00" * 20
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(" + size + b"tcnumpy\ndtype\nX\x02\x00\x00\x00f4\x85RNC\x00tb"
    )
    (tmp_path / "model.pkl").write_bytes(b"\x80\x03}X\x01\x00\x00\x00w" + array + b"s.")
    assert "damaged" in refusal(tmp_path / "model.pkl")


def test_one_storage_of_two_sizes(tmp_path):
    write_old_torch(tmp_path / "checkpoint", {"w": torch.ones(1000)})
    content = (tmp_path / "checkpoint").read_bytes()
    (tmp_path / "checkpoint").write_bytes(content.replace(struct.pack("<Q", 1000), struct.pack("<Q", 2**40)))
    assert "1099511627776 elements for a storage of 1000" in refusal(tmp_path / "checkpoint")


@WRITERS
def test_random_damage(tmp_path, write):
    """Whatever is changed in a file, it is read or refused in one line."""
    path = tmp_path / "checkpoint"
    write(path, {"model": tensors(), "optimizer": {"lr": 0.1}})
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for position in generator.integers(len(content), size=generator.integers(1, 4)):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except ConversionError as error:
            assert str(error).isprintable()
