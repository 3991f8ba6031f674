"""Agreement with Proxmox's own program: an archive is OK exactly where that restores all of it.

tests/data/verdicts.json.gz holds mutants of the golden archives, each as a difference, with the
answers of Proxmox's program. The other tests take one class of them each, at its limits.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from tests import archives, frames
from tests.archives import ALIGNS, BLOCK, CLUSTER, HEADER, MIB, Archive, Device
from tests.checks import CheckedTest, built
from tests.support import DATA, FEW, call_tool, golden, manifest, sha256, snapshot

MAX_DEVICE_NAME = 242  # bytes: Proxmox extracts into `tmp-disk-NAME.raw` first
MAX_CONFIG_NAME = 248


@functools.cache
def verdicts() -> list[dict[str, Any]]:
    """Return the mutants: base, what was changed, delta, Proxmox's answer and what ours must be."""
    found: list[dict[str, Any]] = json.loads(
        gzip.decompress((DATA / "verdicts.json.gz").read_bytes())
    )
    return found


def mutant(verdict: dict[str, Any]) -> bytes:
    """Return a mutant: pieces of its base as [offset, size], and new bytes in hex."""
    base = golden(verdict["base"]) if verdict["base"] else b""
    return b"".join(
        bytes.fromhex(piece) if isinstance(piece, str) else base[piece[0] : piece[0] + piece[1]]
        for piece in verdict["delta"]
    )


class Verdicts(CheckedTest):
    def test_there_are_many(self) -> None:
        self.assertEqual(len(verdicts()), 1014)
        self.assertEqual({verdict["ours"] for verdict in verdicts()}, {"ok", "bad"})

    def test_verify(self) -> None:
        """Status 0 and not a word, or status 3 and one line."""
        path = self.directory / "a.vma"
        wrong = []
        for verdict in verdicts():
            path.write_bytes(mutant(verdict))
            answer = call_tool("verify", "-q", path)
            good = verdict["ours"] == "ok"
            tidy = answer.stderr.count(b"\n") == (0 if good else 1) and not answer.stdout
            if answer.returncode != (0 if good else 3) or not tidy:
                wrong.append(f"{verdict}: {answer.returncode} {answer.stderr!r}"[:400])
        self.assertEqual(wrong[:20], [], f"{len(wrong)} of {len(verdicts())} differ")

    def test_what_is_accepted_is_restored(self) -> None:
        """Every archive called OK is extracted and optimized, and stays the same archive."""
        source = self.directory / "a.vma"
        accepted = [verdict for verdict in verdicts() if verdict["ours"] == "ok"]
        for number, verdict in enumerate(accepted[::7]):
            source.write_bytes(mutant(verdict))
            with self.subTest(verdict["what"], base=verdict["base"]):
                target = self.directory / f"{number}"
                self.ok("extract", "-q", source, target)
                optimized = self.directory / f"{number}.vma"
                self.ok("optimize", "-q", source, optimized)
                self.ok("verify", "-q", source, "--against", optimized)

    def test_what_is_refused_is_refused_by_all(self) -> None:
        """No command makes anything of an archive that does not restore."""
        source, target = self.directory / "a.vma", self.directory / "new"
        for verdict in [verdict for verdict in verdicts() if verdict["ours"] == "bad"][::29]:
            data = mutant(verdict)
            source.write_bytes(data)
            with self.subTest(verdict["what"], base=verdict["base"]):
                self.fails(3, "extract", "-q", source, target)
                self.fails(3, "unpack", "-q", "-", target, input=data)
                self.fails(3, "optimize", "-q", source, target)
                self.fails(3, "optimize", "-q", source)
                self.assertEqual([path.name for path in self.directory.iterdir()], ["a.vma"])
                self.assertEqual(source.read_bytes(), data)


