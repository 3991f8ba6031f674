"""Build differences with nothing but struct and hashlib: what `diff` has to write.

As tests/archives.py, this shares no line with vma_tool.py.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests import archives
from tests.archives import BLOCK, CANONICAL_UUID, CLUSTER, HEADER, Archive, Device

CONFIG = "vma-tool.json"


def canonical_devices(archive: Archive) -> list[Device]:
    return sorted(archive.devices, key=lambda device: (device.is_vmstate, device.dev_id))


def cluster(device: Device, number: int) -> bytes:
    """Return a cluster, filled up with zeros behind the device's end."""
    return device.data[number * CLUSTER : (number + 1) * CLUSTER].ljust(CLUSTER, b"\0")


def disk_digest(device: Device) -> bytes:
    """Return the digest of a device that the content digest is made of."""
    data = hashlib.sha256(device.raw_name + b"\0")
    numbers = hashlib.sha256()
    for number in range(device.cluster_count):
        content = cluster(device, number)
        if any(content):
            data.update(content)
            numbers.update(struct.pack(">Q", number))
    data.update(numbers.digest() + struct.pack(">Q", len(device.data)))
    return data.digest()


def content(archive: Archive) -> str:
    """Return the content digest of an archive."""
    digests = map(disk_digest, canonical_devices(archive))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def layout(data: bytes) -> str:
    """Return the layout digest of a plain archive."""
    md5s = b"".join(data[at + 24 : at + 40] for at in archives.extent_offsets(data))
    return hashlib.sha256(data[32:48] + hashlib.sha256(md5s).digest()).hexdigest()


def kept(base: Archive, new: Archive) -> dict[int, list[int]]:
    """Return the clusters that a difference holds, by dev_id."""
    bases = {(device.dev_id, device.raw_name): device for device in base.devices}
    found = {}
    for device in new.devices:
        numbers = list(range(device.cluster_count))
        old = bases.get((device.dev_id, device.raw_name))
        if old and not device.is_vmstate:
            numbers = [
                number
                for number in numbers
                if number >= old.cluster_count
                or cluster(old, number)[: len(device.data) - number * CLUSTER]
                != cluster(device, number)[: len(device.data) - number * CLUSTER]
            ]
        found[device.dev_id] = numbers
    return found


def build(
    base: bytes,
    new: bytes,
    names: tuple[str, str] = ("base.vma", "new.vma"),
    edit: Callable[[dict[str, Any]], object] = lambda value: None,
    clusters: dict[int, list[int]] | None = None,
    config: bytes | None = None,
) -> bytes:
    """Return the plain difference of two plain archives.

    `edit` may change what vma-tool.json says, `config` replaces it; `clusters` replaces those that
    are stored.
    """
    old, parsed = archives.parse(base), archives.parse(new)
    archive = parsed.archive
    clusters = kept(old.archive, archive) if clusters is None else clusters
    extents = []
    for device in canonical_devices(archive):
        for first in range(0, device.cluster_count, 58):
            numbers = [n for n in clusters[device.dev_id] if first <= n < first + 58]
            blockinfos, payload = [], []
            for number in numbers:
                mask = device.mask(number)
                if device.is_vmstate:
                    mask = parsed.masks[device.dev_id, number]
                blockinfos.append((mask, device.dev_id, number))
                payload += [device.block(number * 16 + b) for b in range(16) if mask >> b & 1]
            if numbers:
                extents.append(archives.extent_bytes(CANONICAL_UUID, blockinfos, payload))
    md5s = b"".join(extent[24:40] for extent in extents)
    value: dict[str, Any] = {
        "format": 1,
        **{
            key: {
                "name": name,
                "ctime": each.ctime,
                "layout": layout(data),
                "content": content(each),
            }
            for key, name, each, data in zip(
                ("base", "new"), names, (old.archive, archive), (base, new)
            )
        },
        "disks": [disk_digest(device).hex() for device in canonical_devices(archive)],
        "extents": hashlib.sha256(md5s).hexdigest(),
    }
    edit(value)
    text = json.dumps(value, indent=2).encode() + b"\n" if config is None else config
    header = header_bytes(archive, [(CONFIG, text), *archive.configs])
    return b"".join([header, *extents])


def header_bytes(archive: Archive, configs: list[archives.Config]) -> bytes:
    """Return the header of a difference with these configs."""
    target = replace(
        archive,
        uuid=CANONICAL_UUID,
        configs=configs,
        config_slots=None,
        names_first=False,
        header_size=None,
    )
    plain = archives.header_bytes(target)
    size = HEADER + int.from_bytes(plain[52:56], "big")
    header = bytearray(archives.header_bytes(target, -(-size // BLOCK) * BLOCK))
    header[:4] = b"VMAD"
    header[32:48] = bytes(16)
    header[32:48] = hashlib.md5(header).digest()
    return bytes(header)


def changed(archive: Archive, rng: random.Random) -> Archive:
    """Return another day's archive: some blocks differ, and here and there a device."""
    devices: list[Device] = []
    for device in archive.devices:
        data = bytearray(device.data)
        for _ in range(rng.choice([0, 0, 1, 2, 5])):
            at = rng.randrange(len(data))
            count = rng.choice([1, 100, BLOCK, CLUSTER])
            new = rng.choice([bytes(count), rng.randbytes(count)])
            data[at : at + count] = new[: len(data) - at]
        name, dev_id, size = device.name, device.dev_id, device.size
        fate = rng.choice(["same"] * 6 + ["gone", "renamed", "larger", "smaller", "moved"])
        if fate == "gone":
            continue
        if fate == "renamed" and not device.is_vmstate:
            name = f"drive-new{dev_id}"
        free = set(range(1, 255)) - {d.dev_id for d in archive.devices}
        if fate == "moved" and free:
            dev_id = rng.choice(sorted(free - {d.dev_id for d in devices}) or [dev_id])
        unit = CLUSTER if device.is_vmstate else 512
        if fate == "larger":
            data += archives.disk(rng, rng.choice([1, 7, 128, 60 * 128]) * unit, "sparse")[
                : 62 * CLUSTER
            ]
        if fate == "smaller" and len(data) > unit and not device.is_vmstate:
            del data[rng.randrange(unit, len(data), unit) :]
        devices.append(Device(dev_id, name, bytes(data), size if device.is_vmstate else None))
    configs = [(name, rng.choice([data, rng.randbytes(40)])) for name, data in archive.configs]
    return Archive(devices, configs, uuid=rng.randbytes(16), ctime=archive.ctime + 86400)
