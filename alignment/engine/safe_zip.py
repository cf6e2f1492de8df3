"""Read zip files from visitors as untrusted input.

Place in the flow: `upload -> open_archive (here) -> photo_zip, dataset_eval`. The directory is checked before anything
is inflated, the inflated size is bounded by the declared one, and a member's name becomes a path only if it is plain:
no parent folder, no link, no name that a file system treats specially.
"""

import io
import stat
import struct
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from alignment.preprocess import IMAGE_SUFFIXES, InputError

MAX_ZIP_MB = 100
MAX_INFLATED_MB = 400
MAX_PICTURE_MB = 30
MAX_MEMBERS = 2000
MAX_RATIO = 40  # of inflated size to zip size: photographs hardly shrink, and text shrinks some tenfold
_FREE_MB = 20  # the ratio is not checked for archives that inflate to less
_MAX_DIRECTORY = 2**20  # bytes; zipfile reads the directory in one piece when it opens a file
_MAX_DEPTH, _MAX_NAME = 8, 150  # folders; bytes
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Raised by zipfile and zlib on bytes that are not a zip, or a damaged one.
_DAMAGED = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, RuntimeError, OSError)
_MESSAGES = {
    "upload.size": "The file has more than {limit} MB; make it smaller.",
    "zip.damaged": "This is no zip file, or it is damaged; pack it again.",
    "zip.encrypted": "The zip file has a password; pack it without one.",
    "zip.inflated": "The zip file unpacks to more than {limit} MB; put less into it.",
    "zip.members": "The zip file holds more than {limit} files; put fewer into it.",
    "zip.method": "The zip file is packed in a way not read here; pack it the ordinary way.",
    "zip.no_pictures": "There is no picture in the zip file.",
    "zip.ratio": "The zip file unpacks to more than {limit} times its size, which pictures never do; pack it anew.",
}


@dataclass(frozen=True)
class SafeZip:
    """An open zip file whose directory has been checked; members are inflated when they are read."""

    file: zipfile.ZipFile
    members: Mapping[str, zipfile.ZipInfo]  # of the files that may be read, by name, in the order of the directory
    left_out: Mapping[str, Sequence[str]]  # reason ("link", "name", "twice") -> names of the others

    def read(self, name: str, limit_mb: float) -> bytes:
        """Inflate one file; raises InputError when it is larger than the limit or damaged."""
        entry = self.members[name]
        if entry.file_size > limit_mb * 2**20:
            raise _error("upload.size", limit=f"{limit_mb:g}")
        try:
            with self.file.open(entry) as handle:
                data = handle.read(entry.file_size)  # bounded: the content may inflate to more than declared
            if len(data) != entry.file_size:
                raise EOFError
        except _DAMAGED as error:
            raise _error("zip.damaged") from error
        return data

    def pictures(self) -> list[str]:
        """List the files with the suffix of a picture; raises InputError when there is none."""
        names = [name for name in self.members if name.lower().endswith(IMAGE_SUFFIXES)]
        if not names:
            raise _error("zip.no_pictures")
        return names


class _GuardedFile(io.FileIO):
    """A file that refuses a large read, such as that of a huge directory, while a zip is being opened."""

    opening = True

    def read(self, size: int | None = -1) -> bytes:
        """Read bytes; raises InputError when too many are asked for at first."""
        if self.opening and size is not None and size > _MAX_DIRECTORY:
            raise _error("zip.members", limit=f"{MAX_MEMBERS:,}")
        return super().read(-1 if size is None else size)


@contextmanager
def open_archive(path: Path) -> Iterator[SafeZip]:
    """Open a zip file; raises InputError when it is damaged, encrypted, too large, or inflates to too much."""
    if path.stat().st_size > MAX_ZIP_MB * 2**20:
        raise _error("upload.size", limit=MAX_ZIP_MB)
    with _GuardedFile(path) as guarded:
        try:
            file = zipfile.ZipFile(guarded)
        except InputError:
            raise
        except _DAMAGED as error:
            raise _error("zip.damaged") from error
        guarded.opening = False
        with file:
            yield _checked(file, path.stat().st_size)


def _checked(file: zipfile.ZipFile, size: int) -> SafeZip:
    entries = [entry for entry in file.infolist() if not entry.is_dir()]
    if len(entries) > MAX_MEMBERS:
        raise _error("zip.members", limit=f"{MAX_MEMBERS:,}")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_INFLATED_MB * 2**20:
        raise _error("zip.inflated", limit=MAX_INFLATED_MB)
    if total > max(_FREE_MB * 2**20, MAX_RATIO * size):
        raise _error("zip.ratio", limit=MAX_RATIO)
    if any(entry.flag_bits & 1 for entry in entries):
        raise _error("zip.encrypted")
    if any(entry.compress_type not in _METHODS for entry in entries):
        raise _error("zip.method")
    members: dict[str, zipfile.ZipInfo] = {}
    left_out: defaultdict[str, list[str]] = defaultdict(list)
    for entry in entries:
        name = _name_of(entry)
        if any(part.startswith(".") or part == "__MACOSX" for part in name.split("/") if part not in (".", "..")):
            continue  # metadata of a file system
        if reason := _reason(entry, name, members):
            left_out[reason].append(name[:_MAX_NAME])
        else:
            members[name] = entry
    return SafeZip(file, members, left_out)


def _name_of(entry: zipfile.ZipInfo) -> str:
    """Decode a member's name; one without a declared encoding is UTF-8 or, from Chinese Windows, GB 18030."""
    name = entry.orig_filename
    for encoding in () if entry.flag_bits & 0x800 else ("utf-8", "gb18030"):
        with suppress(UnicodeError):
            name = name.encode("cp437").decode(encoding)
            break
    return name.replace("\\", "/").removeprefix("./")


def _reason(entry: zipfile.ZipInfo, name: str, members: Mapping[str, object]) -> str:
    """Return the reason why a member may not be read; "" if it may."""
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        return "link"
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and part.isprintable() and ":" not in part for part in parts)
    if not plain or len(parts) > _MAX_DEPTH or max(len(part.encode()) for part in parts) > _MAX_NAME:
        return "name"
    return "twice" if name in members else ""


def _error(code: str, **values: object) -> InputError:
    return InputError(_MESSAGES[code], code, **values)
