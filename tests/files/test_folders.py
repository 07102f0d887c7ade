"""Folders of results: complete, or not there."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from proscale_hf.files.folders import check_new_folder, folder_replaced_whole, folder_written_whole


def test_it_appears_when_it_is_complete(tmp_path):
    with folder_written_whole(tmp_path / "new" / "output") as unfinished:
        (unfinished / "file").write_text("text")
        assert not (tmp_path / "new" / "output").exists()
    assert (tmp_path / "new" / "output" / "file").read_text() == "text"
    assert len(list((tmp_path / "new").iterdir())) == 1
    assert (tmp_path / "new" / "output").stat().st_mode & 0o777 == 0o755  # temporary folders are for their owner alone


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), folder_written_whole(tmp_path / "output") as unfinished:
        (unfinished / "file").write_text("text")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folders_above_are_removed_if_they_are_new_and_empty(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="full"), folder_written_whole(tmp_path / "old" / "a" / "b" / "output"):
        (tmp_path / "old" / "a" / "mine").touch()
        raise OSError("full")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "old", tmp_path / "old" / "a", tmp_path / "old" / "a" / "mine"]


def test_what_is_there_stays(tmp_path):
    (tmp_path / "empty").mkdir()
    check_new_folder(tmp_path / "empty")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for path in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ValueError, match="is there already"), folder_written_whole(path):
            pass
    with folder_written_whole(tmp_path / "empty") as unfinished:
        (unfinished / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="may be written to"), folder_written_whole(tmp_path / "file" / "output"):
        pass


def process(is_main: bool = True, wait: object = lambda: None) -> SimpleNamespace:
    """What an accelerator says in the first process of a machine; `wait` is called where processes meet."""
    return SimpleNamespace(is_main_process=is_main, is_local_main_process=True, wait_for_everyone=wait)


def old_folder(place: Path) -> Path:
    place.mkdir()
    (place / "old").write_text("text")
    return place


@pytest.mark.parametrize("is_main", [True, False], ids=["one machine", "another machine with a disk of its own"])
def test_it_takes_the_place_of_an_older_one_when_it_is_on_the_disk(tmp_path, monkeypatch, is_main):
    place, flushed = old_folder(tmp_path / "output"), []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append((place / "old").exists()))
    with folder_replaced_whole(place, process(is_main)) as unfinished:
        (unfinished / "part").mkdir()
        for name in ("file", "part/file"):
            (unfinished / name).write_text("text")
    assert flushed == [True, True]
    assert sorted(path.name for path in place.rglob("*")) == ["file", "file", "part"]
    assert list(tmp_path.iterdir()) == [place]


def test_a_machine_that_shares_the_disk_leaves_the_folder_to_the_main_process(tmp_path):
    place, meetings = tmp_path / "output", []

    def meet():
        meetings.append(0)
        if len(meetings) == 4:  # the main process has had its turn
            (tmp_path / ".unfinished" / "output").rename(place)

    with folder_replaced_whole(place, process(is_main=False, wait=meet)) as unfinished:
        (unfinished / "file").touch()
    assert (place / "file").exists() and list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("failure", [OSError("Disk quota exceeded"), KeyboardInterrupt()])
def test_the_older_one_stays_if_writing_fails(tmp_path, failure):
    place = old_folder(tmp_path / "output")
    with pytest.raises(type(failure)), folder_replaced_whole(place, process()) as unfinished:
        (unfinished / "new").touch()
        raise failure
    assert list(tmp_path.rglob("*")) == [place, place / "old"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".unfinished" / "output-1"
    left.mkdir(parents=True)
    with folder_replaced_whole(tmp_path / "output-2", process()) as unfinished:
        assert not left.exists() and list(unfinished.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["output-2"]
