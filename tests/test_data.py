"""Laws of data.py and extras/pictures.py: pictures and their cache, splits and pools, negatives, batches, commands."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import limits, make_shop, message, noise, row_of, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from extras import pictures, readers, table
from extras.runtime import UserError

law = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
ROOT = Path(data.__file__).parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}

# --- Opening pictures ---


def test_grey_palette_16_bit_cmyk_and_one_bit_pictures_come_out_in_their_colours(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.asarray(noise(0, (16, 16))) // 128 * 255  # few enough for a palette
    for name, image, expected in [
        ("grey.png", Image.fromarray(ramp), ramp),
        ("16-bit.png", Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        ("16-bit.tif", Image.fromarray(ramp.astype(np.uint16) * 257), ramp),
        ("32-bit.tif", Image.fromarray(ramp.astype(np.int32) * 257), ramp),
        ("palette.gif", Image.fromarray(colours).quantize(8), colours),
        ("one-bit.png", Image.fromarray(ramp).point(lambda level: level > 99, "1"), (ramp > 99) * 255),
        ("cmyk.tif", Image.fromarray(colours).convert("CMYK"), colours),
        ("white.jpg", Image.new("RGB", (16, 16), "white"), ramp * 0 + 255),
        ("colours.bmp", Image.fromarray(colours), colours),
        ("colours.webp", Image.fromarray(colours), colours),
    ]:
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        expected = np.broadcast_to(expected[..., None] if expected.ndim == 2 else expected, (16, 16, 3))
        assert (data.picture(tmp_path, name, 16) == expected).all(), name


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, 4:] = (0, 0, 0, 255)  # black on the right, invisible black on the left
    image = Image.fromarray(rgba)
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png")
    pixels = data.picture(tmp_path, "a.png", 8)
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()


TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_says(tmp_path, orientation):
    upright, exif = noise(orientation, (12, 16)), Image.Exif()
    stored = upright.transpose(Image.Transpose[TURNS[orientation - 2]]) if orientation > 1 else upright
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert (data.picture(tmp_path, "a.png", 16) == pictures.make_square(upright, 16, "stretch")).all()


RESOLUTION_IN_WORDS = (0x011A, (2, 4, b"lot\0"))
WIDTH_BELOW_0 = (0x0100, (9, 1, struct.pack(">i", -1)))


@pytest.mark.parametrize("tag, wrong", [RESOLUTION_IN_WORDS, WIDTH_BELOW_0])
def test_a_malformed_tag_beside_the_orientation_spoils_no_picture(tmp_path, tag, wrong):
    tags = {0x0112: (3, 1, struct.pack(">HH", 6, 0)), tag: wrong}  # tag: (type, count, value)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(tags))
    for number, (kind, count, value) in sorted(tags.items()):
        exif += struct.pack(">HHI", number, kind, count) + value
    upright = noise(1, (12, 16))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif + bytes(4))
    assert (data.picture(tmp_path, "a.png", 16) == pictures.make_square(upright, 16, "stretch")).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp"])
def test_an_animation_shows_its_first_frame(tmp_path, name):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
    assert (data.picture(tmp_path, name, 8) == (255, 0, 0)).all()


@law
@given(width=st.integers(1, 40), height=st.integers(1, 40), size=st.integers(1, 24), seed=SEEDS)
def test_pad_keeps_the_shape_and_fills_with_the_colour_of_the_border(width, height, size, seed):
    generator = np.random.default_rng(seed)
    border, inside = generator.integers(0, 256, (2, 3), np.uint8)
    pixels = np.full((height, width, 3), border, np.uint8)
    pixels[1:-1, 1:-1] = inside
    square = pictures.make_square(Image.fromarray(pixels), size, "pad")
    assert square.shape == (size, size, 3) and square.dtype == np.uint8
    longest = max(width, height)
    inner = (max(1, round(width * size / longest)), max(1, round(height * size / longest)))
    left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    middle = np.asarray(Image.fromarray(pixels).resize(inner, Image.BILINEAR))
    assert (square[top : top + inner[1], left : left + inner[0]] == middle).all()
    outside = np.ones((size, size), bool)
    outside[top : top + inner[1], left : left + inner[0]] = False
    if longest <= size:  # no pixel of the border is blended with the inside when nothing shrinks
        frame = np.concatenate([middle[0], middle[-1], middle[:, 0], middle[:, -1]])
        assert (square[outside] == np.median(frame, axis=0).round()).all()


def test_a_garment_on_a_plain_ground_is_padded_with_that_ground(tmp_path):
    pixels = np.full((40, 20, 3), (240, 230, 220), np.uint8)
    pixels[5:35, 5:15] = (10, 20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (data.picture(tmp_path, "a.png", 40, "pad")[:, [0, 9, 30, 39]] == (240, 230, 220)).all()


def test_a_big_jpeg_decoded_at_a_fraction_is_the_same_picture(tmp_path):
    noise(0, (400, 300)).resize((1600, 1200), Image.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    whole = pictures.make_square(data.open_picture(tmp_path, "a.jpg"), 256, "stretch").astype(int)
    assert np.abs(whole - data.picture(tmp_path, "a.jpg", 256)).mean() < 2
    assert data.open_picture(tmp_path, "a.jpg", at_least=128).size == (200, 150)


def encoded(kind, share=1.0):
    """The first part of a picture file of this kind."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"a.{kind}"
        noise(0, (64, 64)).save(path)
        content = path.read_bytes()
    return content[: int(len(content) * share)]


def png_of_size(width, height):
    """A PNG of a few bytes that claims to be of this size."""
    content = bytearray(encoded("png"))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
NO_PICTURE = "not a picture (JPEG, PNG, WEBP, GIF, BMP, TIFF)"
LIMITS = "at most 50000000 pixels, 30000 on a side, are read"
BAD_PICTURES = {
    "empty.jpg": (b"", "empty file (0 bytes)"),
    "text.jpg": (b"not found", NO_PICTURE),
    "page.png": (b"<!DOCTYPE html><html></html>", NO_PICTURE),
    "postscript.jpg": (POSTSCRIPT, NO_PICTURE),
    "head.jpg": (encoded("jpg", 0.02), "truncated picture (Truncated File Read)"),
    "half.jpg": (encoded("jpg", 0.5), "truncated picture (image file is truncated (N bytes not processed))"),
    "half.png": (encoded("png", 0.5), "truncated picture (image file is truncated)"),
    "large.png": (png_of_size(8_000, 7_000), f"absurd size, 8000 x 7000 ({LIMITS})"),
    "long.png": (png_of_size(1, 30_001), f"absurd size, 1 x 30001 ({LIMITS})"),
    "thin.png": (png_of_size(1, 80_000_000), f"absurd size, 1 x 80000000 ({LIMITS})"),
    "absurd.png": (png_of_size(2**30, 2**30), "absurd size, over 50000000 pixels"),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_every_broken_picture_gets_its_message_and_little_memory(tmp_path, name):
    content, reason = BAD_PICTURES[name]
    (tmp_path / name).write_bytes(content)
    with limits():
        told = message(data.picture, tmp_path, name, 16)
    assert re.sub(r"\d+ bytes not", "N bytes not", told) == f"{name}: {reason}"


def test_floating_point_pixels_have_no_white(tmp_path):
    Image.new("F", (4, 4)).save(tmp_path / "a.tif")
    reason = "floating-point pixels, and nothing says which number is white"
    assert message(data.picture, tmp_path, "a.tif", 16) == f"a.tif: undecodable picture ({reason})"


def test_no_other_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever the file is named."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "coat.jpg").write_bytes(POSTSCRIPT)
    message(data.open_picture, tmp_path, "coat.jpg")
    message(data.open_picture, "", str(tmp_path / "coat.jpg"))
    assert not (tmp_path / "started").exists()


KINDS = st.sampled_from(["jpg", "png", "gif", "webp", "tiff", "bmp"])
FLIPS = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=5)


