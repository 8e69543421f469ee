"""Finding, opening and writing picture files, on tiny real files."""

import gc
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionad_pipe.images.files import (
    IMAGE_SUFFIXES,
    ImageFileError,
    find_images,
    open_image,
)

PIXELS = np.arange(16 * 20 * 3, dtype=np.uint16).reshape(16, 20, 3) % 251
IMAGE = Image.fromarray(PIXELS.astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size but holds no pixels."""
    chunks = b""
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.webp", "a.jp2"])
def test_opens_lossless_formats_exactly(tmp_path, name):
    lossless = {"lossless": True} if name.endswith("webp") else {}
    IMAGE.save(tmp_path / name, **lossless)
    assert np.array_equal(np.asarray(open_image(tmp_path / name)), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "AVIF"])
def test_opens_lossy_formats_whatever_the_suffix(tmp_path, kind):
    IMAGE.save(tmp_path / "a.data", kind)
    assert open_image(str(tmp_path / "a.data")).size == (20, 16)


def test_the_first_image_of_a_phone_jpeg_counts(tmp_path):
    # Phones append previews and depths: Pillow calls such a JPEG an MPO with several frames.
    path = tmp_path / "phone.jpg"
    IMAGE.save(path, "MPO", save_all=True, append_images=[IMAGE.resize((10, 8))])
    assert open_image(path).size == (20, 16)


def test_keeps_the_exif_orientation_for_the_processor(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    IMAGE.save(tmp_path / "a.jpg", exif=exif)
    image = open_image(tmp_path / "a.jpg")
    assert image.size == (20, 16)
    assert image.getexif()[0x0112] == 6


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"format": "GIF"}, {"format": "WEBP"}])
def test_closes_the_file_after_success(tmp_path, options):
    path = tmp_path / "a.tif"
    IMAGE.save(path, **options)
    before = open_files()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(path)
        assert open_files() == before
        del image
        gc.collect()


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_closes_the_file_after_failure(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_header(20, 16))
    before = open_files()
    with pytest.raises(ImageFileError):
        open_image(path)
    assert open_files() == before


@pytest.mark.parametrize(
    ("content", "cause", "cure"),
    [
        (b"", "0 bytes", "download it again"),
        (b"\n <!DOCTYPE html><html>404</html>", "an HTML page", "give a PNG or JPEG"),
        (b"<html><body>sign in</body></html>", "an HTML page", "give a PNG or JPEG"),
        (b'{"error": "not found"}', "JSON", "give a PNG or JPEG"),
        (b'<?xml version="1.0"?>', "XML", "give a PNG or JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing", "give a PNG or JPEG"),
        ("Grüße, plain words".encode(), "plain text", "give a PNG or JPEG"),
        (b"x" + "ü".encode() * 300, "plain text", "give a PNG or JPEG"),
        (b"%PDF-1.7\n%\xe2\xe3", "a PDF", "give a PNG or JPEG"),
        (b"PK\x03\x04\x14\x00", "a zip archive", "give a PNG or JPEG"),
        (b"\x93NUMPY\x01\x00v\x00", "a NumPy array", "give a PNG or JPEG"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00", "a HEIC photo", "give a PNG or JPEG"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00", "a video", "give a PNG or JPEG"),
        (bytes(range(128, 256)) * 3, "unknown data", "give a PNG or JPEG"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "Git LFS pointer",
            "run git lfs pull",
        ),
        (b"\x89PNG\r\n\x1a\n", "damaged", "download it again"),
        (b"\xff\xd8\xff\xe0\x00", "damaged", "download it again"),
    ],
)
def test_says_what_a_file_without_an_image_is(tmp_path, content, cause, cure):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(ImageFileError) as caught:
        open_image(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert cause in message
    assert cure in message


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp", "a.ppm"])
def test_refuses_truncated_files(tmp_path, name):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageFileError, match=r"truncated or damaged .*download it again"):
        open_image(path)


def test_a_tiff_that_pillow_cannot_read_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.zeros((16, 20), np.float32)).save(path)
    bits = struct.pack("<HHIHH", 258, 3, 1, 32, 0)  # the tag BitsPerSample
    assert bits in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(bits, struct.pack("<HHIHH", 258, 3, 1, 64, 0)))
    with pytest.raises(ImageFileError, match="cannot read pixels of this kind; save the picture as a PNG"):
        open_image(path)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_refuses_animations_and_pages(tmp_path, name):
    IMAGE.save(tmp_path / name, save_all=True, append_images=[IMAGE.rotate(180)])
    with pytest.raises(ImageFileError, match=r"several frames or pages; save the one"):
        open_image(tmp_path / name)


def test_refuses_a_missing_file_a_folder_and_a_pipe(tmp_path):
    with pytest.raises(ImageFileError, match="no such file; check the path"):
        open_image(tmp_path / "missing.png")
    with pytest.raises(ImageFileError, match="this is a folder; give a picture in it"):
        open_image(tmp_path)
    with pytest.raises(ImageFileError, match="cannot be read"):
        open_image(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageFileError, match="not a regular file; copy the picture"):
        open_image(tmp_path / "pipe.png")


def test_refuses_what_may_not_be_read(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    IMAGE.save(folder / "a.png")
    (folder / "a.png").chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)  # nobody, as root may read everything
        with pytest.raises(ImageFileError, match="may not be read; change its permissions"):
            open_image(folder / "a.png")
    finally:
        if root:
            os.seteuid(0)


def test_refuses_giant_images_without_decoding(tmp_path):
    path = tmp_path / "giant.png"
    path.write_bytes(png_header(20_000, 20_000))
    with pytest.raises(ImageFileError, match=r"20000 x 20000 pixels.*raise max_pixels \(--max-pixels\)"):
        open_image(path)  # decoding would find no pixels, and another cause


def test_the_limit_is_ours_and_not_that_of_pillow(tmp_path):
    # Pillow raises above 179 megapixels and warns above 89: neither decides here.
    path = tmp_path / "a.png"
    limit = Image.MAX_IMAGE_PIXELS
    path.write_bytes(png_header(20_000, 20_000))
    with pytest.raises(ImageFileError, match="raise max_pixels"):
        open_image(path, max_pixels=399_999_999)
    path.write_bytes(png_header(10_000, 9_500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageFileError, match="raise max_pixels"):
            open_image(path, max_pixels=94_999_999)
        Image.new("1", (10_000, 9_500)).save(path)
        assert open_image(path).size == (10_000, 9_500)
    assert limit == Image.MAX_IMAGE_PIXELS
    IMAGE.save(path)
    assert open_image(path, max_pixels=320).size == (20, 16)
    with pytest.raises(ImageFileError, match="20 x 16 pixels are more than 319"):
        open_image(path, max_pixels=319)


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_finds_images_recursively_and_sorted(tmp_path):
    expected = [touch(tmp_path / name) for name in ("a/2.PNG", "a/b/1.jpg", "b.Tiff", "c.jpeg")]
    for name in (".hidden.png", ".cache/d.png", "a/notes.txt", "a/._2.png", "Thumbs.db", "noname"):
        touch(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    assert find_images([tmp_path]) == sorted(expected)
    assert find_images(str(tmp_path)) == sorted(expected)


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_finds_every_suffix(tmp_path, suffix):
    image = touch(tmp_path / f"a{suffix.upper()}")
    assert find_images(tmp_path) == [image]


def test_files_are_taken_as_given_in_order_and_once(tmp_path):
    b, a = touch(tmp_path / "b.data"), touch(tmp_path / "a.png")
    assert find_images([b, tmp_path, a, str(b), tmp_path / "." / "b.data"]) == [b, a]
    detour = tmp_path / ".." / tmp_path.name / "a.png"
    assert find_images([detour, a]) == [detour]


def test_links_are_followed_but_not_in_circles(tmp_path):
    image = touch(tmp_path / "data" / "a.png")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "circle").symlink_to(tmp_path / "data")
    assert find_images(tmp_path / "set") == [tmp_path / "set" / "linked" / "a.png"]
    assert find_images(tmp_path / "data") == [image]


def test_refuses_missing_paths_and_folders_without_images(tmp_path):
    with pytest.raises(ImageFileError, match="no such file or folder; check the path"):
        find_images([tmp_path / "missing"])
    touch(tmp_path / "notes.txt")
    with pytest.raises(ImageFileError, match=r"no pictures; their names must end in one of \.png"):
        find_images(tmp_path)
