"""mount: an archive's configs, disks and partitions as files, looked at with the real programs.

Each test mounts below a directory of its own. Whatever happens, nothing stays mounted there: the
end of the test detaches it, and a watchdog aborts a mount whose requests are not answered.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shlex
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import vma_tool
from tests import archives, differences, frames
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import (
    BAD,
    FAILED,
    ROOT,
    Answer,
    Argument,
    ToolTest,
    golden,
    manifest,
    require_program,
    require_root,
    run_tool,
    sha256,
    skip,
    tool_command,
)
from tests.test_partitions import BTRFS, MKE2FS, SFDISK, VFAT, XFS, put, require, run, write_archive

MIB = 1 << 20
NOBODY = 65534
WATCHDOG = 120  # seconds


class MountTest(ToolTest):
    """A directory for the archive, and one to mount it on."""

    def setUp(self) -> None:
        super().setUp()
        if sys.platform != "linux":
            skip("mount needs Linux")
        require_root()
        if not os.path.exists("/dev/fuse"):
            skip("this machine has no /dev/fuse")
        self.mnt = self.directory / "mnt"
        self.mnt.mkdir()
        watchdog = threading.Timer(WATCHDOG, self.detach_all, ["--force"])
        watchdog.daemon = True
        watchdog.start()
        self.addCleanup(self.detach_all)
        self.addCleanup(watchdog.cancel)

    def mounts(self) -> list[str]:
        """Return what is mounted below the test's directory, the innermost first."""
        points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [point for point in reversed(points) if point.startswith(f"{self.directory}/")]

    def detach_all(self, *options: str) -> None:
        for point in self.mounts():
            subprocess.run(["umount", "--lazy", *options, point], check=False)

    def golden(self, name: str = "three-disks") -> Path:
        return self.file(f"{name}.vma", golden(name))

    def mount(self, archive: Path, *options: Argument) -> None:
        """Mount in the background; the test's end unmounts."""
        self.check_ok(run_tool("mount", *options, archive, self.mnt))
        self.assertTrue(os.path.ismount(self.mnt))

    def umount(self) -> None:
        run("umount", self.mnt)
        self.assertEqual(self.mounts(), [])

    def start(self, *args: Argument, **kw: Any) -> subprocess.Popen[bytes]:
        """Start the tool in the foreground, and wait until it has mounted."""
        process = subprocess.Popen(tool_command("mount", *args), stderr=subprocess.PIPE, **kw)

        def end() -> None:
            process.kill()
            process.communicate()

        self.addCleanup(end)
        self.wait_for(lambda: self.mounts() or process.poll() is not None)
        self.assertIsNone(process.poll())
        os.listdir(self.mnt)  # answered, so it is ready
        return process

    def wait_for(self, condition: Any) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            self.assertLess(time.monotonic(), deadline, "it did not come about")
            time.sleep(0.01)

    def ended(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Wait for a tool that was started; return its exit status and messages."""
        _, errors = process.communicate(timeout=20)
        return process.returncode, errors.decode()


class Files(MountTest):
    """What is in the directory."""

    def test_as_extract_writes_them(self) -> None:
        for name in ("three-disks", "vmstate", "odd-size", "config-only", "full-mask"):
            with self.subTest(archive=name):
                want = manifest()[name]
                archive = self.golden(name)
                self.mount(archive)
                out = self.directory / f"out-{name}"
                self.check_ok(run_tool("extract", archive, out))
                files = {path.name: sha256(path) for path in out.iterdir()}
                self.assertEqual({p.name: sha256(p) for p in self.mnt.iterdir()}, files)
                for path in self.mnt.iterdir():
                    state = path.stat()
                    self.assertEqual(state.st_size, (out / path.name).stat().st_size)
                    self.assertEqual(state.st_mtime, want["ctime"])
                    self.assertEqual((state.st_uid, state.st_gid), (os.getuid(), os.getgid()))
                self.umount()

    def test_modes(self) -> None:
        """Nobody may read more than of the archive, nobody may write."""
        archive = self.golden()
        for mode, owner, file, directory in (
            (0o600, 0, 0o400, 0o500),
            (0o640, 0, 0o440, 0o550),
            (0o644, 0, 0o444, 0o555),
            (0o777, 0, 0o444, 0o555),
            (0o644, 12345, 0o400, 0o500),  # another group than that of the files
        ):
            with self.subTest(mode=oct(mode), owner=owner):
                archive.chmod(mode)
                os.chown(archive, owner, owner)
                self.mount(archive)
                found = {stat.S_IMODE(path.stat().st_mode) for path in self.mnt.iterdir()}
                self.assertEqual(
                    (found, stat.S_IMODE(self.mnt.stat().st_mode)), ({file}, directory)
                )
                path = self.mnt / "disk-drive-scsi0.raw"
                for flags in (os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC):
                    with self.assertRaises(OSError):
                        os.open(path, flags)
                with self.assertRaises(OSError):
                    path.unlink()
                with self.assertRaises(OSError):
                    path.chmod(0o666)
                with self.assertRaises(OSError):
                    (self.mnt / "x").mkdir()
                run("umount", self.mnt)

    def test_mount_flags(self) -> None:
        self.mount(self.golden(), "-o", "noexec,ro")
        (line,) = [
            line.split()
            for line in Path("/proc/self/mounts").read_text().splitlines()
            if str(self.mnt) in line
        ]
        self.assertEqual(line[2], "fuse.vma-tool")
        flags = line[3].split(",")
        for flag in ("ro", "nosuid", "nodev", "noexec", "default_permissions"):
            self.assertIn(flag, flags)
        self.assertNotIn("allow_other", flags)

    def test_allow_other(self) -> None:
        """Others see the directory only if the mount's option and the archive's mode let them."""
        archive = self.golden()
        archive.chmod(0o644)
        self.directory.chmod(0o755)
        command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "cat"]
        command.append(str(self.mnt / "qemu-server.conf"))
        for options, mode, allowed in (([], 0o644, False), (["-o", "allow_other"], 0o644, True),
                                       (["-o", "allow_other"], 0o600, False)):  # fmt: skip
            with self.subTest(options=options, mode=mode):
                archive.chmod(mode)
                self.mount(archive, *options)
                answer = subprocess.run(command, capture_output=True, check=False)
                self.assertEqual(not answer.returncode, allowed, answer.stderr)
                self.umount()

    def test_any_time(self) -> None:
        """A ctime that no calendar has: nothing hangs."""
        archive = archives.three_disks(random.Random(1))
        for ctime in (0, -1, 1 << 40, (1 << 63) - 1, -(1 << 63)):
            with self.subTest(ctime=ctime):
                archive.ctime = ctime
                data = bytearray(archives.build(archive, archives.in_order(archive)))
                self.mount(self.file("a.vma", bytes(data)))
                listing = subprocess.run(
                    ["ls", "-la", self.mnt], capture_output=True, timeout=20, check=True
                )
                self.assertIn(b"qemu-server.conf", listing.stdout)
                self.umount()

    def test_many_files(self) -> None:
        """A listing that does not fit into one answer."""
        configs: list[archives.Config] = [(f"config-{i}-{'x' * 200}", b"x") for i in range(256)]
        archive = Archive([], configs)
        self.mount(self.file("a.vma", archives.build(archive, [])))
        self.assertEqual(sorted(os.listdir(self.mnt)), sorted(str(name) for name, _ in configs))
        self.assertEqual((self.mnt / str(configs[255][0])).read_bytes(), b"x")

    def test_names(self) -> None:
        """Spaces and bytes that are no text; a disk that is called like a partition."""
        disk = bytearray(MIB)
        disk[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 63, 128)
        disk[510:512] = b"\x55\xaa"
        devices = [
            Device(1, b"drive \xff", bytes(disk)),
            Device(2, b"drive-b", bytes(disk)),
            Device(3, b"drive-b-part1", b"3" * BLOCK),
            Device(4, b"d" * 242, bytes(disk)),  # no room for -part1 in a file's name
        ]
        archive = Archive(devices, [(b"\xfe conf", b"x")])
        self.mount(self.file("a.vma", archives.build(archive, archives.in_order(archive))))
        want = [
            b"\xfe conf",
            b"disk-drive \xff.raw",
            b"disk-drive \xff-part1.raw",
            b"disk-drive-b.raw",
            b"disk-drive-b-part1.raw",
            b"disk-" + b"d" * 242 + b".raw",
        ]
        self.assertEqual(sorted(os.listdir(os.fsencode(self.mnt))), sorted(want))
        self.assertEqual((self.mnt / "disk-drive-b-part1.raw").read_bytes(), b"3" * BLOCK)


class Contents(MountTest):
    """Bytes and holes."""

    def archive(self) -> tuple[Archive, Path]:
        """Write an archive whose disk has a partition that begins inside a block, at sector 63."""
        rng = random.Random(5)
        system = bytearray(archives.disk(rng, 9 * MIB + 1536))
        system[:512] = bytes(512)
        system[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 63, 12345)
        system[510:512] = b"\x55\xaa"
        devices = [
            Device(1, "drive-scsi0", bytes(system)),
            Device(2, "drive-scsi1", archives.disk(rng, 3 * CLUSTER, "zeros")),
            Device(3, "vmstate", archives.disk(rng, 5 * CLUSTER)),
        ]
        archive = Archive(devices, [("qemu-server.conf", b"cores: 1\n"), ("empty", b"")])
        order = archives.live_order(archive, rng)
        return archive, self.file("a.vma", archives.build(archive, order))

    def files(self, archive: Archive) -> dict[str, bytes]:
        one, two, state = (device.data for device in archive.devices)
        part = one[63 * 512 : (63 + 12345) * 512]
        return {
            "disk-drive-scsi0.raw": one, "disk-drive-scsi0-part1.raw": part,
            "disk-drive-scsi1.raw": two, "vmstate.bin": state,
            "qemu-server.conf": b"cores: 1\n", "empty": b"",
        }  # fmt: skip

    def test_reading(self) -> None:
        """At any place, in any size, through the page cache and around it."""
        archive, path = self.archive()
        self.mount(path)
        rng = random.Random(6)
        want = self.files(archive)
        self.assertEqual(sorted(os.listdir(self.mnt)), sorted(want))
        for name, data in want.items():
            with self.subTest(name=name), open(self.mnt / name, "rb", buffering=0) as file:
                for _ in range(100):
                    offset = rng.randrange(len(data) + 3)
                    size = rng.choice([1, 511, 4096, 65536, 70001, 3 * MIB])
                    self.assertEqual(
                        os.pread(file.fileno(), size, offset), data[offset : offset + size]
                    )
                self.assertEqual((self.mnt / name).read_bytes(), data)
        answer = subprocess.run(
            ["dd", f"if={self.mnt}/disk-drive-scsi0.raw", "bs=1M", "iflag=direct", "status=none"],
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
        self.assertEqual(answer.stdout, want["disk-drive-scsi0.raw"])

    def test_holes(self) -> None:
        """They are where no block is stored, to the block."""
        archive, path = self.archive()
        self.mount(path)
        for name, data in self.files(archive).items():
            with self.subTest(name=name), open(self.mnt / name, "rb", buffering=0) as file:
                fd = file.fileno()
                start = 63 * 512 % BLOCK if "part1" in name else 0  # where the first block begins
                runs = list(self.data_runs(fd, len(data)))
                last = 0
                for begin, end in runs:
                    self.assertLess(begin, end)
                    self.assertFalse(any(data[last:begin]))
                    if "disk" in name:  # each hole ends with a block that holds something
                        self.assertIn((begin + start) % BLOCK if begin else 0, (0,))
                        self.assertTrue(any(data[begin : begin + BLOCK]))
                    last = end
                self.assertFalse(any(data[last:]))
                allocated = os.fstat(fd).st_blocks * 512
                self.assertLessEqual(abs(allocated - sum(e - b for b, e in runs)), 2 * BLOCK)
                with self.assertRaises(OSError) as caught:
                    os.lseek(fd, len(data), os.SEEK_DATA)
                self.assertEqual(caught.exception.errno, errno.ENXIO)

    def data_runs(self, fd: int, size: int) -> Iterator[tuple[int, int]]:
        offset = 0
        while offset < size:
            try:
                start = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return
            offset = os.lseek(fd, start, os.SEEK_HOLE)
            yield start, offset

    def test_sparse_copy(self) -> None:
        archive, path = self.archive()
        self.mount(path)
        copy = self.directory / "copy"
        run("cp", "--sparse=auto", self.mnt / "disk-drive-scsi0.raw", copy)
        self.assertEqual(copy.read_bytes(), archive.devices[0].data)
        self.assertLess(copy.stat().st_blocks * 512, copy.stat().st_size)
        listed = run("du", "-B1", self.mnt / "disk-drive-scsi1.raw").split()[0]
        self.assertEqual(int(listed), 0)

    def test_huge_disk(self) -> None:
        """256 GiB with 8 MiB of data: its holes are found at once."""
        path = self.directory / "huge.vma"
        large = archives.write_large(path, size=1 << 38, data_bytes=8 * MIB, order="in-order")
        _, _, size, masks = large.devices[0]
        stored = [number for number, mask in enumerate(masks) if mask]
        self.mount(path)
        with open(self.mnt / "disk-drive-scsi0.raw", "rb", buffering=0) as file:
            fd = file.fileno()
            runs = list(self.data_runs(fd, size))
            clusters = {at // CLUSTER for start, end in runs for at in range(start, end, BLOCK)}
            self.assertEqual(sorted(clusters), stored)
            blocks = sum(bin(masks[number]).count("1") for number in stored)
            self.assertEqual(sum(end - start for start, end in runs), blocks * BLOCK)
            self.assertEqual(os.fstat(fd).st_blocks * 512, blocks * BLOCK)


class Seekable(MountTest):
    """A compressed canonical archive."""

    def compressed(self, align: str = "512K") -> tuple[Path, Path]:
        """Return one, and a directory with what extract writes of it."""
        plain, out = self.directory / "a.vma", self.directory / "out"
        rng = random.Random(8)
        archive = Archive([Device(1, "drive-scsi0", archives.disk(rng, 150 * CLUSTER))], [])
        plain.write_bytes(archives.build(archive, archives.live_order(archive, rng)))
        path = self.directory / "a.vma.zst"
        self.check_ok(run_tool("optimize", "-q", "--align", align, plain, path))
        self.check_ok(run_tool("extract", plain, out))
        return path, out

    def test_reading(self) -> None:
        path, out = self.compressed()
        self.mount(path)
        rng = random.Random(9)
        data = (out / "disk-drive-scsi0.raw").read_bytes()
        with open(self.mnt / "disk-drive-scsi0.raw", "rb", buffering=0) as file:
            for _ in range(200):
                offset, size = rng.randrange(len(data)), rng.choice([1, 4096, 70001, 3 * MIB])
                found = os.pread(file.fileno(), size, offset)
                self.assertEqual(found, data[offset : offset + size])
        self.assertEqual(sha256(self.mnt / "disk-drive-scsi0.raw"), sha256(data))

    def test_damage(self) -> None:
        """What a damaged frame holds is an error, everything else is there."""
        path, out = self.compressed()
        whole = (out / "disk-drive-scsi0.raw").read_bytes()
        found = frames.split(path.read_bytes())
        # Of the last ones: the first have the partition table, without which nothing mounts.
        number = max(reversed(range(len(found.sizes))), key=found.sizes.__getitem__)
        damaged = bytearray(found.frames[number])
        damaged[-6] ^= 0x55
        found.frames[number] = bytes(damaged)
        path.write_bytes(frames.join(found))
        process = self.start("-q", "-f", path, self.mnt)
        bad = []
        with open(self.mnt / "disk-drive-scsi0.raw", "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
            for offset in range(0, len(whole), CLUSTER):
                try:
                    data = os.pread(file.fileno(), CLUSTER, offset)
                    self.assertEqual(data, whole[offset : offset + CLUSTER])
                except OSError as error:
                    self.assertEqual(error.errno, errno.EIO)
                    bad.append(offset // CLUSTER)
        self.assertTrue(0 < len(bad) <= 8, bad)
        self.umount()
        status, said = self.ended(process)
        self.assertEqual(status, 0)
        lines = set(said.splitlines())
        self.assertLessEqual(len(lines), len(bad))
        for line in lines:
            self.assertRegex(line, "disk-drive-scsi0.raw: .*a.vma.zst: .*frame is damaged")

    def test_an_index_that_lies(self) -> None:
        """The extents' headers are held against it before anything is taken from a place."""
        path, _ = self.compressed("4K")  # else no cluster stores some blocks only
        found = frames.split(path.read_bytes())
        # Two clusters that store as many blocks change their masks: all sizes are as they were.
        masks = [*struct.unpack(f"<{150}H", program_zstd("-dc", found.masks))]
        first = next(i for i in range(8, 150) if 0 < bin(masks[i]).count("1") < 16)
        masks[first] = (masks[first] << 1 | masks[first] >> 15) & 0xFFFF
        lying = found._replace(masks=frames.raw_frame(struct.pack("<150H", *masks)))
        path.write_bytes(frames.join(lying))
        self.mount(path)
        with open(self.mnt / "disk-drive-scsi0.raw", "rb", buffering=0) as file:
            with self.assertRaises(OSError) as caught:
                os.pread(file.fileno(), 1, first * CLUSTER)
            self.assertEqual(caught.exception.errno, errno.EIO)


def program_zstd(option: str, data: bytes) -> bytes:
    zstd = require_program("zstd", "zstd")
    return subprocess.run([zstd, option], input=data, stdout=subprocess.PIPE, check=True).stdout


class Differences(MountTest):
    """A difference and its base, as the archive that they make."""

    def test_reading(self) -> None:
        base, new = golden("live-order"), golden("live-order-day2")
        archive = archives.parse(base).archive
        bases = [
            self.file("a.vma", base),
            self.file("a.vma.zst", frames.compress(archives.canonical(archive))),
        ]
        plain, compressed = self.file("d.vmad", differences.build(base, new)), self.path("z.vmad")
        source = self.file("b.vma", new)
        self.ok("diff", "-q", bases[0], source, compressed)
        out = self.path("out")
        self.ok("extract", source, out)
        files = {path.name: sha256(path) for path in out.iterdir()}
        for path in bases:
            for difference in (plain, compressed):
                with self.subTest(base=path.name, difference=difference.name):
                    self.mount(difference, "--base", path)
                    self.assertEqual({p.name: sha256(p) for p in self.mnt.iterdir()}, files)
                    copy = self.path("copy")
                    for name, digest in files.items():
                        run("cp", "--sparse=always", self.mnt / name, copy)
                        self.assertEqual(sha256(copy), digest, "through its holes")
                    self.umount()

    def test_refused(self) -> None:
        base, new = golden("live-order"), golden("live-order-day2")
        path = self.file("a.vma", base)
        difference = self.file("d.vmad", differences.build(base, new))
        other = self.file("other.vma", golden("interleaved"))
        changed = bytearray(base)
        changed[40] ^= 1
        for args, status, says in (
            ((difference,), BAD, "--base"),
            (("--base", other, difference), BAD, "the wrong base"),
            (("--base", self.file("bad.vma", bytes(changed)), difference), BAD, "MD5"),
            (("--base", path, other), FAILED, "a full archive"),
        ):
            self.refused("mount", *args, self.mnt, status=status, says=[says])
        self.assertEqual(self.mounts(), [])

    def path(self, name: str) -> Path:
        return self.directory / name


class Guests(MountTest):
    """File systems of guests, through loop devices."""

    def guest(self) -> dict[str, bytes]:
        rng = random.Random(7)
        return {"hostname": b"guest\n", "data": rng.randbytes(MIB + 17)}

    def populated(self, name: str, size: int, *command: str) -> Path:
        """Make a file system with the guest's files, as a live backup finds it.

        It is mounted, and its journal holds something newer.
        """
        image, point = self.file(f"{name}.img", b""), self.directory / "point"
        os.truncate(image, size)
        run(*command, image)
        point.mkdir(exist_ok=True)
        run("mount", "-o", "loop", image, point)
        for file, data in self.guest().items():
            (point / file).write_bytes(data)
        run("umount", point)
        run("mount", "-o", "loop", image, point)
        (point / "new").write_bytes(b"new")
        run("sync", "-f", point)
        copy = self.directory / f"{name}.copy"
        run("cp", "--sparse=always", image, copy)
        run("umount", point)
        return copy

    def fat(self, size: int, *command: str) -> Path:
        """Make a FAT file system; many a kernel cannot mount it."""
        require(VFAT)
        mcopy = require_program("mcopy", "mtools")
        image = self.file("fat.img", b"")
        os.truncate(image, size)
        run("mkfs.vfat", *command, image)
        for file, data in self.guest().items():
            run(mcopy, "-i", image, self.file(file, data), f"::{file}")
        return image

    def disk(self, label: str, *parts: tuple[str, Path]) -> Path:
        """Make a disk with a partition table; of each partition type and content."""
        require(SFDISK)
        sizes = [path.stat().st_size for _, path in parts]
        disk = self.file("disk.raw", b"")
        os.truncate(disk, sum(sizes) + (3 + len(parts)) * MIB)
        lines = [f"label: {label}"]
        offsets = []
        start = MIB
        for (kind, _), size in zip(parts, sizes):
            if kind == "extended":
                lines.append(f"start={start // 512}, type=5")
                start += MIB
                continue
            lines.append(f"start={start // 512}, size={size // 512}, type={kind}")
            start += size + MIB
        run("sfdisk", "-q", disk, input="\n".join(lines) + "\n")
        table = json.loads(run("sfdisk", "--json", disk))["partitiontable"]
        offsets = [entry["start"] * 512 for entry in table["partitions"]]
        for (kind, path), offset in zip(parts, offsets):
            if kind != "extended":
                put(disk, offset, path)
        return disk

    def look_into(self, disk: Path) -> set[str]:
        """Mount each partition by the command that list --partitions prints; check the files."""
        archive = self.directory / "a.vma"
        write_archive(archive, {"drive-scsi0": disk})
        listed = json.loads(self.check_ok(run_tool("list", "--partitions", "--json", archive)))
        (device,) = listed["devices"]
        self.mount(archive)
        self.assertEqual(sha256(self.mnt / "disk-drive-scsi0.raw"), sha256(disk))
        point = self.directory / "disk"
        point.mkdir()
        known = Path("/proc/filesystems").read_text().split()
        seen = set()
        for part in device["partitions"]:
            if not part["mounted"]:
                continue
            *words, file, target = shlex.split(part["mounted"])
            self.assertEqual(target, "/mnt/disk")
            words += [file.replace("/mnt/backup", str(self.mnt)), str(point)]
            seen.add(part["file_system"])
            with self.subTest(number=part["number"], file_system=part["file_system"]):
                if part["file_system"].startswith("FAT") and "vfat" not in known:
                    for name, data in self.guest().items():
                        mtype = ["mtype", "-i", words[3], f"::{name}"]
                        answer = subprocess.run(mtype, capture_output=True, check=True)
                        self.assertEqual(sha256(answer.stdout), sha256(data))
                    continue
                run(*words)
                try:
                    for name, data in self.guest().items():
                        self.assertEqual(sha256(point / name), sha256(data))
                finally:
                    run("umount", point)
        # The loop device lets go of its file a moment later.
        self.wait_for(lambda: not subprocess.run(["umount", self.mnt], check=False).returncode)
        return seen

    def test_gpt(self) -> None:
        require(MKE2FS, XFS, BTRFS)
        linux = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
        disk = self.disk(
            "gpt",
            ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", self.fat(40 * MIB, "-F", "32")),
            (linux, self.populated("ext4", 16 * MIB, "mke2fs", "-q", "-F", "-t", "ext4")),
            (linux, self.populated("xfs", 320 * MIB, "mkfs.xfs", "-q")),
            (linux, self.populated("btrfs", 128 * MIB, "mkfs.btrfs", "-q")),
        )
        self.assertEqual(self.look_into(disk), {"FAT32", "ext4", "xfs", "btrfs"})

    def test_mbr(self) -> None:
        require(MKE2FS, XFS, BTRFS)
        disk = self.disk(
            "dos",
            ("83", self.populated("ext3", 16 * MIB, "mke2fs", "-q", "-F", "-t", "ext3")),
            ("83", self.populated("xfs", 320 * MIB, "mkfs.xfs", "-q")),
            ("extended", self.file("nothing", b"")),
            ("6", self.fat(16 * MIB, "-F", "16")),
            ("83", self.populated("btrfs", 128 * MIB, "mkfs.btrfs", "-q")),
        )
        self.assertEqual(self.look_into(disk), {"ext3", "xfs", "FAT16", "btrfs"})

    def test_whole_disk(self) -> None:
        require(MKE2FS)
        image = self.populated("ext4", 16 * MIB, "mke2fs", "-q", "-F", "-t", "ext4")
        self.assertEqual(self.look_into(image), {"ext4"})

    def test_qemu(self) -> None:
        """Converted, and as the base of an overlay that a guest could write to."""
        qemu_img = require_program("qemu-img", "qemu-utils")
        for name in ("three-disks", "odd-size", "live-order"):
            self.mount(self.golden(name))
            for device in manifest()[name]["devices"]:
                with self.subTest(archive=name, device=device["name"]):
                    raw = self.mnt / f"disk-{device['name']}.raw"
                    image, overlay = self.directory / "i.qcow2", self.directory / "o.qcow2"
                    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", raw, image)
                    run(qemu_img, "compare", "-f", "raw", "-F", "qcow2", raw, image)
                    run(qemu_img, "create", "-q", "-f", "qcow2", "-b", raw, "-F", "raw", overlay)
                    run(qemu_img, "compare", "-f", "raw", "-F", "qcow2", raw, overlay)
            self.umount()


class Ending(MountTest):
    """Unmounting, signals, commands, and a server that dies."""

    def command(self, archive: Path, *command: Argument, **kw: Any) -> Answer[bytes]:
        return run_tool("mount", archive, self.mnt, "--", *command, **kw)

    def test_command(self) -> None:
        archive = self.golden()
        path = self.mnt / "disk-drive-scsi0.raw"
        digest = manifest()["three-disks"]["devices"][1]["sha256"]
        answer = self.command(archive, "sha256sum", path)
        self.assertEqual(self.check_ok(answer), f"{digest}  {path}\n")
        for script, status in (("exit 42", 42), ("kill -TERM $$", 143), ("cat", 0)):
            with self.subTest(script=script):
                answer = self.command(archive, "sh", "-c", script)
                self.assertEqual((answer.returncode, answer.stderr), (status, b""))
                self.assertEqual(self.mounts(), [])
        answer = self.command(archive, "vma-tool-no-such-program")
        self.check_error(answer, "vma-tool-no-such-program: No such file")
        self.assertEqual(self.mounts(), [])
        # What the command needs of the signals is as after any start.
        shell = ["sh", "-c", "cat /proc/self/status; yes | head -n 1"]
        usual = subprocess.run(shell, capture_output=True, check=True).stdout
        answer = self.command(archive, *shell)
        self.assertEqual(answer.stdout[-3:], b"\ny\n")  # yes has ended by SIGPIPE
        self.assertEqual(self.signals(answer.stdout), self.signals(usual))

    def signals(self, status: bytes) -> list[int]:
        """Return which signals are blocked, and which are ignored."""
        fields = dict(line.split(b":\t", 1) for line in status.splitlines()[:-1])
        # above 31, they are the C library's own
        return [int(fields[field], 16) & 0x7FFFFFFF for field in (b"SigBlk", b"SigIgn")]

    def test_the_command_unmounts(self) -> None:
        answer = self.command(self.golden(), "umount", self.mnt)
        self.check_ok(answer)

    def test_busy_after_the_command(self) -> None:
        """It is detached, which is said, and served as long as somebody has a file open."""
        path = self.mnt / "disk-drive-scsi0.raw"
        digest = manifest()["three-disks"]["devices"][1]["sha256"]
        go, output = self.directory / "go", self.directory / "output"
        os.mkfifo(go)
        opened = self.directory / "opened"
        script = f"""
            (exec <{path}; touch {opened}; read line <{go}; sha256sum >{output}) >/dev/null 2>&1 &
            while [ ! -e {opened} ]; do sleep 0.01; done
            exit 3
        """
        with open(self.directory / "errors", "w+b") as errors:
            answer = self.command(self.golden(), "sh", "-c", script, stderr=errors)
            errors.seek(0)
            said = errors.read()
        self.assertEqual((answer.returncode, self.mounts()), (3, []))
        self.assertRegex(said, rb"\Avma-tool: [^\n]*still in use: detached[^\n]*\n\Z")
        go.write_bytes(b"\n")
        self.wait_for(lambda: output.exists() and output.stat().st_size)
        self.assertEqual(output.read_text().split()[0], digest)

    def test_termination_of_the_command(self) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            process = self.start(self.golden(), self.mnt, "--", "sleep", "60")
            process.send_signal(number)
            self.assertEqual(self.ended(process), (128 + number, ""))
            self.assertEqual(self.mounts(), [])

    def test_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(signal=number.name):
                process = self.start("-q", "-f", self.golden(), self.mnt)
                process.send_signal(number)
                self.assertEqual(self.ended(process), (0, ""))
                self.assertEqual(self.mounts(), [])

    def test_unmounted_from_outside(self) -> None:
        process = self.start("-f", self.golden(), self.mnt)
        self.umount()
        status, said = self.ended(process)
        self.assertEqual(status, 0)
        self.assertRegex(said, r"\Avma-tool: [^\n]*: mounted, until [^\n]*\n\Z")

    def test_signal_while_busy(self) -> None:
        """What is open can be read to its end, or until the second signal."""
        for signals in (1, 2):
            process = self.start("-q", "-f", self.golden(), self.mnt)
            with self.opened() as fd:
                process.terminate()
                self.wait_for(lambda: not self.mounts())
                if signals == 2:
                    process.terminate()
                    self.assertEqual(process.wait(20), 0)
                    with self.assertRaises(OSError):
                        os.pread(fd, 10, 0)
                else:
                    digest = sha256(os.pread(fd, 1 << 30, 0))
                    self.assertEqual(digest, manifest()["three-disks"]["devices"][1]["sha256"])
            status, said = self.ended(process)
            self.assertEqual(status, 0)
            self.assertIn("still in use: detached", said)

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """Open a disk; closing it fails when its server is gone."""
        fd = os.open(self.mnt / "disk-drive-scsi0.raw", os.O_RDONLY)
        try:
            yield fd
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)

    def test_killed(self) -> None:
        """The directory says so, and can be unmounted."""
        process = self.start("-q", "-f", self.golden(), self.mnt)
        with self.opened() as fd:
            process.kill()
            process.wait()
            for look in (lambda: os.listdir(self.mnt), lambda: os.pread(fd, 1, 0)):
                with self.assertRaises(OSError) as caught:
                    look()
                self.assertIn(caught.exception.errno, (errno.ENOTCONN, errno.ECONNABORTED))
        answer = run_tool("mount", self.golden(), self.mnt)
        self.check_error(answer, "Transport endpoint is not connected")
        self.umount()

    def test_readers_while_it_is_unmounted(self) -> None:
        """Eight processes read at random until it is gone. All that they read is right."""
        archive = self.golden()
        out = self.directory / "out"
        self.check_ok(run_tool("extract", archive, out))
        process = self.start("-q", "-f", archive, self.mnt)
        readers = []
        for seed in range(8):
            command = [sys.executable, "-c", READER, str(self.mnt), str(out), str(seed)]
            readers.append(subprocess.Popen(command, stdout=subprocess.PIPE))
        try:
            for reader in readers:
                assert reader.stdout
                self.assertEqual(reader.stdout.readline(), b"reading\n")
            for _ in range(10):  # nearly always a file is open, and the mount stays
                time.sleep(0.03)
                subprocess.run(["umount", self.mnt], stderr=subprocess.DEVNULL, check=False)
            subprocess.run(["umount", "--lazy", self.mnt], stderr=subprocess.DEVNULL, check=False)
            for reader in readers:
                answer, _ = reader.communicate(timeout=20)
                self.assertRegex(answer, rb"\A[1-9][0-9]* reads\n\Z")
        finally:
            for reader in readers:
                reader.kill()
                reader.communicate()
        self.assertEqual(self.ended(process), (0, ""))

    def test_nothing_of_the_caller_stays_open(self) -> None:
        """In the background: no terminal, no pipe, no lock, no directory."""
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        archive = self.golden()
        self.check_ok(run_tool("mount", archive, self.mnt, pass_fds=[writing], cwd=self.directory))
        os.close(writing)
        with open(reading, "rb") as pipe:
            self.assertEqual(pipe.read(), b"")  # else it would wait for the end of the mount
        self.umount()


