"""Nobody reads more than before: modes, groups, ACLs and extended attributes."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.checks import (
    MIB,
    NOBODY,
    CheckedTest,
    as_nobody,
    command,
    large_archive,
    mode,
)
from tests.support import (
    Argument,
    call_tool,
    golden,
    manifest,
    require_program,
    require_root,
    run_tool,
    sha256,
    skip,
    snapshot,
)

CANONICAL = manifest()["live-order"]["optimized_sha256"]["512K"]
DISK_GROUP = 6  # any group that is not the tests' own


class ReadersTest(CheckedTest):
    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(os.umask, os.umask(0o022))
        self.source = self.file("a.vma", golden("live-order"))
        os.chown(self.source, -1, os.getegid())

    def acl(self, path: Path) -> bytes:
        """Return a file's ACL as text, with its owner and group."""
        return command("getfacl", "acl", "-p", "-n", path)

    def set_acl(self, *args: Argument) -> None:
        """Change an ACL; skip where the file system has none."""
        program = require_program("setfacl", "acl")
        answer = subprocess.run([program, *args], capture_output=True, check=False)
        if answer.returncode:
            skip(f"{self.directory}: no ACLs here: {answer.stderr.decode().strip()}")

    def readers(self, path: Path) -> set[str]:
        """Return the ACL's entries that may read, as `user::` or `user:65534:`, after the mask."""
        found = set()
        for line in self.acl(path).decode().splitlines():
            entry, _, rights = line.partition("#effective:")
            name, _, plain = entry.strip().rpartition(":")
            if "r" in (rights or plain) and name.split(":")[0] in ("user", "group", "other"):
                found.add(name)
        return found

    def made(self) -> dict[str, list[Path]]:
        """Make all that can be made of the archive; return the files by the road that made them."""
        work = self.directory / "made"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        packed = work / "a.vma.gz"
        packed.write_bytes(gzip.compress(self.source.read_bytes(), 1))
        shutil.copystat(self.source, packed)
        os.chown(packed, -1, self.source.stat().st_gid)
        one, two, three, four = (work / name for name in ("1.vma", "2.vma", "3.vma", "disk"))
        self.ok("optimize", "-q", self.source, one)
        self.ok("optimize", "-q", packed, two)
        with open(self.source, "rb") as stdin:
            self.check_ok(run_tool("optimize", "-q", "-", three, stdin=stdin))
        self.ok("extract", "-d", "drive-scsi0", "-o", four, self.source)
        self.ok("extract", self.source, work / "extract")
        self.ok("unpack", self.source, work / "unpack")
        return {
            "optimize": [one],
            "optimize gzip": [two],
            "optimize <file": [three],
            "extract -o": [four],
            "extract": list((work / "extract").iterdir()),
            "unpack": list((work / "unpack").iterdir()),
        }

    def check_modes(self, want: int) -> None:
        for road, files in self.made().items():
            self.assertTrue(files)
            for path in files:
                self.assertEqual(oct(mode(path)), oct(want), f"{road}: {path.name}")


class Elsewhere(ReadersTest):
    """What is made of an archive in another place has its group bits only for the same group."""

    def test_same_group(self) -> None:
        for bits in (0o600, 0o640, 0o644, 0o660):
            self.source.chmod(bits)
            self.check_modes(bits & ~0o022)

    def test_another_group(self) -> None:
        """Seen: a file of group disk became readable for group users."""
        require_root()
        os.chown(self.source, -1, DISK_GROUP)
        for bits in (0o640, 0o660, 0o644, 0o604):
            self.source.chmod(bits)
            self.check_modes(0o600)

    def test_group_of_the_directory(self) -> None:
        """Where the directory gives its files the same group, they keep the group's bits."""
        require_root()
        os.chown(self.source, -1, DISK_GROUP)
        self.source.chmod(0o640)
        os.chown(self.directory, -1, DISK_GROUP)
        self.directory.chmod(0o2755)
        self.check_modes(0o640)

    def test_acl(self) -> None:
        """The group bits of a file with an ACL are its mask, and say nothing of the group."""
        self.source.chmod(0o600)
        self.set_acl("-m", f"u:{NOBODY}:r", self.source)
        self.assertEqual(mode(self.source), 0o640)  # as it looks
        self.check_modes(0o600)

    def test_default_acl_of_the_directory(self) -> None:
        """What a directory gives to all its files does not open an archive that was closed."""
        self.source.chmod(0o640)
        for path in (self.directory, self.directory / "made"):
            path.mkdir(exist_ok=True)
            self.set_acl("-d", "-m", f"u:{NOBODY}:r,g:{DISK_GROUP}:r,o::r", path)
        for road, files in self.made().items():
            for path in files:
                with self.subTest(road, path=path.name):
                    self.assertLessEqual(self.readers(path), {"user:", "group:"})
                    self.assertEqual(mode(path) & 0o007, 0)

    def test_replaced(self) -> None:
        """With --force, neither the archive nor what it replaces was readable for more people."""
        require_root()
        new = self.directory / "new.vma"
        for own, old, want in (
            (0o600, 0o644, 0o600),
            (0o644, 0o600, 0o600),
            (0o640, 0o644, 0o640),
            (0o644, 0o644, 0o644),
        ):
            with self.subTest(own=oct(own), old=oct(old)):
                new.write_bytes(b"old")
                os.chown(new, NOBODY, -1)
                new.chmod(old)
                self.source.chmod(own)
                self.ok("optimize", "-q", "--force", self.source, new)
                self.assertEqual(oct(mode(new)), oct(want))
                self.assertEqual(new.stat().st_uid, os.getuid())
        self.set_acl("-m", f"u:{NOBODY}:r", new)
        self.ok("optimize", "-q", "--force", self.source, new)
        self.assertEqual((oct(mode(new)), self.readers(new)), (oct(0o600), {"user:"}))
        new.chmod(0o600)
        answer = run_tool("optimize", "-q", "--force", "-", new, input=self.source.read_bytes())
        self.check_ok(answer)
        self.assertEqual(oct(mode(new)), oct(0o600), "from a pipe")

    def test_while_it_is_written(self) -> None:
        """The partial file is closed to all others from its first byte on."""
        require_root()
        large_archive(self.source)
        new = self.directory / "new.vma"
        os.chown(self.source, -1, DISK_GROUP)
        self.source.chmod(0o640)
        self.check_partial("another group", ["optimize", self.source, new])
        self.set_acl("-m", f"u:{NOBODY}:r", self.source)
        self.check_partial("ACL", ["optimize", self.source, new])
        self.check_partial("ACL in place", ["optimize", self.source])

    def check_partial(self, what: str, args: list[Argument]) -> None:
        child = self.start(*args)
        self.assertTrue(child.stop_after("wchar", 64 * MIB), what)
        files = self.partial_files()
        self.assertEqual(len(files), 1, what)
        self.assertEqual(oct(mode(files[0])), oct(0o600), what)
        child.send(signal.SIGTERM)
        child.send(signal.SIGCONT)
        self.assertEqual(child.answer().returncode, 143)


