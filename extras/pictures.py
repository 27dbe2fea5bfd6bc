"""
Pictures: opened safely, made square, and kept decoded in a memory-mapped file where there is room.

A data folder is not trusted: only common formats are decoded, absurd sizes are refused before anything is decoded, and
no link leads out of the folder. Decoded pictures are kept in `.cache` inside the folder: a .npy file (n, size, size, 3)
and, beside it as JSON, the reasons why some pictures cannot be decoded. A cache that is not whole is built again.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from extras.readers import absence, file_of, h5_pictures, open_h5, shown
from extras.runtime import UserError, quoted, whole_file

# --- Opening ---

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no PostScript, for which Pillow would start Ghostscript
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
PASSING = {errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT}
MOST_PIXELS = 50_000_000
LONGEST_SIDE = 30_000


class PassingFault(UserError):
    """A picture could not be read for a reason that is not its own, so it is not left out: the run ends."""


def files_below(folder):
    """The names of all files below a folder, sorted; hidden ones (.name) and linked folders are left out."""
    found = [path.relative_to(folder) for path in Path(folder).rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if not any(part.startswith(".") for part in path.parts))


def list_pictures(folder):
    """The names of all pictures below a folder: the files of `files_below` with a picture's suffix."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    return [name for name in files_below(folder) if name.lower().endswith(SUFFIXES)]


def real_path(folder, file):
    """Where a file of the folder really is. If a link leads out of the folder: UserError. Folder "" allows any path."""
    path = os.path.realpath(os.path.join(folder, file))
    if folder and not path.startswith(os.path.join(os.path.realpath(folder), "")):
        raise UserError(f"{shown(file)}: a link leads out of the folder; put the picture itself there")
    return path


def check_size(name, width, height):
    """Raise a UserError for a picture whose decoding would take gigabytes."""
    if max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        limits = f"at most {MOST_PIXELS} pixels, {LONGEST_SIDE} on a side, are read"
        raise UserError(f"{name}: absurd size, {width} x {height} ({limits})")


def open_picture(folder, reference, at_least=None):
    """
    Decode one picture to RGB: its first frame, upright, in 8 bits, over white where it is transparent (but for a single
    transparent colour of 16 bits).
    With `at_least`, a much larger JPEG is decoded at a fraction of its size, never below `at_least` on a side.
    """
    name, (file, place) = shown(str(reference)), file_of(str(reference))
    try:
        path = real_path(folder, file)
        if reason := absence(path, name):
            raise UserError(reason)
        if place is not None:
            return open_h5_picture(path, name, place)
        with Image.open(path, formats=FORMATS) as image:
            check_size(name, image.width, image.height)
            if at_least:
                image.draft(None, (at_least, at_least))
            return upright_rgb(image)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a picture ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # Pillow's own limit, at opening
        raise UserError(f"{name}: absurd size, over {MOST_PIXELS} pixels") from None
    except Exception as error:  # damaged bytes make a decoder raise nearly anything
        if getattr(error, "errno", None) in PASSING:
            raise PassingFault(f"{name}: cannot be read now ({error.strerror}); try again later") from None
        reason = "truncated picture" if "truncated" in str(error).lower() else "undecodable picture"
        raise UserError(f"{name}: {reason} ({shown(str(error))})") from None


def open_h5_picture(path, name, place):
    """One picture of a HDF5 file."""
    with open_h5(path) as file:
        pictures = h5_pictures(file)
        check_size(name, pictures.shape[2], pictures.shape[1])
        if place >= len(pictures):
            raise UserError(f"{name}: the file holds {len(pictures)} pictures only")
        return Image.fromarray(pictures[place])


def upright_rgb(image):
    """A picture of any mode as RGB, turned as its EXIF data asks."""
    image.getexif()  # Pillow remembers the orientation; without the bytes it does not trip over a malformed tag
    image.info.pop("exif", None)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels, and nothing says which number is white")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def make_square(image, size, fit):
    """A picture as (size, size, 3) uint8: `stretch` it as the paper does, or `pad` it with the colour of its border."""
    if fit == "stretch":
        return np.array(image.resize((size, size), Image.BILINEAR))
    longest = max(image.size)
    inner = [max(1, round(side * size / longest)) for side in image.size]
    pixels = np.asarray(image.resize(inner, Image.BILINEAR))
    height, width, _ = pixels.shape
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = np.median(border, axis=0).round()
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top : top + height, left : left + width] = pixels
    return canvas


def check_shape(size, fit):
    """Raise a UserError for a size or a fit that no picture can be brought to."""
    if fit not in ("stretch", "pad"):
        raise UserError(f"fit must be stretch or pad, got {quoted(fit)}")
    if size < 1:
        raise UserError(f"size must be at least 1 pixel, got {size}")