READER = """
import os, random, sys
mounted, extracted, seed = sys.argv[1:]
rng = random.Random(int(seed))
names = os.listdir(extracted)
print("reading", flush=True)
reads = 0
while True:
    name = rng.choice(names)
    with open(os.path.join(extracted, name), "rb") as file:
        data = file.read()
    try:
        with open(os.path.join(mounted, name), "rb", buffering=0) as file:
            for _ in range(20):
                offset = rng.randrange(len(data))
                size = rng.choice([1, 4096, 70000])
                if os.pread(file.fileno(), size, offset) != data[offset : offset + size]:
                    sys.exit(f"{name}: {size} bytes at {offset} differ")
                reads += 1
    except FileNotFoundError:
        break
print(reads, "reads")
"""


class Changes(MountTest):
    """An archive that changes while it is mounted."""

    def test_truncated(self) -> None:
        archive = self.golden()
        process = self.start("-q", "-f", archive, self.mnt)
        os.truncate(archive, archive.stat().st_size // 2)
        answer = subprocess.run(
            ["cat", self.mnt / "disk-drive-scsi0.raw"], capture_output=True, timeout=20, check=False
        )
        self.assertIn(b"Input/output error", answer.stderr)
        self.assertTrue((self.mnt / "qemu-server.conf").read_bytes())  # that was in memory
        self.umount()
        status, said = self.ended(process)
        self.assertEqual(status, 0)
        for line in said.splitlines():
            self.assertRegex(line, r"\Avma-tool: disk-drive-scsi0.raw: .*three-disks.vma: .*\Z")

    def test_written_to(self) -> None:
        archive = self.golden()
        process = self.start("-q", "-f", archive, self.mnt)
        with open(archive, "r+b") as file:
            file.seek(20000)
            file.write(b"x")
        with self.assertRaises(OSError) as caught:
            (self.mnt / "disk-drive-scsi0.raw").read_bytes()
        self.assertEqual(caught.exception.errno, errno.EIO)
        self.umount()
        self.assertIn("the archive was changed while it was mounted", self.ended(process)[1])

    def test_replaced_or_removed(self) -> None:
        """What is mounted stays what it was."""
        archive = self.golden()
        self.mount(archive)
        os.replace(self.file("other", golden("odd-size")), archive)
        archive.unlink()
        for device in manifest()["three-disks"]["devices"]:
            path = self.mnt / f"disk-{device['name']}.raw"
            self.assertEqual(sha256(path), device["sha256"])


class Refused(MountTest):
    """What cannot be mounted is said in one line, and nothing is mounted."""

    def refuse(self, *args: Argument, says: str, status: int = 1, **kw: Any) -> None:
        answer = run_tool("mount", *args, **kw)
        line = answer.stderr.decode()
        self.assertEqual((answer.returncode, answer.stdout), (status, b""), line)
        self.assertRegex(line, r"\Avma-tool: [^\n]+\n\Z")
        self.assertIn(says, line)
        self.assertEqual(self.mounts(), [])

    def test_archives(self) -> None:
        data = golden("three-disks")
        self.refuse(self.file("cut.vma", data[:-1]), self.mnt, says="ends inside", status=3)
        self.refuse(self.directory / "none.vma", self.mnt, says="No such file")
        self.refuse(self.file("text", b"text"), self.mnt, says="not a VMA archive", status=3)
        self.refuse("-", self.mnt, says="vma-tool optimize - FILE.vma.zst", input=data)
        path = self.golden()
        run("gzip", path)
        self.refuse(f"{path}.gz", self.mnt, says=f"vma-tool optimize {path}.gz {path}.zst")

    def test_directories(self) -> None:
        archive = self.golden()
        self.refuse(archive, self.directory / "none", says="No such file")
        self.refuse(archive, archive, says="Not a directory")
        self.refuse(archive, self.mnt, "--", says="no command", status=2)

    def test_names_of_an_archive(self) -> None:
        for name in ("../x", "/x", "a/b", "..", "a\nb", ""):
            for kind in ("config", "device"):
                with self.subTest(name=name, kind=kind):
                    devices = [Device(1, name, bytes(BLOCK))] if kind == "device" else []
                    configs: list[archives.Config] = [(name, b"")] if kind == "config" else []
                    archive = Archive(devices, configs)
                    data = archives.build(archive, archives.in_order(archive))
                    answer = run_tool("mount", self.file("a.vma", data), self.mnt)
                    self.assertEqual(answer.returncode, 3)
                    self.assertEqual(self.mounts(), [])
        twice = Archive([Device(1, "a", bytes(BLOCK))], [("disk-a.raw", b"")])
        data = archives.build(twice, archives.in_order(twice))
        self.refuse(self.file("a.vma", data), self.mnt, says="two files would be called")

    def test_options(self) -> None:
        answer = run_tool("mount", "-o", "rw", self.golden(), self.mnt)
        self.assertEqual((answer.returncode, self.mounts()), (2, []))

    def test_systems(self) -> None:
        """Not Linux; no /dev/fuse; no fusermount."""
        archive = self.golden()
        for patch, says in (
            ("sys.platform = 'darwin'", "Linux"),
            ("real = vma_tool.os.open; vma_tool.os.open = lambda path, *args, **kw:"
             " real(str(path).replace('/dev/fuse', '/dev/vma-tool-none'), *args, **kw)",
             "/dev/fuse: No such file"),
            ("vma_tool.os.geteuid = lambda: 1000; vma_tool.os.environ['PATH'] = '/none'",
             "fuse3"),
        ):  # fmt: skip
            with self.subTest(patch=patch):
                code = f"import sys, vma_tool\n{patch}\nvma_tool.script()"
                command = [sys.executable, "-c", code, "mount", str(archive), str(self.mnt)]
                answer = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
                self.check_error(answer, says)
                self.assertEqual(self.mounts(), [])


# As another user, in a mount namespace where /dev has what a desktop's has: a /dev/fuse for
# everybody, and a /dev/log.
AS_USER = """
import os, socket, subprocess, sys, syslog
import vma_tool

archive, mnt, mode = sys.argv[1:]
log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
log.bind("/dev/log")
log.settimeout(10)
os.chmod("/dev/log", 0o666)
# The user may not get to where Python's modules are: load all that are needed.
vma_tool.os.geteuid = lambda: 65534
vma_tool.main(["mount", archive, mnt, "--", "true"])
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
os.environ["PATH"] = "/usr/bin:/bin"

def main(*args):
    sys.argv[1:] = args
    return vma_tool.main(list(args))

def unmount():
    subprocess.run(["fusermount3", "-u", mnt], check=True)

if mode == "command":
    script = 'id -u; stat -c "%u %a %F" "$0" "$0"/*; sha256sum "$0"/*'
    status = main("mount", archive, mnt, "--", "sh", "-c", script, mnt)
elif mode == "background":
    status = main("mount", archive, mnt)
    print(sorted(os.listdir(mnt)), flush=True)
    with open("/proc/self/mounts") as mounts:
        print([line.split()[2] for line in mounts if mnt in line], flush=True)
    unmount()
elif mode == "log":
    status = main("mount", archive, mnt)
    os.truncate(archive, 20000)
    try:
        open(os.path.join(mnt, "disk-drive-scsi0.raw"), "rb").read()
    except OSError as error:
        print(error.strerror)
    print(log.recv(10000).decode())
    unmount()
elif mode == "others":
    status = main("mount", "-o", "allow_other", archive, mnt)
elif mode == "foreign":
    os.rmdir(mnt)
    status = main("mount", archive, "/usr")
sys.stdout.flush()
print("mounted" if os.path.ismount(mnt) else "not mounted", flush=True)
os._exit(status)
"""


class Users(MountTest):
    """An ordinary user mounts through fusermount3."""

    def as_user(self, mode: str) -> Answer[bytes]:
        for program, package in (("fusermount3", "fuse3"), ("unshare", "util-linux")):
            require_program(program, package)
        # The user has to get there, and to own both.
        home = self.directory
        while not home.stat().st_mode & 1:
            home.chmod(home.stat().st_mode | 0o711)
            home = home.parent
        archive = self.golden()
        for path in (self.directory, archive, self.mnt):
            os.chown(path, NOBODY, NOBODY)
        archive.chmod(0o600)
        script = """
            mkdir -p dev
            mount -t tmpfs -o mode=755 none dev
            mknod -m 666 dev/fuse c 10 229
            mknod -m 666 dev/null c 1 3
            mkdir dev/shm
            mount --rbind /dev/shm dev/shm
            mount --rbind dev /dev
            exec "$@"
        """
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
        command += [sys.executable, "-c", AS_USER, str(archive), str(self.mnt), mode]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            command, cwd=self.directory, env=env, capture_output=True, timeout=60, check=False
        )

    def test_command(self) -> None:
        answer = self.as_user("command")
        lines = self.check_ok(answer).splitlines()
        self.assertEqual(lines[:2], [str(NOBODY), f"{NOBODY} 500 directory"])
        for device in manifest()["three-disks"]["devices"]:
            path = f"{self.mnt}/disk-{device['name']}.raw"
            self.assertIn(f"{device['sha256']}  {path}", lines)
        self.assertEqual(set(lines[2:7]), {f"{NOBODY} 400 regular file"})
        self.assertEqual(lines[-1], "not mounted")

    def test_background(self) -> None:
        lines = self.check_ok(self.as_user("background")).splitlines()
        self.assertIn("'disk-drive-scsi0.raw'", lines[0])
        self.assertEqual(lines[1:], ["['fuse.vma-tool']", "not mounted"])

    def test_syslog(self) -> None:
        lines = self.check_ok(self.as_user("log")).splitlines()
        self.assertEqual(lines[0], "Input/output error")
        self.assertRegex(lines[1], r"vma-tool\[\d+\]: disk-drive-scsi0\.raw: .*three-disks\.vma")

    def test_what_fusermount_refuses(self) -> None:
        if "\nuser_allow_other" not in Path("/etc/fuse.conf").read_text():
            answer = self.as_user("others")
            self.assertEqual((answer.returncode, answer.stdout), (1, b"not mounted\n"))
            self.assertRegex(answer.stderr, rb"\Avma-tool: [^\n]*user_allow_other[^\n]*\n\Z")
        answer = self.as_user("foreign")
        self.assertEqual((answer.returncode, answer.stdout), (1, b"not mounted\n"), answer.stderr)
        self.assertRegex(answer.stderr, rb"\Avma-tool: [^\n]*/usr[^\n]*\n\Z")

    def test_root_through_fusermount(self) -> None:
        """The same road, where it can be measured."""
        require_program("fusermount3", "fuse3")
        code = "import vma_tool; vma_tool.os.geteuid = lambda: 1; vma_tool.script()"
        archive = self.file("a, b\\c.vma", golden("three-disks"))
        for busy in (False, True):
            command = [sys.executable, "-c", code, "mount", "-q", "-f", str(archive), str(self.mnt)]
            process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
            self.addCleanup(process.kill)
            self.wait_for(self.mounts)
            with open(self.mnt / "disk-drive-scsi0.raw", "rb") as file:
                if busy:
                    process.terminate()
                    self.wait_for(lambda: not self.mounts())
                file.read()
            if not busy:
                process.terminate()
            status, said = self.ended(process)
            self.assertEqual((status, "still in use" in said), (0, busy))