@law
@given(cut=st.integers(0, 2000), flips=FLIPS, kind=KINDS)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds
def test_any_damaged_file_is_a_picture_or_one_error(cut, flips, kind):
    content = bytearray(encoded(kind))
    content = content[: len(content) - cut]
    for place, value in flips:
        if place < len(content):
            content[place] = value
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a").write_bytes(content)
        try:
            assert data.picture(name, "a", 8).shape == (8, 8, 3)
        except UserError as error:
            assert str(error).startswith("a: ")


def test_no_link_leads_out_of_the_folder_but_links_within_it_are_followed(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    noise(9).save(outside / "secret.png")
    (folder / "images/link.png").symlink_to(outside / "secret.png")
    (folder / "linked").symlink_to(outside)
    (folder / "images/inner.png").symlink_to("0.png")
    for name in ("images/link.png", "linked/secret.png"):
        told = message(data.picture, folder, name, 8)
        assert told == f"{name}: a link leads out of the folder; put the picture itself there"
    write_rows(folder / "test.jsonl", [row_of(0, image="linked/secret.png"), row_of(1)])
    found, _ = data.load(folder, "test", 8, skip_bad=True)
    assert [row["image"] for row in found.rows] == ["images/1.png"]
    assert (data.picture(folder, "images/inner.png", 8) == data.picture(folder, "images/0.png", 8)).all()
    (outside / "to_folder").symlink_to(folder)  # the folder itself may be reached through a link
    assert data.picture(outside / "to_folder", "images/0.png", 8).shape == (8, 8, 3)
    assert data.picture("", folder / "images/link.png", 8).shape == (8, 8, 3)  # a path that the user names


def test_impossible_sizes_and_fits_and_missing_pictures_are_errors(folder):
    os.mkfifo(folder / "pipe.png")
    assert message(data.picture, folder, "images/0.png", 0) == "size must be at least 1 pixel, got 0"
    assert message(data.load, folder, "train", 8, "crop") == "fit must be stretch or pad, got 'crop'"
    for name in ("images/none.png", "pipe.png", "images"):
        assert message(data.picture, folder, name, 8) == f"missing picture {name}"
    assert message(data.picture, folder, "x" * 300, 8) == f"missing picture '{'x' * 76}..."


# --- The cache ---


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_cache_holds_what_picture_gives_for_any_number_of_threads(folder, fit, threads, monkeypatch):
    monkeypatch.setattr(pictures.os, "cpu_count", lambda: threads)
    opened, found = data.load(folder, "train", 10, fit)
    rows = opened.rows
    assert found[:].shape == (len(rows), 10, 10, 3) and found[:].dtype == np.uint8 and len(found) == len(rows)
    for number, row in enumerate(rows):
        assert (found[number] == data.picture(folder, row["image"], 10, fit)).all()
    assert (found[np.array([3, 0])] == np.stack([found[3], found[0]])).all()


def names_of(folder):
    return [row["image"] for row in readers.read(folder, "train")]


def cached(folder):
    return sorted(path.name for path in (folder / ".cache").glob("*.npy"))


def test_the_cache_is_used_again_and_built_again_when_a_picture_size_or_fit_changes(folder, monkeypatch):
    names = names_of(folder)
    before, _ = data.open_pictures(folder, names, 8)
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "picture", None)  # nothing is decoded again
        assert (data.open_pictures(folder, names, 8)[0][:] == before[:]).all()
    assert len(cached(folder)) == 1
    data.open_pictures(folder, names, 8, "pad")
    data.open_pictures(folder, names, 9)
    assert len(cached(folder)) == 3
    kept = (folder / names[0]).stat()
    time.sleep(0.02)
    Image.fromarray(255 - np.asarray(Image.open(folder / names[0]))).save(folder / names[0])
    os.utime(folder / names[0], ns=(kept.st_atime_ns, kept.st_mtime_ns))  # as `cp -p` leaves it
    after, _ = data.open_pictures(folder, names, 8)
    assert (after[0] == data.picture(folder, names[0], 8)).all() and not (after[0] == before[0]).all()
    assert (after[1:] == before[1:]).all()


def test_a_bad_picture_is_reported_each_time_and_left_out_with_skip_bad(folder, capsys):
    (folder / "images/2.png").write_bytes(encoded("png", 0.5))
    (folder / "images/9.png").write_bytes(b"nothing")
    write_rows(folder / "test.jsonl", [row_of(number) for number in (0, 2, 3, 9, 2)] + [{"image": "no.png"}])
    lines = [
        "  test.jsonl:6: no caption",
        "  test.jsonl:2: images/2.png: truncated picture (image file is truncated)",
        f"  test.jsonl:4: images/9.png: {NO_PICTURE}",
        "  test.jsonl:5: images/2.png: truncated picture (image file is truncated)",
    ]
    first = f"{folder}: 4 bad rows in test (--skip-bad leaves them out)"
    for _ in range(2):  # the second time out of the cache
        assert message(data.load, folder, "test", 8).split("\n") == [first, *lines]
    opened, found = data.load(folder, "test", 8, skip_bad=True)
    rows = opened.rows
    assert [row["where"] for row in rows] == ["test.jsonl:1", "test.jsonl:3"]
    assert (found[1] == data.picture(folder, "images/3.png", 8)).all() and len(found) == 2
    assert capsys.readouterr().out.rstrip("\n").split("\n") == [f"{folder}: left out 4 bad rows of test", *lines]


def test_a_split_of_bad_pictures_only_has_no_rows(folder):
    (folder / "images/0.png").write_bytes(b"nothing")
    for row in (row_of(0), {}):
        write_rows(folder / "test.jsonl", [row])
        assert message(data.load, folder, "test", 8, skip_bad=True) == f"{folder}: the split 'test' has no rows"


