from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moee_analysis.data.images import load_images
from tests.helpers.images import image_folder, picture


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"ant": 2, "bee": 1})


def test_hidden_folders_are_never_read_and_hidden_pictures_named(photos):
    for folder in (photos / "ant" / ".ipynb_checkpoints", photos / ".ipynb_checkpoints"):
        folder.mkdir()
        picture(5).save(folder / "0-checkpoint.png")
    images = load_images(photos)
    assert [path.name for path in images.source.paths] == ["0.png", "1.png", "0.png"]
    assert images.classes == ("ant", "bee")
    assert not images.skipped
    shutil.copy(photos / "ant" / "0.png", photos / "ant" / "._0.png")
    (photos / "ant" / ".DS_Store").write_bytes(b"whatever")
    with pytest.warns(UserWarning, match=r"1 hidden: ant/\._0\.png"):
        assert len(load_images(photos)) == 3


@pytest.mark.parametrize(("links", "count", "skipped"), [
    ({"bee/session": "../../elsewhere/eel", "cat": "../elsewhere/eel"}, 5, "cat"),
    ({"ant/loop": ".."}, 3, "ant/loop"), ({"ant/loop": "../.."}, 5, "ant/loop"),
    ({"ant/loop": "."}, 3, "ant/loop"), ({"a_link": "bee"}, 3, "a_link"),
])  # fmt: skip
def test_a_linked_folder_is_followed_once(photos, tmp_path, links, count, skipped):
    image_folder(tmp_path / "elsewhere", {"eel": 2})
    for name, goal in links.items():
        (photos / name).symlink_to(goal)
    place = f"a link to a folder that is read in another place: {skipped}"
    with pytest.warns(UserWarning, match=place):
        images = load_images(photos)
    assert len(images) == count
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


@pytest.mark.parametrize(("method", "name", "found"), [
    ("iterdir", "bee", r"cannot be opened \(Permission denied\): bee"),
    ("is_dir", "cwd", r"looked at \(Permission denied\): bee/cwd"),
])  # fmt: skip
def test_what_may_not_be_looked_at_is_named(photos, monkeypatch, method, name, found):
    allowed = getattr(Path, method)

    def forbidden(path):
        if path.name == name:
            raise PermissionError(13, "Permission denied")
        return allowed(path)

    (photos / "bee" / "cwd").touch()
    monkeypatch.setattr(Path, method, forbidden)
    with pytest.warns(UserWarning, match=found):
        assert len(load_images(photos)) == (2 if name == "bee" else 3)


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
