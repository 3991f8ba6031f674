"""Fuzz the tool over the structure of archives: it has to answer what the format says.

`draw` makes an archive of a golden one: one to three mutations, of a field, a name, a slot, an
extent, with the MD5s put right (mostly). `judge` reads it as FORMAT says, naively and without
vma_tool, and tells whether it restores completely, and to what. `Sandbox.check` gives it to the
commands and compares: verdict, written bytes, one clear line, nothing left, time and memory.

    python3 tests/tools/fuzz.py --seconds 3600 --seed 1  # a long run, all commands for each archive
    python3 tests/tools/fuzz.py --case 1:4711  # one archive of it again

A finding prints the case that made it, and leaves its archive in the current directory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import archives, differences, frames
from tests.archives import ALIGNS, BLOCK, CLUSTER, EXTENT_HEADER, HEADER, SECTOR, Archive, Device
from tests.faults import has_child, memory_directory, open_files
from tests.support import Answer, call_tool, golden, manifest

MEMORY_LIMIT = 64 << 20  # over what the process has before
CPU_LIMIT = 5.0  # seconds of processor time for one command
ZERO_BLOCK, ZERO_CLUSTER = bytes(BLOCK), bytes(CLUSTER)
HANG_LIMIT = 120  # seconds that a command may take on a machine however busy
CLOSE_LIMIT = 10  # seconds that a thread may take to close a pipe after its command has ended


# ---- what the format says of an archive ---------------------------------------------------------


class RestoreError(Exception):
    """Why an archive does not restore completely."""


@dataclass
class Contents:
    """What an archive restores to, and the masks of the blocks that it stores."""

    archive: Archive
    masks: archives.Masks

    def same_as(self, other: Contents) -> bool:
        """Say whether both hold the same, whatever their order, layout and uuid."""
        return self.key() == other.key()

    def key(self) -> tuple[object, ...]:
        devices = [(d.dev_id, d.name, d.size, d.data) for d in self.archive.devices]
        return self.archive.ctime, sorted(self.archive.configs), sorted(devices)


class Judgement(NamedTuple):
    """The verdict: `contents`, or why there are none; `listed` is what a good header says."""

    contents: Contents | None
    fault: str
    listed: Archive | None


def judge(data: bytes) -> Judgement:
    """Say what the format says of these bytes."""
    listed = None
    try:
        archive = judge_header(data)
        refuse_names(archive)
        listed = archive
        return Judgement(judge_extents(data, archive), "", listed)
    except RestoreError as fault:
        return Judgement(None, str(fault), listed)


def need(condition: object, fault: str) -> None:
    if not condition:
        raise RestoreError(fault)


def judge_header(data: bytes) -> Archive:
    """Return what the header says; its devices have no contents yet."""
    need(data[:4] == b"VMA\0" and len(data) >= HEADER, "no header")
    version, uuid, ctime, digest, blob_offset, blob_size, size = struct.unpack_from(
        ">I16sq16sIII", data, 4
    )
    need(version == 1, "version")
    need(HEADER < size <= len(data), "header_size")
    need(hashlib.md5(data[:32] + bytes(16) + data[48:size]).digest() == digest, "header MD5")
    need(blob_offset >= HEADER and blob_offset + blob_size <= size, "blob buffer")
    buffer = data[blob_offset : blob_offset + blob_size]
    blobs: dict[int, bytes] = {}
    offset = 1
    while offset + 2 <= len(buffer):  # what the walk does not come past, is no blob
        start, length = offset + 2, buffer[offset] + 256 * buffer[offset + 1]
        if start + length <= len(buffer):
            blobs[offset] = buffer[start : start + length]
        offset = start + length

    def name(offset: int) -> bytes | None:
        found = blobs.get(offset)
        return found.split(b"\0")[0] if found is not None and found.endswith(b"\0") else None

    archive = Archive(uuid=uuid, ctime=ctime)
    for slot in range(256):
        (name_offset,) = struct.unpack_from(">I", data, 2044 + 4 * slot)
        (data_offset,) = struct.unpack_from(">I", data, 3068 + 4 * slot)
        if name_offset and data_offset:
            config_name, config = name(name_offset), blobs.get(data_offset)
            if config_name is None or config is None:
                raise RestoreError(f"config {slot}")
            archive.configs.append((config_name, config))
    for dev_id in range(1, 255):
        name_offset, _, device_size = struct.unpack_from(">IIQ", data, 4096 + 32 * dev_id)
        device_name = name(name_offset)
        if device_size and device_name is not None:
            need(device_size % SECTOR == 0, "half a sector")
            archive.devices.append(Device(dev_id, device_name, b"", device_size))
    return archive


def refuse_names(archive: Archive) -> None:
    """Raise RestoreError for a name that is no file's name, or there twice."""
    for names, longest in (
        ([bytes_of(name) for name, _ in archive.configs], 248),
        ([d.raw_name for d in archive.devices], 242),
    ):
        need(len(set(names)) == len(names), "a name occurs twice")
        for name in names:
            need(is_file_name(name) and len(name) <= longest, f"name {name!r}")


def bytes_of(name: str | bytes) -> bytes:
    return name.encode() if isinstance(name, str) else name


def is_file_name(name: str | bytes) -> bool:
    raw = bytes_of(name)
    text = raw.decode("utf-8", "surrogateescape")
    return (
        raw not in (b"", b".", b"..")
        and b"/" not in raw
        and b"\\" not in raw
        and not re.search("[\0-\x1f\x7f-\x9f]", text)
    )