def test_a_killed_build_is_never_read_and_its_file_is_removed(folder):
    program = (
        "import os, signal\n"
        "from extras import pictures\n"
        "picture = pictures.picture\n"
        "def slow(folder, reference, size, fit):\n"
        "    if reference.endswith('5.png'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return picture(folder, reference, size, fit)\n"
        "pictures.picture = slow\n"
        f"names = [f'images/{{number}}.png' for number in range(6)]\n"
        f"pictures.open_pictures({str(folder)!r}, names, 8)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ONE_THREAD)
    assert killed.returncode == -signal.SIGKILL and cached(folder) == []
    (left,) = (folder / ".cache").glob("*.tmp")
    os.utime(left, (time.time() - 6, time.time() - 6))
    (name, *_) = names = names_of(folder)
    assert (data.open_pictures(folder, names, 8)[0][0] == data.picture(folder, name, 8)).all()
    assert list((folder / ".cache").glob("*.tmp")) == []


def temporary(number, age, name="8-stretch-0123456789abcdef.npy"):
    """A name as `whole_file` gives it, and its age in seconds."""
    return f"{name}.{number:032x}.tmp", age


def test_only_our_own_stale_temporary_files_are_removed_and_before_space_is_measured(folder, monkeypatch):
    cache = folder / ".cache"
    cache.mkdir()
    ours = [temporary(1, 10), temporary(2, 9999), temporary(3, 99, "16-pad-0123456789abcdef.json")]
    others = [temporary(4, 0), temporary(5, 99), ("thesis.tmp", 9999), temporary(6, 9999, "thesis.npy")]
    for name, age in ours + others:
        (cache / name).write_bytes(b"x")
        os.utime(cache / name, (time.time() - age,) * 2)
    with open(cache / others[1][0]) as living:  # a build that runs now
        pictures.fcntl.flock(living, pictures.fcntl.LOCK_EX)
        present = []

        def disk_usage(path):
            present.extend(path.name for path in cache.glob("*.tmp"))
            return shutil._ntuple_diskusage(10**9, 10**9 - 10, 10)

        monkeypatch.setattr(pictures.shutil, "disk_usage", disk_usage)
        told = message(data.load, folder, "train", 800, decode="kept")
    assert sorted(present) == sorted(name for name, _ in others)
    sizes = rf"decoded they take \d+ MB, and 0 MB are free in {cache}"
    assert re.fullmatch(rf"{folder}: the pictures cannot be kept: {sizes}; --decode live needs no space", told)


@pytest.mark.parametrize("share_of_disk, live", [(0.49, False), (0.51, True)])
def test_pictures_that_would_take_more_than_half_of_the_free_disk_are_decoded_live(
    folder, monkeypatch, capsys, share_of_disk, live
):
    free = int(6 * 8 * 8 * 3 / share_of_disk)
    monkeypatch.setattr(pictures.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))
    found = data.load(folder, "train", 8)[1]
    assert isinstance(found.pixels[0], pictures.Live) == live
    assert ("is decoded whenever it is needed (--decode live): decoded they take" in capsys.readouterr().out) == live
    if not live:  # what is there already is read, whatever the disk has left
        monkeypatch.setattr(pictures.shutil, "disk_usage", None)
        assert (data.load(folder, "train", 8)[1][:] == found[:]).all()


def test_live_pictures_are_the_kept_ones_bit_for_bit(folder):
    for fit in ("stretch", "pad"):
        kept, live = (data.load(folder, "train", 10, fit, decode=how)[1] for how in ("kept", "live"))
        for rows in (slice(None), 2, np.array([5, 0, 5]), np.array([[1], [2]]), np.array([], int)):
            assert live[rows].shape == kept[rows].shape and (live[rows] == kept[rows]).all()
        assert live.size == kept.size == 10 and len(live) == 6
        assert (live.select([4, 1])[:] == kept[[4, 1]]).all()
        both = pictures.join_pictures(live.select([4, 1]), kept)
        assert (both[np.array([2, 0, 7, 1])] == kept[[0, 4, 5, 1]]).all()
    assert [path.suffix for path in (folder / ".cache").iterdir() if path.is_file()].count(".npy") == 2
    told = message(data.load, folder, "train", 8, decode="both")
    assert told == "decode must be one of auto, kept, live, got 'both'"


def test_an_interrupted_build_leaves_nothing_behind(folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "picture", stop)
    with pytest.raises(KeyboardInterrupt):
        data.load(folder, "train", 8)
    assert [path.name[:11] for path in (folder / ".cache").iterdir()] == ["rows-train-"]  # the table was whole


@pytest.fixture
def other_place(folder, tmp_path_factory, monkeypatch):
    """`.cache` cannot be written, so this user's own folder below this temporary one is used."""
    (folder / ".cache").touch()  # no folder can be made here; a mode would not stop root
    place = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(pictures.tempfile, "gettempdir", lambda: str(place))
    return place / f"mvlt-cache-{os.getuid()}"


def test_data_that_cannot_be_written_is_cached_in_a_folder_of_this_user_alone(folder, other_place):
    for _ in range(2):
        opened, found = data.load(folder, "train", 8)
        rows = opened.rows
        assert found.files[0][0].parent == other_place
        assert (found[0] == data.picture(folder, rows[0]["image"], 8)).all()
    assert other_place.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("case", ["a link", "writable by all", "of another user", "a file"])
def test_a_temporary_folder_that_another_user_could_have_made_is_not_used(folder, other_place, case, monkeypatch):
    thesis = other_place.parent / "home" / "8-stretch-0123456789abcdef.npy.0123456789abcdef0123456789abcdef.tmp"
    thesis.parent.mkdir()
    thesis.touch()
    os.utime(thesis, (1, 1))
    if case == "a link":
        other_place.symlink_to(thesis.parent)
    elif case == "a file":
        other_place.touch()
    else:
        other_place.mkdir()
        other_place.chmod(0o777 if case == "writable by all" else 0o700)
        if case == "of another user":
            user = os.getuid()
            monkeypatch.setattr(pictures.os, "getuid", lambda: user + 1)
            other_place.rename(other_place.with_name(f"mvlt-cache-{user + 1}"))
    told = message(data.load, folder, "train", 8)
    assert told.startswith(f"{folder}/.cache: cannot be written, nor is ")
    assert thesis.exists() and len(list(thesis.parent.iterdir())) == 1


def test_the_temporary_folder_is_not_looked_at_when_the_cache_can_be_written(folder, other_place):
    (folder / ".cache").unlink()
    other_place.mkdir()
    names = names_of(folder)
    path = data.open_pictures(folder, names, 8)[0].files[0][0]
    planted = other_place / path.name
    shutil.copy(path, planted)
    shutil.copy(path.with_suffix(".json"), planted.with_suffix(".json"))
    path.unlink()
    assert data.open_pictures(folder, names, 8)[0].files[0][0] == path


