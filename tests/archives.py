"""Build, read and edit VMA archives with nothing but struct and hashlib.

The tests' own idea of the format: it shares no line with vma_tool.py and never imports it, so
that a mistake made in one of them does not hide in both. Whatever can be naive here is: disks
are whole byte strings, blocks are handled one at a time. Only `write_large` is made for speed;
it writes archives for benchmarks without holding them in memory.

    archive = three_disks(random.Random(1))
    data = build(archive, live_order(archive, random.Random(2)))
    canonical(archive, 524288)      # what optimize has to make of it
    parse(data).archive             # the disks and configs again
"""

from __future__ import annotations

import functools
import hashlib
import random
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Union

SECTOR = 512  # of which a device's size is a multiple
BLOCK = 4096
CLUSTER = 16 * BLOCK
KIB, MIB = 1 << 10, 1 << 20
EXTENT_HEADER = 512
HEADER = 12288
SLOTS = 59
VMSTATE = b"vmstate"
CANONICAL_UUID = bytes.fromhex("12345678aabbccddeeffaabbccddeeff")
DEFAULT_ALIGN = "512K"

ALIGNS = {
    "4K": 4096,
    "64K": 65536,
    "128K": 131072,
    "256K": 262144,
    "512K": 524288,
    "1M": 1048576,
}

Cluster = tuple[int, int]  # dev_id, cluster_num
Order = list[Cluster]
Masks = dict[Cluster, int]


# ---- what an archive holds ----------------------------------------------------------------------


