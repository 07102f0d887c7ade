"""A folder in use is refused to other processes, as long as its process lives."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from proscale_hf.files.lock import folder_in_use


pytest.importorskip("fcntl")


def hold(folder, connection):
    with folder_in_use(Path(folder)):
        child = os.fork()  # as a training has processes that load images
        if child == 0:
            signal.pause()
        connection.send(child)
        signal.pause()


def test_it_ends_with_its_process(tmp_path):
    folder = tmp_path / "new" / "out"
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(str(folder), theirs))
    process.start()
    child = ours.recv()
    try:
        refused = pytest.raises(ValueError, match=r"out is in use by another process.*choose another folder")
        with refused, folder_in_use(folder):
            pass
        with folder_in_use(folder, is_main=False):  # another process of the same training
            pass
        assert folder.is_dir()
        process.kill()
        process.join()
        with folder_in_use(folder):  # though a process that it forked is still there
            (folder / "file").touch()
        assert [path.name for path in folder.iterdir()] == ["file"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_nothing_is_left_if_nothing_came_of_it(tmp_path):
    with pytest.raises(RuntimeError), folder_in_use(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"), folder_in_use(tmp_path / "file"):
        pass