def test_a_cache_that_is_a_link_is_neither_read_nor_written_nor_cleaned(folder, other_place, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    (folder / ".cache").unlink()
    (folder / ".cache").symlink_to(home)
    (home / temporary(1, 0)[0]).touch()
    os.utime(home / temporary(1, 0)[0], (1, 1))
    found = data.load(folder, "train", 8)[1]
    assert found.files[0][0].parent == other_place
    assert [path.name for path in home.iterdir()] == [temporary(1, 0)[0]]


def test_a_whole_cache_of_a_folder_that_cannot_be_written_is_read(folder, other_place, monkeypatch):
    (folder / ".cache").unlink()
    names = names_of(folder)
    data.open_pictures(folder, names, 8)
    monkeypatch.setattr(pictures.os, "access", lambda *_: False)
    monkeypatch.setattr(pictures, "picture", None)
    assert data.open_pictures(folder, names, 8)[0].files[0][0].parent == folder / ".cache"


def header(dtype="|u1", shape=(4, 8, 8, 3), order=False):
    """The beginning of a .npy file."""
    file = tempfile.TemporaryFile()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": order, "shape": shape})
    file.seek(0)
    return file.read()


PIXELS = bytes(4 * 8 * 8 * 3)
BAD_PIXELS = {
    "empty": b"",
    "half a header": header()[:50],
    "one byte less": header() + PIXELS[1:],
    "one byte more": header() + PIXELS + b"x",
    "other shape": header(shape=(4, 4, 16, 3)) + PIXELS,
    "flat": header(shape=(768,)) + PIXELS,
    "too short": header(shape=(3,)) + b"xxx",
    "floats": header("<f4", (4, 4, 4, 3)) + PIXELS,
    "other order": header(order=True) + PIXELS,
    "fat": header(shape=(10**9, 8, 8, 3)) + PIXELS,
    "brackets": header().replace(b"(4", b"((" * 30 + b"4") + PIXELS,
    "no dict": b"\x93NUMPY\x01\x00v\x00" + b"{" * 118 + PIXELS,
    "pickle": pickle.dumps([np.zeros(3)]),
}
BAD_REASONS = {
    "empty": b"",
    "nested": b"[" * 9000,
    "nested and fat": b"[" * 1_000_000,
    "half": b'{"0.png": "x',
    "not UTF-8": b"\xff\xfe",
    "huge number": b"9" * 5000,
    "blanks": b" " * 1_000_000 + b"{}",
    "null": b"null",
    "a number": b"5",
    "a text": b'"0.png"',
    "a list": b'["0.png"]',
    "number as reason": b'{"0.png": 5}',
    "list as reason": b'{"0.png": ["x"]}',
    "unknown picture": b'{"7.png": "x"}',
}


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    """A folder of four pictures, and the names of five rows."""
    folder = tmp_path_factory.mktemp("four")
    for number in range(4):
        noise(number).save(folder / f"{number}.png")
    return folder, [f"{number}.png" for number in (3, 1, 0, 2, 1)]


def check_rebuilt(four, change, *arguments):
    """Change one file of the cache, `.npy` or `.json`: the pictures are those of a new build, and so is the cache."""
    folder, names = four
    path = data.open_pictures(*four, 8)[0].files[0][0]
    change(path, *arguments)
    with limits(seconds=10):
        found, bad = data.open_pictures(*four, 8)
    assert (found[:] == np.stack([data.picture(folder, name, 8) for name in names])).all() and bad == {}
    assert path.read_bytes()[:128] == header() and path.stat().st_size == 128 + len(PIXELS)
    assert json.loads(path.with_suffix(".json").read_bytes()) == {}


@pytest.mark.parametrize("case", BAD_PIXELS)
def test_a_cache_with_damaged_pixels_is_built_again(four, case):
    check_rebuilt(four, lambda path: path.write_bytes(BAD_PIXELS[case]))


@pytest.mark.parametrize("case", BAD_REASONS)
def test_a_cache_with_damaged_reasons_is_built_again(four, case):
    check_rebuilt(four, lambda path: path.with_suffix(".json").write_bytes(BAD_REASONS[case]))


def test_a_cache_without_its_reasons_is_built_again(four):
    check_rebuilt(four, lambda path: path.with_suffix(".json").unlink())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@law
@given(value=JSON | st.dictionaries(st.sampled_from(["0.png", "1.png"]), st.integers(), min_size=1))
def test_a_cache_with_any_other_json_is_built_again(four, value):
    check_rebuilt(four, lambda path: path.with_suffix(".json").write_text(json.dumps(value)))


@law
@given(content=st.binary(max_size=300), length=st.integers(0, 127 + len(PIXELS)), cut=st.booleans())
def test_a_cache_that_is_cut_or_holds_any_bytes_is_built_again(four, content, length, cut):
    check_rebuilt(four, lambda path: path.write_bytes(path.read_bytes()[:length] if cut else content))


def test_a_damaged_cache_is_reported_in_one_line(four, capsys):
    path = data.open_pictures(*four, 8)[0].files[0][0]
    path.write_bytes(b"x")
    data.open_pictures(*four, 8)
    data.open_pictures(*four, 8)
    assert capsys.readouterr().out == f"{path}: damaged, so the pictures are decoded again\n"


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_pipe_in_the_place_of_a_cache_is_replaced(four, suffix):
    def pipe(path):
        path.with_suffix(suffix).unlink()
        os.mkfifo(path.with_suffix(suffix))

    check_rebuilt(four, pipe)


@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_link_in_the_place_of_a_cache_is_replaced_and_not_followed(four, suffix, tmp_path):
    def link(path):
        path = path.with_suffix(suffix)
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)

    check_rebuilt(four, link)
    assert not data.open_pictures(*four, 8)[0].files[0][0].with_suffix(suffix).is_symlink()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_in_the_place_of_a_cache_is_one_error(four):
    path = data.open_pictures(*four, 8)[0].files[0][0]
    path.unlink()
    path.mkdir()
    assert message(data.open_pictures, *four, 8) == f"{path}: cannot be written (Is a directory)"
    path.rmdir()


def test_pictures_sent_to_another_process_carry_no_pixels(folder):
    found = data.load(folder, "train", 64)[1]
    sent = pickle.dumps(found)
    assert len(sent) < 1000 and (pickle.loads(sent)[:] == found[:]).all()


# --- A split ---

LABELS = {"category": ["COATS"], "subcategory": ["kind 0", "kind 1"]}
CORPUS = ["coat no. 0 1 2 in café brown, hat"] * 3


def open_train(folder, image_size=8, **options):
    tokenizer = data.Tokenizer.train(CORPUS, 100)
    return data.open_split(folder, "train", tokenizer, LABELS, image_size, 12, **options)