class FullMask(CheckedTest):
    """All 16 blocks of a partial last cluster, as Proxmox's writer stored them until June 2020."""

    def test_golden_archive(self) -> None:
        want = manifest()["full-mask"]
        data = golden("full-mask")
        source, old = self.file("a.vma", data), self.file("b.vma", golden("three-disks"))
        self.assertIn("OK", self.ok("verify", source))
        self.assertIn("OK", self.ok("verify", "-", input=data))
        self.assertIn("the same", self.ok("verify", source, "--against", old, "--ignore-ctime"))
        for name, stream in (("file", None), ("stream", data)):
            with self.subTest(name):
                archive = source if stream is None else "-"
                self.ok("extract", archive, self.directory / name, input=stream)
                for device in want["devices"]:
                    disk = self.directory / name / f"disk-{device['name']}.raw"
                    self.assertEqual(sha256(disk), device["sha256"], device["name"])
                for align, digest in want["optimized_sha256"].items():
                    answer = call_tool("optimize", "--align", align, archive, "-", input=stream)
                    self.check_ok(answer)
                    self.assertEqual(sha256(answer.stdout), digest, align)
        digests = self.ok("verify", "--digest", source)
        for device in want["devices"]:
            self.assertIn(f"{device['sha256']}  {device['name']}\n", digests)
        self.ok("optimize", source)
        self.assertEqual(sha256(source), want["optimized_sha256"]["512K"])

    def test_foreign_bytes(self) -> None:
        """What lies behind the end is dropped, in the block that straddles it as well."""
        rng = random.Random(1)
        for behind in (512, 1536, BLOCK, 5 * BLOCK + 512, CLUSTER - 512):
            size = 2 * CLUSTER + behind
            foreign = Device(1, "drive-scsi0", rng.randbytes(3 * CLUSTER), size)
            clean = Archive([Device(1, "drive-scsi0", foreign.data[:size])])
            data = archives.build(Archive([foreign]), archives.in_order(clean))
            source = self.file("a.vma", data)
            with self.subTest(behind=behind):
                answer = call_tool("extract", "-d", "drive-scsi0", "-o", "-", source)
                self.check_ok(answer)
                self.assertEqual(sha256(answer.stdout), sha256(foreign.data[:size]))
                for align in ("4K", "128K", "512K", "1M"):
                    want = sha256(archives.canonical(clean, ALIGNS[align]))
                    for stream in (None, data):
                        archive = source if stream is None else "-"
                        answer = call_tool("optimize", "--align", align, archive, "-", input=stream)
                        self.check_ok(answer)
                        self.assertEqual(sha256(answer.stdout), want, align)

    def test_any_other_mask(self) -> None:
        """Any other mask with a bit behind the end does not restore, and is refused."""
        size = CLUSTER + 4 * BLOCK
        device = Device(1, "drive-scsi0", b"\x55" * (2 * CLUSTER), size)
        archive = Archive([device])
        for mask in (0x0010, 0x001F, 0x8000, 0x7FFF, 0xFFFE, 0xFFF0):
            with self.subTest(mask=f"{mask:#06x}"):
                masks = {**archives.data_masks(archive), (1, 1): mask}
                data = archives.build(archive, archives.in_order(archive), store_zero_blocks=masks)
                source = self.file("a.vma", data)
                self.fails(3, "verify", source, says=["drive-scsi0", "cluster 1", f"{mask:04x}"])
                self.fails(3, "optimize", "-", self.directory / "b.vma", input=data)

    def test_not_behind_the_last_cluster(self) -> None:
        """A full mask is no licence for a cluster that is wholly behind the end."""
        device = Device(1, "drive-scsi0", b"\x55" * (2 * CLUSTER), CLUSTER)
        data = archives.build(Archive([device]), archives.in_order(Archive([device])))
        self.fails(3, "verify", self.file("a.vma", data))