class Protocol(ToolTest):
    """The server, asked what no kernel asks: every request gets one answer if it may have any."""

    NO_ANSWER = (2, 36, 42)

    def setUp(self) -> None:
        super().setUp()
        self.ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(self.ours.close)
        self.addCleanup(theirs.close)
        self.ours.setblocking(False)
        archive = archives.three_disks(random.Random(1))
        path = self.file("a.vma", archives.build(archive, archives.in_order(archive)))
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        source = stack.enter_context(vma_tool.open_input(str(path)))
        contents = vma_tool.load(source)
        contents.complete()
        self.said: list[str] = []
        files = vma_tool.mounted_files(contents)
        self.server = vma_tool.FuseServer(files, 0o400, -1, self.said.append)
        self.server.fd = theirs.fileno()

    def ask(self, opcode: int, node: int = 1, body: bytes = b"") -> tuple[int, bytes] | None:
        """Return errno and data of the answer."""
        request = struct.pack("=IIQQIIII", 40 + len(body), opcode, 77, node, 0, 0, 0, 0) + body
        self.server._answer(memoryview(bytearray(request)))
        try:
            answer = self.ours.recv(2 << 20)
        except BlockingIOError:
            return None
        with self.assertRaises(BlockingIOError):
            self.ours.recv(1)
        size, code, unique = struct.unpack_from("=IiQ", answer)
        self.assertEqual((size, unique), (len(answer), 77))
        self.assertLessEqual(code, 0)
        return -code, answer[16:]

    def test_what_is_not_there(self) -> None:
        for opcode, node, body, code in (
            (26, 0, struct.pack("=IIII", 6, 31, 0, 0), errno.EPROTO),
            (1, 1, b"nothing\0", errno.ENOENT),
            (1, 1, b"../x\0", errno.ENOENT),
            (1, 2, b"qemu-server.conf\0", errno.ENOENT),
            (14, 2, struct.pack("=I4x", os.O_RDWR), errno.EROFS),
            (46, 2, struct.pack("=QQI4x", 0, 0, 0), errno.EINVAL),
            (46, 2, struct.pack("=QQI4x", 0, 1 << 62, os.SEEK_DATA), errno.ENXIO),
            *((opcode, 2, bytes(64), errno.ENOSYS) for opcode in (4, 9, 10, 11, 16, 22, 39, 4711)),
        ):
            with self.subTest(opcode=opcode, body=body):
                self.assertEqual(self.ask(opcode, node, body), (code, b""))
        self.assertEqual(self.said, [])

    def test_what_cannot_be(self) -> None:
        for opcode, node, body in ((3, 99, b""), (15, 99, bytes(40)), (15, 2, b""), (26, 1, b"")):
            with self.subTest(opcode=opcode):
                self.said.clear()
                self.assertEqual(self.ask(opcode, node, body), (errno.EIO, b""))
                self.assertEqual(len(self.said), 1)

    def test_anything(self) -> None:
        rng = random.Random(3)
        for _ in range(3000):
            opcode = rng.choice([*range(1, 54), 1 << 31])
            body = rng.randbytes(rng.choice([0, 1, 8, 16, 24, 40, 100]))
            if rng.random() < 0.5:
                body = struct.pack("=QQI4x", 0, rng.choice([0, 5000, 1 << 22, 1 << 63]), 1 << 20)
            answer = self.ask(opcode, rng.randrange(9), body)
            self.assertEqual(answer is None, opcode in self.NO_ANSWER)