def test_a_split_holds_the_numbers_of_its_rows(folder):
    changes = {1: {"caption": "A hat"}, 3: {"caption": " a  HAT", "category": "HATS"}, 5: {"subcategory": ""}}
    write_rows(folder / "train.jsonl", [row_of(number, **changes.get(number, {})) for number in range(6)])
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    split = open_train(folder)
    assert len(split) == 6 and [row["product_id"] for row in split.rows] == list("001122")
    assert split.products.tolist() == [0, 0, 1, 1, 2, 2]
    assert split.captions.tolist() == [0, 1, 2, 1, 3, 3]
    assert split.groups.tolist() == [0, 0, 1, 2, 0, -1]  # a sub-category of another category is another group
    assert split.categories.tolist() == [0, 0, 0, -1, 0, 0] and split.subcategories.tolist() == [0, 0, 1, 1, 0, -1]
    words = split.tokenizer.encode(split.rows[1]["caption"])
    assert split.tokens[1].tolist() == words + [0] * (split.tokens.shape[1] - len(words))
    rows = torch.tensor([1, 3, 0])
    assert split.same(rows).tolist() == [[True, True, True], [True, True, False], [True, False, True]]
    split.pictures.index[3] = split.pictures.index[0]  # as if both showed one picture
    del split.marks
    assert split.same(rows).all()
    split.pictures.index[3] = 3
    pixels = torch.from_numpy(data.picture(folder, "images/3.png", 8)).permute(2, 0, 1)
    assert (split.images(torch.tensor([3])) == pixels[None].float() / 255).all()
    assert split.images(rows).shape == (3, 3, 8, 8) and split.images(rows).is_contiguous()


def test_the_negatives_of_a_split_are_those_of_draw_negatives(shop):
    rows = readers.read(shop, "train")
    labels = {field: table.build(rows).class_names(field) for field in ("category", "subcategory")}
    split = data.open_split(shop, "train", data.Tokenizer.train(["a coat"] * 2, 30), labels, 8, 12)
    chosen = torch.arange(0, 24, 2)
    drawn = split.negatives(chosen, data.generator(0))
    assert (drawn == data.draw_negatives(chosen, split.marks, data.generator(0))).all()


def test_the_pool_of_pictures_holds_each_picture_once_and_those_of_a_folder(folder, tmp_path_factory):
    write_rows(folder / "train.jsonl", [row_of(number, image=f"images/{number % 2}.png") for number in range(6)])
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    split, more = open_train(folder, fit="pad"), tmp_path_factory.mktemp("more")
    assert [row["image"] for row in data.picture_pool(split).rows] == ["images/0.png", "images/1.png"]
    (more / "deep").mkdir()
    (more / ".hidden").mkdir()
    for name in ("b.png", "deep/a.JPG", "c.gif", ".hidden/d.png", "deep/._a.png"):
        noise(len(name), (20, 10)).save(more / name)
    (more / "readme.txt").write_text("no picture")
    pool = data.picture_pool(split, more)
    assert [row["image"] for row in pool.rows] == ["images/0.png", "images/1.png", "b.png", "c.gif", "deep/a.JPG"]
    for number, row in enumerate(pool.rows):
        home = folder if number < 2 else more
        assert (pool.pictures[number] == data.picture(home, row["image"], 8, "pad")).all()
    order = np.array([4, 0, 3, 1, 2])
    assert (pool.pictures[order] == np.stack([pool.pictures[number] for number in order])).all()
    assert (pickle.loads(pickle.dumps(pool.pictures))[:] == pool.pictures[:]).all()
    assert len(data.picture_pool(split, folder)) == 2 + 6  # the folder of the data itself


def test_the_pool_of_pictures_reports_broken_ones_and_a_missing_folder(folder, tmp_path, tmp_path_factory, capsys):
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    split, more = open_train(folder), tmp_path_factory.mktemp("more")
    noise(1).save(more / "good.png")
    (more / "bad.png").write_bytes(b"x")
    told = message(data.picture_pool, split, more)
    first = f"{more}: 1 bad rows in pictures (--skip-bad leaves them out)"
    assert told == f"{first}\n  bad.png: {NO_PICTURE}"
    assert [row["image"] for row in data.picture_pool(split, more, skip_bad=True).rows[6:]] == ["good.png"]
    assert message(data.picture_pool, split, more / "none") == f"{more}/none: no such folder"


def test_mirror_shift_and_zoom_are_drawn_with_keys_of_their_own(monkeypatch):
    asked, usual = [], data.generator
    monkeypatch.setattr(data, "generator", lambda *key: asked.append(key) or usual(*key))
    data.Batches({}, [], 4, 0, 0, 1, mirror=0.5, shift=1, zoom=0.2).views(0)
    assert len(set(asked)) == len(asked) == 3


def test_the_pool_of_captions_holds_each_caption_once_and_the_lines_of_a_file(folder):
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    split, texts = open_train(folder), folder / "texts.txt"
    assert [row["caption"][:10] for row in data.caption_pool(split).rows] == ["Coat no. 0", "Coat no. 1", "Coat no. 2"]
    texts.write_bytes(b"\xef\xbb\xbf a hat \n\n  COAT no. 1 in caf\xc3\xa9   brown.\r\nhat no. 2\nA hat")
    pool = data.caption_pool(split, texts)
    assert [row["caption"] for row in pool.rows[3:]] == ["a hat", "hat no. 2"]
    assert [row["where"] for row in pool.rows[3:]] == [f"{texts}:1", f"{texts}:4"]
    assert pool.pictures is None and not pool.same(torch.arange(5)).triu(1).any()
    assert split.tokenizer.decode(pool.tokens[4]) == "hat no. 2"
    texts.write_bytes(b"caf\xe9")
    assert message(data.caption_pool, split, texts) == f"{texts}: must be UTF-8 text"
    os.mkfifo(folder / "pipe")
    assert message(data.caption_pool, split, folder / "pipe") == f"{folder}/pipe: not a regular file"
    told = message(data.caption_pool, split, folder / "none")
    assert told == f"{folder}/none: cannot be read (No such file or directory)"


def test_a_folder_and_pictures_whose_names_are_not_utf_8_are_read(folder):
    os.rename(folder / "images", os.fsencode(folder) + b"/images\xff")
    os.symlink(os.fsencode(folder) + b"/images\xff", folder / "images")
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    strange = Path(os.fsdecode(os.fsencode(folder) + b"/images\xff"))
    pool = data.picture_pool(open_train(folder), strange)
    assert len(pool) == 12 and (pool.pictures[6] == pool.pictures[0]).all()
    (strange / os.fsdecode(b"\xfe.png")).write_bytes(b"x")
    assert "'\\udcfe.png': not a picture" in message(data.picture_pool, open_train(folder), strange)


# --- Numbers ---


def named(names):
    """Rows of these categories."""
    fields = dict(image="a.png", caption="a", product_id="1", subcategory="", where="")
    return [{**fields, "category": name} for name in names]


def test_a_class_that_training_never_saw_stays_unknown():
    names = table.build(named(["b", "a", "", "b"])).class_names("category")
    assert names == ["a", "b"]
    assert table.build(named(["b", "a", "", "b", "c"])).classes("category", names).tolist() == [1, 0, -1, 1, -1]
    assert table.build(named([""])).classes("category", []).tolist() == [-1]


