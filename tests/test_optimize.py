"""optimize: the canonical layout, from a file to another one or in its own place."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from pathlib import Path
from unittest import mock

import vma_tool
from tests import archives
from tests.archives import BLOCK, CLUSTER, MIB, Archive, Device
from tests.damage import damages, good
from tests.faults import ShortFile, WrongBit
from tests.support import (
    BAD,
    FEW,
    ToolTest,
    call_tool,
    golden,
    loop_device,
    make_read_only,
    manifest,
    run_tool,
    sha256,
    small_file_system,
    snapshot,
)


def small_archive(rng: random.Random) -> Archive:
    """Make an archive of one to four devices of odd sizes and contents, in dev_ids of any order."""
    patterns = ["mixed", "full", "sparse", "zeros"]
    count = rng.randint(1, 4)
    devices = []
    for dev_id, number in zip(sorted(rng.sample(range(1, 255), count)), range(count)):
        size = rng.choice([512, 1024, BLOCK, CLUSTER - 512, CLUSTER, CLUSTER + 512, 70 * CLUSTER])
        size = rng.choice([size, rng.randrange(512, 30 * CLUSTER, 512)])
        data = archives.disk(rng, size, rng.choice(patterns))
        devices.append(Device(dev_id, f"drive-scsi{number}", data))
    if rng.random() < 0.4:
        stated = rng.randrange(512, 4 * CLUSTER, 512)
        clusters = -(-stated // CLUSTER) + rng.randint(0, 3)
        data = archives.disk(rng, clusters * CLUSTER, rng.choice(patterns))
        victim = rng.choice(devices)
        devices[devices.index(victim)] = Device(victim.dev_id, "vmstate", data, stated)
    configs = [(f"{n}.conf", rng.randbytes(rng.randint(0, 700))) for n in range(rng.randint(0, 3))]
    return Archive(
        devices,
        list(configs),
        uuid=rng.randbytes(16),
        ctime=rng.getrandbits(40),
        header_size=rng.choice([None, 1 << 15, 50000]),
        names_first=rng.random() < 0.3,
    )


def last_blocks(archive: Archive) -> archives.Masks:
    """Return masks that store the last block of each device."""
    return {
        (device.dev_id, device.cluster_count - 1): 1 << (device.block_count - 1) % 16
        for device in archive.devices
    }


class GoldenDigests(ToolTest):
    """The bytes that the manifest demands."""

    def test_to_another_file(self) -> None:
        """Every digest; the source stays as it is, and nothing else appears."""
        output = self.directory / "out.vma"
        for name, want in manifest().items():
            source = self.file("a.vma", golden(name))
            before = snapshot(self.directory)
            for align, digest in want["optimized_sha256"].items():
                with self.subTest(archive=name, align=align):
                    self.ok("optimize", "--align", align, source, output)
                    self.assertEqual(sha256(output), digest)
                    output.unlink()
                    self.assertEqual(snapshot(self.directory), before)

    def test_default_align(self) -> None:
        source = self.file("a.vma", golden("three-disks"))
        output = self.directory / "out.vma"
        digests = manifest()["three-disks"]["optimized_sha256"]
        for args, align in (([], "512K"), (["--align", "1m"], "1M"), (["--align=4K"], "4K")):
            with self.subTest(args=args):
                self.ok("optimize", "--force", *args, source, output)
                self.assertEqual(sha256(output), digests[align])

    def test_in_place(self) -> None:
        """Every digest; mode, owner and time stay, and nothing else appears."""
        for name, want in manifest().items():
            for align, digest in want["optimized_sha256"].items():
                with self.subTest(archive=name, align=align):
                    path = self.file("a.vma", golden(name))
                    os.chmod(path, 0o640)
                    if os.geteuid() == 0:
                        os.chown(path, 1234, 5678)
                    os.utime(path, ns=(1700000000123456789, 1700000001987654321))
                    before = path.stat()
                    self.ok("optimize", "--align", align, path)
                    after = path.stat()
                    self.assertEqual(sha256(path), digest)
                    for field in ("st_mode", "st_uid", "st_gid", "st_mtime_ns"):
                        self.assertEqual(getattr(after, field), getattr(before, field), field)
                    self.assertEqual(os.listdir(self.directory), ["a.vma"])
                    path.unlink()

    def test_canonical_already(self) -> None:
        """In place nothing happens, and it says so; to another file come the same bytes."""
        for name, want in manifest().items():
            for align, digest in want["optimized_sha256"].items():
                with self.subTest(archive=name, align=align):
                    path = self.file("a.vma", golden(name))
                    self.ok("optimize", "--align", align, path)
                    before = snapshot(self.directory)
                    text = self.ok("optimize", "--align", align, path)
                    self.assertEqual(text, f"{path}: is canonical already (--align {align})\n")
                    self.assertEqual(snapshot(self.directory), before)
                    self.ok("optimize", "--align", align, path, self.directory / "b.vma")
                    self.assertEqual(sha256(self.directory / "b.vma"), digest)
                    (self.directory / "b.vma").unlink()

    def test_tail_that_is_not_zero(self) -> None:
        """Canonical but for a byte behind a device's end: in place comes what elsewhere comes."""
        want = manifest()["odd-size"]["optimized_sha256"]["512K"]
        path, other = self.file("a.vma", golden("odd-size")), self.directory / "b.vma"
        self.ok("optimize", path)
        data = bytearray(path.read_bytes())
        self.assertEqual(data[-1], 0)
        data[-1] = 1
        path.write_bytes(data)
        self.assertRegex(self.ok("verify", path), "OK, .* not canonical")
        self.assertIn("not canonical\n", self.ok("list", "--scan", path))
        self.ok("optimize", path, other)
        self.assertIn(": optimized (", self.ok("optimize", path))
        self.assertEqual((sha256(path), sha256(other)), (want, want))

    def test_another_align(self) -> None:
        """Blocks that one alignment made be stored stay stored under the next."""
        path = self.directory / "a.vma"
        archive = archives.parse(golden("three-disks")).archive
        data = golden("three-disks")
        path.write_bytes(data)
        for align in ("4K", "128K", "512K", "1M", "256K", "64K", "4K"):
            with self.subTest(align=align):
                stored = archives.parse(path.read_bytes()).masks
                self.ok("optimize", "--align", align, path)
                want = archives.canonical(archive, archives.ALIGNS[align], stored)
                self.assertEqual(sha256(path), sha256(want))

    def test_next_day(self) -> None:
        """Two backups of one disk differ, once optimized, where the disk does."""
        first, second = (
            self.directory / f"{name}.vma" for name in ("live-order", "live-order-day2")
        )
        for path in (first, second):
            path.write_bytes(golden(path.stem))
            self.ok("optimize", "--align", "4K", path)

        def blocks(path: Path) -> set[bytes]:
            """Return the header of each extent, and each block that follows it."""
            data = path.read_bytes()
            extents = archives.extent_offsets(data)
            found = {data[extent : extent + 512] for extent in extents}
            for extent, end in zip(extents, [*extents[1:], len(data)]):
                found.update(data[at : at + BLOCK] for at in range(extent + 512, end, BLOCK))
            return found

        self.assertLess(len(blocks(second) - blocks(first)), len(blocks(second)) // 4)


class Oracle(ToolTest):
    """Against the independent builder of the canonical layout."""

    def check(self, archive: Archive, align: str, stored: archives.Masks, data: bytes) -> None:
        """Optimize from a file, in place and from a pipe, and compare with the oracle."""
        want = sha256(archives.canonical(archive, archives.ALIGNS[align], stored))
        source = self.file("a.vma", data)
        output = self.directory / "out.vma"
        self.ok("optimize", "--force", "--align", align, source, output)
        self.assertEqual(sha256(output), want)
        self.assertEqual(sha256(source), sha256(data))
        answer = call_tool("optimize", "--align", align, "-", "-", input=data)
        self.check_ok(answer)
        self.assertEqual(sha256(answer.stdout), want)
        self.ok("optimize", "--align", align, source)
        self.assertEqual(sha256(source), want)

    def test_random_archives(self) -> None:
        """Any devices, in any order, cut into any extents, with any zero blocks stored."""
        for seed in range(0, 40, FEW):
            rng = random.Random(seed)
            archive = small_archive(rng)
            order = rng.choice(
                [
                    archives.in_order(archive),
                    archives.reversed_order(archive),
                    archives.shuffled(archive, rng),
                    archives.interleaved(archive),
                    archives.vmstate_first(archive),
                    archives.live_order(archive, rng),
                ]
            )
            stored = archives.data_masks(archive)
            if rng.random() < 0.5:
                stored = archives.masks_with_zeros(archive, rng, rng.choice([0.01, 0.2, 1]))
            data = archives.build(
                archive,
                order,
                slots=rng.choice([1, 7, 8, 58, 59]),
                store_zero_blocks=stored,
                empty_extents=rng.random() < 0.3,
                empty_slots=rng.random() < 0.3,
            )
            align = rng.choice(list(archives.ALIGNS))
            with self.subTest(seed=seed, align=align):
                self.check(archive, align, stored, data)

    def test_orders_and_aligns(self) -> None:
        """Every order and every alignment of the usual guest with RAM state."""
        rng = random.Random(11)
        archive = archives.three_disks(rng, vmstate=True)
        orders = {
            "in order": archives.in_order(archive),
            "reversed": archives.reversed_order(archive),
            "shuffled": archives.shuffled(archive, rng),
            "interleaved": archives.interleaved(archive),
            "vmstate first": archives.vmstate_first(archive),
            "live": archives.live_order(archive, rng),
        }
        wanted = {
            align: sha256(archives.canonical(archive, size))
            for align, size in archives.ALIGNS.items()
        }
        output = self.directory / "out.vma"
        for what, order in orders.items():
            source = self.file("a.vma", archives.build(archive, order))
            for align, want in wanted.items():
                with self.subTest(what, align=align):
                    self.ok("optimize", "--force", "--align", align, source, output)
                    self.assertEqual(sha256(output), want)

    def test_vmstate(self) -> None:
        """It comes last whatever its dev_id, with all its clusters however few its size needs."""
        rng = random.Random(12)
        disk = Device(9, "drive-scsi0", archives.disk(rng, 3 * CLUSTER + 512, "sparse"))
        for dev_id in (1, 254):
            for clusters, stated in (
                (1, 512),
                (8, 3 * CLUSTER),
                (9, 9 * CLUSTER),
                (57, 1024),
                (113, 56 * CLUSTER),
            ):
                for pattern in ("sparse", "zeros"):
                    content = archives.disk(rng, clusters * CLUSTER, pattern)
                    archive = Archive([disk, Device(dev_id, "vmstate", content, stated)])
                    with self.subTest(dev_id=dev_id, clusters=clusters, pattern=pattern):
                        data = archives.build(archive, archives.vmstate_first(archive), 13)
                        self.check(archive, "512K", archives.data_masks(archive), data)

    def test_ends_of_devices(self) -> None:
        """Sizes around a block, a cluster and a full extent, of data and of zeros."""
        for clusters in (0, 1, 7, 8, 56, 111):
            for rest in (512, BLOCK - 512, BLOCK, BLOCK + 512, CLUSTER - 512, CLUSTER):
                size = clusters * CLUSTER + rest
                disks = [
                    Device(1, "drive-scsi0", bytes(size - 1) + b"\1"),
                    Device(2, "drive-scsi1", bytes(size)),
                    Device(3, "drive-scsi2", b"\1" + bytes(size - 1)),
                ]
                archive = Archive(disks)
                with self.subTest(size=size):
                    data = archives.build(archive, archives.interleaved(archive))
                    self.check(archive, "512K", archives.data_masks(archive), data)

    def test_odd_disks(self) -> None:
        """Every align, of disks of 1 to 17 clusters whose ends are anywhere, and a vmstate."""
        rng = random.Random(14)
        rests = (0, 512, BLOCK - 512, BLOCK, 5 * BLOCK + 512, CLUSTER - 512)
        sizes = [n * CLUSTER - rests[n % len(rests)] for n in range(1, 18)]
        kinds: dict[str, list[bytes]] = {
            "zeros": [bytes(size) for size in sizes],
            "only the last byte": [bytes(size - 1) + b"\1" for size in sizes],
            "only the first byte": [b"\1" + bytes(size - 1) for size in sizes],
            "sparse": [archives.disk(rng, size, "sparse") for size in sizes],
            "full": [archives.disk(rng, size, "full") for size in sizes],
            "mixed": [archives.disk(rng, size) for size in sizes],
        }
        for number, (kind, contents) in enumerate(kinds.items()):
            devices = [Device(n, f"drive-scsi{n}", data) for n, data in enumerate(contents, 1)]
            clusters, pattern = ((8, "zeros"), (9, "sparse"), (17, "sparse"))[number % 3]
            state = archives.disk(rng, clusters * CLUSTER, pattern)
            devices.insert(5, Device(200, "vmstate", state, clusters * CLUSTER - 1024))
            archive = Archive(devices)
            zeros = dict.fromkeys(archives.data_masks(archive), 0)
            for what, stored in (
                ("data", archives.data_masks(archive)),
                ("and some zeros", archives.masks_with_zeros(archive, rng, 0.01)),
                ("and all zeros", archives.masks_with_zeros(archive, rng, 1)),
                # Of a cluster whose blocks are zeros, the last one in the device
                ("the last zeros", {**zeros, **last_blocks(archive)} if kind == "zeros" else {}),
            ):
                if not stored:
                    continue
                data = archives.build(
                    archive, archives.live_order(archive, rng), store_zero_blocks=stored
                )
                for align in list(archives.ALIGNS)[number % FEW :: FEW]:
                    with self.subTest(kind, stored=what, align=align):
                        self.check(archive, align, stored, data)

    def test_many_devices(self) -> None:
        """254 devices, which is all that there can be."""
        devices = [Device(n, f"drive-scsi{n}", bytes([n]) * 1024) for n in range(1, 255)]
        archive = Archive(devices)
        data = archives.build(archive, archives.reversed_order(archive))
        self.check(archive, "4K", archives.data_masks(archive), data)

    def test_large_configs(self) -> None:
        """256 configs of 65535 bytes."""
        archive = Archive(configs=[(f"{n}.conf", bytes([n]) * 65535) for n in range(256)])
        data = archives.build(archive, [])
        self.check(archive, "1M", {}, data)

    def test_sound_for_others(self) -> None:
        """What was written verifies, and an independent reader finds the same disks in it."""
        for name, want in manifest().items():
            with self.subTest(archive=name):
                path = self.file("a.vma", golden(name))
                self.ok("optimize", path)
                self.assertIn("canonical (--align 512K)", self.ok("verify", path))
                parsed = archives.parse(path.read_bytes())
                found = {disk: sha256(data) for disk, data in parsed.disks.items()}
                self.assertEqual(found, {d["name"]: d["sha256"] for d in want["devices"]})
                configs = {config: sha256(data) for config, data in parsed.configs.items()}
                self.assertEqual(configs, want["configs"])


FULL = 0xFFFF

# What the layout makes of ten clusters, the last with five blocks and a sector more: clusters 3
# and 9 store a block, one of them of zeros. (align, masks of each extent)
BY_HAND = (
    ("4K", [[0, 0, 0, 4, 0, 0, 0, 0], [0, 2]]),
    ("64K", [[0, 0, 0, 4, 0, 0, 0, 0xFFFE], [0xFFC0, 0x3F]]),
    ("128K", [[0, 0, 0, 4, 0, 0, 0xFFFE, FULL], [FULL, 0x3F]]),
    ("256K", [[0, 0, 0, 4, 0xFFFE, FULL, FULL, FULL], [FULL, 0x3F]]),
    ("512K", [[FULL] * 8, [FULL, 0x3F]]),
    ("1M", [[FULL] * 9 + [0x3F]]),
)


class ByHand(ToolTest):
    """Extents worked out from the description of the layout, not by a program."""

    def extents(self, archive: Archive, align: str, stored: archives.Masks) -> list[list[int]]:
        """Optimize an archive; check its order and unused slots, and return the masks."""
        data = archives.build(archive, archives.reversed_order(archive), store_zero_blocks=stored)
        answer = call_tool("optimize", "--align", align, "-", "-", input=data)
        self.check_ok(answer)
        found, order = [], []
        for at in archives.extent_offsets(answer.stdout):
            slots = [slot for slot in archives.slots(answer.stdout, at) if slot.dev_id]
            order += [(slot.dev_id, slot.cluster_num) for slot in slots]
            found.append([slot.mask for slot in slots])
            count = int.from_bytes(answer.stdout[at + 6 : at + 8], "big")
            self.assertEqual(count, sum(bin(slot.mask).count("1") for slot in slots))
            unused = answer.stdout[at + 40 + 8 * len(slots) : at + 512]
            slot = bytes(8) if count or not slots else bytes.fromhex("FFFFFF00FFFFFFFF")
            self.assertEqual(unused, slot * (59 - len(slots)))
        self.assertEqual(order, archives.in_order(archive))
        (header_size,) = struct.unpack_from(">I", answer.stdout, 56)
        self.assertEqual(header_size, max(archives.ALIGNS[align], 16384))
        return found

    def test_disk(self) -> None:
        size = 9 * CLUSTER + 5 * BLOCK + 512
        content = bytearray(size)
        content[3 * CLUSTER + 2 * BLOCK] = 1
        archive = Archive([Device(1, "drive-scsi0", bytes(content))])
        stored = {**archives.data_masks(archive), (1, 9): 2}
        for align, masks in BY_HAND:
            with self.subTest(align=align):
                self.assertEqual(self.extents(archive, align, stored), masks)

    def test_zeros(self) -> None:
        for clusters in (1, 7, 8, 9, 16, 17):
            archive = Archive([Device(1, "drive-scsi0", bytes(clusters * CLUSTER - 512))])
            for align in archives.ALIGNS:
                each = 16 if align == "1M" else 8
                whole, rest = divmod(clusters, each)
                want = [[0] * each] * whole + [[0] * rest] * (rest > 0)
                with self.subTest(align=align, clusters=clusters):
                    self.assertEqual(self.extents(archive, align, {}), want)

    def test_vmstate(self) -> None:
        """Behind the disks, never filled up; a block of zeros that is stored stays stored."""
        state = bytearray(17 * CLUSTER)
        state[5 * BLOCK] = state[16 * CLUSTER] = 1
        archive = Archive(
            [Device(2, "drive-scsi0", b"x" * 512), Device(9, "vmstate", bytes(state))]
        )
        stored = {**archives.data_masks(archive), (9, 3): 0x8001}
        first = [0x20, 0, 0, 0x8001, 0, 0, 0, 0]
        for align in archives.ALIGNS:
            want = [[1], first + [0] * 8] if align == "1M" else [[1], first, [0] * 8]
            with self.subTest(align=align):
                self.assertEqual(self.extents(archive, align, stored), [*want, [1]])

    def test_several_disks(self) -> None:
        """Each begins an extent of its own, however short the one before it."""
        devices = [Device(n, f"drive-scsi{n}", b"x" * 512) for n in (1, 2, 254)]
        archive = Archive([*devices, Device(255 - 2, "drive-scsi9", bytes(9 * CLUSTER))])
        archive.devices.sort(key=lambda device: device.dev_id)
        want = [[1], [1], [0] * 8, [0], [1]]
        self.assertEqual(self.extents(archive, "512K", archives.data_masks(archive)), want)

    def test_no_disk(self) -> None:
        """One extent, with no slot used, and all of them zeros."""
        for align in archives.ALIGNS:
            with self.subTest(align=align):
                self.assertEqual(self.extents(Archive([]), align, {}), [[]])


class Outputs(ToolTest):
    """Where the new archive goes."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("three-disks"))
        self.before = snapshot(self.directory)

    def is_canonical(self, path: Path, align: str = "512K") -> bool:
        return sha256(path) == manifest()["three-disks"]["optimized_sha256"][align]

    def test_report(self) -> None:
        """One line says what was done, none with -q."""
        output = self.directory / "out.vma"
        text = self.ok("optimize", self.source, output)
        self.assertRegex(text, r"\A.*a\.vma: optimized \(--align 512K\), 4\.0 MiB\n\Z")
        self.assertEqual(self.ok("optimize", "-q", "--force", self.source, output), "")
        self.assertEqual(self.ok("optimize", "-q", output), "")

    def test_new_file_has_the_usual_mode(self) -> None:
        output = self.directory / "out.vma"
        old = os.umask(0o027)
        self.addCleanup(os.umask, old)
        self.ok("optimize", self.source, output)
        self.assertEqual(stat.S_IMODE(output.stat().st_mode), 0o640)

    def test_existing_file_is_replaced(self) -> None:
        """With --force: its mode and owner stay, its content goes, what links to it is not it."""
        output = self.file("out.vma", b"precious" * 100000)
        output.chmod(0o604)
        link = self.directory / "link.vma"
        os.link(output, link)
        before = snapshot(self.directory)
        self.refused("optimize", self.source, output, says=["out.vma: File exists: --force"])
        self.assertEqual(snapshot(self.directory), before)
        self.ok("optimize", "--force", self.source, output)
        self.assertTrue(self.is_canonical(output))
        self.assertEqual(stat.S_IMODE(output.stat().st_mode), 0o604)
        self.assertEqual(link.read_bytes(), b"precious" * 100000)

    def test_symbolic_links(self) -> None:
        """What a link points to is written, the link stays: absolute, relative or dangling."""
        (self.directory / "dir").mkdir()
        target = self.directory / "dir" / "target.vma"
        link = self.directory / "link.vma"
        for text in (str(target), "dir/target.vma"):
            for exists in (True, False):
                with self.subTest(text, exists=exists):
                    target.unlink(missing_ok=True)
                    link.unlink(missing_ok=True)
                    if exists:
                        target.write_bytes(b"old")
                    link.symlink_to(text)
                    self.ok("optimize", *(["--force"] if exists else []), self.source, link)
                    self.assertTrue(self.is_canonical(target))
                    self.assertEqual(os.readlink(link), text)
                    self.assertEqual(os.listdir(self.directory / "dir"), ["target.vma"])

    def test_in_place_by_a_symbolic_link(self) -> None:
        """The file behind the link is replaced, the link stays."""
        link = self.directory / "link.vma"
        link.symlink_to("a.vma")
        for args in ([link], [link, self.source], [self.source, link], [link, link]):
            with self.subTest(args=[arg.name for arg in args]):
                self.source.write_bytes(golden("three-disks"))
                self.ok("optimize", *args)
                self.assertTrue(self.is_canonical(self.source))
                self.assertEqual(os.readlink(link), "a.vma")
                self.assertEqual(sorted(os.listdir(self.directory)), ["a.vma", "link.vma"])
                # the second time it is seen to be in place, and nothing happens
                self.assertIn("canonical already", self.ok("optimize", *args))

    def test_same_file(self) -> None:
        """OUTPUT that is ARCHIVE, by another path or by a hard link, is written in place."""
        link = self.directory / "link.vma"
        for output in (self.source, self.directory / "." / "a.vma", link):
            with self.subTest(output=output.name):
                self.source.unlink()
                link.unlink(missing_ok=True)
                self.source.write_bytes(golden("three-disks"))
                os.link(self.source, link)
                os.utime(self.source, (1700000000, 1700000000))
                self.ok("optimize", self.source, output)
                self.assertTrue(self.is_canonical(output))
                self.assertEqual(int(output.stat().st_mtime), 1700000000)
                self.ok("verify", self.source, link)
                self.assertEqual(sorted(os.listdir(self.directory)), ["a.vma", "link.vma"])

    def test_refused_outputs(self) -> None:
        """An OUTPUT that cannot be is an error before anything is written."""
        (self.directory / "dir").mkdir()
        (self.directory / "loop").symlink_to("loop")
        before = snapshot(self.directory)
        for name, message in (
            ("dir", "Is a directory"),
            ("dir/", "Is a directory"),
            ("missing/out.vma", "No such file or directory"),
            ("a.vma/out.vma", "Not a directory"),
            ("x" * 256, "File name too long"),
            ("loop", "oo many levels of symbolic links"),
        ):
            with self.subTest(name[:20]):
                path = f"{self.directory}/{name}"
                self.refused("optimize", self.source, path, says=[message])
                self.assertEqual(snapshot(self.directory), before)

    def test_output_that_ends_in_a_slash(self) -> None:
        """A name that ends in a slash is that of a directory, which is not there."""
        self.refused("optimize", self.source, f"{self.directory}/missing/")
        self.assertEqual(snapshot(self.directory), self.before)

    def test_long_name(self) -> None:
        """255 bytes are as many as a file system takes."""
        output = self.directory / ("x" * 255)
        self.ok("optimize", self.source, output)
        self.assertTrue(self.is_canonical(output))

    def test_current_directory(self) -> None:
        """Paths without a directory."""
        answer = run_tool("optimize", "a.vma", "out.vma", cwd=self.directory)
        self.check_ok(answer)
        self.assertTrue(self.is_canonical(self.directory / "out.vma"))
        self.check_ok(run_tool("optimize", "a.vma", cwd=self.directory))
        self.assertTrue(self.is_canonical(self.source))

    def test_null_device(self) -> None:
        """What is no regular file is written to, and stays what it is."""
        self.ok("optimize", self.source, "/dev/null")
        self.assertTrue(Path("/dev/null").is_char_device())
        self.refused("optimize", self.source, "/dev/full", says=["No space left on device"])
        self.assertTrue(Path("/dev/full").is_char_device())

    def test_read_only_directory(self) -> None:
        """Where nothing can be created, the archive stays as it is."""
        directory = small_file_system(self, 4 << 20)
        source = directory / "a.vma"
        source.write_bytes(golden("three-disks"))
        make_read_only(self, directory)
        before = snapshot(directory)
        for args in ([source], [source, directory / "out.vma"]):
            with self.subTest(args=len(args)):
                self.refused("optimize", *args, says=["Read-only file system"])
        self.assertEqual(snapshot(directory), before)

    def test_full_disk(self) -> None:
        """One clear line; the source stays, and nothing else does."""
        directory = small_file_system(self, 1 << 20)
        source = directory / "a.vma"
        source.write_bytes(golden("three-disks"))
        before = snapshot(directory)
        for args in ([source], [source, directory / "out.vma"]):
            with self.subTest(args=len(args)):
                line = self.refused("optimize", *args, says=["No space left on device"])
                self.assertIn(str(args[-1]), line)
                self.assertEqual(snapshot(directory), before)

    def test_block_device_in_place(self) -> None:
        """An archive on a block device would be overwritten while it is read: that is refused."""
        device = loop_device(self, self.source)
        self.ok("verify", device)
        before = sha256(device)
        for args in ([device], [device, device]):
            with self.subTest(args=len(args)):
                self.refused("optimize", *args)
                self.assertEqual(sha256(device), before)

    def test_usage(self) -> None:
        for args in (["--align", "5K"], ["--align", "0"], ["--memory", "x"], ["--memory", ""]):
            with self.subTest(args=args):
                self.assertEqual(call_tool("optimize", *args, self.source).returncode, 2)
        self.assertEqual(snapshot(self.directory), self.before)


class Damaged(ToolTest):
    """A bad archive is not optimized."""

    def test_table(self) -> None:
        """Status 1 with the message; the archive stays as it was, and nothing else is left."""
        for damage in damages()[::FEW]:
            path = self.file("bad.vma", damage.data)
            before = snapshot(self.directory)
            output = self.directory / "out.vma"
            for what, args, data in (
                ("to a file", [path, output], None),
                ("in place", [path], None),
                ("from a pipe", ["-", output], damage.data),
            ):
                with self.subTest(damage.name, how=what):
                    line = self.bad("optimize", *args, input=data)
                    self.assertRegex(line, damage.says)
                    self.assertEqual(snapshot(self.directory), before)

    def test_without_devices(self) -> None:
        """Of an archive that has only configs, all extents are read as well."""
        archive = Archive([], [("qemu-server.conf", b"cores: 2\n")])
        for whole in (archives.build(archive, []), archives.canonical(archive)):
            for junk in (b"x", bytes(BLOCK), whole[-512:] + b"x"):
                path = self.file("bad.vma", whole + junk)
                before = snapshot(self.directory)
                output = self.directory / "out.vma"
                for args in ([path], [path, output], [path, "-"], ["-", output]):
                    with self.subTest(args=args, junk=len(junk)):
                        data = whole + junk if args[0] == "-" else None
                        self.bad("optimize", *args, input=data)
                        self.assertEqual(snapshot(self.directory), before)

    def test_existing_output_stays(self) -> None:
        """A failure leaves the old OUTPUT alone."""
        bad = self.file("bad.vma", good()[:-1])
        output = self.file("out.vma", b"precious")
        before = snapshot(self.directory)
        self.refused("optimize", bad, output)
        self.refused("optimize", "-", output, input=good()[:-1])
        self.assertEqual(snapshot(self.directory), before)

    def test_nothing_into_a_pipe(self) -> None:
        """What cannot be taken back is written only of a file that has been checked whole."""
        path = self.directory / "large.vma"
        archives.write_large(path, size=48 * MIB, data_bytes=32 * MIB, order="in-order")
        large = path.read_bytes()
        cut = [("a large one, cut", large[:-1]), ("a large one, junk behind", large + b"x")]
        path.unlink()
        for name, data in [*((damage.name, damage.data) for damage in damages()), *cut]:
            with self.subTest(name):
                path = self.file("bad.vma", data)
                answer = call_tool("optimize", path, "-")
                self.assertEqual(answer.stdout, b"")
                self.check_error(answer, status=BAD)


class Care(ToolTest):
    """The old archive is given up only for one that is known to be good."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", good())

    def test_executable(self) -> None:
        """The file runs by itself, as it is copied onto a hypervisor."""
        tool = vma_tool.__file__
        self.assertEqual(stat.S_IMODE(os.stat(tool).st_mode), 0o755)
        with open(tool, "rb") as file:
            self.assertEqual(file.readline(), b"#!/usr/bin/env python3\n")
        answer = subprocess.run([tool, "--version"], capture_output=True, check=True)
        self.assertRegex(answer.stdout.decode(), r"\Avma-tool \d+\.\d+")

    def test_a_bit_written_wrongly(self) -> None:
        """In place or with --check, it is found wherever it is; of a header, always."""
        rng = random.Random(11)
        disks = [
            Device(1, "drive-scsi0", archives.disk(rng, 70 * CLUSTER, "sparse")),
            Device(2, "vmstate", archives.disk(rng, 3 * CLUSTER)),
        ]
        archive = Archive(disks, [("qemu-server.conf", b"cores: 2\n")])
        source = self.file("a.vma", archives.build(archive, archives.live_order(archive, rng)))
        written = archives.canonical(archive)
        before = snapshot(self.directory)
        extents = archives.extent_offsets(written)
        headers = [0, 5, 9, 40, 12290, *extents, extents[-1] + 30, extents[-1] + 44]
        payload = [extents[0] + 512, len(written) - 1]
        payload += [rng.randrange(extents[-1], len(written)) for _ in range(12)]
        output = self.directory / "out.vma"
        for at in headers + payload:
            calls: list[list[str | Path]] = [["--check", source, output], [source]]
            if at in headers:
                calls.append([source, output])
            for args in calls:
                with self.subTest(at=at, args=args):
                    with mock.patch.object(vma_tool, "os", WrongBit(at)):
                        self.refused("optimize", *args)
                    self.assertEqual(snapshot(self.directory), before)
        self.ok("optimize", "-q", "--check", source, output)
        self.assertEqual(sha256(output), sha256(written))

    def test_an_end_that_is_lost(self) -> None:
        """What was written is read back up to its last byte, also without --check."""
        archive = small_archive(random.Random(12))
        source = self.file("a.vma", archives.build(archive))
        before = snapshot(self.directory)
        for lost in (1, BLOCK):
            for name in ("out.vma", "out.vma.zst"):
                with self.subTest(lost=lost, name=name):
                    with mock.patch.object(vma_tool, "os", ShortFile(lost)):
                        line = self.refused("optimize", source, self.directory / name)
                    self.assertIn("reads back as something else", line)
                    self.assertEqual(snapshot(self.directory), before)


class Advice(ToolTest):
    """What the system is told of what will be read and written, so that disks work meanwhile."""

    def test_hints(self) -> None:
        """The disk begins with each part once, in order."""
        begun: list[range] = []

        def advise(_fd: int, offset: int, size: int, advice: int) -> None:
            if advice == os.POSIX_FADV_DONTNEED:
                begun.append(range(offset, offset + size))

        source, output = self.directory / "a.vma", self.directory / "b.vma"
        archives.write_large(source, size=96 * MIB, data_bytes=64 * MIB)
        with mock.patch("os.posix_fadvise", advise):
            self.ok("optimize", "-q", source, output)
        end = 0
        for part in begun:
            self.assertIn(part.start - end, range(8 * CLUSTER))  # a hole in an extent
            end = part.stop
