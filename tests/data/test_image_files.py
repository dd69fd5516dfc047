from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from tests.helpers.images import image_folder, picture


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"ant": 2, "bee": 1})


def names(images):
    return [path.name for path in images.source.paths]


def test_hidden_folders_are_never_read(photos):
    for folder in (photos / "ant" / ".ipynb_checkpoints", photos / ".ipynb_checkpoints"):
        folder.mkdir()
        picture(5).save(folder / "0-checkpoint.png")
    images = load_images(photos)
    assert names(images) == ["0.png", "1.png", "0.png"]
    assert images.classes == ("ant", "bee")
    assert not images.skipped


def test_hidden_pictures_are_named(photos):
    shutil.copy(photos / "ant" / "0.png", photos / "ant" / "._0.png")
    (photos / "ant" / ".DS_Store").write_bytes(b"whatever")
    with pytest.warns(UserWarning, match=r"1 hidden: ant/\._0\.png"):
        images = load_images(photos)
    assert len(images) == 3


def test_a_linked_folder_is_followed(photos, tmp_path):
    elsewhere = image_folder(tmp_path, {"elsewhere": 2})
    (photos / "bee" / "session").symlink_to(elsewhere / "elsewhere")
    (photos / "cat").symlink_to(elsewhere / "elsewhere")
    with pytest.warns(UserWarning, match="a link to a folder that is read in another place: cat"):
        images = load_images(photos)
    assert len(images) == 5
    assert images.classes == ("ant", "bee")


@pytest.mark.parametrize("goal", ["..", "../..", "."])
def test_a_link_in_a_circle_ends(photos, goal):
    (photos / "ant" / "loop").symlink_to(goal)
    with pytest.warns(UserWarning, match="read in another place"):
        assert len(load_images(photos)) == 3


def test_a_real_folder_wins_over_a_link_to_it(photos):
    (photos / "a_link").symlink_to(photos / "bee")
    with pytest.warns(UserWarning, match="a_link"):
        images = load_images(photos)
    assert images.classes == ("ant", "bee")


def test_what_is_no_image_is_named_with_its_reason_and_count(photos):
    (photos / "ant" / "notes.txt").write_text("x")
    (photos / "ant" / "more.txt").write_text("x")
    (photos / "bee" / "raw.dng").write_bytes(b"x")
    (photos / "bee" / "phone.heic").write_bytes(b"x")
    (photos / "bee" / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "labels.csv").write_text("beside the class folders")
    with pytest.warns(UserWarning, match="skipped 5 files") as caught:
        images = load_images(photos)
    told = str(caught[0].message)
    assert "2 no image (.txt): ant/more.txt, ant/notes.txt" in told
    assert "1 no image (.dng): bee/raw.dng" in told
    assert "1 a link to nothing: bee/gone.jpg" in told
    assert "pillow-heif" in told
    assert "labels.csv" not in told
    assert len(images.skipped) == 5


def test_a_folder_that_cannot_be_opened_is_named(photos, monkeypatch):
    opened = Path.iterdir

    def closed(path):
        if path.name == "bee":
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.warns(UserWarning, match=r"cannot be opened \(Permission denied\): bee"):
        assert len(load_images(photos)) == 2


def test_what_cannot_be_looked_at_is_named(photos, monkeypatch):
    looked = Path.is_dir

    def forbidden(path):
        if path.name == "cwd":
            raise PermissionError(13, "Permission denied")
        return looked(path)

    (photos / "bee" / "cwd").symlink_to(photos)
    monkeypatch.setattr(Path, "is_dir", forbidden)
    with pytest.warns(UserWarning, match=r"looked at \(Permission denied\): bee/cwd"):
        assert len(load_images(photos)) == 3


def test_pipes_are_not_waited_for(photos):
    os.mkfifo(photos / "ant" / "x.jpg")
    with pytest.warns(UserWarning, match="1 no regular file: ant/x.jpg"):
        assert len(load_images(photos)) == 3


def test_a_name_that_is_not_utf_8_is_shown(photos):
    (photos / "bee").rename(os.fsdecode(bytes(photos) + b"/caf\xe9"))
    images = load_images(photos)
    assert images.classes == ("ant", "caf\\xe9")
    assert images.fingerprint
    assert images.picture(2).size


def test_pictures_in_no_class_folder_are_told_where_there_are_no_others(tmp_path):
    picture(0).save(tmp_path / "flat.png")
    with pytest.raises(MoeeError, match=r"1 in no class folder: flat\.png"):
        load_images(tmp_path)