@law
@given(names=st.lists(st.sampled_from(["", "a", "b", "c"])))
def test_equal_names_get_equal_numbers_and_no_name_gets_none(names):
    numbers = table.build(named(names)).ids("category").tolist()
    for a, m in zip(names, numbers):
        assert (m == -1) == (a == "")
        assert all((a == b) == (m == n) for b, n in zip(names, numbers))


CAPTIONS = st.lists(st.lists(st.sampled_from(["coat", "wool", "zzz"]), min_size=1, max_size=9), min_size=1, max_size=8)


@law
@given(captions=CAPTIONS, length=st.integers(2, 12))
def test_captions_are_cut_to_the_longest_and_padded_with_zeros(captions, length):
    captions = [" ".join(words) for words in captions]
    tokenizer = data.Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "coat", "wool"])
    tokens = data.Words(data.tokenize(captions, tokenizer, length))[:]
    longest = max(len(caption.split()) + 2 for caption in captions)
    assert tokens.dtype == torch.int64 and tokens.shape == (len(captions), min(length, longest))
    for caption, row in zip(captions, tokens):
        words = tokenizer.encode(caption, length)
        assert row.tolist() == words[: len(row)] and not any(words[len(row) :])
    assert (data.trim(tokens) == tokens).all() and data.trim(tokens[:0]).shape == (0, 0)


@pytest.mark.parametrize("how", ["kept", "live"])
def test_a_picture_that_has_gone_or_is_empty_is_named_at_the_next_opening_too(folder, how, capsys):
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    whole = open_train(folder, decode=how)
    (folder / "images/3.png").unlink()
    (folder / "images/4.png").write_bytes(b"")
    open_train(folder, decode=how, skip_bad=True)
    said = capsys.readouterr().out
    assert "missing picture images/3.png" in said and "images/4.png: empty file (0 bytes)" in said
    left = open_train(folder, decode=how, skip_bad=True)
    assert [row["image"] for row in left.rows] == [
        row["image"] for row in whole.rows if row["image"] not in ("images/3.png", "images/4.png")
    ]


def test_a_passing_fault_of_the_disk_ends_the_run_and_is_no_verdict_on_the_picture(folder, monkeypatch):
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    usual = pictures.Image.open

    def failing(path, **options):
        if str(path).endswith("3.png"):
            raise OSError(errno.EIO, "Input/output error")
        return usual(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pictures.Image, "open", failing)
        with pytest.raises(UserError, match="images/3.png: cannot be read now .Input/output error.; try again later"):
            open_train(folder, skip_bad=True)
    rows = [row["image"] for row in open_train(folder).rows]
    assert "images/3.png" in rows


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_live_pictures_are_those_of_kept_ones_and_a_broken_one_is_one_line(folder, workers):
    write_rows(folder / "val.jsonl", [row_of(0, product_id="v")])
    pools = {how: {"pairs": open_train(folder, decode=how)} for how in ("kept", "live")}
    kept, live = (list(batches(pools=pools[how], stop=3, workers=workers, **MOVED)) for how in ("kept", "live"))
    for one, other in zip(kept, live, strict=True):
        assert (one.pixels == other.pixels).all() and (one.rows == other.rows).all()
    (folder / "images/3.png").write_bytes(b"x")
    assert message(list, batches(pools=pools["live"], stop=3, workers=workers)) == f"images/3.png: {NO_PICTURE}"


def test_trim_keeps_the_last_word_behind_a_padding_word_written_in_the_caption():
    tokens = torch.tensor([[2, 7, 0, 8, 3, 0, 0], [2, 9, 0, 3, 0, 0, 0]])
    assert data.trim(tokens).tolist() == tokens[:, :5].tolist()
    assert data.trim(torch.zeros(2, 4, dtype=torch.int64)).shape == (2, 0)


# --- Negatives ---

CATALOGUE = st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=12)


@settings(law, max_examples=100)
@given(catalogue=CATALOGUE, seed=SEEDS)
def test_a_negative_has_another_product_caption_and_picture(catalogue, seed):
    marks = products, captions, pictures = torch.tensor(catalogue).T.contiguous()
    rows = torch.arange(len(catalogue))
    arguments = (rows, marks, data.generator(seed))
    allowed = (products[:, None] != products) & (captions[:, None] != captions) & (pictures[:, None] != pictures)
    if not allowed.any(dim=1).all():
        first = int((~allowed.any(dim=1)).nonzero()[0])
        told = message(data.draw_negatives, *arguments)
        assert told == f"row {first} can have no negative: each other row shares its product, caption or picture"
        return
    drawn = data.draw_negatives(*arguments)
    assert allowed[rows, drawn].all()