def raw_header(
    blobs: bytes,
    configs: Sequence[tuple[int, int]] = (),
    devices: Sequence[tuple[int, int, int]] = (),
    blob_offset: int = HEADER,
    announced: int | None = None,
) -> bytes:
    """Return a header with this blob buffer at blob_offset.

    `configs` are (name offset, data offset), `devices` (dev_id, name offset, size); `announced` is
    the blob buffer's size where it is not that of `blobs`.
    """
    header = bytearray(-(-max(HEADER, blob_offset + len(blobs)) // 512) * 512)
    header[0:32] = struct.pack(">4sI16sq", b"VMA\0", 1, bytes(range(16)), 1763600000)
    size = len(blobs) if announced is None else announced
    header[48:60] = struct.pack(">III", blob_offset, size, len(header))
    header[blob_offset : blob_offset + len(blobs)] = blobs
    for slot, (name_offset, data_offset) in enumerate(configs):
        struct.pack_into(">I", header, 2044 + 4 * slot, name_offset)
        struct.pack_into(">I", header, 3068 + 4 * slot, data_offset)
    for dev_id, name_offset, disk_size in devices:
        struct.pack_into(">IIQ", header, 4096 + 32 * dev_id, name_offset, 0, disk_size)
    header[32:48] = hashlib.md5(header).digest()
    return bytes(header)


def blob(data: bytes, length: int | None = None) -> bytes:
    """Return a blob; `length` is what it says its length is."""
    return struct.pack("<H", len(data) if length is None else length) + data


class BlobWalk(CheckedTest):
    """Blobs are known by walking from one to the next; an offset to anything else does not exist.

    Each archive has the config a.conf and, unless it is about configs, one disk.
    """

    NAME, DATA = blob(b"a.conf\0"), blob(b"cores: 2\n")
    DISK = blob(b"drive-scsi0\0")

    def archive(self, header: bytes) -> bytes:
        extent = archives.extent_bytes(bytes(range(16)), [(1, 1, 0)], [b"\x55" * BLOCK])
        return header + extent

    def accepted(self, header: bytes) -> None:
        data = self.archive(header)
        self.ok("verify", self.file("a.vma", data))
        self.assertEqual(self.ok("config", "-c", "a.conf", "-", input=data), "cores: 2\n")
        self.ok("optimize", "-q", "-", self.directory / "b.vma", input=data)
        optimized = archives.parse((self.directory / "b.vma").read_bytes())
        self.assertEqual(optimized.configs, {"a.conf": b"cores: 2\n"})
        self.assertEqual(list(optimized.disks), ["drive-scsi0"])
        (self.directory / "b.vma").unlink()

    def refused_header(self, header: bytes, *says: str) -> None:
        data = self.archive(header)
        self.fails(3, "verify", self.file("a.vma", data), says=says)
        if "device" not in says:  # such a device is ignored, its clusters are those of none
            self.fails(3, "list", "-", input=data, says=says)
        self.fails(3, "extract", self.directory / "a.vma", self.directory / "new", says=says)
        self.assertFalse((self.directory / "new").exists())

    def test_accepted(self) -> None:
        disk = len(self.NAME) + len(self.DATA) + 1
        configs = [(1, 1 + len(self.NAME))]
        buffer = b"\0" + self.NAME + self.DATA + self.DISK
        self.accepted(raw_header(buffer, configs, [(1, disk, CLUSTER)]))
        for offset in (HEADER + 1, HEADER + 512, HEADER + 4096):
            self.accepted(raw_header(buffer, configs, [(1, disk, CLUSTER)], blob_offset=offset))

    def test_blobs_that_nobody_needs(self) -> None:
        """They are walked over, empty ones too."""
        spare = blob(b"") + blob(b"nobody needs this") + blob(b"")
        buffer = b"\0" + spare + self.NAME + spare + self.DATA + self.DISK + spare
        name = 1 + len(spare)
        data = name + len(self.NAME) + len(spare)
        disk = data + len(self.DATA)
        self.accepted(raw_header(buffer, [(name, data)], [(1, disk, CLUSTER)]))

    def test_last_blob_behind_the_end(self) -> None:
        """A blob that would end behind the buffer does not count.

        It is an error to need it for a config. A device is ignored without it, as by Proxmox.
        """
        start = b"\0" + self.NAME + self.DATA
        disk, last = len(start), len(start) + len(self.DISK)
        for announced in (1000, 0xFFFF):
            buffer = start + self.DISK + blob(b"cut", announced)
            devices = [(1, disk, CLUSTER)]
            self.accepted(raw_header(buffer, [(1, 1 + len(self.NAME))], devices))
            self.refused_header(raw_header(buffer, [(1, last)], devices))
            spare = [*devices, (2, last, CLUSTER)]
            self.accepted(raw_header(buffer, [(1, 1 + len(self.NAME))], spare))
            needed = [(1, last, CLUSTER)]
            self.refused_header(raw_header(buffer, [(1, 1 + len(self.NAME))], needed), "device")

    def test_offset_into_a_blob(self) -> None:
        """A blob inside another one is none, whole as it may look."""
        outer = blob(b"..." + self.DATA + self.DISK + b"...")
        inner = 1 + len(self.NAME) + len(self.DATA) + 2 + 3
        buffer = b"\0" + self.NAME + self.DATA + outer + self.DISK
        disk = len(buffer) - len(self.DISK)
        good, devices = (1, 1 + len(self.NAME)), [(1, disk, CLUSTER)]
        self.accepted(raw_header(buffer, [good], devices))
        self.refused_header(raw_header(buffer, [(1, inner)], devices), "config")
        self.refused_header(raw_header(buffer, [(inner, good[1])], devices), "config")
        nested_disk = inner + len(self.DATA)
        self.refused_header(raw_header(buffer, [good], [(1, nested_disk, CLUSTER)]), "device")

    def test_gap(self) -> None:
        """Bytes between two blobs are taken for a length: what stands behind them is lost."""
        buffer = b"\0" + self.NAME + self.DATA + b"\xff\x03?" + self.DISK
        disk = len(buffer) - len(self.DISK)
        self.refused_header(
            raw_header(buffer, [(1, 1 + len(self.NAME))], [(1, disk, CLUSTER)]), "device"
        )

    def test_buffer_inside_the_tables(self) -> None:
        """It begins at 12288 or behind it."""
        buffer = b"\0" + self.NAME + self.DATA + self.DISK
        configs, disk = [(1, 1 + len(self.NAME))], len(buffer) - len(self.DISK)
        for offset in (0, 60, 512, 8192, HEADER - 1):
            with self.subTest(offset=offset):
                # moved down without moving the blobs: the offsets are right, counted from there
                shift = HEADER - offset
                moved = [(name + shift, data + shift) for name, data in configs]
                header = bytearray(raw_header(buffer, moved, [(1, disk + shift, CLUSTER)]))
                header[48:56] = struct.pack(">II", offset, len(buffer) + shift)
                archives.fix_header_md5(header)
                self.refused_header(bytes(header), "blob")


class Sizes(CheckedTest):
    """A disk has whole sectors of 512 bytes: of another, Proxmox restores less, or dies."""

    def test_archive(self) -> None:
        rng = random.Random(2)
        for size in (1, 300, 511, 513, CLUSTER + 1, CLUSTER + 4095, 4 * CLUSTER - 1):
            for name in ("drive-scsi0", "vmstate"):
                data = built(Device(1, name, archives.disk(rng, size, "full")))
                source = self.file("a.vma", data)
                with self.subTest(name, size=size):
                    self.fails(3, "verify", source, says=[name, str(size), "512"])
                    self.fails(3, "extract", "-", self.directory / "new", input=data)
                    self.fails(3, "optimize", source)
                    self.assertEqual(source.read_bytes(), data)
                    self.assertFalse((self.directory / "new").exists())

    def test_whole_sectors(self) -> None:
        for size in (512, 1024, CLUSTER + 512, 4 * CLUSTER - 512):
            data = built(Device(1, "drive-scsi0", b"\x55" * size))
            self.ok("verify", self.file("a.vma", data))

    def test_pack(self) -> None:
        """Nor does pack make such an archive, when vma.json asks for it."""
        source = self.file("a.vma", built(Device(1, "drive-scsi0", b"\x55" * CLUSTER)))
        target = self.directory / "dir"
        self.ok("unpack", source, target)
        description = target / "vma.json"
        text = description.read_text("utf-8")
        for size in (CLUSTER - 1, CLUSTER - 511, CLUSTER + 1, 4096 + 100):
            with self.subTest(size=size):
                description.write_text(text.replace(str(CLUSTER), str(size)), "utf-8")
                (target / "drive-scsi0").write_bytes(b"\x55" * size)
                packed = self.directory / "b.vma"
                self.fails(1, "pack", target, packed, says=["drive-scsi0", str(size), "512"])
                self.assertFalse(packed.exists())


class Names(CheckedTest):
    """Names that are too long for the files that Proxmox writes them to."""

    def check(self, data: bytes, restores: bool) -> None:
        source, target = self.file("a.vma", data), self.directory / "new"
        if restores:
            self.ok("verify", source)
            for command in ("extract", "unpack"):
                self.ok(command, source, self.directory / command)
            return
        self.fails(3, "verify", source)
        self.fails(3, "extract", source, target)
        self.fails(3, "unpack", "-", target, input=data)
        self.fails(3, "optimize", source)
        self.assertEqual([path.name for path in self.directory.iterdir()], ["a.vma"])
        # shown for what it is, with the status of a bad archive
        self.assertEqual(call_tool("list", source).returncode, 3)

    def test_longest(self) -> None:
        device = Device(1, "d" * MAX_DEVICE_NAME, b"\x55" * CLUSTER)
        self.check(built(device, configs=[("c" * MAX_CONFIG_NAME, b"")]), True)

    def test_too_long(self) -> None:
        """Bytes count, not characters."""
        for name in ("d" * (MAX_DEVICE_NAME + 1), "ä" * (MAX_DEVICE_NAME // 2 + 1)):
            self.check(built(Device(1, name, b"\x55" * CLUSTER)), False)
        for name in ("c" * (MAX_CONFIG_NAME + 1), "ä" * (MAX_CONFIG_NAME // 2 + 1)):
            self.check(built(Device(1, "drive-scsi0", b"\x55" * 512), configs=[(name, b"")]), False)

    def test_made(self) -> None:
        """No archive with such names is made."""
        disk, archive = self.file("disk", b"\x55" * CLUSTER), self.directory / "a.vma"
        name = "d" * (MAX_DEVICE_NAME + 1)
        self.fails(1, "create", archive, f"{name}={disk}", says=[str(MAX_DEVICE_NAME)])
        config = self.file("c" * (MAX_CONFIG_NAME + 1), b"")
        self.fails(1, "create", "-c", config, archive, f"drive-scsi0={disk}",
                   says=[str(MAX_CONFIG_NAME)])  # fmt: skip
        target = self.directory / "dir"
        target.mkdir()
        (target / f"disk-{name}.raw").write_bytes(b"\x55" * CLUSTER)
        self.fails(1, "pack", target, archive, says=[str(MAX_DEVICE_NAME)])
        self.assertFalse(archive.exists())


class ShortVmstate(CheckedTest):
    """A vmstate with fewer clusters than its size has lost some: every command says so."""

    CLUSTERS = 3

    def lacking(self) -> Iterator[tuple[str, int, bytes]]:
        """Yield what is wrong, how many clusters the size needs, and an archive that has three."""
        rng = random.Random(9)
        disk = Device(1, "drive-scsi0", archives.disk(rng, 2 * CLUSTER))
        content = archives.disk(rng, self.CLUSTERS * CLUSTER, "full")
        for size in (3 * CLUSTER + 512, 4 * CLUSTER, 9 * CLUSTER, 1 << 46):
            archive = Archive([disk, Device(2, "vmstate", content, size)])
            count = -(-size // CLUSTER)
            for slots in (1, 2, 3, 5, 58):
                for name, order in (
                    ("in order", archives.in_order(archive)),
                    ("vmstate first", archives.vmstate_first(archive)),
                    ("interleaved", archives.interleaved(archive)),
                ):
                    what = f"size {size}, {slots} slots, {name}"
                    yield what, count, archives.build(archive, order, slots)
            canonical = archives.canonical(archive)
            yield f"size {size}, canonical", count, canonical
            yield f"size {size}, compressed", count, frames.compress(canonical)
            gone = Archive([disk, Device(2, "vmstate", b"", size)])
            yield f"size {size}, all of it gone", count, archives.build(gone)

    def test_every_command(self) -> None:
        rng = random.Random(10)
        other = self.file("other.vma", built(Device(1, "drive-scsi0", archives.disk(rng, MIB))))
        target = self.directory / "new"
        # Of each command, the archive is PATH; a stream is read by all but the last ones.
        commands: list[list[Any]] = [
            ["verify", "PATH"],
            ["verify", "--quick", "PATH"],
            ["verify", "--digest", "PATH"],
            ["verify", "PATH", "--against", other],
            ["optimize", "PATH", target],
            ["optimize", "--align", "4K", "--compress", "zstd", "PATH", target],
            ["extract", "PATH", target],
            ["unpack", "PATH", target],
            ["diff", "PATH", other, target],
            ["diff", other, "PATH", target],
            ["verify", other, "--against", "PATH"],
            ["optimize", "PATH"],
            ["optimize", "--align", "4K", "PATH"],
        ]
        for number, (what, count, data) in enumerate(self.lacking()):
            path = self.file("a.vma", data)
            before = snapshot(self.directory)
            found = 0 if "gone" in what else self.CLUSTERS
            says = [
                "'vmstate' (dev_id 2)",
                f"{count - found} of {count} clusters are missing, the first is {found}",
            ]
            for args in commands[number % FEW :: FEW]:
                with self.subTest(what, args=args):
                    self.fails(3, *(path if arg == "PATH" else arg for arg in args), says=says)
                    self.assertEqual(snapshot(self.directory), before)
            for args in commands[number % FEW : 10 : FEW]:
                with self.subTest(what, args=args, stream=True):
                    stream = ["-" if arg == "PATH" else arg for arg in args]
                    answer = call_tool(*stream, input=data)
                    self.failed(answer, 3, *says)
                    self.assertEqual(snapshot(self.directory), before)

    def test_rescue(self) -> None:
        """What is there is restored; of the rest, no more is lost than the file has room for."""
        for number, (what, count, data) in enumerate(self.lacking()):
            with self.subTest(what):
                target = self.directory / f"new{number}"
                answer = call_tool("rescue", "--json", self.file("a.vma", data), target)
                self.assertEqual(answer.returncode, 3, answer.stderr)
                (disk, state) = json.loads(answer.stdout)["devices"]
                self.assertEqual((disk["lost"], disk["doubtful"]), ([], []))
                found = 0 if "gone" in what else self.CLUSTERS
                with open(target / "vmstate.bin", "rb") as file:
                    content = file.read(16 * CLUSTER)  # of gigabytes, but for these a hole
                    stored = os.fstat(file.fileno()).st_blocks * 512
                rng = random.Random(9)
                archives.disk(rng, 2 * CLUSTER)
                want = archives.disk(rng, self.CLUSTERS * CLUSTER, "full")[: found * CLUSTER]
                self.assertEqual(content[: found * CLUSTER], want)
                self.assertEqual(content[found * CLUSTER :].strip(b"\0"), b"")
                self.assertLessEqual(stored, (found + 1) * CLUSTER)
                (lost,) = state["lost"]
                self.assertEqual(lost[0], found * CLUSTER)
                self.assertLessEqual(lost[1], (count - found) * CLUSTER)
                self.assertLessEqual(lost[1] // CLUSTER, len(data) // 8)

    def test_as_many_or_more(self) -> None:
        """That is right."""
        content = archives.disk(random.Random(9), self.CLUSTERS * CLUSTER, "sparse")
        output = self.directory / "o.vma"
        for size in (512, 2 * CLUSTER + 512, 3 * CLUSTER - 512, 3 * CLUSTER):
            archive = Archive([Device(2, "vmstate", content, size)])
            for slots in (1, 2, 58):
                with self.subTest(size=size, slots=slots):
                    path = self.file("a.vma", archives.build(archive, slots=slots))
                    self.ok("verify", path)
                    self.ok("optimize", "--force", path, output)
                    self.ok("verify", output)
                    self.assertEqual(sha256(output), sha256(archives.canonical(archive)))
                    answer = call_tool("extract", "-d", "vmstate", "-o", "-", path)
                    self.assertEqual((answer.returncode, answer.stdout), (0, content))


class Vmstate(CheckedTest):
    """RAM state keeps exactly the blocks that it stores: one zero block more, and Proxmox restores
    another state."""

    def test_never_filled_up(self) -> None:
        rng = random.Random(3)
        archive = Archive(
            [
                Device(1, "drive-scsi0", archives.disk(rng, 5 * CLUSTER)),
                Device(2, "vmstate", archives.disk(rng, 130 * CLUSTER, "sparse")),
            ]
        )
        for stored in (archives.data_masks(archive), archives.masks_with_zeros(archive, rng)):
            data = archives.build(archive, archives.interleaved(archive), store_zero_blocks=stored)
            for align in ALIGNS:
                for stream in (None, data):
                    source = self.file("a.vma", data) if stream is None else "-"
                    answer = call_tool("optimize", "--align", align, source, "-", input=stream)
                    self.check_ok(answer)
                    found = archives.parse(answer.stdout)
                    kept = {key: mask for key, mask in found.masks.items() if key[0] == 2}
                    want = {key: mask for key, mask in stored.items() if key[0] == 2}
                    self.assertEqual(kept, want, f"--align {align}, stream: {stream is not None}")
                    self.assertEqual(found.disks["vmstate"], archive.devices[1].data)

    def test_pack(self) -> None:
        """What unpack wrote of it is packed to the same bytes."""
        source = self.file("a.vma", golden("vmstate"))
        self.ok("unpack", source, self.directory / "dir")
        for align, digest in manifest()["vmstate"]["optimized_sha256"].items():
            answer = call_tool("pack", "--align", align, self.directory / "dir", "-")
            self.assertEqual((answer.returncode, sha256(answer.stdout)), (0, digest), align)