class Tables(ToolTest):
    """Partition tables that somebody made to do harm: nothing outside the disk is served."""

    def check(self, disk: bytes) -> Sequence[vma_tool.MountedFile]:
        archive = Archive([Device(1, "d", disk)])
        path = self.file("a.vma", archives.build(archive, archives.in_order(archive)))
        with vma_tool.open_input(str(path)) as source:
            contents = vma_tool.load(source)
            contents.complete()
            files = vma_tool.mounted_files(contents)
            self.assertLess(len(files), 1100)
            buffer = memoryview(bytearray(vma_tool.FUSE_MAX_READ + 2 * CLUSTER))
            for file in files[:20]:
                assert isinstance(file, vma_tool.MountedDisk)
                self.assertTrue(0 <= file.start <= file.start + file.size <= len(disk))
                self.assertLessEqual(file.allocated, file.size + BLOCK)
                if file.size:
                    size = min(file.size, 5000)
                    offset = file.size - size
                    at = file.start + offset
                    self.assertEqual(file.read(offset, size, buffer), disk[at : at + size])
                    for data in (True, False):
                        self.assertTrue(offset <= file.seek(offset, data) <= file.size)
            return files

    def test_chains(self) -> None:
        """Extended partitions in a circle, and in a chain that has no end."""
        for step in (0, 1):
            disk = bytearray(MIB)
            for sector in range(2048):
                entries = struct.pack("<B3xB3xII", 0, 0x83, 1, 1)
                entries += struct.pack("<B3xB3xII", 0, 5, sector + step if sector else 0, 2048)
                if not sector:
                    entries = struct.pack("<B3xB3xII", 0, 5, 1, 2047)
                disk[sector * 512 + 446 : sector * 512 + 446 + len(entries)] = entries
                disk[sector * 512 + 510 : sector * 512 + 512] = b"\x55\xaa"
            self.assertLess(len(self.check(bytes(disk))), 300)

    def test_random_ones(self) -> None:
        rng = random.Random(4)
        for _ in range(40):
            disk = bytearray(archives.disk(rng, 2 * MIB, "sparse"))
            for sector in range(8):
                table = b"".join(
                    struct.pack(
                        "<B3xB3xII",
                        rng.choice([0, 0x80]),
                        rng.choice([0, 5, 0x0F, 0x83, 0xEE]),
                        rng.choice([0, 1, 2, 3, 63, 4000, 4095, 4096, 1 << 31, 0xFFFFFFFF]),
                        rng.choice([0, 1, 7, 4096, 0xFFFFFFFF]),
                    )
                    for _ in range(4)
                )
                disk[sector * 512 + 446 : sector * 512 + 512] = table + b"\x55\xaa"
            self.check(bytes(disk))
