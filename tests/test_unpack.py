"""unpack and extract: configs and disks as files, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path

from tests import archives
from tests.archives import CLUSTER, MIB, Archive, Device
from tests.damage import damages, good, good_archive
from tests.support import (
    BAD,
    FAILED,
    FEW,
    ToolTest,
    call_tool,
    golden,
    manifest,
    run_tool,
    sha256,
    snapshot,
)

COMMANDS = ("unpack", "extract")


def file_name(command: str, device: str) -> str:
    """Return what the command calls the file of a device."""
    if command == "unpack":
        return device
    return "vmstate.bin" if device == "vmstate" else f"disk-{device}.raw"


def contents(directory: Path) -> dict[str, str]:
    """Return the digest of each file in a directory."""
    return {path.name: sha256(path) for path in directory.iterdir()}


def built(archive: Archive) -> bytes:
    return archives.build(archive)


class Restored(ToolTest):
    """What comes out of a sound archive."""

    def setUp(self) -> None:
        super().setUp()
        self.target = self.directory / "out"

    def restore(self, command: str, data: bytes, *args: str, stream: bool = False) -> None:
        """Restore an archive into a new directory."""
        for path in self.target.iterdir() if self.target.exists() else ():
            path.unlink()
        path = self.file("a.vma", data)
        if stream:
            self.ok(command, *args, "-", self.target, input=data)
        else:
            self.ok(command, *args, path, self.target)

    def test_golden_archives(self) -> None:
        """Every config and every disk of the manifest, under the command's names; vma.json too."""
        for name, want in manifest().items():
            for command in COMMANDS:
                for stream in (False, True):
                    with self.subTest(archive=name, command=command, stream=stream):
                        self.restore(command, golden(name), stream=stream)
                        found = contents(self.target)
                        self.assertEqual("vma.json" in found, command == "unpack")
                        found.pop("vma.json", None)
                        files = {file_name(command, d["name"]): d for d in want["devices"]}
                        disks = {file: device["sha256"] for file, device in files.items()}
                        self.assertEqual(found, {**want["configs"], **disks})
                        for file, device in files.items():
                            size = (self.target / file).stat().st_size
                            self.assertEqual(size, device["size"])

    def test_description(self) -> None:
        """vma.json says what the other files cannot."""
        self.restore("unpack", golden("vmstate"))
        with open(self.target / "vma.json", encoding="utf-8") as file:
            found = json.load(file)
        want = manifest()["vmstate"]
        self.assertEqual(
            found,
            {
                "format": 1,
                "ctime": want["ctime"],
                "configs": list(want["configs"]),
                "devices": [
                    {"dev_id": d["dev_id"], "name": d["name"], "size": d["size"]}
                    for d in want["devices"]
                ],
            },
        )

    def test_random_archives(self) -> None:
        """Disks of any size and content, from any layout, from a file and from a pipe."""
        for seed in range(0, 15, FEW):
            rng = random.Random(seed)
            sizes = [
                512,
                1024,
                CLUSTER,
                CLUSTER + 512,
                rng.randrange(512, 1 << 20, 512),
                59 * CLUSTER,
            ]
            disks = [
                Device(n, f"drive-scsi{n}", archives.disk(rng, rng.choice(sizes)))
                for n in range(1, rng.randint(2, 4))
            ]
            vmstate = archives.disk(rng, rng.randint(1, 3) * CLUSTER, "sparse")
            archive = Archive(
                [*disks, Device(4, "vmstate", vmstate, 1024)], [("a.conf", b"\0\xff")]
            )
            data = archives.build(
                archive,
                archives.shuffled(archive, rng),
                slots=rng.choice([1, 20, 59]),
                store_zero_blocks=archives.masks_with_zeros(archive, rng, rng.choice([0, 0.3])),
                empty_slots=rng.random() < 0.5,
            )
            want = {device.raw_name.decode(): sha256(device.data) for device in archive.devices}
            for stream in (False, True):
                with self.subTest(seed=seed, stream=stream):
                    self.restore("unpack", data, stream=stream)
                    found = contents(self.target)
                    del found["vma.json"]
                    self.assertEqual(found, {**want, "a.conf": sha256(b"\0\xff")})

    def test_sparse(self) -> None:
        """Blocks that are not stored take no place on the disk."""
        content = b"begin".ljust(4096, b".") + bytes(64 * MIB) + b"end".ljust(512, b"\0")
        archive = Archive([Device(1, "drive-scsi0", content), Device(2, "drive-scsi1", bytes(MIB))])
        for command in COMMANDS:
            for stream in (False, True):
                with self.subTest(command, stream=stream):
                    self.restore(command, built(archive), stream=stream)
                    for device in archive.devices:
                        path = self.target / file_name(command, device.raw_name.decode())
                        self.assertEqual(sha256(path), sha256(device.data))
                        self.assertLess(path.stat().st_blocks * 512, 256 << 10)

    def test_vmstate_is_as_long_as_its_clusters(self) -> None:
        content = bytes(CLUSTER) + b"x" + bytes(2 * CLUSTER - 1)
        data = built(Archive([Device(1, "vmstate", content, 1024)]))
        for command in COMMANDS:
            for stream in (False, True):
                with self.subTest(command, stream=stream):
                    self.restore(command, data, stream=stream)
                    path = self.target / file_name(command, "vmstate")
                    self.assertEqual(path.read_bytes(), content)

    def test_some_devices(self) -> None:
        """-d picks devices by name; configs come always."""
        configs = ["qemu-server.conf", "qemu-server.fw"]
        for names in (
            ["drive-scsi0"], ["vmstate"], ["drive-efidisk0", "vmstate"],
            ["vmstate", "drive-scsi0", "drive-efidisk0"], ["vmstate", "vmstate"],
        ):  # fmt: skip
            for stream in (False, True):
                with self.subTest(names=names, stream=stream):
                    self.restore("extract", good(), "-d", ",".join(names), stream=stream)
                    want = {file_name("extract", name) for name in names} | set(configs)
                    self.assertEqual(set(os.listdir(self.target)), want)
                    for device in good_archive().devices:
                        path = self.target / file_name("extract", device.raw_name.decode())
                        if path.exists():
                            self.assertEqual(sha256(path), sha256(device.data))

    def test_all_of_the_archive_is_checked(self) -> None:
        """A fault of a device that -d does not pick is an error as well."""
        bad = archives.build(good_archive(), archives.in_order(good_archive())[:-1])
        path = self.file("a.vma", bad)
        self.bad("extract", "-d", "drive-scsi0", path, self.target, says=["'vmstate'"])
        self.bad("extract", "-d", "drive-scsi0", "-", self.target, input=bad)
        self.assertFalse(self.target.exists())

    def test_modes(self) -> None:
        """Files and directory get the modes that the user's umask says."""
        old = os.umask(0o027)
        self.addCleanup(os.umask, old)
        for command in COMMANDS:
            with self.subTest(command):
                self.restore(command, good())
                self.assertEqual({p.stat().st_mode & 0o777 for p in self.target.iterdir()}, {0o640})
                self.assertEqual(self.target.stat().st_mode & 0o777, 0o750)

    def test_file_names_of_any_bytes(self) -> None:
        """Names that are not UTF-8, or as long as may be, are names all the same."""
        archive = Archive(
            [Device(1, b"drive-\xff", b"x" * 512), Device(2, "d" * 242, b"y" * 512)],
            [("c" * 248, b"1"), ("ü b", b"2"), ("-rf", b"3")],
        )
        self.restore("unpack", built(archive))
        names = {os.fsencode(name) for name in os.listdir(self.target)}
        wanted = [b"drive-\xff", b"d" * 242, b"c" * 248, "ü b".encode(), b"-rf", b"vma.json"]
        self.assertEqual(names, set(wanted))