def picture(folder, reference, size, fit="stretch"):
    """Open one picture as (size, size, 3) uint8. UserError if it cannot be decoded."""
    check_shape(size, fit)
    return make_square(open_picture(folder, reference, at_least=2 * size), size, fit)


def decode(folder, references, size, fit):
    """Yield for each reference its pixels and None, or black and the reason if it cannot be decoded."""

    def attempt(reference):
        try:
            return picture(folder, reference, size, fit), None
        except PassingFault:
            raise
        except UserError as error:
            return np.zeros((size, size, 3), np.uint8), str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads are enough: Pillow decodes without Python's lock
        for start in range(0, len(references), 1024):  # this many are in memory at a time
            yield from pool.map(attempt, references[start : start + 1024])


# --- Decoded pictures ---


class Live:
    """Pictures as if in an array (n, H, W, 3) uint8; each is decoded whenever it is asked for."""

    def __init__(self, folder, references, size, fit):
        self.folder, self.references, self.fit = folder, references, fit
        self.shape = (len(references), size, size, 3)

    def __len__(self):
        return len(self.references)

    def __getitem__(self, numbers):
        pixels = np.empty((np.size(numbers), *self.shape[1:]), np.uint8)
        for place, number in enumerate(np.ravel(numbers)):
            pixels[place] = picture(self.folder, self.references[number], self.shape[1], self.fit)
        return pixels.reshape(*np.shape(numbers), *self.shape[1:])


class Pictures:
    """
    Square pictures: pictures[rows] is (b, H, W, 3) uint8. They lie decoded in memory-mapped files, or are `Live`.
    `index` (n,) numbers the pictures of all files; rows that share a picture have the same number. A loading process
    maps the files itself.
    """

    def __init__(self, files, index):
        self.files, self.index = files, index  # files: (path, shape of its pixels) or Live
        self.pixels = []
        for file in files:
            if not isinstance(file, Live):
                path, shape = file
                file = np.memmap(path, np.uint8, mode="r", offset=len(npy_header(shape)), shape=shape)
            self.pixels.append(file)

    def __len__(self):
        return len(self.index)

    @property
    def size(self):
        """H = W."""
        return self.pixels[0].shape[1]

    def __getitem__(self, rows):
        numbers = self.index[rows]
        if len(self.pixels) == 1:
            return self.pixels[0][numbers]
        chosen, first = np.empty((*np.shape(numbers), self.size, self.size, 3), np.uint8), 0
        for pixels in self.pixels:
            here = (numbers >= first) & (numbers < first + len(pixels))
            chosen[here] = pixels[numbers[here] - first]
            first += len(pixels)
        return chosen

    def __reduce__(self):
        return Pictures, (self.files, self.index)

    def select(self, rows):
        """The pictures of these rows alone."""
        return Pictures(self.files, self.index[rows])


def join_pictures(first, second):
    """The rows of both, those of the second behind those of the first."""
    shifted = second.index + sum(map(len, first.pixels))
    return Pictures(first.files + second.files, np.concatenate([first.index, shifted]))