def test_every_allowed_row_is_equally_likely():
    marks = torch.stack([torch.arange(20) // 2, torch.arange(20) // 4])
    rows = torch.zeros(32000, dtype=torch.int64)
    draws = data.draw_negatives(rows, marks, data.generator("uniform"))
    counts = torch.bincount(draws, minlength=20)[4:].double()  # rows 0 to 3 share the caption
    assert counts.sum() == 32000
    assert ((counts - 2000) ** 2 / 2000).sum() < 45  # chi-square, 15 degrees of freedom: p = 1 / 10,000


def test_the_rare_row_is_found_among_many():
    products = torch.zeros(100_000, dtype=torch.int64)
    products[77_777] = 1
    marks = torch.stack([products, torch.arange(100_000)])
    drawn = data.draw_negatives(torch.arange(3), marks, data.generator(0))
    assert drawn.tolist() == [77_777] * 3
    marks[0, 88_888] = 2
    drawn = data.draw_negatives(torch.arange(50), marks, data.generator(0))
    assert set(drawn.tolist()) == {77_777, 88_888}


# --- The rows of a batch ---


@law
@given(n=st.integers(1, 30), batch_size=st.integers(1, 40), steps=st.integers(1, 6), seed=SEEDS)
def test_batches_are_the_epochs_laid_end_to_end(n, batch_size, steps, seed):
    rows = torch.cat([data.batch_rows(step, batch_size, n, seed) for step in range(steps)])
    assert len(rows) == steps * batch_size
    for epoch, start in enumerate(range(0, len(rows), n)):
        part = rows[start : start + n]
        assert (part == data.epoch_order(n, seed, epoch)[: len(part)]).all() and len(part.unique()) == len(part)
        assert part.min() >= 0 and part.max() < n


def test_epochs_and_seeds_differ_in_their_order():
    orders = {tuple(data.epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


KEYS = st.lists(st.integers() | st.text(), max_size=3)


@law
@given(key=KEYS, other=KEYS)
def test_equal_keys_give_equal_randomness_and_other_keys_other(key, other):
    same = [str(part) for part in key] == [str(part) for part in other]
    draws = [torch.randint(2**62, (), generator=data.generator(*each)) for each in (key, key, other)]
    assert draws[0] == draws[1] and (draws[0] == draws[2]) == same


def test_the_draws_are_those_of_earlier_versions():
    """An older run must go on with the same batches: these numbers may never change."""
    assert data.batch_rows(3, 5, 12, seed=7).tolist() == [9, 8, 6, 11, 10]
    pairs = torch.arange(12) // 2
    drawn = data.draw_negatives(torch.arange(6), torch.stack([pairs, pairs]), data.generator(7, "negatives"))
    assert drawn.tolist() == [8, 8, 11, 10, 8, 8]


# --- Batches ---


class Array(pictures.Pictures):
    """Pictures that are in memory."""

    def __init__(self, pixels):
        self.pixels, self.index, self.files = [pixels], np.arange(len(pixels)), []

    def __reduce__(self):
        return Array, (self.pixels[0],)


def split_of(pixels, groups=None):
    """A split of these pictures (n, H, W, 3) and nothing else."""
    n = len(pixels)
    fields = dict.fromkeys(("tokens", "products", "captions", "categories", "subcategories", "tokenizer", "labels"))
    groups = torch.zeros(n, dtype=torch.int64) if groups is None else groups
    return data.Split(rows=[{}] * n, pictures=Array(pixels), groups=groups, text_len=2, fit="stretch", **fields)


NOISE = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), np.uint8)
PAIRS = split_of(NOISE)
ALWAYS_PAIRS = ["pairs"] * 100


def batches(pixels=None, start=0, stop=5, order=ALWAYS_PAIRS, pools=None, size=7, seed=3, **options):
    pools = pools or {"pairs": PAIRS if pixels is None else split_of(pixels)}
    return data.Batches(pools, order, size, seed, start, stop, **options)


def images_of(world=1, **options):
    """The pictures of each global batch (steps, G, 3, H, W), put together from the shares of `world` processes."""
    shares = [list(batches(index=index, world=world, **options)) for index in range(world)]
    images = []
    for same_step in zip(*shares):
        bounds = [batch.share for batch in same_step]
        assert bounds[0][0] == 0 and bounds[-1][1] == 7
        assert all(end == begin for (_, end), (begin, _) in zip(bounds, bounds[1:]))
        assert all((batch.rows == data.batch_rows(batch.step, 7, 23, 3)).all() for batch in same_step)
        images.append(torch.cat([batch.images(slice(*batch.share)) for batch in same_step]))
    return torch.stack(images)


MOVED = {"mirror": 0.5, "shift": 2, "zoom": 0.5}


@pytest.mark.parametrize("options", [{}, {"mirror": 0.5}, MOVED])
def test_any_number_of_processes_and_loaders_sees_the_same_batches(options):
    alone = images_of(**options)
    assert alone.shape == (5, 7, 3, 4, 4) and alone.dtype == torch.float32
    assert alone.min() >= 0 and alone.max() == 1
    for world in (2, 3, 7):
        assert (images_of(world, **options) == alone).all()
    if options == MOVED:
        assert (images_of(workers=2, **options) == alone).all()


def test_batches_begun_in_the_middle_are_those_of_the_unbroken_run():
    assert (images_of(start=3, **MOVED) == images_of(**MOVED)[3:]).all()
    assert len(batches(start=5)) == len(list(batches(start=5))) == 0
    assert [batch.step for batch in batches(start=2)] == [2, 3, 4] and len(batches(start=2)) == 3


@law
@given(size=st.integers(1, 9), world=st.integers(1, 4), micro=st.integers(0, 5), places=st.lists(st.integers(0, 8)))
def test_parts_cover_the_share_and_any_place_has_its_own_picture_in_every_process(size, world, micro, places):
    places = torch.tensor([place % size for place in places], dtype=torch.int64)
    (alone,) = batches(stop=1, size=size, **MOVED)
    images = alone.images(slice(0, size))
    covered = []
    for index in range(world):
        (batch,) = batches(stop=1, size=size, index=index, world=world, **MOVED)
        for part in batch.parts(micro):
            covered += range(part.start, part.stop)
            assert 0 < part.stop - part.start <= (micro or size)
            assert (batch.images(part) == images[part]).all()
        assert (batch.images_at(places) == images[places]).all()
    assert covered == list(range(size))


def test_each_step_reads_its_own_pool():
    pools = {
        "pairs": split_of(NOISE),
        "pictures": split_of(255 - NOISE[:9]),
        "captions": data.replace(PAIRS, rows=[{}] * 11, pictures=None),
    }
    order = ["pictures"] * 2 + ["captions"] * 2 + ["pairs"] * 5
    for workers in (0, 2):
        found = list(batches(pools=pools, order=order, stop=9, workers=workers, **MOVED))
        assert [batch.split for batch in found] == [pools[name] for name in order]
        for batch, name in zip(found, order):
            expected = data.batch_rows(batch.step, 7, len(pools[name]), 3)
            assert (batch.rows == expected).all()
            if name == "captions":
                assert batch.images(slice(0, 7)) is None
            else:
                assert (batch.images(slice(0, 7)) == batch.images_at(torch.arange(7))).all()


def test_mirror_turns_that_share_of_the_pictures_and_nothing_else():
    plain, turned = (images_of(stop=60, mirror=mirror).flatten(0, 1) for mirror in (0.0, 0.3))
    rows = torch.cat([data.batch_rows(step, 7, 23, 3) for step in range(60)])
    assert (plain == PAIRS.images(rows)).all()
    kept, flipped = (turned == plain).flatten(1).all(1), (turned == plain.flip(-1)).flatten(1).all(1)
    assert (kept ^ flipped).all() and 0.2 < flipped.float().mean() < 0.4
    assert (images_of(mirror=1.0).flip(-1) == images_of(mirror=0.0)).all()


def window(pixels, moves, sides):
    """`through_windows` with a border that is wide enough."""
    return data.through_windows(pixels, np.array(moves), np.array(sides), 40)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_each_picture_is_moved_by_its_own_amount_and_no_further_than_shift(shift):
    """Every picture of a batch is one of the (2 shift + 1)^2 moved versions of its own row, each of which occurs."""
    amounts = [(y, x) for y in range(-shift, shift + 1) for x in range(-shift, shift + 1)]
    same_size = np.ones((len(NOISE), 2))
    versions = np.stack([window(NOISE, [amount] * len(NOISE), same_size) for amount in amounts])  # (amounts, n, ..)
    found = set()
    for batch in batches(stop=60, shift=shift):
        for row, image in zip(batch.rows.tolist(), batch.pixels.numpy()):
            (which,) = np.nonzero((versions[:, row] == image).all(axis=(1, 2, 3)))[0].tolist()
            found.add(amounts[which])
    assert found == set(amounts)


def test_zoom_scales_each_side_of_each_picture_in_and_out_and_no_further_than_asked():
    """The steepness of a ramp shows the size of the window."""
    ramp = np.broadcast_to(np.arange(40, 200, 4, dtype=np.uint8)[None, :, None, None], (23, 40, 40, 3))
    for pixels, axis in ((ramp, 1), (ramp.swapaxes(1, 2), 2)):
        found = batches(np.ascontiguousarray(pixels), stop=40, zoom=0.3)
        images = torch.cat([batch.images(slice(0, 7)) for batch in found]) * 255
        steep = (images.select(axis + 1, 25) - images.select(axis + 1, 15)).flatten(1).mean(1) / 40
        assert 0.66 < steep.min() < 0.75 and 1.25 < steep.max() < 1.34 and abs(steep.mean() - 1) < 0.05


def test_loading_leaves_the_global_randomness_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(batches(stop=2, **MOVED))
    assert (torch.rand(3) == expected).all()


def test_loading_processes_ignore_the_signals_that_stop_a_run():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        data.ignore_signals(0)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in handlers)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@law
@given(shift=st.integers(0, 4), side=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_a_moved_picture_is_the_picture_seen_through_a_moved_window(shift, side, seed):
    draw = np.random.default_rng(seed)
    pixels, moves = draw.integers(0, 256, (3, side, side, 3), np.uint8), draw.integers(-shift, shift + 1, (3, 2))
    found = window(pixels, moves, np.ones((3, 2)))
    places = np.arange(side)
    for picture, (down, right), got in zip(pixels, moves.tolist(), found):
        rows, columns = (places + down).clip(0, side - 1), (places + right).clip(0, side - 1)  # the edge goes on
        assert (got == picture[rows][:, columns]).all()


def two(numbers):
    return st.tuples(numbers, numbers)


@law
@given(sides=two(st.floats(0.2, 1.8)), moves=two(st.integers(-4, 4)), slopes=two(st.integers(-5, 5)))
def test_through_a_smaller_or_larger_window_a_slope_is_still_a_slope(sides, moves, slopes):
    """Of a picture that grows evenly along both sides: its value at the place that the window shows, if well inside."""
    H, W = 30, 20
    value = lambda y, x: 128 + slopes[0] * (y - H / 2) + slopes[1] * (x - W / 2)  # in [0, 255]
    picture = np.repeat(value(*np.mgrid[:H, :W]).astype(np.uint8)[..., None], 3, axis=2)
    (found,) = window(picture[None], [moves], [sides])
    assert found.shape == picture.shape and found.dtype == np.uint8
    seen, inside = [], []
    for n, side, move in zip((H, W), sides, moves):
        seen.append((np.arange(n) + 0.5 - n / 2) * side + n / 2 + move - 0.5)
        inside.append((seen[-1] >= 2) & (seen[-1] <= n - 3))
    expected = value(*np.meshgrid(*seen, indexing="ij"))[np.ix_(*inside)]
    quarter_of_a_pixel = max(map(abs, slopes)) / 4
    difference = np.abs(found[np.ix_(*inside)] - expected[..., None])
    assert difference.max(initial=0) <= 1 + quarter_of_a_pixel  # 1: it is rounded twice


# --- check and vocab ---


def test_check_reports_a_good_folder_and_draws_it(folder, capsys):
    write_rows(folder / "train.jsonl", [row_of(number, image=f"images/{number % 5}.png") for number in range(6)])
    noise(0).save(folder / "images/copy.bmp")
    same_caption = "Coat no. 0 in café brown."
    write_rows(folder / "val.jsonl", [row_of(20, image="images/4.png", category="HATS", caption=same_caption)])
    write_rows(folder / "test.jsonl", [row_of(30, image="images/copy.bmp", caption="One, two, three", subcategory="")])
    data.main(["check", str(folder), "--sheet", str(folder / "sheet.png")])
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}",
        "rows        8: train 6, val 1, test 1",
        "products    5: train 3, val 1, test 1; val has too few to judge matching (2); "
        "test has too few to draw candidates (101)",
        "pictures    6: 12x16 (6); smallest 12x16, largest 12x16",
        "captions    median 10 words, 99% up to 10, longest 10; more where words are cut into pieces",
        "category    2 names: COATS (7), HATS (1); missing in 0 rows; never in train: HATS",
        "subcategory 2 names: kind 0 (5), kind 1 (2); missing in 1 rows; never in train: none",
        "duplicates  1 captions belong to several products (such as coat no. 0 in café brown.); "
        "2 pictures do (such as images/0.png); 1 pictures have several names (such as images/0.png)",
        "bad rows    0",
        f"pictures and captions to look at: {folder}/sheet.png",
    ]
    sheet = np.asarray(Image.open(folder / "sheet.png"))
    shown = np.asarray(data.picture(folder, "images/0.png", 160, "pad"))
    assert (sheet[6:166, 6:166] == shown).all() and (sheet[170:200, 6:166] < 128).any()


