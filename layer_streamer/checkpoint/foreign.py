"""What a file is that is no checkpoint, by its first bytes, and what to do about it. Pure.

For whatever somebody has in place of the file that he means: a pointer, a page, an archive,
weights of another kind.
"""

from __future__ import annotations

import re

HEAD_BYTES = 512
"""So many first bytes are enough; a tar archive names itself at byte 257."""
SHOWN_TEXT = 60
"""Characters of a text that are shown."""
JSON_BEGINS = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*[{\[]")

AGAIN = "download it again"
PICKLED = "pickled PyTorch weights are not read; convert them to safetensors"
UNPACK = "an archive: unpack it, and name what is in it"

_KINDS = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), what)
    for pattern, what in (
        (
            rb"version https://(?:git-lfs|hawser)\.github\.com/",
            "a Git LFS pointer of {size} bytes, not the file itself: run `git lfs pull` in its "
            "folder",
        ),
        (rb"# xet version", "a Xet pointer of {size} bytes, not the file itself: " + AGAIN),
        (rb"PK\x03\x04.*(?:data\.pkl|\.format_version|byteorder)", PICKLED),
        (rb"\x80[\x02-\x05]", PICKLED),
        (rb"PK\x03\x04|PK\x05\x06|\x1f\x8b|\xfd7zXZ\0|BZh[1-9]|7z\xbc\xaf|Rar!", UNPACK),
        (rb"\x28\xb5\x2f\xfd|.{257}ustar", UNPACK),
        (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes: take a version in safetensors"),
        (rb"\x93NUMPY", "a NumPy array: take a version in safetensors"),
        (rb".{4}TFL3", "a TensorFlow Lite model: take a version in safetensors"),
        (rb"\x08[\x01-\x20][\x12\x3a]", "an ONNX model: take a version in safetensors or GGUF"),
        (rb"GGUF", "a GGUF file by its content: name it .gguf"),
        (rb"lmgg|[ft]jgg|fmgg|algg", "a llama.cpp file from before GGUF: take a GGUF file"),
        (rb"\0+\Z", "it begins with zeros (a download that was not finished?): " + AGAIN),
        (rb"\xff\xfe|\xfe\xff", "text in UTF-16: save it as UTF-8"),
        (
            rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html|head|body|!--)",
            "an HTML page (an error of the server, or what a browser shows): " + AGAIN,
        ),
        (rb"\s*<(?:\?xml|error)", "an XML document (an error of the server?): " + AGAIN),
    )
)


def foreign_file(head: bytes, name: str, size: int) -> str:
    """What a file of ``size`` bytes is that begins with ``head``, and what to do; '' if unknown.

    Asked of a file that has proved to be none of the kind that its reader wants.
    """
    if size == 0:
        return f"0 bytes, an empty file: {AGAIN}"
    for pattern, what in _KINDS:
        if pattern.match(head):
            return what.format(size=size)
    text = _text(head)
    begin = " ".join(text.split())[:SHOWN_TEXT]
    if name.endswith(".json") and begin:
        return f"JSON, no weights: name the folder that it is in ({begin!r})"
    if begin:
        return f"text (an error message of a download?) that begins with {begin!r}: {AGAIN}"
    return ""


def _text(head: bytes) -> str:
    """The text that a file begins with; '' if it is none."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # not a character that the end of the head cuts
            return ""
        text = head[: error.start].decode()
    text = text.removeprefix("\ufeff")
    return text if all(char.isprintable() or char in " \t\r\n\f" for char in text) else ""
