import os
import shutil
from pathlib import Path

import pytest

from moee_analysis.data.images import load_images
from tests.helpers.images import image_folder, picture


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"ant": 2, "bee": 1})


def test_hidden_folders_are_never_read_hidden_pictures_named_and_odd_names_shown(photos):
    for folder in (photos / "ant" / ".ipynb_checkpoints", photos / ".ipynb_checkpoints"):
        folder.mkdir()
        picture(5).save(folder / "0-checkpoint.png")
    (photos / "bee").rename(os.fsdecode(bytes(photos) + b"/caf\xe9"))  # no UTF-8
    images = load_images(photos)
    assert [path.name for path in images.source.paths] == ["0.png", "1.png", "0.png"]
    assert images.classes == ("ant", "caf\\xe9")
    assert images.fingerprint
    assert images.picture(2).size
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
    for name in ("ant/notes.txt", "ant/more.txt", "bee/raw.dng", "bee/phone.heic", "labels.csv"):
        (photos / name).write_text("x")
    (photos / "bee" / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "ant" / "deep").mkdir()
    picture(1).save(photos / "ant" / "deep" / "a.JPEG")
    picture(2).save(photos / "loose.png")
    os.mkfifo(photos / "ant" / "x.jpg")  # is not waited for
    with pytest.warns(UserWarning, match="skipped 7 files") as caught:
        images = load_images(photos)
    assert images.folders == ("ant", "ant", "ant", "bee")
    assert caught[0].filename == __file__
    assert images.skipped_text in str(caught[0].message)
    for words in (
        "2 no image (.txt): ant/more.txt, ant/notes.txt", "1 no image (.dng): bee/raw.dng",
        "1 a link to nothing: bee/gone.jpg", "pillow-heif", "1 no regular file: ant/x.jpg",
        "1 in no class folder: loose.png",
    ):  # fmt: skip
        assert words in images.skipped_text
    assert "labels.csv" not in images.skipped_text
    assert len(images.skipped) == 7


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
