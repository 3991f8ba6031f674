#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Make Proxmox VE backups (.vma) deduplicate, and get data out of them on any machine.

A .vma file is a header (the VM's configuration, the list of its disks), then extents that hold the
disks' clusters in the order in which a live backup happened to read them. `optimize` rewrites an
archive into the canonical layout, so that restic, borg or ZFS store only what changed:

    header    fixed uuid; configs in their order, then device names by dev_id;
              zero-filled to a multiple of --align
    extents   one device after the other by dev_id, vmstate last; each device begins a new extent;
              every cluster, ascending, 8 an extent; in an extent that stores blocks, zero
              blocks are stored until its payload is a multiple of --align, or all are stored

The layout depends on the archive's ctime, configs, devices, stored blocks and --align, on nothing
else. `lay_out_header` and `lay_out_extents` decide it.

Exit status: 0 success, 1 a failed operation, 2 wrong usage, 3 a bad archive or archives that
differ, 128 + N ended by signal N (130: Ctrl-C, 141: the reader of standard output went away).

Sources: the format is Proxmox's, in pve-qemu's public vma_spec.txt; cited below as "spec". Where
its `vma` program behaves otherwise, the program is followed, and a comment says so.
"""

from __future__ import annotations

import argparse
import array
import bisect
import collections
import errno
import functools
import gc
import hashlib
import importlib
import io
import itertools
import operator
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Callable, ClassVar, NamedTuple, NoReturn, Optional, TypeVar, Union

if sys.version_info < (3, 9):  # noqa: UP036 - says so in one line where Python 3.8 starts this
    sys.exit(f"vma-tool: needs Python 3.9 or later, this is {sys.version.split()[0]}")

__version__ = "3.0.0"

# ---------------------------------------------------------------------------------------------
# Errors, text, progress

EXIT_FAILED = 1
EXIT_BAD = 3
T = TypeVar("T")


class VmaError(Exception):
    """A failed operation; its text is the one line that the user reads."""

    exit_status = EXIT_FAILED


class FormatError(VmaError):
    """An archive that Proxmox would not restore completely.

    Its text begins with the archive and the offset in it, in bytes, where they are known.
    """

    exit_status = EXIT_BAD

    def __init__(self, message: str, offset: int | None = None, archive: str = "") -> None:
        super().__init__(message)
        self.offset = offset
        self.archive = archive

    def __str__(self) -> str:
        offset = "" if self.offset is None else f"offset 0x{self.offset:x}"
        return ": ".join(filter(None, (self.archive, offset, super().__str__())))


@contextmanager
def in_archive(name: str) -> Iterator[None]:
    """Add the archive's name to a FormatError."""
    try:
        yield
    except FormatError as error:
        error.archive = error.archive or name
        raise


def system_message(error: OSError) -> str:
    """Return the system's reason for an error, without the file's name."""
    return error.strerror or str(error) or repr(error)


def os_error(name: str, code: int) -> VmaError:
    """Return a VmaError with the system's message for errno."""
    return VmaError(f"{name}: {os.strerror(code)}")


@contextmanager
def os_errors_as(name: str) -> Iterator[None]:
    """Re-raise OSError as a VmaError that starts with name."""
    try:
        yield
    except BrokenPipeError:  # not an error of ours: main ends quietly
        raise
    except OSError as error:
        raise VmaError(f"{name}: {system_message(error)}") from error


def escape(text: str) -> str:
    """Return text with everything that could act on a terminal as Python escapes."""
    # Marks that turn the direction of text around are not printable either.
    return "".join(
        c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in text
    )


def quote(name: str) -> str:
    """Return a name from an archive, escaped and in quotes."""
    return f"'{escape(name)}'"


def display_name(path: str, stream: str) -> str:
    """File name for messages; `-` is standard `stream`: input or output."""
    return escape(path) if path != "-" else f"standard {stream}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def format_uuid(uuid: bytes) -> str:
    return re.sub("(.{8})(.{4})(.{4})(.{4})", r"\1-\2-\3-\4-", uuid.hex())


def format_size(size: float) -> str:
    """Return a number of bytes for people: 8.0 GiB."""
    if size < 1024:
        return f"{size:.0f} B"
    power = (int(size).bit_length() - 1) // 10
    return f"{size / (1 << 10 * power):.1f} {'KMGTPEZ'[power - 1]}iB"


def format_time(seconds: int) -> str:
    """Return seconds since the epoch in local time, as ISO 8601."""
    try:
        text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # any 64-bit number may stand in a header
        return f"{seconds} s since 1970"
    return f"{text[:-2]}:{text[-2:]}"


def parse_size(text: str) -> int:
    """Return the number of bytes in a text like 4096, 128K, 256M or 1G; raises ValueError."""
    # `find` returns -1 for a digit, and for a wrong unit, which int() then refuses.
    unit = " KMGT".find(text[-1:].upper())
    number = int(text[:-1] if unit > 0 else text)
    return number << 10 * max(unit, 0)


def to_json(value: object) -> str:
    import json  # here, like others that few commands need: an import delays the start

    return json.dumps(value, indent=2)


def require(value: object, kind: type[T]) -> T:
    """Return a value that was read from JSON; raises TypeError if it is of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool):  # True is an int for Python
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def shorten(text: str, columns: int) -> str:
    """Return text of at most so many columns, its middle left out; "" if there is no room."""

    def width(part: str) -> int:
        return sum(1 if c < "\u1100" else 2 for c in part)  # East Asian characters are wide

    if width(text) <= columns:
        return text
    if columns < 12:
        return ""
    end = (columns - 3) * 2 // 3  # the end of a path says more than its beginning
    first, last = text[: columns - 3 - end], text[-end:]
    while width(first) + 3 + width(last) > columns:
        first, last = first[:-1], last[1:]
    return f"{first}...{last}"


class Progress:
    """Progress of a long operation, stage by stage.

    A line on the terminal, redrawn at most ten times a second and erased at the end; with
    `verbose`, where there is no terminal, a line for each percent as Proxmox's program prints it.
    """

    current: Progress | None = None  # what SIGUSR1 asks for

    def __init__(self, name: str, quiet: bool = False, verbose: bool = False) -> None:
        self.name = name
        self._terminal = not quiet and sys.stderr.isatty()
        self._lines = verbose and not self._terminal
        self._start = self._drawn = time.monotonic()  # nothing flashes up in a short run
        self._shown = False
        self.begin("starting", 0, lambda: 0)  # SIGUSR1 may come before the first stage

    def begin(self, stage: str, total: int, position: Callable[[], int]) -> None:
        """Begin a stage of `total` bytes, 0 if unknown; `position` returns the bytes done."""
        self._stage, self._total, self._position = stage, total, position
        self._percent = 0
        self._stage_start = time.monotonic()
        if self._terminal and self._shown:
            self._draw()

    def tick(self) -> None:
        """Show the progress if it is time."""
        if self._terminal and time.monotonic() - self._drawn >= 0.1:
            self._draw()
        elif self._lines and self._total:
            self._print_percent(min(self._position() * 100 // self._total, 99))

    def finish(self) -> None:
        """End a stage, whose total may have been a guess."""
        if self._lines and self._total:
            self._print_percent(100)

    def status(self) -> str:
        """Return one line about the stage, without the archive's name."""
        done = self._position()
        rate = done / (time.monotonic() - self._stage_start or 1)  # 0 s on a coarse clock
        text = f"{self._stage}, {format_size(done)}, {format_size(rate)}/s"
        if not self._total:
            return text if done else self._stage
        left = int(max(self._total - done, 0) / rate) if rate else 0
        # Never 100 %: the flush, or another stage, is still to come.
        percent = min(99, done * 100 // self._total)
        return f"{percent:2d} % {text}, {left // 60}:{left % 60:02d} left"

    @classmethod
    def erase(cls) -> None:
        if cls.current and cls.current._shown:
            cls.current._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        Progress.current = self
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        Progress.erase()
        Progress.current = None

    def _print_percent(self, percent: int) -> None:
        if percent > self._percent:
            self._percent = percent
            seconds = time.monotonic() - self._start
            word = "progress" if self._stage == "reading" else self._stage
            text = f"{word} {percent}% (read {self._position()} bytes, duration {seconds:.0f} sec)"
            print(text, file=sys.stderr)

    def _draw(self) -> None:
        columns = 80
        with suppress(ValueError, OSError):
            # Serial consoles and pseudo-terminals without a size say that they have 0 columns.
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or columns
        # One column stays free: some terminals begin a new line when the last one is filled.
        text = self.status()
        name = shorten(self.name, columns - len(text) - 3)
        line = f"{name}: {text}" if name else text[: columns - 1]
        self._drawn = time.monotonic()
        self._shown = True
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def print_error(error: object) -> None:
    """Print one line on standard error, in place of a progress line that may be there."""
    Progress.erase()
    print(f"vma-tool: {error}", file=sys.stderr)


def print_report(line: str) -> None:
    """Print one line on standard output, which may be the terminal of the progress line."""
    Progress.erase()
    print(line, flush=True)


# ---------------------------------------------------------------------------------------------
# Format: constants, and codecs that need no file. All numbers are big-endian, except that a blob's
# length is little-endian.

BLOCK_SIZE = 4096
CLUSTER_BLOCKS = 16
CLUSTER_SIZE = CLUSTER_BLOCKS * BLOCK_SIZE
FULL_MASK = 0xFFFF
MAX_CLUSTERS = 1 << 32  # of a device: what cluster_num can count
SECTOR_SIZE = 512
Buffer = Union[bytes, bytearray, memoryview]
ZERO_CLUSTER = bytes(CLUSTER_SIZE)
ZEROS = memoryview(ZERO_CLUSTER)

# spec, "VMA Header": magic, version, uuid, ctime, md5sum, blob_buffer_offset, blob_buffer_size,
# header_size; further on the two tables of blob offsets, and dev_info
HEADER = struct.Struct(">4sI16sq16sIII")
HEADER_MAGIC = b"VMA\0"
# A difference lacks the clusters that its base has. With a magic of its own, no other program takes
# it for a backup: Proxmox's verify passes an archive from which clusters are missing.
DIFFERENCE_MAGIC = b"VMAD"
HEADER_FIXED_SIZE = 12288
HEADER_MD5 = slice(32, 48)
CONFIG_COUNT = 256
CONFIG_TABLE = struct.Struct(">256I")
CONFIG_NAMES_OFFSET = 2044
CONFIG_DATA_OFFSET = 3068
DEV_INFO = struct.Struct(">I4xQ16x")  # devname_ptr, size
DEV_INFO_OFFSET = 4096
DEV_IDS = range(1, 255)  # 0 is an empty slot; Proxmox does not look at 255
BLOB_MAX_SIZE = 0xFFFF
# 256 configs and 254 devices with names that file systems take fill 17 MB. More is no header.
HEADER_MAX_SIZE = 20 << 20
VMSTATE = "vmstate"
# Proxmox extracts into tmp-disk-NAME.raw, and a config into tmp-NAME..., of at most 255 bytes.
DEVICE_NAME_MAX_SIZE = 242
CONFIG_NAME_MAX_SIZE = 248

# spec, "VMA Extent Header": magic, reserved1, block_count, uuid, md5sum, blockinfo[59].
# A blockinfo is mask << 48 | reserved << 40 | dev_id << 32 | cluster_num.
EXTENT = struct.Struct(">4sHH16s16s472s")
EXTENT_MAGIC = b"VMAE"
EXTENT_BLOCK_COUNT = slice(6, 8)
EXTENT_MD5 = slice(24, 40)
MD5_SIZE = 16
EXTENT_INFOS_OFFSET = 40
EXTENT_SLOTS = 59
SLOT_SIZE = 8
SLOT_DEV_ID = 3  # which byte of a slot
EXTENT_HEADER_SIZE = 512
EXTENT_MAX_BLOCKS = EXTENT_SLOTS * CLUSTER_BLOCKS


class Config(NamedTuple):
    """A file of the VM's configuration; bytes of the name that are not UTF-8 are surrogates."""

    name: str
    data: bytes


class Device(NamedTuple):
    """A disk, or the RAM state if it is named vmstate; size in bytes."""

    dev_id: int
    name: str
    size: int

    @property
    def is_vmstate(self) -> bool:
        return self.name == VMSTATE

    @property
    def title(self) -> str:
        """Device name and number for messages."""
        return f"device {quote(self.name)} (dev_id {self.dev_id})"

    @property
    def cluster_count(self) -> int:
        """How many clusters hold the device; a vmstate may have more."""
        return -(-self.size // CLUSTER_SIZE)

    @property
    def max_size(self) -> int:
        """How many bytes are restored at most."""
        # Proxmox appends each stored block of a vmstate, whatever size the header says.
        return sys.maxsize if self.is_vmstate else self.size

    def block_mask(self, cluster_num: int) -> int:
        """Return the mask of a cluster's blocks that begin inside the device."""
        # The header's size says nothing of a vmstate: see max_size.
        blocks = -(-self.size // BLOCK_SIZE) - cluster_num * CLUSTER_BLOCKS
        return FULL_MASK if self.is_vmstate or blocks >= CLUSTER_BLOCKS else (1 << blocks) - 1

    def clip(self, first: int, masks: list[int]) -> list[int]:
        """Clear, in the masks of consecutive clusters, the blocks behind the device's end."""
        # Only a full mask on the last cluster has any: Proxmox wrote those until June 2020.
        if masks and first + len(masks) == self.cluster_count and not self.is_vmstate:
            masks[-1] &= self.block_mask(self.cluster_count - 1)
        return masks


class Header(NamedTuple):
    """An archive's header; uuid is 16 bytes, ctime seconds since the epoch, devices by dev_id.

    `size` is header_size in bytes; `md5` covers all of these bytes, so it identifies them. `magic`
    tells an archive from a difference.
    """

    uuid: bytes
    ctime: int
    configs: tuple[Config, ...]
    devices: tuple[Device, ...]
    size: int = 0
    md5: bytes = b""
    magic: bytes = HEADER_MAGIC


class Extent(NamedTuple):
    """An extent: its offset in the archive, and blockinfo of the used slots as 64-bit numbers.

    `md5` covers the whole header, so it identifies it. A run of extents that store nothing may be
    one of these: then `blockinfo` has the slots of all, as many of each, and `md5` all their MD5s.
    """

    offset: int
    block_count: int
    blockinfo: Sequence[int]
    md5: bytes

    @property
    def header_count(self) -> int:
        return len(self.md5) // MD5_SIZE

    @property
    def payload_offset(self) -> int:
        return self.offset + EXTENT_HEADER_SIZE * (len(self.md5) // MD5_SIZE)

    @property
    def payload_size(self) -> int:
        return self.block_count * BLOCK_SIZE

    def header_offset(self, info: int) -> int:
        """Return the offset of the header that has this blockinfo."""
        slot_count = len(self.blockinfo) // self.header_count
        return self.offset + self.blockinfo.index(info) // slot_count * EXTENT_HEADER_SIZE


class Slot(NamedTuple):
    """A cluster in an extent; its stored blocks are `size` bytes at `start` of the payload."""

    dev_id: int
    cluster_num: int
    mask: int
    start: int
    size: int


def md5_without(data: Buffer, field: slice) -> bytes:
    """Return the MD5 of data with the 16 bytes of a field zeroed."""
    # Hosts in FIPS mode refuse MD5 unless it is declared not to be for security.
    digest = hashlib.md5(data[: field.start], usedforsecurity=False)
    digest.update(bytes(16))
    digest.update(memoryview(data)[field.stop :])  # a view: a header may have megabytes
    return digest.digest()


# Files that people take for VMA archives: offset, what may be there, and the format.
# The Proxmox Backup Server's magics are those of its public file-format documentation.
BACKUP_SERVER_BLOBS = (
    b"\x42\xab\x38\x07\xbe\x83\x70\xa1",
    b"\x31\xb9\x58\x42\x6f\xb6\xa3\x7f",
    b"\x7b\x67\x85\xbe\x22\x2d\x4c\xf0",
    b"\xe6\x59\x1b\xbf\x0b\xbf\xd8\x0b",
)
BACKUP_SERVER_INDEXES = (b"\x2f\x7f\x41\xed\x91\xfd\x0f\xcd", b"\x1c\x91\x4e\xa5\x19\xba\xb3\xcd")
FOREIGN_FORMATS = (
    (257, b"ustar", "a tar archive, as vzdump makes of a container"),
    (32769, b"CD001", "an ISO 9660 image"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, BACKUP_SERVER_BLOBS, "a blob of a Proxmox Backup Server"),
    (0, BACKUP_SERVER_INDEXES, "an index of a Proxmox Backup Server"),
)
FOREIGN_SIZE = 32774  # bytes that tell all of them


def foreign_format(start: bytes) -> str:
    """Return the format of a file by its first FOREIGN_SIZE bytes, "" if it is not known."""
    if not start:
        return "an empty file"
    return next((what for at, magic, what in FOREIGN_FORMATS if start.startswith(magic, at)), "")


def parse_header_size(start: Buffer) -> int:
    """Return header_size in bytes, from the first HEADER_FIXED_SIZE bytes of an archive.

    Raises FormatError if these cannot be the beginning of a supported header.
    """
    if start[:4] not in (HEADER_MAGIC, DIFFERENCE_MAGIC):
        raise FormatError("not a VMA archive")
    if len(start) < HEADER_FIXED_SIZE:
        raise FormatError(f"the archive ends inside its header, after {len(start)} bytes")
    _, version, *_, header_size = HEADER.unpack_from(start)
    if version != 1:
        raise FormatError(f"VMA version {version} is not supported", 4)
    if not HEADER_FIXED_SIZE < header_size <= HEADER_MAX_SIZE:
        expected = f"{HEADER_FIXED_SIZE + 1} to {HEADER_MAX_SIZE}"
        raise FormatError(f"header_size is {header_size}, expected {expected}", 56)
    return int(header_size)


def find_blobs(buffer: memoryview, wanted: Collection[int]) -> dict[int, bytes]:
    """Return the blobs at the wanted offsets of the blob buffer, as far as they exist.

    A blob exists only where a walk from the first one, by their lengths, comes past.
    """
    blobs = {}
    # Proxmox's program walks as well: an offset in the middle of a blob names none.
    offset = 1  # offset 0 means no blob, so byte 0 is unused
    end = min(len(buffer) - 2, max(wanted))
    while offset <= end:
        start = offset + 2
        size = buffer[offset] | buffer[offset + 1] << 8
        # A blob that is too long for the buffer does not count, but the walk goes on behind it.
        if offset in wanted and start + size <= len(buffer):
            blobs[offset] = bytes(buffer[start : start + size])
        offset = start + size
    return blobs


def parse_name(blob: bytes | None) -> str | None:
    """Return the name in a blob, None if there is none that ends in a NUL."""
    if not blob or blob[-1]:
        return None
    return blob[: blob.index(0)].decode("utf-8", "surrogateescape")


def parse_header(data: Buffer, check_md5: bool = True) -> Header:
    """Return the header in these header_size bytes; raises FormatError.

    As in Proxmox's program, a device with size 0 or without a readable name does not exist.
    Without `check_md5`, the header may be damaged, and so may be the devices' sizes.
    """
    if len(data) < parse_header_size(data):
        raise FormatError(f"the archive ends inside its header, after {len(data)} bytes")
    magic, _, uuid, ctime, digest, blob_offset, blob_size, _ = HEADER.unpack_from(data)
    if check_md5 and md5_without(data, HEADER_MD5) != digest:
        raise FormatError("the header's MD5 does not match", HEADER_MD5.start)
    blob_end = blob_offset + blob_size
    if blob_offset < HEADER_FIXED_SIZE or blob_end > len(data):
        text = f"the blob buffer is at {blob_offset} to {blob_end}, expected to be inside "
        raise FormatError(f"{text}{HEADER_FIXED_SIZE} to {len(data)}", 48)
    names = CONFIG_TABLE.unpack_from(data, CONFIG_NAMES_OFFSET)
    contents = CONFIG_TABLE.unpack_from(data, CONFIG_DATA_OFFSET)
    dev_infos = list(DEV_INFO.iter_unpack(data[DEV_INFO_OFFSET:HEADER_FIXED_SIZE]))
    wanted = {*names, *contents, *(name_offset for name_offset, _ in dev_infos)}
    blobs = find_blobs(memoryview(data)[blob_offset:blob_end], wanted)
    configs = []
    for slot, (name_offset, data_offset) in enumerate(zip(names, contents)):
        if name_offset and data_offset:  # a slot with only one of them is empty
            name, content = parse_name(blobs.get(name_offset)), blobs.get(data_offset)
            if name is None or content is None:
                text = f"config {slot}: its name or its data is no blob of the header"
                raise FormatError(text, CONFIG_NAMES_OFFSET + 4 * slot)
            configs.append(Config(name, content))
    devices = []
    for dev_id in DEV_IDS:
        name_offset, size = dev_infos[dev_id]
        name = parse_name(blobs.get(name_offset)) if size else None
        if name is None:
            continue
        device = Device(dev_id, name, size)
        # Proxmox's program loses the last sector of any other, or dies.
        if check_md5 and size % SECTOR_SIZE:
            text = f"{device.title}: a size of {size} bytes is no multiple of {SECTOR_SIZE}"
            raise FormatError(text, DEV_INFO_OFFSET + DEV_INFO.size * dev_id + 8)
        devices.append(device)
    return Header(uuid, ctime, tuple(configs), tuple(devices), len(data), digest, magic)


def encode_name(name: str) -> bytes:
    # A name keeps bytes that are not UTF-8: they come back from the surrogates they became.
    return name.encode("utf-8", "surrogateescape")


def name_on_disk(name: str) -> str:
    """Return a name so that the system gets its UTF-8, whatever the locale's encoding is."""
    return os.fsdecode(encode_name(name))


def name_from_disk(name: str) -> str:
    """Inverse of name_on_disk."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def pack_header(header: Header) -> bytearray:
    """Return a header of at least header.size bytes, its blobs in the order that Proxmox writes.

    Raises VmaError for a blob that is too large.
    """
    data = bytearray(HEADER_FIXED_SIZE + 1)  # byte 0 of the blob buffer is unused

    def add(blob: bytes) -> int:
        if len(blob) > BLOB_MAX_SIZE:
            raise VmaError(f"{len(blob)} bytes of configuration; a VMA holds up to {BLOB_MAX_SIZE}")
        offset = len(data) - HEADER_FIXED_SIZE
        data.extend(len(blob).to_bytes(2, "little") + blob)
        return offset

    for slot, (name, content) in enumerate(header.configs):
        struct.pack_into(">I", data, CONFIG_NAMES_OFFSET + 4 * slot, add(encode_name(name) + b"\0"))
        struct.pack_into(">I", data, CONFIG_DATA_OFFSET + 4 * slot, add(content))
    for dev_id, name, size in header.devices:
        offset = add(encode_name(name) + b"\0")
        DEV_INFO.pack_into(data, DEV_INFO_OFFSET + DEV_INFO.size * dev_id, offset, size)
    blob_size = len(data) - HEADER_FIXED_SIZE
    data += bytes(max(header.size - len(data), 0))
    HEADER.pack_into(
        data, 0, header.magic, 1, header.uuid, header.ctime, bytes(16),
        HEADER_FIXED_SIZE, blob_size, len(data),
    )  # fmt: skip
    data[HEADER_MD5] = md5_without(data, HEADER_MD5)
    return data


def name_fault(name: str, max_size: int) -> str | None:
    """Say why a name from an archive cannot be a file's name, None if it can.

    One rule on every system, so that an archive that is refused on one is refused on all.
    """
    if name in ("", ".", ".."):
        return "is not a file name"
    if re.search(r"[/\\\x00-\x1f\x7f-\x9f]", name):
        return "holds a slash, a backslash or a control character"
    try:
        encoded = encode_name(name)
    except UnicodeEncodeError:
        return "has a character that no file name has"
    if len(encoded) > max_size:
        return f"is longer than {max_size} bytes"
    return None


def check_names(header: Header) -> None:
    """Raise FormatError for a name that is no file's name, or that occurs twice.

    Such an archive does not restore: Proxmox's program fails, or writes outside its target.
    """
    for kind, items, count, max_size in (
        ("config", header.configs, CONFIG_COUNT, CONFIG_NAME_MAX_SIZE),
        ("device", header.devices, len(DEV_IDS), DEVICE_NAME_MAX_SIZE),
    ):
        if len(items) > count:
            raise FormatError(f"{len(items)} {kind}s, an archive holds {count} at most")
        seen = set()
        for item in items:
            fault = name_fault(item.name, max_size) or ("occurs twice" if item.name in seen else "")
            if fault:
                raise FormatError(f"{kind} name {quote(item.name)} {fault}")
            seen.add(item.name)


def parse_extent(data: bytes, offset: int, uuid: bytes) -> Extent:
    """Return the extent header in these 512 bytes, read at an offset of an archive with that uuid.

    Raises FormatError; `Index.add`, which knows the devices, checks blockinfo.
    """
    magic, reserved, block_count, extent_uuid, digest, slots = EXTENT.unpack(data)
    # The MD5 comes before the other fields, so that a damaged uuid is no extent of another archive.
    if magic != EXTENT_MAGIC:
        raise FormatError(f"no extent here: magic {magic!r}, expected {EXTENT_MAGIC!r}", offset)
    if md5_without(data, EXTENT_MD5) != digest:
        raise FormatError("the extent header's MD5 does not match", offset)
    if extent_uuid != uuid:
        raise FormatError(f"extent of another archive: uuid {format_uuid(extent_uuid)}", offset)
    if reserved:
        raise FormatError(f"extent header: reserved field is {reserved}, expected 0", offset)
    return Extent(offset, block_count, parse_slots(slots), digest)


def parse_slots(slots: bytes) -> tuple[int, ...]:
    """Return blockinfo of the used ones of an extent header's 59 slots."""
    dev_ids = slots[SLOT_DEV_ID::SLOT_SIZE].rstrip(b"\0")  # 0 is an empty slot
    infos = struct.unpack_from(f">{len(dev_ids)}Q", slots)
    if 0 in dev_ids:  # nobody writes empty slots in front of used ones, but it is allowed
        infos = tuple(info for info in infos if info >> 32 & 0xFF)
    return infos


def pack_extent(
    uuid: bytes, block_count: int, blockinfo: Sequence[int], unused: bytes = bytes(SLOT_SIZE)
) -> bytes:
    """Return an extent header with up to 59 blockinfos; the other slots are as `unused`."""
    slots = struct.pack(f">{len(blockinfo)}Q", *blockinfo)
    slots += unused * (EXTENT_SLOTS - len(blockinfo))
    fields = EXTENT_MAGIC, 0, block_count, uuid
    zeroed = EXTENT.pack(*fields, bytes(MD5_SIZE), slots)
    return EXTENT.pack(*fields, hashlib.md5(zeroed, usedforsecurity=False).digest(), slots)


def continue_headers(header: bytes, info: int, step: int, count: int) -> bytes:
    """Return `count` headers of extents that store nothing, of `step` consecutive clusters each.

    They are like `header`, which has so many slots, but begin with the cluster info (as blockinfo).
    """
    # A disk of 1 TiB of zeros has two million of them: this makes one in two microseconds.
    pack = struct.Struct(f">{step}Q").pack
    start, unused = header[: EXTENT_MD5.start], header[EXTENT_INFOS_OFFSET + SLOT_SIZE * step :]
    zeroed = start + bytes(MD5_SIZE)
    headers = []
    for first in range(info, info + step * count, step):
        slots = pack(*range(first, first + step)) + unused
        digest = hashlib.md5(zeroed + slots, usedforsecurity=False).digest()
        headers += [start, digest, slots]
    return b"".join(headers)


def count_empty(headers: bytes) -> int:
    """Return how many extent headers at the beginning of some say that they store nothing."""
    count = len(headers) // EXTENT_HEADER_SIZE
    for byte in range(EXTENT_BLOCK_COUNT.start, EXTENT_BLOCK_COUNT.stop):
        column = headers[byte::EXTENT_HEADER_SIZE]
        count = min(count, len(column) - len(column.lstrip(b"\0")))
    return count


def different_header(one: Buffer, other: Buffer) -> int:
    """Return the number of the first extent header that differs; how many there are if none."""
    if one != other:
        for number, start in enumerate(range(0, len(other), EXTENT_HEADER_SIZE)):
            end = start + EXTENT_HEADER_SIZE
            if one[start:end] != other[start:end]:
                return number
    return len(other) // EXTENT_HEADER_SIZE


def header_digests(headers: Buffer) -> bytes:
    """Return the MD5s of extent headers, one after the other."""
    starts = range(EXTENT_MD5.start, len(headers), EXTENT_HEADER_SIZE)
    return b"".join(headers[start : start + MD5_SIZE] for start in starts)


@functools.cache  # there are no more than 65,536 masks
def mask_size(mask: int) -> int:
    """Return the size in bytes of a cluster's stored blocks."""
    return bin(mask).count("1") * BLOCK_SIZE


def iter_slots(extent: Extent) -> Iterator[Slot]:
    """Yield the used slots of an extent, in its order."""
    start = 0
    for info in extent.blockinfo:
        mask = info >> 48
        size = mask_size(mask)
        yield Slot(info >> 32 & 0xFF, info & 0xFFFFFFFF, mask, start, size)
        start += size


def block_spans(masks: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, end) in bytes of each run of stored blocks in consecutive clusters.

    Runs go on from one cluster into the next; offsets are from the start of the first cluster.
    """
    if masks.count(FULL_MASK) == len(masks):  # as in nearly all extents
        return [(0, len(masks) * CLUSTER_SIZE)] if masks else []
    # As one number, so that a run does not end where a cluster does; its bits, the lowest first.
    bits = bin(int.from_bytes(struct.pack(f"<{len(masks)}H", *masks), "little"))[:1:-1]
    return [(r.start() * BLOCK_SIZE, r.end() * BLOCK_SIZE) for r in re.finditer("1+", bits)]


@functools.lru_cache(maxsize=4096)  # the runs of all masks would take 38 MB
def block_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """Return (offset in the cluster, size) in bytes of each run of stored blocks, ascending."""
    return tuple((start, end - start) for start, end in block_spans((mask,)))


CANONICAL_UUID = bytes.fromhex("12345678aabbccddeeffaabbccddeeff")
# restic ends a chunk in a window of 64 zero bytes, but not before 512 KiB. The empty slots of a
# header with 8 clusters are such a window, and 512 KiB lie between two of them: so each chunk is an
# extent, at a fixed place of the disk. See the README, "The layout".
CANONICAL_CLUSTERS = 8  # an extent
# Of an extent that stores nothing: a long run of such headers must not end chunks. No reader looks
# at a slot of dev_id 0.
FILLED_SLOT = bytes.fromhex("FFFFFF00FFFFFFFF")
ALIGNS = {name: parse_size(name) for name in ("4K", "64K", "128K", "256K", "512K", "1M")}
DEFAULT_ALIGN = "512K"


def canonical_order(
    devices: Iterable[Device], chosen: Collection[int] | None = None
) -> list[Device]:
    """Return the devices by dev_id, a vmstate last; of these only the chosen dev_ids, if given."""
    devices = (device for device in devices if chosen is None or device.dev_id in chosen)
    return sorted(devices, key=lambda device: (device.is_vmstate, device.dev_id))


def clusters_per_extent(align: int) -> int:
    """Return how many clusters a canonical extent has, but for the last one of a device."""
    return max(CANONICAL_CLUSTERS, align // CLUSTER_SIZE)


def clusters_per_part(align: int) -> int:
    """Return how many clusters are read and written together: those of whole extents."""
    count = clusters_per_extent(align)
    return EXTENT_SLOTS // count * count


def lay_out_header(header: Header, align: int) -> bytearray:
    """Return the canonical header of an archive."""
    header = header._replace(uuid=CANONICAL_UUID, size=0)
    # Rounded up, so that a configuration that grows a little moves no data.
    size = -(-len(pack_header(header)) // align) * align
    return pack_header(header._replace(size=size))


def fill_up(device: Device, first: int, masks: Sequence[int], align: int) -> list[int]:
    """Return the masks of canonical extents' clusters: some zero blocks are stored, too.

    In each extent that stores a block, from its end, until the payload is a multiple of align
    bytes, or all blocks of the device are stored.
    """
    filled = list(masks)
    # Proxmox restores only what a vmstate stores: a zero block more would change it.
    if device.is_vmstate or not any(masks):
        return filled
    count = clusters_per_extent(align)
    inside = [FULL_MASK] * len(masks)
    if first + len(masks) >= device.cluster_count:
        inside = [device.block_mask(first + i) for i in range(len(masks))]
    for start in range(0, len(masks), count):
        end = min(start + count, len(masks))
        # Zero blocks that come and go then leave the header as it is, or move what follows by
        # whole blocks of the storage. Added at the end, they move none of this extent.
        size = sum(map(mask_size, masks[start:end]))
        wanted = -size % align
        if wanted and size + wanted >= sum(map(mask_size, inside[start:end])):
            filled[start:end] = inside[start:end]  # as always, if an extent is no larger than align
            continue
        for i in reversed(range(start, end) if wanted else ()):
            zeros = inside[i] & ~masks[i]
            while mask_size(zeros) > wanted:
                zeros &= zeros - 1  # without its lowest bit
            filled[i] |= zeros
            wanted -= mask_size(zeros)
    return filled


def pack_extents(
    dev_id: int, first: int, masks: Sequence[int], cluster_count: int
) -> Iterator[tuple[bytes, Sequence[int]]]:
    """Yield headers of canonical extents that hold these clusters, and their masks.

    Each of an extent that stores blocks, and those of a run of extents that store none together.
    """
    groups = (masks[i : i + cluster_count] for i in range(0, len(masks), cluster_count))
    for stores, extents in itertools.groupby(groups, any):
        if stores:
            for extent in extents:
                info = dev_id << 32 | first
                infos = [mask << 48 | i for i, mask in enumerate(extent, info)]
                block_count = sum(map(mask_size, extent)) // BLOCK_SIZE
                yield pack_extent(CANONICAL_UUID, block_count, infos), extent
                first += len(extent)
        else:
            count = sum(map(len, extents))
            yield pack_empty_extents(dev_id << 32 | first, count, cluster_count), [0] * count
            first += count


@functools.lru_cache(maxsize=CLUSTER_BLOCKS)
def empty_header(slot_count: int) -> bytes:
    """Return the header of a canonical extent that stores nothing; its cluster numbers are 0."""
    return pack_extent(CANONICAL_UUID, 0, [1 << 32] * slot_count, FILLED_SLOT)


def pack_empty_extents(info: int, count: int, cluster_count: int) -> bytes:
    """Return headers of canonical extents with `count` clusters that store nothing.

    The first cluster is info, dev_id << 32 | cluster_num.
    """
    whole, rest = divmod(count, cluster_count)
    headers = continue_headers(empty_header(cluster_count), info, cluster_count, whole)
    if rest:
        headers += continue_headers(empty_header(rest), info + count - rest, rest, 1)
    return headers


def lay_out_extents(
    device: Device, first: int, masks: Sequence[int], align: int
) -> Iterator[tuple[bytes, Sequence[int]]]:
    """Yield headers of the extents that hold these clusters, and their masks in them.

    As `pack_extents` does. Where masks have more bits than the given ones, zero blocks are stored.
    """
    filled = fill_up(device, first, masks, align)
    return pack_extents(device.dev_id, first, filled, clusters_per_extent(align))


DIFFERENCE_CONFIG = "vma-tool.json"  # the first config of a difference
DIFFERENCE_FORMAT = 1


class Origin(NamedTuple):
    """One of the two archives that a difference was made of; name as it was then, digests in hex.

    `layout` identifies its header and extents (`layout_digest`), `content` the contents of its
    disks (`ContentDigest`).
    """

    name: str
    ctime: int
    layout: str
    content: str

    @property
    def title(self) -> str:
        """Name, time and content digest for messages."""
        created = format_time(self.ctime)
        return f"{quote(self.name)}, created {created}, content digest {self.content}"


class Difference(NamedTuple):
    """Contents of vma-tool.json: `new` is `base` with the clusters in this file.

    `disks` are the digests of new's devices in canonical order, of which new's content digest is
    made; `extents` is the SHA-256 of the MD5s of this file's extents. All in hex.
    """

    base: Origin
    new: Origin
    disks: tuple[str, ...]
    extents: str


def pack_difference(difference: Difference) -> bytes:
    """Return vma-tool.json."""
    origins = {"base": difference.base._asdict(), "new": difference.new._asdict()}
    value = {"format": DIFFERENCE_FORMAT, **difference._asdict(), **origins}
    return to_json(value).encode() + b"\n"


def combine_digests(disks: Iterable[str]) -> str:
    """Return the content digest of an archive, from those of its devices in canonical order."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, disks))).hexdigest()


def parse_difference(header: Header) -> Difference:
    """Return the contents of a difference's first config; raises FormatError."""
    import json

    def digest(value: object) -> str:
        if not re.fullmatch("[0-9a-f]{64}", text := require(value, str)):
            raise ValueError(f"{text!r} is no SHA-256")
        return text

    def origin(value: Any) -> Origin:
        name, ctime = require(value["name"], str), require(value["ctime"], int)
        return Origin(name, ctime, digest(value["layout"]), digest(value["content"]))

    if not header.configs or header.configs[0].name != DIFFERENCE_CONFIG:
        raise FormatError(f"a difference, but its first config is not {DIFFERENCE_CONFIG}")
    try:
        value = json.loads(header.configs[0].data)
        if value["format"] != DIFFERENCE_FORMAT:
            raise FormatError(f"a difference of format {value['format']!r}, which is not supported")
        disks = tuple(map(digest, require(value["disks"], list)))
        new = origin(value["new"])
        if len(disks) != len(header.devices) or combine_digests(disks) != new.content:
            raise ValueError("the digests contradict each other")
        return Difference(origin(value["base"]), new, disks, digest(value["extents"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # It quotes the file, which may come from anybody, and be nested until Python gives up.
        reason = escape(repr(error))[:200]
        raise FormatError(f"{DIFFERENCE_CONFIG}: not what diff writes: {reason}") from error


def needs_base(header: Header) -> FormatError:
    """Return the error that says what a difference is, and what it needs."""
    base = parse_difference(header).base.title
    return FormatError(f"a difference, which needs --base ARCHIVE: {base}")


def whole_header(header: Header) -> Header:
    """Return the header of the archive that a difference makes; any other one as it is."""
    if header.magic != DIFFERENCE_MAGIC:
        return header
    return header._replace(magic=HEADER_MAGIC, configs=header.configs[1:], size=0, md5=b"")


# ---------------------------------------------------------------------------------------------
# zstd frames: the compressed canonical archive. Pieces of the plain archive are a zstd frame each;
# an index and a seek table follow in skippable frames. All numbers are little-endian.
# Sources: RFC 8878, cited as "RFC"; zstd's contrib/seekable_format for the seek table.

FRAME_MAGIC = 0xFD2FB528
FRAME_BLOCK_MAX = 128 << 10  # bytes in one block of a frame
SKIPPABLE = struct.Struct("<II")  # RFC 3.1.2: Magic_Number, Frame_Size
SKIPPABLE_MAGICS = range(0x184D2A50, 0x184D2A60)
INDEX_MAGIC = 0x184D2A5D
INDEX_NAME = b"VMAINDEX"
SEEK_TABLE_MAGIC = 0x184D2A5E
# Number_Of_Frames, Seek_Table_Descriptor, Seekable_Magic_Number
SEEK_FOOTER = struct.Struct("<IBI")
SEEKABLE_MAGIC = 0x8F92EAB1
SEEK_ENTRY_SIZE = 8  # Compressed_Size, Decompressed_Size
FRAME_MAX_SIZE = 8 << 20  # what a frame may hold if it is read at any place
PIECE_SIZE = 1 << 20  # at most so much goes into a frame of ours
PIECE_CLUSTERS = PIECE_SIZE // CLUSTER_SIZE
RUN_EXTENTS = 1024  # extents that store nothing, whose headers share a frame
RUN_SIZE = RUN_EXTENTS * EXTENT_HEADER_SIZE
# RFC 3.1.1: a single segment, no checksum, a content of 256 + 256 bytes; then the last block, raw
STORED_HEADER = bytes.fromhex("28B52FFD 60 0001 011000")  # in front of an extent header
COMPRESSION_LEVELS = range(1, 23)
DEFAULT_LEVEL = 3  # vzdump's


class Frame(NamedTuple):
    """A zstd frame as its headers describe it, or a skippable one, which has no content.

    Sizes are in bytes; `content_size` is None if the frame does not say it.
    """

    size: int
    content_size: int | None
    has_checksum: bool


class CutError(FormatError):
    """A frame of which only the beginning is there."""


def frame_number(data: Buffer, start: int, size: int) -> int:
    field = bytes(data[start : start + size])
    if len(field) < size:
        raise CutError("the zstd frame is cut off")
    return int.from_bytes(field, "little")


def parse_frame_start(data: Buffer, offset: int = 0) -> Frame:
    """Return the frame as its header describes it, with the header's size; raises FormatError."""
    magic = frame_number(data, offset, 4)
    if magic != FRAME_MAGIC:
        raise FormatError(f"no zstd frame: magic 0x{magic:08x}, expected 0x{FRAME_MAGIC:08x}")
    descriptor = frame_number(data, offset + 4, 1)
    single_segment = descriptor >> 5 & 1
    if descriptor & 8:
        raise FormatError("the zstd frame is of a later format: a reserved bit is set")
    # Window_Descriptor, which a single segment lacks, then Dictionary_ID
    position = offset + 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    content_size = None
    if size:  # two bytes count from 256 on: RFC 3.1.1.1.4
        content_size = frame_number(data, position, size) + (256 if size == 2 else 0)
    return Frame(position + size - offset, content_size, bool(descriptor & 4))


def parse_frame(data: Buffer, offset: int = 0) -> Frame:
    """Return the frame at an offset by its headers alone (RFC 3.1.1); raises FormatError."""
    if frame_number(data, offset, 4) in SKIPPABLE_MAGICS:
        size = SKIPPABLE.size + frame_number(data, offset + 4, 4)
        if size > len(data) - offset:
            raise CutError("the skippable frame is cut off")
        return Frame(size, 0, False)
    frame = parse_frame_start(data, offset)
    position = offset + frame.size
    last = 0
    while not last:
        block = frame_number(data, position, 3)
        last, kind, size = block & 1, block >> 1 & 3, block >> 3
        if kind == 3 or size > FRAME_BLOCK_MAX:  # 0 raw, 1 one byte repeated, 2 compressed
            at = position - offset
            raise FormatError(f"the zstd frame is damaged: no block after {at} bytes")
        position += 3 + (1 if kind == 1 else size)  # of a repeated byte, size is how often
    position += 4 if frame.has_checksum else 0
    if position > len(data):
        raise CutError("the zstd frame is cut off")
    return frame._replace(size=position - offset)


def address_of(data: Buffer) -> Any:
    """Return data as a C function's argument, copied only if it is a read-only view."""
    import ctypes

    try:
        return ctypes.byref(ctypes.c_char.from_buffer(data))
    except (TypeError, ValueError):  # read-only, or empty
        return bytes(data)


class Zstd:
    """The zstd library, for whole frames. Threads may call it at the same time.

    This class calls the system's library, which Debian always has: dpkg needs it.
    """

    # ctypes.util.find_library would run ldconfig, or a compiler, at each start.
    NAMES = (
        "libzstd.so.1",
        "libzstd.1.dylib",
        "/opt/homebrew/lib/libzstd.1.dylib",
        "/usr/local/lib/libzstd.1.dylib",
    )
    MIN_VERSION = 10400  # 1.4.0: from there on, everything called here is stable
    PARAMETERS = (100, 201)  # ZSTD_c_compressionLevel, ZSTD_c_checksumFlag

    def __init__(self, library: Any) -> None:
        """Declare the functions that are called; raises AttributeError if one is missing."""
        import ctypes

        address, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("versionNumber", ctypes.c_uint, []),
            ("isError", ctypes.c_uint, [size]),
            ("getErrorName", ctypes.c_char_p, [size]),
            ("compressBound", size, [size]),
            ("createCCtx", address, []),
            ("createDCtx", address, []),
            ("CCtx_setParameter", size, [address, ctypes.c_int, ctypes.c_int]),
            ("compress2", size, [address, address, size, address, size]),
            ("decompressDCtx", size, [address, address, size, address, size]),
        ):
            function = getattr(library, f"ZSTD_{name}")
            function.restype = result
            function.argtypes = arguments
        self.library = library
        # Idle contexts, the compressing ones with their output buffers: a new one for each frame
        # takes a tenth longer. There are never more than threads that worked at the same time, so
        # none is ever freed.
        self._compressors: list[tuple[Any, bytearray]] = []
        self._decompressors: list[Any] = []

    @staticmethod
    @functools.cache
    def load() -> Zstd | None:
        """Return Python's own zstd, else the system's library; None where there is neither."""
        # Both only set level and checksum, so one version of the library gives the same bytes.
        try:
            return ModuleZstd(importlib.import_module("compression.zstd"))
        except ImportError:  # before Python 3.14, or built without it
            return Zstd.load_library()

    @classmethod
    def load_library(cls) -> Zstd | None:
        """Return the first library found that is new enough."""
        for name in cls.NAMES:
            with suppress(ImportError, OSError, AttributeError):
                import ctypes  # a Python may be built without it

                found = cls(ctypes.CDLL(name))
                if found.library.ZSTD_versionNumber() >= cls.MIN_VERSION:
                    return found
        return None

    def compress(self, data: Buffer, level: int) -> bytes:
        """Return data as one frame, with its content size and a checksum."""
        library = self.library
        bound = library.ZSTD_compressBound(len(data))
        try:
            context, buffer = self._compressors.pop()
        except IndexError:
            context, buffer = self._created(library.ZSTD_createCCtx()), bytearray()
        if len(buffer) < bound:
            buffer = bytearray(bound)
        # Each time, as an idle context may have worked at another level.
        for parameter, value in zip(self.PARAMETERS, (level, 1)):
            self._checked(library.ZSTD_CCtx_setParameter(context, parameter, value))
        target, source = address_of(buffer), address_of(data)
        size = library.ZSTD_compress2(context, target, len(buffer), source, len(data))
        frame = bytes(memoryview(buffer)[: self._checked(size)])
        self._compressors.append((context, buffer))
        return frame

    def decompress_into(self, frame: Buffer, view: memoryview) -> None:
        """Decompress one frame that fills view exactly; raises FormatError."""
        stored = frame[len(STORED_HEADER) :]
        if len(stored) == len(view) and frame[: len(STORED_HEADER)] == STORED_HEADER:
            view[:] = stored  # every second frame is like this
            return
        # The library would go on with a second frame that follows, the module would ignore it.
        found = parse_frame(frame)
        if found.size != len(frame):
            raise FormatError(f"the zstd frame ends after {found.size} of {len(frame)} bytes")
        if found.content_size not in (None, len(view)):
            raise FormatError(f"the zstd frame holds {found.content_size} bytes, not {len(view)}")
        try:
            size = self._decompress(frame, view)
        except FormatError as error:
            raise FormatError(f"the zstd frame is damaged: {error}") from None
        if size != len(view):
            raise FormatError(f"the zstd frame holds {size} bytes, expected {len(view)}")

    def _decompress(self, frame: Buffer, view: memoryview) -> int:
        """Decompress up to len(view) bytes into view, return how many; raises FormatError."""
        try:
            context = self._decompressors.pop()
        except IndexError:
            context = self._created(self.library.ZSTD_createDCtx())
        target, source = address_of(view), address_of(frame)
        size = self.library.ZSTD_decompressDCtx(context, target, len(view), source, len(frame))
        self._decompressors.append(context)  # the next frame begins anew, also after an error
        return self._checked(size)

    def decompress_damaged(self, frame: Buffer, view: memoryview) -> int:
        """Decompress what can be of a damaged frame; return its size, zeros follow in view."""
        view[:] = bytes(len(view))
        with suppress(FormatError):
            self._decompress(frame, view)
        return len(bytes(view).rstrip(b"\0"))

    def stream(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Decompress frames one after the other, given in any pieces.

        Raises FormatError at the first damaged piece, after the contents of those before it.
        """
        import ctypes

        address, size = ctypes.c_void_p, ctypes.c_size_t

        class Buffer(ctypes.Structure):  # ZSTD_inBuffer, ZSTD_outBuffer
            _fields_ = (("address", address), ("size", size), ("position", size))

        # Declared here and not with the others: few commands need them.
        library = self.library
        library.ZSTD_decompressStream.restype = size
        library.ZSTD_decompressStream.argtypes = [address, address, address]
        library.ZSTD_freeDCtx.argtypes = [address]
        output = ctypes.create_string_buffer(FRAME_BLOCK_MAX)
        # A context of its own, freed at the end: this one may be left in the middle of a frame.
        context = self._created(library.ZSTD_createDCtx())
        left = 0  # not 0 in the middle of a frame
        try:
            for piece in pieces:
                data = ctypes.create_string_buffer(piece, len(piece))
                source = Buffer(ctypes.addressof(data), len(piece), 0)
                target = Buffer(ctypes.addressof(output), len(output), 0)
                # If the output is full, more may follow, though the piece has been used up.
                while source.position < source.size or (left and target.position == target.size):
                    target.position = 0
                    references = ctypes.byref(target), ctypes.byref(source)
                    left = self._checked(library.ZSTD_decompressStream(context, *references))
                    yield output.raw[: target.position]
            if left:
                raise CutError("the zstd frame is cut off")
        finally:
            library.ZSTD_freeDCtx(context)

    def _created(self, context: Any) -> Any:
        if not context:
            raise VmaError("no memory for zstd")
        return context

    def _checked(self, size: int) -> int:
        """Return a size; raises FormatError if it is an error's code, VmaError without memory."""
        if self.library.ZSTD_isError(size):
            text = self.library.ZSTD_getErrorName(size).decode().lower()
            raise (
                VmaError("no memory for zstd") if "not enough memory" in text else FormatError(text)
            )
        return size


class ModuleZstd(Zstd):
    """The same by Python's compression.zstd, or by backports.zstd, which has its interface."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self._idle: dict[int, list[Any]] = {}  # compressors by level

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise FormatError with only the library's own words, as Zstd does."""
        try:
            yield
        except self.module.ZstdError as error:
            raise FormatError(str(error).rpartition(": ")[2].lower()) from None

    def compress(self, data: Buffer, level: int) -> bytes:
        # A new compressor would have to allocate its tables for each frame. Threads share the idle
        # ones without a lock, as a list's `pop` and `append` are atomic.
        idle = self._idle.setdefault(level, [])
        try:
            compressor = idle.pop()
        except IndexError:
            names = self.module.CompressionParameter
            options = {names.compression_level: level, names.checksum_flag: 1}
            compressor = self.module.ZstdCompressor(options=options)
        frame: bytes = compressor.compress(data, compressor.FLUSH_FRAME)
        idle.append(compressor)
        return frame

    def _decompress(self, frame: Buffer, view: memoryview) -> int:
        with self._errors():
            # One byte more than expected: the frame's end is only read with room left.
            data = self.module.ZstdDecompressor().decompress(frame, len(view) + 1)
        if len(data) > len(view):
            raise FormatError(f"it holds more than {len(view)} bytes")
        view[: len(data)] = data
        return len(data)

    def decompress_damaged(self, frame: Buffer, view: memoryview) -> int:
        view[:] = bytes(len(view))
        decompressor = self.module.ZstdDecompressor()
        size = 0
        with suppress(FormatError), self._errors():
            for start in range(0, len(frame), PAGE_SIZE):  # what fails gives nothing
                room = len(view) - size
                data = decompressor.decompress(frame[start : start + PAGE_SIZE])[:room]
                view[size : size + len(data)] = data
                size += len(data)
        return size

    def stream(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Decompress one frame given as its header, its blocks and its checksum, piece by piece."""
        with self._errors():
            yield from map(self.module.ZstdDecompressor().decompress, pieces)


class SeekTable(NamedTuple):
    """Start of each frame of a seekable file, and the end of the last one: 16 bytes a frame.

    `stored_headers` counts the frames of an extent header that is stored as it is.
    """

    offsets: array.array[int]  # in the plain archive
    compressed_offsets: array.array[int]  # in the file
    stored_headers: int


def native(numbers: array.array[int]) -> array.array[int]:
    """Turn little-endian numbers into the machine's, or back; in place."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def pack_seek_table(sizes: array.array[int]) -> bytes:
    """Return the seek table in its frame, of each frame's size compressed and decompressed."""
    data = native(array.array("I", sizes)).tobytes()
    footer = SEEK_FOOTER.pack(len(sizes) // 2, 0, SEEKABLE_MAGIC)
    return SKIPPABLE.pack(SEEK_TABLE_MAGIC, len(data) + len(footer)) + data + footer


def parse_seek_footer(tail: Buffer) -> int | None:
    """Return the size of the seek table, with its frame, that ends a file; None if none does."""
    if len(tail) < SEEK_FOOTER.size:
        return None
    count, descriptor, magic = SEEK_FOOTER.unpack_from(tail, len(tail) - SEEK_FOOTER.size)
    # A descriptor with bits set: another program's table, with checksums.
    if magic != SEEKABLE_MAGIC or descriptor or not count:
        return None
    return SKIPPABLE.size + SEEK_ENTRY_SIZE * int(count) + SEEK_FOOTER.size


def parse_seek_table(data: Buffer, file_size: int) -> SeekTable:
    """Return the seek table in its frame; raises FormatError if it cannot be that of the file."""
    magic, size = SKIPPABLE.unpack_from(data)
    if magic != SEEK_TABLE_MAGIC or size != len(data) - SKIPPABLE.size:
        raise FormatError("the seek table has no skippable frame of its size")
    entries = bytes(data[SKIPPABLE.size : -SEEK_FOOTER.size])
    sizes = native(array.array("I", entries))
    compressed, plain = sizes[0::2], sizes[1::2]
    if not 0 < min(plain) <= max(plain) <= FRAME_MAX_SIZE or not min(compressed):
        found = f"{min(plain)} to {max(plain)} bytes"
        raise FormatError(f"the seek table has frames of {found}, expected 1 to {FRAME_MAX_SIZE}")
    table = SeekTable(
        array.array("Q", itertools.accumulate(plain, initial=0)),
        array.array("Q", itertools.accumulate(compressed, initial=0)),
        native(array.array("Q", entries)).count(
            EXTENT_HEADER_SIZE << 32 | len(STORED_HEADER) + EXTENT_HEADER_SIZE
        ),
    )
    if table.compressed_offsets[-1] > file_size - len(data):
        raise FormatError("the seek table has more frames than the file")
    return table


def pack_index(zstd: Zstd, masks: array.array[int], level: int) -> bytes:
    """Return the index in its frame, of all clusters' masks in the archive's order."""
    frame = zstd.compress(native(array.array("H", masks)).tobytes(), level)
    return SKIPPABLE.pack(INDEX_MAGIC, len(INDEX_NAME) + len(frame)) + INDEX_NAME + frame


def parse_index(zstd: Zstd, data: Buffer, max_count: int) -> array.array[int]:
    """Return up to max_count masks from the index in its frame; raises FormatError."""
    start = SKIPPABLE.size + len(INDEX_NAME)
    if len(data) < start or data[SKIPPABLE.size : start] != INDEX_NAME:
        raise FormatError("there is no index in front of the seek table")
    if SKIPPABLE.unpack_from(data) != (INDEX_MAGIC, len(data) - SKIPPABLE.size):
        raise FormatError("the index has no skippable frame of its size")
    frame = data[start:]
    size = parse_frame(frame).content_size
    if size is None or size % 2 or size > 2 * max_count:
        raise FormatError(f"the index holds {size} bytes, expected at most {2 * max_count}")
    masks = array.array("H", bytes(size))
    with memoryview(masks).cast("B") as view:
        zstd.decompress_into(frame, view)
    return native(masks)


def header_pieces(size: int) -> list[int]:
    """Return the sizes of the pieces of an archive's header."""
    return [min(PIECE_SIZE, size - start) for start in range(0, size, PIECE_SIZE)]


def payload_pieces(masks: Sequence[int]) -> list[int]:
    """Return the sizes of the pieces of an extent's stored blocks; if none is stored, none."""
    groups = (masks[i : i + PIECE_CLUSTERS] for i in range(0, len(masks), PIECE_CLUSTERS))
    return [size for group in groups if (size := sum(map(mask_size, group)))]


class ArchiveIndex(NamedTuple):
    """Contents of an index: each device's entries as in DeviceIndex, by dev_id.

    `partial` has the first cluster of each extent that stores some blocks, but not all;
    `full_count` counts those that store all.
    """

    cluster_count: int  # of a whole extent
    entries: dict[int, array.array[int]]
    partial: dict[int, array.array[int]]
    full_count: int = 0

    @property
    def stored_count(self) -> int:
        """How many extents store blocks."""
        return self.full_count + sum(map(len, self.partial.values()))


def repeated_entries(
    base: int, extent_count: int, extent_step: int, cluster_count: int, cluster_step: int
) -> array.array[int]:
    """Return the entries of extents that are all alike; from one to the next they grow by steps."""
    entries = array.array("Q", bytes(8 * extent_count * cluster_count))
    with memoryview(entries) as view:
        for i in range(cluster_count):  # of all extents one cluster at a time
            first = base + i * cluster_step
            column = array.array("Q", range(first, first + extent_count * extent_step, extent_step))
            view[i::cluster_count] = memoryview(column)
    return entries


def extend_run(sizes: array.array[int], run: int, number: int, count: int) -> int:
    """Return the size of a run of headers with `count` more of them; what is full goes to sizes.

    `number` is that of the first one's extent among its device's.
    """
    while count:
        if run and number % RUN_EXTENTS == 0:
            sizes.append(run)
            run = 0
        step = min(count, RUN_EXTENTS - number % RUN_EXTENTS)
        run += EXTENT_HEADER_SIZE * step
        number += step
        count -= step
    return run


def lay_out_frames(
    header_size: int, masks: Mapping[int, memoryview], cluster_count: int
) -> tuple[ArchiveIndex, array.array[int]]:
    """Return the index of a canonical archive with these masks, and all frames' sizes.

    The masks are those of each device by dev_id, in canonical order.
    """
    # Nearly all extents store nothing (group 1) or everything (group 2): those go many at once.
    size, most = 2 * cluster_count, RUN_EXTENTS
    pattern = rb"(?s)((?:\0{%d}){1,%d})|((?:\xff{%d}){1,%d})|.{1,%d}"
    groups = re.compile(pattern % (size, most, size, most, size))
    full_pieces = payload_pieces([FULL_MASK] * cluster_count)
    empty_step = EXTENT_HEADER_SIZE << 16  # from an entry to that of the next extent
    full_step = empty_step + (CLUSTER_SIZE * cluster_count << 16)
    sizes = array.array("I", header_pieces(header_size))
    full_sizes = array.array("I", (EXTENT_HEADER_SIZE, *full_pieces))
    offset = header_size
    run = 0  # bytes of headers that share a frame
    full_count = 0
    index = ArchiveIndex(cluster_count, {}, {})
    for dev_id, disk_masks in masks.items():
        entries = index.entries[dev_id] = array.array("Q")
        partial = index.partial[dev_id] = array.array("Q")
        for found in groups.finditer(disk_masks.cast("B")):
            first, end = found.start() // 2, found.end() // 2
            chunk = disk_masks[first:end]
            count = -(-len(chunk) // cluster_count)  # of extents
            base = offset + EXTENT_HEADER_SIZE << 16
            if found.lastindex == 1 or not any(chunk):  # a device's last extent may be shorter
                clusters = min(cluster_count, len(chunk))
                entries += repeated_entries(base, count, empty_step, clusters, 0)
                offset += EXTENT_HEADER_SIZE * count
                run = extend_run(sizes, run, first // cluster_count, count)
                continue
            if run:
                sizes.append(run)
                run = 0
            if found.lastindex == 2:
                step = CLUSTER_SIZE << 16
                entries += repeated_entries(base | FULL_MASK, count, full_step, cluster_count, step)
                sizes += full_sizes * count
                full_count += count
                offset += count * full_step >> 16
                continue
            partial.append(first)
            pieces = payload_pieces(chunk)
            places = itertools.accumulate(map(mask_size, chunk), initial=base >> 16)
            entries.extend(at << 16 | mask for at, mask in zip(places, chunk))
            sizes.extend((EXTENT_HEADER_SIZE, *pieces))
            offset += EXTENT_HEADER_SIZE + sum(pieces)
    if run or not masks:  # without devices, there is one extent all the same
        sizes.append(run or EXTENT_HEADER_SIZE)
    return index._replace(full_count=full_count), sizes


def index_archive(
    header_size: int, devices: Sequence[Device], masks: array.array[int], table: SeekTable
) -> ArchiveIndex:
    """Return the index of an archive; devices are in canonical order.

    Frames that are cut as the masks demand prove all offsets; raises FormatError otherwise.
    """
    disks = {}
    end = 0
    for device in devices:
        start = end
        # A vmstate, the last one, has as many clusters as are left, whatever its size is.
        end = max(len(masks), end) if device.is_vmstate else end + device.cluster_count
        disks[device.dev_id] = memoryview(masks)[start:end]
    if end != len(masks):
        raise FormatError(f"the index has {len(masks)} clusters, the devices {end}")
    # Of a device, only the last mask can have such blocks; a canonical archive has none.
    for device in devices:
        last = device.cluster_count - 1
        if not device.is_vmstate and disks[device.dev_id][last] & ~device.block_mask(last):
            raise FormatError(f"the index has blocks behind the end of {device.title}")
    # An extent has 8 clusters or, if the header's size is a multiple of 1 MiB, may have 16.
    for align in (ALIGNS["4K"], ALIGNS["1M"]):
        if header_size % align == 0:
            index, sizes = lay_out_frames(header_size, disks, clusters_per_extent(align))
            # Compared one by one, they take no memory; a table has millions.
            offsets = itertools.accumulate(sizes, initial=0)
            if (
                len(sizes) + 1 == len(table.offsets)
                and index.stored_count == table.stored_headers
                and all(map(operator.eq, offsets, table.offsets))
            ):
                return index
    raise FormatError(
        "its frames are not cut as its index says, as in archives of vma-tool 2: optimize makes "
        "it readable at any place again"
    )


# ---------------------------------------------------------------------------------------------
# Stopping and cleaning up

SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
ENDING_SIGNALS = {getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name)}


class Cleanup:
    """What is undone when a signal ends the program: unfinished files, directories, children.

    The latest comes first, so that a directory is empty when its turn comes.
    """

    actions: ClassVar[dict[object, Callable[[], object]]] = {}

    @classmethod
    def install(cls) -> None:
        """Handle signals for the rest of this process."""
        for number in ENDING_SIGNALS:
            # A signal that the caller ignores (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, cls._end)
        for name in ("SIGUSR1", "SIGINFO"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), cls._print_status)
        if hasattr(signal, "SIGCHLD"):
            # A caller that ignores it would hide how a decompressor ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @classmethod
    def _end(cls, signum: int, _frame: object) -> NoReturn:
        for key in reversed(list(cls.actions)):
            cls.undo(key)
        cls._print(f"ended by {signal.Signals(signum).name}")
        # An exception could cut any two steps apart, or be lost in a destructor.
        os._exit(128 + signum)

    @classmethod
    def undo(cls, key: object) -> None:
        """Take one action, whose errors do not matter, and forget it."""
        with suppress(OSError):
            cls.actions[key]()
        del cls.actions[key]

    @classmethod
    def _print_status(cls, _signum: int, _frame: object) -> None:
        now = Progress.current
        cls._print(f"{now.name}: {now.status()}" if now else "nothing is running")

    @staticmethod
    def _print(text: str) -> None:
        # Not through sys.stderr: the signal may have come in the middle of a print.
        erase = "\r\x1b[K" if Progress.current and Progress.current._shown else ""
        with suppress(OSError):
            os.write(2, f"{erase}vma-tool: {text}\n".encode(errors="backslashreplace"))


@contextmanager
def signals_blocked(signals: Collection[signal.Signals] = ENDING_SIGNALS) -> Iterator[None]:
    """Let signals wait: a few steps follow that must not be cut in two."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_thread(target: Callable[[], None]) -> threading.Thread:
    """Start a thread; raises VmaError where the system allows no more of them."""
    thread = threading.Thread(target=target, daemon=True)
    # It inherits the mask. Signals are for the main thread, or blocking them there would not help.
    with signals_blocked():
        try:
            thread.start()
        except RuntimeError as error:
            raise VmaError(str(error)) from error
    return thread


def processor_count() -> int:
    """Return how many processors this process may use."""
    # A container, or taskset, may allow fewer than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------------------------------------
# Input: files, pipes, decompressors

WINDOW_SIZE = 16 << 10  # read ahead where small reads follow one another
PIPE_SIZE = 1 << 20
SCRATCH_SIZE = 256 << 10  # for data that is only passed on or dropped: fits the processor's cache
IOV_MAX = 1024  # parts of one call; POSIX allows 16, every system in use 1024


class Readers(NamedTuple):
    """Who may read a file, and so a file made of it: the mode's bits, for that group."""

    mode: int
    gid: int

    def mode_for(self, gid: int) -> int:
        """Return a mode for a file of group gid that lets nobody read who cannot read this one."""
        # In a file of another group, members of this one count as others: no bits are safe.
        return 0o600 | self.mode & 0o666 if gid == self.gid else 0o600


def has_acl(fd: int) -> bool:
    """Say whether a file has an access control list beside its mode."""
    with suppress(AttributeError, OSError):
        return bool(os.getxattr(fd, "system.posix_acl_access"))
    return False


def readers_of(fd: int, state: os.stat_result) -> Readers:
    """Return who may read an open file."""
    # An access list may forbid what the mode allows.
    return Readers(state.st_mode & (~0o077 if has_acl(fd) else ~0), state.st_gid)


# mtime can be set back, ctime cannot.
file_version = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns", "st_ctime_ns")


class Input:
    """An archive's bytes in their order, as a pipe or a decompressor gives them: a stream.

    `offset` counts the bytes read. `size` is None, as only the end tells; an input that can be read
    at any place has one, see `FileInput`.
    """

    size: int | None = None
    compression = ""
    note = ""  # why a seekable archive is read as a stream
    raw: io.FileIO | None = None  # the file itself, also if it is compressed
    state: os.stat_result | None = None  # of that when it was opened, None for a pipe
    raw_size = 0  # of that, and so the final value of `position`; 0 for a pipe

    def __init__(self, name: str, file: io.RawIOBase | io.BufferedIOBase) -> None:
        self.name = name
        self.file = file
        self.offset = 0
        self._scratch = memoryview(b"")
        self._peeked = memoryview(b"")  # read already

    def __enter__(self) -> Input:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def close(self, failed: bool = False) -> None:
        """Close; `failed` says that an error is on its way, which no other may hide."""
        with suppress(OSError):  # everything that was needed has been read
            self.file.close()

    def read(self, size: int) -> bytes:
        """Return the next bytes; fewer than size only at the end."""
        view = memoryview(bytearray(size))
        return bytes(view[: self.readinto(view)])

    def readinto(self, view: memoryview) -> int:
        """Fill view with the next bytes; return how many there were before the end."""
        count = min(len(self._peeked), len(view))
        view[:count] = self._peeked[:count]
        self._peeked = self._peeked[count:]
        with os_errors_as(f"{self.name}: offset 0x{self.offset:x}"):
            # A pipe gives as much as is in it, not as much as is asked for.
            while count < len(view) and (got := self.file.readinto(view[count:])):
                count += got
        self.offset += count
        return count

    def peek(self, size: int) -> bytes:
        """Return the next bytes, which are still to be read; fewer than size only at the end."""
        data = self.read(size)
        self.offset -= len(data)
        if self.size is None:  # it cannot be read again
            self._peeked = memoryview(data + self._peeked)
        return data

    def skip(self, size: int) -> int:
        """Pass over the next bytes; return how many there were before the end."""
        if not self._scratch and size:
            self._scratch = memoryview(bytearray(SCRATCH_SIZE))  # new memory each time is slow
        skipped = 0
        while skipped < size and (count := self.readinto(self._scratch[: size - skipped])):
            skipped += count
        return skipped

    def read_at(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view from its offset; of a stream only what follows what was read.

        Raises FormatError if it ends before.
        """
        for offset, view in sorted(wanted, key=operator.itemgetter(0)):
            self.skip(offset - self.offset)
            if self.readinto(view) < len(view):
                raise FormatError("the archive ends inside an extent", self.offset, self.name)

    def position(self) -> int:
        """Return how many of `total` bytes have been read."""
        if self.raw and self.raw_size:
            with suppress(OSError, ValueError):  # a decompressor shares the file's offset
                return os.lseek(self.raw.fileno(), 0, os.SEEK_CUR)
        return self.offset

    @property
    def readers(self) -> Readers | None:
        """Who may read the file, None for a pipe."""
        if self.raw and self.state:
            return readers_of(self.raw.fileno(), self.state)
        return None

    def check_unchanged(self, path: str | None = None) -> None:
        """Raise VmaError if the file was written to since it was opened, or path is another one."""
        if not self.raw or not self.state:
            return
        with os_errors_as(self.name):
            states = [os.fstat(self.raw.fileno())]
            if path is not None:
                states.append(os.stat(path))
        if any(file_version(now) != file_version(self.state) for now in states):
            raise VmaError(f"{self.name}: the file was changed while it was read")


def common_readers(sources: Iterable[Readers | None]) -> Readers | None:
    """Return who may read all of some files; pipes do not count."""
    known = list(filter(None, sources))
    if not known:
        return None
    modes, gids = zip(*known)
    mode = functools.reduce(operator.and_, modes)
    if len(set(gids)) > 1:  # a file has one, which need not be allowed to read those of another
        mode &= ~0o070
    return Readers(mode, gids[0])


def drop_bytes(parts: Sequence[Buffer], count: int) -> list[memoryview]:
    """Return views of parts without their first count bytes."""
    if count == sum(map(len, parts)):
        return []
    left = []
    for part in parts:
        if count >= len(part):
            count -= len(part)
        else:
            left.append(memoryview(part)[count:])
            count = 0
    return left


def size_of(fd: int) -> int:
    """Return the size of a file or block device, which is then read from its beginning."""
    size = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, 0, os.SEEK_SET)
    return size


class FileInput(Input):
    """A plain file or block device of `size` bytes, which can also be read at any place.

    `bytes_read` counts everything that was read. With `read_all`, `skip` reads as well.
    """

    size: int
    raw: io.FileIO
    state: os.stat_result
    read_all = False

    def __init__(self, name: str, file: io.FileIO) -> None:
        super().__init__(name, file)
        self.raw = file
        self.fd = file.fileno()
        with os_errors_as(name), ExitStack() as undo:
            undo.callback(file.close)
            self.state = os.fstat(self.fd)
            self.size = self.raw_size = size_of(self.fd)
            undo.pop_all()  # close does it
        self.bytes_read = 0
        self._window = b""
        self._window_offset = 0
        self._lock = threading.Lock()

    def read(self, size: int) -> bytes:
        size = min(size, self.size - self.offset)
        at = self.offset - self._window_offset
        if not 0 <= at <= len(self._window) - size:  # not all of it is in the window
            # After a skip, nothing is read ahead: what follows may be skipped as well.
            ahead = WINDOW_SIZE if 0 <= at <= len(self._window) else 0
            self._window, at = self._read_window(max(size, ahead)), 0
            self._window_offset = self.offset
        self.offset += size
        return self._window[at : at + size]

    def _read_window(self, size: int) -> bytes:
        """Return the next bytes, which are still to be read."""
        size = min(size, self.size - self.offset)
        if hasattr(os, "pread"):  # with one call, as nearly always
            try:
                data = os.pread(self.fd, size, self.offset)
            except OSError as error:
                raise self._error(self.offset, system_message(error)) from error
            if len(data) == size:
                self.bytes_read += size
                return data
        data = super().read(size)
        self.offset -= len(data)
        return data

    def readinto(self, view: memoryview) -> int:
        view = view[: self.size - self.offset]
        self._fill([view], self.offset)
        self.offset += len(view)
        return len(view)

    def skip(self, size: int) -> int:
        size = min(size, self.size - self.offset)
        if self.read_all:
            count = self._read_in_kernel(size)
            return count + super().skip(size - count)
        self.offset += size
        return size

    @functools.cached_property
    def _null(self) -> io.FileIO | None:
        """The null device, None on a broken host, where it is a file."""
        file = io.FileIO(os.devnull, "wb")
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        return None

    def _read_in_kernel(self, size: int) -> int:
        """Pass over bytes that the kernel reads, and does not copy; return how many it could."""
        done = 0
        # Where it cannot, or meets an error, `read` goes on from there, and says which one.
        with suppress(AttributeError, OSError):
            while (
                self._null
                and done < size
                and (count := os.sendfile(self._null.fileno(), self.fd, self.offset, size - done))
            ):
                done += count
                self.offset += count
                self.bytes_read += count
        return done

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        if null := self.__dict__.get("_null"):  # opened only if needed
            null.close()

    def read_at(self, wanted: Sequence[tuple[int, memoryview]]) -> None:
        """Fill each view from its offset, neighbours with one read; safe in several threads.

        Raises VmaError if the file cannot be read, or ends before.
        """
        views: list[memoryview] = []
        start = end = 0
        for offset, view in sorted(wanted, key=operator.itemgetter(0)):
            # What lies between the payloads of two extents is read with them, and dropped.
            gap = offset - end
            if not 0 <= gap <= EXTENT_HEADER_SIZE or not views:
                self._fill(views, start)
                views, start = [], offset
            elif gap:
                views.append(memoryview(bytearray(gap)))
            views.append(view)
            end = offset + len(view)
        self._fill(views, start)

    def position(self) -> int:
        return self.bytes_read

    def _error(self, offset: int, reason: str) -> VmaError:
        return VmaError(f"{self.name}: offset 0x{offset:x}: {reason}")

    def _fill(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill views, one after the other, with the bytes from offset on."""
        while any(map(len, views)):
            try:
                if hasattr(os, "preadv"):
                    count = os.preadv(self.fd, views[:IOV_MAX], offset)
                else:  # macOS before 11, Windows
                    with self._lock:  # threads share the descriptor's offset
                        os.lseek(self.fd, offset, os.SEEK_SET)
                        data = os.read(self.fd, len(views[0]))
                    count = len(data)
                    views[0][:count] = data
            except OSError as error:
                raise self._error(offset, system_message(error)) from error
            if not count:
                raise self._error(offset, "the file became shorter")
            offset += count
            self.bytes_read += count
            # Linux reads up to 2 GiB at once, and only up to a sector that cannot be read.
            views = drop_bytes(views, count)


class SeekableError(FormatError):
    """Damage to what only reading at any place needs; as a stream the archive may be good."""


class FramesInput(FileInput):
    """A compressed canonical archive, read at any place by its seek table.

    `size` and all offsets are those of the plain archive. A difference has no index.
    """

    compression = "zstd"
    index: ArchiveIndex | None = None

    def __init__(self, name: str, file: io.FileIO, zstd: Zstd, index: bool) -> None:
        """Read the seek table, and with `index` the index.

        Raises FormatError, and leaves the file open, if one of them is not right.
        """
        super().__init__(name, file)
        self.zstd = zstd
        self._mine = threading.local()  # each thread's buffer for a compressed frame, to use again
        self.keep_frames(2 * processor_count())
        footer = self._stored(max(self.size - SEEK_FOOTER.size, 0), self.size)
        table_size = parse_seek_footer(footer)
        if table_size is None:
            raise FormatError("")  # nothing is wrong: most files have none
        end = self.size - table_size
        if end < 0:
            raise FormatError("the seek table has more frames than the file")
        self.table = parse_seek_table(self._stored(end, self.size), self.size)
        index_data = self._stored(self.table.compressed_offsets[-1], end)
        self.size = self.table.offsets[-1]
        is_difference = bytes(self._frame(0)[:4]) == DIFFERENCE_MAGIC
        if is_difference and index_data:
            raise FormatError("the seek table has fewer frames than the file")
        # Also without `index`: other programs write seekable files too, of any archive.
        if not is_difference and not index_data[SKIPPABLE.size :].startswith(INDEX_NAME):
            raise FormatError("there is no index in front of the seek table")
        if index and not is_difference:
            self._read_index(index_data)

    def _read_index(self, data: Buffer) -> None:
        """Read the index; raises FormatError unless header and seek table agree with it."""
        start = self.read(HEADER_FIXED_SIZE)
        header_size = parse_header_size(start)
        header = parse_header(start + self.read(header_size - len(start)))
        self.offset = 0
        if header.uuid != CANONICAL_UUID:
            raise FormatError("the archive is not canonical")
        # Of each extent, of up to 16 clusters, there is an MD5 of 16 bytes, which is random.
        masks = parse_index(self.zstd, data, self.raw_size)
        devices = canonical_order(header.devices)
        self.index = index_archive(header_size, devices, masks, self.table)
        self._devices = {device.dev_id: device for device in devices}

    read = Input.read  # without a window: frames are kept anyway

    def _stored(self, start: int, end: int) -> bytearray:
        """Return bytes of the file itself."""
        data = bytearray(end - start)
        super()._fill([memoryview(data)], start)
        return data

    def _fill(self, views: Sequence[memoryview], offset: int) -> None:
        for view in views:
            done = 0
            while done < len(view):
                number = bisect.bisect_right(self.table.offsets, offset) - 1
                start, end = self.table.offsets[number : number + 2]
                stop = min(done + end - offset, len(view))
                if stop - done == end - start:  # a whole frame goes straight to its place
                    self._decompress(number, view[done:stop])
                else:
                    first = offset - start
                    view[done:stop] = self._frame(number)[first : first + stop - done]
                offset += stop - done
                done = stop

    def keep_frames(self, count: int) -> None:
        """Keep so many of the frames used last, of at most 1 MiB each."""

        @functools.lru_cache(count)
        def kept(_number: int) -> tuple[threading.Lock, list[memoryview]]:
            return threading.Lock(), []

        self._kept = kept

    def _frame(self, number: int) -> memoryview:
        """Return what a frame holds."""
        lock, found = self._kept(number)
        # Held for this frame only: another thread that needs it waits, and does not do it again.
        with lock:
            if not found:
                start, end = self.table.offsets[number : number + 2]
                view = memoryview(bytearray(end - start))
                self._decompress(number, view)
                found.append(view)
            return found[0]

    def _decompress(self, number: int, view: memoryview) -> None:
        start, end = self.table.compressed_offsets[number : number + 2]
        frame: memoryview = getattr(self._mine, "frame", memoryview(b""))
        if len(frame) < end - start:
            # As large as nearly any frame, so that it need not grow with each.
            frame = self._mine.frame = memoryview(bytearray(max(end - start, PIECE_SIZE)))
        frame = frame[: end - start]
        super()._fill([frame], start)
        try:
            self.zstd.decompress_into(frame, view)
        except FormatError as error:
            start, end = self.table.offsets[number : number + 2]
            raise SeekableError(f"{self._place(start, end)}{error}", start, self.name) from None

    def _place(self, start: int, end: int) -> str:
        """Return device and clusters, as far as known, of a frame that holds start to end."""
        cluster_count, by_device = self.index[:2] if self.index else (0, {})
        for dev_id, entries in by_device.items():
            first = bisect.bisect_left(entries, start << 16)
            stop = bisect.bisect_left(entries, end << 16)
            if first == stop and first < len(entries):  # the header of an extent
                stop = min(first + cluster_count, len(entries))
            if first < stop and start >= (entries[0] >> 16) - EXTENT_HEADER_SIZE:
                return f"{self._devices[dev_id].title}: clusters {first} to {stop - 1}: "
        return ""


class Codec(NamedTuple):
    """A compression: how its files begin, and the programs or module that decompress it."""

    name: str
    magics: tuple[bytes, ...]
    programs: tuple[str, ...]
    module: str
    package: str
    damage: str = "(?!)"  # pattern of a message about damage that the exit status does not tell


# A zstd file may also begin with one of sixteen skippable frames, as pzstd's do. pigz is faster
# than gzip, but ignores what follows the end, and does not say so. bzip2 says so, with status 0.
# lbzip2 uses all processors.
ZSTD_MAGICS = (b"\x28\xb5\x2f\xfd", *(bytes((i, 0x2A, 0x4D, 0x18)) for i in range(0x50, 0x60)))
CODECS = (
    Codec("zstd", ZSTD_MAGICS, ("zstd",), "compression.zstd", "zstd"),
    Codec("gzip", (b"\x1f\x8b",), ("gzip",), "gzip", "gzip"),
    Codec("lzop", (b"\x89LZO\0\r\n\x1a\n",), ("lzop",), "", "lzop"),
    Codec("xz", (b"\xfd7zXZ\0",), ("xz",), "lzma", "xz-utils"),
    Codec("bzip2", (b"BZh",), ("lbzip2", "bzip2"), "bz2", "bzip2", damage="garbage"),
)
MAGIC_SIZE = max(len(magic) for codec in CODECS for magic in codec.magics)
# Variables of the environment that add options, meant for the user's own compressing
CODEC_OPTIONS = ("GZIP", "LZOP", "XZ_DEFAULTS", "XZ_OPT", "BZIP", "BZIP2", "ZSTD_CLEVEL")
# What decompressors print of a file that was cut, and of a window that is too large for them. lzop
# prints the system's message for an errno that has nothing to do with it.
CUT_MESSAGES = r"Read error \(39\)|nappropriate ioctl|[Uu]nexpected end|ends unexpectedly"
WINDOW_MESSAGES = r"--long=|too much memory for decoding"
# The group is a message without the program's name and its name for standard input.
CODEC_MESSAGE = (
    r"(?:(?:(?:\S*/)?(?:zstd|gzip|lzop|xz|l?bzip2)|/\*stdin\*\\+|[(<]?stdin[)>]?) ?: )+(.*)"
)


def widen_pipe(fd: int) -> None:
    """Give a pipe room for fewer, larger reads, where the system knows how."""
    with suppress(ImportError, OSError):  # it only saves time
        import fcntl

        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_SIZE)


class PipeReader(io.FileIO):
    """A pipe; `start` are bytes to read before its own, as they were read already.

    The first end of file ends it: a FIFO goes on when another writer opens it, but bytes may be
    lost in between.
    """

    start = b""
    _ended = False

    def readinto(self, buffer: Any) -> int:
        if self.start:
            data = self.start[: len(buffer)]
            self.start = self.start[len(data) :]
            buffer[: len(data)] = data
            return len(data)
        if self._ended or not len(buffer):
            return 0
        while (count := super().readinto(buffer)) is None:
            import select  # Another process may have made the shared pipe non-blocking.

            select.select([self], [], [])
        self._ended = not count
        return count


class ChunkReader(io.RawIOBase):
    """What comes in chunks of any size, as a file."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = filter(None, chunks)
        self._data = memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        data = self._data or memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self._data = data[count:]
        return count


def window_error(name: str) -> VmaError:
    """Return the error for a window that zstd does not take unless it is told to."""
    return VmaError(
        f"{name}: decompressing it needs a window of more than 128 MiB, so read it "
        "through a pipe: zstd -dc --long=31 FILE | vma-tool COMMAND -"
    )


class LibraryInput(Input):
    """The bytes that one of Python's modules decompresses, or the system's zstd library."""

    def __init__(self, name: str, codec: Codec, raw: io.FileIO) -> None:
        """Raises VmaError where this machine has no library for the codec."""
        self._buffered = io.BufferedReader(raw, PIPE_SIZE)
        try:
            file = importlib.import_module(codec.module).open(self._buffered)
        except (ImportError, ValueError):  # ValueError: no module's name at all
            zstd = Zstd.load() if codec.name == "zstd" else None
            if zstd is None:
                raise VmaError(
                    f"{name}: compressed with {codec.name}, which this machine lacks: install the "
                    f"package {codec.package}, or decompress it elsewhere: "
                    f"{codec.programs[0]} -dc FILE | vma-tool COMMAND -"
                ) from None
            pieces = iter(functools.partial(self._buffered.read1, SCRATCH_SIZE), b"")
            file = ChunkReader(zstd.stream(pieces))
        super().__init__(name, file)
        self.compression = codec.name
        self.raw = raw

    def readinto(self, view: memoryview) -> int:
        try:
            return super().readinto(view)
        # What the libraries raise for damaged data has no common base: zlib.error, lzma.LZMAError,
        # FormatError, an OSError without an errno.
        except Exception as error:
            cause = error.__cause__ or error
            # The file cannot be read, or there is no memory: that says nothing about the archive.
            unreadable = isinstance(cause, OSError) and cause.errno
            if unreadable or isinstance(cause, MemoryError) or type(cause) is VmaError:
                raise
            text = "the compressed file is cut short" if type(cause) is CutError else str(cause)
            if re.search(WINDOW_MESSAGES, text):
                raise window_error(self.name) from None
            raise FormatError(f"{self.compression}: {text}", archive=self.name) from error

    def close(self, failed: bool = False) -> None:
        super().close(failed)
        self._buffered.close()  # which the modules leave open


class ProgramInput(Input):
    """The bytes that a decompressor, run as a child, makes of a file or pipe."""

    raw: io.FileIO

    def __init__(
        self, name: str, codec: Codec, program: str, raw: io.FileIO, seekable: bool
    ) -> None:
        import subprocess

        self.raw = raw
        self.compression = codec.name
        self._codec = codec
        self._program = os.path.basename(program)
        self._seekable = seekable
        self._ended = False
        self._feeding_error: OSError | None = None
        self._messages = b""
        self._listener: threading.Thread | None = None
        with os_errors_as(f"{name}: {self._program}"), ExitStack() as undo:
            # A file is the child's own standard input. It shares our offset: that is the progress.
            self._process = subprocess.Popen(
                [program, "-dc"],
                stdin=raw.fileno() if seekable else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env={k: value for k, value in os.environ.items() if k not in CODEC_OPTIONS},
            )
            Cleanup.actions[self] = self._kill
            output = self._process.stdout
            assert isinstance(output, io.FileIO), "without buffering it is the pipe itself"
            super().__init__(name, io.BufferedReader(output, WINDOW_SIZE))
            undo.callback(self.close, failed=True)
            widen_pipe(self.file.fileno())
            self._listener = start_thread(self._listen)
            if self._process.stdin:
                start_thread(self._feed)
            undo.pop_all()  # close does it

    def _listen(self) -> None:
        """Keep the first of the child's messages, in a thread of its own."""
        # All of them are read: a child that filled this pipe would wait for ever.
        with suppress(OSError), self._process.stderr as pipe:  # type: ignore[union-attr]  # it is a pipe
            while data := pipe.read(4096):
                self._messages = (self._messages + data)[:1000]

    def _feed(self) -> None:
        """Hand the pipe's bytes on to the child, in a thread of its own."""
        # The child cannot read the pipe itself: its first bytes have been read here.
        try:
            with self.raw, self._process.stdin as pipe:  # type: ignore[union-attr]  # it is a pipe
                buffer = memoryview(bytearray(SCRATCH_SIZE))
                while count := self.raw.readinto(buffer):
                    data = buffer[:count]
                    while data:  # it is not buffered: a write may be short
                        data = data[pipe.write(data) :]
        except BrokenPipeError:
            pass  # the child has ended; its exit status says why
        except OSError as error:
            self._feeding_error = error

    def readinto(self, view: memoryview) -> int:
        count = super().readinto(view)
        if count < len(view) and not self._ended:
            self._ended = True
            self._check(self._process.wait())
        return count

    def _check(self, status: int) -> None:
        """Raise an error if the child had one."""
        # First, as the child took this for the end of a file cut short.
        if self._feeding_error:
            raise VmaError(f"{self.name}: {system_message(self._feeding_error)}")
        if self._listener:
            self._listener.join(timeout=5)
        text = self._messages.decode(errors="replace")
        damaged = self._ended and re.search(self._codec.damage, text)
        if not status and not damaged:
            return
        # A child that was killed, or that lacks an option, says nothing about the archive.
        if status < 0:
            signal_name = signal.Signals(-status).name
            raise VmaError(f"{self.name}: {self._program} was ended by {signal_name}")
        if re.search(WINDOW_MESSAGES, text):
            raise window_error(self.name)
        lines = list(filter(None, map(str.strip, text.splitlines())))
        # Where a program puts its name before a message, other lines are advice.
        errors = [found[1] for line in lines if (found := re.match(CODEC_MESSAGE, line))] or lines
        reason = escape("; ".join(errors)) or f"ended with status {status}"
        if re.search(CUT_MESSAGES, text):
            reason = "the compressed file is cut short"
        raise FormatError(f"{self._program}: {reason}", archive=self.name)

    def _kill(self) -> None:
        self._process.kill()
        # Not its `wait`: the signal may have come in the middle of one, which has a lock.
        os.waitpid(self._process.pid, 0)

    def close(self, failed: bool = False) -> None:
        """End and reap the child; say so if it failed, up to now, in what was not read."""
        import subprocess

        super().close(failed)
        try:
            # The closed pipe ends it, unless it waits for input itself.
            status = self._process.wait(timeout=0.01 if failed or not self._seekable else 5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            status = 0
        Cleanup.actions.pop(self, None)
        if self._listener:
            self._listener.join(timeout=5)  # it closes its end of the pipe
        if self._seekable:
            self.raw.close()
        if not self._ended and not failed:
            # Closing its pipe early ends a program with SIGPIPE, which is no error.
            self._check(0 if status == -getattr(signal, "SIGPIPE", 0) else status)


def open_path(path: str, flags: int) -> int:
    """Return a descriptor of an existing file; raises VmaError with its name."""
    with os_errors_as(escape(path)):
        return os.open(path, flags | getattr(os, "O_BINARY", 0))  # or Windows changes line ends


def is_disk(mode: int) -> bool:
    """Say whether a file of this mode can be read at any place."""
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def refuse_terminal(fd: int, message: str) -> None:
    if os.isatty(fd):
        raise VmaError(message)


def open_raw(
    path: str, name: str, damaged: bool = False
) -> tuple[io.FileIO, bytes, os.stat_result | None, int]:
    """Open a file or pipe; return it, its first bytes, its state and its size.

    The last two are None and 0 for what cannot be read at any place. The first bytes of a `damaged`
    file may be missing.
    """
    with ExitStack() as undo, os_errors_as(name):
        # A copy, so that a caller of main finds its standard input open afterwards.
        fd = os.dup(0) if path == "-" else open_path(path, os.O_RDONLY)
        undo.callback(os.close, fd)
        refuse_terminal(fd, f"{name} is a terminal: name a file, or pipe an archive in")
        state = os.fstat(fd)
        # The rest of a file that somebody has begun to read is a stream.
        seekable = is_disk(state.st_mode) and not (path == "-" and os.lseek(fd, 0, os.SEEK_CUR))
        if not seekable:
            widen_pipe(fd)
        raw = io.FileIO(fd) if seekable else PipeReader(fd)  # which refuses a directory
        undo.pop_all()
        undo.enter_context(raw)
        start = b""
        try:
            while data := io.RawIOBase.read(raw, MAGIC_SIZE - len(start)):
                start += data
        except OSError:
            if not (seekable and damaged):
                raise  # else rescue reads this place again, and goes on after it
        if isinstance(raw, PipeReader):
            raw.start = start
        result = (raw, start, state, size_of(fd)) if seekable else (raw, start, None, 0)
        undo.pop_all()
        return result


def open_codec(name: str, codec: Codec, raw: io.FileIO, seekable: bool) -> Input:
    """Return the decompressed bytes of raw, as a stream.

    A program comes first: it has a processor to itself.
    """
    import shutil

    program = next(filter(None, map(shutil.which, codec.programs)), None)
    if program:
        return ProgramInput(name, codec, program, raw, seekable)
    return LibraryInput(name, codec, raw)


@contextmanager
def open_input(path: str, index: bool = True, as_stream: bool = False) -> Iterator[Input]:
    """Open an archive, plain or compressed, from a path or (`-`) standard input.

    A plain regular file or block device can be read at any place, and a compressed canonical
    archive, whose index is read if `index` says so. Everything else is a stream.
    """
    name = display_name(path, "input")
    with ExitStack() as undo:
        raw, start, state, size = open_raw(path, name)
        undo.callback(raw.close)
        codec = next((codec for codec in CODECS if start.startswith(codec.magics)), None)
        source: Input | None = None
        if codec is not None:
            note = ""
            # Without the library, the zstd program reads it, as a stream.
            if codec.name == "zstd" and state and not as_stream and (zstd := Zstd.load()):
                try:
                    source = FramesInput(name, raw, zstd, index)
                except FormatError as error:
                    note = str(error)
            source = source or open_codec(name, codec, raw, seekable=bool(state))
            source.note, source.state, source.raw_size = note, state, size
        elif state:
            source = FileInput(name, raw)
        else:
            source = Input(name, io.BufferedReader(raw, WINDOW_SIZE))
        undo.pop_all()  # the input closes it
    with source:
        yield source


# ---------------------------------------------------------------------------------------------
# Output: pipes, devices, and files that appear under their names when they are complete

WRITE_BEHIND = 4 << 20  # bytes after which the disk is to begin with writing
HOLE_SIZE = CLUSTER_SIZE  # a shorter run of zeros is written: a hole costs a call
TEMPORARY_NAME = "vma-tool-{}.partial"  # no `*.vma*`: nothing may take it for an archive
NAME_MAX_SIZE = 255  # bytes, as file systems have it
# Errors of file systems without hard links
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
# Flags for os.open: no symbolic link, where there are any, and no change of line ends on Windows
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
DESTINATION_SLACK = 4 << 20  # bytes by which storages round up


class Target:
    """A file, pipe or device that is written, and the name for its errors.

    With `lasting` False it is scratch data, never flushed.
    """

    lasting = True

    def __init__(self, fd: int, name: str, seekable: bool) -> None:
        self.fd = fd
        self.name = name
        self.seekable = seekable
        self.position = 0
        self._fresh = (0, 0)  # where what was written lately begins and ends

    def write_at(self, offset: int, parts: Sequence[Buffer]) -> None:
        """Write parts one after the other; on a pipe, offset can only be the current one."""
        pending: Sequence[Buffer] = list(filter(len, parts))
        start = offset
        try:
            while pending:
                if not self.seekable and hasattr(os, "writev"):
                    count = os.writev(self.fd, pending[:IOV_MAX])
                elif self.seekable and hasattr(os, "pwritev"):
                    count = os.pwritev(self.fd, pending[:IOV_MAX], offset)
                else:
                    if self.seekable:
                        os.lseek(self.fd, offset, os.SEEK_SET)
                    count = os.write(self.fd, pending[0])
                if not count:  # trying again might go on for ever
                    raise OSError(errno.EIO, "nothing could be written")
                offset += count
                pending = drop_bytes(pending, count)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise VmaError(f"{self.name}: cannot write: {system_message(error)}") from error
        if self.seekable and self.lasting:
            self._write_behind(start, offset)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return bytes that were written, fewer behind the end; on what is seekable only."""
        with os_errors_as(self.name):
            if hasattr(os, "pread"):
                return os.pread(self.fd, size, offset)
            os.lseek(self.fd, offset, os.SEEK_SET)
            return os.read(self.fd, size)

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write parts after everything that was appended before."""
        offset = self.position
        self.position += sum(map(len, parts))
        self.write_at(offset, parts)

    def _write_behind(self, start: int, end: int) -> None:
        """Let the disk begin with what was written, so that `sync` has little to wait for."""
        first, last = self._fresh
        # Small gaps do not matter: blocks of zeros are left out.
        if not first <= start <= last + WRITE_BEHIND or last - first >= WRITE_BEHIND:
            # The advice starts the writing of dirty pages; only clean ones are dropped. Scattered
            # writes are left to the system, which may find an order for them.
            if last - first >= WRITE_BEHIND // 4:
                with suppress(AttributeError, OSError):
                    os.posix_fadvise(self.fd, first, last - first, os.POSIX_FADV_DONTNEED)
            first = last = start
        self._fresh = first, max(last, end)

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        with os_errors_as(f"{self.name}: cannot write"):
            try:
                os.fsync(self.fd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a pipe
                    raise

    def commit(self, last_look: Callable[[], None]) -> None:
        """Give a new file its name; `last_look` may still prevent it. Others have theirs."""
        last_look()


def lock_partial(fd: int) -> None:
    """Lock a file that is written, for `Directory.leftovers` to see, where files can be locked."""
    with suppress(ImportError, OSError):
        import fcntl

        for _ in range(5):
            try:
                return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another run looks at it just now
                time.sleep(0.01)


def extended_attributes(fd: int) -> dict[str, bytes]:
    """Return a file's extended attributes: access lists and SELinux labels are among them."""
    if not hasattr(os, "listxattr"):
        return {}
    try:
        return {key: os.getxattr(fd, key) for key in os.listxattr(fd)}
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        return {}  # this file system has none


def keep_attributes(old: int, new: int, name: str) -> None:
    """Give one open file owner, mode, access list, extended attributes and times of another.

    Raises OSError or VmaError where one cannot be kept.
    """
    state, own = os.fstat(old), os.fstat(new)
    # Owner before mode: a change of owner clears set-user-ID bits.
    if hasattr(os, "fchown") and (own.st_uid, own.st_gid) != (state.st_uid, state.st_gid):
        os.fchown(new, state.st_uid, state.st_gid)
    wanted, there = extended_attributes(old), extended_attributes(new)
    for inherited in there.keys() - wanted.keys() & {"system.posix_acl_access"}:
        os.removexattr(new, inherited)  # before the mode puts it in force
    if hasattr(os, "fchmod"):
        os.fchmod(new, stat.S_IMODE(state.st_mode))
    for key, value in wanted.items():
        if there.get(key) != value:
            with os_errors_as(f"{name}: cannot keep the extended attribute {escape(key)}"):
                os.setxattr(new, key, value)
    # It is the same backup: a cleanup by age must not take it for a new one.
    if os.utime in os.supports_fd:
        with os_errors_as(f"{name}: cannot keep times"):
            os.utime(new, ns=(state.st_atime_ns, state.st_mtime_ns))


def allocates_cheaply(fd: int) -> bool:
    """Say whether the file is on a file system known to reserve space without writing it.

    Elsewhere (NFS, CIFS) the C library would write into every block; ZFS compresses, and cannot
    say beforehand what fits.
    """
    device = os.fstat(fd).st_dev
    line = rf"(?m)^\S+ \S+ {os.major(device)}:{os.minor(device)} .*? - (\S+)"
    # Where there is no such list (not on Linux), nothing is known to be cheap.
    with suppress(OSError), open("/proc/self/mountinfo", "rb") as file:
        match = re.search(line.encode(), file.read())
        return match is not None and match[1] in (b"ext4", b"xfs")
    return False


class Directory:
    """A directory whose files appear under their names when they are complete, not before.

    It is held open, so that all goes into the directory that was checked, whatever happens to its
    path. Symbolic links in it are never followed. Closing it removes files that are not committed.
    `readers` are those of the archive that the new files are made of.
    """

    def __init__(self, path: str, follow: bool = True, readers: Readers | None = None) -> None:
        self.path = path or "."
        self.readers = readers
        self._files: list[PartialFile] = []
        self.fd: int | None = None
        if os.open in os.supports_dir_fd:
            flags = os.O_RDONLY | os.O_DIRECTORY | (0 if follow else NOFOLLOW)
            self.fd = open_path(self.path, flags)

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            # An error is on its way, and no other may take its place.
            with suppress(OSError):
                file.close()
            Cleanup.undo(file.temporary)
        if self.fd is not None:
            with suppress(OSError):  # it was only read
                os.close(self.fd)

    def encoded(self, name: str) -> bytes:
        # Names are bytes on disk, whatever the locale believes.
        return encode_name(name if self.fd is not None else os.path.join(self.path, name))

    def display_name(self, name: str) -> str:
        return escape(os.path.join(self.path, name))

    def state(self, name: str) -> os.stat_result | None:
        """Return the state of a name, of a symbolic link its own, or None."""
        with os_errors_as(self.display_name(name)), suppress(FileNotFoundError):
            return os.stat(self.encoded(name), dir_fd=self.fd, follow_symlinks=False)
        return None

    def names(self) -> list[str]:
        with os_errors_as(escape(self.path)):
            return os.listdir(self.path if self.fd is None else self.fd)

    def require_free(self, names: Iterable[str], replace: bool) -> None:
        """Raise VmaError if one of the names exists: with `replace`, as a directory."""
        for name in names:
            state = self.state(name)
            if state and (not replace or stat.S_ISDIR(state.st_mode)):
                raise os_error(self.display_name(name), errno.EISDIR if replace else errno.EEXIST)

    def require_empty(self) -> None:
        if self.names():
            raise os_error(escape(self.path), errno.ENOTEMPTY)

    def leftovers(self) -> list[str]:
        """Return the partial files here that no run is writing any more."""
        pattern = re.compile(TEMPORARY_NAME.format("[0-9a-f]{12}"))
        found = []
        with suppress(VmaError, ImportError):  # it is only a hint
            import fcntl

            for name in filter(pattern.fullmatch, self.names()):
                with suppress(OSError):
                    # A FIFO of that name must not make us wait for a writer.
                    flags = os.O_RDONLY | os.O_NONBLOCK | NOFOLLOW
                    fd = os.open(self.encoded(name), flags, dir_fd=self.fd)
                    try:
                        # Who writes it has it locked, and the system unlocks it even after SIGKILL.
                        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        found.append(self.display_name(name))
                    finally:
                        os.close(fd)
        return found

    def create(self, name: str, replaces: bool = False, keeps: bool = False) -> PartialFile:
        """Return a new file that gets its name by `commit`.

        One that replaces another is no more readable than that; or, with `keeps`, has the same
        mode, owner, access list, extended attributes and times.
        """
        # Its temporary name is short: the system would refuse this one only at the end.
        if len(encode_name(name)) > NAME_MAX_SIZE:
            raise os_error(self.display_name(name), errno.ENAMETOOLONG)
        with os_errors_as(self.display_name(name)):
            file = PartialFile(self, name, replaces, keeps)
        self._files.append(file)
        return file

    def remove(self, name: str) -> None:
        """Remove a file that was committed."""
        with suppress(OSError):
            os.unlink(self.encoded(name), dir_fd=self.fd)

    def flush(self) -> None:
        """Wait until all files are on the disk."""
        for file in self._files:
            file.sync()

    def commit(self, replace: bool, last_look: Callable[[], None] = lambda: None) -> None:
        """Give all files their names, the last created last, and wait until the disk knows them.

        Without `replace`, a name that meanwhile exists is an error. After an error, names that did
        not exist do not exist, and those that were replaced stay replaced.
        """
        # A signal in between would leave some of the files, or two names of one.
        with signals_blocked(), ExitStack() as undo:
            while self._files:
                file = self._files[0]
                undo.enter_context(os_errors_as(f"{file.name}: cannot be given its name"))
                old, new = self.encoded(file.temporary), self.encoded(file.final)
                file.close()
                exists = self.state(file.final) is not None
                if exists and not replace:
                    raise os_error(file.name, errno.EEXIST)
                last_look()
                if exists or not self._link(old, new):
                    os.replace(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)
                if not exists:
                    undo.callback(os.unlink, new, dir_fd=self.fd)
                with suppress(FileNotFoundError):  # where it was renamed
                    os.unlink(old, dir_fd=self.fd)
                del Cleanup.actions[file.temporary]
                self._files.pop(0)
            if self.fd is not None:  # names reach the disk with the directory, not with the files
                text = f"{escape(self.path)}: cannot be flushed; what was replaced stays replaced"
                undo.enter_context(os_errors_as(text))
                os.fsync(self.fd)
            undo.pop_all()  # from here on, the new names stay

    def _link(self, old: bytes, new: bytes) -> bool:
        """Give a file a second name that nobody else has; False where there are no such links."""
        try:
            # Unlike a rename, this never replaces what somebody else has just put there.
            os.link(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd, follow_symlinks=False)
        except (AttributeError, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LINKS:
                raise
            return False
        return True


def is_zeros(part: Buffer) -> bool:
    """Say whether this is a view of ZEROS."""
    return isinstance(part, memoryview) and part.obj is ZERO_CLUSTER


class PartialFile(Target):
    """A file of a `Directory` that has not got its name yet."""

    def __init__(self, directory: Directory, final: str, replaces: bool, keeps: bool) -> None:
        self.directory = directory
        self._keeps = keeps
        self.final = final
        self.temporary = TEMPORARY_NAME.format(os.urandom(6).hex())
        self._old = -1  # descriptor of the file that it replaces
        path = directory.encoded(self.temporary)
        # Before there is such a file: a signal may come right after it was created.
        Cleanup.actions[self.temporary] = functools.partial(os.unlink, path, dir_fd=directory.fd)
        with ExitStack() as undo:
            undo.callback(Cleanup.actions.pop, self.temporary)
            if replaces:  # by a descriptor, as the name may be another file's by the end
                flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | NOFOLLOW
                self._old = os.open(directory.encoded(final), flags, dir_fd=directory.fd)
                undo.callback(os.close, self._old)
            readers = directory.readers
            if replaces and not keeps:
                readers = common_readers([readers, readers_of(self._old, os.fstat(self._old))])
            # A random name, and made by us: nobody can have put a link to another file there.
            # Nobody else may read it until it is known who may.
            private = keeps or readers is not None
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW
            fd = os.open(path, flags, 0o600 if private else 0o666, dir_fd=directory.fd)
            undo.callback(Cleanup.actions[self.temporary])
            undo.callback(os.close, fd)
            super().__init__(fd, directory.display_name(final), seekable=True)
            lock_partial(fd)
            if readers and not keeps and hasattr(os, "fchmod"):
                # An access list here was inherited from the directory; a group bit would put it
                # in force.
                mode = 0o600 if has_acl(fd) else readers.mode_for(os.fstat(fd).st_gid)
                umask = os.umask(0o077)  # there is no way to read it without setting it
                os.umask(umask)
                os.fchmod(fd, mode & ~umask)
            undo.pop_all()

    def append(self, parts: Sequence[Buffer]) -> None:
        """Write parts after everything that was appended before; runs of ZEROS stay holes.

        `truncate` must make the file as long as `position` at the end, which may be in a hole.
        """
        if id(ZEROS) not in map(id, parts):  # a hole has one whole ZEROS at least
            return super().append(parts)
        pending: list[Buffer] = []
        start = self.position
        for is_hole, run in itertools.groupby(parts, is_zeros):
            views = list(run)
            size = sum(map(len, views))
            if is_hole and size >= HOLE_SIZE:
                self.write_at(start, pending)
                pending, start = [], self.position + size
            else:
                pending += views
            self.position += size
        self.write_at(start, pending)

    def truncate(self, size: int) -> None:
        """Make the file size bytes long, without writing what is added."""
        with os_errors_as(f"{self.name}: cannot be {format_size(size)} long"):
            os.ftruncate(self.fd, size)

    def reserve(self, size: int) -> None:
        """Reserve disk space, so that a full disk is an error at once; `truncate` gives it back.

        Only where the file system does that without writing.
        """
        self.truncate(size)  # too large a file is an error here, on any file system
        with os_errors_as(f"{self.name}: cannot reserve {format_size(size)}"):
            if size and hasattr(os, "posix_fallocate") and allocates_cheaply(self.fd):
                return os.posix_fallocate(self.fd, 0, size)
        self.truncate(0)

    def read_back(self, zstd: Zstd | None) -> FileInput:
        """Return the archive that was written, as an input; `zstd` if it is compressed."""
        with os_errors_as(self.name):
            file = io.FileIO(os.dup(self.fd))  # the input closes its own
        if zstd is None:
            return FileInput(self.name, file)
        try:
            return FramesInput(self.name, file, zstd, index=True)
        except FormatError as error:
            file.close()
            text = f"{self.name}: what was written reads back as something else: {error}"
            raise VmaError(text) from error

    def sync(self) -> None:
        if self._keeps:  # only now, as each write changes the times
            with os_errors_as(f"{self.name}: cannot keep owner and mode"):
                keep_attributes(self._old, self.fd, self.name)
        super().sync()

    def commit(self, last_look: Callable[[], None]) -> None:
        self.directory.commit(replace=self._old >= 0, last_look=last_look)

    def close(self) -> None:
        if self._old >= 0:
            os.close(self._old)
        # Forgotten first: after an error it is closed again, when the number may be another file's.
        fd, self.fd, self._old = self.fd, -1, -1
        if fd >= 0:
            os.close(fd)


def refuse_existing(path: str, force: bool, hint: str = "") -> None:
    """Raise VmaError if an output is a file that exists, before anything is read."""
    if not force and path != "-" and os.path.isfile(path):
        raise VmaError(f"{escape(path)}: {os.strerror(errno.EEXIST)}: --force replaces it{hint}")


@contextmanager
def open_destination(path: str, device: Device, force: bool | None = None) -> Iterator[Target]:
    """Open an existing file or block device to restore a device into.

    One that is much larger needs `force`; None if the command has no such option.
    """
    name = escape(path)
    with os_errors_as(name):
        is_block_device = stat.S_ISBLK(os.stat(path).st_mode)
    # Linux refuses O_EXCL for a block device that is mounted, or in use otherwise.
    try:
        fd = open_path(path, os.O_RDWR | (os.O_EXCL if is_block_device else 0))
    except VmaError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EBUSY:
            raise VmaError(f"{error}: it is mounted, or in use otherwise") from error
        raise
    try:
        with os_errors_as(name):
            if not is_disk(os.fstat(fd).st_mode):
                raise VmaError(f"{name}: neither a file nor a block device")
            size = size_of(fd)
        text = f"{name}: {size} bytes, {device.title} needs {device.size}"
        if size < device.size:
            raise VmaError(text)
        if size > device.size + DESTINATION_SLACK and not force:
            hint = "" if force is None else "; --force writes it all the same"
            raise VmaError(f"{text} and at most {format_size(DESTINATION_SLACK)} more{hint}")
        yield Target(fd, name, seekable=True)
    finally:
        os.close(fd)


def state_of(path: str, stream: str, *absent: type[OSError]) -> os.stat_result | None:
    """Return the state of a file or (`-`) of standard `stream`; None if there is no such file.

    `absent` are more errors that say so.
    """
    with os_errors_as(display_name(path, stream)), suppress(FileNotFoundError, *absent):
        return os.stat(path) if path != "-" else os.fstat(1 if stream == "output" else 0)
    return None


@contextmanager
def open_output(
    path: str,
    force: bool = False,
    readers: Readers | None = None,
    device: Device | None = None,
    in_place: bool = False,
) -> Iterator[Target]:
    """Open a file to be written and then committed, or (`-`) standard output, or a special file.

    `force` replaces a file that exists; `in_place` replaces the archive by itself, and keeps its
    owner and mode. A block device only takes a `device` that it has room for. A new file is removed
    at the end unless it is committed.
    """
    name = display_name(path, "output")
    old = state_of(path, "output")
    kind = old.st_mode if old else stat.S_IFREG
    if not path:
        raise os_error(quote(path), errno.ENOENT)
    if stat.S_ISDIR(kind) or path.endswith(os.sep):
        raise os_error(name, errno.EISDIR)
    if stat.S_ISBLK(kind) and device is None:
        raise VmaError(f"{name}: what a block device holds behind an archive makes it a bad one")
    if path == "-":
        refuse_terminal(1, "standard output is a terminal: redirect it, or name a file")
        yield Target(1, name, seekable=False)
    elif stat.S_ISREG(kind):
        refuse_existing(path, force or in_place)
        # As cp does: what a symbolic link points to is written, the link stays.
        path = os.path.realpath(path)
        if old:
            now = state_of(path, "output")
            if not now or not os.path.samestat(old, now):  # /dev/fd/3 of a file that was removed
                raise VmaError(f"{name}: the file has no name under which it could be replaced")
        with Directory(os.path.dirname(path), readers=readers) as directory:
            yield directory.create(os.path.basename(path), old is not None, keeps=in_place)
    elif device and stat.S_ISBLK(kind):
        with open_destination(path, device, force) as output:
            output.seekable = False
            yield output
    else:
        fd = open_path(path, os.O_WRONLY)
        try:
            refuse_terminal(fd, f"{name} is a terminal")
            yield Target(fd, name, seekable=False)
        finally:
            os.close(fd)


def is_same_file(path: str, output: str) -> bool:
    """Say whether both are one file, by whatever links, device nodes or (`-`) redirections."""
    one = state_of(path, "input", NotADirectoryError)
    other = state_of(output, "output", NotADirectoryError)
    if not one or not other:
        return False
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    # A terminal, or /dev/null, may well be both.
    return is_disk(one.st_mode) and os.path.samestat(one, other)


def refuse_same(paths: Iterable[str], output: str) -> None:
    """Raise VmaError if the output is one of the files that are read."""
    for path in paths:
        if is_same_file(path, output):
            name = display_name(output, "output")
            raise VmaError(f"{name}: is read here, and cannot be written as well")


# ---------------------------------------------------------------------------------------------
# Extents and index: where every cluster of an archive is


def read_header(source: Input, whole: bool = True) -> Header:
    """Read the header at the beginning of an archive; raises FormatError.

    Also for a difference, unless `whole` is False.
    """
    with in_archive(source.name):
        start = source.read(HEADER_FIXED_SIZE)
        if start[:4] not in (HEADER_MAGIC, DIFFERENCE_MAGIC):
            if len(start) == HEADER_FIXED_SIZE:
                # An ISO image shows itself only at 32 KiB, behind what a header needs.
                start += source.read(FOREIGN_SIZE - len(start))
            what = foreign_format(start)
            raise FormatError(f"not a VMA archive{f', but {what}' if what else ''}")
        # This refuses any size that no header has, before memory is taken for it.
        data = memoryview(bytearray(parse_header_size(start)))
        data[:HEADER_FIXED_SIZE] = start
        count = source.readinto(data[HEADER_FIXED_SIZE:])
        header = parse_header(data[: HEADER_FIXED_SIZE + count])
        if header.magic == DIFFERENCE_MAGIC:
            needs = needs_base(header)  # also checks what it says
            if whole:
                raise needs
        return header


def read_extents(source: Input, header: Header) -> Iterator[Extent]:
    """Yield each extent header, with the source at its payload.

    What is not read of the payload is skipped. A run of extents that store nothing may come as one.
    Raises FormatError, also for bytes behind the last extent. `Index.add` checks what an extent
    says of the clusters.
    """
    with in_archive(source.name):
        ahead = WINDOW_SIZE  # bytes of headers that are looked at together
        while data := source.read(EXTENT_HEADER_SIZE):
            offset = source.offset - len(data)
            if len(data) < EXTENT_HEADER_SIZE:
                raise FormatError(
                    f"the archive ends with {len(data)} bytes that are no whole extent header",
                    offset,
                )
            extent = parse_extent(data, offset, header.uuid)
            if not extent.block_count and extent.blockinfo:  # as most of a disk
                extent = read_run(source, data, extent, ahead)
                is_long = extent.header_count * EXTENT_HEADER_SIZE > ahead
                ahead = min(2 * ahead, RUN_SIZE) if is_long else WINDOW_SIZE
            end = source.offset + extent.payload_size
            # In a file, an extent that is cut is never yielded. A stream shows it by its end.
            if source.size is None or end <= source.size:
                yield extent
            source.skip(end - source.offset)
            if source.offset != end:
                size = source.offset - extent.payload_offset
                raise FormatError(
                    f"the archive ends inside an extent: {size} bytes of payload, expected "
                    f"{extent.payload_size}",
                    offset,
                )


def read_run(source: Input, header: bytes, extent: Extent, size: int) -> Extent:
    """Return an extent that stores nothing, with those in the next bytes that continue it."""
    first, slots = extent.blockinfo[0], len(extent.blockinfo)
    if extent.blockinfo != tuple(range(first, first + slots)):
        return extent
    found = source.peek(size)
    if found[EXTENT_INFOS_OFFSET:][:SLOT_SIZE] != struct.pack(">Q", first + slots):
        return extent  # without a look at the others' MD5s
    # What is as expected needs no parsing; the first header that is not ends the run.
    expected = continue_headers(header, first + slots, slots, count_empty(found))
    count = different_header(found[: len(expected)], expected)
    expected = expected[: EXTENT_HEADER_SIZE * count]
    source.skip(len(expected))
    infos = range(first, first + slots * (1 + count))
    return extent._replace(blockinfo=infos, md5=extent.md5 + header_digests(expected))


def lazy_numbers(device: Device, count: int, kind: str) -> Any:
    """Return a zero for each of a device's clusters, in a format of struct; raises FormatError.

    The kernel gives memory only for what is written to: a device that is announced but not there
    costs nothing.
    """
    import mmap

    # Python's default is shared memory, where reading takes memory as well. Windows has no flags.
    private = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
    size = struct.calcsize(kind) * count
    try:
        memory = mmap.mmap(-1, size, **({"flags": private} if private else {}))
    except (OSError, OverflowError, ValueError) as error:
        raise FormatError(f"{device.title}: no memory for its {count} clusters") from error
    with suppress(AttributeError, OSError):  # huge pages would make each cluster cost 2 MiB
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    view: Any = memoryview(memory)
    return view.cast(kind)


class DeviceIndex:
    """Where the clusters of one device are, 8 bytes a cluster.

    `entries[cluster_num]` is offset << 16 | mask; the offset is that of its first stored block in
    the archive, in bytes, or of what follows its header. An entry is 0 for a cluster not seen yet.
    """

    # Plain numbers: an object for each cluster would cost many times the memory. The 48 bits of an
    # offset reach 256 TiB.

    def __init__(self, device: Device) -> None:
        self.device = device
        self.seen = 0
        self.stored_size = 0
        self.ascending = True
        count = device.cluster_count
        # From this one on, `Index.add` looks closer: the last one may be partial, and each cluster
        # of a vmstate must be the next one.
        self.last = -1 if device.is_vmstate else count - 1
        # A vmstate has as many clusters as come. Array and memoryview have no common type that
        # slices to a list.
        self.entries: Any = (
            array.array("Q") if device.is_vmstate else lazy_numbers(device, count, "Q")
        )

    @property
    def disk_size(self) -> int:
        """Size in bytes of the restored device."""
        # Proxmox restores a vmstate as long as its clusters, whatever size the header says.
        return self.seen * CLUSTER_SIZE if self.device.is_vmstate else self.device.size

    @property
    def zero_size(self) -> int:
        """Bytes of the size in the header that no stored block covers."""
        return max(self.device.size - self.stored_size, 0)

    def slice(self, first: int, count: int) -> list[int]:
        """Return the entries of up to count clusters."""
        # A list of ints at once: to take them one by one from the mapping is slower.
        entries: list[int] = self.entries[first : first + count].tolist()
        return entries


class Index:
    """Where every cluster of an archive is; checks each extent against the header's devices.

    `digest` identifies the sequence of extent headers, and with it the archive's layout.
    """

    def __init__(self, header: Header, source: Input) -> None:
        self.name = source.name
        self.digest = hashlib.sha256()
        self.extent_count = 0
        self.devices: dict[int, DeviceIndex] = {}
        self.difference: Difference | None = None  # clusters may be missing
        with in_archive(self.name):
            if header.magic == DIFFERENCE_MAGIC:
                self.difference = parse_difference(header)
            # A short header may announce petabytes, but an extent header has slots for only 59.
            clusters = sum(d.cluster_count for d in header.devices if not d.is_vmstate)
            if source.size is not None and not self.difference:
                room = (source.size - header.size) // EXTENT_HEADER_SIZE * EXTENT_SLOTS
                if clusters > room:
                    raise FormatError(
                        f"the devices have {clusters} clusters, of which a file of "
                        f"{source.size} bytes holds at most {room}"
                    )
            for device in header.devices:
                if device.cluster_count > MAX_CLUSTERS:
                    raise FormatError(
                        f"{device.title}: {device.size} bytes are more than the format has "
                        "cluster numbers for"
                    )
                self.devices[device.dev_id] = DeviceIndex(device)

    def add(self, extent: Extent) -> None:
        """Enter the clusters of an extent; raises FormatError where they cannot be right."""
        self.extent_count += extent.header_count
        self.digest.update(extent.md5)
        alike = 0, CLUSTER_BLOCKS * len(extent.blockinfo)
        if extent.block_count in alike and self._add_alike(extent):
            return
        # This loop runs once a cluster, 16 million times for 1 TiB: it looks a device up only where
        # the device changes, and leaves what is rare to `_check`.
        position = extent.payload_offset
        current = 0  # dev_id of index
        for info in extent.blockinfo:
            dev_id = info >> 32 & 0xFF
            if dev_id != current:
                if dev_id not in self.devices:
                    message = f"cluster of device {dev_id}, which the header does not have"
                    self._fail(message, extent.offset)
                index = self.devices[dev_id]
                entries = index.entries
                last = index.last
                current = dev_id
            cluster_num = info & 0xFFFFFFFF
            mask = info >> 48
            if cluster_num >= last or entries[cluster_num]:  # any other one can only be right
                self._check(extent, index, info)
            entries[cluster_num] = position << 16 | mask
            if cluster_num != index.seen:
                index.ascending = False
            index.seen += 1
            if mask:
                size = mask_size(mask)
                index.stored_size += size
                position += size
        if position != extent.payload_offset + extent.payload_size:
            blocks = (position - extent.payload_offset) // BLOCK_SIZE
            message = f"block_count is {extent.block_count}, its masks have {blocks}"
            self._fail(message, extent.offset)

    def _add_alike(self, extent: Extent) -> bool:
        """Enter at once an extent of one device that stores no block, or all of its blocks.

        Return False, with nothing done, if it is anything else, or wrong.
        """
        # With one mask, blockinfos of a device compare and subtract like cluster numbers, and all
        # others are far from them.
        infos = extent.blockinfo
        count = len(infos)
        if not count:
            return not extent.block_count
        # Extents that were optimized are in order. In those of a live backup, readers that finish
        # at random shuffle the clusters.
        in_order = isinstance(infos, range) or infos == tuple(range(infos[0], infos[0] + count))
        base = (infos[0] if in_order else min(infos)) >> 32 << 32
        index = self.devices.get(base >> 32 & 0xFF)
        last = infos[-1] if in_order else max(infos)
        if index is None or last - base >= index.last:  # another device, another mask, ...
            return False
        mask = base >> 48
        if mask not in (0, FULL_MASK) or extent.block_count != mask % 2 * CLUSTER_BLOCKS * count:
            return False
        first = infos[0] - base
        entry = extent.payload_offset << 16 | mask
        step = mask_size(mask) << 16
        if in_order:
            if any(index.slice(first, count)):  # one was seen before
                return False
            new = range(entry, entry + step * count, step) if mask else [entry]
            index.entries[first : first + count] = array.array("Q", new) * (1 if mask else count)
        else:
            cluster_nums = [info - base for info in infos]
            entries = index.entries
            if len(set(cluster_nums)) < count or any(map(entries.__getitem__, cluster_nums)):
                return False
            for number, cluster_num in enumerate(cluster_nums):
                entries[cluster_num] = entry + step * number
        index.ascending = index.ascending and in_order and first == index.seen
        index.seen += count
        index.stored_size += mask_size(mask) * count
        return True

    def _check(self, extent: Extent, index: DeviceIndex, info: int) -> None:
        """Raise FormatError if this cluster may not come here; make room for one of a vmstate."""
        cluster_num, mask = info & 0xFFFFFFFF, info >> 48
        if index.device.is_vmstate:
            if cluster_num == index.seen:
                index.entries.append(0)
                return
            fault = f"is out of order, expected {index.seen}"
        elif cluster_num > index.last:
            fault = f"is behind the device's end, its last one is {index.last}"
        elif index.entries[cluster_num]:
            fault = "occurs twice"
        # Proxmox wrote a full mask on a partial last cluster until June 2020, and restores it.
        elif mask != FULL_MASK and mask & ~(inside := index.device.block_mask(cluster_num)):
            fault = f"has mask 0x{mask:04x}, the device ends behind 0x{inside:04x}"
        else:
            return
        offset = extent.header_offset(info)
        self._fail(f"{index.device.title}: cluster {cluster_num} {fault}", offset)

    def _fail(self, message: str, offset: int | None = None) -> NoReturn:
        raise FormatError(message, offset, self.name)

    def adopt(self, archive: ArchiveIndex, end: int) -> None:
        """Take over the index of a canonical archive of `end` bytes; raises FormatError."""
        # From the last device to the first: the extents of one end where those of the next begin.
        for dev_id, entries in reversed(archive.entries.items()):
            index = self.devices[dev_id]
            index.entries = entries
            index.seen = len(entries)
            count = -(-len(entries) // archive.cluster_count)
            start = (entries[0] >> 16) - EXTENT_HEADER_SIZE if entries else end
            index.stored_size = end - start - EXTENT_HEADER_SIZE * count  # all that is no header
            end = start
            self.extent_count += count
        self.finish()

    def finish(self) -> None:
        """Raise FormatError unless every cluster of every device was there.

        Of a difference, unless its extents are those that were written.
        """
        if self.difference:  # only its own config tells whether clusters are missing
            if self.digest.hexdigest() != self.difference.extents:
                self._fail("the difference is cut short, or its extents were changed")
            return
        for index in self.devices.values():
            count = index.device.cluster_count
            if index.seen < count:  # a vmstate may have more than its size
                # Of a vmstate, there are entries only of the clusters that came.
                first = next((i for i, e in enumerate(index.entries) if not e), index.seen)
                self._fail(
                    f"{index.device.title}: {count - index.seen} of {count} clusters are missing, "
                    f"the first is {first}"
                )


# ---------------------------------------------------------------------------------------------
# Parts: what flows from every producer (archive in a file, archive in a stream, raw disks) to every
# consumer (canonical archive, disks, digest, comparison)

MAX_PARTS = 256  # parts without data that are handed on together
BUFFER_COUNT = 3  # one that is read into, one that is written, one in between
BUFFER_SIZE = EXTENT_SLOTS * CLUSTER_SIZE
DEFAULT_MEMORY = 256 << 20
HELD_OVERHEAD = 200  # bytes of memory that a held cluster costs beside its blocks
PART_CLUSTERS = clusters_per_part(CLUSTER_SIZE)
COMPARED_CLUSTERS = 16  # of each archive at once
SPILL_SIZE = 4 << 20  # how much goes to the temporary file at once


def zero_views(size: int) -> list[memoryview]:
    """Return views of ZEROS of so many bytes together."""
    whole, rest = divmod(size, len(ZEROS))
    return [ZEROS] * whole + [ZEROS[:rest]] if rest else [ZEROS] * whole


class Part(NamedTuple):
    """Consecutive clusters of one device, as they lie on its disk.

    The masks say which blocks are stored, none behind the device's end. `image` has room for all
    bytes of these clusters, but only the stored blocks are set; it is None if there are none. To
    clear the rest of each would cost as much as to copy the data: `cleared` and `whole` do it.
    """

    device: Device
    first: int
    masks: Sequence[int]
    image: memoryview | None

    @property
    def offset(self) -> int:
        """Where on the disk the first cluster begins, in bytes."""
        return self.first * CLUSTER_SIZE

    @property
    def size(self) -> int:
        """Bytes of the disk: fewer than the clusters have at the device's end."""
        return min(len(self.masks) * CLUSTER_SIZE, self.device.max_size - self.offset)

    def clusters(self, start: int, end: int) -> Part:
        """Return some of the clusters, counted from the part's first one."""
        image = self.image
        if image is not None:
            image = image[start * CLUSTER_SIZE : end * CLUSTER_SIZE]
        return Part(self.device, self.first + start, self.masks[start:end], image)

    def filled(self, masks: Sequence[int]) -> list[memoryview]:
        """Return the blocks in masks, which have all stored blocks; others are views of ZEROS."""
        if self.image is None:
            return []
        if masks == self.masks:
            return [self.image[start:end] for start, end in block_spans(masks)]
        views = []
        stored = block_spans(self.masks)
        number = 0
        for start, end in block_spans(masks):
            position = start
            while number < len(stored) and stored[number][0] < end:
                first, last = stored[number]
                views += zero_views(first - position)
                views.append(self.image[first:last])
                position = last
                number += 1
            views += zero_views(end - position)
        return views

    def cleared(self) -> memoryview | None:
        """Return the image with zeros in all blocks that are not stored."""
        image = self.image
        if image is not None:
            # Where nothing was read, it still holds what was in the buffer before.
            for base, mask in zip(itertools.count(0, CLUSTER_SIZE), self.masks):
                for start, size in block_runs(mask ^ FULL_MASK) if mask != FULL_MASK else ():
                    image[base + start : base + start + size] = ZEROS[:size]
        return image

    def whole(self) -> memoryview | None:
        """Return all bytes up to the device's end, None if they are all zeros."""
        image = self.cleared()
        return None if image is None else image[: self.size]

    def disk_bytes(self) -> list[Buffer]:
        """Return all bytes up to the device's end, zeros and all."""
        whole = self.whole()
        if whole is not None:
            return [whole]
        count, rest = divmod(self.size, CLUSTER_SIZE)
        return [*[ZERO_CLUSTER] * count, ZERO_CLUSTER[:rest]]

    def cluster(self, number: int) -> memoryview:
        """Return all bytes of a cluster, counted from the part's first one."""
        image = self.clusters(number, number + 1).cleared()
        return ZEROS if image is None else image


class Plan(NamedTuple):
    """A part that has not been read yet: `cluster_count` clusters from `first` on.

    `where` says where its data is: of an archive the clusters' entries as in DeviceIndex, of a raw
    disk (start, end) in bytes.
    """

    device: Device
    first: int
    cluster_count: int
    where: Sequence[Any]
    has_data: bool


def plan_entries(device: Device, first: int, entries: Sequence[int]) -> Plan:
    """Return the plan of an archive's clusters from first on, by their entries."""
    has_data = any(entry & FULL_MASK for entry in entries)
    return Plan(device, first, len(entries), entries, has_data)


def make_part(device: Device, first: int, masks: list[int], image: memoryview | None) -> Part:
    """Return a part, with everything behind the device's end left out or cleared."""
    end = device.max_size - first * CLUSTER_SIZE
    # The archive may hold anything there: in the last block, or under a full mask.
    if image is not None and end < len(image):
        image[end:] = bytes(len(image) - end)
    return Part(device, first, device.clip(first, masks), image)


def scatter(entries: Sequence[int], image: memoryview) -> list[tuple[int, memoryview]]:
    """Return where the stored blocks of clusters are, and the views of the image they belong to.

    Entries are as in DeviceIndex.
    """
    # Runs go on across clusters: an extent in order, with all blocks stored, is one read.
    runs: list[list[int]] = []  # where each is in the archive, its start and its end in the image
    follows = end = -1  # where the last run ends in the archive, and in the image
    for base, entry in zip(itertools.count(0, CLUSTER_SIZE), entries):
        offset = entry >> 16
        for start, size in block_runs(entry & FULL_MASK):
            if offset != follows or base + start != end:
                runs.append([offset, base + start, 0])
            runs[-1][2] = end = base + start + size
            follows = offset = offset + size
    return [(offset, image[start:end]) for offset, start, end in runs]


class Producer:
    """Yields plans of parts in canonical order, and reads them.

    `ordered` plans must be read one after the other, in the thread that iterates over them. Reading
    a `parallel` one is work for several processors.
    """

    header: Header
    ordered = False
    parallel = False

    def check(self, chosen: Collection[int] | None) -> Consumer | None:
        """Return a second consumer of the parts, whose `finish` raises if they are wrong."""
        return None

    def plans(self, count: int, chosen: Collection[int] | None = None) -> Iterator[Plan]:
        """Yield parts of `count` clusters of all devices, or of the chosen dev_ids."""
        raise NotImplementedError

    def read(self, plan: Plan, buffer: memoryview) -> Part:
        """Read a part into a buffer of BUFFER_SIZE bytes."""
        raise NotImplementedError


class Contents(Producer):
    """An archive that can be read at any place: its header, and the extents read so far.

    Extents are read when somebody needs them. Raises FormatError for an archive that Proxmox would
    not restore completely, at the latest when all have been read. A difference is taken only if
    `whole` is False.
    """

    # The base's indexes by dev_id, for clusters that a difference leaves out
    base_indexes: Mapping[int, DeviceIndex] = {}

    def __init__(self, source: Input, whole: bool = True) -> None:
        self.source = source
        self.inputs: tuple[Input, ...] = (source,)  # all files and pipes that are read
        self.header = read_header(source, whole)
        self.index = Index(self.header, source)
        self.parallel = isinstance(source, FramesInput)  # there is something to decompress
        self._extents = read_extents(source, self.header)

    @property
    def readers(self) -> Readers | None:
        """Who may read all inputs, None if these are pipes."""
        return common_readers(each.readers for each in self.inputs)

    def check_unchanged(self, path: str | None = None) -> None:
        """Call `Input.check_unchanged` for each input; path is the archive's."""
        for each in self.inputs:
            each.check_unchanged(path if each is self.source else None)

    def extents(self) -> Iterator[Extent]:
        """Yield and check the extents not read yet, in the archive's order."""
        for extent in self._extents:
            self.index.add(extent)  # first, so that only checked extents are yielded
            yield extent
        self.index.finish()

    def complete(self) -> None:
        """Read and check all extents not read yet."""
        while self._read_extent():
            pass

    def extents_digest(self) -> bytes:
        """Return the SHA-256 over the MD5s of all extents."""
        self.complete()
        return self.index.digest.digest()

    def _read_extent(self) -> bool:
        if Progress.current:  # one part of a disordered stream may need all of it
            Progress.current.tick()
        extent = next(self._extents, None)
        if extent is None:
            self.index.finish()
            return False
        self.index.add(extent)
        self._keep(extent)
        return True

    def _keep(self, extent: Extent) -> None:
        """Keep an extent's data if it cannot be read again; by default it can."""

    def read_extent(self, extent: Extent, buffer: memoryview) -> list[Part]:
        """Read an extent's clusters into a buffer of BUFFER_SIZE bytes, neighbours as one part."""
        slots = sorted(iter_slots(extent))  # neighbours that a live backup has torn apart join
        image = buffer[: len(slots) * CLUSTER_SIZE]
        entries = [extent.payload_offset + slot.start << 16 | slot.mask for slot in slots]
        self.source.read_at(scatter(entries, image))
        parts = []
        start = 0
        # Of neighbours, the cluster's number grows by one with each slot.
        for (dev_id, shift), group in itertools.groupby(
            range(len(slots)), lambda i: (slots[i].dev_id, slots[i].cluster_num - i)
        ):
            masks = [slots[i].mask for i in group]
            end = start + len(masks)
            view = image[start * CLUSTER_SIZE : end * CLUSTER_SIZE] if any(masks) else None
            device = self.index.devices[dev_id].device
            parts.append(make_part(device, start + shift, masks, view))
            start = end
        return parts

    def plans(self, count: int, chosen: Collection[int] | None = None) -> Iterator[Plan]:
        with self.holding(chosen):
            for device in canonical_order(self.header.devices, chosen):
                yield from self.device_plans(device, count)
            self.complete()

    def device_plans(self, device: Device, count: int) -> Iterator[Plan]:
        """Yield parts of `count` clusters of one device."""
        first = 0
        while (plan := self.plan(device, first, count)).cluster_count:
            yield plan
            first += plan.cluster_count

    def plan(self, device: Device, first: int, count: int) -> Plan:
        """Return the plan of up to count clusters, of fewer at the device's end.

        Until all extents have been read, devices and clusters must come in canonical order.
        """
        return plan_entries(device, first, self.entries(device, first, count))

    def entries(self, device: Device, first: int, count: int) -> list[int]:
        """Return the entries of up to count clusters; reads extents until they are known."""
        index = self.index.devices[device.dev_id]
        while True:
            entries = index.slice(first, count)
            # A vmstate ends where its clusters end: fewer may only mean that more will come.
            known = 0 not in entries and (len(entries) == count or not device.is_vmstate)
            if known or not self._read_extent():
                return entries

    @contextmanager
    def holding(self, chosen: Collection[int] | None) -> Iterator[None]:
        """Keep the data of the chosen devices until it is read, where that is needed."""
        yield

    def read(self, plan: Plan, buffer: memoryview) -> Part:
        masks = [entry & FULL_MASK for entry in plan.where]
        image = None
        if plan.has_data:
            image = buffer[: plan.cluster_count * CLUSTER_SIZE]
            self._fill(plan, image)
            self._check_tail(plan, image)
        return make_part(plan.device, plan.first, masks, image)

    def _fill(self, plan: Plan, image: memoryview) -> None:
        """Read the stored blocks of a plan's clusters to their places in the image."""
        self.source.read_at(scatter(plan.where, image))

    def _check_tail(self, plan: Plan, image: memoryview) -> None:
        """Raise FormatError if a difference has more than zeros behind the device's end."""
        # Of any other archive they are dropped; but here, each changed byte is to be seen.
        end = plan.device.max_size - plan.first * CLUSTER_SIZE
        if self.index.difference and end < len(image):
            # The low bits of an entry are its mask.
            last = plan.where[-1] >> (end % CLUSTER_SIZE) // BLOCK_SIZE & 1
            if last and any(image[end : -(-end // BLOCK_SIZE) * BLOCK_SIZE]):
                raise FormatError(f"{self.source.name}: data behind the end of {plan.device.title}")

    def read_range(self, dev_id: int, offset: int, size: int) -> bytes:
        """Return bytes of a device from offset on; fewer than size at its end."""
        index = self.index.devices[dev_id]
        end = min(offset + size, index.disk_size)
        last = -(-end // CLUSTER_SIZE)
        data = bytearray()
        # The system gives memory only for what is written to.
        buffer = memoryview(bytearray(BUFFER_SIZE))
        for first in range(offset // CLUSTER_SIZE, last, EXTENT_SLOTS):
            plan = self.plan(index.device, first, min(last - first, EXTENT_SLOTS))
            data += b"".join(self.read(plan, buffer).disk_bytes())
        start = offset % CLUSTER_SIZE
        return bytes(memoryview(data)[start : start + end - offset])


class IndexedContents(Contents):
    """A compressed canonical archive: its index says where every cluster is.

    Before plans of a device are read, the extents' headers are held against the index.
    """

    source: FramesInput

    def __init__(self, source: FramesInput, index: ArchiveIndex) -> None:
        super().__init__(source)
        self.cluster_count = index.cluster_count
        self.partial = index.partial
        self.index.adopt(index, source.size)
        # Whether each extent's header was read, a byte each.
        self._checked = {
            dev_id: bytearray(-(-len(index.entries) // self.cluster_count))
            for dev_id, index in self.index.devices.items()
        }

    def extents(self) -> Iterator[Extent]:
        """Yield all extents; raises FormatError if one not read yet is not as the index says."""
        for device in canonical_order(self.header.devices):
            yield from self._check(device, 0, len(self.index.devices[device.dev_id].entries))

    def complete(self) -> None:
        """Return at once: the index is complete."""

    def entries(self, device: Device, first: int, count: int) -> list[int]:
        entries = self.index.devices[device.dev_id].slice(first, count)
        # There are none behind the end of a base that is smaller than the new disk.
        for _ in self._check(device, first, len(entries)) if entries else ():
            pass
        return entries

    def extents_digest(self) -> bytes:
        digest = hashlib.sha256()
        for device in canonical_order(self.header.devices):
            for extent, _ in self._extents_of(device, 0, len(self._checked[device.dev_id])):
                digest.update(extent.md5)
        return digest.digest()

    def _check(self, device: Device, first: int, count: int) -> Iterator[Extent]:
        """Read and yield the extents of a device's clusters, unless all were read before."""
        checked = self._checked[device.dev_id]
        start, end = first // self.cluster_count, -(-(first + count) // self.cluster_count)
        if 0 not in checked[start:end]:
            return
        for extent, headers in self._extents_of(device, start, end):
            found = bytearray(len(headers))
            self.source.read_at([(extent.offset, memoryview(found))])
            if found != headers:
                self._fail(device, extent, different_header(found, headers))
            # Nothing is read there, but the progress of headers counts offsets.
            self.source.offset = extent.payload_offset + extent.payload_size
            yield extent
        checked[start:end] = bytes([1]) * (end - start)

    def _fail(self, device: Device, extent: Extent, number: int) -> NoReturn:
        """Raise the error for one header of an extent, or of several, that is not as it must be."""
        first = (extent.blockinfo[0] & 0xFFFFFFFF) + number * self.cluster_count
        last = min(first + self.cluster_count - 1, extent.blockinfo[-1] & 0xFFFFFFFF)
        raise SeekableError(
            f"{device.title}: clusters {first} to {last}: the extent header and the index "
            "contradict each other; without the index: zstd -dc FILE | vma-tool COMMAND -",
            extent.offset + number * EXTENT_HEADER_SIZE,
            self.source.name,
        )

    def _extents_of(self, device: Device, start: int, end: int) -> Iterator[tuple[Extent, bytes]]:
        """Yield some of a device's extents, counted from 0, as the index has them, and headers.

        Extents of a run that store nothing come as one.
        """
        index = self.index.devices[device.dev_id]
        step = RUN_EXTENTS  # at once: memory does not grow with the device
        for number in range(start, end, step):
            first = number * self.cluster_count
            entries = index.slice(first, min(step, end - number) * self.cluster_count)
            masks = [entry & FULL_MASK for entry in entries]
            position = 0
            for headers, stored in pack_extents(device.dev_id, first, masks, self.cluster_count):
                info = device.dev_id << 32 | first + position
                infos: Sequence[int] = range(info, info + len(stored))
                block_count = sum(map(mask_size, stored)) // BLOCK_SIZE
                if block_count:
                    infos = [mask << 48 | info for info, mask in zip(infos, stored)]
                offset = (entries[position] >> 16) - EXTENT_HEADER_SIZE
                yield Extent(offset, block_count, infos, header_digests(headers)), headers
                position += len(stored)

    def is_canonical(self, align: int) -> bool:
        """Say whether the extents are laid out as optimize does with this align."""
        count = clusters_per_extent(align)
        for dev_id, index in self.index.devices.items():
            # A device that fits into one extent either way does not tell the two sizes apart.
            if len(index.entries) > min(count, self.cluster_count) < max(count, self.cluster_count):
                return False
            # Extents and their headers follow from the index. In an extent that stores nothing or
            # all, nothing can be filled up.
            for first in self.partial[dev_id]:
                masks = [entry & FULL_MASK for entry in index.slice(first, count)]
                if fill_up(index.device, first, masks, align) != masks:
                    return False
        return True


class Stream(Contents):
    """An archive that is read once: early clusters wait, in memory or a temporary file."""

    ordered = True

    def __init__(
        self, source: Input, memory: int = DEFAULT_MEMORY, directory: str = "", whole: bool = True
    ) -> None:
        super().__init__(source, whole)
        self.memory = memory
        self.directory = directory
        self._held: dict[int, dict[int, bytes]] = {}  # by dev_id, in canonical order
        self._held_size = 0
        self._spool: Spool | None = None
        self._buffer = new_buffer(EXTENT_MAX_BLOCKS * BLOCK_SIZE)

    @contextmanager
    def holding(self, chosen: Collection[int] | None) -> Iterator[None]:
        """Hold clusters that come early. Only once: what is not chosen is gone."""
        order = canonical_order(self.header.devices, chosen)
        self._held = {device.dev_id: {} for device in order}
        try:
            yield
        finally:
            if self._spool is not None:
                self._spool.source.close()

    def _keep(self, extent: Extent) -> None:
        # A stream passes once: what a later part needs is copied, what was not chosen is dropped.
        payload = self._buffer[: extent.payload_size]
        self.source.read_at([(extent.payload_offset, payload)])
        for slot in iter_slots(extent) if extent.block_count else ():
            if slot.mask and slot.dev_id in self._held:
                data = bytes(payload[slot.start : slot.start + slot.size])
                self._held[slot.dev_id][slot.cluster_num] = data
                self._held_size += slot.size + HELD_OVERHEAD
        if self._held_size > self.memory:
            self._spill()

    def _spill(self) -> None:
        """Write the clusters that are needed last to the temporary file, until the rest fits."""
        if self._spool is None:
            self._spool = Spool(self.directory)
        goal = self.memory - min(SPILL_SIZE, self.memory // 8)  # so that each spill is large
        offset = self._spool.position
        parts: list[bytes] = []
        # `_held` is in canonical order, so its end is needed last.
        for dev_id, held in reversed(self._held.items()):
            entries = self.index.devices[dev_id].entries
            while held and self._held_size > goal:
                cluster_num, data = held.popitem()  # the one that came last
                parts.append(data)
                # From now on the entry says where in the temporary file it is.
                entries[cluster_num] = offset << 16 | entries[cluster_num] & FULL_MASK
                offset += len(data)
                self._held_size -= len(data) + HELD_OVERHEAD
        self._spool.append(parts)

    def _fill(self, plan: Plan, image: memoryview) -> None:
        held = self._held[plan.device.dev_id]
        spilled = []
        for i, entry in enumerate(plan.where):
            cluster = image[i * CLUSTER_SIZE : (i + 1) * CLUSTER_SIZE]
            data = held.pop(plan.first + i, None)
            if data is None:  # in the temporary file, or zeros
                spilled += scatter((entry,), cluster)
                continue
            self._held_size -= len(data) + HELD_OVERHEAD
            for at, view in scatter((entry & FULL_MASK,), cluster):
                view[:] = data[at : at + len(view)]
        if spilled and self._spool is not None:
            self._spool.source.read_at(spilled)


class Spool(Target):
    """An unlinked temporary file of clusters; `source` reads it at any place."""

    lasting = False

    def __init__(self, directory: str) -> None:
        import tempfile

        # Beside the output there is room for an archive. /tmp may be small, or in memory.
        directory = os.environ.get("TMPDIR") or directory or tempfile.gettempdir()
        name = f"temporary file in {escape(directory)}"
        with os_errors_as(name):
            file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 - source closes
            self.source = FileInput(name, file)
        super().__init__(self.source.fd, name, seekable=True)


def contents_of(source: Input, whole: bool = True) -> Contents:
    """Return the contents of an archive that can be read at any place."""
    # Without devices there is nothing in the index, and one extent all the same.
    if isinstance(source, FramesInput) and source.index and source.index.entries:
        return IndexedContents(source, source.index)
    return Contents(source, whole)


def load(
    source: Input, memory: int = DEFAULT_MEMORY, directory: str = "", whole: bool = True
) -> Contents:
    """Return the contents of an archive, of which the header has been read and checked.

    A difference is taken only if `whole` is False.
    """
    if source.size is None:
        contents: Contents = Stream(source, memory, directory, whole)
    else:
        contents = contents_of(source, whole)
    with in_archive(source.name):
        check_names(whole_header(contents.header))
    return contents


class Disks(Producer):
    """Raw disks: blocks of zeros are found, and count as not stored."""

    def __init__(self, header: Header, disks: Iterable[tuple[Device, FileInput]]) -> None:
        self.header = header
        self.disks = {device.dev_id: source for device, source in disks}

    def plans(self, count: int, chosen: Collection[int] | None = None) -> Iterator[Plan]:
        for device in canonical_order(self.header.devices, chosen):
            source = self.disks[device.dev_id]
            ranges = iter_data(source)
            data = next(ranges, None)
            # A vmstate may have more than its device.
            cluster_count = -(-source.size // CLUSTER_SIZE)
            for first in range(0, cluster_count, count):
                clusters = min(count, cluster_count - first)
                start = first * CLUSTER_SIZE
                end = min(start + clusters * CLUSTER_SIZE, source.size)
                where = []
                while data and data[0] < end:
                    where.append((max(data[0], start), min(data[1], end)))
                    if data[1] > end:  # the next part has the rest of the range
                        break
                    data = next(ranges, None)
                yield Plan(device, first, clusters, where, bool(where))

    def read(self, plan: Plan, buffer: memoryview) -> Part:
        device, first, count, where, has_data = plan
        if not has_data:
            return Part(device, first, [0] * count, None)
        image = buffer[: count * CLUSTER_SIZE]
        base = first * CLUSTER_SIZE
        spans = []
        for start, end in where:
            self.disks[device.dev_id].read_at([(start, image[start - base : end - base])])
            # A file may end inside a block, which is filled up with zeros.
            done = min(-(-(end - base) // BLOCK_SIZE) * BLOCK_SIZE, len(image))
            image[end - base : done] = bytes(done - (end - base))
            spans.append((start - base, done))
        masks = find_data(image, spans, count)
        return Part(device, first, masks, image if any(masks) else None)


def iter_data(source: FileInput) -> Iterator[tuple[int, int]]:
    """Yield (start, end) in bytes of the blocks that hold data, as far as the file system tells."""
    end = 0
    while end < source.size:
        start = end
        try:
            data = os.lseek(source.fd, end, os.SEEK_DATA)
            hole = os.lseek(source.fd, data, os.SEEK_HOLE)
            # Holes may be smaller than a block; in a block with data they are read as zeros.
            start = data // BLOCK_SIZE * BLOCK_SIZE
            end = min(-(-hole // BLOCK_SIZE) * BLOCK_SIZE, source.size)
        except (AttributeError, OSError) as error:  # AttributeError: a system without SEEK_DATA
            if getattr(error, "errno", None) == errno.ENXIO:
                return  # a hole up to the end
            end = source.size
        yield start, end


def find_data(image: memoryview, spans: Iterable[tuple[int, int]], count: int) -> list[int]:
    """Return the masks of the blocks that are not all zeros, of count clusters in image.

    Looks only at spans, (start, end) in bytes, multiples of a block; the rest is zeros.
    """

    def are_zeros(first: int, end: int) -> bool:
        view = image[first * BLOCK_SIZE : end * BLOCK_SIZE]
        return bytearray(len(view)) == view  # a memoryview compares byte by byte

    # A digit for each block: int() makes masks of them faster than a loop over bits does.
    flags = bytearray(b"0") * (count * CLUSTER_BLOCKS)
    for start, end in spans:
        # A block that does not begin with a zero byte needs no second look.
        firsts = bytes(image[start:end:BLOCK_SIZE])
        block = start // BLOCK_SIZE
        flags[block : block + len(firsts)] = b"1" * len(firsts)
        for found in re.finditer(b"\0{1,%d}" % CLUSTER_BLOCKS, firsts):
            first, last = block + found.start(), block + found.end()
            if are_zeros(first, last):
                flags[first:last] = b"0" * (last - first)
                continue
            for number in range(first, last):
                if are_zeros(number, number + 1):
                    flags[number] = ord("0")
    return [
        int(flags[i : i + CLUSTER_BLOCKS][::-1], 2) for i in range(0, len(flags), CLUSTER_BLOCKS)
    ]


class Consumer:
    """Takes parts: `prepare` makes something of each, `deliver` gets batches of that in order.

    Parts have up to `cluster_count` clusters. Preparing for a `parallel` one is work for several
    processors.
    """

    parallel = False
    cluster_count = PART_CLUSTERS

    def prepare(self, part: Part) -> Any:
        return part

    def deliver(self, prepared: Sequence[Any]) -> None:
        """Take a batch; by default, drop it."""

    def finish(self) -> None:
        """Finish after the last part."""


def copy_parts(
    producer: Producer,
    consumer: Consumer,
    progress: Progress,
    chosen: Collection[int] | None = None,
) -> None:
    """Hand parts from a producer to a consumer, in canonical order."""
    consumers = [consumer, *filter(None, [producer.check(chosen)])]

    # Of a stream, this thread must read; of a file, each worker reads what it works on.
    def read(batch: list[Any], buffer: memoryview) -> list[Any]:
        return [producer.read(plan, buffer) if producer.ordered else plan for plan in batch]

    def work(batch: list[Any], buffer: memoryview) -> list[list[Any]]:
        parts = [each if producer.ordered else producer.read(each, buffer) for each in batch]
        return [[each.prepare(part) for part in parts] for each in consumers]

    plans = producer.plans(consumer.cluster_count, chosen)
    batches = in_batches(plans, operator.attrgetter("has_data"), progress)
    deliver = [each.deliver for each in consumers]
    # Only compression is work enough for several processors.
    pump(batches, read, work, deliver, producer.parallel or consumer.parallel)
    for each in reversed(consumers):  # the check first: a bad archive is not to be completed
        each.finish()


def in_batches(
    items: Iterable[T], has_data: Callable[[T], bool], progress: Progress
) -> Iterator[list[T]]:
    """Yield items in lists, of which only the last one has data; show the progress."""
    # A batch has one buffer, so one item with data. Most of a disk has none: handed over one by
    # one, those items would cost more than their work.
    batch: list[T] = []
    try:
        for item in items:
            batch.append(item)
            if has_data(item) or len(batch) == MAX_PARTS:
                yield batch
                progress.tick()
                batch = []
        yield batch
    finally:
        if isinstance(items, Generator):
            items.close()  # after an error its caller may hold it for long, and files with it


class Call:
    """A function's call in another thread."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._function, self._args = function, args
        self._value: Any = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # held until it is done
        self._lock.acquire()

    def run(self) -> None:
        try:
            self._value = self._function(*self._args)
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            self._error = error
        self._lock.release()

    def is_done(self) -> bool:
        return not self._lock.locked()

    def result(self) -> Any:
        """Wait for the call; return what it returned, or raise its error."""
        with self._lock:  # unlike a thread's join, it lets signals through on every Python
            if self._error:
                raise self._error
            return self._value

    def wait(self, seconds: float) -> None:
        """Wait for the call, but no longer than this."""
        if self._lock.acquire(timeout=seconds):
            self._lock.release()


class Workers:
    """Threads that make calls, begun in the order of `submit`."""

    def __init__(self, count: int) -> None:
        import queue

        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        try:
            for _ in range(count):
                # A daemon, never joined: it may wait for ever for a pipe that gives nothing more.
                start_thread(self._serve)
        except VmaError:
            self.close()
            raise

    def submit(self, call: Call) -> Call:
        self._calls.put(call)
        return call

    def close(self) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        while call := self._calls.get():
            call.run()
        self._calls.put(None)  # for the next thread


def pump(
    items: Iterable[T],
    read: Callable[[T, memoryview], Any],
    work: Callable[[Any, memoryview], Sequence[Any]],
    deliver: Sequence[Callable[[Any], None]],
    parallel: bool,
    buffer_size: int = BUFFER_SIZE,
) -> None:
    """Read here, `work` on all processors or here, deliver in more threads, in order.

    `read` and `work` get a buffer for each item, and may return views of it. What `work` returns
    has an item for each of `deliver`, which has a thread of its own. Reading, writing and hashing
    release the interpreter's lock, so one processor reads while the other one writes. Two threads
    that both write are slower: the kernel lets only one at a time into a file.
    """
    thread_count = processor_count() if parallel else 0
    # Nothing bounds the queues of calls, but each item needs a buffer, each worker holds one.
    in_use: collections.deque[tuple[memoryview, list[Call]]] = collections.deque()
    stopped = False

    def hand_on(number: int, call: Call) -> None:
        nonlocal stopped
        try:
            value = call.result()
            if not stopped:  # nothing may be written behind what is missing
                deliver[number](value[number])
        except BaseException:
            stopped = True
            raise

    threads: list[Workers] = []
    try:
        threads += (Workers(count) for count in (thread_count, *[1] * len(deliver)))
        workers, *deliverers = threads
        for item in items:
            if len(in_use) < thread_count + BUFFER_COUNT:
                buffer = new_buffer(buffer_size)
            else:
                buffer, calls = in_use.popleft()
                for each in calls:
                    each.result()
            if stopped:
                break
            value = read(item, buffer)
            if parallel:
                call = workers.submit(Call(work, value, buffer))
            else:  # right here, so that Ctrl-C ends it at once
                call = Call(list, work(value, buffer))
                call.run()
            handed_on = [
                each.submit(Call(hand_on, number, call)) for number, each in enumerate(deliverers)
            ]
            in_use.append((buffer, [call, *handed_on]))
        for _, calls in in_use:
            for each in calls:
                each.result()
    except BaseException:
        stopped = True
        raise
    finally:
        if isinstance(items, Generator):
            items.close()  # not when the garbage is collected: it may have files open
        for thread in threads:
            thread.close()
        for call in in_use[-1][1] if in_use else ():
            call.wait(2)  # after an error: it may hang in a pipe that nobody reads


def new_buffer(size: int) -> memoryview:
    """Return memory of this size in huge pages where there are any: copies are a tenth faster."""
    with suppress(ImportError, AttributeError, OSError):
        import mmap

        memory = mmap.mmap(-1, size)
        memory.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(memory)
    return memoryview(bytearray(size))


# ---------------------------------------------------------------------------------------------
# Uses of parts: canonical archive, disks, digest, comparison


class Written(NamedTuple):
    """An extent to write, or several of a run that store nothing.

    `data` are what follows the header: blocks, or the frames of header and blocks, if it stores
    any.
    """

    headers: bytes
    dev_id: int
    masks: Sequence[int]  # of the used slots
    data: Sequence[Any]


class CanonicalWriter(Consumer):
    """Writes parts of `cluster_count` clusters as a canonical archive.

    `digest` grows with the extents; at the end it is that of the `Index` of what was written.
    """

    zstd: Zstd | None = None  # what compresses it

    def __init__(self, align: int, target: Target) -> None:
        self.align = align
        self.cluster_count = clusters_per_part(align)
        self.target = target
        self.digest = hashlib.sha256()
        self.header_md5 = b""
        self.headers = hashlib.sha256()  # all bytes of the extents' headers

    def begin(self, header: Header) -> None:
        """Write the header."""
        data = bytes(lay_out_header(header, self.align))
        self.header_md5 = data[HEADER_MD5]
        self._write_header(data)
        if not header.devices and header.magic == HEADER_MAGIC:
            # As Proxmox writes an archive that has only configs: one extent that uses no slot.
            self.deliver([[Written(pack_extent(CANONICAL_UUID, 0, ()), 0, (), ())]])

    def move(self, header: Header, target: Target, written: Iterable[Buffer]) -> None:
        """Write the header to another target, the extents that were written behind it; finish."""
        self.target = target
        self.begin(header)
        for data in written:
            target.append([data])

    def _write_header(self, header: bytes) -> None:
        self.target.append([header])

    def prepare(self, part: Part) -> list[Written]:
        extents = []
        end = 0
        for headers, masks in lay_out_extents(part.device, part.first, part.masks, self.align):
            start, end = end, end + len(masks)
            clusters = part.clusters(start, end)
            extents.append(self.assemble(clusters, headers, masks, range(len(masks))))
        return extents

    def assemble(
        self, part: Part, headers: bytes, masks: Sequence[int], slots: Sequence[int]
    ) -> Written:
        """Return an extent to deliver: of the part's clusters those in slots, with these masks.

        Or several that store nothing.
        """
        blocks = part.filled(masks) if any(masks) else ()
        return Written(headers, part.device.dev_id, [masks[slot] for slot in slots], blocks)

    def deliver(self, prepared: Sequence[Sequence[Written]]) -> None:
        output: list[Buffer] = []
        for extent in itertools.chain.from_iterable(prepared):
            self.digest.update(header_digests(extent.headers))
            self.headers.update(extent.headers)
            output += [extent.headers, *extent.data]
        # A batch goes out with one call, in the order of the archive.
        self.target.append(output)


def check_written(writer: CanonicalWriter, written: Input) -> None:
    """Raise VmaError unless the archive on the disk has the header and extents as written."""
    # What was laid out had all clusters, so it is enough that each byte of a header is the same,
    # and that the last extent has its end.
    digest = hashlib.sha256()
    header_md5 = b""
    with suppress(FormatError):  # what is wrong with it does not matter
        header_md5 = read_header(written, whole=False).md5
    size = EXTENT_HEADER_SIZE
    is_cut = False
    while not is_cut and (data := written.peek(size)):
        empty = count_empty(data)
        headers = data[: EXTENT_HEADER_SIZE * (empty + 1)]
        digest.update(headers)
        # Behind the headers of extents that store nothing there may be one of an extent that does.
        block_count = int.from_bytes(
            headers[EXTENT_HEADER_SIZE * empty :][EXTENT_BLOCK_COUNT], "big"
        )
        skipped = len(headers) + block_count * BLOCK_SIZE
        is_cut = written.skip(skipped) < skipped
        size = EXTENT_HEADER_SIZE if block_count else min(max(2 * size, WINDOW_SIZE), RUN_SIZE)
    found = header_md5, digest.digest()
    if is_cut or found != (writer.header_md5, writer.headers.digest()):
        raise VmaError(f"{written.name}: what was written reads back as something else")


class CompressedWriter(CanonicalWriter):
    """Writes the compressed canonical archive, its frames made on all processors."""

    parallel = True
    zstd: Zstd

    def __init__(self, align: int, target: Target, level: int) -> None:
        super().__init__(align, target)
        self.zstd = require_zstd()
        self.level = level
        self._sizes = array.array("I")  # of the frames, compressed and not, in turn
        self._masks = array.array("H")
        self._run = bytearray()  # headers that will share a frame
        self._dev_id = self._number = 0  # of the next extent: its number among its device's

    def _write_header(self, header: bytes) -> None:
        extents, self._sizes = self._sizes, array.array("I")
        start = 0
        for size in header_pieces(len(header)):
            self.target.append([self._add(self._compress([header[start : start + size]]))])
            start += size
        self._sizes += extents  # those of a difference are there already

    def assemble(
        self, part: Part, headers: bytes, masks: Sequence[int], slots: Sequence[int]
    ) -> Written:
        pieces = []
        if any(masks):
            # Not compressed, the header ends a chunk of restic's as in the plain archive.
            pieces.append((STORED_HEADER + headers, EXTENT_HEADER_SIZE))
            for number in range(0, len(slots), PIECE_CLUSTERS):
                group = slots[number : number + PIECE_CLUSTERS]
                first, end = group[0], group[-1] + 1
                views = part.clusters(first, end).filled(masks[first:end])
                if views:
                    pieces.append(self._compress(views))
        return Written(headers, part.device.dev_id, [masks[slot] for slot in slots], pieces)

    def deliver(self, prepared: Sequence[Sequence[Written]]) -> None:
        output = []
        for extent in itertools.chain.from_iterable(prepared):
            self.digest.update(header_digests(extent.headers))
            self.headers.update(extent.headers)
            self._masks.extend(extent.masks)
            if extent.dev_id != self._dev_id:
                output += self._end_run()
                self._dev_id, self._number = extent.dev_id, 0
            if extent.data:
                output += self._end_run()
                self._number += 1
            else:
                output += self._add_run(extent.headers)
            output += map(self._add, extent.data)
        self.target.append(output)

    def move(self, header: Header, target: Target, written: Iterable[Buffer]) -> None:
        self.target.append(self._end_run())
        super().move(header, target, written)
        target.append([pack_seek_table(self._sizes)])

    def finish(self) -> None:
        index = pack_index(self.zstd, self._masks, self.level)
        self.target.append([*self._end_run(), index, pack_seek_table(self._sizes)])

    def _compress(self, views: Sequence[Buffer]) -> tuple[bytes, int]:
        data = views[0] if len(views) == 1 else b"".join(views)  # zstd takes one buffer
        return self.zstd.compress(data, self.level), len(data)

    def _add(self, piece: tuple[bytes, int]) -> bytes:
        """Enter a frame into the seek table, and return it."""
        self._sizes.extend((len(piece[0]), piece[1]))
        return piece[0]

    def _add_run(self, headers: bytes) -> Iterator[bytes]:
        """Keep headers of extents that store nothing; yield the frame of a run that is full."""
        # Runs end at fixed places of a disk, so that a change reaches no further than the next.
        while headers:
            if self._number % RUN_EXTENTS == 0:
                yield from self._end_run()
            size = (RUN_EXTENTS - self._number % RUN_EXTENTS) * EXTENT_HEADER_SIZE
            self._run += headers[:size]
            self._number += len(headers[:size]) // EXTENT_HEADER_SIZE
            headers = headers[size:]

    def _end_run(self) -> list[bytes]:
        run, self._run = self._run, bytearray()
        return [self._add(self._compress([run]))] if run else []


def canonical_writer(align: int, target: Target, level: int) -> CanonicalWriter:
    """Return a writer that compresses with a zstd level, 0 for a plain archive."""
    return CompressedWriter(align, target, level) if level else CanonicalWriter(align, target)


def require_zstd() -> Zstd:
    """Return the zstd library; raises VmaError if there is none."""
    zstd = Zstd.load()
    if zstd is None:
        raise VmaError(
            "writing zstd needs the library libzstd.so.1: install the package libzstd1, or use "
            "Python 3.14 or later; --compress none writes a plain archive"
        )
    return zstd


def find_align(contents: Contents) -> str | None:
    """Return the --align with which optimize writes this very archive, None if there is none."""
    # The default first: a small archive may be the same with several.
    names = sorted(ALIGNS, key=lambda name: name != DEFAULT_ALIGN)
    return next((name for name in names if is_canonical(contents, ALIGNS[name])), None)


def is_canonical(contents: Contents, align: int) -> bool:
    """Say whether an archive is what optimize would write with this align."""
    header = contents.header
    # Most archives that are not canonical show it here, before all extents are laid out.
    if header.uuid != CANONICAL_UUID or lay_out_header(header, align)[HEADER_MD5] != header.md5:
        return False
    if isinstance(contents, IndexedContents):
        return contents.is_canonical(align) and has_zero_tails(contents)
    contents.complete()
    digest = hashlib.sha256()
    for device in canonical_order(header.devices):
        index = contents.index.devices[device.dev_id]
        count = clusters_per_extent(align) * RUN_EXTENTS
        for first in range(0, len(index.entries), count):
            masks = [entry & FULL_MASK for entry in index.slice(first, count)]
            for headers, _ in lay_out_extents(device, first, device.clip(first, masks), align):
                digest.update(header_digests(headers))
    if not header.devices:
        digest.update(pack_extent(CANONICAL_UUID, 0, ())[EXTENT_MD5])
    return digest.digest() == contents.index.digest.digest() and has_zero_tails(contents)


def has_zero_tails(contents: Contents) -> bool:
    """Say whether the disks' last blocks hold only zeros behind the devices' ends.

    Of a stream nobody can tell any more: True.
    """
    for device in contents.header.devices if contents.source.size is not None else ():
        tail = bytearray(0 if device.is_vmstate else -device.size % BLOCK_SIZE)
        entry = contents.index.devices[device.dev_id].entries[-1]
        # The last block's bit is the highest that may be set: a mask above all others has it.
        if tail and entry & FULL_MASK > device.block_mask(device.cluster_count - 1) >> 1:
            end = (entry >> 16) + mask_size(entry & FULL_MASK)
            contents.source.read_at([(end - len(tail), memoryview(tail))])
            if any(tail):
                return False
    return True


class DiskWriter(Consumer):
    """Writes parts to their places on disks, by dev_id; zeros only where they are asked for."""

    def __init__(
        self, header: Header, targets: Mapping[int, Target], zeros: Collection[int] = ()
    ) -> None:
        # optimize stores blocks of zeros: they are looked for, and stay holes.
        self.finds_zeros = header.uuid == CANONICAL_UUID
        self.targets = targets
        self.zeros = zeros

    def prepare(self, part: Part) -> Part:
        if not self.finds_zeros or part.image is None or part.device.dev_id in self.zeros:
            return part
        return part._replace(masks=data_masks(part))

    def deliver(self, prepared: Sequence[Part]) -> None:
        for part in prepared:
            target = self.targets.get(part.device.dev_id)
            if target is None:  # a stream brings all devices, also those that were not chosen
                continue
            if part.device.dev_id in self.zeros:
                target.write_at(part.offset, part.disk_bytes())
            elif part.image is not None:
                image = part.image[: part.size]  # the last block may reach further
                for start, end in block_spans(part.masks):
                    target.write_at(part.offset + start, [image[start:end]])


def write_disks(
    contents: Contents,
    targets: Mapping[int, Target],
    progress: Progress,
    zeros: Collection[int] = (),
) -> None:
    """Write disks to targets by dev_id; those in `zeros` with their zero blocks, others without.

    New files become as long as the disks. Of a stream, clusters are written as they come.
    """
    indexes = contents.index.devices
    files = [(t, indexes[dev_id]) for dev_id, t in targets.items() if isinstance(t, PartialFile)]
    for file, index in files:
        file.truncate(index.disk_size)  # what is too large for the file system fails here
    writer = DiskWriter(contents.header, targets, zeros)
    if isinstance(contents, Stream) and all(target.seekable for target in targets.values()):
        # Disks can be written at any place: no cluster waits for its turn in memory.
        extents = (e for e in ticking(contents.extents(), progress) if e.block_count or zeros)

        def prepare(parts: list[Part], _: memoryview) -> list[list[Part]]:
            return [[writer.prepare(part) for part in parts]]

        pump(extents, contents.read_extent, prepare, [writer.deliver], False)
    else:
        copy_parts(contents, writer, progress, set(targets))
    for file, index in files:
        file.truncate(index.disk_size)  # of a vmstate, known only now


def ticking(items: Iterable[T], progress: Progress) -> Iterator[T]:
    """Pass items on, and show the progress."""
    for item in items:
        progress.tick()
        yield item


class DiskDigests(Consumer):
    """The SHA-256 of each device's contents, by dev_id."""

    def __init__(self, header: Header) -> None:
        self.digests = {device.dev_id: hashlib.sha256() for device in header.devices}

    def deliver(self, prepared: Sequence[Part]) -> None:
        for part in prepared:
            for data in part.disk_bytes():
                self.digests[part.device.dev_id].update(data)


def compare_headers(one: Header, other: Header, ignore_ctime: bool = False) -> list[str]:
    """Return how two archives differ in everything but the contents of their disks."""
    # A config or device with the same name but other contents is in a symmetric difference twice.
    found = []
    if one.ctime != other.ctime and not ignore_ctime:
        found.append(f"created {format_time(one.ctime)}, the other {format_time(other.ctime)}")
    for kind, differing in (
        ("config", set(one.configs) ^ set(other.configs)),
        ("device", set(one.devices) ^ set(other.devices)),
    ):
        for name, times in sorted(collections.Counter(item.name for item in differing).items()):
            what = "is in one of them only" if times == 1 else "differs"
            found.append(f"{kind} {quote(name)} {what}")
    return found


# The same clusters of two archives; None where one of them has no such clusters
Pair = tuple[Optional[Plan], Optional[Plan]]


def pair_plans(
    both: Sequence[Contents],
    count: int,
    key: Callable[[Device], tuple[Any, ...]],
    chosen: Collection[int] | None = None,
) -> Iterator[Pair]:
    """Yield the plans of two archives side by side, both in canonical order.

    Devices with the same key are paired; it begins with what canonical_order sorts by.
    """
    with both[0].holding(chosen), both[1].holding(chosen):
        devices = [
            {key(device): device for device in canonical_order(contents.header.devices, chosen)}
            for contents in both
        ]
        for one in sorted({**devices[0], **devices[1]}):
            # Never looks ahead: of a stream, each plan must be read before the next one is made.
            yield from itertools.zip_longest(
                *(
                    contents.device_plans(known[one], count) if one in known else ()
                    for contents, known in zip(both, devices)
                )
            )
        for contents in both:
            contents.complete()


def pair_has_data(pair: Pair) -> bool:
    return any(plan is not None and plan.has_data for plan in pair)


def read_pair(
    both: Sequence[Contents], pair: Sequence[Any], buffer: memoryview, ordered: bool
) -> list[Any]:
    """Read the plans of a pair whose contents are to be read in order, or the others."""
    size = len(buffer) // 2
    return [
        contents.read(plan, buffer[i * size : (i + 1) * size])
        if isinstance(plan, Plan) and contents.ordered == ordered
        else plan
        for i, (plan, contents) in enumerate(zip(pair, both))
    ]


def compare_disks(one: Contents, other: Contents, progress: Progress) -> list[str]:
    """Return how the contents differ of those devices that both archives have.

    Both are read in canonical order. A zero block that only one stores is no difference.
    """
    # A disk and a vmstate are not the same device, even with the same dev_id.
    kinds = {(device.dev_id, device.is_vmstate) for device in other.header.devices}
    common = [d for d in one.header.devices if (d.dev_id, d.is_vmstate) in kinds]
    counts = dict.fromkeys(common, 0)
    firsts: dict[Device, int] = {}
    both = one, other
    size = 2 * COMPARED_CLUSTERS * CLUSTER_SIZE

    read_here = functools.partial(read_pair, both, ordered=True)

    def read_rest(pair: Any, buffer: memoryview) -> list[Any]:
        return [read_pair(both, pair, buffer, ordered=False)]

    def pairs() -> Iterator[Pair]:  # a generator, which `pump` closes
        chosen = {device.dev_id for device in common}
        plans = pair_plans(both, COMPARED_CLUSTERS, lambda d: (d.is_vmstate, d.dev_id), chosen)
        yield from filter(pair_has_data, ticking(plans, progress))

    def compare(pair: Sequence[Part | None]) -> None:
        for device, number, ours, theirs in differing_clusters(pair[0], pair[1]):
            if not counts[device]:  # parts come in order, so the first one has the first byte
                at = next(k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b)
                firsts[device] = number * CLUSTER_SIZE + at
            counts[device] += 1

    if one.parallel or other.parallel:
        pump(pairs(), read_here, read_rest, [compare], True, size)
    else:
        # In one buffer, which stays in the processor's cache, one thread is faster than two.
        buffer = new_buffer(size)
        for pair in pairs():
            compare(*read_rest(read_here(pair, buffer), buffer))
    found = [
        f"{device.title}: {counts[device]} clusters differ, the first byte that differs is {first}"
        for device, first in sorted(firsts.items())
    ]
    for device in common:
        one_size, other_size = (c.index.devices[device.dev_id].disk_size for c in both)
        if one_size != other_size:
            found.append(f"{device.title}: {one_size} bytes, the other {other_size}")
    return found


def same_data(one: Part, other: Part) -> bool:
    """Say whether two parts store the same blocks, with the same bytes."""
    if one.masks != other.masks or one.size != other.size:
        return False
    if one.image is None or other.image is None:  # then both, as their masks are the same
        return True
    for first, last in block_spans(one.masks):
        for start in range(first, last, SCRATCH_SIZE):
            end = min(start + SCRATCH_SIZE, last)
            # A bytearray compares with any buffer at once, a memoryview byte by byte.
            if bytearray(one.image[start:end]) != other.image[start:end]:
                return False
    return True


def differing_clusters(
    one: Part | None, other: Part | None, size: int | None = None
) -> Iterator[tuple[Device, int, memoryview, memoryview]]:
    """Yield each cluster that differs, as (device of one, cluster_num, its bytes in both).

    Only clusters that both have are compared, and of these up to size bytes of the part, by default
    only the bytes before the ends of both devices.
    """
    if one is None or other is None or same_data(one, other):
        return
    size = min(one.size, other.size) if size is None else size
    for number, masks in enumerate(zip(one.masks, other.masks)):
        # What neither stores is zeros in both; what only one of them stores may be zeros, too.
        if any(masks):
            end = max(size - number * CLUSTER_SIZE, 0)
            ours, theirs = (part.cluster(number)[:end] for part in (one, other))
            if bytearray(ours) != theirs:
                yield one.device, one.first + number, ours, theirs


# ---------------------------------------------------------------------------------------------
# Differences: the clusters in which an archive differs from its base, and the archive that a
# difference and its base make. The file is a canonical archive (--align 4K) with another magic and
# a first config, vma-tool.json; of its extents, the clusters that come from the base are left out.

DIFFERENCE_ALIGN = ALIGNS["4K"]
DIFFERENCE_CLUSTERS = 58  # an extent has at most, as one of Proxmox's
WAITING_SIZE = 64 << 20  # of a difference that is kept in memory


class ContentDigest(Consumer):
    """The content digest of an archive: the same for every layout and compression of its disks.

    It is the SHA-256 over the digests, 32 bytes each, of the devices in canonical order. The digest
    of a device is the SHA-256 over
        its name in UTF-8, and a zero byte;
        each cluster that is not all zeros, ascending: 65536 bytes, zeros behind the device's end;
        the SHA-256 over the numbers of these clusters, 8 bytes each;
        the size of the restored device in bytes, 8 bytes.
    All numbers are big-endian.
    """

    def __init__(self, header: Header) -> None:
        self._digests = {
            device.dev_id: (hashlib.sha256(encode_name(device.name) + b"\0"), hashlib.sha256())
            for device in canonical_order(header.devices)
        }

    def prepare(self, part: Part) -> tuple[int, list[memoryview], bytes]:
        """Return dev_id, what is hashed of a part, and the numbers of these clusters."""
        masks = data_masks(part)
        numbers = [number for number, mask in enumerate(masks, part.first) if mask]
        # Whole clusters, so that it does not matter which of their zeros are stored.
        views = part._replace(masks=masks).filled([FULL_MASK if mask else 0 for mask in masks])
        return part.device.dev_id, views, struct.pack(f">{len(numbers)}Q", *numbers)

    def deliver(self, prepared: Sequence[tuple[int, list[memoryview], bytes]]) -> None:
        for dev_id, views, packed in prepared:
            data, numbers = self._digests[dev_id]
            for view in views:
                data.update(view)
            numbers.update(packed)

    def disks(self, index: Index) -> dict[int, str]:
        """Return the devices' digests in hex by dev_id, in canonical order."""
        found = {}
        for dev_id, (data, numbers) in self._digests.items():
            digest = data.copy()
            digest.update(numbers.digest() + struct.pack(">Q", index.devices[dev_id].disk_size))
            found[dev_id] = digest.hexdigest()
        return found


def content_digest(contents: Contents, progress: Progress) -> str:
    """Read an archive, and return its content digest in hex."""
    digest = ContentDigest(contents.header)
    copy_parts(contents, digest, progress)
    return combine_digests(digest.disks(contents.index).values())


def layout_digest(contents: Contents) -> str:
    """Return the SHA-256 over the header's MD5 and the SHA-256 of the extents' MD5s, in hex."""
    return hashlib.sha256(contents.header.md5 + contents.extents_digest()).hexdigest()


def data_masks(part: Part) -> list[int]:
    """Return the masks of the blocks that are not all zeros."""
    if part.image is None:
        return list(part.masks)
    return find_data(part.image, block_spans(part.masks), len(part.masks))


class Waiting(Target):
    """What is written before its place is known: in memory, a lot of it in a temporary file."""

    def __init__(self, directory: str) -> None:
        super().__init__(-1, "", seekable=True)
        self._directory = directory
        self._held: list[bytes] = []
        self._spool: Spool | None = None

    def append(self, parts: Sequence[Buffer]) -> None:
        self.position += sum(map(len, parts))
        if self._spool:
            self._spool.append(parts)
            return
        self._held += map(bytes, parts)  # copies, as these may be views of a buffer
        if self.position > WAITING_SIZE:
            self._spool = Spool(self._directory)
            self._spool.append(self._held)
            self._held = []

    def written(self) -> Iterator[Buffer]:
        """Yield everything, in order."""
        yield from self._held
        if spool := self._spool:
            buffer = memoryview(bytearray(SPILL_SIZE))
            for start in range(0, self.position, SPILL_SIZE):
                view = buffer[: self.position - start]
                spool.source.read_at([(start, view)])
                yield view

    def close(self) -> None:
        if self._spool:
            self._spool.source.close()


class DifferenceWriter:
    """Compares two archives, and writes the clusters in which the second one differs."""

    def __init__(self, base: Contents, new: Contents, level: int, directory: str) -> None:
        for contents in (base, new):
            require_full(contents)
        # The difference has one config more, which tells what it belongs to.
        if len(new.header.configs) == CONFIG_COUNT:
            raise VmaError(f"{new.source.name}: {CONFIG_COUNT} configs leave no room for one more")
        self.both = base, new
        # The header comes first, but has the digests of all that is read.
        self.waiting = Waiting(directory)
        self.writer = canonical_writer(DIFFERENCE_ALIGN, self.waiting, level)
        self.digests = ContentDigest(base.header), ContentDigest(new.header)

    def write_extents(self, progress: Progress) -> None:
        """Read both archives, and write the extents of the difference."""

        def matters(pair: Pair) -> bool:
            """Leave out zeros that both have: of most disks, that is nearly everything."""
            base, new = pair
            if pair_has_data(pair) or new is None:
                return pair_has_data(pair)
            return base is None or base.cluster_count < new.cluster_count or new.device.is_vmstate

        def read(batch: list[Pair], buffer: memoryview) -> list[list[Any]]:
            return [read_pair(self.both, pair, buffer, ordered=True) for pair in batch]

        def compare(batch: list[list[Any]], buffer: memoryview) -> list[list[Any]]:
            pairs = [read_pair(self.both, pair, buffer, ordered=False) for pair in batch]
            found = [self._compare(*pair) for pair in pairs]
            return [[each[number] for each in found if each[number]] for number in range(3)]

        pairs = pair_plans(
            self.both, DIFFERENCE_CLUSTERS, lambda d: (d.is_vmstate, d.dev_id, d.name)
        )
        batches = in_batches(filter(matters, pairs), pair_has_data, progress)
        deliver = [each.deliver for each in (*self.digests, self.writer)]
        pump(batches, read, compare, deliver, True, 2 * BUFFER_SIZE)

    def _compare(self, base: Part | None, new: Part | None) -> list[Any]:
        """Return what to hash of both parts, and the extent to write, None where there is none."""
        prepared = [
            digest.prepare(part) if part else None
            for digest, part in zip(self.digests, (base, new))
        ]
        extent = lay_out_difference(base, new) if new else None
        return [*prepared, [self.writer.assemble(*extent)] if extent else None]

    def finish(self, names: Sequence[str], output: Target) -> None:
        """Write the difference; names are those of the two archives."""
        disks = [digest.disks(c.index) for digest, c in zip(self.digests, self.both)]
        base, new = (
            Origin(name, c.header.ctime, layout_digest(c), combine_digests(found.values()))
            for name, c, found in zip(names, self.both, disks)
        )
        about = Difference(base, new, tuple(disks[1].values()), self.writer.digest.hexdigest())
        header = self.both[1].header
        configs = (Config(DIFFERENCE_CONFIG, pack_difference(about)), *header.configs)
        header = header._replace(configs=configs, magic=DIFFERENCE_MAGIC)
        self.writer.move(header, output, self.waiting.written())


def lay_out_difference(
    base: Part | None, new: Part
) -> tuple[Part, bytes, Sequence[int], Sequence[int]] | None:
    """Return the extent of the clusters in which new differs, None if there are none.

    That is its header, its clusters (counted from the part's first one) and the masks of all; the
    part stores no more than these. Blocks of zeros are not stored. Of a vmstate, which Proxmox
    restores as the blocks are stored, all is kept as it is.
    """
    masks = list(new.masks)
    slots: Sequence[int] = range(len(masks))
    if not new.device.is_vmstate:
        if base is not None:
            # Up to the new disk's end: behind its own, a shorter base counts as zeros.
            differing = differing_clusters(base, new, new.size)
            slots = [number - new.first for _, number, _, _ in differing]
            slots += range(len(base.masks), len(masks))  # behind the base's end, all is new
        for number in set(range(len(masks))).difference(slots):
            masks[number] = 0
        masks = data_masks(new._replace(masks=masks))
    if not slots:
        return None
    info = new.device.dev_id << 32 | new.first
    infos = [masks[slot] << 48 | info + slot for slot in slots]
    header = pack_extent(CANONICAL_UUID, sum(map(mask_size, masks)) // BLOCK_SIZE, infos)
    return new._replace(masks=masks), header, masks, slots


class Overlay(Contents):
    """The archive that a difference and its base make.

    Blocks of zeros count as not stored, so that nothing shows how the base is laid out.
    """

    def __init__(self, difference: Contents, base: Contents) -> None:
        if difference.index.difference is None:
            raise VmaError(
                f"{difference.source.name}: a full archive, no difference: it needs no --base"
            )
        require_full(base)
        self.difference, self.base = difference, base
        self.about = difference.index.difference
        self.source = difference.source
        self.inputs = difference.source, base.source
        self.index = difference.index  # for vmstate's size: that is always stored whole
        self.header = whole_header(difference.header)
        self.ordered = difference.ordered or base.ordered
        self.parallel = difference.parallel or base.parallel
        # A disk that has grown is still based on the one with its dev_id and name.
        known = {device[:2]: device for device in base.header.devices if not device.is_vmstate}
        self.bases = {d.dev_id: known[d[:2]] for d in self.header.devices if d[:2] in known}
        self.base_indexes = {dev_id: base.index.devices[dev_id] for dev_id in self.bases}
        self._needs = f"{self.source.name} needs {self.about.base.title}"

    def extents(self) -> Iterator[Extent]:
        for contents in (self.difference, self.base):
            yield from contents.extents()
        self.complete()

    def complete(self) -> None:
        self.difference.complete()
        self.base.complete()
        for device in self.header.devices if not self.ordered else ():
            # Behind the base's end nothing may be missing: better known before anything is written.
            base = self.bases.get(device.dev_id)
            start = base.cluster_count if base else 0
            index = self.index.devices[device.dev_id]
            for first in range(start, device.cluster_count, MAX_PARTS):
                self._require(device, first, index.slice(first, MAX_PARTS))

    def _require(self, device: Device, first: int, entries: Sequence[int]) -> None:
        """Raise FormatError if one of these clusters is missing, which the base does not have."""
        if 0 in entries:
            number = first + entries.index(0)
            raise FormatError(
                f"{self.base.source.name}: the wrong base: it has no cluster {number} of "
                f"{device.title}; {self._needs}"
            )

    def plan(self, device: Device, first: int, count: int) -> Plan:
        entries = self.difference.entries(device, first, count)
        base = self.bases.get(device.dev_id)
        base_entries = self.base.entries(base, first, len(entries)) if base else []
        self._require(device, first + len(base_entries), entries[len(base_entries) :])
        where: list[tuple[Contents, Plan]] = []
        if base and self.base.ordered:  # also what is not needed must be taken out of the stream
            where.append((self.base, plan_entries(base, first, base_entries)))
        start = 0
        # An entry of 0 is a cluster that the difference lacks, since it is as in the base.
        for is_stored, run in itertools.groupby(entries, bool):
            end = start + len(list(run))
            if is_stored:
                plan = plan_entries(device, first + start, entries[start:end])
                where.append((self.difference, plan))
            elif base and not self.base.ordered:
                plan = plan_entries(base, first + start, base_entries[start:end])
                where.append((self.base, plan))
            start = end
        has_data = any(plan.has_data for _, plan in where)
        return Plan(device, first, len(entries), where, has_data)

    @contextmanager
    def holding(self, chosen: Collection[int] | None) -> Iterator[None]:
        # Of a base that is a stream, only disks that are needed wait in memory.
        bases = set(self.bases) if chosen is None else set(self.bases) & set(chosen)
        with self.difference.holding(chosen), self.base.holding(bases):
            yield

    def read(self, plan: Plan, buffer: memoryview) -> Part:
        if not plan.has_data:
            return Part(plan.device, plan.first, [0] * plan.cluster_count, None)
        image = buffer[: plan.cluster_count * CLUSTER_SIZE]
        masks = [0] * plan.cluster_count
        for contents, part in plan.where:
            start = part.first - plan.first
            end = start + part.cluster_count
            view = image[start * CLUSTER_SIZE : end * CLUSTER_SIZE]
            masks[start:end] = contents.read(part, view).masks
        result = make_part(plan.device, plan.first, masks, image)
        # Of a vmstate, Proxmox restores exactly the blocks that are stored.
        found = result.masks if plan.device.is_vmstate else data_masks(result)
        return result._replace(masks=found, image=image if any(found) else None)

    def check(self, chosen: Collection[int] | None) -> Consumer:
        return ContentCheck(self, chosen)

    def check_base(self, progress: Progress) -> None:
        """Raise FormatError unless the base is the one that is needed.

        For those who read only some places: if it has another layout, it is read once.
        """
        self.complete()
        wanted = self.about.base
        # The layout is read off the headers. Only an archive that was rewritten is read whole.
        if (
            layout_digest(self.base) != wanted.layout
            and content_digest(self.base, progress) != wanted.content
        ):
            raise FormatError(f"{self.base.source.name}: the wrong base: {self._needs}")

    def blame(self) -> FormatError:
        """Return the error for disks that differ from those the difference was made of."""
        base, difference = (source.name for source in reversed(self.inputs))
        is_same_layout = layout_digest(self.base) == self.about.base.layout
        if self.ordered:  # a stream cannot be read again to find out which of the two it is
            who = "it" if is_same_layout else "the wrong base, or it"
            return FormatError(f"{base}: {who} or {difference} is damaged: {self._needs}")
        with Progress(base, quiet=True) as progress:
            content = content_digest(self.base, progress)
        if content == self.about.base.content:
            return FormatError(f"{difference}: damaged: {base} is the right base")
        if is_same_layout:
            return FormatError(f"{base}: damaged: the right base, but its disks have changed")
        return FormatError(f"{base}: the wrong base, or damaged: {self._needs}")


def require_full(contents: Contents) -> None:
    """Raise FormatError if this is a difference itself."""
    if contents.index.difference:
        raise FormatError(
            f"{contents.source.name}: a difference, which cannot be the base of another one: each "
            f"needs only its full archive, this one {contents.index.difference.base.title}"
        )


@contextmanager
def open_archive(
    path: str, base: str | None = None, memory: int = DEFAULT_MEMORY, directory: str = ""
) -> Iterator[Contents]:
    """Open an archive, or what a difference and its base make.

    Everything that takes --base opens its archive here.
    """
    with ExitStack() as stack:
        if path == base == "-":
            raise VmaError("standard input can be only one of two archives")
        source = stack.enter_context(open_input(path))
        contents = load(source, memory, directory, whole=base is None)
        if base is not None:
            base_source = stack.enter_context(open_input(base))
            contents = Overlay(contents, load(base_source, memory, directory, whole=False))
        yield contents


class ContentCheck(ContentDigest):
    """Raises FormatError at the end unless the disks are those that the difference was made of."""

    def __init__(self, overlay: Overlay, chosen: Collection[int] | None) -> None:
        super().__init__(overlay.header)
        self.overlay = overlay
        self.chosen = chosen

    def finish(self) -> None:
        found = self.disks(self.overlay.index)
        expected = dict(zip(found, self.overlay.about.disks))
        # Devices that nobody has chosen were not read.
        chosen = found if self.chosen is None else self.chosen
        if any(found[dev_id] != expected[dev_id] for dev_id in chosen):
            raise self.overlay.blame()


# ---------------------------------------------------------------------------------------------
# Partitions: what a guest's disk holds. Nothing in it is trusted: numbers only say where to read
# next, inside the device.

MBR_SIGNATURE = b"\x55\xaa"
MBR_ENTRY = struct.Struct("<B3xB3xII")  # status, type, first sector, sector count
MBR_ENTRIES = slice(446, 510)
MBR_EXTENDED = (0x05, 0x0F, 0x85)
MBR_PROTECTIVE = 0xEE
MBR_MAX_LOGICAL = 251  # partitions 5 to 255: Linux knows no more
MBR_TYPES = {
    0x01: "FAT12", 0x04: "FAT16", 0x05: "extended", 0x06: "FAT16", 0x07: "NTFS or exFAT",
    0x0B: "FAT32", 0x0C: "FAT32", 0x0E: "FAT16", 0x0F: "extended", 0x27: "Windows recovery",
    0x82: "Linux swap", 0x83: "Linux", 0x85: "extended", 0x8E: "Linux LVM", 0xA5: "FreeBSD",
    0xEF: "EFI system", 0xFD: "Linux RAID",
}  # fmt: skip
GPT_MAGIC = b"EFI PART"
# UEFI specification, "GPT Header": signature, revision, header size, CRC, reserved, my LBA,
# alternate LBA, first and last usable LBA, disk GUID, entries' LBA, count, size, CRC
GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
GPT_ENTRY = struct.Struct("<16s16sQQQ72s")  # type, GUID, first and last LBA, attributes, name
GPT_MAX_ENTRIES = 1024  # 128 as a rule; any number may stand in a guest's header
GPT_TYPES = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
    "6a898cc3-1dd2-11b2-99a6-080020736631": "ZFS",
}


# Name, where its magic is, the magic, where its label is and of what size. The first that fits
# counts. ext comes last, as two bytes may be there by chance.
FILE_SYSTEMS = (
    ("LUKS", 0, b"LUKS\xba\xbe", 0, 0),
    ("LVM", 512, b"LABELONE", 0, 0),
    # Linux' md superblock, version 1.2 and 1.1
    ("RAID", 4096, b"\xfc\x4e\x2b\xa9\1\0\0\0", 4128, 32),
    ("RAID", 0, b"\xfc\x4e\x2b\xa9\1\0\0\0", 32, 32),
    ("xfs", 0, b"XFSB", 108, 12),
    ("btrfs", 65600, b"_BHRfS_M", 65835, 256),
    ("NTFS", 3, b"NTFS    ", 0, 0),
    ("exFAT", 3, b"EXFAT   ", 0, 0),
    ("FAT32", 82, b"FAT32   ", 71, 11),
    ("FAT16", 54, b"FAT16   ", 43, 11),
    ("FAT12", 54, b"FAT12   ", 43, 11),
    ("swap", 4086, b"SWAPSPACE2", 1052, 16),
    ("ext", 1080, b"\x53\xef", 1144, 16),
)
SUPERBLOCK_SIZE = 66 << 10  # as far as btrfs' label
JOURNAL_OPTIONS = {
    "ext3": "noload", "ext4": "noload", "xfs": "norecovery", "btrfs": "rescue=nologreplay",
}  # fmt: skip
# Commands that open what is no file system; `part` is empty, or the partition's p and number.
OPEN_COMMANDS = {
    "LVM": "losetup -r -P -f --show {file} && vgchange -ay",
    "RAID": 'mdadm -A -o -R /dev/md/guest "$(losetup -r -P -f --show {file}){part}"',
    "LUKS": 'cryptsetup open --readonly "$(losetup -r -P -f --show {file}){part}" guest',
}
MOUNT_EXAMPLE = "/mnt/backup"


class Partition(NamedTuple):
    """A partition; start and size in bytes. Number 0 is a file system on the whole disk."""

    number: int
    start: int
    size: int
    type: str
    label: str
    file_system: str


# A disk's partition table: its kind, its partitions, and its faults
Table = tuple[str, Sequence[Partition], Sequence[str]]
Read = Callable[[int, int], bytes]  # offset, size in bytes


def ext_version(data: bytes) -> str:
    """Return which of ext2, ext3 and ext4 a superblock's features make it."""
    compatible, incompatible = struct.unpack_from("<II", data.ljust(2048, b"\0"), 1024 + 92)
    if incompatible & 0x2C0:  # extents, 64bit, flex_bg
        return "ext4"
    return "ext3" if compatible & 4 else "ext2"  # has_journal


def recognise(
    read: Read, number: int, start: int, size: int, type_name: str, label: str
) -> Partition:
    """Return a partition with the file system that its first bytes show."""
    data = read(start, min(size, SUPERBLOCK_SIZE))
    file_system = ""
    for name, offset, magic, label_offset, label_size in FILE_SYSTEMS:
        if data.startswith(magic, offset):
            file_system = name if name != "ext" else ext_version(data)
            found = data[label_offset : label_offset + label_size].partition(b"\0")[0].strip()
            own = found.decode("utf-8", "replace")
            if own and own != "NO NAME":  # the latter is FAT's word for no label
                label = f"{label} / {own}" if label and label != own else own
            break
    return Partition(number, start, size, type_name, label, file_system)


def read_mbr(read: Read, size: int, entries: Sequence[tuple[int, ...]]) -> Table:
    """Return the table in these four entries, and in the chain of an extended partition."""
    partitions = []
    faults = []

    def add(number: int, kind: int, start: int, count: int) -> None:
        if start >= size:
            faults.append(f"partition {number} begins at {start}, behind the disk's {size}")
            return
        if start + count > size:
            faults.append(f"partition {number} ends at {start + count}, behind the disk's {size}")
        name = MBR_TYPES.get(kind, f"type 0x{kind:02x}")
        partitions.append(recognise(read, number, start, min(count, size - start), name, ""))

    for number, (_, kind, base, length) in enumerate(entries, 1):
        if not kind or not length:
            continue
        if kind == MBR_PROTECTIVE:
            faults.append("a protective MBR, but no GPT header")
            continue
        add(number, kind, base * 512, length * 512)
        if kind not in MBR_EXTENDED:
            continue
        # Each logical partition has a boot record of its own: the first entry counts from there,
        # the second one, which leads to the next record, from the extended partition's start.
        table = base
        seen: set[int] = set()
        logical = 5
        while table not in seen and table * 512 < size and len(seen) < MBR_MAX_LOGICAL:
            seen.add(table)
            sector = read(table * 512, 512)
            if sector[510:] != MBR_SIGNATURE:
                faults.append(f"no boot record at {table * 512}, where the extended chain goes on")
                break
            pair = MBR_ENTRY.iter_unpack(sector[MBR_ENTRIES][: 2 * MBR_ENTRY.size])
            (_, logical_kind, first, count), (_, next_kind, following, _) = pair
            if logical_kind and count:
                add(logical, logical_kind, (table + first) * 512, count * 512)
                logical += 1
            if not next_kind:
                break
            table = base + following
        else:
            faults.append(
                f"the extended chain leads to {table * 512}: in a circle, behind the end, or on "
                f"and on"
            )
    return "MBR", partitions, faults


def read_gpt(read: Read, size: int, sector: int, header: bytes) -> Table:
    """Return the table behind a GPT header; one that is damaged is reported, and not used."""
    import binascii
    import uuid

    _, _, header_size, crc, *_, entries_lba, count, entry_size, entries_crc = (
        GPT_HEADER.unpack_from(header)
    )
    if not GPT_HEADER.size <= header_size <= sector:
        return "GPT", [], [f"header size {header_size} is out of range"]
    # The CRC is that of the header with its own field zeroed.
    if binascii.crc32(header[:16] + bytes(4) + header[20:header_size]) != crc:
        return "GPT", [], ["the header's CRC does not match"]
    if not 0 < count <= GPT_MAX_ENTRIES or not GPT_ENTRY.size <= entry_size <= 4096:
        return "GPT", [], [f"{count} entries of {entry_size} bytes are out of range"]
    table = read(entries_lba * sector, count * entry_size)
    if len(table) < count * entry_size or binascii.crc32(table) != entries_crc:
        return "GPT", [], ["the entries' CRC does not match"]
    partitions = []
    faults = []
    for number in range(1, count + 1):
        kind, _, first, last, _, name = GPT_ENTRY.unpack_from(table, (number - 1) * entry_size)
        if not any(kind):
            continue
        start, end = first * sector, (last + 1) * sector
        if not start < end <= size:
            faults.append(
                f"partition {number} from {start} to {end} is not inside the disk's {size}"
            )
            continue
        guid = str(uuid.UUID(bytes_le=kind))
        label = name.decode("utf-16-le", "replace").partition("\0")[0]
        type_name = GPT_TYPES.get(guid, guid)
        partitions.append(recognise(read, number, start, end - start, type_name, label))
    return "GPT", partitions, faults


def read_table(contents: Contents, device: Device) -> Table:
    """Return the partition table of a disk; raises nothing for what is in it."""
    read = functools.partial(contents.read_range, device.dev_id)
    size = device.size
    start = read(0, 512)
    # A GPT comes first: its disk has a protective MBR as well. Nothing says how large sectors are.
    for sector in (512, 4096):
        header = read(sector, sector)
        if header.startswith(GPT_MAGIC) and len(header) >= GPT_HEADER.size:
            return read_gpt(read, size, sector, header)
    # A file system's own boot sector may end like an MBR: NTFS and FAT have one.
    whole = recognise(read, 0, 0, size, "", "")
    if start[510:] == MBR_SIGNATURE and not whole.file_system:
        entries = list(MBR_ENTRY.iter_unpack(start[MBR_ENTRIES]))
        statuses, kinds, _, _ = zip(*entries)
        if any(kinds) and set(statuses) <= {0, 0x80}:  # else it is only boot code
            return read_mbr(read, size, entries)
    return "none", [whole] if whole.file_system else [], []


# ---------------------------------------------------------------------------------------------
# Directories, configs, maps: what unpack and extract write, what pack and create read

DESCRIPTION_NAME = "vma.json"
DESCRIPTION_FORMAT = 1
DESCRIPTION_MAX_SIZE = 1 << 20
CONFIG_NAME = "qemu-server.conf"
# As `vma extract` names disks, as unpack names them, and the RAM state's two names
DISK_FILE = r"(?s)disk-(.*)\.raw|(drive-.*|vmstate)|(vmstate)\.bin"
# What qmrestore may write into a line of a map beside the format
MAP_LIMITS = ("throttling.bps=", "throttling.group=", "cache=")
ARCHIVE_SUFFIXES = (".vma", ".vma.zst", ".vma.gz", ".vma.lzo", ".vma.bz2")


def disk_file_name(device: Device) -> str:
    """Return the file name that Proxmox's own vma extract gives a device."""
    return "vmstate.bin" if device.is_vmstate else f"disk-{device.name}.raw"


def partition_file_name(device: Device, partition: Partition) -> str:
    """Return the file name of a partition in a mounted archive."""
    suffix = f"-part{partition.number}.raw" if partition.number else ".raw"
    return f"disk-{device.name}{suffix}"


@contextmanager
def make_directory(path: str, readers: Readers | None) -> Iterator[Directory]:
    """Open a directory, created if it is not there; one created here goes away on an error."""
    made = False
    with ExitStack() as undo:
        with signals_blocked(), os_errors_as(escape(path)), suppress(FileExistsError):
            os.mkdir(path)
            made = True
            Cleanup.actions[path] = functools.partial(os.rmdir, path)
            undo.callback(Cleanup.undo, path)  # unless somebody else has put something there
        # What was created here is no symbolic link, unless somebody else has put one there.
        with Directory(path, follow=not made, readers=readers) as directory:
            yield directory
        undo.pop_all()
        Cleanup.actions.pop(path, None)


def find_archives(directory: str) -> list[str]:
    """Return the paths of the archives in a directory, by name; raises VmaError for none."""
    with os_errors_as(escape(directory)):
        names = sorted(name for name in os.listdir(directory) if name.endswith(ARCHIVE_SUFFIXES))
    if not names:
        suffixes = ", ".join(f"*{suffix}" for suffix in ARCHIVE_SUFFIXES)
        raise VmaError(f"{escape(directory)}: no archives here ({suffixes})")
    return [os.path.join(directory, name) for name in names]


def describe_for_pack(header: Header) -> bytes:
    """Return vma.json: what the other files cannot say."""
    value = {
        "format": DESCRIPTION_FORMAT,
        "ctime": header.ctime,
        "configs": [config.name for config in header.configs],
        "devices": [device._asdict() for device in header.devices],
    }
    return to_json(value).encode() + b"\n"


def refuse_twice(where: str, files: Sequence[str]) -> None:
    """Raise VmaError if two files of a directory have the same name."""
    for i, name in enumerate(files):
        if name in files[:i]:
            raise VmaError(f"{where}: two files would be called {quote(name)}")


# An archive to pack: its header, and the path of each device's file by the device's name
Packing = tuple[Header, Mapping[str, str]]


def require_name(value: object) -> str:
    """Return a name as an archive would have it; other texts may stand for the same bytes."""
    return encode_name(require(value, str)).decode("utf-8", "surrogateescape")


def read_small(path: str, limit: int = BLOB_MAX_SIZE) -> bytes:
    """Return a regular file's contents of up to limit bytes."""
    # Without O_NONBLOCK, a FIFO of that name would keep us waiting.
    fd = open_path(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os_errors_as(escape(path)), os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise VmaError(f"{escape(path)}: not a file")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise VmaError(f"{escape(path)}: more than the {limit} bytes that it may have")
    return data


def require_names(header: Header) -> None:
    """Raise VmaError, as `check_names` does, for names that an archive to be made cannot have."""
    try:
        check_names(header)
    except FormatError as error:  # no archive is bad, as there is none yet
        raise VmaError(str(error)) from error


def read_described(directory: str) -> Packing:
    """Read a directory as vma.json describes it; raises VmaError for anything more or less."""
    import json

    path = os.path.join(directory, DESCRIPTION_NAME)
    where = escape(path)
    text = read_small(path, DESCRIPTION_MAX_SIZE)
    try:
        value = json.loads(text)
        if value["format"] != DESCRIPTION_FORMAT:
            raise VmaError(f"{where}: format {value['format']!r} is not supported")
        ctime = require(value["ctime"], int)
        names = [require_name(name) for name in value["configs"]]
        devices = tuple(
            Device(require(d["dev_id"], int), require_name(d["name"]), require(d["size"], int))
            for d in value["devices"]
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VmaError(f"{where}: not what unpack writes: {escape(repr(error))}") from error
    ids = [device.dev_id for device in devices]
    if len(set(ids) & set(DEV_IDS)) < len(ids):
        raise VmaError(f"{where}: a dev_id is there twice, or not from 1 to 254")
    if not -(1 << 63) <= ctime < 1 << 63 or not all(0 < d.size < 1 << 63 for d in devices):
        raise VmaError(f"{where}: a size or the ctime is out of range")
    for device in devices:
        if device.size % SECTOR_SIZE:
            raise VmaError(
                f"{where}: {device.title}: a size of {device.size} bytes is no multiple of "
                f"{SECTOR_SIZE}"
            )
    # Names are checked before they are opened: vma.json may come from anywhere.
    header = Header(CANONICAL_UUID, ctime, tuple(Config(name, b"") for name in names), devices)
    require_names(header)
    known = [DESCRIPTION_NAME, *names, *(device.name for device in devices)]
    refuse_twice(where, known)
    # A file that was added must not be left out silently: it may be the disk that matters.
    extra = sorted(set(map(name_from_disk, os.listdir(directory))) - set(known))
    if extra:
        raise VmaError(
            f"{escape(os.path.join(directory, extra[0]))}: not listed in {DESCRIPTION_NAME}: "
            "list it there, or remove one of them"
        )
    paths = {name: os.path.join(directory, name_on_disk(name)) for name in known}
    configs = tuple(Config(name, read_small(paths[name])) for name in names)
    return header._replace(configs=configs), paths


def natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts scsi2 before scsi10."""
    return [
        (not number, int(number or 0), number or text)
        for number, text in re.findall(r"([0-9]+)|([^0-9]+)", name)
    ]


def packing_of(configs: Iterable[Config], paths: Mapping[str, str]) -> Packing:
    """Return a new archive to pack; its disks, paths by name, get dev_ids in their order."""
    devices = tuple(Device(dev_id, name, 0) for dev_id, name in enumerate(paths, DEV_IDS[0]))
    return Header(CANONICAL_UUID, int(time.time()), tuple(configs), devices), paths


def read_undescribed(directory: str) -> Packing:
    """Read a directory by the names of its files; raises VmaError for a name of no known form."""
    configs = []
    devices = {}
    for entry in sorted(os.listdir(directory), key=natural_key):
        path = os.path.join(directory, entry)
        name = name_from_disk(entry)
        if name.endswith((".conf", ".fw")):
            configs.append(Config(name, read_small(path)))
            continue
        match = re.fullmatch(DISK_FILE, name)
        if not match:
            raise VmaError(
                f"{escape(path)}: neither a config (*.conf, *.fw) nor a device (disk-NAME.raw, "
                "drive-*, vmstate): rename or remove it"
            )
        name = match[match.lastindex or 0]
        if name in devices:
            raise VmaError(f"{escape(path)}: a second file for device {quote(name)}")
        devices[name] = path
    if not configs and not devices:
        raise VmaError(f"{escape(directory)}: there is nothing to pack")
    # dev_ids are given in this order, and the canonical archive has it, too.
    order = sorted(devices, key=lambda name: (name == VMSTATE, natural_key(name)))
    return packing_of(configs, {name: devices[name] for name in order})


def open_disk(stack: ExitStack, device: Device, path: str) -> tuple[Device, FileInput]:
    """Open the file or block device of a disk; device.size must be its size, if it is not 0.

    Return the device with its size, and the file.
    """
    name = escape(path)
    fd = open_path(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os_errors_as(name):
        file = stack.enter_context(os.fdopen(fd, "rb", buffering=0))
        if not is_disk(os.fstat(fd).st_mode):
            raise VmaError(f"{name}: neither a file nor a block device")
        source = FileInput(name, file)
    size = source.size
    if device.size:
        # A vmstate restores as long as its clusters.
        padded = device.is_vmstate and size >= device.size and size % CLUSTER_SIZE == 0
        if size != device.size and not padded:
            raise VmaError(
                f"{name}: {size} bytes, expected {device.size} as {DESCRIPTION_NAME} says"
            )
    else:  # as Proxmox's writer does: its reader loses a last sector that is not whole
        device = device._replace(size=-(-size // SECTOR_SIZE) * SECTOR_SIZE)
    if not device.size:
        raise VmaError(f"{name}: an empty file is no disk")
    if device.cluster_count > MAX_CLUSTERS:
        raise VmaError(f"{name}: {size} bytes are more than the format has cluster numbers for")
    return device, source


def data_size(source: FileInput) -> int:
    """Return how many bytes of a file are no hole, as far as known: for the progress."""
    allocated = getattr(source.state, "st_blocks", 0) * SECTOR_SIZE  # of a block device, none
    return min(allocated, source.size) or source.size


def put_line(header: Header, line: str, old: bytes = rb"(?!)") -> Header:
    """Return the header with a line in the main section of qemu-server.conf.

    It stands where the first line was that matches `old`, or at the end; all that match go. The
    section ends at the first line that begins with `[`, a snapshot or pending changes. Blank lines
    before it belong to what follows.
    """
    configs = dict(header.configs)
    lines = configs[CONFIG_NAME].splitlines(keepends=True)
    main = list(itertools.takewhile(lambda each: not each.startswith(b"["), lines))
    while main and not main[-1].strip():
        main.pop()
    rest = lines[len(main) :]
    if main and not main[-1].endswith(b"\n"):
        main[-1] += b"\n"
    place = next((i for i, each in enumerate(main) if re.match(old, each)), len(main))
    # All old lines go, not only the first: of two, Proxmox takes the last.
    kept = [each for each in main if not re.match(old, each)]
    kept.insert(place, encode_name(f"{line}\n"))
    configs[CONFIG_NAME] = b"".join(kept + rest)
    return header._replace(configs=tuple(map(Config._make, configs.items())))


def set_options(header: Header, options: Sequence[tuple[str, str]]) -> Header:
    """Return the header with `key: value` lines in the main section of qemu-server.conf.

    They replace the lines of the same keys; everything else is kept.
    """
    if options and CONFIG_NAME not in dict(header.configs):
        raise VmaError(f"-u changes {CONFIG_NAME}, which is not there")
    for key, value in options:
        old = rb"\s*%b\s*:" % re.escape(encode_name(key))
        header = put_line(header, f"{key}: {value}", old)
    return header


def unmapped_devices(header: Header) -> list[Device]:
    """Return the disks for which qemu-server.conf lacks the line that qmrestore needs."""
    config = dict(header.configs).get(CONFIG_NAME)
    if config is None:
        return []
    # As qmrestore reads them, but in linear time whatever the config holds.
    mapped = set(re.findall(rb"(?m)^#qmdump#map:[^\s:]+:([^\s:]+):[^\s:]*:[^\s:]*:$", config))
    return [d for d in header.devices if not d.is_vmstate and encode_name(d.name) not in mapped]


def add_device_map(header: Header, storage: str) -> Header:
    """Return the header with the missing #qmdump#map lines in qemu-server.conf."""
    for device in unmapped_devices(header):
        # drive-scsi0 is scsi0, drive-tpmstate0-backup is tpmstate0
        key = device.name.removeprefix("drive-")
        key = key.removesuffix("-backup") if key.startswith("tpmstate") else key
        header = put_line(header, f"#qmdump#map:{key}:{device.name}:{storage}:raw:")
    return header


def require_raw(image_format: str, hint: str) -> None:
    if image_format != "raw":
        what = f"format={escape(image_format)} is not read or written here, only raw"
        raise VmaError(f"{what}: {hint}")


# Where devices are restored to, by name: (path, whether to write zeros), None for nowhere
Places = dict[str, Optional[tuple[str, bool]]]


def parse_map(lines: Iterable[str]) -> tuple[Places, set[str]]:
    """Return what the lines of a map say, and their options that are not applied.

    A line is `[OPTION=VALUE:]...0|1:NAME=PATH` or `skip=NAME`; `done` or an empty line is the last.
    Raises VmaError.
    """
    places: Places = {}
    ignored = set()
    for line in lines:
        text = line.rstrip("\n")
        if text in ("", "done"):
            break
        if text.startswith("skip="):
            places[text.removeprefix("skip=")] = None
            continue
        # A path may hold colons: only options that are known are split off.
        rest = text
        while rest.startswith(("format=", *MAP_LIMITS)):
            option, _, rest = rest.partition(":")
            if option.startswith("format="):
                hint = "extract the disk, then use qemu-img convert"
                require_raw(option.removeprefix("format="), hint)
            else:
                ignored.add(escape(option))
        match = re.fullmatch(r"([01]):([^=]+)=([^\0]+)", rest)
        if not match:
            raise VmaError(
                f"map: {quote(text)} is neither [format=raw:]0|1:NAME=PATH nor skip=NAME"
            )
        places[match[2]] = match[3], match[1] == "1"
    return places, ignored


# ---------------------------------------------------------------------------------------------
# Mount: configs, disks and partitions as files in a directory, served through /dev/fuse. The
# protocol is the kernel's (linux/fuse.h, version 7.31), names are those of its structs, and all
# numbers are in the host's byte order.

FUSE_VERSION = (7, 31)
FUSE_ROOT_ID = 1
FUSE_ASYNC_READ, FUSE_MAX_PAGES = 1 << 0, 1 << 22
FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR = 1 << 1, 1 << 3  # the second one only counts for directories
# len, opcode, unique, nodeid, uid, gid, pid; then what the opcode needs
FUSE_IN_HEADER = struct.Struct("=IIQQIII4x")
FUSE_OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
FUSE_INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
# max_pages
FUSE_INIT_OUT = struct.Struct("=IIIIHHIIH34x")
# ino, size, blocks, atime, mtime, ctime, (nanoseconds,) mode, nlink, uid, gid, (rdev,) blksize
FUSE_ATTR = struct.Struct("=QQQqqq12xIIII4xI4x")
FUSE_ENTRY_OUT = struct.Struct("=QQQQ8x")  # nodeid, generation, entry_valid, attr_valid; then attr
FUSE_ATTR_OUT = struct.Struct("=Q8x")  # attr_valid; then attr
FUSE_OPEN_IN = struct.Struct("=I4x")  # flags
FUSE_OPEN_OUT = struct.Struct("=QI4x")  # fh, open_flags
FUSE_READ_IN = struct.Struct("=8xQI")  # offset, size; of a seek: offset, whence
FUSE_LSEEK_OUT = struct.Struct("=Q")  # offset
FUSE_DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type; then the name, filled up to 8
# blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
FUSE_STATFS_OUT = struct.Struct("=QQQQQIII28x")

FUSE_REQUEST_SIZE = 64 << 10  # the kernel wants at least 8 KiB
FUSE_MAX_READ = 1 << 20  # 256 pages: most kernels take no larger number
FUSE_READ_AHEAD = 4 << 20
FUSE_THREADS = 4
FUSE_VALID = 1 << 30  # seconds for which the kernel may remember what never changes

MNT_DETACH = 2
# Options of `mount -o`, and their flags
MOUNT_OPTIONS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "allow_other": 0}
STILL_IN_USE = "still in use: detached from the directory, and served until it is released"
# Every fourth 16-bit word of an index is a mask; in big-endian order, read from the end.
MASK_STEP = 4 if sys.byteorder == "little" else -4
CLUSTERS_STEP = 1 << 12  # whose masks are looked at in one go
MOUNT_FRAMES = 64  # decompressed frames that are kept, of 1 MiB


class MountedFile:
    """A config as a file of the mount. Sizes and offsets are bytes in the file."""

    def __init__(self, name: str, size: int, data: bytes = b"") -> None:
        self.name = name
        self.size = size
        self.data = data

    @property
    def allocated(self) -> int:
        return self.size

    def read(self, offset: int, size: int, buffer: memoryview) -> Buffer:
        """Return exactly size bytes, perhaps in the buffer of FUSE_MAX_READ and two clusters."""
        return self.data[offset : offset + size]

    def seek(self, offset: int, data: bool) -> int:
        """Return where, from offset on, the next data or the next hole begins; size if nowhere."""
        # As lseek has it, there is a hole behind the end of each file.
        return offset if data else self.size


class MountedDisk(MountedFile):
    """A disk, or `size` bytes of it from `start` on: a partition."""

    zeros = memoryview(bytes(FUSE_MAX_READ))

    def __init__(
        self, name: str, contents: Contents, device: Device, start: int, size: int
    ) -> None:
        super().__init__(name, size)
        self.contents = contents
        self.index = contents.index.devices[device.dev_id]
        # Has the clusters that are missing in index.
        self.base = contents.base_indexes.get(device.dev_id)
        self.start = start

    def _masks(self, first: int, count: int) -> int:
        """Return the masks of the disk's clusters as one number; bit 0 is the first block."""
        entries = memoryview(self.index.entries)[first : first + count]
        if self.base and 0 in entries:
            base = itertools.chain(self.base.slice(first, count), itertools.repeat(0))
            entries = memoryview(array.array("Q", map(operator.or_, entries, base)))
        # In one large number, Python finds and counts bits in C.
        words = entries.cast("B").cast("H")
        return int.from_bytes(words[::MASK_STEP].tobytes(), sys.byteorder)

    @functools.cached_property  # 16 million clusters take a moment
    def allocated(self) -> int:
        bit_counts = bytes(bin(byte).count("1") for byte in range(256))
        block, end = self.start // BLOCK_SIZE, (self.start + self.size) // BLOCK_SIZE
        count = 0
        while block < end:
            first, skip = divmod(block, CLUSTER_BLOCKS)
            step = min(CLUSTERS_STEP * CLUSTER_BLOCKS, end - block)
            # A partition may begin and end in the middle of a cluster.
            bits = self._masks(first, CLUSTERS_STEP + 1) >> skip & (1 << step) - 1
            count += sum(bits.to_bytes(step // 8 + 1, "little").translate(bit_counts))
            block += step
        return count * BLOCK_SIZE

    def read(self, offset: int, size: int, buffer: memoryview) -> Buffer:
        at = self.start + offset
        first = at // CLUSTER_SIZE
        count = -(-(at + size) // CLUSTER_SIZE) - first
        plan = self.contents.plan(self.index.device, first, count)
        image = self.contents.read(plan, buffer).whole()
        self._check_unchanged()  # after the read: a change in between must not pass
        start = at - first * CLUSTER_SIZE
        return self.zeros[:size] if image is None else image[start : start + size]

    def _check_unchanged(self) -> None:
        """Raise VmaError if the archive was written to since it was opened."""
        for source in self.contents.inputs:
            assert isinstance(source, FileInput)
            now, then = os.fstat(source.fd), source.state
            # ctime changes also when another file takes the archive's name. Ours stays as it was.
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise VmaError(f"{source.name}: the archive was changed while it was mounted")

    def seek(self, offset: int, data: bool) -> int:
        first, skip = divmod((self.start + offset) // BLOCK_SIZE, CLUSTER_BLOCKS)
        count = 64  # mostly it is near; if not, the steps grow
        while first * CLUSTER_SIZE < self.start + self.size:
            bits = self._masks(first, count)
            if not data:
                bits ^= (1 << count * CLUSTER_BLOCKS) - 1
            bits = bits >> skip << skip
            if bits:
                block = first * CLUSTER_BLOCKS + (bits & -bits).bit_length() - 1
                return min(max(block * BLOCK_SIZE - self.start, offset), self.size)
            first += count
            count, skip = min(count * 8, CLUSTERS_STEP), 0
        return self.size


def mounted_files(contents: Contents) -> list[MountedFile]:
    """Return the configs, disks and partitions of an archive; raises VmaError for a name twice."""
    files = [MountedFile(name, len(data), data) for name, data in contents.header.configs]
    partitions: list[MountedFile] = []
    for device in contents.header.devices:
        size = contents.index.devices[device.dev_id].disk_size
        files.append(MountedDisk(disk_file_name(device), contents, device, 0, size))
        if not device.is_vmstate:
            _, found, _ = read_table(contents, device)
            for part in found:
                if part.number:  # 0 is the whole disk, which is there already
                    name = partition_file_name(device, part)
                    partitions.append(MountedDisk(name, contents, device, part.start, part.size))
    names = [file.name for file in files]
    refuse_twice(contents.source.name, names)
    for file in partitions:
        # A disk may be called like another one's partition, and is the one that extract writes.
        if file.name not in names and len(encode_name(file.name)) <= NAME_MAX_SIZE:
            files.append(file)
    return files


Reply = Union[Buffer, int]  # data, or an errno


class FuseServer:
    """Answers the kernel's requests about a directory of files that never change.

    Whatever happens, each request gets an answer: the program that waits for it would hang.
    """

    def __init__(
        self, files: Sequence[MountedFile], mode: int, ctime: int, log: Callable[[str], None]
    ) -> None:
        self.fd = -1
        self.files = dict(enumerate(files, FUSE_ROOT_ID + 1))
        self.nodes = {encode_name(file.name): node for node, file in self.files.items()}
        self.mode = mode
        self.ctime = ctime
        self.log = log
        self._mine = threading.local()  # each thread's buffer for what is read
        # By opcode. What is not here, the kernel does without; of FUSE_RELEASE and FUSE_DESTROY, it
        # drops the answer.
        self.handlers = {
            1: self._lookup,  # FUSE_LOOKUP
            3: self._get_attributes,  # FUSE_GETATTR
            14: self._open,  # FUSE_OPEN
            15: self._read,  # FUSE_READ
            17: self._get_status,  # FUSE_STATFS
            26: self._init,  # FUSE_INIT
            27: self._open,  # FUSE_OPENDIR
            28: self._read_directory,  # FUSE_READDIR
            46: self._seek,  # FUSE_LSEEK
        }

    def serve(self) -> None:
        """Answer requests until the directory is unmounted; several threads do so at once."""
        request = memoryview(bytearray(FUSE_REQUEST_SIZE))
        while True:
            try:
                size = os.readv(self.fd, [request])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN):  # a request that was taken back
                    continue
                # unmounted, the second while the kernel handed a request over
                if error.errno not in (errno.ENODEV, errno.ECONNABORTED):
                    self.log(f"/dev/fuse: {system_message(error)}")
                return
            self._answer(request[:size])

    def _answer(self, request: memoryview) -> None:
        _, opcode, unique, node, *_ = FUSE_IN_HEADER.unpack_from(request)
        # The kernel wants no answer to FUSE_FORGET, FUSE_INTERRUPT and FUSE_BATCH_FORGET. What the
        # second one cuts short ends soon anyway.
        if opcode in (2, 36, 42):
            return
        handler = self.handlers.get(opcode)
        try:
            reply = handler(node, request[FUSE_IN_HEADER.size :]) if handler else errno.ENOSYS
            self._send(unique, reply)
        except Exception as error:  # noqa: BLE001 - or the request would stay without an answer
            name = self.files[node].name if node in self.files else "directory"
            known = isinstance(error, (VmaError, OSError))
            self.log(f"{escape(name)}: {error if known else repr(error)}")
            self._send(unique, errno.EIO)

    def _send(self, unique: int, reply: Reply) -> None:
        error, data = (-reply, b"") if isinstance(reply, int) else (0, reply)
        size = FUSE_OUT_HEADER.size + len(data)
        try:
            os.writev(self.fd, [FUSE_OUT_HEADER.pack(size, error, unique), data])
        except OSError as failure:
            # The program that asked was killed, or the directory was unmounted.
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _init(self, node: int, body: memoryview) -> Reply:
        major, _, _, flags = FUSE_INIT_IN.unpack_from(body)
        if major < FUSE_VERSION[0]:
            return errno.EPROTO
        # Without FUSE_MAX_PAGES (before Linux 4.20), reads are of 128 KiB at most.
        flags &= FUSE_ASYNC_READ | FUSE_MAX_PAGES
        background = 16, 12  # requests for which nobody waits, such as reading ahead
        pages = FUSE_MAX_READ // os.sysconf("SC_PAGE_SIZE")
        return FUSE_INIT_OUT.pack(
            *FUSE_VERSION, FUSE_READ_AHEAD, flags, *background, BLOCK_SIZE, 1, pages
        )

    def _attributes(self, node: int) -> bytes:
        # Who may read the files may enter the directory.
        kind, links = stat.S_IFDIR | self.mode | self.mode >> 2, 2
        size = blocks = 0
        if node != FUSE_ROOT_ID:
            file = self.files[node]
            kind, links = stat.S_IFREG | self.mode, 1
            size, blocks = file.size, -(-file.allocated // 512)
        times = [self.ctime] * 3
        owner = os.getuid(), os.getgid()
        return FUSE_ATTR.pack(node, size, blocks, *times, kind, links, *owner, CLUSTER_SIZE)

    def _get_attributes(self, node: int, body: memoryview) -> Reply:
        return FUSE_ATTR_OUT.pack(FUSE_VALID) + self._attributes(node)

    def _lookup(self, node: int, body: memoryview) -> Reply:
        found = self.nodes.get(bytes(body).partition(b"\0")[0])
        if found is None or node != FUSE_ROOT_ID:
            return errno.ENOENT
        return FUSE_ENTRY_OUT.pack(found, 0, FUSE_VALID, FUSE_VALID) + self._attributes(found)

    def _open(self, node: int, body: memoryview) -> Reply:
        (flags,) = FUSE_OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY:  # root may have remounted the directory
            return errno.EROFS
        return FUSE_OPEN_OUT.pack(0, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR)

    def _read(self, node: int, body: memoryview) -> Reply:
        offset, size = FUSE_READ_IN.unpack_from(body)
        file = self.files[node]
        size = min(size, file.size - offset)  # the kernel reads whole pages, also behind the end
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = new_buffer(FUSE_MAX_READ + 2 * CLUSTER_SIZE)
        return file.read(offset, size, self._mine.buffer) if size > 0 else b""

    def _read_directory(self, node: int, body: memoryview) -> Reply:
        done, size = FUSE_READ_IN.unpack_from(body)  # done: how many were listed already
        nodes = [(b".", FUSE_ROOT_ID), (b"..", FUSE_ROOT_ID), *self.nodes.items()]
        # The number of an entry is where the kernel goes on when the next ones did not fit.
        entries = bytearray()
        for number, (name, child) in enumerate(nodes[done:], done + 1):
            kind = stat.S_IFDIR if child == FUSE_ROOT_ID else stat.S_IFREG
            entry = FUSE_DIRENT.pack(child, number, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return entries

    def _seek(self, node: int, body: memoryview) -> Reply:
        offset, whence = FUSE_READ_IN.unpack_from(body)
        file = self.files[node]
        data = whence == os.SEEK_DATA
        if not data and whence != os.SEEK_HOLE:
            return errno.EINVAL
        if offset < file.size:
            found = file.seek(offset, data)
            if found < file.size or not data:
                return FUSE_LSEEK_OUT.pack(found)
        return errno.ENXIO

    def _get_status(self, node: int, body: memoryview) -> Reply:
        blocks = sum(-(-file.size // BLOCK_SIZE) for file in self.files.values())
        sizes = BLOCK_SIZE, NAME_MAX_SIZE, BLOCK_SIZE
        return FUSE_STATFS_OUT.pack(blocks, 0, 0, len(self.files), 0, *sizes)


class MountPoint:
    """A directory to mount on: by system calls as root, else by fusermount, which is setuid."""

    def __init__(self, directory: str, source: str, options: Iterable[str]) -> None:
        self.path = os.path.realpath(directory)
        self.name = escape(directory)
        self.source = source
        self.options = {"ro", "nosuid", "nodev", *options}
        self.is_root = os.geteuid() == 0
        with os_errors_as(self.name):
            os.scandir(self.path).close()  # a mount whose server has died still answers stat

    def set_read_ahead(self) -> None:
        """Make the kernel read ahead more than 128 KiB, when the mount is ready."""
        with suppress(OSError):  # only root may
            device = os.stat(self.path).st_dev
            name = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
            with open(name, "w", encoding="ascii") as file:
                file.write(str(FUSE_READ_AHEAD >> 10))

    def mount(self) -> int:
        """Mount; return the descriptor of /dev/fuse through which the requests come."""
        if not self.is_root:
            return self._mount_as_user()
        with os_errors_as("/dev/fuse"):
            fd = os.open("/dev/fuse", os.O_RDWR)
        flags = sum(MOUNT_OPTIONS[option] for option in self.options)
        # The kernel looks at modes and owners only if it is told to.
        data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        data += ",default_permissions" + ",allow_other" * ("allow_other" in self.options)
        with os_errors_as(self.name):
            try:
                self._call("mount", self.source, self.path, "fuse.vma-tool", flags, data)
            except OSError:
                os.close(fd)
                raise
        return fd

    def _mount_as_user(self) -> int:
        # In an option's value, a comma would begin the next option.
        source = self.source.replace("\\", "\\\\").replace(",", "\\,")
        options = ["default_permissions", "subtype=vma-tool", f"fsname={source}", *self.options]
        failure, fds = self._fusermount("-o", ",".join(options), "--", self.path)
        if not fds:
            raise VmaError(failure or "fusermount gave no descriptor of /dev/fuse")
        os.set_inheritable(fds[0], False)  # or `leave_caller` would close it
        return fds[0]

    def unmount(self) -> bool:
        """Unmount; return False if it is in use and was only detached from the directory."""
        for _ in range(20):
            if self._unmount(lazy=False):
                return True
            time.sleep(0.1)  # a loop device lets go of its file a moment after its own unmount
        self._unmount(lazy=True)
        return False

    def _unmount(self, lazy: bool) -> bool:
        """Unmount; return False if it is in use."""
        if not self.is_root:
            # Only its message says why it failed. What is still mounted then is in use.
            failure, _ = self._fusermount("-u", *["-z"] * lazy, "--", self.path)
            return not failure or not os.path.ismount(self.path)
        try:
            self._call("umount2", self.path, MNT_DETACH * lazy)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else was faster
                raise VmaError(f"{self.name}: {system_message(error)}") from error
        return True

    @staticmethod
    def _call(function: str, *args: str | int) -> None:
        """Call a function of the C library; raises OSError."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        # mount's flags are an unsigned long. By itself, ctypes would hand on an int.
        plain = [ctypes.c_ulong(a) if isinstance(a, int) else os.fsencode(a) for a in args]
        if libc[function](*plain):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    @staticmethod
    def _fusermount(*args: str) -> tuple[str, list[int]]:
        """Run fusermount; return why it failed, if it did, and the descriptors that it sent."""
        import shutil
        import socket
        import subprocess

        program = shutil.which("fusermount3") or shutil.which("fusermount")
        if program is None:
            raise VmaError("only root mounts without fusermount3 (Debian package: fuse3)")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            answer = subprocess.run(
                [program, *args],
                env={**os.environ, "LC_ALL": "C", "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
            theirs.close()  # so that there is an end if nothing was sent
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if not answer.returncode:
            return "", fds
        # Of several lines, the last one is the reason.
        message = answer.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return escape(message) or f"{program}: exit status {answer.returncode}", fds


def awaited_signals() -> set[signal.Signals]:
    """Return the signals that end a mount, which wait for `sigwait`.

    SIGCHLD is among them: it says that the command or a thread has ended, and else does nothing.
    """
    # A signal that the caller ignores (nohup) stays ignored.
    numbers = {n for n in ENDING_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    return numbers | {signal.SIGCHLD}


def serve(server: FuseServer, point: MountPoint, signals: set[signal.Signals]) -> None:
    """Serve until the directory is unmounted; a signal unmounts it."""
    caller = threading.get_ident()
    ended: list[None] = []

    def work() -> None:
        try:
            server.serve()
        finally:
            ended.append(None)
            # Wakes `sigwait` below, which would not notice the end of a thread.
            signal.pthread_kill(caller, signal.SIGCHLD)

    for _ in range(FUSE_THREADS):
        start_thread(work)
    point.set_read_ahead()
    detached = False
    while len(ended) < FUSE_THREADS:
        if signal.sigwait(signals) == signal.SIGCHLD:
            continue
        if detached:  # the second signal ends it, even for those who still read
            return
        detached = not point.unmount()
        if detached:
            server.log(f"{point.name}: {STILL_IN_USE}, or until another signal")


def wait_for_threads() -> None:
    """Wait until this thread is the only one: others have done their work, but may still end."""
    # A lock that one of them holds would stay locked in a child process, where it does not exist.
    end = time.monotonic() + 2
    with suppress(OSError):  # no /proc
        while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < end:
            time.sleep(0.001)


def start_server(
    server: FuseServer, point: MountPoint, signals: set[signal.Signals], keep_stderr: bool
) -> int:
    """Serve in a child process; return its process id when the mount is ready."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()  # or the child might write it once more
    wait_for_threads()
    pid = os.fork()
    if not pid:
        try:
            leave_caller(keep_stderr)
            serve(server, point, signals)
        except Exception as error:  # noqa: BLE001 - the child must not go on as the parent does
            server.log(repr(error))
        finally:
            os._exit(0)
    os.close(server.fd)  # the mount ends with the child only if nobody else has it open
    with os_errors_as(point.name):
        os.statvfs(point.path)  # the child answers, or the kernel if the child has died
    return pid


def leave_caller(keep_stderr: bool) -> None:
    """Let go of the terminal, the working directory and the files that the caller left open."""
    os.setsid()  # Ctrl-C in the terminal is not for the mount
    os.chdir("/")  # the caller's may be on a file system that somebody wants to unmount
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(2 if keep_stderr else 3):
        os.dup2(null, fd)
    # What is inheritable was inherited: a lock, or a pipe whose reader waits for its end.
    with suppress(OSError):  # no /proc
        for fd in map(int, os.listdir("/proc/self/fd")):
            with suppress(OSError):  # the listing's own descriptor
                if fd > 2 and os.get_inheritable(fd):
                    os.close(fd)


def run_command(command: Sequence[str], signals: set[signal.Signals]) -> int:
    """Run a command; return its exit status as a shell has it."""
    with os_errors_as(escape(command[0])):
        pid = os.posix_spawnp(
            command[0],
            list(command),
            os.environ,
            # Blocked here, these signals must still reach the command.
            setsigmask=signal.pthread_sigmask(signal.SIG_BLOCK, ()) - signals,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
        )
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        number = signal.sigwait(signals)
        if number in (signal.SIGTERM, signal.SIGHUP):  # Ctrl-C goes to the command anyway
            os.kill(pid, number)


def log_to_syslog(text: str) -> None:
    """Log an error of a mount in the background, where nobody reads standard error."""
    import syslog

    syslog.openlog("vma-tool", syslog.LOG_PID, syslog.LOG_DAEMON)
    syslog.syslog(syslog.LOG_ERR, text)


# ---------------------------------------------------------------------------------------------
# Rescue: recover disks from a damaged archive. Its bytes slide through a window, with notes on what
# of them is lost, doubtful or missing

RESCUE_NAME = "rescue.json"
# What one view of a window holds; it grows where that is not enough.
PLAIN_VIEW_SIZE = 5888 << 10  # an extent and a half
DECODED_VIEW_SIZE = 6 << 20
PACKED_VIEW_SIZE = 3 << 20
PLAIN_PIECE_SIZE = 256 << 10
READ_SIZE = 1 << 20
WRITE_SIZE = 1 << 20
PATTERN_MAX_SIZE = 32  # longer than any match of `Window.search`
PAGE_SIZE = 4096  # the kernel reads files by the page: one bad sector costs all of it
# Errors of a damaged disk or file system. After any other error, nothing more can be read.
DAMAGE_ERRORS = {
    getattr(errno, name, errno.EIO)
    for name in ("EIO", "ENODATA", "EBADMSG", "EUCLEAN", "EREMOTEIO", "EILSEQ")
}
Range = tuple[int, int]  # start and end in bytes; the end is exclusive


class Flaw(NamedTuple):
    """Damage to an archive, by the offset in bytes in the plain archive."""

    offset: int
    text: str


class Salvage:
    """The readable bytes of a damaged archive, in order.

    Lost bytes read as zeros; at a break, an unknown number of bytes is missing. Offsets count the
    bytes as they are read. `lost`, `doubtful`, `breaks` and `seams` are ascending, and complete up
    to the last piece that was waited for. What begins at a seam has one checksum, too far away to
    wait for: if it does not match, `failed` has its range in the end.
    """

    ahead = 4  # pieces that may be read at the same time
    is_decoded = False

    def __init__(self, thread_count: int) -> None:
        self.workers = Workers(thread_count)
        self.lost: list[Range] = []
        self.doubtful: list[Range] = []
        self.breaks: list[int] = []
        self.seams: list[int] = []
        self.failed: list[Range] = []
        self.flaws: list[Flaw] = []
        self.needed = 1  # bytes of room for the next piece

    def begin(self, view: memoryview) -> tuple[int, Call] | None:
        """Begin to read the next piece to the start of view; None if that is too small.

        Return its size, and a call that returns how many bytes there are: fewer at the end.
        """
        raise NotImplementedError

    def index(self, header: Header) -> ArchiveIndex | None:
        """Return the archive's index, if there is one."""
        return None

    def is_sound(self, start: int, end: int) -> bool:
        """Say whether all bytes from start to end are there, and none is doubtful."""
        return not (overlaps(self.lost, start, end) or overlaps(self.doubtful, start, end))

    def has_break(self, start: int, end: int) -> bool:
        """Say whether bytes are missing somewhere from start to end, both included."""
        return bisect.bisect_left(self.breaks, start) < bisect.bisect_right(self.breaks, end)


def overlaps(ranges: Sequence[Range], start: int, end: int) -> bool:
    """Say whether one of ascending ranges has bytes between start and end."""
    i = bisect.bisect_left(ranges, (end, 0))
    return i > 0 and ranges[i - 1][1] > start


class RawSalvage(Salvage):
    """A file or pipe as it is; pages of a file that cannot be read are lost."""

    def __init__(self, file: Input, piece_size: int) -> None:
        super().__init__(1)
        self.file = file
        self.needed = piece_size
        # A large read may fail for any of its sectors. By the page, only bad pages are lost.
        self._failing = False
        self._last: Call | None = None

    def begin(self, view: memoryview) -> tuple[int, Call] | None:
        if len(view) < self.needed:
            return None
        self._last = self.workers.submit(Call(self._read, view[: self.needed]))
        return self.needed, self._last

    def close(self) -> None:
        """End the thread."""
        self.workers.close()
        # The file's descriptor may soon be that of another one, from which nothing may be read. A
        # pipe may never give anything more.
        if self._last and self.file.raw:
            self._last.wait(-1)

    def _read(self, view: memoryview) -> int:
        count = 0
        while count < len(view):
            offset = self.file.offset
            page = view[count : count + PAGE_SIZE - offset % PAGE_SIZE]
            try:
                got = self.file.file.readinto(page if self._failing else view[count:])
            except OSError as error:
                # A pipe cannot seek, so nothing after an error can be read.
                if self.file.raw is None or error.errno not in DAMAGE_ERRORS:
                    message = f"{self.file.name}: offset 0x{offset:x}: {system_message(error)}"
                    raise VmaError(message) from error
                if not self._failing:
                    self._failing = True
                    continue
                # Up to the next whole page, or the end. So the reads that follow are aligned.
                got = min(len(page), self.file.raw_size - offset)
                page[:got] = bytes(got)
                self._lose(offset, got, error)
                self.file.raw.seek(offset + got)
            else:
                self._failing = False
            if not got:
                break
            self.file.offset += got
            count += got
        return count

    def _lose(self, offset: int, size: int, error: OSError) -> None:
        if not self.lost or self.lost[-1][1] != offset:
            self.lost.append((offset, offset))
            self.flaws.append(Flaw(offset, f"cannot be read: {system_message(error)}"))
        self.lost[-1] = self.lost[-1][0], offset + size


class Window:
    """A part of a Salvage's bytes that only moves forward, read ahead by threads.

    Views of it are valid until the next call.
    """

    def __init__(self, source: Salvage, size: int) -> None:
        self.source = source
        self.end = 0  # of the bytes that have been read
        self._begun = 0  # of those that are being read
        self._pieces: collections.deque[tuple[int, Call]] = collections.deque()
        self._view = new_buffer(size)
        self._next_view = new_buffer(size)  # where it goes on when this one is full
        self._base = 0  # offset of the view's first byte
        self._kept = 0  # bytes before this offset may go
        self._ended = False
        self.uses: Callable[[], Collection[Call]] = tuple  # of views, in other threads
        self._used: Collection[Call] = ()  # those of the next view
        self.progress: Progress | None = None

    def forget(self, offset: int) -> None:
        """Let the bytes before an offset go."""
        self._kept = max(self._kept, min(offset, self.end))

    def peek(self, offset: int, size: int) -> memoryview:
        """Return the bytes from an offset on: fewer if the end or a break comes before."""
        self._fill(offset + size)
        end = min(offset + size, self.end)
        breaks = self.source.breaks
        following = bisect.bisect_right(breaks, offset)
        if following < len(breaks):
            # The bytes before and after a break do not belong together.
            end = min(end, breaks[following])
        return self._view[offset - self._base : max(end, offset) - self._base]

    def skip(self, offset: int) -> None:
        """Read up to an offset, and let everything before it go."""
        # Piece by piece: one call would need a window for all of it.
        while self.end < offset and not self._ended:
            self.forget(self.end)
            self._fill(min(offset, self.end + READ_SIZE))

    def ends_at(self, offset: int) -> bool:
        """Say whether an offset is the end of everything."""
        self._fill(offset + 1)
        return self._ended and offset == self.end

    def search(self, pattern: re.Pattern[bytes], start: int, stop: int | None = None) -> int | None:
        """Return where pattern first occurs from start on, and before stop if given; else None.

        Without stop, the bytes searched may go.
        """
        while True:
            limit = start + READ_SIZE if stop is None else min(start + READ_SIZE, stop)
            self._fill(limit + PATTERN_MAX_SIZE)
            # A match may begin before the limit and end after it.
            end = min(limit + PATTERN_MAX_SIZE, self.end) - self._base
            match = pattern.search(self._view, start - self._base, end)
            if match and (stop is None or match.start() + self._base < stop):
                return match.start() + self._base
            if limit == stop or limit >= self.end:
                return None
            start = limit
            if stop is None:
                self.forget(start)

    def _fill(self, end: int) -> None:
        """Read up to an offset, and let the threads go on reading."""
        while True:
            has_room = self._begin()
            # Moving costs a copy: it waits until it must be, or until most of the view is free.
            waits = self.end < end and not self._pieces
            if not has_room and (waits or self._kept - self._base > len(self._view) * 3 // 4):
                self._move(end)
            # What is there is taken even if nobody needs it yet: so the threads go on.
            elif self._pieces and (self.end < end or self._pieces[0][1].is_done()):
                self._take()
            else:
                return

    def _begin(self) -> bool:
        """Begin to read as many pieces as may be; return False if the view has no room for one."""
        while not self._ended and len(self._pieces) < self.source.ahead:
            piece = self.source.begin(self._view[self._begun - self._base :])
            if piece is None:
                return False
            self._begun += piece[0]
            self._pieces.append(piece)
        return True

    def _take(self) -> None:
        """Wait for the first piece."""
        size, call = self._pieces.popleft()
        self._ended = True  # if it fails
        count = call.result()
        self.end += count
        self._ended = not size or count < size
        if self._ended:  # those that follow are empty
            self._pieces.clear()
        if self.progress:
            self.progress.tick()

    def _move(self, end: int) -> None:
        """Go on in the next view, which has room up to an offset."""
        for call in self._used:
            call.result()
        self._used = tuple(self.uses())
        size = max(end, self._begun) - self._kept + self.source.needed
        if size > len(self._next_view):
            self._next_view = new_buffer(size)
        kept = self._view[self._kept - self._base : self._begun - self._base]
        self._view, self._next_view = self._next_view, self._view
        self._base = self._kept
        # The first pieces are still read into the old view. Meanwhile others go into the new one.
        for _ in range(len(self._pieces)):
            if self._pieces:
                self._take()
                self._begin()
        self._view[: len(kept)] = kept


# ---------------------------------------------------------------------------------------------
# Rescue, compressed files: a class for each codec decompresses what is left. What its own checksum
# does not vouch for is doubtful

PACKED_ROOM = PIECE_SIZE + (64 << 10)  # of a frame of ours
PIECE_ROOM = FRAME_MAX_SIZE + (64 << 10)  # compressed bytes of the largest frame or block
HELD_SIZE = 2 << 20  # bytes that wait for their checksum
DECODE_SIZE = 64 << 10  # bytes that one call decompresses
KEPT_SIZE = 2 * FRAME_BLOCK_MAX  # bytes behind the position to which a decoder may go back
ZSTD_PATTERN = re.compile(re.escape(ZSTD_MAGICS[0]))
XZ_HEADER_SIZE = 12
XZ_FEED_SIZE = 4 << 10  # what it makes of bytes among which is damage, it does not give
XZ_CHECK_SIZES = {0: 0, 1: 4, 4: 8, 10: 32}  # none, CRC32, CRC64, SHA-256
BZIP2_MAGICS = BZIP2_BLOCK, BZIP2_END = 0x314159265359, 0x177245385090  # of 48 bits, at any bit
BZIP2_START = 32  # bits in front of the first block
# The five whole bytes in a magic, by the bit that it begins at; `_next_bits` compares the others.
BZIP2_PATTERN = re.compile(
    b"|".join(
        re.escape((magic >> shift & (1 << 40) - 1).to_bytes(5, "big"))
        for magic in BZIP2_MAGICS
        for shift in range(8)
    )
)
LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"
# What its program writes when it reads a pipe: an Adler-32 of each block's data, no name, no time
LZOP_USUAL_FLAGS = 1
LZOP_USUAL_HEADER = LZOP_MAGIC + bytes.fromhex(
    "1040 20A0 0940 01 05 00000001 00000000 00000000 00000000 00 1E810161"
)
LZOP_BLOCK_SIZE = 256 << 10
LZOP_BLOCK = struct.Struct(">II")  # sizes, plain and stored
# lzop makes blocks of 256 KiB; no block is stored larger than that.
LZOP_BLOCK_PATTERN = re.compile(rb"(?s)\x00\x04\x00\x00\x00[\x00-\x04]..")
CUT_TEXT = "the file is cut short"
SOUND, DOUBTFUL, LOST = range(3)


class Chunk(NamedTuple):
    """Decompressed bytes and their state; lost ones are zeros. `flaw` is what is wrong with them.

    Behind a break an unknown number of bytes is missing. At a seam begins what has one checksum,
    about which a later chunk says `failed` if it does not match.
    """

    data: Buffer = b""
    flaw: str = ""
    state: int = SOUND
    is_break: bool = False
    is_seam: bool = False
    failed: bool = False


class WholeFrame(NamedTuple):
    """A zstd frame to be decompressed, of `size` bytes then."""

    data: memoryview  # of a window
    size: int
    position: int  # of the frame in the file
    is_known: bool  # the seek table says so, too


Task = Union[Chunk, Callable[[], "list[Chunk]"]]  # what is known, or is to be decompressed


class Decoder:
    """Decompresses what is left of a file; `position` is its offset in the compressed file."""

    def __init__(self, file: Input, window: Window, workers: Workers) -> None:
        self.file = file
        self.window = window
        self.workers = workers
        self.position = 0

    def chunks(self) -> Iterator[Chunk | WholeFrame]:
        """Yield everything that can be decompressed, in order."""
        raise NotImplementedError

    def frame_chunks(self, frame: WholeFrame, view: memoryview) -> list[Chunk]:
        """Decompress a frame into view; return what is to be noted about it, if anything."""
        raise NotImplementedError

    def index(self, header: Header) -> ArchiveIndex | None:
        """Return the archive's index, if there is one."""
        return None

    def flaw(self, text: object, position: int | None = None) -> str:
        return f"at byte {self.position if position is None else position} of the file: {text}"

    def feed(self, size: int) -> bytes:
        """Return up to size of the next bytes, and pass over them; raises CutError at the end."""
        data = bytes(self.window.peek(self.position, size))
        if not data:
            raise CutError(CUT_TEXT)
        self.position += len(data)
        # Some is kept: a decompressor may not need all of it, or have read too far.
        self.window.forget(self.position - KEPT_SIZE)
        return data

    def take(self, size: int) -> bytes:
        """Return exactly the next size bytes, and pass over them; raises CutError."""
        if len(self.window.peek(self.position, size)) < size:
            raise CutError(CUT_TEXT)
        return self.feed(size) if size else b""

    def in_order(self, tasks: Iterable[Task]) -> Iterator[Chunk]:
        """Do tasks in threads; yield their chunks in the order of the tasks."""
        pending: collections.deque[Call] = collections.deque()
        for task in tasks:
            # A chunk that is there already waits for its turn like the others.
            call = Call(list, [task]) if isinstance(task, Chunk) else Call(task)
            pending.append(self.workers.submit(call))
            # One more than there are threads, so that none is idle while its result is taken.
            if len(pending) > processor_count():
                yield from pending.popleft().result()
        for call in pending:
            yield from call.result()

    def under_checksum(self, parts: Iterator[bytes]) -> Generator[Chunk, None, FormatError | None]:
        """Yield parts that have one checksum; return the error that parts raises, if any.

        It makes all of them doubtful, unless it is a CutError: the file ends before the checksum.
        """
        start = self.position
        held: list[bytes] = []
        size = 0
        is_open = False
        error = None
        try:
            for data in parts:
                held.append(data)
                size += len(data)
                if size > HELD_SIZE:  # what follows would take too much memory: it is known late
                    for each in held:
                        yield Chunk(each, is_seam=not is_open)
                        is_open = True
                    held.clear()
        except FormatError as caught:
            error = caught
        failed = error is not None and not isinstance(error, CutError)
        # What could not be read is wrong, with or without a checksum.
        failed = failed or overlaps(self.window.source.lost, start, self.position)
        yield from (Chunk(each, state=DOUBTFUL if failed else SOUND) for each in held)
        if is_open:
            yield Chunk(is_seam=True, failed=failed)
        return error


class DecodedSalvage(Salvage):
    """The readable bytes of a damaged compressed file."""

    is_decoded = True

    def __init__(self, file: Input, window: Window, codec: str) -> None:
        super().__init__(processor_count())
        self._decoder = DECODERS[codec](file, window, self.workers)
        self._chunks = self._decoder.chunks()
        self.ahead = 2 * processor_count() + 2
        # Frames are decompressed right from the window, where they stay until that is done.
        self._calls: collections.deque[Call] = collections.deque(maxlen=self.ahead)
        window.uses = lambda: self._calls
        self._next: WholeFrame | None = None  # waits for room
        self._data = memoryview(b"")  # rest of a chunk
        self._end = 0  # of the bytes in all chunks

    def begin(self, view: memoryview) -> tuple[int, Call] | None:
        while not (self._data or self._next):
            chunk = next(self._chunks, None)
            if isinstance(chunk, Chunk):
                self._record(self._end, chunk)
                self._data = memoryview(chunk.data)
                self._end += len(self._data)
            else:
                self._next = chunk
                if chunk is None:  # the end: a piece of no bytes
                    break
        frame = self._next
        self.needed = frame.size if frame else min(len(self._data), 1)
        if len(view) < self.needed:
            return None
        self.needed = 1
        if frame is None:
            part = self._data[: len(view)]
            view[: len(part)] = part
            self._data = self._data[len(part) :]
            call = Call(len, part)
            call.run()
            return len(part), call
        self._next = None
        call = Call(self._decompress, frame, view[: frame.size], self._end)
        self._end += frame.size
        self._calls.append(call)
        return frame.size, self.workers.submit(call)

    def index(self, header: Header) -> ArchiveIndex | None:
        return self._decoder.index(header)

    def _decompress(self, frame: WholeFrame, view: memoryview, start: int) -> int:
        """Decompress a frame into view, and return its size."""
        for chunk in self._decoder.frame_chunks(frame, view):
            self._record(start, chunk)
            start += len(chunk.data)
        return frame.size

    def _record(self, start: int, chunk: Chunk) -> None:
        """Enter what is to be noted about a chunk into the lists."""
        end = start + len(chunk.data)
        if chunk.flaw:
            self.flaws.append(Flaw(start, chunk.flaw))
        if chunk.state != SOUND and start < end:
            # Frames are decompressed in any order.
            bisect.insort(self.lost if chunk.state == LOST else self.doubtful, (start, end))
        if chunk.is_break:
            bisect.insort(self.breaks, end)
        if chunk.failed:
            self.failed.append((self.seams[-1], start))
        if chunk.is_seam:
            self.seams.append(start)


class ZstdDecoder(Decoder):
    """zstd: small frames at once; large, damaged and empty ones block by block."""

    def __init__(self, file: Input, window: Window, workers: Workers) -> None:
        super().__init__(file, window, workers)
        zstd = Zstd.load()
        if zstd is None:
            raise VmaError(f"{file.name}: zstd is missing here: install the package libzstd1")
        self._library = zstd
        start = array.array("Q", [0])
        self._table = SeekTable(start, start, 0)  # of no frames
        self._index_place = 0, 0  # where the index is in the file
        with suppress(FormatError, OSError, ValueError, struct.error):
            end = file.raw_size
            footer = self._read(max(end - SEEK_FOOTER.size, 0), end)
            start_of_table = end - (parse_seek_footer(footer) or 0)
            # Frames may be missing before it, and the index may not be where it says.
            self._table = parse_seek_table(self._read(start_of_table, end), sys.maxsize)
            base = max(start_of_table - PIECE_ROOM, 0)
            index = base + self._read(base, start_of_table).rindex(INDEX_NAME) - SKIPPABLE.size
            self._index_place = index, start_of_table
        self._number = self._locate(0)  # of the next frame in the table, -1 if that is not known
        self._given = 0  # bytes of the frame that is read block by block

    def _read(self, start: int, end: int) -> bytes:
        """Return bytes at any place of the file; raises OSError if it is none."""
        if self.file.raw is None or not hasattr(os, "pread"):
            raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
        return os.pread(self.file.raw.fileno(), end - start, start)

    def index(self, header: Header) -> ArchiveIndex | None:
        with suppress(FormatError, OSError):
            masks = parse_index(self._library, self._read(*self._index_place), self.file.raw_size)
            return index_archive(header.size, canonical_order(header.devices), masks, self._table)
        return None

    def _locate(self, position: int, sizes: tuple[int, int] | None = None) -> int:
        """Return the number of the frame that the table has at a position, -1 if none.

        With its sizes, compressed and not, they must match.
        """
        starts = self._table.compressed_offsets
        # Behind bytes that are missing or were added, all frames are as far off as the index is.
        for shift in (0, self._index_place[0] - starts[-1]):
            number = bisect.bisect_left(starts, position - shift)
            is_start = number < len(starts) > 1 and starts[number] == position - shift
            if is_start and sizes in (None, self._sizes(number)):
                return number
        return -1

    def _sizes(self, number: int) -> tuple[int, int] | None:
        """Return the sizes, compressed and not, of a frame by the seek table."""
        plain, stored, _ = self._table
        if not 0 <= number < len(plain) - 1:
            return None
        return stored[number + 1] - stored[number], plain[number + 1] - plain[number]

    def chunks(self) -> Iterator[Chunk | WholeFrame]:
        while len(data := self.window.peek(self.position, SKIPPABLE.size)):
            magic, size = SKIPPABLE.unpack(bytes(data).ljust(SKIPPABLE.size, b"\0"))
            if magic in SKIPPABLE_MAGICS:
                yield from self._skip(magic, self.position + SKIPPABLE.size + int(size))
            else:
                yield from self._frame()
            self.window.forget(self.position)

    def _skip(self, magic: int, end: int) -> Iterator[Chunk]:
        """Pass over a skippable frame, unless its size is damaged."""
        try:
            is_end = self._read(end, end + 4) in ZSTD_MAGICS or end == self.file.raw_size
        except OSError:  # nobody can look
            is_end = True
        if is_end:
            self.window.skip(end)
            self.position = end
            return
        # In an index is a frame, too, whose content does not belong to the archive.
        text = self.flaw("a skippable frame is damaged")
        yield Chunk(flaw=text, is_break=magic == INDEX_MAGIC)
        self._next_frame(self.position + 1)

    def _frame(self) -> Iterator[Chunk | WholeFrame]:
        """Yield the frame at the position, or what is left of it."""
        start, expected = self.position, self._number
        data, head, size, error = self._look()
        plain = head.content_size if head else None
        number = self._locate(start, (size, plain or 0))
        self._number = number if number >= 0 else self._locate(start)
        if number > expected >= 0:
            lost = self._table.offsets[number] - self._table.offsets[expected]
            yield self._lost(lost, self.flaw("frames are missing"))
        is_next = bytes(data[size : size + 4]) in (b"", *ZSTD_MAGICS)
        if plain and plain <= FRAME_MAX_SIZE and not error and is_next:
            self.position += size
            self._number += 1 if self._number >= 0 else 0
            yield WholeFrame(data[:size], plain, start, number >= 0)
            return
        header = bytes(data[len(STORED_HEADER) : len(STORED_HEADER) + EXTENT_HEADER_SIZE])
        if is_whole_extent_header(header):  # whatever has hit the bytes in front of it
            self.position += len(STORED_HEADER) + EXTENT_HEADER_SIZE
            yield Chunk(header, self.flaw(error or "the zstd frame is damaged", start))
            self._number = self._locate(self.position)
            return
        self._given = 0
        if head:
            error = yield from self.under_checksum(self._blocks(head))
            is_next = bytes(self.window.peek(self.position, 4)) in (b"", *ZSTD_MAGICS)
            if error is None and (is_next or head.has_checksum):
                self._number += 1 if self._number >= 0 else 0
                return
        if not start and re.search(WINDOW_MESSAGES, str(error)):
            raise window_error(self.file.name)  # nothing is damaged
        text = self.flaw(error or "the zstd frame is damaged", start)
        known = self._sizes(self._number)
        end = start + known[0] if known else -1
        is_kept = end >= self.position - KEPT_SIZE
        if known and is_kept and bytes(self.window.peek(end, 4)) in ZSTD_MAGICS:
            # The next frame is where the table has it: so no byte of this one is missing.
            self.position = end
            self._number += 1
            yield self._lost(known[1] - self._given, text)
            return
        if is_next and self._given == plain:  # all blocks were there, only the checksum differs
            yield Chunk(flaw=text)
            return
        first = self._number
        self._next_frame(max(start + 1, self.position - FRAME_BLOCK_MAX - 3))
        self._number = self._locate(self.position)
        lost = -1
        if self._number > first >= 0:
            lost = self._table.offsets[self._number] - self._table.offsets[first] - self._given
        yield self._lost(lost, text)

    def _lost(self, size: int, text: str) -> Chunk:
        """Return zeros for lost bytes, or a break if it is not known how many, or too many."""
        if 0 <= size <= FRAME_MAX_SIZE:
            return Chunk(bytes(size), text, LOST)
        return Chunk(flaw=text, is_break=True)

    def _look(self) -> tuple[memoryview, Frame | None, int, FormatError | None]:
        """Return the next bytes, the start of the frame in them, its size, and its fault if any."""
        head, error = None, None
        for room in PACKED_ROOM, PIECE_ROOM:  # the first one is enough for frames of ours
            data = self.window.peek(self.position, room)
            try:
                head = parse_frame_start(data)
                return data, head, parse_frame(data).size, None
            except FormatError as caught:
                error = caught
            # Of a large frame, the end is not looked for: it is read block by block.
            is_small = head is None or (head.content_size or sys.maxsize) <= FRAME_MAX_SIZE
            if not (is_small and isinstance(error, CutError)):
                break
        return data, head, 0, error

    def frame_chunks(self, frame: WholeFrame, view: memoryview) -> list[Chunk]:
        try:
            self._library.decompress_into(frame.data, view)
        except FormatError as error:
            count = self._library.decompress_damaged(frame.data, view)
            text = self.flaw(error, frame.position)
            rest = Chunk(view[count:], state=LOST, is_break=not frame.is_known)
            return [Chunk(view[:count], text, DOUBTFUL), rest]
        return []

    def _next_frame(self, start: int) -> None:
        """Go on to the next frame from start on that decompresses, or that is too large to try."""
        while (found := self.window.search(ZSTD_PATTERN, start)) is not None:
            self.position, start = found, found + 1
            data = self.window.peek(found, PIECE_ROOM)
            # Four bytes like the magic are also in compressed data: it takes a whole frame to tell.
            try:
                size, content_size, _ = parse_frame(data)
                if content_size is not None and content_size <= FRAME_MAX_SIZE:
                    view = memoryview(bytearray(content_size))
                    self._library.decompress_into(data[:size], view)
            except CutError:
                return
            except FormatError:
                continue
            return
        self.position = self.window.end

    def _blocks(self, head: Frame) -> Iterator[bytes]:
        """Yield the contents of a frame's blocks; raises FormatError, at last for its checksum."""
        try:
            for data in self._library.stream(self._pieces(head)):
                self._given += len(data)
                yield data
        except CutError as error:
            # A block's damaged size may reach behind the end, over whole frames.
            position = self.position
            self._next_frame(max(position - FRAME_BLOCK_MAX, 1))
            if self.window.ends_at(self.position):
                raise
            self.position = position
            raise FormatError(str(error)) from None

    def _pieces(self, head: Frame) -> Iterator[bytes]:
        """Yield a frame's header, each of its blocks, and its checksum, if it has one."""
        yield self.take(head.size)
        last = 0
        while not last:
            start = self.take(3)
            block = int.from_bytes(start, "little")
            last, kind, size = block & 1, block >> 1 & 3, block >> 3
            if kind == 3 or size > FRAME_BLOCK_MAX:
                raise FormatError("the zstd frame is damaged: no block")
            # RFC 3.1.1.2: of kind 1, one byte stands for `size` equal ones.
            yield start + self.take(1 if kind == 1 else size)
        if head.has_checksum:
            yield self.take(4)


class GzipDecoder(Decoder):
    """gzip: members, in which damage is noticed late, or only by the checksum at the end."""

    _has_ended = False  # the member's data, so that what follows can be read
    _is_complete = False  # as many bytes as the member says

    def chunks(self) -> Iterator[Chunk]:
        while len(data := self.window.peek(self.position, DECODE_SIZE)):
            if self.position and bytes(data[:2]) != b"\x1f\x8b":
                # gzip ignores zeros there, too: a tape pads its blocks with them.
                if any(data):
                    yield Chunk(flaw=self.flaw("garbage behind the end"))
                return
            # Nothing in it is checked: only where it ends matters to the data.
            self.position += gzip_header_size(bytes(data))
            self._is_complete = self._has_ended = False
            error = yield from self.under_checksum(self._member())
            if error:
                yield Chunk(flaw=self.flaw(error), is_break=not self._is_complete)
            if not self._has_ended:
                # Deflate refers to the 32 KiB before: without them, nothing more decompresses.
                return

    def _member(self) -> Iterator[bytes]:
        """Yield a member's data; raises FormatError, also if its checksum does not match."""
        import zlib

        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        crc, size = 0, 0
        while not decoder.eof:
            # Its output is limited: a piece may decompress to a thousand times its size.
            piece = decoder.unconsumed_tail or self.feed(DECODE_SIZE)
            try:
                data = decoder.decompress(piece, DECODE_SIZE)
            except zlib.error as error:
                raise FormatError(str(error)) from None
            if data:
                crc, size = zlib.crc32(data, crc), size + len(data)
                yield data
        self.position -= len(decoder.unused_data)
        self._has_ended = True
        expected = struct.pack("<II", crc, size & 0xFFFFFFFF)  # RFC 1952 2.3.1: CRC32, ISIZE
        stored = bytes(self.window.peek(self.position, len(expected)))
        self.position += len(stored)
        self._is_complete = stored[4:] == expected[4:]
        if stored != expected[: len(stored)]:
            raise FormatError("the checksum does not match")
        if len(stored) < len(expected):
            raise CutError("the file is cut short in its checksum")


class XzDecoder(Decoder):
    """xz, up to the damage: Proxmox does not restore it."""

    def chunks(self) -> Iterator[Chunk]:
        import lzma

        while len(start := self.window.peek(self.position, XZ_HEADER_SIZE)):
            if self.position and not any(start):  # padding behind a stream
                self.position += len(start)
                continue
            check_size = XZ_CHECK_SIZES.get(start[7] & 15 if len(start) > 7 else 0, 64)
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            end: int | None = self.position + XZ_HEADER_SIZE
            while end is not None:
                # Where sizes are given, each block has a checksum of its own; else all have one.
                end = self._block_end(end, check_size)
                error = yield from self.under_checksum(self._data(decoder, end))
                if error:
                    yield Chunk(flaw=self.flaw(error), is_break=True)
                    return

    def _block_end(self, start: int, check_size: int) -> int | None:
        """Return where the block at start ends, None if its header does not tell."""
        head = bytes(self.window.peek(start, 1024))
        # The block header: its size, flags, the sizes of the block compressed and not
        if len(head) < 16 or not head[0] or head[1] & 0xC0 != 0xC0:
            return None
        size = shift = 0
        for byte in head[2:11]:
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return start + 4 * (head[0] + 1) + -(-size // 4) * 4 + check_size

    def _data(self, decoder: Any, end: int | None) -> Iterator[bytes]:
        """Yield what decompresses up to a place in the file, or to the stream's end."""
        import lzma

        while not decoder.eof and (end is None or self.position < end or not decoder.needs_input):
            piece = b""
            if decoder.needs_input:
                room = XZ_FEED_SIZE if end is None else min(end - self.position, XZ_FEED_SIZE)
                piece = self.feed(room)
            try:
                data = decoder.decompress(piece, DECODE_SIZE)
            except lzma.LZMAError as error:
                raise FormatError(str(error)) from None
            if data:
                yield data
        self.position -= len(decoder.unused_data)


class Bzip2Decoder(Decoder):
    """bzip2: blocks of up to 900 KB, each with its own checksum, that begin at any bit."""

    def chunks(self) -> Iterator[Chunk]:
        return self.in_order(self._blocks())

    def _blocks(self) -> Iterator[Task]:
        """Yield a task for each block."""
        combined = 0
        bit, magic = self._next_bits(0)
        if bit != BZIP2_START:
            yield Chunk(flaw=self.flaw("damaged", 0), is_break=True)
        while bit is not None:
            self.window.forget(bit // 8)
            # A block's CRC follows its magic; the CRC of all blocks follows the end's.
            crc = self._bits(bit + 48, 32)
            self.position = bit // 8
            if magic == BZIP2_END:
                if combined != crc:
                    yield Chunk(flaw=self.flaw("wrong checksum"))
                combined = 0
                bit, magic = self._next_bits(bit + 80)
                continue
            combined = (combined << 1 | combined >> 31) & 0xFFFFFFFF ^ crc
            end, magic = self._next_bits(bit + 80)
            size = (8 * self.window.end if end is None else end) - bit
            if size > 8 * PIECE_ROOM:
                size = 0  # too much for a block: other bytes are in between
            # A stream of this block only
            stream = self._bits(bit, size) << 80 | BZIP2_END << 32 | crc
            stream <<= -size % 8
            # 9 allows blocks of any size.
            data = b"BZh9" + stream.to_bytes((size + 80 + 7) // 8, "big")
            yield functools.partial(self._block, data, self.position)
            bit = end

    def _block(self, data: bytes, position: int) -> list[Chunk]:
        import bz2

        try:
            return [Chunk(bz2.decompress(data))]
        except (OSError, ValueError) as error:
            return [Chunk(flaw=self.flaw(error, position), is_break=True)]

    def _next_bits(self, bit: int) -> tuple[int | None, int]:
        """Return at which bit the next block or the end is, and its magic."""
        start = bit // 8
        while (found := self.window.search(BZIP2_PATTERN, start)) is not None:
            for shift in range(8):
                at = 8 * found - 8 + shift
                magic = self._bits(at, 48) if at >= bit else 0
                if magic in BZIP2_MAGICS:
                    return at, magic
            start = found + 1
        return None, 0

    def _bits(self, bit: int, count: int) -> int:
        """Return count bits as a number, the first one highest."""
        end = bit + count
        data = self.window.peek(bit // 8, (end + 7) // 8 - bit // 8)
        missing = (end + 7) // 8 - bit // 8 - len(data)
        # Bits after the end count as zeros, so a cut file needs no case of its own.
        number = int.from_bytes(data, "big") << 8 * missing
        return number >> -end % 8 & (1 << count) - 1


class LzopDecoder(Decoder):
    """lzop: blocks of 256 KiB with checksums, which its program decompresses some at a time."""

    def chunks(self) -> Iterator[Chunk]:
        import shutil

        program = shutil.which("lzop")
        if program is None:
            raise VmaError(f"{self.file.name}: lzop is missing here: install the package lzop")
        self._program = program
        return self.in_order(self._blocks())

    def _blocks(self) -> Iterator[Task]:
        """Yield a task for every few blocks."""
        head, flags = lzop_header(bytes(self.window.peek(0, 1024)))
        self.position = len(head)
        if not head:
            yield Chunk(flaw=self.flaw("the file's header is damaged"))
            self.position = self.window.search(LZOP_BLOCK_PATTERN, 0) or self.window.end
            head, flags = LZOP_USUAL_HEADER, LZOP_USUAL_FLAGS
        self._head = head
        batch: list[tuple[bytes, int]] = []
        total = 0
        while True:
            fields = bytes(self.window.peek(self.position, LZOP_BLOCK.size))
            plain, stored = LZOP_BLOCK.unpack(fields.ljust(LZOP_BLOCK.size, b"\0"))
            # Adler-32 or CRC32, of the plain bytes, and if these are compressed, of the stored ones
            sums = bin(flags & 0x101).count("1")
            sums += bin(flags & 0x202).count("1") if stored < plain else 0
            length = LZOP_BLOCK.size + 4 * sums + stored
            possible = 0 < stored <= plain <= FRAME_MAX_SIZE
            if possible:
                batch.append((bytes(self.window.peek(self.position, length)), plain))
                total += plain
            # To start the program costs more than to decompress a block.
            if batch and (total >= READ_SIZE or not possible):
                yield functools.partial(self._batch, batch, self.position)
                batch, total = [], 0
            if possible:
                self.position += length
                self.window.forget(self.position)
            elif len(fields) >= 4 and not plain:  # a plain size of 0 ends the file
                return
            elif fields:
                yield Chunk(flaw=self.flaw("no block of lzop"), is_break=True)
                found = self.window.search(LZOP_BLOCK_PATTERN, self.position + 1)
                self.position = self.window.end if found is None else found
            else:
                yield Chunk(flaw=self.flaw(CUT_TEXT))
                return

    def _batch(self, batch: Sequence[tuple[bytes, int]], position: int) -> list[Chunk]:
        import subprocess

        # It gets all of its input at once, so it ends by itself, whatever ends us.
        result = subprocess.run(
            [self._program, "-dc"],
            input=b"".join((self._head, *(block for block, _ in batch), bytes(4))),
            capture_output=True,
            check=False,
            env={k: value for k, value in os.environ.items() if k not in CODEC_OPTIONS},
        )
        size = sum(plain for _, plain in batch)
        if len(result.stdout) == size and not result.returncode:
            return [Chunk(result.stdout)]
        if len(batch) == 1:
            text = self.flaw("a damaged block of lzop", position)
            # Of any other size, it may be the size that is damaged.
            return [Chunk(bytes(size), text, LOST, is_break=size != LZOP_BLOCK_SIZE)]
        # lzop stops at the first damaged block, so each gets a run of its own.
        one_by_one = (self._batch([block], position) for block in batch)
        return list(itertools.chain(*one_by_one))


DECODERS: Mapping[str, type[Decoder]] = {
    "zstd": ZstdDecoder,
    "gzip": GzipDecoder,
    "lzop": LzopDecoder,
    "xz": XzDecoder,
    "bzip2": Bzip2Decoder,
}
RESCUE_SUFFIXES = {".zst": "zstd", ".gz": "gzip", ".lzo": "lzop", ".xz": "xz", ".bz2": "bzip2"}


def gzip_header_size(data: bytes) -> int:
    """Return the size of a gzip member's header (RFC 1952)."""
    # FLG: 2 a CRC of the header, 4 an extra field, 8 the name, 16 a comment
    flags = data[3] if len(data) > 3 else 0
    size = 10
    if flags & 4:
        size += 2 + int.from_bytes(data[size : size + 2], "little")
    for flag in 8, 16:  # name and comment, which end in a NUL
        if flags & flag:
            size = data.find(b"\0", size) + 1 or size
    return size + (2 if flags & 2 else 0)


def lzop_header(data: bytes) -> tuple[bytes, int]:
    """Return an lzop file's header and its flags; no bytes if it is damaged."""
    import zlib

    with suppress(IndexError, struct.error):
        # Versions before 0.940 lack the version that is needed, the level, and half of the time.
        version = int.from_bytes(data[9:11], "big")
        at = 17 if version >= 0x940 else 14  # after the method, and the level
        (flags,) = struct.unpack_from(">I", data, at)
        at += 4 + (4 if flags & 0x800 else 0) + (12 if version >= 0x940 else 8)
        at += 1 + data[at]  # name
        checksum = zlib.crc32 if flags & 0x1000 else zlib.adler32
        stored = struct.unpack_from(">I", data, at)
        if data.startswith(LZOP_MAGIC) and stored == (checksum(data[len(LZOP_MAGIC) : at]),):
            return data[: at + 4], flags
    return b"", 0


# ---------------------------------------------------------------------------------------------
# Rescue, extents: one follows another, else the next whole header is searched for. Each claims its
# clusters; a claim is as good as the chain of extents that it is in

EXTENT_PATTERN = re.compile(EXTENT_MAGIC)
EXTENT_MAX_SIZE = EXTENT_HEADER_SIZE + EXTENT_MAX_BLOCKS * BLOCK_SIZE
# A guest's disk may hold an archive, even with the same uuid. The headers of the archive around it
# cut it at least every EXTENT_MAX_SIZE: its extents do not follow one another for longer.
HORIZON = 2 * EXTENT_MAX_SIZE
NEAR_SIZE = 64 << 10  # bytes by which an extent may miss its expected place
ANY_SIZE = 1 << 26  # clusters that a device of unknown size may have: 4 TiB
CLUSTER_KEY = (1 << 40) - 1  # the bits of a blockinfo that say which cluster it is
VMSTATE_RANK = 256 << 32  # behind all other devices
END_RANK = 257 << 32
RANK_CLUSTER = 0xFFFFFFFF  # the bits of a rank that are the cluster's number
MAP_BLOCK = 512  # clusters
MOST_CHOICES = 10  # lost headers, of which each may be of an extent that stores all, or nothing


class Found(NamedTuple):
    """A whole extent header: its clusters are those from `rank` to `end_rank`, in canonical order.

    A rank is a number for each place in that order: dev_id << 32 | cluster_num, but VMSTATE_RANK
    for a vmstate, which comes last. Both are 0 if the extent is none of that order. `odd` says what
    no archive has.
    """

    extent: Extent
    rank: int
    end_rank: int
    odd: str

    @property
    def end(self) -> int:
        return self.extent.payload_offset + self.extent.payload_size


class Chain:
    """Extents that follow one another without a gap; `number` counts the chains.

    A proven chain cannot be part of an archive in a guest's disk. All clusters of a doubtful chain
    are doubtful. A claim in a chain is right, unless a proven chain contradicts the chain.
    """

    def __init__(self, number: int, start: int, proven: bool, doubtful: bool) -> None:
        self.number = number
        self.start = self.end = start  # in the archive
        self.proven = proven
        self.doubtful = doubtful
        self.end_rank = 0
        self.flaws: list[Flaw] = []

    def note(self, offset: int, text: str) -> None:
        self.flaws.append(Flaw(offset, text))


# A claim is the number of its chain << 2, and what is known of the cluster: it stores nothing, as
# its header's MD5 vouches for; its blocks are in place; they are there, but may be wrong.
CLAIM_EMPTY, CLAIM_STORED, CLAIM_DOUBTFUL = 1, 2, 3


class ClusterMap:
    """The claim of each cluster of a disk, 0 for a lost one; memory only where there are any."""

    def __init__(self) -> None:
        self._blocks: dict[int, array.array[int]] = {}
        self.end = 0  # behind the last cluster that is claimed

    def __getitem__(self, cluster_num: int) -> int:
        block = self._blocks.get(cluster_num // MAP_BLOCK)
        return block[cluster_num % MAP_BLOCK] if block else 0

    def put(self, cluster_num: int, claim: int) -> int:
        """Enter a claim, unless the cluster is claimed; return what was there before, 0 if none."""
        block = self._blocks.get(cluster_num // MAP_BLOCK) or self._block(cluster_num)
        held = block[cluster_num % MAP_BLOCK]
        if not held:
            block[cluster_num % MAP_BLOCK] = claim
            if cluster_num >= self.end:
                self.end = cluster_num + 1
        return held

    def change(self, cluster_num: int, claim: int) -> None:
        """Replace the claim of a cluster."""
        self._block(cluster_num)[cluster_num % MAP_BLOCK] = claim

    def _block(self, cluster_num: int) -> array.array[int]:
        number = cluster_num // MAP_BLOCK
        block = self._blocks.get(number)
        if block is None:
            block = self._blocks[number] = array.array("I", bytes(4 * MAP_BLOCK))
        return block

    def claim(self, first: int, count: int, claim: int) -> bool:
        """Enter a claim for clusters in a row, unless one of them is claimed: then return False."""
        end = first + count
        parts = []
        while first < end:
            block, start = self._block(first), first % MAP_BLOCK
            stop = min(MAP_BLOCK, start + end - first)
            if any(block[start:stop]):
                return False
            parts.append((block, start, stop))
            first += stop - start
        for block, start, stop in parts:
            block[start:stop] = array.array("I", [claim]) * (stop - start)
        self.end = max(self.end, end)
        return True

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first, end, claim) of clusters with the same claim, ascending; not lost ones."""
        for number, block in sorted(self._blocks.items()):
            first = number * MAP_BLOCK
            if block.count(block[0]) == MAP_BLOCK:
                yield first, first + MAP_BLOCK, block[0]
                continue
            for claim, equal in itertools.groupby(block):
                count = len(list(equal))
                if claim:
                    yield first, first + count, claim
                first += count


class RescuedDisk:
    """A disk, its file, and the claims of its clusters.

    With `exact`, the device's size is certain. `limit` is the number of clusters that it may have.
    """

    def __init__(self, device: Device, exact: bool, target: PartialFile) -> None:
        self.device = device
        self.target = target
        self.claims = ClusterMap()
        self.exact = exact and not device.is_vmstate
        # A last cluster may have blocks after the disk's end.
        self.size = device.size if self.exact else sys.maxsize
        # A damaged header may give too small a size, and a vmstate may be longer than its size.
        self.limit = device.cluster_count if self.exact else max(ANY_SIZE, device.cluster_count)

    def trimmed(self, believable: int) -> tuple[int, int]:
        """Return how many clusters and bytes the disk has.

        A vmstate has as many as it says only if there was room for that many.
        """
        count, size = self.device.cluster_count, self.device.size
        if self.device.is_vmstate:  # its size may be any number, also one that nobody believes
            count = min(count, believable)
            size = min(size, count * CLUSTER_SIZE)
        end = self.claims.end
        if self.device.is_vmstate or end > count:
            # As Proxmox restores it: a vmstate ends with its last cluster.
            size = max(end * CLUSTER_SIZE, size if count > end else 0)
        return max(count, end), size


class Rescue:
    """Recovers configs and disks from a damaged archive; `create` makes a file of a given name.

    It calls each cluster lost, doubtful or right, as far as data without checksums allows.
    """

    def __init__(self, window: Window, create: Callable[[str], PartialFile]) -> None:
        self.window = window
        # Writes are made in a thread of their own: meanwhile the next extents are looked at.
        self._writer = Workers(1)
        self._writes: collections.deque[Call] = collections.deque()
        self._batch: list[tuple[Target, int, list[Buffer]]] = []  # to be written
        self._batch_end: tuple[Target | None, int] = None, 0
        self._batch_size = 0
        window.uses = self._write_batch
        self.disks: dict[int, RescuedDisk] = {}
        self.configs: list[Config] = []
        self._create = create
        self._names = {RESCUE_NAME}
        self._header: Header | None = None  # None if it is damaged: there may be other devices
        self._index: ArchiveIndex | None = None
        self._uuid = b""
        self._offset = 0  # where the next extent is expected
        self._chains: list[Chain] = []
        # The canonical order: whether the header proves it, and how far the extents have come.
        self._is_ordered = False
        self._rank = 0
        self._extent_clusters = 0  # what a whole extent has in a canonical archive
        self._devices: dict[int, Device] = {}  # in that order, by the rank of their first cluster

    @property
    def _chain(self) -> Chain:
        return self._chains[-1]

    def run(self) -> None:
        """Read the archive to its end; raises FormatError if it is none."""
        try:
            self._read_header()
            while not self.window.ends_at(self._offset):
                self.window.forget(self._offset)
                if self._take_empty():
                    continue
                try:
                    found = self._whole(self._offset)
                except FormatError as error:
                    self._resume(error.args[0])  # without its offset, which the line has already
                else:
                    self._take(found)
            self._wait()
        finally:
            # Only then may the files be closed, also after an error: a descriptor that is free
            # could become another file's, and what is still to be written would go there.
            for call in self._writes:
                call.wait(-1)
            self._writer.close()

    def _begin(self, offset: int, proven: bool, doubtful: bool = False) -> None:
        self._offset = offset
        self._chains.append(Chain(len(self._chains), offset, proven, doubtful))

    # The header

    def _read_header(self) -> None:
        """Read the header, as far as it is readable, and begin the first chain of extents."""
        window = self.window
        if window.peek(0, 4) == DIFFERENCE_MAGIC:  # without its base, it has no whole disks
            size = parse_header_size(window.peek(0, HEADER_FIXED_SIZE))
            raise needs_base(parse_header(window.peek(0, size), check_md5=False))
        try:
            size = parse_header_size(window.peek(0, HEADER_FIXED_SIZE))
            data = bytes(window.peek(0, size))
            header = self._header = parse_header(data)
        except FormatError as error:
            header = self._guess_header(error)
        else:
            self._begin(header.size, proven=True)
            self._uuid = header.uuid
            # What optimize writes: nobody else fills up a header like this, under this uuid.
            self._is_ordered = header.uuid == CANONICAL_UUID and size % BLOCK_SIZE == 0
            self._is_ordered = self._is_ordered and data == pack_header(header)
        for config in header.configs:
            # Nothing stops for a name: the rest of the archive is still worth having.
            fault = name_fault(config.name, CONFIG_NAME_MAX_SIZE)
            if fault or config.name in self._names:
                text = f"config name {quote(config.name)} {fault or 'occurs twice'}: left out"
                self._chain.note(0, text)
                continue
            self._names.add(config.name)
            self._create(config.name).append([config.data])
            self.configs.append(config)
        for device in header.devices:
            self._add_disk(device)
        if self._header and self._uuid == CANONICAL_UUID:
            devices = canonical_order(disk.device for disk in self.disks.values())
            self._devices = {self._rank_of(device.dev_id, 0): device for device in devices}
            self._rank = next(iter(self._devices), END_RANK)
            # What is usual for its alignment, until there is an extent that tells.
            self._extent_clusters = CANONICAL_CLUSTERS
            if header.size % ALIGNS["1M"] == 0:
                self._extent_clusters = clusters_per_extent(ALIGNS["1M"])

    def _guess_header(self, error: FormatError) -> Header:
        """Return what can be read of a damaged header, and find the first extent."""
        start = bytearray(self.window.peek(0, READ_SIZE))
        uuid = bytes(start[8:24])
        # Any extent has the uuid, and the first one begins where the header ends.
        pattern = re.compile(re.escape(EXTENT_MAGIC) + b"(?s:....)" + re.escape(uuid))
        start_at = 0
        while (at := self.window.search(pattern, start_at, HORIZON)) is not None:
            start_at = at + 1
            if is_whole_extent_header(self.window.peek(at, EXTENT_HEADER_SIZE)):
                self._uuid = uuid
                break
        found = self._search(0)
        header = None
        for size in (int.from_bytes(start[56:60], "big"), self._offset if found else 0):
            header = header or guess_header(start[:size], self._uuid)
        if not header and not found:
            raise FormatError(f"{error}, and nothing of one is in it") from error
        used = "it is used all the same" if header else "configs and names are missing"
        if not found:
            self._begin(self.window.end, proven=True)
        self._chain.proven = True
        self._chain.note(0, f"the header is damaged, {used}: {error}")
        return header or Header(self._uuid, 0, (), ())

    def _add_disk(self, device: Device) -> None:
        """Create a device's file, under another name if its own will not do."""
        dev_id, name, size = device
        file_name = disk_file_name(device)
        fault = name_fault(name, DEVICE_NAME_MAX_SIZE)
        if fault or file_name in self._names:
            fault = fault or "occurs twice"
            # Another device may really have that name.
            free = (f"dev{dev_id}{'-' * i}" for i in itertools.count())
            name = next(name for name in free if f"disk-{name}.raw" not in self._names)
            self._chain.note(0, f"{device.title}: the name {fault}, it is called {quote(name)}")
            file_name = f"disk-{name}.raw"
        if device.cluster_count > MAX_CLUSTERS:
            self._chain.note(0, f"{device.title}: a size of {size} bytes is impossible")
            size = 0
        self._names.add(file_name)
        exact = self._header is not None and size > 0
        device = Device(dev_id, name, size)
        self.disks[dev_id] = RescuedDisk(device, exact, self._create(file_name))

    # The canonical order

    def _rank_of(self, dev_id: int, cluster_num: int) -> int:
        """Return the rank of a cluster; of a device's end, that of the next device."""
        disk = self.disks.get(dev_id)
        if disk and disk.device.is_vmstate:
            return VMSTATE_RANK | cluster_num
        rank = dev_id << 32
        if disk and cluster_num == disk.device.cluster_count:
            return next((each for each in self._devices if each > rank), END_RANK)
        return rank | cluster_num

    def _lay_out(self, rank: int, end: int, most: int) -> list[tuple[Device, range]]:
        """Return the devices and clusters of the canonical extents from rank to end.

        Empty if they are more than `most`, or not known.
        """
        extents: list[tuple[Device, range]] = []
        while rank < end and len(extents) < most:
            extents.append(self._extent_at(rank))
            device, numbers = extents[-1]
            rank = self._rank_of(device.dev_id, numbers.stop)
        return extents if rank == end else []

    def _extent_at(self, rank: int) -> tuple[Device, range]:
        """Return the device and the clusters of the canonical extent at a rank."""
        device, first = self._devices[rank & ~RANK_CLUSTER], rank & RANK_CLUSTER
        end = first + self._extent_clusters
        # Only the extent behind it tells where a vmstate ends: these are whole.
        return device, range(first, end if device.is_vmstate else min(end, device.cluster_count))

    def _missing(self) -> list[Found]:
        """Return the extents at the offset whose headers are lost, as far as that is certain.

        The extents before and behind them say which clusters they have, the distance whether they
        store all blocks or none. Empty if not exactly one way fits.
        """
        if not self._is_ordered or self._rank & ~RANK_CLUSTER not in self._devices:
            return []
        offset, source = self._offset, self.window.source
        self.window.peek(offset, EXTENT_HEADER_SIZE)  # only then, its breaks are known
        # Behind a break in a header comes what is left of the extent.
        is_broken = source.has_break(offset, offset + EXTENT_HEADER_SIZE)
        place = source.breaks[bisect.bisect_left(source.breaks, offset)] if is_broken else offset
        start = place - EXTENT_HEADER_SIZE if is_broken else offset
        # One extent is the usual case: then no header of an archive in a disk can mislead.
        device, numbers = self._extent_at(self._rank)
        following = self._rank_of(device.dev_id, numbers.stop)
        behind = {}  # rank of the whole header behind, by its offset
        for size in (0, stored_size(device, numbers)):
            end = start + EXTENT_HEADER_SIZE + size
            if end > place and following == self._begins_at(end):
                behind[end] = following
        if not behind and not is_broken:
            extents, proven = self._find(offset + 1, offset + EXTENT_MAX_SIZE)
            if proven and extents[0].rank > self._rank:
                behind[extents[0].extent.offset] = extents[0].rank
        if len(behind) != 1:
            return []
        [(end, following)] = behind.items()
        # After a break, the distance says nothing.
        if source.has_break(place + is_broken, end):
            return []
        missing: list[Found] = []
        parts = self._lay_out(self._rank, following, (end - start) // EXTENT_HEADER_SIZE)
        total = end - start - EXTENT_HEADER_SIZE * len(parts)
        for (device, numbers), size in zip(
            parts, only_way([stored_size(*p) for p in parts], total)
        ):
            masks = [device.block_mask(number) if size else 0 for number in numbers]
            [(header, _)] = pack_extents(device.dev_id, numbers[0], masks, self._extent_clusters)
            missing.append(self._describe(parse_extent(bytes(header), start, self._uuid)))
            start = missing[-1].end
        return missing

    def _begins_at(self, offset: int) -> int:
        """Return the rank of the whole extent header at an offset, 0 if there is none."""
        data = bytes(self.window.peek(offset, EXTENT_HEADER_SIZE))
        with suppress(FormatError, struct.error):
            return self._describe(parse_extent(data, offset, self._uuid)).rank
        return 0

    # Extent headers

    def _describe(self, extent: Extent) -> Found:
        """Return a whole extent header with what it says about the order, and what is odd."""
        infos = extent.blockinfo
        keys = [info & CLUSTER_KEY for info in infos]
        odd = []
        stored = sum(mask_size(info >> 48) for info in infos if info > CLUSTER_KEY)
        if stored != extent.payload_size:
            odd.append(
                f"block_count is {extent.block_count}, its masks have {stored // BLOCK_SIZE}"
            )
            extent = extent._replace(block_count=stored // BLOCK_SIZE)
        # optimize never puts two devices into an extent, nor leaves a gap.
        first, last = (keys[0], keys[-1]) if keys else (0, 0)
        is_run = keys == [*range(first, first + len(keys))] and first >> 32 == last >> 32 > 0
        impossible = [key for key in ([last] if is_run else keys) if not self._is_possible(key)]
        if impossible:
            impossible = [key for key in keys if not self._is_possible(key)]
            dev_id = impossible[0] >> 32
            disk = self.disks.get(dev_id)
            owner = disk.device.title if disk else f"device {dev_id}, which there is not"
            odd.append(f"{owner}: no cluster can be number {impossible[0] & 0xFFFFFFFF}: left out")
        if not is_run and len(set(keys)) < len(keys):
            odd.append("a cluster occurs twice in the extent")
        rank = end_rank = 0
        if is_run and not odd:
            rank = self._rank_of(first >> 32, first & 0xFFFFFFFF)
            end_rank = self._rank_of(last >> 32, (last & 0xFFFFFFFF) + 1)
        return Found(extent, rank, end_rank, "; ".join(odd))

    def _is_possible(self, key: int) -> bool:
        """Say whether the archive can have a cluster, dev_id << 32 | cluster_num."""
        disk = self.disks.get(key >> 32)
        if disk:
            return key & 0xFFFFFFFF < disk.limit
        # A damaged header may have lost a device.
        return not self._header and key >> 32 in DEV_IDS and key & 0xFFFFFFFF < ANY_SIZE

    def _whole(self, offset: int) -> Found:
        """Return the extent header at an offset, mended if need be; raises FormatError."""
        data = bytes(self.window.peek(offset, EXTENT_HEADER_SIZE))
        if len(data) < EXTENT_HEADER_SIZE:
            raise FormatError("no whole extent header")
        try:
            return self._describe(parse_extent(data, offset, self._uuid))
        except FormatError as error:
            for how, mend in (
                ("one bit of it is wrong, which its MD5 tells", functools.partial(flip_bit, data)),
                ("the index has what it was", functools.partial(self._indexed, offset)),
            ):
                with suppress(FormatError):
                    found = self._describe(parse_extent(mend(), offset, self._uuid))
                    self._chain.note(offset, f"{error.args[0]}; {how}: nothing is lost")
                    return found
            raise

    def _indexed(self, offset: int) -> bytes:
        """Return the extent header at an offset as the index has it; raises FormatError."""
        if self._index is None and self._header and self._is_ordered:
            self._index = self.window.source.index(self._header)  # only now, as it takes memory
        header = indexed_extent(self._index, offset) if self._index else None
        if header is None:
            raise FormatError("the index has no extent there")
        return header

    # Where extents follow one another

    def _may_follow(self, offset: int) -> bool:
        """Say whether an extent header, even a damaged or lost one, or the end is there."""
        source = self.window.source
        start = self.window.peek(offset, EXTENT_MD5.start)
        return (
            # Magic or uuid is enough, as damage may have hit the other one.
            start[:4] == EXTENT_MAGIC
            or start[8:] == self._uuid
            or offset in source.breaks
            or self.window.ends_at(offset)
            or not source.is_sound(offset, offset + EXTENT_MD5.start)
        )

    def _follow(self, offset: int) -> tuple[list[Found], bool, bool]:
        """Return the extents that follow one another from an offset on, if proven, if nested.

        They are proven if they go on up to the HORIZON, to what looks like another one, or to the
        end; nested if the next one has clusters that the archive does not have.
        """
        # If the archive's header is lost, the first extents tell the uuid.
        uuid = self._uuid or bytes(self.window.peek(offset + 8, 16))
        extents: list[Found] = []
        end = offset
        while end - offset < HORIZON:
            data = bytes(self.window.peek(end, EXTENT_HEADER_SIZE))
            if len(data) < EXTENT_HEADER_SIZE:
                return extents, self._may_follow(end), False
            try:
                found = self._describe(parse_extent(data, end, uuid))
            except FormatError:
                return extents, self._may_follow(end), False
            if found.odd:  # it belongs to another archive
                return extents, False, True
            # Headers of an archive in a disk may end right where a header around it begins.
            if self._is_ordered and extents and found.rank != extents[-1].end_rank:
                return extents, False, False
            extents.append(found)
            end = found.end
        return extents, True, False

    def _find(
        self,
        start: int,
        stop: int | None = None,
        through: int | None = None,
        near: int | None = None,
    ) -> tuple[list[Found], bool]:
        """Return the next extents from start on, before stop, that can be the archive's; if proven.

        With `through`, they must come past there. They are expected to be `near` an offset.
        """
        seen: set[int] = set()
        while (at := self.window.search(EXTENT_PATTERN, start, stop)) is not None:
            start = at + 1
            if at in seen:
                continue
            extents, proven, nested = self._follow(at)
            if not extents:
                continue
            offsets = [found.extent.offset for found in extents]
            # Each extent of a chain has the magic, and would be followed again.
            seen.update(offsets)
            if through is not None:
                # The archive goes on there, so a chain that misses it lies in a guest's disk.
                proven = through in (*offsets, extents[-1].end)
                nested = not proven
            if proven:
                start = offsets[-1] + 1  # headers in their payload are a guest's
            # A part of the archive may be there twice.
            extents = [found for found in extents if not self._has_all(found)]
            if extents and (proven or (not nested and self._can_be_next(extents, near))):
                return extents, proven
        return [], False

    def _search(
        self,
        start: int,
        stop: int | None = None,
        through: int | None = None,
        near: int | None = None,
        doubtful: bool = False,
    ) -> bool:
        """Begin a chain at what `_find` returns; without any, go on at stop, or not at all.

        With `doubtful`, it is doubtful unless it is proven.
        """
        extents, proven = self._find(start, stop, through, near)
        if not extents:
            self._offset = self.window.end if stop is None else stop
            return False
        offset = extents[0].extent.offset
        self._uuid = self._uuid or bytes(self.window.peek(offset + 8, 16))
        self._begin(offset, proven, doubtful and not proven)
        if proven and self._rank and extents[0].rank:
            # The order never goes back: a chain that went further was a guest's.
            self._rank = extents[0].rank
            for other in self._chains:
                if not other.proven and other.end_rank > self._rank:
                    other.doubtful = True
        return True

    def _has_all(self, found: Found) -> bool:
        """Say whether all clusters of an extent are claimed by proven chains."""
        return all(map(self._is_proven, found.extent.blockinfo))

    def _is_proven(self, info: int) -> bool:
        claim = self._claim_of(info)
        return bool(claim) and self._chains[claim >> 2].proven

    def _claim_of(self, info: int) -> int:
        """Return the claim of a cluster in a blockinfo, 0 if there is none."""
        disk = self.disks.get(info >> 32 & 0xFF)
        return disk.claims[info & 0xFFFFFFFF] if disk else 0

    def _can_be_next(self, extents: Sequence[Found], near: int | None) -> bool:
        """Say whether extents that are not proven fit, and are not of an archive in a disk."""
        if any(self._claim_of(info) for found in extents for info in found.extent.blockinfo):
            return False
        if self._uuid != CANONICAL_UUID:  # which all canonical archives have, also those in a disk
            return True
        if self._is_ordered:
            ranks = [self._rank]
            for found in extents:
                ranks += found.rank, found.end_rank
            if 0 in ranks or ranks != sorted(ranks):
                return False
            # If nothing is lost before it, it is where it is expected; else, that is not known.
            near = (near or self._offset) if self._rank == extents[0].rank else None
        return near is None or abs(extents[0].extent.offset - near) <= NEAR_SIZE

    def _resume(self, fault: str) -> None:
        """Find the next extent, as no whole one is at the expected place; fault says why."""
        offset = self._offset
        is_break = offset in self.window.source.breaks
        if missing := self._missing():
            if not is_break:
                text = f"{fault}; its neighbours tell what it was: nothing is lost"
                if len(missing) > 1:
                    text = f"{fault}; {len(missing)} are lost, but their neighbours tell"
                self._chain.note(offset, text)
            for found in missing:
                self._advance(found)
                self._claim(found, found.extent.payload_offset, found.end, restored=True)
            self._offset = missing[-1].end
            return
        # The file's own flaw is told already, and nobody knows how much is missing.
        if is_break:
            self._search(offset)
            return
        chain = self._chain
        data = bytes(self.window.peek(offset, EXTENT_HEADER_SIZE))
        through = near = None
        if len(data) == EXTENT_HEADER_SIZE:
            fields = EXTENT.unpack(data)
            # Its size may still be right. Then extents inside its payload are a guest's.
            stored = sum(mask_size(info >> 48) for info in parse_slots(fields[-1]))
            # block_count and the masks say the same: one of them may be right.
            for size in (fields[2] * BLOCK_SIZE, stored):
                end = offset + EXTENT_HEADER_SIZE + size
                if through is None and size < EXTENT_MAX_SIZE:
                    near = near or (end if data[:4] == EXTENT_MAGIC else None)
                    is_marked = self._may_follow(end) and self.window.source.is_sound(end, end + 1)
                    through = end if is_marked else None
        self._search(offset + 1, through, through, near)
        chain.note(offset, f"{fault}; extents go on at offset 0x{self._offset:x}")

    def _advance(self, found: Found) -> None:
        """Go on in the canonical order, and in the chain."""
        chain = self._chain
        seams = self.window.source.seams
        # What has one checksum may become doubtful as a whole: so it is a chain of its own.
        if seams and bisect.bisect(seams, chain.start) != bisect.bisect(seams, found.end - 1):
            self._begin(self._offset, chain.proven, chain.doubtful)
            chain = self._chain
        if self._is_ordered:
            if found.rank != self._rank and not chain.proven:
                # Headers of an archive in a disk have led to this one.
                chain.doubtful = True
                self._begin(self._offset, self._follow(self._offset)[1])
                chain = self._chain
            self._rank = found.end_rank
            if found.end_rank & RANK_CLUSTER:  # not a device's end
                self._extent_clusters = len(found.extent.blockinfo)
        chain.end_rank = self._rank
        chain.end = max(chain.end, found.end)

    def _take_empty(self) -> bool:
        """Take the extents at the offset if they are many that store nothing, in their order."""
        size = self._extent_clusters
        device = self._devices.get(self._rank & ~RANK_CLUSTER)
        if not self._is_ordered or device is None:
            return False
        if device.is_vmstate or any(
            self.window.peek(self._offset, EXTENT_HEADER_SIZE)[EXTENT_BLOCK_COUNT]
        ):
            return False
        first = self._rank & RANK_CLUSTER
        count = min((device.cluster_count - first) // size, RUN_EXTENTS)
        headers = bytes(self.window.peek(self._offset, count * EXTENT_HEADER_SIZE))
        count = count_empty(headers)
        info = device.dev_id << 32 | first
        expected = pack_empty_extents(info, count * size, size)
        count = different_header(headers[: len(expected)], expected)
        end = self._offset + count * EXTENT_HEADER_SIZE
        if count < 2 or self.window.source.seams or self._chain.doubtful:
            return False
        claim = self._chain.number << 2 | CLAIM_EMPTY
        if not self.disks[device.dev_id].claims.claim(first, count * size, claim):
            return False
        self._rank = self._chain.end_rank = self._rank_of(device.dev_id, first + count * size)
        self._offset = self._chain.end = end
        return True

    def _take(self, found: Found) -> None:
        """Take the clusters of an extent, as far as they are in place, and go on behind it."""
        window, source = self.window, self.window.source
        offset, start, size = self._offset, found.extent.payload_offset, found.extent.payload_size
        self._advance(found)
        chain = self._chain
        if found.odd:
            chain.note(offset, found.odd)
        self._offset = found.end
        is_next = self._leads_on(found)
        # `peek` stops at breaks after its start, not at one there.
        stop = start if start in source.breaks else start + len(window.peek(start, size))
        if stop == found.end and is_next:
            self._claim(found, start, stop)
            return
        # Bytes are missing if the next extent begins inside this one.
        cut = stop < found.end
        begun = self._search(start, stop, near=found.end, doubtful=cut)
        if cut and not begun:
            chain.note(offset, f"only {stop - start} of {size} bytes of the extent")
            # Nothing behind it shows that its payload is in place; the one before it may.
            is_alone = not chain.proven and chain.start == offset
            self._claim(found, start, stop, chain, doubtful=is_alone)
            return
        # A chain that is not proven may be a guest's: then it is payload, too.
        end = min(self._offset, stop) if begun and self._chain.proven else stop
        self._claim(found, start, end, chain, doubtful=True)
        if not begun:
            self._search(found.end)
        text = "bytes are missing or added in the extent"
        chain.note(offset, f"{text}; extents go on at offset 0x{self._offset:x}")

    def _leads_on(self, found: Found) -> bool:
        """Say whether an extent, taken last, is followed by what has to follow."""
        source = self.window.source
        if not self._may_follow(found.end):
            return bool(self._missing())
        if not (self._is_ordered and found.rank) or found.end in source.breaks:
            return True
        # In a known order, another extent tells that bytes are missing, and lost bytes can tell it.
        following = self._begins_at(found.end)
        if following or source.is_sound(found.end, found.end + EXTENT_HEADER_SIZE):
            return following in (0, found.end_rank)
        return bool(self._missing())

    # Clusters

    def _claim(
        self,
        found: Found,
        start: int,
        stop: int,
        chain: Chain | None = None,
        doubtful: bool = False,
        restored: bool = False,
    ) -> None:
        """Write the clusters of an extent, of whose payload start to stop of the archive is there.

        Doubtful clusters are written even if some of their blocks are missing. A restored header
        has no MD5 that would vouch for clusters that store nothing.
        """
        source = self.window.source
        chain = chain or self._chain
        doubtful = doubtful or chain.doubtful
        payload = self.window.peek(start, stop - start)
        is_whole = not doubtful and len(payload) == found.extent.payload_size
        is_whole = is_whole and source.is_sound(start, stop)
        empty = CLAIM_STORED if restored else CLAIM_DOUBTFUL if chain.doubtful else CLAIM_EMPTY
        if is_whole and found.rank and self._claim_run(found, chain, payload, empty):
            return
        twice = []
        for dev_id, cluster_num, mask, position, size in iter_slots(found.extent):
            if found.odd and not self._is_possible(dev_id << 32 | cluster_num):
                continue
            if dev_id not in self.disks:
                self._add_disk(Device(dev_id, "", 0))
            disk = self.disks[dev_id]
            if not mask and not disk.claims.put(cluster_num, chain.number << 2 | empty):
                continue
            state = empty
            if mask:
                state = CLAIM_DOUBTFUL if doubtful else CLAIM_STORED
                place = start + position, start + position + size
                if not is_whole:
                    cut = position + size > len(payload) and not doubtful
                    if cut or overlaps(source.lost, *place):
                        continue
                    if overlaps(source.doubtful, *place):
                        state = CLAIM_DOUBTFUL
            claim = chain.number << 2 | state
            offset = cluster_num * CLUSTER_SIZE
            pieces: list[tuple[int, Buffer]] = []
            at = position
            for run_start, run_size in block_runs(mask):
                count = min(run_size, len(payload) - at, disk.size - offset - run_start)
                if count > 0:
                    pieces.append((offset + run_start, payload[at : at + count]))
                at += run_size
            held = disk.claims.put(cluster_num, claim)
            if held:
                claim, pieces, differs = self._settle(disk, cluster_num, held, claim, pieces)
                disk.claims.change(cluster_num, claim)
                if differs:
                    twice.append(cluster_num)
            for place_on_disk, data in pieces:
                self._write(disk.target, place_on_disk, data)
        if twice:
            text = f"{plural(len(twice), 'cluster')} with other bytes than elsewhere"
            chain.note(found.extent.offset, f"{text}, the first is {twice[0]}")

    def _claim_run(self, found: Found, chain: Chain, payload: memoryview, empty: int) -> bool:
        """Claim clusters that are in a row, as nearly all are, and store all blocks or none."""
        infos = found.extent.blockinfo
        first, count = infos[0] & 0xFFFFFFFF, len(infos)
        disk = self.disks.get(infos[0] >> 32 & 0xFF)
        end = (first + count) * CLUSTER_SIZE
        stores_all = len(payload) == count * CLUSTER_SIZE
        if disk is None or not (stores_all or not payload) or (stores_all and end > disk.size):
            return False
        claim = chain.number << 2 | (CLAIM_STORED if stores_all else empty)
        if not disk.claims.claim(first, count, claim):
            return False
        if stores_all:
            self._write(disk.target, first * CLUSTER_SIZE, payload)
        return True

    def _settle(
        self,
        disk: RescuedDisk,
        cluster_num: int,
        held: int,
        claim: int,
        pieces: list[tuple[int, Buffer]],
    ) -> tuple[int, list[tuple[int, Buffer]], bool]:
        """Decide between two claims of a cluster; return one, what to write, and if they differ."""
        self._wait()
        start = cluster_num * CLUSTER_SIZE
        size = max(min(CLUSTER_SIZE, disk.size - start), 0)
        data = bytearray(size)
        for at, piece in pieces:
            data[at - start : at - start + len(piece)] = piece
        old, new = self._chains[held >> 2], self._chains[claim >> 2]
        held_worth = held & 3 != CLAIM_DOUBTFUL, old.proven
        worth = claim & 3 != CLAIM_DOUBTFUL, new.proven
        if disk.target.read_at(start, size).ljust(size, b"\0") == data:
            return (claim if worth > held_worth else held), [], False
        if worth[0] and held_worth[0] and old.proven != new.proven:
            # What a proven chain contradicts was part of an archive in a guest's disk.
            (new if old.proven else old).doubtful = True
        if worth > held_worth:
            return claim, [(start, data)], True
        return (held if worth < held_worth else held | CLAIM_DOUBTFUL), [], True

    # Writing

    def _write(self, target: Target, offset: int, data: Buffer) -> None:
        """Have data written, with what comes right before it on the disk."""
        if (target, offset) != self._batch_end:
            self._batch.append((target, offset, []))
        self._batch[-1][2].append(data)
        self._batch_end = target, offset + len(data)
        self._batch_size += len(data)
        if self._batch_size >= WRITE_SIZE:
            self._write_batch()

    def _write_batch(self) -> Collection[Call]:
        """Begin to write what is to be written; return the calls that use the window's views."""
        batch, self._batch = self._batch, []
        self._batch_end, self._batch_size = (None, 0), 0

        def write_all() -> None:
            for target, offset, parts in batch:
                target.write_at(offset, parts)

        if batch:
            self._writes.append(self._writer.submit(Call(write_all)))
        while self._writes and self._writes[0].is_done():
            self._writes.popleft().result()
        return tuple(self._writes)

    def _wait(self) -> None:
        """Wait until everything is written; raises VmaError."""
        for call in self._write_batch():
            call.result()

    # The report

    def finish(self) -> dict[str, Any]:
        """Give the disks their sizes, and return what `rescue --json` prints."""
        missing = []
        devices = []
        for disk in self.disks.values():
            device = disk.device
            count, size = disk.trimmed(self.window.end // EXTENT_HEADER_SIZE * EXTENT_SLOTS)
            lost, doubtful = self._unsure(disk, count, size)
            try:
                disk.target.truncate(size)
            except VmaError:
                # A damaged size may be more than the file system takes.
                if disk.exact:
                    raise
                disk.target.truncate(disk.claims.end * CLUSTER_SIZE)
            if lost:
                number = sum(-(-each // CLUSTER_SIZE) for _, each in lost)
                text = f"{device.title}: {plural(number, 'cluster')} not found"
                missing.append(Flaw(self.window.end, text))
            found = {"dev_id": device.dev_id, "name": device.name, "size": size}
            devices.append({**found, "lost": lost, "doubtful": doubtful})
        flaws = [*self.window.source.flaws]
        for chain in self._chains:
            flaws += chain.flaws
        flaws.sort(key=lambda flaw: flaw.offset)
        configs = [{"name": name, "size": len(data)} for name, data in self.configs]
        damage = [flaw._asdict() for flaw in (*flaws, *missing)]
        return {"devices": devices, "configs": configs, "damage": damage}

    def _unsure(
        self, disk: RescuedDisk, cluster_count: int, size: int
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the lost ranges and the doubtful ones, as [offset, size] in bytes."""
        lost: list[list[int]] = []
        doubtful: list[list[int]] = []

        def add(ranges: list[list[int]], first: int, end: int) -> None:
            start, stop = first * CLUSTER_SIZE, min(end * CLUSTER_SIZE, size)
            # Neighbours from two chains are one range to who reads it.
            if ranges and sum(ranges[-1]) == start:
                ranges[-1][1] += stop - start
            elif start < stop:
                ranges.append([start, stop - start])

        failed = sorted(self.window.source.failed)
        position = 0
        for first, end, claim in disk.claims.runs():
            add(lost, position, first)
            position = end
            chain = self._chains[claim >> 2]
            # Here it is decided: what no checksum vouches for is doubtful if one has failed.
            if (
                claim & 3 == CLAIM_DOUBTFUL
                or chain.doubtful
                or (claim & 3 == CLAIM_STORED and overlaps(failed, chain.start, chain.end))
            ):
                add(doubtful, first, end)
        add(lost, position, cluster_count)
        return lost, doubtful


def is_whole_extent_header(data: Buffer) -> bool:
    """Say whether these 512 bytes are an extent header whose MD5 matches."""
    is_header = len(data) == EXTENT_HEADER_SIZE and data[:4] == EXTENT_MAGIC
    return is_header and md5_without(data, EXTENT_MD5) == data[EXTENT_MD5]


def flip_bit(data: bytes) -> bytes:
    """Return the extent header of which one bit was changed; as it is if that is not the fault."""
    stored, found = data[EXTENT_MD5], md5_without(data, EXTENT_MD5)
    wrong = int.from_bytes(stored, "big") ^ int.from_bytes(found, "big")
    if wrong & (wrong - 1) == 0:  # the bit is in the MD5 itself
        return data[: EXTENT_MD5.start] + found + data[EXTENT_MD5.stop :]
    mended = bytearray(data)
    for at in (*range(EXTENT_MD5.start), *range(EXTENT_MD5.stop, EXTENT_HEADER_SIZE)):
        for bit in range(8):
            mended[at] ^= 1 << bit
            if md5_without(mended, EXTENT_MD5) == stored:
                return bytes(mended)
            mended[at] ^= 1 << bit
    return data


def stored_size(device: Device, cluster_nums: Iterable[int]) -> int:
    """Return the size in bytes of all blocks of some clusters of a device."""
    return sum(mask_size(device.block_mask(number)) for number in cluster_nums)


def only_way(sizes: Sequence[int], total: int) -> Sequence[int]:
    """Return each size, or 0 instead, so that they make the total; empty if not in one way only."""
    choices: Iterable[Sequence[int]] = (sizes, [0] * len(sizes))
    if len(sizes) <= MOST_CHOICES:
        choices = itertools.product(*((size, 0) for size in sizes))
    elif total not in (0, sum(sizes)):
        return []
    ways = [choice for choice in choices if sum(choice) == total]
    return ways[0] if len(ways) == 1 else []


def guess_header(data: bytearray, uuid: bytes) -> Header | None:
    """Return the header in bytes that are damaged, as far as its structure can be read."""
    size = len(data)
    if not HEADER_FIXED_SIZE < size <= HEADER_MAX_SIZE:
        return None
    fields = HEADER.unpack_from(data)
    # The values that Proxmox always writes, in case these fields were hit.
    usual = HEADER_FIXED_SIZE, size - HEADER_FIXED_SIZE
    for blob_offset, blob_size in (fields[5:7], usual):
        HEADER.pack_into(
            data, 0, HEADER_MAGIC, 1, uuid, fields[3], bytes(16), blob_offset, blob_size, size
        )
        with suppress(FormatError):
            header = parse_header(data, check_md5=False)
            if header.devices or header.configs:
                return header
    return None


def indexed_extent(index: ArchiveIndex, offset: int) -> bytes | None:
    """Return the extent header at an offset of a canonical archive as its index has it."""
    # An entry is the offset of the payload << 16, and the mask; see DeviceIndex.
    place = offset + EXTENT_HEADER_SIZE << 16
    for dev_id, entries in index.entries.items():
        first = bisect.bisect_left(entries, place)
        masks = [entry & FULL_MASK for entry in entries[first : first + index.cluster_count]]
        # Only an extent's first cluster follows a header.
        if masks and entries[first] >> 16 == place >> 16 and first % index.cluster_count == 0:
            [(header, _)] = pack_extents(dev_id, first, masks, index.cluster_count)
            return bytes(header)
    return None


@contextmanager
def open_salvage(path: str) -> Iterator[tuple[Input, Window]]:
    """Open a damaged archive: the file, and the bytes of it that can be had."""
    name = display_name(path, "input")
    raw, start, state, size = open_raw(path, name, damaged=True)
    with Input(name, raw) as file, ExitStack() as stack:
        if state:
            # Not a FileInput: that gives up at the first unreadable sector.
            file.raw, file.state, file.raw_size = raw, state, size
        codec = next((codec.name for codec in CODECS if start.startswith(codec.magics)), "")
        if not codec and start[:4] != HEADER_MAGIC:
            # Its first bytes may be damaged or lost: then its name shows how it is compressed.
            codec = RESCUE_SUFFIXES.get(os.path.splitext(path.removesuffix(".dat"))[1], "")
        raw_salvage = RawSalvage(file, READ_SIZE if codec else PLAIN_PIECE_SIZE)
        stack.callback(raw_salvage.close)
        source: Salvage = raw_salvage
        if codec:
            source = DecodedSalvage(file, Window(source, PACKED_VIEW_SIZE), codec)
            stack.callback(source.workers.close)
        window = Window(source, DECODED_VIEW_SIZE if codec else PLAIN_VIEW_SIZE)
        yield file, window


# ---------------------------------------------------------------------------------------------
# Commands: each takes the parsed command line and returns the exit status

EXIT_USAGE = 2


class UsageError(VmaError):
    """Options that do not go together."""

    exit_status = EXIT_USAGE


def notice(args: Namespace, text: str) -> None:
    """Print a line on standard error that is no error."""
    if not args.quiet:
        print_error(text)


def require_report() -> None:
    """Raise VmaError, before anything is done, if standard output is closed."""
    if sys.stdout is None:
        # Found out afterwards, it would cost the work of hours.
        raise VmaError("standard output is closed: there is nowhere to report to")


def warn_of_leftovers(args: Namespace, directory: Directory) -> None:
    """Mention the partial files beside an output that no run writes any more."""
    if paths := directory.leftovers():
        notice(args, f"{', '.join(paths)}: left by a run that was killed, and may be removed")


def progress_of(args: Namespace, *sources: Input) -> Progress:
    """Return the progress of reading archives."""
    progress = Progress(sources[0].name, args.quiet, args.verbose)
    totals = [source.raw_size for source in sources]
    # Of a pipe, nobody knows the total: then no percentage is shown.
    total = sum(totals) if all(totals) else 0
    progress.begin("reading", total, lambda: sum(source.position() for source in sources))
    return progress


@contextmanager
def loaded(args: Namespace) -> Iterator[tuple[Contents, Progress]]:
    """Open the archive that a command restores, and check what can be checked before writing.

    Of a file that is every extent, of a stream the header.
    """
    with ExitStack() as stack:
        contents = stack.enter_context(open_archive(args.archive, args.base))
        progress = stack.enter_context(progress_of(args, *contents.inputs))
        # A stream cannot be read twice: it is checked while the disks are written.
        if not contents.ordered:
            contents.complete()
        yield contents, progress


def paths_read(args: Namespace) -> list[str]:
    """Return the paths of an archive and its base."""
    return [path for path in (args.archive, args.base) if path is not None]


def require_any_place(args: Namespace, inputs: Sequence[Input], what: str) -> None:
    """Raise VmaError if an archive or its base is a stream; `what` needs more."""
    for path, source in zip(paths_read(args), inputs):
        if source.size is None:
            raise VmaError(
                f"{source.name}: {what} reads at any place, which a stream does not allow; "
                f"make a file that does: vma-tool optimize {escape(path)} "
                f"{escape(plain_name(path))}.zst"
            )


def cmd_list(args: Namespace) -> int:
    """Print what an archive holds."""
    require_report()
    if args.base is not None and args.scan:
        # A difference and its base make an archive that is laid out nowhere.
        raise UsageError("list: --scan shows how one file is laid out, not with --base")
    tables: dict[int, Table] = {}
    contents: Contents | None = None
    with ExitStack() as stack:
        if args.base is not None:
            contents = stack.enter_context(open_archive(args.archive, args.base))
            source = contents.source
        else:
            # The header is enough for a plain listing, even if the rest is damaged.
            more = args.scan or args.partitions
            source = stack.enter_context(open_input(args.archive, index=more))
            contents = contents_of(source) if more else None
        inputs = contents.inputs if contents else (source,)
        if args.partitions:
            require_any_place(args, inputs, "--partitions")
        if contents:
            contents.complete()
            if isinstance(contents, Overlay):
                # With another base, its clusters would make a table that no guest has had.
                progress = stack.enter_context(progress_of(args, contents.base.source))
                contents.check_base(progress)
            for device in contents.header.devices if args.partitions else ():
                if not device.is_vmstate:  # RAM has no partition table
                    tables[device.dev_id] = read_table(contents, device)
        header = contents.header if contents else read_header(source, whole=False)
        found = describe(source, header, contents if args.scan else None, tables)
        # Before anything is printed: half an old and half a new archive is neither.
        for each in inputs:
            each.check_unchanged()
    if args.json:
        print(to_json(found))
    else:
        print_listing(source.name, found)
    # The listing shows names that do not restore, but a script must not take this for success.
    with in_archive(source.name):
        check_names(whole_header(header))
    return 0


def describe(
    source: Input, header: Header, contents: Contents | None, tables: Mapping[int, Table]
) -> dict[str, Any]:
    """Return the object that list --json prints; `contents` adds the findings of a scan."""
    difference = parse_difference(header) if header.magic == DIFFERENCE_MAGIC else None
    header = whole_header(header)
    devices = [device._asdict() for device in header.devices]
    for device, item in zip(header.devices, devices):
        if contents:
            index = contents.index.devices[device.dev_id]
            item.update(stored=index.stored_size, zero=index.zero_size, ascending=index.ascending)
        if device.dev_id in tables:
            item["table"], partitions, item["faults"] = tables[device.dev_id]
            item["partitions"] = [
                {**partition._asdict(), **access_commands(device, partition)}
                for partition in partitions
            ]
    result = {
        "uuid": format_uuid(header.uuid),
        "ctime": header.ctime,
        "configs": [{"name": name, "size": len(data)} for name, data in header.configs],
        "devices": devices,
        "compression": source.compression or None,
        "compressed_size": source.raw_size or None if source.compression else None,
        "seekable": source.size is not None,
        "frames": len(source.table.offsets) - 1 if isinstance(source, FramesInput) else None,
    }
    if source.note:
        result["note"] = source.note
    if difference:
        result["difference"] = {"base": difference.base._asdict(), "new": difference.new._asdict()}
    if contents:
        align = find_align(contents)
        result.update(extents=contents.index.extent_count, canonical=bool(align), align=align)
    return result


def plain_name(path: str) -> str:
    """Return a name for the plain form of a compressed archive, or of standard input."""
    # The result must not be the input: x.vma gives x.vma.new.
    root, extension = os.path.splitext(path)
    return "FILE.vma" if path == "-" else root if extension not in ("", ".vma") else f"{path}.new"


def access_commands(device: Device, partition: Partition) -> dict[str, str | bool | None]:
    """Return the commands that open a partition: in extract's disk, and in a mounted archive.

    `mount` is the first one if it mounts a file system. None where there is no way.
    """
    import shlex

    def quoted(name: str) -> str:
        # It comes from the archive, and these lines are made to be pasted into a root shell.
        return shlex.quote(escape(name))

    file_system = partition.file_system
    disk, part = disk_file_name(device), partition_file_name(device, partition)
    extracted, mounted = quoted(disk), quoted(f"{MOUNT_EXAMPLE}/{disk}")
    command = OPEN_COMMANDS.get(file_system)
    if command or file_system in ("", "swap"):
        # A disk without a table is opened as a whole.
        number = f"p{partition.number}" if partition.number else ""
        return {
            "mountable": False,
            "mount": None,
            "extracted": command and command.format(file=extracted, part=number),
            "mounted": command and command.format(file=mounted, part=number),
        }
    # A journal must not be replayed, as nothing can be written.
    options = ",".join(filter(None, ("ro", JOURNAL_OPTIONS.get(file_system), "loop")))
    place = f",offset={partition.start},sizelimit={partition.size}"
    extracted = f"mount -o {options}{place} {extracted} /mnt"
    mounted = f"mount -o {options} {quoted(f'{MOUNT_EXAMPLE}/{part}')} /mnt/disk"
    return {"mountable": True, "mount": extracted, "extracted": extracted, "mounted": mounted}


def print_device(device: Mapping[str, Any]) -> None:
    size = f"{format_size(device['size'])}, {device['size']} bytes"
    print(f"device   {device['dev_id']:<3} {escape(device['name'])}  {size}")


def print_listing(archive: str, found: Mapping[str, Any]) -> None:
    """Print the result of `describe` for people."""
    print(f"archive  {archive}")
    print(f"uuid     {found['uuid']}")
    print(f"created  {format_time(found['ctime'])}")
    if "difference" in found:
        print(f"base     {Origin(**found['difference']['base']).title}")
    if "align" in found:
        align = found["align"]
        print(f"layout   {f'canonical, --align {align}' if align else 'not canonical'}")
        if found["compression"]:
            frames = f"{found['frames']} frames" if found["frames"] else "read as a stream"
            size = format_size(found["compressed_size"] or 0)
            print(f"stored   {found['compression']}, {frames}, {size}")
            if "note" in found:
                print(f"         {escape(found['note'])}")
    for config in found["configs"]:
        print(f"config   {escape(config['name'])}  {config['size']} bytes")
    for device in found["devices"]:
        print_device(device)
        if "stored" in device:
            order = "ascending" if device["ascending"] else "not in order"
            print(f"             {device['stored']} bytes stored, {device['zero']} zero, {order}")
        if "table" in device:
            print_table(device)


def print_table(device: Mapping[str, Any]) -> None:
    """Print the partitions of a device."""
    if not (device["partitions"] or device["faults"]):
        print("             no partition table, and no file system that is known here")
    for fault in device["faults"]:
        print(f"             damaged {device['table']} table: {fault}")
    for part in device["partitions"]:
        kinds = part["type"], part["file_system"], escape(part["label"])
        what = ", ".join(filter(None, kinds))
        place = f"{device['table']} {part['number']}" if part["number"] else "whole disk"
        print(f"             {place}: {part['start']} + {format_size(part['size'])}  {what}")
        for way in ("extracted", "mounted"):
            if part[way]:
                print(f"               {way + ':':<10} {part[way]}")


def cmd_verify(args: Namespace) -> int:
    """Check archives, one after the other; a bad one does not keep the next from being checked."""
    if args.against is not None and args.digest:
        raise UsageError("verify: --against or --digest, not both")
    needs_data = args.against is not None or args.digest
    if args.quick and needs_data:
        raise UsageError("verify: --quick reads the headers only, --against and --digest all")
    if args.quick and args.base is not None:
        raise UsageError("verify: --quick reads the headers only, --base all")
    if args.against is None and args.ignore_ctime:
        raise UsageError("verify: --ignore-ctime needs --against")
    if not args.quiet or args.json or args.digest:
        require_report()
    check = verify_one
    if needs_data:
        check = verify_digest if args.digest else verify_against
    worst = 0
    for argument in args.archive:
        try:
            # A directory that cannot be read costs only itself, like an archive.
            paths = find_archives(argument) if os.path.isdir(argument) else [argument]
        except VmaError as error:
            paths = []
            worst = max(worst, error.exit_status)
            print_error(error)
        for path in paths:
            try:
                status = check(args, path)
            except VmaError as error:
                status = error.exit_status
                print_error(error)
                if args.json:
                    # One object each: a script sees that it was looked at.
                    print_report(to_json({"archive": path, "ok": False, "error": str(error)}))
            worst = max(worst, status)  # a bad archive counts more than one that cannot be read
    return worst


def print_totals(args: Namespace, index: Index) -> None:
    """With -v, print the closing line of Proxmox's own program.

    Of a difference, nobody has counted the zeros.
    """
    if args.verbose and not index.difference:
        zero = sum(device.zero_size for device in index.devices.values())
        total = sum(device.disk_size for device in index.devices.values())
        percent = zero * 100 / total if total else 0
        print_report(f"total bytes {total}, zero bytes {zero} ({percent:.3g}%)")


def report_good(args: Namespace, path: str, contents: Contents, checked: str) -> None:
    """Print that an archive, or what a difference and its base make, will restore."""
    source, *bases = contents.inputs
    if args.json:
        found: dict[str, Any] = {"archive": path}
        if bases:
            found["base"] = args.base
        found.update(ok=True, checked=checked)
        # A difference and its base make an archive that is laid out nowhere.
        found.update(describe(source, contents.header, None if bases else contents, {}))
        print_report(to_json(found))
    elif not args.quiet:
        devices = contents.header.devices
        size = format_size(sum(device.size for device in devices))
        facts = [f"a difference from {base.name}" for base in bases]
        facts += [plural(len(devices), "device"), size]
        if not bases:
            stored = sum(index.stored_size for index in contents.index.devices.values())
            align = find_align(contents)
            layout = f"canonical (--align {align})" if align else "not canonical"
            facts += [f"{format_size(stored)} stored", layout]
        print_report(f"{source.name}: OK, {', '.join(facts)}, {checked}")
        print_totals(args, contents.index)


def read_all(args: Namespace, contents: Contents, consumer: Consumer) -> None:
    """Read all clusters, which checks them, and hand them to a consumer."""
    with progress_of(args, *contents.inputs) as progress:
        copy_parts(contents, consumer, progress)
        progress.finish()
    contents.check_unchanged()


def verify_one(args: Namespace, path: str) -> int:
    """Read an archive, and its base, and say that it will restore; raises VmaError if not."""
    if args.base is not None:
        with open_archive(path, args.base) as contents:
            read_all(args, contents, Consumer())  # which does nothing
        report_good(args, path, contents, "all data read")
        return 0
    try:
        verify_input(args, path)
    except SeekableError as error:
        # Proxmox reads it from one end to the other, and that may well succeed.
        try:
            verify_input(args, path, str(error.args[0]))
        except VmaError:
            # As a stream it fails as well: the first fault is nearer to the damage.
            raise error from None
    return 0


def verify_input(args: Namespace, path: str, fault: str = "") -> None:
    """Verify an archive; one with a fault of its seek table or index is read as a stream."""
    with open_input(path, as_stream=bool(fault)) as source, progress_of(args, source) as progress:
        if args.quick:
            progress.begin("reading headers", source.size or source.raw_size, lambda: source.offset)
        elif isinstance(source, FramesInput):
            check_frames(source, progress)
        elif isinstance(source, FileInput):
            source.read_all = True  # a sector that cannot be read must not pass
        contents = contents_of(source)
        with in_archive(source.name):
            # Names that no file can have do not restore; nothing here needs them otherwise.
            check_names(contents.header)
        for _ in ticking(contents.extents(), progress):
            pass
        progress.finish()
        source.check_unchanged()
        # Of a stream, everything is read anyway.
        what = "headers only" if args.quick and source.size is not None else "all data read"
        if source.note or fault:
            what += f", as a stream: {source.note or fault}"
        report_good(args, path, contents, what)


def check_frames(source: FramesInput, progress: Progress) -> None:
    """Decompress all frames, and so check their checksums."""

    def ranges() -> Iterator[tuple[int, int]]:
        offsets = source.table.offsets
        count = len(offsets) - 1
        start = 0
        for i in range(1, count + 1):
            # Whole frames, as many as a buffer holds: so none is decompressed twice.
            if i == count or offsets[i + 1] - start > BUFFER_SIZE:
                yield start, offsets[i]
                progress.tick()
                start = offsets[i]

    def work(place: tuple[int, int], buffer: memoryview) -> tuple[()]:
        start, end = place
        source.read_at([(start, buffer[: end - start])])
        return ()

    pump(ranges(), lambda place, _: place, work, [], parallel=True)


def verify_against(args: Namespace, path: str) -> int:
    """Compare with another archive, and say how they differ."""
    with open_archive(path, args.base) as ours, open_archive(args.against) as theirs:
        source, other = ours.source, theirs.source
        with progress_of(args, *ours.inputs) as progress:
            found = compare_headers(ours.header, theirs.header, args.ignore_ctime)
            found += compare_disks(ours, theirs, progress)
            progress.finish()
        # Before the verdict: files that change meanwhile may differ, or not, for that reason only.
        ours.check_unchanged()
        theirs.check_unchanged()
    if args.json:
        result = {"archive": path, "against": args.against, "same": not found}
        print_report(to_json({**result, "differences": found}))
    elif not found and not args.quiet:
        print_report(f"{source.name}: OK, the same as {other.name}")
    # An archive that differs is an error; --json has the lines in its object.
    for line in found if not args.json else ():
        print_error(f"{source.name}: differs from {other.name}: {line}")
    return EXIT_BAD if found else 0


def verify_digest(args: Namespace, path: str) -> int:
    """Print the SHA-256 of each config and disk, under the names that unpack gives them."""
    with open_archive(path, args.base) as contents:
        consumer = DiskDigests(contents.header)
        read_all(args, contents, consumer)
    rows = [(name, len(data), hashlib.sha256(data)) for name, data in contents.header.configs]
    for dev_id, index in contents.index.devices.items():
        rows.append((index.device.name, index.disk_size, consumer.digests[dev_id]))
    if args.json:
        files = [
            {"name": name, "size": size, "sha256": digest.hexdigest()}
            for name, size, digest in rows
        ]
        print_report(to_json({"archive": path, "ok": True, "files": files}))
    for name, _, digest in rows if not args.json else ():
        print_report(f"{digest.hexdigest()}  {escape(name)}")
    return 0


def cmd_extract(args: Namespace) -> int:
    """Write configs and disks as Proxmox's own `vma extract` does."""
    if args.output is not None and args.devices is None:
        raise UsageError("extract: -o writes one disk: choose it with -d NAME")
    if (args.output is None) != (args.targetdir is not None):
        raise UsageError("extract: name a TARGETDIR, or -o PATH")
    if args.map is not None and args.devices is not None:
        raise UsageError("extract: the devices are chosen by -d or by -r, not by both")
    if args.output is not None:
        return extract_one(args)
    if args.map is not None:
        return extract_mapped(args)
    return restore(args, args.targetdir, for_pack=False)


def choose(header: Header, lists: Sequence[str] | None) -> list[Device]:
    """Return the devices chosen by lists of names with commas: all, if there are no lists.

    A part of a name between dashes will do where one device has it: scsi0 for drive-scsi0.
    """
    if lists is None:
        return list(header.devices)
    known = {device.name: device for device in header.devices}
    chosen = set()
    for text in lists:
        for word in [text] if text in known else text.split(","):  # a name may have a comma itself
            # Dashes on both sides, so that scsi1 is not taken for scsi10.
            parts = [name for name in known if word and f"-{word}-" in f"-{name}-"]
            # A whole name counts more than parts of others: scsi1 may be one.
            fitting = [word] if word in known else parts
            if len(fitting) > 1:
                raise VmaError(f"device {quote(word)} may be {', '.join(map(quote, fitting))}")
            if not fitting:
                there = ", ".join(map(quote, known)) or "none"
                raise VmaError(f"no device {quote(word)}, there are {there}")
            chosen.update(fitting)
    return [device for name, device in known.items() if name in chosen]


def extract_one(args: Namespace) -> int:
    """Write one disk to a file, a block device or standard output."""
    refuse_same(paths_read(args), args.output)
    refuse_existing(args.output, args.force)
    with loaded(args) as (contents, progress):
        device, *more = choose(contents.header, args.devices)
        if more:
            raise VmaError("-o writes one disk: choose it with -d NAME")
        with open_output(args.output, args.force, contents.readers, device) as output:
            if isinstance(output, PartialFile):
                warn_of_leftovers(args, output.directory)
            # The holes of a new file are zeros; a device may have other bytes there.
            zeros = () if isinstance(output, PartialFile) else {device.dev_id}
            write_disks(contents, {device.dev_id: output}, progress, zeros)
            finish_writing(output.sync, progress)
            output.commit(contents.check_unchanged)
    return 0


def finish_writing(sync: Callable[[], None], progress: Progress) -> None:
    """Flush the output; that may take long, so the progress says so."""
    progress.finish()
    progress.begin("flushing", 0, lambda: 0)
    sync()


def extract_mapped(args: Namespace) -> int:
    """Write configs into a directory, and disks where a map says, as Proxmox's qmrestore does."""
    require_report()
    with ExitStack() as stack:
        contents, progress = stack.enter_context(loaded(args))
        header = contents.header
        # RAM goes beside the configs, as it has no line in the map.
        states = [disk_file_name(device) for device in header.devices if device.is_vmstate]
        refuse_twice(contents.source.name, [*(config.name for config in header.configs), *states])
        directory = stack.enter_context(make_directory(args.targetdir, contents.readers))
        warn_of_leftovers(args, directory)
        directory.require_empty()
        # Who writes the map into a FIFO reads the configs first, and waits for the lines below.
        for config in header.configs:
            directory.create(config.name).append([config.data])
        # A name must not appear before its data is on the disk.
        directory.flush()
        undo = stack.enter_context(ExitStack())
        with signals_blocked():
            directory.commit(replace=False)
            for config in header.configs:
                # If a disk fails later, the configs must not stay alone.
                undo.callback(directory.remove, config.name)
        print_contents(header)
        # Only now: a FIFO has no map in it before qmrestore has read the lines above.
        with os_errors_as(escape(args.map)), open(args.map, "rb") as lines:
            places, ignored = parse_map(line.decode("utf-8", "surrogateescape") for line in lines)
        # qmrestore may ask for throttling or a cache, which do not change what is written.
        if ignored:
            text = f"{escape(args.map)}: not applied here: {', '.join(sorted(ignored))}"
            notice(args, text)
        targets, zeros = open_destinations(args, header, places, stack, directory)
        write_disks(contents, targets, progress, zeros)
        for target in targets.values():
            finish_writing(target.sync, progress)
        contents.check_unchanged()
        print_totals(args, contents.index)
        directory.commit(replace=False)
        undo.pop_all()
    return 0


def print_contents(header: Header) -> None:
    """Print the lines that qmrestore waits for."""
    Progress.erase()
    for config in header.configs:
        print(f"CFG: size: {len(config.data)} name: {escape(config.name)}")
    for device in header.devices:
        if device.is_vmstate:
            print(f"VMSTATE: dev_id={device.dev_id} memory: {device.size}")
        else:
            print(f"DEV: dev_id={device.dev_id} size: {device.size} devname: {escape(device.name)}")
    print(f"CTIME: {format_time(header.ctime)}", flush=True)


def open_destinations(
    args: Namespace, header: Header, places: Places, stack: ExitStack, directory: Directory
) -> tuple[dict[int, Target], set[int]]:
    """Open where a map sends the devices; return that by dev_id, and who gets zeros written."""
    targets: dict[int, Target] = {}
    used: list[str] = []
    zeros = set()
    for device in header.devices:
        if device.is_vmstate:
            targets[device.dev_id] = directory.create(disk_file_name(device))
            continue
        if device.name not in places:
            raise VmaError(f"{escape(args.map)}: no line for device {quote(device.name)}")
        place = places[device.name]
        if place is None:  # the map leaves it out
            continue
        path, write_zeros = place
        refuse_same(paths_read(args), path)
        if any(is_same_file(other, path) for other in used):
            raise VmaError(f"{escape(path)}: two disks are to go there")
        used.append(path)
        targets[device.dev_id] = stack.enter_context(open_destination(path, device))
        if write_zeros:
            # Only who made the map knows whether the storage is all zeros already.
            zeros.add(device.dev_id)
    return targets, zeros


def cmd_mount(args: Namespace) -> int:
    """Mount an archive; serve it in the background, or as long as a command runs."""
    if sys.platform != "linux":
        raise VmaError("mount speaks to the Linux kernel: on other systems, extract the disks")
    # It would count as no command, and the archive would stay mounted.
    if args.command == []:
        raise UsageError("no command after --")
    point = MountPoint(args.directory, escape(args.archive), args.options)
    with open_archive(args.archive, args.base) as contents:
        inputs = contents.inputs
        require_any_place(args, inputs, "mount")
        for source in inputs:
            if isinstance(source, FramesInput):
                # Many programs may read at different places at once.
                source.keep_frames(MOUNT_FRAMES)
        with progress_of(args, *inputs) as progress:
            size = sum(source.size or 0 for source in inputs)
            progress.begin("reading headers", size, lambda: sum(each.offset for each in inputs))
            # A damaged archive is refused here, not when a program reads it later.
            contents.complete()
            # Reading here and there would not show that it is the wrong one.
            if isinstance(contents, Overlay):
                contents.check_base(progress)
            files = mounted_files(contents)
            contents.check_unchanged()
        in_background = not (args.foreground or args.command)
        # In the background, standard error belongs to nobody any more.
        log = log_to_syslog if in_background else print_error
        readers = contents.readers
        # Nobody may read a disk through the mount who cannot read the archive.
        mode = (readers.mode_for(os.getgid()) if readers else 0o600) & 0o444
        server = FuseServer(files, mode, contents.header.ctime, log)
        # Before mounting: a signal in between would leave a mount that nobody serves.
        signals = awaited_signals()
        with signals_blocked(signals):
            server.fd = point.mount()
            if args.foreground and not args.command:
                notice(args, f"{point.name}: mounted, until it is unmounted or Ctrl-C")
                serve(server, point, signals)
                return 0
            return mount_and_leave(args, server, point, signals)


def mount_and_leave(
    args: Namespace, server: FuseServer, point: MountPoint, signals: set[signal.Signals]
) -> int:
    """Let a child process serve; run the command if there is one, and unmount."""
    try:
        child = start_server(server, point, signals, keep_stderr=bool(args.command))
    except BaseException:
        point.unmount()  # nobody serves: every access would hang
        raise
    if not args.command:
        return 0
    try:
        return run_command(args.command, signals)
    finally:
        # Else the child serves on for as long as a file is open, perhaps for days.
        if point.unmount():
            os.waitpid(child, 0)  # then nothing is in use any more
        else:
            print_error(f"{point.name}: {STILL_IN_USE}")


def cmd_rescue(args: Namespace) -> int:
    """Recover configs and disks from a damaged archive, and report what is lost."""
    require_report()
    with open_salvage(args.archive) as (source, window):
        progress = progress_of(args, source)
        with progress, make_directory(args.targetdir, source.readers) as directory:
            directory.require_empty()
            window.progress = progress
            with in_archive(source.name):
                rescue = Rescue(window, directory.create)
                rescue.run()
            # The report is written last, when all is known, and appears with the disks.
            found = rescue.finish()
            directory.create(RESCUE_NAME).append([to_json(found).encode() + b"\n"])
            finish_writing(directory.flush, progress)
            directory.commit(False, source.check_unchanged)
    if args.json:
        print(to_json(found))
    elif not args.quiet:
        print_rescued(source.name, found, is_plain=not window.source.is_decoded)
    # So that a script does not take the disks for whole.
    return EXIT_BAD if found["damage"] else 0


def print_rescued(archive: str, found: Mapping[str, Any], is_plain: bool) -> None:
    """Print the result of `Rescue.finish` for people."""
    print(f"archive  {archive}")
    for flaw in found["damage"]:
        print(f"damage   offset 0x{flaw['offset']:x}: {escape(flaw['text'])}")
    for config in found["configs"]:
        print(f"config   {escape(config['name'])}  {config['size']} bytes")
    sizes = {"lost": 0, "doubtful": 0}
    for device in found["devices"]:
        print_device(device)
        for state in sizes:
            ranges = device[state]
            size = sum(count for _, count in ranges)
            sizes[state] += size
            print(f"             {state}: {format_size(size)}")
            for start, count in ranges:
                print(f"               {start} + {count}")
    size = sum(device["size"] for device in found["devices"])
    right = f"{format_size(size - sum(sizes.values()))} of {format_size(size)} are right"
    vouching = "its data has no checksum" if is_plain else "checksums tell"
    print(f"certain  {right}, as far as can be known: {vouching}.")
    if any(sizes.values()):
        lost, doubtful = map(format_size, sizes.values())
        print(
            f"unsure   {lost} are lost and read as zeros, {doubtful} are doubtful and may be wrong."
        )
        print("next     Check the file systems of a copy: fsck, ntfsfix, chkdsk. Which files the")
        print('         ranges hit: see the README, "A damaged backup".')


def cmd_unpack(args: Namespace) -> int:
    """Write configs, disks and vma.json, from which pack makes the archive again."""
    return restore(args, args.directory, for_pack=True)


def restore(args: Namespace, path: str, for_pack: bool) -> int:
    """Write an archive's configs and devices into a directory, as unpack does or as extract."""
    if args.verbose:
        require_report()
    with loaded(args) as (contents, progress):
        source, header = contents.source, contents.header
        if for_pack:
            # pack takes names as they are; Proxmox's extract makes disk-NAME.raw of them.
            names = {device.dev_id: device.name for device in header.devices}
            extra = [DESCRIPTION_NAME]
        else:
            devices = choose(header, args.devices)
            names = {device.dev_id: disk_file_name(device) for device in devices}
            extra = []
        files = [*(config.name for config in header.configs), *names.values(), *extra]
        refuse_twice(source.name, files)
        for name in files:
            # With --force, a disk would replace the archive that it is read from.
            refuse_same(paths_read(args), os.path.join(path, name_on_disk(name)))
        with make_directory(path, contents.readers) as directory:
            replace = for_pack and args.force
            warn_of_leftovers(args, directory)
            if for_pack:
                directory.require_free(files, replace)
            else:
                directory.require_empty()

            def create(name: str) -> PartialFile:
                # A symbolic link or another special file has no attributes to keep.
                state = directory.state(name)
                replaces = state is not None and stat.S_ISREG(state.st_mode)
                return directory.create(name, replaces)

            for config in header.configs:
                create(config.name).append([config.data])
            targets = {dev_id: create(name) for dev_id, name in names.items()}
            write_disks(contents, targets, progress)
            if for_pack:
                create(DESCRIPTION_NAME).append([describe_for_pack(header)])
            finish_writing(directory.flush, progress)
            print_totals(args, contents.index)
            directory.commit(replace, contents.check_unchanged)
    return 0


def cmd_pack(args: Namespace) -> int:
    """Write the canonical archive of a directory that unpack or extract wrote, or one like it."""
    # Not `exists`: a broken link is a mistake to report, not a directory of another kind.
    described = os.path.lexists(os.path.join(args.directory, DESCRIPTION_NAME))
    with os_errors_as(escape(args.directory)):
        names = os.listdir(args.directory)
        # OUTPUT must not replace a disk that it is made of.
        refuse_same([os.path.join(args.directory, name) for name in names], args.output)
        refuse_existing(args.output, args.force)
        header, paths = (read_described if described else read_undescribed)(args.directory)
    write_packed(args, (set_options(header, args.options), paths))
    return 0


def write_packed(args: Namespace, packing: Packing) -> None:
    """Write an archive of configs and disks; sizes of 0 are found out."""
    header, paths = packing
    # Everything is checked before OUTPUT is opened.
    require_names(header)
    level = compression_level(args, args.output)
    if args.map is not None:
        header = add_device_map(header, args.map)
    with ExitStack() as stack:
        disks = [
            open_disk(stack, device, paths[device.name])
            for device in canonical_order(header.devices)
        ]
        for device, source in disks:
            if device.size > source.size:
                text = f"{source.name}: {source.size} bytes, rounded up to {device.size}"
                notice(args, f"{text}, as disks have whole sectors")
        # Sizes are known only now.
        header = header._replace(devices=tuple(sorted(device for device, _ in disks)))
        output = stack.enter_context(open_output(args.output, args.force))
        missing = ", ".join(quote(device.name) for device in unmapped_devices(header))
        if missing:
            text = f"{CONFIG_NAME} has no #qmdump#map line for {missing}"
            notice(args, f"{text}: qmrestore needs one, --map STORAGE adds it")
        progress = stack.enter_context(Progress(output.name, args.quiet, args.verbose))
        sources = [source for _, source in disks]
        total = sum(map(data_size, sources))  # without holes, as they are not read
        progress.begin("reading", total, lambda: sum(source.bytes_read for source in sources))

        def last_look() -> None:
            for source in sources:
                source.check_unchanged()

        write_archive(args, Disks(header, disks), output, level, progress)
        finish_writing(output.sync, progress)
        output.commit(last_look)


def compression_level(args: Namespace, output: str, compress: bool = False) -> int:
    """Return the zstd level for an output, 0 for a plain one; `compress` is the default."""
    level = args.compress
    if level is None:
        level = DEFAULT_LEVEL if compress or output.endswith(".zst") else 0
    if level:
        require_zstd()  # before anything is read or written
    return int(level)


def write_archive(
    args: Namespace, producer: Producer, output: Target, level: int, progress: Progress
) -> None:
    """Write the canonical archive of a producer's clusters, and check that it reads back."""
    align = ALIGNS[args.align]
    with warning_of_partial(output):
        # A pipe may have got a part of the archive when an error comes.
        writer = canonical_writer(align, output, level)
        writer.begin(producer.header)
        copy_parts(producer, writer, progress)
    if isinstance(output, PartialFile):
        warn_of_leftovers(args, output.directory)
        output.truncate(output.position)  # more may have been reserved
        with output.read_back(writer.zstd) as written:
            check_written(writer, written)


@contextmanager
def warning_of_partial(output: Target) -> Iterator[None]:
    """Add to an error that the pipe's output is incomplete."""
    try:
        yield
    except VmaError as error:
        if isinstance(output, PartialFile) or not output.position:
            raise
        incomplete = VmaError(f"{error}; what {output.name} got is incomplete, and no archive")
        incomplete.exit_status = error.exit_status
        raise incomplete from error


def cmd_create(args: Namespace) -> int:
    """Write an archive of configs and raw disks, named one by one, as Proxmox's vma create does."""
    paths = {}
    for spec in [*args.devices, *args.disks]:
        text = spec
        # Proxmox's program takes a format in front of the name.
        if text.startswith("format="):
            image_format, _, text = text.removeprefix("format=").partition(":")
            disk = escape(text.partition("=")[2])
            # A qcow2 image taken for a raw disk would make an archive that restores to garbage.
            require_raw(image_format, f"first run qemu-img convert -O raw {disk} {disk}.raw")
        name, _, path = text.partition("=")
        if not name or not path or name in paths:
            raise VmaError(f"{quote(spec)} is not NAME=PATH, or the second one of that name")
        paths[name] = path
    refuse_same([*paths.values(), *args.config], args.output)
    refuse_existing(args.output, args.force)
    # Proxmox's program, too, takes the file's name as the config's.
    configs = [Config(os.path.basename(path), read_small(path)) for path in args.config]
    write_packed(args, packing_of(configs, paths))
    return 0


def cmd_config(args: Namespace) -> int:
    """Print one config, byte for byte, from the header alone."""
    require_report()
    with open_input(args.archive, index=False) as source:
        # Of two configs with one name, the later one counts, as for Proxmox.
        configs = dict(read_header(source, whole=False).configs)
    data = configs.get(args.config)
    if data is None:
        there = ", ".join(map(quote, configs)) or "none"
        raise VmaError(f"{source.name}: no config {quote(args.config)}, there are {there}")
    Target(1, "standard output", seekable=False).append([data])
    return 0


def cmd_optimize(args: Namespace) -> int:
    """Rewrite an archive in the canonical layout, to another file or in place."""
    if args.output is None and (args.archive == "-" or args.base is not None):
        what = "standard input" if args.base is None else "a difference"
        raise UsageError(f"optimize: {what} cannot be replaced: name an OUTPUT")
    if args.check and "-" in (args.archive, args.output, args.base):
        raise UsageError("optimize: --check reads both archives again: name files")
    if args.output == "-" or args.base is not None:
        refuse_same(paths_read(args), args.output)
    if args.output != "-" and not args.quiet:
        require_report()
    # OUTPUT may be another name of the same file.
    in_place = args.output is None or is_same_file(args.archive, args.output)
    path = args.archive if args.output is None else args.output
    if not in_place:
        hint = "; to optimize several archives in place, run vma-tool optimize once for each"
        refuse_existing(path, args.force, hint)
    with ExitStack() as stack:
        contents = stack.enter_context(
            open_archive(args.archive, args.base, args.memory, directory_beside(path))
        )
        source = contents.source
        # In place, the file keeps its form.
        level = compression_level(args, path, source.compression == "zstd" and in_place)
        if in_place:
            require_replaceable(path, source, args.compress)
        progress = stack.enter_context(progress_of(args, *contents.inputs))
        # Rewriting it would give the same bytes, and cost a new copy in each snapshot.
        if in_place and is_optimized(contents, ALIGNS[args.align], compressed=level > 0):
            source.check_unchanged(path)
            if not args.quiet:
                print_report(f"{source.name}: is canonical already (--align {args.align})")
            return 0
        output = stack.enter_context(
            open_output(path, args.force, contents.readers, in_place=in_place)
        )
        file = output if isinstance(output, PartialFile) else None
        if args.check and (file is None or source.raw is None):
            raise UsageError("optimize: --check reads both archives again: name files")
        if file is None and not contents.ordered:
            check_extents(contents)  # bytes in a pipe cannot be taken back
        # So a full disk shows at once. How large the others become is not known.
        if file and source.size is not None and not level and args.base is None:
            file.reserve(source.size)
        write_archive(args, contents, output, level, progress)
        # In place, the written archive will be the only one.
        if file and (args.check or (args.check is None and in_place)):
            check_contents(args, contents, file, level, progress)
        finish_writing(output.sync, progress)
        output.commit(lambda: contents.check_unchanged(path if in_place else None))
    if file and not args.quiet:  # not into an archive on standard output
        size = format_size(file.position)
        print_report(f"{source.name}: optimized (--align {args.align}), {size}")
    return 0


def cmd_diff(args: Namespace) -> int:
    """Write the clusters in which an archive differs from its base."""
    if args.base == args.archive == "-":
        raise UsageError("diff: only one of BASE and NEW can be standard input")
    refuse_same(paths_read(args), args.output)
    if args.output != "-" and not args.quiet:
        require_report()
    temporary = directory_beside(args.output)
    level = compression_level(args, args.output, compress=True)
    with ExitStack() as stack:
        base, new = (
            stack.enter_context(open_archive(path, directory=temporary))
            for path in (args.base, args.archive)
        )
        progress = stack.enter_context(progress_of(args, *new.inputs, *base.inputs))
        for contents in (base, new):
            if not contents.ordered:
                contents.complete()
        # The difference shows something of both.
        readers = common_readers([base.readers, new.readers])
        output = stack.enter_context(open_output(args.output, args.force, readers))
        names = [
            "standard input" if path == "-" else name_from_disk(os.path.basename(path))
            for path in (args.base, args.archive)
        ]
        difference = DifferenceWriter(base, new, level, temporary)
        stack.callback(difference.waiting.close)
        difference.write_extents(progress)
        with warning_of_partial(output):
            # The header has the digests of all data, so the extents have waited for it in a file.
            difference.finish(names, output)
        if isinstance(output, PartialFile):
            warn_of_leftovers(args, output.directory)
            with output.read_back(difference.writer.zstd) as written:
                check_written(difference.writer, written)
        finish_writing(output.sync, progress)

        def last_look() -> None:
            for contents in (base, new):
                contents.check_unchanged()

        output.commit(last_look)
    if args.output != "-" and not args.quiet:
        size = format_size(output.position)
        print_report(f"{new.source.name}: a difference from {base.source.name}, {size}")
    return 0


def check_extents(contents: Contents) -> None:
    """Read all extent headers of a file; raises FormatError."""
    for _ in contents.extents():
        pass


def is_optimized(contents: Contents, align: int, compressed: bool) -> bool:
    """Say whether a file needs no change by optimize."""
    if contents.ordered or compressed != isinstance(contents.source, FramesInput):
        return False
    check_extents(contents)
    return is_canonical(contents, align)


def directory_beside(output: str) -> str:
    """Return where a stream's temporary file may be: beside a file, but not in /dev or /proc."""
    # A pipe or a device has no place beside it for a file of this size.
    if output == "-" or (os.path.exists(output) and not os.path.isfile(output)):
        return ""
    return os.path.dirname(os.path.realpath(output))


def require_replaceable(path: str, source: Input, compress: int | None) -> None:
    """Raise VmaError if an archive cannot be optimized in place."""
    if source.state is None or not stat.S_ISREG(source.state.st_mode):
        raise VmaError(f"{source.name}: only a file can be replaced: name an OUTPUT")
    if source.compression and (source.compression != "zstd" or compress == 0):
        kind, suffix = ("a plain", "") if compress == 0 else ("a zstd", ".zst")
        raise VmaError(
            f"{source.name}: {source.compression} is not replaced by {kind} archive: "
            f"vma-tool optimize {escape(path)} {escape(plain_name(path) + suffix)}"
        )


def check_contents(
    args: Namespace, contents: Contents, output: PartialFile, level: int, progress: Progress
) -> None:
    """Raise VmaError unless the written archive has the same disks as the one it was made of."""
    with ExitStack() as stack:
        written = stack.enter_context(output.read_back(require_zstd() if level else None))
        if contents.ordered:  # a stream is read once: it is opened again
            # Standard input only comes here in place, so OUTPUT still is the same file.
            path = args.output if args.archive == "-" else args.archive
            contents = stack.enter_context(
                open_archive(path, args.base, args.memory, directory_beside(path))
            )
        progress.finish()
        progress.begin("comparing", output.position, written.position)
        found = compare_disks(contents, contents_of(written), progress)
    if found:
        raise VmaError(f"{output.name}: what was written differs: {found[0]}")


# ---------------------------------------------------------------------------------------------
# Command line

DESCRIPTION = """\
Make Proxmox VE backups (.vma) deduplicate, and get data out of them.

look:
  list        show what an archive holds
  config      print one config of an archive

check:
  verify      check that archives will restore

get data out:
  extract     write configs and disks as Proxmox's own vma extract does
  mount       show configs, disks and partitions as files, read-only
  unpack      write configs, disks and vma.json, for pack
  rescue      write what is left of a damaged archive, and say what is lost

make:
  create      make an archive of raw disks or block devices
  pack        make an archive of what unpack wrote

rewrite:
  optimize    rewrite an archive in the canonical layout
  diff        write only what differs from an older archive

shell:
  completion  print a shell's completion of this command line

vma-tool COMMAND --help tells the rest."""
EXAMPLES = """
examples:
  vma-tool optimize vzdump-qemu-100.vma            rewrite it in place
  zstdcat x.vma.zst | vma-tool unpack - dir/       take it apart
  vma-tool verify *.vma && echo all will restore
"""


class Once(argparse.Action):
    """Stores a value, and refuses a second one: argparse would forget the first."""

    def __call__(self, _: Any, namespace: Namespace, values: Any, option: Any = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "may be given only once")
        setattr(namespace, self.dest, values)


def parse_option(text: str) -> tuple[str, str]:
    # A line of a config is `key: value`; neither part may begin a new line, a section or a comment.
    match = re.fullmatch(r"([^=:[#\n\r \t]+)=([^\n\r]*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{quote(text)} is not KEY=VALUE")
    return match[1], match[2]


def parse_storage(text: str) -> str:
    # The lines of the map are separated by colons.
    if not re.fullmatch(r"[^\s:]*", text):
        raise argparse.ArgumentTypeError(f"{quote(text)} is no storage's name")
    return text


def parse_memory(text: str) -> int:
    with suppress(ValueError):
        if (size := parse_size(text)) >= 0:
            return size
    raise argparse.ArgumentTypeError(f"{quote(text)} is no size like 64M or 1G")


def parse_mount_options(text: str) -> list[str]:
    options = text.split(",")
    unknown = [quote(option) for option in options if option not in MOUNT_OPTIONS]
    if unknown:
        known = ", ".join(MOUNT_OPTIONS)
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {known}")
    return options


def parse_compression(text: str) -> int:
    """Return the zstd level, 0 for none."""
    match = re.fullmatch(r"zstd(?::([0-9]{1,2}))?", text)
    level = int(match[1] or DEFAULT_LEVEL) if match else 0
    if text != "none" and level not in COMPRESSION_LEVELS:
        last = COMPRESSION_LEVELS[-1]
        raise argparse.ArgumentTypeError(f"{quote(text)} is neither none nor zstd:1 to zstd:{last}")
    return level


def cmd_completion(args: Namespace) -> int:
    """Print a shell's completion of this command line, made from the parser itself."""
    require_report()
    cases = []
    for name in COMMANDS:
        words: list[str] = []
        # argparse has no public way to ask a parser for its options.
        for action in command_parser(name)._actions:
            # The pattern of a shell's case: COMMAND:OPTION
            pattern = "|".join(f"{name}:{option}" for option in action.option_strings)
            if action.choices and pattern:
                cases.append(f"    {pattern}) words='{' '.join(action.choices)}' ;;")
            elif pattern and str(action.metavar).startswith("NAME"):  # one that the archive has
                kind = {"devices": "device +[0-9]+", "config": "config"}[action.dest]
                cases.append(f"    {pattern}) kind='{kind}' ;;")
            if pattern:
                words += action.option_strings
            else:
                # First, as words that begin with an option are only offered after a dash.
                words = [*(action.choices or ()), *words]
        cases.append(f"    {name}:*) words='{' '.join(words)}' ;;")
    if args.shell == "zsh":
        print("# zsh completion of vma-tool: source this from ~/.zshrc, after compinit")
        print("autoload -U +X bashcompinit && bashcompinit")
    else:
        print("# bash completion of vma-tool: source this from ~/.bashrc")
    # compgen expands its words, so of the archive's names only harmless ones are given to it.
    print(f"""_vma_tool() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}}
  local words= kind= prefix= archive= word=
  if ((COMP_CWORD == 1)); then words='{" ".join(COMMANDS)}'; else
    case $current in # --align=1 is one word in zsh, and three in bash
    =) current= ;;
    --*=*) prefix=${{current%%=*}}= previous=${{current%%=*}} current=${{current#*=}} ;;
    *) if [[ $previous == = ]]; then previous=${{COMP_WORDS[COMP_CWORD-2]}}; fi ;;
    esac
    case ${{COMP_WORDS[1]}}:$previous in
{chr(10).join(cases)}
    esac
    if [[ -n $kind ]]; then # ask the archive on the line
      for word in "${{COMP_WORDS[@]:2}}"; do
        word=${{word/#\\~\\//$HOME/}}
        if [[ -f $word ]]; then archive=$word; fi
      done
      if [[ $kind == device* && $current == *,* ]]; then
        prefix=${{current%,*}}, current=${{current##*,}}
      fi
      [[ -z $archive ]] || words=$("${{COMP_WORDS[0]}}" list -- "$archive" 2>/dev/null </dev/null |
        sed -nE "s/^$kind +([A-Za-z0-9._-]+)  .*/\\1/p")
    fi
    if [[ $words == -* && $current != -* ]]; then words=; fi # files, until a dash is typed
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ -n $prefix ]]; then COMPREPLY=("${{COMPREPLY[@]/#/$prefix}}"); fi
}}
complete -o default -F _vma_tool vma-tool vma_tool.py""")
    return 0


# Names and options of an argument, as argparse's add_argument takes them
Argument = tuple[Sequence[str], Mapping[str, Any]]


def arg(names: str, metavar: str | None, text: str | None = None, **options: Any) -> Argument:
    """Return an argument that has a value; metavar is what --help calls that."""
    return names.split(), {"metavar": metavar, "help": text, **options}


def flag(names: str, text: str, **options: Any) -> Argument:
    return names.split(), {"action": "store_true", "help": text, **options}


# Arguments that several commands have read the same in the --help of each.
SEVERAL: dict[str, Any] = {"action": "append", "default": []}
COMMON = (
    flag("--version", "show program's version number and exit",
         action="version", version=f"vma-tool {__version__}"),
    flag("-q --quiet", "print errors only"),
    flag("-v --verbose", "print more"),
)  # fmt: skip
BASE = arg(
    "--base", "BASE", "ARCHIVE is a difference, and this the full archive that it was made from",
    action=Once,
)  # fmt: skip
JSON = flag("--json", "print one JSON object, for scripts")
ARCHIVE_HELP = "a file, plain or compressed, or - for standard input"
ARCHIVE = arg("archive", "ARCHIVE", ARCHIVE_HELP)
DIRECTORY = arg("directory", "DIRECTORY")
OUTPUT_HELP = "a file, or - for standard output"
OUTPUT = arg("output", "OUTPUT", OUTPUT_HELP)
FORCE = flag("--force", "replace OUTPUT if it exists")
COMPRESS = functools.partial(arg, "--compress", "zstd[:LEVEL]|none", type=parse_compression)
LAYOUT = (
    arg("--align", "SIZE",
        "fill an extent that stores blocks with zeros up to a multiple of SIZE: 4K, 64K, 128K, "
        f"256K, 512K or 1M (default {DEFAULT_ALIGN}: all of its blocks, best for restic and for "
        "storage with blocks of up to 512 KiB; 1M for blocks of 1 MiB)",
        choices=ALIGNS, default=DEFAULT_ALIGN, type=str.upper),
    COMPRESS(f"compress (default: if OUTPUT ends in .zst, with level {DEFAULT_LEVEL})"),
    FORCE,
)  # fmt: skip
DEVICE_MAP = arg(
    "--map", "STORAGE",
    f"add the #qmdump#map lines that qmrestore needs to {CONFIG_NAME} (STORAGE may be empty)",
    action=Once, type=parse_storage,
)  # fmt: skip

# What runs each command, an example for its --help, and its arguments
COMMANDS: dict[str, tuple[Any, ...]] = {
    "list": (
        cmd_list, "--scan backup.vma",
        BASE, JSON,
        flag("--partitions", "show what the disks hold (not of a stream)"),
        flag("--scan", "read all extent headers too: bytes stored, order, layout"),
        ARCHIVE,
    ),
    "verify": (
        cmd_verify, "a.vma b.vma.zst",
        flag("--quick", "read the headers only, not the data"),
        BASE,
        arg("--against", "OTHER", "compare configs and disk contents with this archive",
            action=Once),
        flag("--ignore-ctime", "with --against: the time may differ"),
        flag("--digest", "print the SHA-256 of each config and disk, as sha256sum does"),
        flag("--json", "print one JSON object an archive"),
        arg("archive", "ARCHIVE", f"{ARCHIVE_HELP}, or a directory of archives", nargs="+"),
    ),
    "extract": (
        cmd_extract, "-d drive-scsi0 backup.vma disks/",
        arg("-d", "NAME[,NAME...]", "only these devices (default: all)",
            dest="devices", action="append"),
        arg("-o", "PATH", "write the one disk of -d there (-: to a pipe)",
            dest="output", action=Once),
        flag("--force", "replace the file of -o; with a device, however large it is"),
        BASE,
        arg("-r", "MAPFILE", "write disks into files and devices, by a map",
            dest="map", action=Once),
        ARCHIVE,
        arg("targetdir", "TARGETDIR", "must be new, or empty (none with -o)", nargs="?"),
    ),
    "mount": (
        cmd_mount, "backup.vma /mnt -- sha256sum /mnt/disk-drive-scsi0.raw",
        BASE,
        flag("-f --foreground", "stay in the foreground; Ctrl-C unmounts"),
        arg("-o", "OPTION[,OPTION]", "for mount: allow_other, noexec, noatime",
            dest="options", type=parse_mount_options, action="extend", default=[]),
        arg("archive", "ARCHIVE", "a plain file, or a .vma.zst that optimize has written"),
        arg("directory", "DIRECTORY",
            "where; with `-- COMMAND...` behind it: mount, run COMMAND, unmount"),
    ),
    "rescue": (
        cmd_rescue, "broken.vma.zst disks/",
        flag("--json", "print one JSON object, for scripts (also in rescue.json)"),
        ARCHIVE,
        arg("targetdir", "TARGETDIR", "must be new, or empty"),
    ),
    "unpack": (
        cmd_unpack, "- dir/",
        BASE, flag("--force", "replace files that exist"), ARCHIVE, DIRECTORY,
    ),
    "config": (
        cmd_config, "backup.vma",
        arg("-c", "NAME", f"(default {CONFIG_NAME})", dest="config", default=CONFIG_NAME),
        ARCHIVE,
    ),
    "create": (
        cmd_create, "-c qemu-server.conf new.vma drive-scsi0=disk.raw",
        *LAYOUT, DEVICE_MAP,
        arg("-c", "CONFIG", "add a config file", dest="config", **SEVERAL),
        arg("-d", "[format=raw:]NAME=PATH", "add a disk", dest="devices", **SEVERAL),
        OUTPUT,
        arg("disks", "NAME=PATH", "add a disk", nargs="*"),
    ),
    "pack": (
        cmd_pack, "dir/ new.vma",
        *LAYOUT, DEVICE_MAP,
        arg("-u", "KEY=VALUE", f"set a line of {CONFIG_NAME}, for instance -u name=web2",
            dest="options", type=parse_option, **SEVERAL),
        DIRECTORY, OUTPUT,
    ),
    "optimize": (
        cmd_optimize, "a.vma b.vma",
        *LAYOUT, BASE,
        arg("--memory", "SIZE",
            "memory for reordering a stream (default 256M); more goes to a temporary file",
            type=parse_memory, default=DEFAULT_MEMORY),
        flag("--check", "read the written archive back and compare all disks (default in place)",
             default=None),
        flag("--no-check", "skip the comparison", dest="check", action="store_false"),
        ARCHIVE,
        arg("output", "OUTPUT", f"{OUTPUT_HELP} (default: replace ARCHIVE)", nargs="?"),
    ),
    "diff": (
        cmd_diff, "sunday.vma.zst monday.vma.zst monday.vmad",
        FORCE, COMPRESS(f"compress (default: zstd with level {DEFAULT_LEVEL})"),
        arg("base", "BASE", "the full archive that will be needed with OUTPUT"),
        arg("archive", "NEW", "the archive that OUTPUT and BASE will make"),
        OUTPUT,
    ),
    "completion": (
        cmd_completion, "bash",
        arg("shell", None, choices=("bash", "zsh")),
    ),
}  # fmt: skip


def new_parser(prog: str, arguments: Iterable[Argument], **texts: Any) -> argparse.ArgumentParser:
    """Return a parser of the options that all commands have, and of these arguments."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, formatter_class=formatter, **texts)
    for names, options in (*COMMON, *arguments):
        parser.add_argument(*names, **options)
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of what stands behind a command's name."""
    run, example, *arguments = COMMANDS[name]
    title = re.findall(rf"(?m)^  {name} +(.+)", DESCRIPTION)[0]
    parser = new_parser(
        f"vma-tool {name}",
        arguments,
        description=f"{title[0].upper()}{title[1:]}.",
        epilog=f"example:\n  vma-tool {name} {example}",
    )
    parser.set_defaults(run=run)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """Parse a command line; `run` of the result is the function that runs the command."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = None
    if "--" in words:
        end = words.index("--")
        # For mount, `--` begins a command; for others it ends the options.
        if [word for word in words[:end] if not word.startswith("-")][:1] == ["mount"]:
            words, command = words[:end], words[end + 1 :]
            end = len(words)
        # The parser of all commands would take it away from that of the command.
        names = words[end + 1 :]
        words[end:] = [f"./{n}" if n.startswith("-") and n != "-" else n for n in names]
    parser = new_parser(
        "vma-tool",  # not the name of the file: the examples use this one
        # argparse's own subcommands would need the parsers of all commands.
        [arg("words", "COMMAND", argparse.SUPPRESS, nargs=argparse.PARSER, choices=COMMANDS)],
        usage="vma-tool [-h] [--version] [-q] [-v] COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    args, unknown = parser.parse_known_args(words, Namespace(command=command))
    name, *words = args.words
    # Intermixed: options may stand between the other arguments, as with Proxmox's vma.
    args, more = command_parser(name).parse_known_intermixed_args(words, args)
    if unknown or more:
        parser.error(f"unrecognized arguments: {' '.join([*unknown, *more])}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status; SystemExit for --help and wrong usage.

    Signals are left as they are: `script` handles them.
    """
    status = EXIT_FAILED
    try:
        occupy_standard_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # names, if the locale is not UTF-8
        args = parse_args(argv)
        result = int(args.run(args))
        if sys.stdout is not None:  # closed by the caller
            # A full disk or a closed pipe shows here, and not in the interpreter's exit.
            sys.stdout.flush()
        return result
    except VmaError as error:
        status, message = error.exit_status, str(error)
    except BrokenPipeError:
        discard_output()
        return 128 + 13  # as if SIGPIPE had ended us
    except OSError as error:  # all others have names already
        message = f"cannot print: {system_message(error)}"
        discard_output()
    except MemoryError:
        message = "out of memory"
    print_error(message)
    return status


def occupy_standard_streams() -> None:
    """Let nothing take the place of a standard stream that the caller has closed.

    A file of ours would get its number, and messages would go into that file, perhaps an archive.
    """
    streams = ("input", os.O_WRONLY), ("output", os.O_RDONLY), ("error", os.O_RDONLY)
    for fd, (name, flags) in enumerate(streams):
        with os_errors_as(f"standard {name}"):
            try:
                os.fstat(fd)
            except OSError as error:
                if error.errno != errno.EBADF:
                    raise
                # The lowest free number is the one to fill. Reading or writing it still fails.
                os.open(os.devnull, flags)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the end


def discard_output() -> None:
    """Discard the rest of standard output's buffer, so that the exit does not fail again."""
    fd = os.open(os.devnull, os.O_WRONLY)
    os.dup2(fd, 1)
    os.close(fd)


def script() -> NoReturn:
    """Run as a program of its own: with signals handled, and the exit status set."""
    if hasattr(gc, "freeze"):  # PyPy has none
        gc.freeze()  # else every collection, and the exit, looks through all that was loaded
    Cleanup.install()
    sys.exit(main())


if __name__ == "__main__":
    script()