def judge_extents(data: bytes, archive: Archive) -> Contents:
    """Return the archive with its disks: every cluster of each device once, nothing else."""
    found: dict[int, dict[int, bytes]] = {device.dev_id: {} for device in archive.devices}
    devices = {device.dev_id: device for device in archive.devices}
    masks: archives.Masks = {}
    (at,) = struct.unpack_from(">I", data, 56)
    while at < len(data):
        head = data[at : at + EXTENT_HEADER]
        need(len(head) == EXTENT_HEADER, "trailing bytes")
        magic, reserved, block_count, uuid, digest = struct.unpack_from(">4sHH16s16s", head)
        need(magic == b"VMAE", "extent magic")
        need(reserved == 0, "extent reserved")
        need(uuid == archive.uuid, "extent uuid")
        need(hashlib.md5(head[:24] + bytes(16) + head[40:]).digest() == digest, "extent MD5")
        at += EXTENT_HEADER
        end = at + block_count * BLOCK
        need(end <= len(data), "cut inside an extent")
        for slot in range(59):
            mask, dev_id, cluster_num = struct.unpack_from(">HxBI", head, 40 + 8 * slot)
            if not dev_id:
                continue
            need(dev_id in devices, "no such device")
            device, clusters = devices[dev_id], found[dev_id]
            if device.is_vmstate:
                need(cluster_num == len(clusters), "vmstate out of order")
            else:
                need(cluster_num * CLUSTER < device.stated_size, "behind the device's end")
            need(cluster_num not in clusters, "cluster twice")
            blocks = [ZERO_BLOCK] * 16
            for bit in range(16) if mask else ():
                if mask >> bit & 1:
                    offset = cluster_num * CLUSTER + bit * BLOCK
                    inside = device.is_vmstate or offset < device.stated_size
                    need(inside or mask == 0xFFFF, "mask behind the end")
                    need(at + BLOCK <= end, "block_count is too small")
                    blocks[bit] = data[at : at + BLOCK]
                    at += BLOCK
            clusters[cluster_num] = b"".join(blocks) if mask else ZERO_CLUSTER
            masks[dev_id, cluster_num] = mask
        need(at == end, "block_count is too large")
    for device in archive.devices:
        clusters = found[device.dev_id]
        need(len(clusters) * CLUSTER >= device.stated_size, "clusters are missing")
        disk = b"".join(clusters[num] for num in range(len(clusters)))
        device.data = disk if device.is_vmstate else disk[: device.stated_size]
    return Contents(archive, masks)


# ---- mutations ----------------------------------------------------------------------------------


@dataclass
class Part:
    """An extent: its 512 bytes, and its payload."""

    info: bytearray
    payload: bytes


@dataclass
class Draft:
    """An archive in pieces that a mutation can work on; `tail` is what is no extent."""

    header: bytearray
    parts: list[Part] = field(default_factory=list)
    tail: bytes = b""

    @classmethod
    def of(cls, data: bytes) -> Draft:
        """Take any bytes apart, as far as they are an archive."""
        size = int.from_bytes(data[56:60], "big")
        if not HEADER < size <= len(data):
            size = min(len(data), HEADER + 512)
        draft = cls(bytearray(data[:size]))
        while data[size : size + 4] == b"VMAE" and size + EXTENT_HEADER <= len(data):
            info = bytearray(data[size : size + EXTENT_HEADER])
            size += EXTENT_HEADER
            end = size + BLOCK * int.from_bytes(info[6:8], "big")
            draft.parts.append(Part(info, data[size:end]))
            size = end
        draft.tail = data[size:]
        return draft

    def pack(self, fix_header: bool = True, fix_extents: bool = True) -> bytes:
        """Return the bytes, with the MD5s that a reader will look for put right."""
        if fix_extents:
            for part in self.parts:
                part.info[24:40] = bytes(16)
                part.info[24:40] = hashlib.md5(part.info).digest()
        pieces = [piece for part in self.parts for piece in (part.info, part.payload)]
        data = bytearray(b"".join([self.header, *pieces, self.tail]))
        size = int.from_bytes(data[56:60], "big")
        if fix_header and len(data) >= 60 and size <= len(data):
            data[32:48] = bytes(16)
            data[32:48] = hashlib.md5(data[:size]).digest()
        return bytes(data)


class Cell(NamedTuple):
    """A slot, used or not, with the blocks that belong to it."""

    mask: int
    reserved: int
    dev_id: int
    cluster_num: int
    blocks: tuple[bytes, ...] = ()


NO_CELL = Cell(0, 0, 0, 0)


def cells_of(part: Part) -> list[Cell]:
    """Return the 59 slots of an extent with their blocks, as many as there are."""
    cells = []
    at = 0
    for slot in range(59):
        mask, reserved, dev_id, num = struct.unpack_from(">HBBI", part.info, 40 + 8 * slot)
        count = bin(mask).count("1") if dev_id else 0
        blocks = [part.payload[at + BLOCK * i :][:BLOCK] for i in range(count)]
        at += BLOCK * count
        whole = tuple(block for block in blocks if len(block) == BLOCK)
        cells.append(Cell(mask, reserved, dev_id, num, whole))
    return cells