@dataclass
class Device:
    """A disk, with its whole content.

    `size` is what the header announces; left out, it is the content's length. The two differ for
    a vmstate device that has more clusters than its size needs, or in an archive damaged on
    purpose.
    """

    dev_id: int
    name: str | bytes
    data: bytes
    size: int | None = None

    @property
    def raw_name(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name

    @property
    def stated_size(self) -> int:
        return len(self.data) if self.size is None else self.size

    @property
    def is_vmstate(self) -> bool:
        return self.raw_name == VMSTATE

    @property
    def cluster_count(self) -> int:
        return -(-len(self.data) // CLUSTER)

    @property
    def block_count(self) -> int:
        """Blocks that begin inside the device; a vmstate is as long as its clusters."""
        if self.is_vmstate:
            return self.cluster_count * 16
        return -(-len(self.data) // BLOCK)

    def block(self, number: int) -> bytes:
        """Return a block, zero-filled behind the end of the content."""
        return self.data[number * BLOCK : (number + 1) * BLOCK].ljust(BLOCK, b"\0")

    def mask(self, cluster_num: int) -> int:
        """Return the mask of the blocks that are not all zeros."""
        mask = 0
        for bit in range(16):
            if self.block(cluster_num * 16 + bit).count(0) != BLOCK:
                mask |= 1 << bit
        return mask


Config = tuple[Union[str, bytes], bytes]


@dataclass
class Archive:
    """What an archive says, apart from the order in which it says it.

    `header_size` None is what Proxmox writes. The other knobs make legal headers that Proxmox
    does not write: `config_slots` puts the configs into other slots than 0, 1, ...; `names_first`
    puts the device names in front of the configs in the blob buffer.
    """

    devices: list[Device] = field(default_factory=list)
    configs: list[Config] = field(default_factory=list)
    uuid: bytes = bytes(range(16))
    ctime: int = 1763600000
    header_size: int | None = None
    config_slots: list[int] | None = None
    names_first: bool = False


def disk(rng: random.Random, size: int, pattern: str = "mixed") -> bytes:
    """Make a disk's content: "mixed", "full", "sparse" (some blocks of most clusters) or "zeros".

    "mixed" has runs of full clusters, holes of several clusters, half-zero clusters and clusters
    with a few random blocks.
    """
    data = bytearray(size)
    cluster_count = -(-size // CLUSTER)
    kind, left = "full", 0
    for cluster_num in range(cluster_count):
        if left == 0:
            kind = rng.choice(["full", "hole", "low half", "high half", "random"])
            left = rng.randint(1, 5)
        left -= 1
        mask = {"full": 0xFFFF, "hole": 0, "low half": 0x00FF, "high half": 0xFF00}.get(
            kind, rng.getrandbits(16)
        )
        if pattern == "full":
            mask = 0xFFFF
        elif pattern == "zeros":
            mask = 0
        elif pattern == "sparse":
            mask = rng.getrandbits(16) & rng.getrandbits(16)
        for bit in range(16):
            offset = cluster_num * CLUSTER + bit * BLOCK
            length = min(BLOCK, size - offset)
            if mask >> bit & 1 and length > 0:
                # the first byte is never zero: a block meant to hold data does hold some
                data[offset : offset + length] = b"\x01" + rng.randbytes(length - 1)
    return bytes(data)


def three_disks(rng: random.Random, *, vmstate: bool = False) -> Archive:
    """Make the usual guest: EFI disk (partial last cluster), system disk, TPM disk, two configs."""
    devices = [
        Device(1, "drive-efidisk0", disk(rng, 540672, "sparse")),
        Device(2, "drive-scsi0", disk(rng, 6 << 20)),
        Device(3, "drive-tpmstate0-backup", disk(rng, 4 << 20, "zeros")[:-BLOCK] + b"T" * BLOCK),
    ]
    if vmstate:
        devices.append(Device(4, VMSTATE, disk(rng, 17 * CLUSTER)))
    configs: list[Config] = [
        ("qemu-server.conf", b"cores: 2\nmemory: 2048\nscsi0: local:100/disk,size=6M\n"),
        ("qemu-server.fw", b"[OPTIONS]\nenable: 1\n"),
    ]
    return Archive(devices, configs, uuid=rng.randbytes(16), ctime=1763600000)


# ---- orders of clusters -------------------------------------------------------------------------


def in_order(archive: Archive) -> Order:
    """One device after the other as listed, clusters ascending."""
    return [
        (device.dev_id, cluster_num)
        for device in archive.devices
        for cluster_num in range(device.cluster_count)
    ]


def _vmstate_ascending(archive: Archive, order: Order) -> Order:
    """Keep the places of the vmstate's clusters, but let them ascend: no archive is without."""
    vmstate = {device.dev_id for device in archive.devices if device.is_vmstate}
    ascending = iter(sorted(cluster for cluster in order if cluster[0] in vmstate))
    return [next(ascending) if cluster[0] in vmstate else cluster for cluster in order]


def reversed_order(archive: Archive) -> Order:
    return _vmstate_ascending(archive, in_order(archive)[::-1])


def shuffled(archive: Archive, rng: random.Random) -> Order:
    order = in_order(archive)
    rng.shuffle(order)
    return _vmstate_ascending(archive, order)


def interleaved(archive: Archive) -> Order:
    """Take one cluster from each device in turn, the last device first."""
    order = []
    for cluster_num in range(max((d.cluster_count for d in archive.devices), default=0)):
        for device in reversed(archive.devices):
            if cluster_num < device.cluster_count:
                order.append((device.dev_id, cluster_num))
    return order


def vmstate_first(archive: Archive) -> Order:
    vmstate = {device.dev_id for device in archive.devices if device.is_vmstate}
    return sorted(in_order(archive), key=lambda cluster: cluster[0] not in vmstate)


def live_order(
    archive: Archive, rng: random.Random, window: int = 16, early: float = 0.03
) -> Order:
    """Order the clusters as a backup of a running guest does.

    The devices are read one after the other with `window` clusters under way, which finish in
    random order. A share of `early` is out of turn, from anywhere on any device: what the guest
    was about to overwrite.
    """
    sizes = {device.dev_id: device.cluster_count for device in archive.devices}
    everything = in_order(archive)
    order: Order = []
    done: set[Cluster] = set()
    for dev_id, cluster_count in sizes.items():
        waiting = iter(range(cluster_count))
        under_way: list[Cluster] = []
        while True:
            for cluster_num in waiting:
                if (dev_id, cluster_num) not in done:
                    under_way.append((dev_id, cluster_num))
                    if len(under_way) >= window:
                        break
            if not under_way:
                break
            if rng.random() < early:
                cluster = rng.choice(everything)
                if cluster not in done and cluster not in under_way:
                    done.add(cluster)
                    order.append(cluster)
                    continue
            cluster = under_way.pop(rng.randrange(len(under_way)))
            done.add(cluster)
            order.append(cluster)
    return _vmstate_ascending(archive, order)


def all_orders(archive: Archive, rng: random.Random) -> dict[str, Order]:
    """Return each order of clusters, by what it is called."""
    return {
        "in order": in_order(archive),
        "reversed": reversed_order(archive),
        "shuffled": shuffled(archive, rng),
        "interleaved": interleaved(archive),
        "vmstate first": vmstate_first(archive),
        "live": live_order(archive, rng),
    }


# ---- writing an archive -------------------------------------------------------------------------


def data_masks(archive: Archive) -> Masks:
    """Return the masks that store the blocks with data and no other."""
    return {
        (device.dev_id, cluster_num): device.mask(cluster_num)
        for device in archive.devices
        for cluster_num in range(device.cluster_count)
    }


def masks_with_zeros(archive: Archive, rng: random.Random, share: float = 0.2) -> Masks:
    """Return masks that also store a share of the blocks that are all zeros, as is legal."""
    masks = data_masks(archive)
    for device in archive.devices:
        for number in range(device.block_count):
            if rng.random() < share:
                masks[device.dev_id, number // 16] |= 1 << number % 16
    return masks


def header_bytes(archive: Archive, header_size: int | None = None) -> bytes:
    """Return the header; `header_size` overrides the archive's own."""
    blobs = bytearray(1)

    def add(data: bytes) -> int:
        offset = len(blobs)
        blobs.extend(struct.pack("<H", len(data)) + data)
        return offset

    name_offsets: dict[int, int] = {}
    devices = sorted(archive.devices, key=lambda device: device.dev_id)
    if archive.names_first:
        name_offsets = {device.dev_id: add(device.raw_name + b"\0") for device in devices}
    config_offsets = []
    for name, data in archive.configs:
        raw_name = name.encode() if isinstance(name, str) else name
        name_offset = add(raw_name + b"\0")
        config_offsets.append((name_offset, add(data)))
    if not archive.names_first:
        name_offsets = {device.dev_id: add(device.raw_name + b"\0") for device in devices}

    size = header_size or archive.header_size or HEADER + -(-len(blobs) // 512) * 512
    if size < HEADER + len(blobs):
        raise ValueError(f"a header of {size} bytes does not hold {len(blobs)} bytes of blobs")
    header = bytearray(size)
    header[0:32] = struct.pack(">4sI16sq", b"VMA\0", 1, archive.uuid, archive.ctime)
    header[48:60] = struct.pack(">III", HEADER, len(blobs), size)
    slots = archive.config_slots or list(range(len(archive.configs)))
    for slot, (name_offset, data_offset) in zip(slots, config_offsets):
        struct.pack_into(">I", header, 2044 + 4 * slot, name_offset)
        struct.pack_into(">I", header, 3068 + 4 * slot, data_offset)
    for device in devices:
        at = 4096 + 32 * device.dev_id
        struct.pack_into(">IIQ", header, at, name_offsets[device.dev_id], 0, device.stated_size)
    header[HEADER : HEADER + len(blobs)] = blobs
    header[32:48] = hashlib.md5(header).digest()
    return bytes(header)


def extent_bytes(
    uuid: bytes,
    blockinfos: Sequence[tuple[int, int, int]],
    payload: Sequence[bytes],
    unused: bytes = bytes(8),
) -> bytes:
    """Return an extent; `blockinfos` are (mask, dev_id, cluster_num), `payload` its blocks.

    `unused` is what the slots behind them hold: any eight bytes whose dev_id, the fourth, is 0.
    """
    extent = bytearray(EXTENT_HEADER)
    extent[0:24] = struct.pack(">4sHH16s", b"VMAE", 0, len(payload), uuid)
    for slot, blockinfo in enumerate(blockinfos):
        struct.pack_into(">HxBI", extent, 40 + 8 * slot, *blockinfo)
    extent[40 + 8 * len(blockinfos) :] = unused * (SLOTS - len(blockinfos))
    extent[24:40] = hashlib.md5(extent).digest()
    return bytes(extent) + b"".join(payload)


def build(
    archive: Archive,
    order: Order | None = None,
    slots: int = 58,
    store_zero_blocks: Masks | None = None,
    empty_extents: bool = False,
    empty_slots: bool = False,
) -> bytes:
    """Return an archive with the clusters in the given order, `slots` of them an extent.

    Without an order, they are `in_order`. `store_zero_blocks` are the masks to store instead of
    those of the data (masks_with_zeros). `empty_extents` puts extents without a block at the
    beginning, the end and after each third one, `empty_slots` leaves every third slot unused. The
    order may also lack clusters, repeat them, or name clusters and devices that do not exist: they
    are stored as told, with a mask of 0 unless `store_zero_blocks` says otherwise.
    """
    parts = build_parts(archive, order, slots, store_zero_blocks, empty_extents, empty_slots)
    return b"".join(parts)


def build_parts(
    archive: Archive,
    order: Order | None = None,
    slots: int = 58,
    store_zero_blocks: Masks | None = None,
    empty_extents: bool = False,
    empty_slots: bool = False,
) -> Iterator[bytes]:
    """Yield what `build` returns, header and extents one by one."""
    yield header_bytes(archive)
    order = in_order(archive) if order is None else order
    masks = store_zero_blocks or {}
    devices = {device.dev_id: device for device in archive.devices}
    nobody = Device(0, "nobody", b"")
    empty = extent_bytes(archive.uuid, [], [])
    if empty_extents:
        yield empty
    used = SLOTS * 2 // 3 if empty_slots else slots
    for at in range(0, len(order), used):
        blockinfos: list[tuple[int, int, int]] = []
        payload = []
        for dev_id, cluster_num in order[at : at + used]:
            if empty_slots and len(blockinfos) % 3 == 1:
                blockinfos.append((0, 0, 0))
            device = devices.get(dev_id, nobody)
            mask = masks.get((dev_id, cluster_num), device.mask(cluster_num))
            blockinfos.append((mask, dev_id, cluster_num))
            for bit in range(16):
                if mask >> bit & 1:
                    payload.append(device.block(cluster_num * 16 + bit))
        yield extent_bytes(archive.uuid, blockinfos, payload)
        if empty_extents and at // used % 3 == 2:
            yield empty
    if empty_extents or not order:
        yield empty


@functools.cache
def incompressible() -> bytes:
    """Return an archive of 4 MiB that does not compress: more than any pipe holds."""
    return build(Archive([Device(1, "drive-scsi0", disk(random.Random(1), 4 * MIB, "full"))]))


# ---- the canonical layout, as an oracle ---------------------------------------------------------


# The slots that no cluster uses, in an extent that stores no block and has clusters.
UNUSED = b"\xff\xff\xff\x00\xff\xff\xff\xff"


def clusters_per_extent(align: int) -> int:
    """Return how many clusters each extent of a device has but its last."""
    return 16 if align == ALIGNS["1M"] else 8


def canonical(
    archive: Archive, align: int = ALIGNS[DEFAULT_ALIGN], stored: Masks | None = None
) -> bytes:
    """Return the bytes that optimize and pack must write.

    `stored` are the masks of the source, where they hold more than the blocks with data. Blocks
    that begin behind a device's end are dropped, as a full mask may mark them.
    """
    masks = dict(stored) if stored is not None else data_masks(archive)
    target = replace(archive, uuid=CANONICAL_UUID, config_slots=None, names_first=False)
    plain = header_bytes(replace(target, header_size=None))
    blob_size = int.from_bytes(plain[52:56], "big")
    header_size = -(-(HEADER + blob_size) // align) * align
    out = [header_bytes(target, header_size)]

    count = clusters_per_extent(align)
    for device in sorted(archive.devices, key=lambda device: (device.is_vmstate, device.dev_id)):
        for first in range(0, device.cluster_count, count):
            end = min(first + count, device.cluster_count)
            keep = {
                cluster_num * 16 + bit
                for cluster_num in range(first, end)
                for bit in range(16)
                if masks[device.dev_id, cluster_num] >> bit & 1
                and cluster_num * 16 + bit < device.block_count
            }
            # Proxmox restores a vmstate from the stored blocks alone: one more would change it.
            if keep and not device.is_vmstate:
                for number in range(min(end * 16, device.block_count) - 1, first * 16 - 1, -1):
                    if len(keep) * BLOCK % align == 0:
                        break
                    keep.add(number)
            blockinfos = []
            for cluster_num in range(first, end):
                mask = sum(1 << bit for bit in range(16) if cluster_num * 16 + bit in keep)
                blockinfos.append((mask, device.dev_id, cluster_num))
            payload = [device.block(number) for number in sorted(keep)]
            unused = bytes(8) if keep else UNUSED
            out.append(extent_bytes(CANONICAL_UUID, blockinfos, payload, unused))
    if not archive.devices:
        out.append(extent_bytes(CANONICAL_UUID, [], []))
    return b"".join(out)


# ---- reading an archive -------------------------------------------------------------------------


class Slot(NamedTuple):
    """A blockinfo and the offset in the archive at which it stands."""

    offset: int
    mask: int
    dev_id: int
    cluster_num: int


@dataclass
class Parsed:
    """An archive as read: what it holds, which blocks it stores, in which order."""

    archive: Archive
    masks: Masks
    order: Order
    extents: list[int]

    @property
    def disks(self) -> dict[str, bytes]:
        """Each device's content by name; a vmstate as long as its clusters."""
        return {device.raw_name.decode(): device.data for device in self.archive.devices}

    @property
    def configs(self) -> dict[str, bytes]:
        return {
            (name if isinstance(name, str) else name.decode()): data
            for name, data in self.archive.configs
        }


def extent_offsets(data: bytes) -> list[int]:
    """Return the offsets of all extents, found by their block_counts."""
    (at,) = struct.unpack_from(">I", data, 56)
    offsets = []
    while at < len(data):
        offsets.append(at)
        (block_count,) = struct.unpack_from(">H", data, at + 6)
        at += EXTENT_HEADER + block_count * BLOCK
    return offsets


def slots(data: bytes, offset: int) -> list[Slot]:
    """Return all 59 slots of the extent at `offset`, the empty ones too."""
    return [
        Slot(at, *struct.unpack_from(">HxBI", data, at))
        for at in range(offset + 40, offset + EXTENT_HEADER, 8)
    ]


def parse(data: bytes) -> Parsed:
    """Read an archive that is sound; anything amiss is a ValueError, in no particular words."""
    magic, version, uuid, ctime, md5, blob_offset, blob_size, header_size = struct.unpack_from(
        ">4sI16sq16sIII", data
    )
    header = data[:32] + bytes(16) + data[48:header_size]
    if (magic, version) != (b"VMA\0", 1) or hashlib.md5(header).digest() != md5:
        raise ValueError("bad header")
    blobs = data[blob_offset : blob_offset + blob_size]

    def blob(offset: int) -> bytes:
        (size,) = struct.unpack_from("<H", blobs, offset)
        if offset + 2 + size > len(blobs):
            raise ValueError("blob behind the buffer's end")
        return blobs[offset + 2 : offset + 2 + size]

    archive = Archive(uuid=uuid, ctime=ctime, header_size=header_size)
    names = struct.unpack_from(">256I", data, 2044)
    contents = struct.unpack_from(">256I", data, 3068)
    for name_offset, data_offset in zip(names, contents):
        if name_offset and data_offset:
            archive.configs.append((blob(name_offset).split(b"\0")[0].decode(), blob(data_offset)))

    sizes: dict[int, int] = {}
    device_names: dict[int, str] = {}
    for dev_id in range(1, 255):
        name_offset, _, size = struct.unpack_from(">IIQ", data, 4096 + 32 * dev_id)
        if name_offset and size:
            sizes[dev_id] = size
            device_names[dev_id] = blob(name_offset).split(b"\0")[0].decode()

    clusters: dict[Cluster, bytes] = {}
    masks: Masks = {}
    order: Order = []
    offsets = extent_offsets(data)
    for at in offsets:
        extent = data[at : at + EXTENT_HEADER]
        magic, reserved, block_count, extent_uuid, md5 = struct.unpack_from(">4sHH16s16s", extent)
        if (magic, reserved, extent_uuid) != (b"VMAE", 0, uuid):
            raise ValueError(f"bad extent at {at:#x}")
        if hashlib.md5(extent[:24] + bytes(16) + extent[40:]).digest() != md5:
            raise ValueError(f"bad extent MD5 at {at:#x}")
        position = at + EXTENT_HEADER
        for _, mask, dev_id, cluster_num in slots(data, at):
            if dev_id == 0:
                continue
            content = b""
            for bit in range(16):
                if mask >> bit & 1:
                    content += data[position : position + BLOCK]
                    position += BLOCK
                else:
                    content += bytes(BLOCK)
            if (dev_id, cluster_num) in clusters or len(content) != CLUSTER:
                raise ValueError(f"bad cluster {cluster_num} of {dev_id} at {at:#x}")
            clusters[dev_id, cluster_num] = content
            masks[dev_id, cluster_num] = mask
            order.append((dev_id, cluster_num))
        if position != at + EXTENT_HEADER + block_count * BLOCK:
            raise ValueError(f"wrong block_count at {at:#x}")

    for dev_id, size in sizes.items():
        name = device_names[dev_id]
        found = sorted(num for owner, num in clusters if owner == dev_id)
        wanted = len(found) if name == "vmstate" else -(-size // CLUSTER)
        if found != list(range(wanted)):
            raise ValueError(f"clusters of {name} are missing")
        content = b"".join(clusters.pop((dev_id, num)) for num in found)
        if name != "vmstate":
            content = content[:size]
        archive.devices.append(Device(dev_id, name, content, size))
    if clusters:
        raise ValueError("clusters of no device")
    return Parsed(archive, masks, order, offsets)


# ---- editing an archive -------------------------------------------------------------------------


def fix_header_md5(data: bytearray) -> None:
    (header_size,) = struct.unpack_from(">I", data, 56)
    data[32:48] = bytes(16)
    data[32:48] = hashlib.md5(data[:header_size]).digest()


def fix_extent_md5(data: bytearray, offset: int) -> None:
    data[offset + 24 : offset + 40] = bytes(16)
    data[offset + 24 : offset + 40] = hashlib.md5(data[offset : offset + EXTENT_HEADER]).digest()


def fix_md5s(data: bytearray) -> None:
    """Compute the MD5 of the header and of every extent again; the sizes must still be right."""
    fix_header_md5(data)
    for offset in extent_offsets(bytes(data)):
        fix_extent_md5(data, offset)


def edit(data: bytes, offset: int, new: bytes, *, fix_md5: bool = True) -> bytes:
    """Return the archive with the bytes at `offset` replaced, and the MD5 over them made right.

    Which MD5 that is, is decided by the archive as it was, so any field can be falsified. Bytes
    of payload have none.
    """
    (header_size,) = struct.unpack_from(">I", data, 56)
    extents = [at for at in extent_offsets(data) if at <= offset < at + EXTENT_HEADER]
    changed = bytearray(data)
    changed[offset : offset + len(new)] = new
    if fix_md5 and offset < header_size:
        fix_header_md5(changed)
    elif fix_md5 and extents:
        fix_extent_md5(changed, extents[0])
    return bytes(changed)


# ---- large archives, for benchmarks -------------------------------------------------------------

LARGE_ORDERS = ("in-order", "live", "random", "reversed", "interleaved", "vmstate-first")
POOL = 16 << 20  # larger than the usual window of a compressor, so that repeats are not found


@dataclass
class Large:
    """What write_large wrote: enough to tell what any cluster has to hold.

    Each device is (dev_id, name, size, masks by cluster_num).
    """

    devices: list[tuple[int, bytes, int, array[int]]]
    pool: bytes

    def cluster(self, dev_id: int, cluster_num: int) -> bytes:
        """Return a cluster's 64 KiB."""
        masks = next(masks for number, _, _, masks in self.devices if number == dev_id)
        mask = masks[cluster_num]
        content = bytearray(CLUSTER)
        source = b"".join(self.pieces(dev_id, cluster_num))
        for bit in range(16):
            if mask >> bit & 1:
                content[bit * BLOCK : (bit + 1) * BLOCK] = source[bit * BLOCK : (bit + 1) * BLOCK]
        return bytes(content)

    def pieces(self, dev_id: int, cluster_num: int) -> tuple[bytes, memoryview]:
        """Return a full cluster's content in two pieces: its stamp, and a slice of the pool."""
        stamp = struct.pack(">8sIII", b"cluster ", dev_id, cluster_num, 0xFFFFFFFF)
        at = (cluster_num * 2654435761 + dev_id * 40503) % (POOL - CLUSTER)
        return stamp, memoryview(self.pool)[at : at + CLUSTER - len(stamp)]

    def digest(self, dev_id: int) -> str:
        """Return the SHA-256 of a whole disk."""
        size, masks = next((size, masks) for n, _, size, masks in self.devices if n == dev_id)
        digest = hashlib.sha256()
        zeros = bytes(CLUSTER)
        for cluster_num, mask in enumerate(masks):
            content = self.cluster(dev_id, cluster_num) if mask else zeros
            digest.update(content[: size - cluster_num * CLUSTER])
        return digest.hexdigest()


def _large_masks(rng: random.Random, size: int, data_bytes: int) -> array[int]:
    """Spread about `data_bytes` over a disk: runs of clusters and holes, an eighth of them partial.

    The last, partial cluster of an odd size is left empty.
    """
    cluster_count = -(-size // CLUSTER)
    masks = array("H", bytes(2 * cluster_count))
    block_count = min(data_bytes, size) // BLOCK
    run_count = max(1, min(cluster_count // 64, block_count // 512))
    span = cluster_count // run_count
    for run in range(run_count):
        start = run * span
        room = span if run < run_count - 1 else cluster_count - start
        wanted = block_count * (run + 1) // run_count - block_count * run // run_count
        # the run begins at a random place of its span, but where there is still room for it
        spare = max(0, room - wanted // 16 - wanted // 128 - 2)
        at = start + rng.randint(0, spare)
        while wanted > 0 and at < start + room:
            left_in_span = start + room - at
            partial = rng.random() < 0.125 and wanted // 16 + 1 < left_in_span
            mask = rng.getrandbits(16) | 1 if partial else 0xFFFF
            masks[at] = mask
            wanted -= bin(mask).count("1")
            at += 1
    if size % CLUSTER:
        masks[-1] = 0
    return masks


def _large_order(
    name: str, rng: random.Random, counts: Sequence[int], window: int, early: float
) -> Iterator[int]:
    """Yield cluster numbers, counted through all devices, in the named order."""
    total = sum(counts)
    if name in ("in-order", "vmstate-first"):
        yield from range(total)
    elif name == "reversed":
        yield from range(total - 1, -1, -1)
    elif name == "random":
        order = array("I", range(total))
        rng.shuffle(order)
        yield from order
    elif name == "interleaved":
        first, second = counts
        for number in range(max(first, second)):
            if number < second:
                yield first + number
            if number < first:
                yield number
    elif name == "live":
        done = bytearray(total)
        under_way: list[int] = []
        draw = rng.random
        for number in range(total):
            if done[number]:
                continue
            done[number] = 1
            under_way.append(number)
            if len(under_way) < window:
                continue
            if draw() < early:
                other = int(draw() * total)
                if not done[other]:
                    done[other] = 1
                    yield other
            place = int(draw() * window)
            under_way[place], under_way[-1] = under_way[-1], under_way[place]
            yield under_way.pop()
        rng.shuffle(under_way)
        yield from under_way
    else:
        raise ValueError(f"no such order: {name}; there are {', '.join(LARGE_ORDERS)}")


def write_large(
    path: str | Path,
    *,
    size: int,
    data_bytes: int,
    order: str = "live",
    seed: int = 1,
    slots: int = 58,
    window: int = 16,
    early: float = 0.03,
    configs: Iterable[Config] = (("qemu-server.conf", b"memory: 2048\n"),),
) -> Large:
    """Write an archive of a disk of `size` bytes that holds about `data_bytes`, in little memory.

    "interleaved" splits the disk into two equal devices that alternate strictly, the second one
    first; "vmstate-first" puts a vmstate of a quarter of both figures in front. The payload does
    not compress, unless the compressor looks back further than 16 MiB.
    """
    rng = random.Random(seed)
    if order == "interleaved":
        half = -(-size // 2 // CLUSTER) * CLUSTER
        plan = [(1, b"drive-scsi0", half), (2, b"drive-scsi1", half)]
    elif order == "vmstate-first":
        plan = [(2, VMSTATE, -(-size // 4 // CLUSTER) * CLUSTER), (1, b"drive-scsi0", size)]
    else:
        plan = [(1, b"drive-scsi0", size)]
    devices = []
    for dev_id, name, device_size in plan:
        share = data_bytes * device_size // size
        devices.append((dev_id, name, device_size, _large_masks(rng, device_size, share)))
    large = Large(devices, rng.randbytes(POOL))
    archive = Archive(
        [Device(dev_id, name, b"", device_size) for dev_id, name, device_size, _ in devices],
        list(configs),
        uuid=rng.randbytes(16),
    )
    masks = array("H")
    slot_bases = []  # for each device: (number of its first cluster, what a slot adds to a number)
    for dev_id, _, _, device_masks in devices:
        slot_bases.append((len(masks), (dev_id << 32) - len(masks)))
        masks.extend(device_masks)
    boundary = slot_bases[1][0] if len(devices) > 1 else len(masks)
    low, high = slot_bases[0][1], slot_bases[-1][1]

    head = b"VMAE\0\0"
    counts = [len(device_masks) for _, _, _, device_masks in devices]
    numbers = _large_order(order, rng, counts, window, early)
    with open(path, "wb", buffering=1 << 20) as file:
        file.write(header_bytes(archive))
        while True:
            group = list(islice(numbers, slots))
            if not group:
                break
            infos = array(
                "Q", [masks[n] << 48 | (low if n < boundary else high) + n for n in group]
            )
            infos.byteswap()
            pieces: list[bytes | memoryview] = []
            block_count = 0
            for number in group:
                mask = masks[number]
                if not mask:
                    continue
                block_count += bin(mask).count("1")
                base = low if number < boundary else high
                dev_id, cluster_num = divmod(base + number, 1 << 32)
                content = large.pieces(dev_id, cluster_num)
                if mask == 0xFFFF:
                    pieces.extend(content)
                else:
                    source = b"".join(content)
                    pieces.extend(
                        source[bit * BLOCK : (bit + 1) * BLOCK]
                        for bit in range(16)
                        if mask >> bit & 1
                    )
            start = head + struct.pack(">H", block_count) + archive.uuid
            rest = infos.tobytes().ljust(EXTENT_HEADER - 40, b"\0")
            md5 = hashlib.md5(start + bytes(16) + rest).digest()
            file.write(b"".join([start, md5, rest, *pieces]))
    return large


def write_zeros_1tib(path: str | Path, order: str = "in-order", seed: int = 1) -> Large:
    """Write an archive of a disk of 1 TiB with 8 MiB of data: 16.7 million clusters, 150 MB."""
    return write_large(path, size=1 << 40, data_bytes=8 << 20, order=order, seed=seed)