class Refused(ToolTest):
    """What is an error leaves nothing behind."""

    def setUp(self) -> None:
        super().setUp()
        self.target = self.directory / "top" / "sub" / "out"
        self.target.parent.mkdir(parents=True)

    def refuse(
        self, command: str, data: bytes, *args: str, says: str = "", status: int = BAD
    ) -> None:
        """Check that nothing is restored: from a file into a new directory, from a pipe into an
        empty one.
        """
        path = self.file("a.vma", data)
        before = snapshot(self.directory)
        line = self.refused(command, *args, path, self.target, status=status)
        self.assertRegex(line, says)
        self.assertEqual(snapshot(self.directory), before)
        self.target.mkdir()
        before = snapshot(self.directory)
        line = self.refused(command, *args, "-", self.target, input=data, status=status)
        self.assertRegex(line, says)
        self.assertEqual(snapshot(self.directory), before)
        self.target.rmdir()

    def test_damaged_archives(self) -> None:
        """The whole table: the message, and not one file; a directory that was made goes."""
        for damage in damages()[::FEW]:
            for command in COMMANDS:
                with self.subTest(damage.name, command=command):
                    self.refuse(command, damage.data, says=damage.says)

    def test_names(self) -> None:
        """Names that are no file's are refused before anything is written anywhere."""
        for name in (
            b"../../evil", b"/tmp/vma-tool-evil", b"sub/evil", b"..", b".", b"", b"..\\evil",
            b"evil\n\x1b[31mX", b"evil\x7f", b"\xc2\x9bevil", b"x" * 256,
        ):  # fmt: skip
            for what, archive in (
                ("config", Archive(configs=[("good.conf", b""), (name, b"evil")])),
                (
                    "device",
                    Archive([Device(1, "drive-a", bytes(512)), Device(2, name, bytes(512))]),
                ),
            ):
                for command in COMMANDS:
                    with self.subTest(what, name=name, command=command):
                        self.refuse(command, built(archive), says=f"{what} name '")
        self.assertFalse(os.path.lexists("/tmp/vma-tool-evil"))

    def test_names_twice(self) -> None:
        disk = Device(1, "drive-scsi0", bytes(512))
        for what, archive in (
            ("device", Archive([disk, replace(disk, dev_id=2)])),
            ("config", Archive(configs=[("a.conf", b"1"), ("a.conf", b"2")])),
        ):
            for command in COMMANDS:
                with self.subTest(what, command=command):
                    says = f"{what} name '.*' occurs twice"
                    self.refuse(command, built(archive), says=says)

    def test_two_files_of_one_name(self) -> None:
        """What would be written over each other is refused; what would not is not."""
        for config, device, refused in (
            ("disk-drive-a.raw", "drive-a", ["extract"]),
            ("drive-a", "drive-a", ["unpack"]),
            ("vmstate.bin", "vmstate", ["extract"]),
            ("vma.json", "drive-a", ["unpack"]),
            ("a.conf", "vma.json", ["unpack"]),
            ("vmstate", "vmstate", ["unpack"]),
            ("disk-a.raw", "drive-a", []),
        ):
            archive = Archive([Device(1, device, bytes(CLUSTER))], [(config, b"text")])
            for command in COMMANDS:
                with self.subTest(config=config, device=device, command=command):
                    if command in refused:
                        says = "two files would be called '"
                        self.refuse(command, built(archive), says=says, status=FAILED)
                    else:
                        target = self.directory / command
                        self.ok(command, self.file("a.vma", built(archive)), target)
                        self.assertEqual((target / config).read_bytes(), b"text")
                        self.assertEqual(
                            (target / file_name(command, device)).read_bytes(), bytes(CLUSTER)
                        )
                        for path in target.iterdir():
                            path.unlink()
                        target.rmdir()

    def test_device_named_as_a_longer_file(self) -> None:
        """A name that is none any more with what Proxmox puts around it."""
        archive = Archive([Device(1, "drive-a", bytes(512)), Device(2, "d" * 243, bytes(512))])
        self.refuse("extract", built(archive), says="is longer than 242 bytes")

    def test_unknown_devices(self) -> None:
        for names, unknown in (
            ("drive-scsi1", "no device 'drive-scsi1'"),
            ("drive-scsi0,", "no device ''"),
            ("", "no device ''"),
            ("drive-scsi0,x", "no device 'x'"),
            ("\x1b[31m", r"no device '\\x1b\[31m'"),
            ("disk-drive-scsi0.raw", "no device 'disk-drive-scsi0.raw'"),
        ):
            with self.subTest(names):
                self.refuse("extract", good(), "-d", names, says=unknown, status=FAILED)

    def test_targets_that_cannot_be(self) -> None:
        self.file("file", b"")
        before = snapshot(self.directory)
        source = self.file("a.vma", good())
        for name, message in (
            ("file", "Not a directory"),
            ("missing/out", "No such file or directory"),
            ("file/out", "Not a directory"),
            ("x" * 256, "File name too long"),
        ):
            for command in COMMANDS:
                with self.subTest(name[:20], command=command):
                    path = self.directory / name
                    self.refused(command, source, path, says=[message])
        source.unlink()
        self.assertEqual(snapshot(self.directory).keys(), before.keys())

    def test_full_disk(self) -> None:
        """See also test_failures, where each call fails once."""
        source = self.file("a.vma", good())
        limited = ["sh", "-c", 'ulimit -f 300; trap "" XFSZ; exec "$@"', "sh"]
        before = snapshot(self.directory)
        for command in COMMANDS:
            with self.subTest(command):
                answer = run_tool(command, source, self.target, prefix=limited)
                self.check_error(answer, str(self.target), "File too large")
                self.assertEqual(snapshot(self.directory), before)