def put_cells(part: Part, cells: Sequence[Cell]) -> None:
    """Make an extent of up to 59 slots, with the block_count that their blocks have."""
    padded = [*cells[:59], *[NO_CELL] * (59 - len(cells))]
    for slot, cell in enumerate(padded):
        number = cell.cluster_num & 0xFFFFFFFF
        struct.pack_into(">HBBI", part.info, 40 + 8 * slot, *cell[:3], number)
    part.payload = b"".join(block for cell in padded for block in cell.blocks)
    struct.pack_into(">H", part.info, 6, len(part.payload) // BLOCK)


ODD_NUMBERS = (
    0, 1, 2, 3, 15, 16, 58, 59, 60, 254, 255, 256, 511, 512, 944, 945, 4095, 4096, 12287, 12288,
    12289, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x10001, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32,
    1 << 40, 1 << 48, (1 << 48) + 1, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
STEPS = (1, 2, 512, 4096, 65536)
# The last three would be written outside of the target; the sandbox knows to look for them.
NAMES = (
    b"", b".", b"..", b"vma.json", b"vmstate", b"vmstate.bin", b"disk-drive-scsi0.raw", b"a b",
    b"drive-scsi0", b"drive-scsi00", b"qemu-server.conf", b"caf\xc3\xa9", b"\xff\xfe", b"\x1b[2J",
    b"tab\there", b"a\\b", b"C:", b"CON", "\u202egnp.exe".encode(), "\u200b".encode(),
    b"\xc2\x85", b"\xed\xa0\x80", b"n" * 246, b"n" * 247, b"n" * 255, b"n" * 256, b"n" * 60000,
    b"-rf", b"a/b", b"../escaped", b"./escaped",
)  # fmt: skip


def other_number(rng: random.Random, old: int, size: int) -> bytes:
    """Return another number of so many bytes, big-endian: a near one, an odd one, or any."""
    new = rng.choice(
        [
            old + rng.choice(STEPS),
            old - rng.choice(STEPS),
            old ^ 1 << rng.randrange(8 * size),
            rng.choice(ODD_NUMBERS),
            rng.getrandbits(8 * size),
        ]
    )
    return (new % (1 << 8 * size)).to_bytes(size, "big")


def change(rng: random.Random, data: bytearray, offset: int, size: int) -> None:
    """Put another number into a field."""
    if offset + size <= len(data):
        old = int.from_bytes(data[offset : offset + size], "big")
        data[offset : offset + size] = other_number(rng, old, size)


def any_part(rng: random.Random, draft: Draft) -> Part:
    """Return one of the extents; one more, empty, if there is none."""
    if not draft.parts:
        draft.parts.append(empty_part(draft))
    return rng.choice(draft.parts)


def empty_part(draft: Draft) -> Part:
    return Part(bytearray(archives.extent_bytes(bytes(draft.header[8:24]).ljust(16), [], [])), b"")


def used_slot(rng: random.Random, part: Part) -> int:
    """Return the number of a slot, mostly of one that is used."""
    used = [slot for slot, cell in enumerate(cells_of(part)) if cell.dev_id]
    return rng.choice(used) if used and rng.random() < 0.9 else rng.randrange(59)


HEADER_FIELDS = ((0, 4), (4, 4), (8, 8), (16, 8), (24, 8), (32, 8), (48, 4), (52, 4), (56, 4))


def header_field(rng: random.Random, draft: Draft) -> str:
    """Change a number of the fixed part, whatever it means."""
    offset, size = rng.choice(HEADER_FIELDS)
    change(rng, draft.header, offset, size)
    return f"header field at {offset}"


def header_uuid(rng: random.Random, draft: Draft) -> str:
    """Give the archive another uuid, everywhere."""
    uuid = rng.choice([rng.randbytes(16), archives.CANONICAL_UUID, bytes(16)])
    draft.header[8:24] = uuid
    for part in draft.parts:
        part.info[8:24] = uuid
    return "another uuid"


def header_resized(rng: random.Random, draft: Draft) -> str:
    """Make the header longer or shorter, and say so."""
    size = rng.choice([len(draft.header) + rng.choice(STEPS), 16384, 131072, 12800, 12289])
    draft.header = draft.header[:size].ljust(size, rng.choice([b"\0", b"V"]))
    struct.pack_into(">I", draft.header, 56, size)
    return f"header of {size} bytes"


def table_entry(rng: random.Random, draft: Draft) -> str:
    """Change an offset in one of the config tables, or copy another one there."""
    used = [
        offset
        for offset in range(2044, 4092, 4)
        if len(draft.header) >= 4092 and draft.header[offset : offset + 4] != bytes(4)
    ]
    offset = rng.choice([*used, rng.randrange(2044, 4092, 4)])
    if used and rng.random() < 0.4:
        other = rng.choice(used)
        draft.header[offset : offset + 4] = draft.header[other : other + 4]
    elif rng.random() < 0.3:
        draft.header[offset : offset + 4] = bytes(4)
    else:
        change(rng, draft.header, offset, 4)
    return f"config table at {offset}"


def used_devices(draft: Draft) -> list[int]:
    return [
        dev_id
        for dev_id in range(256)
        if any(draft.header[4096 + 32 * dev_id : 4096 + 32 * dev_id + 32])
    ]


def device_entry(rng: random.Random, draft: Draft) -> str:
    """Change a field of a device, or a byte that is reserved."""
    dev_id = rng.choice([*used_devices(draft), rng.randrange(256)])
    what, size = rng.choice([(0, 4), (4, 4), (8, 8), (8, 8), (8, 8), (16, 8)])
    offset = 4096 + 32 * dev_id + what
    if what == 8 and rng.random() < 0.5 and offset + 8 <= len(draft.header):
        (old,) = struct.unpack_from(">Q", draft.header, offset)
        steps = (-CLUSTER, -BLOCK, -1, 1, BLOCK, CLUSTER)
        near = [old + step for step in steps] + [-(-old // CLUSTER) * CLUSTER, old // BLOCK * BLOCK]
        struct.pack_into(">Q", draft.header, offset, min(max(rng.choice(near), 0), (1 << 64) - 1))
    else:
        change(rng, draft.header, offset, size)
    return f"device {dev_id}, field {what}"


def device_moved(rng: random.Random, draft: Draft) -> str:
    """Give a device another dev_id, in the header and, mostly, in the extents."""
    used = used_devices(draft)
    if not used:
        return "no device to move"
    old, new = rng.choice(used), rng.choice([0, 1, 2, 3, 4, 77, 254, 255, rng.choice(used)])
    one, two = slice(4096 + 32 * old, 4128 + 32 * old), slice(4096 + 32 * new, 4128 + 32 * new)
    draft.header[one], draft.header[two] = draft.header[two], draft.header[one]
    if rng.random() < 0.8:
        names = {old: new, new: old}
        for part in draft.parts:
            cells = cells_of(part)
            put_cells(part, [c._replace(dev_id=names.get(c.dev_id, c.dev_id)) for c in cells])
    return f"device {old} to {new}"


def blob_byte(rng: random.Random, draft: Draft) -> str:
    """Change a byte of the blob buffer: a length, a name's letter, its NUL."""
    end = HEADER + min(int.from_bytes(draft.header[52:56], "big"), len(draft.header) - HEADER)
    if end <= HEADER:
        return "no blob buffer"
    offset = rng.randrange(HEADER, end)
    old = draft.header[offset]
    draft.header[offset] = rng.choice([old ^ 1 << rng.randrange(8), 0, 1, 47, 46, 92, 127, 255])
    return f"blob byte at {offset}"


def blob_length(rng: random.Random, draft: Draft) -> str:
    """Change the length of a blob that somebody points at."""
    pointers = [*range(2044, 4092, 4), *range(4096, HEADER, 32)]
    used = [
        offset
        for (offset,) in (struct.unpack_from(">I", draft.header, at) for at in pointers)
        if 0 < offset < len(draft.header) - HEADER - 2
    ]
    if not used:
        return "no blob"
    at = HEADER + rng.choice(used)
    (old,) = struct.unpack_from("<H", draft.header, at)
    new = rng.choice([old + 1, old - 1, old + 256, old << 8, 0, 1, 0xFFFF]) % 65536
    struct.pack_into("<H", draft.header, at, new)
    return f"blob length at {at}"


def header_renamed(rng: random.Random, draft: Draft) -> str:
    """Write the header anew, with other names and configs."""
    try:
        archive = judge_header(draft.pack())
    except RestoreError:
        return "no header to write anew"
    what = rng.choice(["device", "config", "config data", "configs", "no configs"])
    name = rng.choice(NAMES)
    if what == "device" and archive.devices:
        rng.choice(archive.devices).name = name
    elif what == "config":
        archive.configs.insert(rng.randint(0, len(archive.configs)), (name, b"x"))
    elif what == "config data" and archive.configs:
        slot = rng.randrange(len(archive.configs))
        size = rng.choice([0, 1, 511, 512, 65535])
        archive.configs[slot] = (archive.configs[slot][0], rng.randbytes(size))
    elif what == "configs":
        archive.configs = [(b"%d.conf" % n, b"%d" % n) for n in range(rng.randint(3, 256))]
    else:
        archive.configs = []
    archive.configs = archive.configs[:256]
    archive.names_first = rng.random() < 0.2
    archive.config_slots = sorted(rng.sample(range(256), len(archive.configs)))
    draft.header = bytearray(archives.header_bytes(archive))
    return f"header with another {what} {name[:20]!r}"


def extent_field(rng: random.Random, draft: Draft) -> str:
    """Change a number in front of the blockinfo."""
    part = any_part(rng, draft)
    offset, size = rng.choice([(0, 4), (4, 2), (6, 2), (6, 2), (8, 8), (16, 8), (24, 8)])
    change(rng, part.info, offset, size)
    return f"extent field at {offset}"


def slot_field(rng: random.Random, draft: Draft) -> str:
    """Change a field of a blockinfo, and nothing else."""
    part = any_part(rng, draft)
    slot = used_slot(rng, part)
    offset, size = rng.choice([(0, 2), (2, 1), (3, 1), (4, 4)])
    change(rng, part.info, 40 + 8 * slot + offset, size)
    return f"slot {slot}, field {offset}"


def slot_mask(rng: random.Random, draft: Draft) -> str:
    """Set or clear bits of a mask, with their blocks and block_count."""
    part = any_part(rng, draft)
    cells = cells_of(part)
    slot = used_slot(rng, part)
    cell = cells[slot]
    stored = [bit for bit in range(16) if cell.mask >> bit & 1]
    if not cell.dev_id or len(stored) != len(cell.blocks):
        return "no cluster there"
    by_bit = dict(zip(stored, cell.blocks))
    for bit in rng.sample(range(16), rng.choice([1, 1, 2, 16])):
        if bit in by_bit:
            del by_bit[bit]
        else:
            by_bit[bit] = rng.choice([bytes(BLOCK), rng.randbytes(BLOCK)])
    mask = sum(1 << bit for bit in by_bit)
    cells[slot] = cell._replace(mask=mask, blocks=tuple(by_bit[bit] for bit in sorted(by_bit)))
    put_cells(part, cells)
    return f"slot {slot}: mask {cell.mask:04x} to {mask:04x}"


def slot_moved(rng: random.Random, draft: Draft) -> str:
    """Swap two slots, within an extent or between two, with their blocks."""
    one, two = any_part(rng, draft), any_part(rng, draft)
    first, second = used_slot(rng, one), used_slot(rng, two)
    ones = cells_of(one)
    twos = ones if one is two else cells_of(two)
    ones[first], twos[second] = twos[second], ones[first]
    put_cells(one, ones)
    put_cells(two, twos)
    return f"slots {first} and {second} swapped"


def slot_gone(rng: random.Random, draft: Draft) -> str:
    """Take a cluster away, or let it come twice, with its blocks."""
    one, two = any_part(rng, draft), any_part(rng, draft)
    slot, other = used_slot(rng, one), rng.randrange(59)
    if rng.random() < 0.6:
        cells = cells_of(one)
        cells[slot] = NO_CELL
        put_cells(one, cells)
        return f"slot {slot} gone"
    twos = cells_of(two)
    twos[other] = cells_of(one)[slot]
    put_cells(two, twos)
    return f"slot {slot} over slot {other}"


def slot_added(rng: random.Random, draft: Draft) -> str:
    """Add a cluster of zeros: behind the end, far behind it, or of another device."""
    part = any_part(rng, draft)
    cells = cells_of(part)
    numbers = [cell.cluster_num for p in draft.parts for cell in cells_of(p) if cell.dev_id]
    near = max(numbers, default=0) + 1
    number = rng.choice([near, near + 1, 0, 1 << 31, 0xFFFFFFFF, near // 2])
    dev_id = rng.choice([cell.dev_id for cell in cells] + [1, 2, 3, 254, 255])
    full = rng.random() < 0.2
    blocks = (rng.randbytes(BLOCK),) * 16 if full else ()
    empty = [slot for slot in range(59) if not cells[slot].dev_id] or [58]
    cells[rng.choice(empty)] = Cell(0xFFFF if full else 0, 0, dev_id, number, blocks)
    put_cells(part, cells)
    return f"cluster {number} of device {dev_id} added"


def extent_split(rng: random.Random, draft: Draft) -> str:
    """Spread the slots of an extent over two, or take two together."""
    part = any_part(rng, draft)
    at = draft.parts.index(part)
    cells = cells_of(part)
    if rng.random() < 0.5 and at + 1 < len(draft.parts):
        following = draft.parts[at + 1]
        used = [cell for cell in cells + cells_of(following) if cell.dev_id]
        if len(used) <= 59:
            put_cells(part, used)
            del draft.parts[at + 1]
            return "two extents joined"
    cut = rng.randint(0, 59)
    behind = empty_part(draft)
    put_cells(behind, [*[NO_CELL] * rng.randint(0, cut), *cells[cut:]])
    put_cells(part, cells[:cut])
    draft.parts.insert(at + 1, behind)
    return f"an extent split at slot {cut}"


def extent_order(rng: random.Random, draft: Draft) -> str:
    """Swap, repeat, drop or shuffle extents, or put in one without a block."""
    what = rng.choice(["swap", "repeat", "drop", "shuffle", "empty", "none"])
    part = any_part(rng, draft)
    at = draft.parts.index(part)
    if what == "swap":
        other = rng.randrange(len(draft.parts))
        draft.parts[at], draft.parts[other] = draft.parts[other], draft.parts[at]
    elif what == "repeat":
        copy = Part(bytearray(part.info), part.payload)
        draft.parts.insert(rng.randint(0, len(draft.parts)), copy)
    elif what == "drop":
        del draft.parts[at]
    elif what == "shuffle":
        rng.shuffle(draft.parts)
    elif what == "empty":
        draft.parts.insert(at, empty_part(draft))
    elif rng.random() < 0.2:
        draft.parts.clear()
    return f"extents: {what}"


def extent_foreign(rng: random.Random, draft: Draft) -> str:
    """Put in an extent of another archive, with this one's uuid or its own."""
    other = rng.choice(Draft.of(golden(rng.choice(sorted(manifest())))).parts)
    if rng.random() < 0.7:
        other.info[8:24] = draft.header[8:24]
    draft.parts.insert(rng.randint(0, len(draft.parts)), other)
    return "an extent of another archive"


def payload_changed(rng: random.Random, draft: Draft) -> str:
    """Change a byte that no checksum protects, or put in or take away some."""
    part = any_part(rng, draft)
    if not part.payload:
        return "no payload"
    at = rng.randrange(len(part.payload))
    size = rng.choice([0, 1, 1, 1, 512, 4096])
    new = rng.choice([rng.randbytes(1), rng.randbytes(1), rng.randbytes(1), b"", bytes(BLOCK)])
    part.payload = part.payload[:at] + new + part.payload[at + size :]
    return f"payload at {at}: {size} bytes to {len(new)}"


def tail_changed(rng: random.Random, draft: Draft) -> str:
    """Put something behind the last extent."""
    size = rng.choice([1, 8, 511, 512, 513, 4096])
    draft.tail += rng.choice([bytes(size), rng.randbytes(size), bytes(draft.header[:size])])
    return f"{size} bytes behind the end"


MUTATIONS: tuple[tuple[Callable[[random.Random, Draft], str], int], ...] = (
    (header_field, 3),
    (header_uuid, 2),
    (header_resized, 2),
    (table_entry, 3),
    (device_entry, 4),
    (device_moved, 2),
    (blob_byte, 2),
    (blob_length, 2),
    (header_renamed, 5),
    (extent_field, 2),
    (slot_field, 4),
    (slot_mask, 7),
    (slot_moved, 5),
    (slot_gone, 2),
    (slot_added, 2),
    (extent_split, 5),
    (extent_order, 5),
    (extent_foreign, 1),
    (payload_changed, 4),
    (tail_changed, 1),
)


BASE, NEW = "live-order", "live-order-day2"


@functools.cache
def difference() -> bytes:
    """Return what `diff` makes of two golden archives."""
    return differences.build(golden(BASE), golden(NEW))


class Case(NamedTuple):
    """An archive to try: what it was made of and by which mutations."""

    what: str
    data: bytes


def mutate(rng: random.Random, data: bytes, count: int) -> Case:
    """Return other bytes, made by so many mutations, and mostly with right MD5s."""
    draft = Draft.of(data)
    done = []
    functions, weights = zip(*MUTATIONS)
    for mutation in rng.choices(functions, weights, k=count):
        if len(draft.header) < HEADER:
            draft.header = draft.header.ljust(HEADER, b"\0")
        done.append(mutation(rng, draft))
    sloppy = rng.random() < 0.06
    new = draft.pack(not sloppy or rng.random() < 0.5, not sloppy or rng.random() < 0.5)
    if sloppy:
        done.append("MD5s as they were")
    if rng.random() < 0.03:
        size = rng.randrange(len(new)) if rng.random() < 0.7 else rng.randrange(min(len(new), 600))
        new = new[:size]
        done.append(f"cut after {size} bytes")
    return Case(", ".join(done), new)


def draw_frames(seed: int, number: int) -> Case:
    """Return a case that is compressed: frames, index or seek table changed, or what they hold."""
    rng = random.Random(f"frames:{seed}:{number}")
    name = rng.choice(sorted(manifest()))
    parsed = archives.parse(golden(name))
    plain = archives.canonical(parsed.archive, ALIGNS[rng.choice(("4K", "128K"))], parsed.masks)
    what = []
    if rng.random() < 0.3:
        case = mutate(rng, plain, 1)
        with contextlib.suppress(struct.error, IndexError):  # what cannot be cut stays as it was
            list(frames.cuts(case.data))
            plain = case.data
            what.append(case.what)
    found = frames.split(frames.compress(plain))
    pieces, sizes = found.frames, found.sizes
    for _ in range(rng.choice([0, 1, 1, 2])):
        i, k = rng.randrange(len(pieces)), rng.randrange(len(sizes))
        kind = rng.choice(["gone", "twice", "moved", "byte", "size", "sizes", "masks", "other"])
        what.append(f"{kind} {i} {k}")
        if kind == "gone":
            del pieces[i]
        elif kind == "twice":
            pieces.insert(i, pieces[i])
        elif kind == "moved":
            pieces.insert(k, pieces.pop(i))
        elif kind == "byte":
            data = bytearray(pieces[i])
            change(rng, data, rng.choice([0, 4, 5, 9, rng.randrange(len(data))]), 1)
            pieces[i] = bytes(data)
        elif kind == "size":
            sizes[k] = max(sizes[k] + rng.choice([-512, -1, 1, 512, 4096, 9 << 20]), 0)
        elif kind == "sizes":
            sizes.insert(i, sizes.pop(k))
        elif kind == "masks":
            masks = bytearray(frames.decode(found.masks) or b"\0\0")
            change(rng, masks, rng.randrange(max(len(masks), 1)), 1)
            found = found._replace(masks=frames.raw_frame(bytes(masks)))
        else:  # a piece is cut into two frames, or both have another size
            content = frames.decode(pieces[i]) or b"x"
            pieces[i : i + 1] = [frames.raw_frame(content[:256]), frames.raw_frame(content[256:])]
        if not pieces:
            pieces = [frames.raw_frame(b"")]
    data = bytearray(frames.join(frames.Seekable(pieces, sizes[: len(pieces)], found.masks)))
    if rng.random() < 0.3:  # in the index's frame, the seek table, the footer
        start = sum(map(len, pieces))
        change(rng, data, rng.randrange(start, len(data)), 1)
        what.append("a byte behind the frames")
    if rng.random() < 0.05:
        del data[rng.randrange(len(data)) :]
        what.append("cut")
    return Case(f"{name}: {', '.join(what)}", bytes(data))


def draw(seed: int, number: int) -> Case:
    """Return a case of a run: the same for the same numbers, whatever was drawn before."""
    rng = random.Random(f"{seed}:{number}")
    name = rng.choice(sorted(manifest()))
    case = mutate(rng, golden(name), rng.choice([1, 1, 1, 2, 2, 3]))
    return Case(f"{name}: {case.what}", case.data)


# ---- what the tool makes of it ------------------------------------------------------------------


ONE_LINE = r"vma-tool: [^\n]+\n"


class FindingError(AssertionError):
    """The tool did something else than the format says, or than is allowed to it."""


class ExcusedError(Exception):
    """What the tool answered may differ from what the format says."""


class Hang(BaseException):
    """A command that does not come back; no handler in the tool may take it for its own."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise Hang in the main thread after so many seconds."""

    def expire(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise Hang(f"not back after {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


class Memory:
    """Measures how much memory something takes, where the system tells the peak of a process."""

    def __init__(self) -> None:
        self.resident = self.peak = 0

    def __enter__(self) -> Memory:
        self.peak, self.resident = self.read()
        if self.peak - self.resident > MEMORY_LIMIT // 4:
            with contextlib.suppress(OSError):  # takes its time, so it is not done for each
                Path("/proc/self/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = self.read()[0]

    @property
    def taken(self) -> int:
        """How many bytes more than before there were at most."""
        return self.peak - self.resident

    @staticmethod
    def read() -> tuple[int, int]:
        """Return the peak and what there is now, in bytes; zeros if that is not known."""
        with contextlib.suppress(OSError):
            text = Path("/proc/self/status").read_text()
            found = [re.search(rf"{name}:\s*(\d+)", text) for name in ("VmHWM", "VmRSS")]
            sizes = [int(match.group(1)) << 10 if match else 0 for match in found]
            return sizes[0], sizes[1]
        return 0, 0


class Sandbox:
    """A directory in which the commands run, and which is looked through after each."""

    COMMANDS = (
        "list", "scan", "json", "partitions", "config", "verify", "verify stream", "digest",
        "digest stream", "against", "against stream", "optimize", "optimize stream", "in place",
        "unpack", "unpack stream", "extract", "extract stream", "one", "one stream",
        "diff", "diff stream", "base", "base stream", "changed", "changed stream",
    )  # fmt: skip

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.source = directory / "in.vma"
        self.output = directory / "out.vma"
        self.target = directory / "target"
        self.base = directory / "base.vma"
        self.difference = directory / "out.vmad"
        self.data = b""
        self.judgement = Judgement(None, "", None)

    def check(self, data: bytes, commands: Sequence[str] = COMMANDS, rng_seed: int = 0) -> None:
        """Give an archive to these commands; raises FindingError, whatever went wrong."""
        self.compressed = data[:4] == b"\x28\xb5\x2f\xfd"
        plain = frames.decode(data) if self.compressed else data
        self.judgement = judge(b"" if plain is None else plain)
        for number, command in enumerate(commands):
            self.data = data
            self.source.write_bytes(data)
            try:
                with mock.patch("os.fsync"), mock.patch("tempfile.tempdir", memory_directory()):
                    self.run(command, random.Random(rng_seed + number))
            except ExcusedError:
                self.expect_files(*filter(Path.exists, (self.output, self.target)))
            except Exception as error:
                if isinstance(error, FindingError):
                    raise FindingError(f"{command}: {error}") from error
                raise FindingError(f"{command}: {type(error).__name__}: {error}") from error
            finally:
                for path in self.directory.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, command: str, rng: random.Random) -> None:
        # Of frames, these read no more than headers, the index, or one disk.
        partial = ("list", "scan", "json", "partitions", "config", "one", "in place")
        self.reads_all = not self.compressed or command not in partial
        verb, _, stream = command.partition(" ")
        method = getattr(self, "run_" + ("in_place" if command == "in place" else verb))
        method(rng, stream == "stream")

    def call(
        self, *args: str | Path, stream: bool = False, says: str = ONE_LINE, raw: bool = False
    ) -> bool:
        """Run a command on the archive; return whether it succeeded.

        `says` is what standard error must be if it fails, a regular expression; `raw` allows
        anything on standard output.
        """
        before = open_files()
        start = time.process_time()
        with time_limit(HANG_LIMIT), Memory() as memory:
            answer = call_tool(*args, input=self.data if stream else None)
        took = time.process_time() - start
        self.expect(took < CPU_LIMIT, f"{args[0]} took {took:.1f} s")
        self.expect(memory.taken < MEMORY_LIMIT, f"{args[0]} took {memory.taken >> 20} MiB")
        end = time.monotonic() + CLOSE_LIMIT
        while open_files() != before and time.monotonic() < end:
            time.sleep(0.001)  # threads that feed a decompressor, or listen to it
        self.expect(open_files() == before, f"left open: {set(open_files()) - set(before)}")
        self.expect(not has_child(), "left a child")
        self.expect_text(answer, says, raw)
        self.answer = answer
        return answer.returncode == 0

    def expect_text(self, answer: Answer[bytes], says: str, raw: bool = False) -> None:
        """Check exit status, standard error, and that nothing printed acts on a terminal."""
        errors = answer.stderr.decode()
        text = "" if raw else answer.stdout.decode("utf-8", "surrogateescape")
        if answer.returncode:
            self.expect(answer.returncode in (1, 3), f"exit status {answer.returncode}: {errors}")
            self.expect(re.fullmatch(says, errors), f"standard error: {errors!r}")
        else:
            self.expect(not errors, f"success, but standard error: {errors!r}")
        for line in (errors + text).splitlines():
            self.expect(line.isprintable(), f"printed as it is: {line!r}")

    def expect(self, condition: object, fault: str) -> None:
        if not condition:
            raise FindingError(fault)

    def expect_verdict(self, good: bool, expected: bool | None = None) -> None:
        wanted = self.judgement.contents is not None if expected is None else expected
        if good != wanted and self.compressed and self.excused(good):
            raise ExcusedError
        if good != wanted:
            said = self.answer.stderr.decode().strip() or "success"
            why = self.judgement.fault or "it restores completely"
            raise FindingError(f"the format says: {why}; the tool says: {said}")
        streams = self.compressed and b"a stream does not allow" in self.answer.stderr
        if self.judgement.contents is None and expected is None and not streams:
            self.expect(self.answer.returncode == 3, f"exit status {self.answer.returncode}")

    def excused(self, good: bool) -> bool:
        """Say whether a compressed archive may be taken for another one here."""
        if good:  # what is wrong elsewhere goes unseen
            return not self.reads_all
        # Only verify sees through an index that lies in all detail.
        says = self.answer.stderr
        lies = rb"contradict each other|frame holds \d+ bytes, not|a stream does not allow"
        return bool(re.search(lies, says))

    def expect_files(self, *more: Path) -> None:
        """Check that there is the archive, unchanged, and nothing else but what is named."""
        found = sorted(self.directory.iterdir())
        self.expect(found == sorted({self.source, *more}), f"there is {[p.name for p in found]}")
        if self.source not in more:
            self.expect(self.source.read_bytes() == self.data, "the source was changed")

    # One method for each command: run it, and compare with what the format says.

    def run_list(self, _rng: random.Random, _stream: bool) -> None:
        self.expect_verdict(self.call("list", self.source), self.judgement.listed is not None)
        self.expect_files()

    def run_scan(self, _rng: random.Random, _stream: bool) -> None:
        self.expect_verdict(self.call("list", "--scan", self.source))
        self.expect_files()

    def run_json(self, _rng: random.Random, _stream: bool) -> None:
        self.expect_verdict(self.call("list", "--scan", "--json", self.source))
        self.expect_files()

    def run_partitions(self, rng: random.Random, _stream: bool) -> None:
        more = rng.choice([[], ["--json"], ["--scan"]])
        self.expect_verdict(self.call("list", "--partitions", *more, self.source))
        self.expect_files()

    def run_config(self, rng: random.Random, _stream: bool) -> None:
        """Print a config; the disks are not looked at."""
        configs = self.judgement.listed.configs if self.judgement.listed else []
        wanted = rng.choice([*configs, (b"qemu-server.conf", b"")])
        name = os.fsdecode(bytes_of(wanted[0]))
        good = self.call("config", f"-c{name}", self.source, raw=True)
        found = [data for name, data in configs if bytes_of(name) == bytes_of(wanted[0])]
        if self.judgement.listed or not good:  # a bad name elsewhere does not matter to it
            self.expect_verdict(good, bool(found))
        self.expect(not found or self.answer.stdout == found[0], "another config")
        self.expect_files()

    def run_verify(self, _rng: random.Random, stream: bool) -> None:
        self.expect_verdict(self.call("verify", "-" if stream else self.source, stream=stream))
        self.expect_files()

    def run_digest(self, _rng: random.Random, stream: bool) -> None:
        source = "-" if stream else self.source
        self.expect_verdict(self.call("verify", "--digest", "--json", source, stream=stream))
        contents = self.judgement.contents
        if contents:
            files = [
                *contents.archive.configs,
                *((d.name, d.data) for d in contents.archive.devices),
            ]
            for _, data in files:
                digest = hashlib.sha256(data).hexdigest().encode()
                self.expect(digest in self.answer.stdout, "another digest")
        self.expect_files()

    def run_against(self, rng: random.Random, stream: bool) -> None:
        """Compare with a golden archive, or with its own canonical form."""
        contents = self.judgement.contents
        other = golden(rng.choice(sorted(manifest())))
        if contents and rng.random() < 0.7:
            other = archives.canonical(contents.archive, 4096, contents.masks)
        self.output.write_bytes(other)
        wanted = judge(other).contents
        assert wanted is not None
        good = self.call(
            "verify", "-" if stream else self.source, "--against", self.output,
            stream=stream, says=r"(vma-tool: [^\n]+\n)+",
        )  # fmt: skip
        self.expect_verdict(good, contents is not None and contents.same_as(wanted))
        if contents is None and not self.compressed:  # disks that only one has are not read
            self.expect_text(self.answer, ONE_LINE)
        self.expect_files(self.output)

    def run_optimize(self, rng: random.Random, stream: bool) -> None:
        align = rng.choice(sorted(ALIGNS))
        more = ["--memory", rng.choice(["0", "64K", "256M"])] if stream else []
        if not stream and rng.random() < 0.3:
            more = ["--check"]
        source = "-" if stream else self.source
        args = ["optimize", *more, "--quiet", "--align", align]
        self.expect_verdict(self.call(*args, source, self.output, stream=stream))
        self.expect_optimized(self.output, align)

    def run_in_place(self, rng: random.Random, _stream: bool) -> None:
        align = rng.choice(sorted(ALIGNS))
        good = self.call("optimize", "--quiet", "--align", align, self.source)
        self.expect_verdict(good)
        self.expect_optimized(self.source, align)

    def expect_optimized(self, path: Path, align: str) -> None:
        contents = self.judgement.contents
        if contents is None:
            self.expect_files()
            return
        self.expect_files(path)
        written = path.read_bytes()
        if written[:4] == b"\x28\xb5\x2f\xfd":
            command = ["zstd", "-dc", str(path)]
            written = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        wanted = archives.canonical(contents.archive, ALIGNS[align], contents.masks)
        if written != wanted:
            at = next((i for i, (a, b) in enumerate(zip(written, wanted)) if a != b), "the end")
            raise FindingError(f"not the canonical archive (--align {align}): it differs at {at}")
        again = judge(written)
        self.expect(again.contents and again.contents.same_as(contents), "other contents")

    def run_unpack(self, rng: random.Random, stream: bool) -> None:
        self.restore("unpack", lambda device: device.raw_name, b"vma.json", rng, stream)

    def run_extract(self, rng: random.Random, stream: bool) -> None:
        def name(device: Device) -> bytes:
            return b"vmstate.bin" if device.is_vmstate else b"disk-" + device.raw_name + b".raw"

        self.restore("extract", name, b"", rng, stream)

    def run_one(self, rng: random.Random, stream: bool) -> None:
        """Write one disk to a file."""
        contents = self.judgement.contents
        devices = contents.archive.devices if contents else []
        device = rng.choice(devices) if devices else None
        name = device.raw_name if device else b"drive-scsi0"
        good = self.call(
            "extract", "-q", f"-d{os.fsdecode(name)}", "-o", self.output,
            "-" if stream else self.source, stream=stream,
        )  # fmt: skip
        self.expect_verdict(good, device is not None)
        self.expect_files(*([self.output] if good else []))
        if good and device is not None:
            self.expect(self.output.read_bytes() == device.data, "another disk")

    def run_diff(self, rng: random.Random, stream: bool) -> None:
        """Write the difference from a golden archive, and make the archive of it again."""
        base = golden(rng.choice(sorted(manifest())))
        self.base.write_bytes(base)
        source = "-" if stream else self.source
        args = ["diff", "-q", "--compress", rng.choice(["none", "zstd:1"])]
        good = self.call(*args, self.base, source, self.difference, stream=stream)
        self.expect_verdict(good)
        self.expect_files(self.base, *([self.difference] if good else []))
        contents = self.judgement.contents
        if good and contents:
            args = ["optimize", "-q", "--align", "4K", "--base", str(self.base)]
            self.expect(self.call(*args, self.difference, self.output), "its own difference")
            masks = archives.data_masks(contents.archive)
            for device in contents.archive.devices:
                for number in range(device.cluster_count if device.is_vmstate else 0):
                    place = device.dev_id, number
                    masks[place] = contents.masks[place]
            wanted = archives.canonical(contents.archive, 4096, masks)
            self.expect(self.output.read_bytes() == wanted, "not the archive that it was")

    def run_base(self, rng: random.Random, stream: bool) -> None:
        """Take the archive for the base of a difference that was made from another one."""
        self.difference.write_bytes(difference())
        self.make("-" if stream else self.source, self.difference, stream)

    def run_changed(self, rng: random.Random, stream: bool) -> None:
        """Change a difference, whose base is right."""
        self.base.write_bytes(golden(BASE))
        self.data = mutate(rng, difference(), rng.choice([1, 1, 2])).data
        self.source.write_bytes(self.data)
        self.make(self.base, "-" if stream else self.source, stream)

    def make(self, base: str | Path, difference: str | Path, stream: bool) -> None:
        """Make an archive of a base and a difference: no other disks than those of the new one."""
        good = self.call(
            "optimize", "-q", "--base", base, difference, self.output, stream=stream
        )  # fmt: skip
        if not good:
            self.expect(self.answer.returncode == 3, f"exit status {self.answer.returncode}")
            self.expect(not self.output.exists(), "an output")
            return
        made = judge(self.output.read_bytes()).contents
        assert made is not None
        disks = {device.raw_name: device.data for device in made.archive.devices}
        wanted = {d.raw_name: d.data for d in archives.parse(golden(NEW)).archive.devices}
        self.expect(disks == wanted, "other disks")

    def restore(
        self, command: str, name: Callable[[Device], bytes], more: bytes, rng: random.Random,
        stream: bool,
    ) -> None:  # fmt: skip
        made_before = rng.random() < 0.3
        if made_before:
            self.target.mkdir()
        good = self.call(command, "-" if stream else self.source, self.target, stream=stream)
        contents = self.judgement.contents
        files: list[tuple[bytes, bytes | None]] = [(more, None)] if more else []
        if contents:
            for config, data in contents.archive.configs:
                files.append((bytes_of(config), data))
            files += [(name(device), device.data) for device in contents.archive.devices]
        names = [file for file, _ in files]
        writable = len(set(names)) == len(names) and all(len(file) <= 255 for file in names)
        self.expect_verdict(good, contents is not None and writable)
        if not good:
            self.expect_files(*([self.target] if made_before else []))
            self.expect(not made_before or not list(self.target.iterdir()), "files in the target")
            return
        self.expect_files(self.target)
        found = os.listdir(os.fsencode(self.target))
        self.expect(sorted(found) == sorted(names), f"restored {found}")
        for file, wanted in files:
            path = os.path.join(os.fsencode(self.target), file)
            self.expect(os.path.isfile(path) and not os.path.islink(path), f"{file!r} is no file")
            if wanted is not None:
                with open(path, "rb") as restored:
                    self.expect(restored.read() == wanted, f"{file!r} is something else")


# ---- a long run ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--frames", action="store_true", help="compressed archives")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="run one case of an earlier run")
    args = parser.parse_args(argv)
    seed, first = args.seed, args.first
    if args.case:
        seed, first = map(int, args.case.split(":"))
    findings = good = 0
    number = first
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory(prefix="vma-tool-fuzz-", dir=memory_directory()) as directory:
        sandbox = Sandbox(Path(directory))
        while time.monotonic() < end and not (args.case and number > first):
            case = (draw_frames if args.frames else draw)(seed, number)
            try:
                sandbox.check(case.data, rng_seed=number)
            except FindingError as finding:
                findings += 1
                path = Path(f"finding-{seed}-{number}.bin")
                path.write_bytes(case.data)
                print(f"{seed}:{number}: {case.what}: {finding}; see {path}", flush=True)
            good += sandbox.judgement.contents is not None
            number += 1
    print(f"{number - first} archives, {good} of them good, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
