"""Files are written whole or not at all, whoever else writes."""

import os
import threading

import pytest

from proscale_hf.files.whole import being_written, write_whole


def test_two_threads_write_the_same_file(tmp_path):
    """Each writes its own temporary file; the file has the content of one of them."""
    met, errors = threading.Barrier(3), []

    def write(number):
        def put(file):
            file.write(bytes([number]) * 10)
            met.wait(timeout=30)

        try:
            write_whole(tmp_path / "file", put)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert (tmp_path / "file").read_bytes() in {bytes([number]) * 10 for number in range(3)}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_others_left_stays(tmp_path):
    left = tmp_path / f".file.{os.getpid()}.partial"
    left.touch()
    write_whole(tmp_path / "file", lambda file: file.write(b"x"))
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
def test_nothing_is_left_of_a_failure(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")

    def fail(file):
        file.write(b"new")
        assert len(being_written) == 1
        raise error

    with pytest.raises((ValueError, KeyboardInterrupt, MemoryError)):
        write_whole(tmp_path / "file", fail)
    assert (tmp_path / "file").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert not being_written


def test_a_link_stays_a_link_and_long_names_are_possible(tmp_path):
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to("target")
    write_whole(tmp_path / "link", lambda file: file.write(b"x"))
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    write_whole(tmp_path / ("ä" * 120), lambda file: file.write(b"x"))
