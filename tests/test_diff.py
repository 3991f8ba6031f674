"""Differences: `diff` writes one, and `--base` makes the archive of it again."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import random
import shutil
import struct
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import vma_tool
from tests import archives, differences, frames
from tests.archives import BLOCK, CLUSTER, Archive, Device
from tests.support import (
    BAD,
    FAILED,
    FEW,
    STEP,
    Answer,
    ToolTest,
    call_tool,
    golden,
    manifest,
    require_program,
    run_tool,
    sha256,
    snapshot,
)
from tests.test_properties import any_sample

SEED = 20251124
USAGE = 2


class Form(NamedTuple):
    """A way to store an archive: the file, and the plain archive that is in it."""

    suffix: str
    data: bytes
    plain: bytes


FORMS: dict[str, Callable[[bytes, bytes], Form]] = {
    "as it is": lambda data, _: Form(".vma", data, data),
    "canonical": lambda _, canonical: Form(".vma", canonical, canonical),
    "seekable": lambda _, canonical: Form(".vma.zst", frames.compress(canonical), canonical),
    "gzip": lambda data, _: Form(".vma.gz", gzip.compress(data, 1), data),
}


class Day(NamedTuple):
    """An archive: as a live backup writes it, and as optimize does, which stores what it stores."""

    archive: Archive
    data: bytes
    canonical: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """What unpack has to write, apart from vma.json."""
        configs = {str(name): data for name, data in self.archive.configs}
        return {**configs, **{d.raw_name.decode(): d.data for d in self.archive.devices}}

    @property
    def masks(self) -> archives.Masks:
        """The blocks that are stored where the archive is made of a difference."""
        masks = archives.data_masks(self.archive)
        stored = archives.parse(self.data).masks
        for device in self.archive.devices:
            for number in range(device.cluster_count if device.is_vmstate else 0):
                masks[device.dev_id, number] = stored[device.dev_id, number]
        return masks

    def optimized(self, align: int = 524288) -> bytes:
        return archives.canonical(self.archive, align, self.masks)


def day(archive: Archive, rng: random.Random, share: float = 0.1) -> Day:
    """Store an archive in a live backup's order; it also has blocks of zeros."""
    masks = archives.masks_with_zeros(archive, rng, share)
    slots = rng.choice([3, 58, 59])
    data = archives.build(archive, archives.live_order(archive, rng), slots, masks)
    return Day(archive, data, archives.canonical(archive, stored=masks))


@functools.cache
def two_days() -> tuple[Day, Day]:
    """Return an archive and the next day's: one disk is new, one is gone, one has changed."""
    rng = random.Random(5)
    efi = archives.disk(rng, 528 << 10, "sparse")
    system = archives.disk(rng, 130 * CLUSTER)
    odd = archives.disk(rng, CLUSTER + 512 * 5, "full")
    configs: list[archives.Config] = [("qemu-server.conf", b"cores: 2\n"), ("a.fw", b"")]
    one = Archive(
        [
            Device(1, "drive-efidisk0", efi),
            Device(2, "drive-scsi0", system),
            Device(3, "drive-scsi1", odd),
            Device(4, "drive-old", archives.disk(rng, 3 * CLUSTER)),
        ],
        configs,
        uuid=rng.randbytes(16),
    )
    after = bytearray(system)
    for at in (0, 59 * CLUSTER + 100, 60 * CLUSTER + 5 * BLOCK, 129 * CLUSTER):
        after[at : at + 3000] = rng.randbytes(3000)
    after[20 * CLUSTER : 22 * CLUSTER] = bytes(2 * CLUSTER)
    other = Archive(
        [
            Device(1, "drive-efidisk0", efi),
            Device(2, "drive-scsi0", bytes(after)),
            Device(3, "drive-scsi1", odd[:-512] + bytes([7] * 512) + rng.randbytes(512)),
            Device(5, "drive-new", archives.disk(rng, 2 * CLUSTER + 512, "full")),
        ],
        [("qemu-server.conf", b"cores: 3\n"), ("a.fw", b"x")],
        uuid=rng.randbytes(16),
        ctime=one.ctime + 86400,
    )
    return day(one, rng), day(other, rng)