def test_check_lists_each_bad_row_once_and_fails_without_skip_bad(folder, capsys):
    (folder / "images/2.png").write_bytes(b"nothing")
    with open(folder / "train.jsonl", "a") as file:
        file.write("{\n")
    told = message(data.main, ["check", str(folder)])
    assert told == f"{folder}: 2 bad rows, 5 good ones (--skip-bad leaves the bad ones out)"
    printed = capsys.readouterr().out.splitlines()
    assert printed.count(f"  train.jsonl:3: images/2.png: {NO_PICTURE}") == 1
    assert sum("train.jsonl:7: bad JSON" in line for line in printed) == 1 and "bad rows    2" in printed
    data.main(["check", str(folder), "--skip-bad"])
    assert (folder / ".cache/contact_sheet.png").is_file()


def test_vocab_writes_a_vocabulary_and_never_over_another(folder):
    data.main(["vocab", str(folder), "--size", "60"])
    tokenizer = data.Tokenizer.load(folder / "vocab.txt")
    assert tokenizer.decode(tokenizer.encode("coat no. 0")) and len(tokenizer) <= 60
    told = message(data.main, ["vocab", str(folder)])
    assert told == f"{folder}/vocab.txt: exists already; name the file to write with --out"
    data.main(["vocab", str(folder), "--out", str(folder / "vocab.txt")])


def test_an_error_is_one_line_with_status_1_and_a_wrong_flag_has_status_2(folder):
    command = [sys.executable, "data.py", "check", str(folder / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert (done.returncode, done.stderr) == (1, f"data.py: {folder}/none: no such folder\n")
    for wrong in (["vocab", str(folder), "--size", "5"], ["check", str(folder), "--size", "9"], []):
        with pytest.raises(SystemExit) as end:
            data.main(wrong)
        assert end.value.code == 2


def test_make_shop_writes_a_folder_without_faults(tmp_path):
    folder = make_shop(tmp_path / "shop", products=80, size=8, views=2)
    rows = []
    for split in readers.SPLITS:
        found, bad = readers.read_all(folder, split)
        assert not bad
        rows += found
    assert len(rows) == 160 and len({row["caption"] for row in rows}) == 80
    assert len({row["subcategory"] for row in rows}) == 8
