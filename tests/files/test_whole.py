"""Folders of results: complete, or not there."""

import pytest

from proscale_hf.files.whole import check_new_folder, folder_written_whole


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