class DiffTest(ToolTest):
    def setUp(self) -> None:
        super().setUp()
        self.output = self.directory / "out.vma"

    def path(self, name: str) -> Path:
        return self.directory / name

    def days(self) -> tuple[Path, Path, Path]:
        """Write two archives and their difference; return the paths."""
        base, new = (
            self.file(name, each.data) for name, each in zip(("base.vma", "new.vma"), two_days())
        )
        difference = differences.build(base.read_bytes(), new.read_bytes())
        return base, new, self.file("new.vmad", difference)

    def check_made(self, base: Any, difference: Any, new: Day, **kw: Any) -> None:
        """Check that optimize makes the new archive of the two."""
        self.ok("optimize", "-q", "--force", "--base", base, difference, self.output, **kw)
        self.assertEqual(sha256(self.output), sha256(new.optimized()))

    def check_directory(self, path: Path, files: dict[str, bytes]) -> None:
        found = {each.name: sha256(each) for each in path.iterdir() if each.name != "vma.json"}
        self.assertEqual(found, {name: sha256(data) for name, data in files.items()})


class Writing(DiffTest):
    """The file is what the independent builder makes, on every road."""

    def test_forms(self) -> None:
        for number in range(-(-len(FORMS) * 4 // FEW)):
            rng = random.Random(f"{SEED}:{number}")
            sample = any_sample(rng, zero_blocks=True)
            base = Day(
                sample.archive,
                sample.data,
                archives.canonical(sample.archive, stored=sample.masks),
            )
            new = day(differences.changed(sample.archive, rng), rng)
            forms = rng.sample(sorted(FORMS), 2)
            with self.subTest(number=number, forms=forms):
                self.check_forms(base, new, forms, rng)

    def check_forms(self, base: Day, new: Day, forms: list[str], rng: random.Random) -> None:
        stored = [FORMS[form](each.data, each.canonical) for form, each in zip(forms, (base, new))]
        paths = [
            self.file(f"{name}{form.suffix}", form.data)
            for name, form in zip(("base", "new"), stored)
        ]
        plain, compressed = self.path("d.vmad"), self.path("z.vmad")
        self.ok("diff", "-q", "--force", "--compress", "none", *paths, plain)
        wanted = differences.build(stored[0].plain, stored[1].plain, (paths[0].name, paths[1].name))
        self.assertEqual(sha256(plain), sha256(wanted))
        self.ok("diff", "-q", "--force", *paths, compressed)
        for form in sorted(FORMS):
            other = FORMS[form](base.data, base.canonical)
            path = self.file(f"other{other.suffix}", other.data)
            self.check_made(path, rng.choice([plain, compressed]), new)
        for command in ("unpack", "extract"):
            target = self.path(command)
            self.ok(command, "-q", "--base", paths[0], rng.choice([plain, compressed]), target)
            disks = {d.raw_name.decode() for d in new.archive.devices}
            files = {
                (f"disk-{name}.raw" if name != "vmstate" else "vmstate.bin")
                if command == "extract" and name in disks
                else name: data
                for name, data in new.files.items()
            }
            self.check_directory(target, files)
            shutil.rmtree(target)
        self.ok("verify", "-q", "--base", paths[0], plain, compressed)
        if new.archive.devices:
            self.ok("verify", "-q", "--base", paths[0], compressed, "--against", paths[1])

    def test_frames(self) -> None:
        """The compressed form is cut as archives are; it has a seek table, and no index."""
        base, new, difference = self.days()
        output = self.path("z.vmad")
        self.ok("diff", "-q", base, new, output)
        data, plain = output.read_bytes(), difference.read_bytes()
        count, descriptor, magic = struct.unpack("<IBI", data[-9:])
        self.assertEqual((descriptor, magic), (0, 0x8F92EAB1))
        table = data[-9 - 8 * count : -9]
        sizes = [struct.unpack_from("<II", table, 8 * i) for i in range(count)]
        self.assertEqual([size for _, size in sizes], list(frames.cuts(plain)))
        end = sum(size for size, _ in sizes)
        self.assertEqual(end, len(data) - 8 * count - 9 - 8, "nothing between frames and table")
        zstd = require_program("zstd", "zstd")
        answer = run_tool("diff", "-q", base, new, "-")
        self.assertEqual((answer.returncode, answer.stdout), (0, data), answer.stderr)
        import subprocess

        for level in ("zstd:1", "zstd:19"):
            answer = call_tool("diff", "--compress", level, base, new, "-")
            unpacked = subprocess.run(
                [zstd, "-dc"], input=answer.stdout, check=True, stdout=subprocess.PIPE
            )
            self.assertEqual(unpacked.stdout, plain)

    def test_pipes(self) -> None:
        """One of the two may be a pipe, and so may the output."""
        base, new, _ = self.days()
        one, other = (each.data for each in two_days())
        for args, stream, names in (
            (("-", new), one, ("standard input", "new.vma")),
            ((base, "-"), other, ("base.vma", "standard input")),
        ):
            wanted = differences.build(one, other, names)
            answer = call_tool("diff", "--compress", "none", *args, "-", input=stream)
            self.assertEqual((answer.returncode, answer.stderr), (0, b""))
            self.assertEqual(sha256(answer.stdout), sha256(wanted))
        self.refused("diff", "-", "-", "-", input=one, status=USAGE)

    def test_large(self) -> None:
        """What does not fit into memory waits in a temporary file."""
        base, new, difference = self.days()
        outputs = self.path("d.vmad"), self.path("z.vmad"), self.path("x.vmad")
        self.ok("diff", "-q", base, new, outputs[2])
        with mock.patch.object(vma_tool, "WAITING_SIZE", 100_000):
            self.ok("diff", "-q", "--compress", "none", base, new, outputs[0])
            self.ok("diff", "-q", base, new, outputs[1])
        self.assertEqual(outputs[0].read_bytes(), difference.read_bytes())
        self.assertEqual(outputs[1].read_bytes(), outputs[2].read_bytes())

    def test_no_difference(self) -> None:
        """Of an archive and itself, in whatever layout, the header is left."""
        for name in manifest():
            data = golden(name)
            path = self.file("a.vma", data)
            canonical = self.path("b.vma")
            self.ok("optimize", "-q", "--force", path, canonical)
            output = self.path("d.vmad")
            self.ok("diff", "-q", "--force", "--compress", "none", path, canonical, output)
            with self.subTest(name):
                vmstate = any(d["name"] == "vmstate" for d in manifest()[name]["devices"])
                if not vmstate:
                    size = int.from_bytes(output.read_bytes()[56:60], "big")
                    self.assertEqual(output.stat().st_size, size)
                self.ok("verify", "-q", "--base", canonical, output)

    def test_reported(self) -> None:
        base, new, _ = self.days()
        output = self.path("d.vmad")
        line = self.ok("diff", base, new, output)
        self.assertRegex(line, rf"\A{new}: a difference from {base}, [0-9.]+ KiB\n\Z")

    def test_refused(self) -> None:
        base, new, difference = self.days()
        before = snapshot(self.directory)
        text = self.file("text", b"no archive " * 2000)
        for args, status, says in (
            ((base, new, difference), FAILED, "--force replaces it"),
            ((base, new, base), FAILED, "cannot be written as well"),
            ((base, new, new), FAILED, "cannot be written as well"),
            ((base, self.path("none"), self.path("x.vmad")), FAILED, "No such file"),
            ((text, new, self.path("x.vmad")), BAD, "not a VMA archive"),
            ((difference, new, self.path("x.vmad")), BAD, "a difference"),
            ((base, difference, self.path("x.vmad")), BAD, "a difference"),
        ):
            with self.subTest(args=args):
                self.refused("diff", *args, status=status, says=[says])
        text.unlink()
        self.assertEqual(snapshot(self.directory), before)
        many = Archive([], [(f"{i}.conf", b"") for i in range(256)])
        full = self.file("many.vma", archives.build(many))
        self.refused("diff", base, full, self.path("x.vmad"), says=["256 configs"])
        answer = call_tool("diff", "--compress", "lzo", base, new, self.path("x"))
        self.assertEqual(answer.returncode, USAGE)

    def test_readers(self) -> None:
        """Nobody may read a difference who could not read both archives."""
        base, new, _ = self.days()
        output = self.path("d.vmad")
        for modes, wanted in (((0o644, 0o644), 0o644), ((0o600, 0o644), 0o600),
                              ((0o644, 0o640), 0o640)):  # fmt: skip
            for path, mode in zip((base, new), modes):
                path.chmod(mode)
            self.ok("diff", "-q", "--force", base, new, output)
            self.assertEqual(output.stat().st_mode & 0o777, wanted)
            self.ok("optimize", "-q", "--force", "--base", base, output, self.output)
            self.assertEqual(self.output.stat().st_mode & 0o777, wanted)
            output.unlink()
            self.output.unlink()


class Reading(DiffTest):
    """Each command that takes --base gives what it gives of the new archive."""

    def test_pipes(self) -> None:
        base, _, difference = self.days()
        one, other = two_days()
        stored = difference.read_bytes()
        for args, stream in (
            (("--base", "-", difference), one.data),
            (("--base", base, "-"), stored),
            (("--base", base, "-"), gzip.compress(stored)),
        ):
            self.ok("optimize", "-q", "--force", *args, self.output, input=stream)
            self.assertEqual(sha256(self.output), sha256(other.optimized()))
            small = ["--memory", "100K"]
            self.ok("optimize", "-q", "--force", *small, *args, self.output, input=stream)
            self.assertEqual(sha256(self.output), sha256(other.optimized()))
            answer = call_tool("optimize", *args, "-", input=stream)
            self.assertEqual(sha256(answer.stdout), sha256(other.optimized()))
            self.ok("verify", "-q", *args, input=stream)
            disk = self.path("disk")
            self.ok(
                *("extract", "-q", "-d", "drive-scsi0", "--force", "-o", disk, *args), input=stream
            )
            self.assertEqual(disk.read_bytes(), other.files["drive-scsi0"])
        self.refused("verify", "--base", "-", "-", input=stored, says=["standard input"])

    def test_one_disk(self) -> None:
        base, _, difference = self.days()
        _, new = two_days()
        for name in ("drive-scsi0", "drive-efidisk0", "drive-scsi1", "drive-new"):
            target = self.path(name)
            self.ok("extract", "-q", "-d", name, "--base", base, difference, target)
            configs = {str(name): data for name, data in new.archive.configs}
            self.check_directory(target, {**configs, f"disk-{name}.raw": new.files[name]})
            answer = call_tool("extract", "-d", name, "-o", "-", "--base", base, difference)
            self.assertEqual(sha256(answer.stdout), sha256(new.files[name]))

    def test_map(self) -> None:
        base, _, difference = self.days()
        _, new = two_days()
        lines = []
        for device in new.archive.devices[:-1]:
            name = device.raw_name.decode()
            path = self.file(name, b"\xee" * len(device.data))
            lines.append(f"1:{name}={path}\n")
        lines.append("skip=drive-new\n")
        listing = self.file("map", "".join(lines).encode())
        report = self.ok("extract", "-r", listing, "--base", base, difference, self.path("x"))
        self.assertIn("CFG: size: 9 name: qemu-server.conf", report)
        self.assertNotIn(differences.CONFIG, report)
        for device in new.archive.devices[:-1]:
            self.assertEqual(sha256(self.path(str(device.name))), sha256(device.data))

    def test_verify(self) -> None:
        base, new_path, difference = self.days()
        _, new = two_days()
        line = self.ok("verify", "--base", base, difference)
        self.assertRegex(
            line,
            rf"\A{difference}: OK, a difference from {base}, 4 devices, [0-9.]+ MiB, all data read",
        )
        found = json.loads(self.ok("verify", "--json", "--base", base, difference))
        self.assertEqual((found["ok"], found["base"]), (True, str(base)))
        names = [device["name"] for device in found["devices"]]
        self.assertEqual(names, [device.name for device in new.archive.devices])
        digests = self.ok("verify", "--digest", "--base", base, difference)
        self.assertEqual(digests, self.ok("verify", "--digest", new_path))
        self.ok("verify", "-q", "--base", base, difference, "--against", new_path)
        answer = call_tool("verify", "--base", base, difference, "--against", base)
        self.assertEqual(answer.returncode, BAD)
        self.refused("verify", "--quick", "--base", base, difference, status=USAGE)

    def test_list(self) -> None:
        base, new, difference = self.days()
        compressed = self.path("z.vmad")
        self.ok("diff", "-q", base, new, compressed)
        about = differences.content(two_days()[0].archive)
        for path in (difference, compressed):
            text = self.ok("list", path)
            self.assertRegex(text, rf"base +'base.vma', created .*, content digest {about}\n")
            self.assertNotIn(differences.CONFIG, text)
            found = json.loads(self.ok("list", "--json", path))
            self.assertEqual(found["difference"]["base"]["content"], about)
            self.assertEqual(len(found["devices"]), 4)
            self.assertEqual(self.ok("config", path), "cores: 3\n")
            shown = json.loads(self.ok("config", "-c", differences.CONFIG, path))
            self.assertEqual(shown["base"]["name"], "base.vma")
            self.bad("list", "--scan", path, says=["--base"])
            self.ok("list", "--base", base, path)
        self.refused("list", "--scan", "--base", base, difference, status=USAGE)

    def test_partitions(self) -> None:
        """A partition table in the difference, and file systems in the base."""
        mbr = bytearray(512)
        mbr[446:462] = struct.pack("<B3xB3xII", 0, 0x83, 2048, 8192)
        mbr[510:] = b"\x55\xaa"
        size = 80 * CLUSTER
        disk = bytearray(archives.disk(random.Random(1), size))
        disk[: 2 * CLUSTER] = bytes(2 * CLUSTER)
        disk[1 << 20 : (1 << 20) + 8] = b"XFSB\0\0\0\0"
        one = Archive([Device(1, "drive-scsi0", bytes(disk))], uuid=b"1" * 16)
        disk[:512] = mbr
        other = Archive([Device(1, "drive-scsi0", bytes(disk))], uuid=b"2" * 16)
        data = [archives.build(each, archives.reversed_order(each)) for each in (one, other)]
        base = self.file("base.vma", data[0])
        again = self.file("again.vma.zst", frames.compress(archives.canonical(one)))
        paths = [self.file("plain.vmad", differences.build(data[0], data[1])), self.path("z.vmad")]
        self.ok("diff", "-q", base, self.file("new.vma", data[1]), paths[1])
        for path in paths:
            for each in (base, again):
                text = self.ok("list", "--partitions", "--base", each, path)
                self.assertRegex(text, r"MBR 1: 1048576 \+ 4\.0 MiB +Linux, xfs")
            self.bad("list", "--partitions", path, says=["--base"])
        wrong = self.file("wrong.vma", data[1])
        self.bad("list", "--partitions", "--base", wrong, paths[0], says=["the wrong base"])
        zipped = self.file("base.vma.gz", gzip.compress(data[0]))
        says = ["does not allow", f"vma-tool optimize {zipped}"]
        self.refused("list", "--partitions", "--base", zipped, paths[0], says=says)

    def test_sparse(self) -> None:
        """What nobody stores is a hole in what is extracted, however large."""
        size = 40 << 30
        header = Archive([Device(1, "drive-scsi0", bytes(CLUSTER))])
        small = self.file("small.vma", archives.build(header))
        large = self.path("large.raw")
        with large.open("wb") as file:
            file.truncate(size)
            file.seek(30 << 30)
            file.write(b"data")
        one, other = self.path("one.vma"), self.path("two.vma")
        self.ok("create", "-q", one, f"drive-scsi0={large}")
        with large.open("r+b") as file:
            file.seek(35 << 30)
            file.write(b"more")
        self.ok("create", "-q", other, f"drive-scsi0={large}")
        output = self.path("d.vmad")
        self.ok("diff", "-q", "--compress", "none", one, other, output)
        self.assertLess(output.stat().st_size, 32 << 10)
        disk = self.path("disk")
        self.ok("extract", "-q", "-d", "drive-scsi0", "-o", disk, "--base", one, output)
        self.assertEqual(disk.stat().st_size, size)
        self.assertLess(disk.stat().st_blocks, 1 << 10)
        # a disk that the base does not have, with all its zeros
        self.ok("diff", "-q", "--force", small, other, output)
        self.ok("verify", "-q", "--base", small, output)


class Errors(DiffTest):
    def test_without_base(self) -> None:
        """Each command says which archive is needed, and writes nothing."""
        base, new, plain = self.days()
        compressed = self.path("z.vmad")
        self.ok("diff", "-q", base, new, compressed)
        before = snapshot(self.directory)
        content = differences.content(two_days()[0].archive)
        for path, stream in ((plain, None), (compressed, None), ("-", plain.read_bytes())):
            for args in (
                ("verify", path),
                ("verify", "--quick", path),
                ("verify", "--digest", path),
                ("verify", base, "--against", path),
                ("extract", path, self.path("x")),
                ("extract", "-d", "drive-scsi0", "-o", self.path("y"), path),
                ("unpack", path, self.path("x")),
                ("optimize", path, self.output),
                ("diff", base, path, self.output),
                ("diff", path, new, self.output),
                ("list", "--scan", path),
                ("rescue", path, self.path("x")),
            ):
                with self.subTest(args=args):
                    says = ["'base.vma'", content]
                    self.bad(*args, says=says, input=stream)
        self.bad("optimize", plain, says=["--base"])
        self.assertEqual(snapshot(self.directory), before)

    def test_mistakes(self) -> None:
        base, new, difference = self.days()
        before = snapshot(self.directory)
        for args, status, says in (
            (("verify", "--base", base, new), FAILED, "a full archive"),
            (("optimize", "--base", base, new, self.output), FAILED, "a full archive"),
            (("unpack", "--base", base, new, self.path("x")), FAILED, "a full archive"),
            (("verify", "--base", difference, difference), BAD, "each needs only its full archive"),
            (("optimize", "--base", difference, difference, self.output), BAD, "'base.vma'"),
            (("optimize", "--base", base, difference), USAGE, "name an OUTPUT"),
            (("optimize", "--base", base, difference, base), FAILED, "cannot be written as well"),
            (("optimize", "--base", base, difference, difference), FAILED, "cannot be written"),
            (("verify", "--base", self.path("none"), difference), FAILED, "No such file"),
        ):
            with self.subTest(args=args):
                self.refused(*args, status=status, says=[says])
        self.assertEqual(snapshot(self.directory), before)

    def outcomes(self, base: Path, difference: Path) -> list[Answer[bytes]]:
        """Run what reads everything: what is written must be right, and errors leave nothing."""
        new = two_days()[1]
        shutil.rmtree(self.path("x"), ignore_errors=True)
        self.output.unlink(missing_ok=True)
        answers = []
        for args, made in (
            (("verify", "-q", "--base", base, difference), None),
            (("optimize", "-q", "--base", base, difference, self.output), self.output),
            (("unpack", "-q", "--base", base, difference, self.path("x")), self.path("x")),
        ):
            answer = call_tool(*args)
            answers.append(answer)
            if answer.returncode:
                self.check_error(answer, status=BAD)
                self.assertFalse(made and made.exists())
            elif made == self.output:
                self.assertEqual(sha256(made), sha256(new.optimized()))
            elif made:
                self.check_directory(made, new.files)
        return answers

    def test_wrong_bases(self) -> None:
        _, new, difference = self.days()
        one, _ = two_days()
        others = {
            "golden": (golden("three-disks"), "the wrong base"),
            "no disks": (archives.build(Archive([])), "the wrong base"),
        }
        for name, (data, says) in others.items():
            with self.subTest(name):
                for answer in self.outcomes(self.file("other.vma", data), difference):
                    self.assertIn(says, answer.stderr.decode())
                    self.assertIn("'base.vma'", answer.stderr.decode())
        # what the difference has not is the same in the new archive itself
        for answer in self.outcomes(new, difference):
            self.assertEqual((answer.returncode, answer.stderr), (0, b""))
        # another ctime, another name: the same disks all the same
        archive = Archive(one.archive.devices, [], uuid=b"x" * 16, ctime=1)
        other = self.file("other.vma", archives.build(archive))
        for answer in self.outcomes(other, difference):
            self.assertEqual((answer.returncode, answer.stderr), (0, b""))

    def test_who_is_damaged(self) -> None:
        """The error says whether it is the base or the difference."""
        base, _, difference = self.days()
        good = base.read_bytes(), difference.read_bytes()
        stored = next(
            at for at in archives.extent_offsets(good[0]) if good[0][at + 6 : at + 8] > b"\0\0"
        )
        for path, at, says in (
            (base, stored + 512, f"{base}: damaged"),
            (difference, len(good[1]) - 5000, f"{difference}: damaged"),
        ):
            data = bytearray(path.read_bytes())
            data[at] ^= 1
            path.write_bytes(data)
            for answer in self.outcomes(base, difference):
                self.assertIn(says, answer.stderr.decode())
            answer = call_tool("verify", "--base", "-", difference, input=base.read_bytes())
            self.check_error(answer, "damaged", status=BAD)
            for each, content in zip((base, difference), good):
                each.write_bytes(content)

    def test_changed_bytes(self) -> None:
        """A changed byte anywhere is an error, or the disks are right all the same."""
        base, new, plain = self.days()
        compressed = self.path("z.vmad")
        self.ok("diff", "-q", base, new, compressed)
        rng = random.Random(SEED)
        harmless = 0
        for path in (base, plain, compressed):
            good = path.read_bytes()
            difference = plain if path == base else path
            places = {0, 4, 33, 50, len(good) - 1, len(good) - 9}
            places.update(rng.sample(range(len(good)), 40))
            headers = archives.extent_offsets(good) if path != compressed else []
            for at in headers[:4]:
                places.update((at, at + 7, at + 30, at + 41, at + 43, at + 47, at + 512))
            for place in sorted(places)[:: -(-STEP // 3)]:
                data = bytearray(good)
                data[place] ^= rng.choice([1, 0x80, 0xFF])
                path.write_bytes(data)
                with self.subTest(path=path.name, place=place):
                    answers = self.outcomes(base, difference)
                    right = sum(not answer.returncode for answer in answers)
                    harmless += right
                    if path == plain:
                        self.assertEqual(right, 0, "of a difference, no byte is without meaning")
            path.write_bytes(good)
        self.assertEqual(len({answer.returncode for answer in self.outcomes(base, plain)}), 1)

    def test_cut(self) -> None:
        base, new, plain = self.days()
        compressed = self.path("z.vmad")
        self.ok("diff", "-q", base, new, compressed)
        for path in (plain, compressed):
            good = path.read_bytes()
            ends = [0, 100, len(good) // 2, len(good) - 1]
            if path == plain:
                ends += archives.extent_offsets(good)
            for end in ends:
                path.write_bytes(good[:end])
                with self.subTest(path=path.name, end=end):
                    for answer in self.outcomes(base, path):
                        self.assertEqual(answer.returncode, BAD)
                    disk = self.path("disk")
                    self.bad(*("extract", "-d", "drive-efidisk0", "-o", disk), "--base", base, path)
                    self.assertFalse(disk.exists())
            path.write_bytes(good)
        data = bytearray(plain.read_bytes())
        plain.write_bytes(data + data[archives.extent_offsets(bytes(data))[0] :])
        for answer in self.outcomes(base, plain):
            self.assertEqual(answer.returncode, BAD)

    def test_lies(self) -> None:
        """What vma-tool.json says is never trusted: an error, not other disks."""
        base, new, _ = self.days()
        one, other = base.read_bytes(), new.read_bytes()
        path = self.path("lie.vmad")
        zeros = "0" * 64

        def set_to(*keys: str, to: object) -> Callable[[dict[str, Any]], None]:
            def edit(value: dict[str, Any]) -> None:
                for key in keys[:-1]:
                    value = value[key]
                value[keys[-1]] = to

            return edit

        edits: dict[str, Callable[[dict[str, Any]], object]] = {
            "format": set_to("format", to=2),
            "format as text": set_to("format", to="1" * 3000),
            "no base": lambda value: value.pop("base"),
            "base a list": set_to("base", to=[]),
            "name a number": set_to("base", "name", to=7),
            "ctime a text": set_to("base", "ctime", to="now"),
            "ctime a fraction": set_to("base", "ctime", to=1.5),
            "ctime true": set_to("new", "ctime", to=True),
            "digest short": set_to("new", "content", to="00"),
            "digest of other disks": set_to("new", "content", to=zeros),
            "disks": set_to("disks", to=[zeros] * 4),
            "too few disks": lambda value: value["disks"].pop(),
            "disks a number": set_to("disks", to=4),
            "extents": set_to("extents", to=zeros),
            "extents null": set_to("extents", to=None),
        }
        for name, edit in edits.items():
            path.write_bytes(differences.build(one, other, edit=edit))
            with self.subTest(name):
                for answer in self.outcomes(base, path):
                    self.assertEqual(answer.returncode, BAD)
        texts = {
            "empty": b"",
            "no JSON": b"cores: 2\n",
            "list": b"[]",
            "number": b"9" * 60000,
            "deep": b"[" * 60000,
            "bytes": bytes(range(256)),
            "NaN": b'{"format": NaN}',
        }
        for name, text in texts.items():
            path.write_bytes(differences.build(one, other, config=text))
            with self.subTest(name):
                for answer in self.outcomes(base, path):
                    self.assertEqual(answer.returncode, BAD)
                self.bad("list", path)
        # names and times that act on a terminal, or are no times
        hostile: dict[str, Callable[[dict[str, Any]], object]] = {
            "name": set_to("base", "name", to="\x1b[31m\n../x"),
            "surrogate": set_to("base", "name", to="\udc80"),
            "ctime": set_to("base", "ctime", to=-(1 << 70)),
        }
        for name, edit in hostile.items():
            path.write_bytes(differences.build(one, other, edit=edit))
            with self.subTest(name):
                line = self.bad("verify", path, says=["--base"])
                self.assertNotIn("\x1b", line)
                self.assertNotIn("\x1b", self.ok("list", path))
                for answer in self.outcomes(base, path):
                    self.assertEqual(answer.returncode, 0)
        # a wrong layout is no error where everything is read
        path.write_bytes(differences.build(one, other, edit=set_to("base", "layout", to=zeros)))
        for answer in self.outcomes(base, path):
            self.assertEqual(answer.returncode, 0)

    def test_other_clusters(self) -> None:
        """Clusters that are missing, or more than are needed, are found out."""
        base, new, _ = self.days()
        one, other = base.read_bytes(), new.read_bytes()
        parsed = [archives.parse(data).archive for data in (one, other)]
        good = differences.kept(parsed[0], parsed[1])
        path = self.path("d.vmad")
        for name, clusters, right in (
            ("as it is", good, True),
            ("one more", {**good, 2: sorted({*good[2], 90})}, True),
            ("all", {d.dev_id: list(range(d.cluster_count)) for d in parsed[1].devices}, True),
            ("one fewer", {**good, 2: good[2][1:]}, False),
            ("none of a disk", {**good, 2: []}, False),
            ("one fewer of a new disk", {**good, 5: good[5][:-1]}, False),
            ("none of a new disk", {**good, 5: []}, False),
        ):
            path.write_bytes(differences.build(one, other, clusters=clusters))
            with self.subTest(name):
                for answer in self.outcomes(base, path):
                    self.assertEqual(answer.returncode, 0 if right else BAD)

    def test_announced(self) -> None:
        """A device that is far larger than what is there is an error at once."""
        base, new, _ = self.days()
        data = bytearray(differences.build(base.read_bytes(), new.read_bytes()))
        for dev_id in (2, 5):
            for size in (1 << 46, 1 << 48, 1 << 62, (1 << 64) - 512):
                changed = bytearray(data)
                at = 4096 + 32 * dev_id + 8
                changed[at : at + 8] = struct.pack(">Q", size)
                header_size = int.from_bytes(changed[56:60], "big")
                changed[32:48] = bytes(16)
                changed[32:48] = hashlib.md5(changed[:header_size]).digest()
                path = self.file("d.vmad", bytes(changed))
                with self.subTest(dev_id=dev_id, size=size):
                    for answer in self.outcomes(base, path):
                        self.assertEqual(answer.returncode, BAD)
                    answer = call_tool("verify", "--base", base, "-", input=bytes(changed))
                    self.check_error(answer, status=BAD)

    def test_full_disk(self) -> None:
        """No room for the temporary file, or the output: an error that says so."""
        base, new, _ = self.days()
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        answer = run_tool("diff", base, new, "/dev/full")
        self.assertEqual(answer.returncode, FAILED)
        self.assertIn(b"No space left", answer.stderr)


if __name__ == "__main__":
    unittest.main()