class ExistingTargets(ToolTest):
    """What is there already."""

    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", good())
        self.target = self.directory / "out"
        self.target.mkdir()

    def test_extract_wants_an_empty_directory(self) -> None:
        for name in ("qemu-server.conf", "other", ".hidden"):
            with self.subTest(name):
                path = self.target / name
                path.write_bytes(b"precious")
                before = snapshot(self.directory)
                self.refused("extract", self.source, self.target, says=["not empty"])
                self.refused("extract", "-", self.target, input=good())
                self.assertEqual(snapshot(self.directory), before)
                path.unlink()

    def test_unpack_refuses_to_overwrite(self) -> None:
        """A file, a directory or a link of one of its names; other files do not matter."""
        other = self.target / "other"
        other.write_bytes(b"precious")
        for name in ("qemu-server.conf", "drive-scsi0", "vma.json"):
            for kind in ("file", "directory", "dangling link"):
                with self.subTest(name, kind=kind):
                    path = self.target / name
                    if kind == "file":
                        path.write_bytes(b"precious")
                    elif kind == "directory":
                        path.mkdir()
                    else:
                        path.symlink_to(self.directory / "missing")
                    before = snapshot(self.directory)
                    for args in ([self.source], ["-"]):
                        data = good() if args == ["-"] else None
                        says = [str(path), "File exists"]
                        self.refused("unpack", *args, self.target, input=data, says=says)
                    self.assertEqual(snapshot(self.directory), before)
                    if kind == "directory":
                        path.rmdir()
                    else:
                        path.unlink()
        self.ok("unpack", self.source, self.target)
        self.assertEqual(other.read_bytes(), b"precious")

    def test_force(self) -> None:
        """--force replaces files, and follows none that is a symbolic link."""
        outside = self.file("outside", b"precious")
        (self.target / "qemu-server.conf").write_bytes(b"old" * 1000)
        (self.target / "drive-scsi0").symlink_to(outside)
        (self.target / "drive-efidisk0").symlink_to("../new")
        os.link(outside, self.target / "vmstate")
        self.ok("unpack", "--force", self.source, self.target)
        self.assertEqual(outside.read_bytes(), b"precious")
        self.assertFalse((self.directory / "new").exists())
        found = contents(self.target)
        for device in good_archive().devices:
            name = device.raw_name.decode()
            self.assertFalse((self.target / name).is_symlink())
            self.assertEqual(found[name], sha256(device.data))
        self.assertEqual((self.target / "qemu-server.conf").read_bytes(), b"cores: 2\n")

    def test_force_and_a_bad_archive(self) -> None:
        """A failure leaves the old files as they were."""
        self.ok("unpack", self.source, self.target)
        (self.target / "qemu-server.conf").write_bytes(b"precious")
        bad = self.file("bad.vma", good()[:-1])
        before = snapshot(self.directory)
        self.bad("unpack", "--force", bad, self.target)
        self.bad("unpack", "--force", "-", self.target, input=good()[:-1])
        self.assertEqual(snapshot(self.directory), before)

    def test_force_and_a_directory(self) -> None:
        """A directory is not replaced; what was there stays, and no unfinished file does."""
        (self.target / "drive-scsi0").mkdir()
        (self.target / "drive-scsi0" / "precious").write_bytes(b"")
        self.refused("unpack", "--force", self.source, self.target, says=[str(self.target)])
        self.assertTrue((self.target / "drive-scsi0" / "precious").exists())
        names = {"qemu-server.conf", "qemu-server.fw"}
        names |= {device.raw_name.decode() for device in good_archive().devices}
        self.assertLessEqual(set(os.listdir(self.target)), names)

    def test_target_behind_a_link(self) -> None:
        """The target itself may be a symbolic link to a directory."""
        link = self.directory / "link"
        link.symlink_to("out")
        for command in COMMANDS:
            with self.subTest(command):
                self.ok(command, self.source, link)
                self.assertTrue((self.target / "qemu-server.conf").exists())
                for path in self.target.iterdir():
                    path.unlink()

    def test_current_directory(self) -> None:
        for command in COMMANDS:
            with self.subTest(command):
                self.check_ok(run_tool(command, self.source, ".", cwd=self.target))
                self.assertIn(file_name(command, "drive-scsi0"), os.listdir(self.target))
                for path in self.target.iterdir():
                    path.unlink()

    def test_usage(self) -> None:
        for args in (
            ["unpack"],
            ["unpack", "a"],
            ["extract", "a"],
            ["unpack", "-d", "x", "a", "b"],
        ):
            with self.subTest(args=args):
                self.assertEqual(call_tool(*args).returncode, 2)

    def test_forced_over_links(self) -> None:
        """A link is replaced, wherever it leads; a directory never is."""
        target = self.target
        self.ok("unpack", self.source, target)
        config = target / "qemu-server.conf"
        want = config.read_bytes()
        config.unlink()
        config.symlink_to(self.directory)
        self.ok("unpack", "--force", self.source, target)
        self.assertFalse(config.is_symlink())
        self.assertEqual(config.read_bytes(), want)
        config.unlink()
        config.mkdir()
        self.refused("unpack", "--force", self.source, target, says=[os.strerror(errno.EISDIR)])