def npy_header(shape):
    """The bytes before the pixels in a .npy file of this shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue()


# --- The cache ---

TEMPORARY = re.compile(r"\d+-(stretch|pad)-[0-9a-f]{16}\.(npy|json)\.[0-9a-f]{32}\.tmp")  # as whole_file names them


DECODE = ("auto", "kept", "live")


def open_pictures(folder, references, size, fit="stretch", decode="auto"):
    """
    The pictures of n rows, whose "image" are the references, and {row number: reason} for those that cannot be decoded.
    "kept" pictures come out of the cache, which is built first if it is missing or damaged; "live" ones are decoded
    when they are needed, and then a broken one ends the run. "auto" keeps them if they fit into half of the free disk.
    """
    distinct, index = np.unique(np.array(references, object), return_inverse=True)
    return open_distinct(folder, distinct.tolist(), index, size, fit, decode)


def open_distinct(folder, distinct, index, size, fit, decode="auto"):
    """The same for rows of which row i shows the picture distinct[index[i]]; the distinct references are sorted."""
    check_shape(size, fit)
    if decode not in DECODE:
        raise UserError(f"decode must be one of {', '.join(DECODE)}, got {quoted(decode)}")
    if decode == "live":
        return open_live(folder, distinct, index, size, fit)
    shape, name = (len(distinct), size, size, 3), cache_name(folder, distinct, size, fit)
    path = Path(folder) / ".cache" / name
    bad = open_cache(path, shape, distinct) if is_folder(path.parent) else None
    if bad is None and (place := cache_folder(folder)) != path.parent:
        path = place / name
        bad = open_cache(path, shape, distinct)
    if bad is None:
        remove_stale(path.parent)
        needed, free = math.prod(shape), shutil.disk_usage(path.parent).free
        sizes = f"decoded they take {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free in {path.parent}"
        if decode == "auto" and needed > free / 2:
            print(f"{folder}: each picture is decoded whenever it is needed (--decode live): {sizes}", flush=True)
            return open_live(folder, distinct, index, size, fit)
        if needed > free:
            raise UserError(f"{folder}: the pictures cannot be kept: {sizes}; --decode live needs no space")
        bad = build_cache(path, folder, distinct, size, fit)
    return Pictures([(path, shape)], index), rows_of(bad, distinct, index)


def open_live(folder, distinct, index, size, fit):
    """The pictures of `open_distinct`, decoded when they are needed; only missing and empty files are found at once."""
    bad = {}
    for reference in distinct:
        reason = absence(os.path.join(folder, file_of(reference)[0]), shown(reference))
        if reason:
            bad[reference] = reason
    return Pictures([Live(folder, distinct, size, fit)], index), rows_of(bad, distinct, index)


def rows_of(bad, distinct, index):
    """{row number: reason} from {reference: reason}."""
    if not bad:
        return {}
    reasons = [bad.get(reference) for reference in distinct]
    return {row: reasons[number] for row, number in enumerate(index) if reasons[number]}


def cache_name(folder, references, size, fit):
    """A name that changes with the wanted shape and with any picture: its path, its bytes, the times of its changes."""
    digest = hashlib.sha256()
    for reference in references:
        seen = [reference]
        with contextlib.suppress(OSError, ValueError):  # a missing picture is reported when it is opened
            status = os.stat(os.path.join(folder, file_of(reference)[0]))
            seen += [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        digest.update(json.dumps(seen).encode())
    return f"{size}-{fit}-{digest.hexdigest()[:16]}.npy"


def is_folder(path):
    """Whether a folder is there, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def cache_folder(folder):
    """Where derived files are written: `.cache` in the data; if that cannot be, this user's own temporary folder."""
    place = Path(folder) / ".cache"
    with contextlib.suppress(OSError):
        place.mkdir(exist_ok=True)
    if is_folder(place) and os.access(place, os.W_OK):
        return place
    private = Path(tempfile.gettempdir()) / f"mvlt-cache-{os.getuid()}"
    with contextlib.suppress(OSError):
        private.mkdir(mode=0o700)
    if is_folder(private):
        status = private.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022:  # nobody else could put a file there
            return private
    raise UserError(f"{place}: cannot be written, nor is {private} this user's own folder; set TMPDIR to one that is")


def open_cache(path, shape, references):
    """{reference: why it cannot be decoded} of a whole cache. None if it is missing or, which is reported, damaged."""
    reasons = read_reasons(path.with_suffix(".json"), references) if is_whole(path, shape) else None
    if reasons is None and os.path.lexists(path):
        print(f"{path}: damaged, so the pictures are decoded again", flush=True)
    return reasons


def is_whole(path, shape):
    """Whether a regular file is there that begins with our header for this shape and has the right size."""
    header = npy_header(shape)
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != len(header) + math.prod(shape):
            return False
        with open(path, "rb") as file:
            return file.read(len(header)) == header
    except OSError:
        return False


def read_reasons(path, references):
    """The dict that `build_cache` has written beside the pixels, None if it is damaged."""
    longest = 100 + sum(12 * len(reference) + 3000 for reference in references)  # 12: an emoji in JSON
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > longest:
            return None
        reasons = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(reasons, dict) or not reasons.keys() <= set(references):
        return None
    return reasons if all(isinstance(reason, str) for reason in reasons.values()) else None


def build_cache(path, folder, references, size, fit):
    """Decode all pictures into `path`. Returns {reference: reason} for those that cannot be decoded."""
    bad, shape = {}, (len(references), size, size, 3)
    with whole_file(path) as file:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)  # until this process ends, however it ends
        file.write(npy_header(shape))
        decoded = decode(folder, references, size, fit)
        for reference in tqdm(references, "decoding pictures", delay=1, disable=None):
            pixels, reason = next(decoded)
            file.write(pixels)
            if reason:
                bad[reference] = reason
        with whole_file(path.with_suffix(".json")) as reasons:  # first: where the pixels are, the reasons are
            reasons.write(json.dumps(bad).encode())
    return bad


def remove_stale(place):
    """Remove the temporary files of builds that were killed."""
    for path in place.iterdir():
        with contextlib.suppress(OSError):  # another process was faster
            if TEMPORARY.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode) and is_stale(path):
                path.unlink()


def is_stale(path):
    """Whether nobody writes this file any more: a living build has locked it, and writes all the time."""
    age = time.time() - path.stat().st_mtime
    with open(path, "r+b") as file, contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return age > 5  # a younger one may just not be locked yet
    return age > 3600