class InPlace(ReadersTest):
    """An archive that is optimized in place keeps who may read it, and what is attached to it."""

    def attach(self, name: str, value: bytes) -> None:
        """Set an extended attribute; skip where the file system has none."""
        if not hasattr(os, "setxattr"):
            skip("this system has no extended attributes")
        try:
            os.setxattr(self.source, name, value)
        except OSError as error:
            skip(f"{self.directory}: no attribute {name} here: {error.strerror}")

    def attributes(self) -> dict[str, bytes]:
        return {name: os.getxattr(self.source, name) for name in os.listxattr(self.source)}

    def optimize(self) -> None:
        self.ok("optimize", "-q", self.source)
        self.assertEqual(sha256(self.source), CANONICAL)

    def test_acl(self) -> None:
        """Seen: a file with mode 0600 and an ACL became readable for its group."""
        self.source.chmod(0o600)
        self.set_acl("-m", f"u:{NOBODY}:r", self.source)
        before, bits = self.acl(self.source), mode(self.source)
        self.assertEqual(self.readers(self.source), {"user:", f"user:{NOBODY}"})
        self.optimize()
        self.assertEqual((self.acl(self.source), mode(self.source)), (before, bits))

    def test_acl_with_a_mask(self) -> None:
        self.source.chmod(0o640)
        self.set_acl("-m", f"u:{NOBODY}:rw,g:{DISK_GROUP}:rw,m::r", self.source)
        before = self.acl(self.source)
        self.optimize()
        self.assertEqual(self.acl(self.source), before)

    def test_default_acl_of_the_directory(self) -> None:
        """It is not for a file that was there before."""
        self.source.chmod(0o640)
        self.set_acl("-b", self.source)
        self.set_acl("-d", "-m", f"u:{NOBODY}:r,g:{DISK_GROUP}:r,o::r", self.directory)
        before = self.acl(self.source)
        self.optimize()
        self.assertEqual(self.acl(self.source), before)

    def test_extended_attributes(self) -> None:
        self.attach("user.vma-tool-test", b"a note\0of any bytes\xff")
        self.attach("user.empty", b"")
        before = self.attributes()
        self.optimize()
        self.assertEqual(self.attributes(), before)

    def test_labels(self) -> None:
        """Of SELinux, and what only root sees."""
        require_root()
        self.attach("security.selinux", b"system_u:object_r:backup_store_t:s0\0")
        self.attach("trusted.vma-tool-test", b"root's")
        before = self.attributes()
        self.optimize()
        self.assertEqual(self.attributes(), before)

    def test_owner_mode_and_times(self) -> None:
        require_root()
        os.chown(self.source, NOBODY, DISK_GROUP)
        self.source.chmod(0o640)
        self.attach("user.vma-tool-test", b"a note")
        os.utime(self.source, ns=(10**18, 10**18 + 1))
        before = self.source.stat()
        self.optimize()
        after = self.source.stat()
        for field in ("st_uid", "st_gid", "st_mode", "st_mtime_ns"):
            self.assertEqual(getattr(after, field), getattr(before, field), field)

    def test_attribute_that_cannot_be_kept(self) -> None:
        """An error before the rename, which names the attribute; nothing is left."""
        require_root()
        self.attach("security.vma-tool-test", b"only root may set this")
        self.directory.chmod(0o777)
        os.chown(self.source, NOBODY, NOBODY)
        before = snapshot(self.directory)
        # whatever is imported late is imported now: nobody may not be able to read it any more
        call_tool("optimize", "-q", self.source, os.devnull)
        road: Callable[[], tuple[int, bytes, bytes]] = self.optimize_as_it_is
        status, output, errors = as_nobody(road)
        self.assertEqual((status, output), (1, b""), errors)
        self.assertIn(b"security.vma-tool-test", errors)
        self.assertEqual(errors.count(b"\n"), 1)
        self.assertEqual(snapshot(self.directory), before)

    def optimize_as_it_is(self) -> tuple[int, bytes, bytes]:
        answer = call_tool("optimize", self.source)
        return answer.returncode, answer.stdout, answer.stderr

    def test_nothing_attached(self) -> None:
        """On a file system without attributes nothing is missed."""
        before = self.attributes()
        self.optimize()
        self.assertEqual(self.attributes(), before)
