"""What the caller hands on: modes, limits, ignored signals, a locale, a pipe with a past."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from tests import archives
from tests.archives import Archive, Device
from tests.faults import intercepted
from tests.support import BAD, Argument, ToolTest, golden, run_tool, snapshot


class SurroundingsTest(ToolTest):
    def setUp(self) -> None:
        super().setUp()
        self.source = self.file("a.vma", golden("live-order"))

    def built(self, *devices: Device, configs: Any = ()) -> Path:
        """Return the path of an archive of these."""
        archive = Archive(list(devices), list(configs))
        name = f"{len(os.listdir(self.directory))}.vma"
        return self.file(name, archives.build(archive))


class System(SurroundingsTest):
    """What the system and its administrator have set."""

    def test_private(self) -> None:
        """What is made of an archive is never readable by more people than the archive is."""
        self.addCleanup(os.umask, os.umask(0o022))
        self.source.chmod(0o600)
        modes: set[int] = set()

        def look(call: str) -> None:
            """Note the modes of files that have no name of their own yet, when one is written."""
            if "write" not in call:
                return
            for path in self.directory.rglob("vma-tool-*.partial"):
                with contextlib.suppress(FileNotFoundError):
                    modes.add(stat.S_IMODE(path.stat().st_mode))

        public = self.file("public.vma", b"an older archive")
        made = [self.directory / "b.vma", self.directory / "disk", self.source]
        with intercepted(look):
            self.ok("optimize", self.source, made[0])
            self.ok("optimize", "--force", self.source, public)
            self.ok("optimize", self.source)
        self.assertEqual(modes, {0o600})
        self.assertEqual(stat.S_IMODE(public.stat().st_mode), 0o600)
        self.ok("unpack", self.source, self.directory / "new")
        self.ok("extract", "-d", "drive-scsi0", "-o", made[1], self.source)
        for path in (*made, *(self.directory / "new").iterdir()):
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600, path)
        self.source.chmod(0o440)
        self.ok("optimize", self.source, self.directory / "c.vma")
        self.assertEqual(stat.S_IMODE((self.directory / "c.vma").stat().st_mode), 0o640)

    def test_error_of_close(self) -> None:
        """It neither hides the error before it, nor keeps the file from being removed."""
        before = snapshot(self.directory)
        args: list[Argument] = ["unpack", self.source, self.directory / "new"]
        for first in (errno.EDQUOT, errno.ENOSPC):

            def fail(name: str, first: int = first) -> None:
                if name in ("write", "writev", "pwrite", "pwritev") and first == errno.ENOSPC:
                    raise OSError(first, os.strerror(first))
                if name == "close":
                    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

            with self.subTest(os.strerror(first)), intercepted(fail):
                self.refused(*args, says=[os.strerror(first)])
            self.assertEqual(snapshot(self.directory), before)

    def test_no_thread(self) -> None:
        """As under a limit of tasks."""
        packed = self.file("a.vma.gz", gzip.compress(golden("live-order")))
        fifo = self.directory / "fifo"
        os.mkfifo(fifo)
        before = snapshot(self.directory)
        calls: list[list[Argument]] = [
            ["optimize", self.source, self.directory / "b.vma"],
            ["unpack", self.source, self.directory / "new"],
            ["verify", fifo],
        ]
        for args in calls:
            keeper = os.open(fifo, os.O_RDWR)
            os.write(keeper, packed.read_bytes()[:100])
            error = RuntimeError("can't start new thread")
            with self.subTest(args=args):
                with mock.patch.object(threading.Thread, "start", side_effect=error):
                    self.refused(*args, says=["can't start new thread"])
                os.close(keeper)
                self.assertEqual(snapshot(self.directory), before)
                with self.assertRaises(ChildProcessError):
                    os.waitpid(-1, os.WNOHANG)

    def test_file_without_a_name(self) -> None:
        """It cannot be replaced, and nothing appears under the name that the system shows."""
        with open(self.directory / "gone", "wb") as gone:
            os.unlink(gone.name)
            path = f"/dev/fd/{gone.fileno()}"
            if not os.path.exists(path):
                self.skipTest("needs /dev/fd")
            before = snapshot(self.directory)
            self.refused("optimize", "--force", self.source, path, says=[path, "no name"])
            disk = "extract", "--force", "-d", "drive-scsi0", "-o"
            self.refused(*disk, path, self.source, says=[path, "no name"])
        self.assertEqual(snapshot(self.directory), before)

    def test_parent_that_ignores_its_children(self) -> None:
        """How a decompressor ended is known all the same."""
        program = self.file("zstd", b'#!/bin/sh\ncat >/dev/null; cat "$ARCHIVE"; exit 3\n')
        program.chmod(0o755)
        packed = self.file("a.vma.zst", b"\x28\xb5\x2f\xfd")
        environment = {**os.environ, "ARCHIVE": str(self.source)}
        environment["PATH"] = f"{self.directory}:{environment['PATH']}"
        ignore = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
        script = f"import os, signal, sys; {ignore}; os.execv(sys.argv[1], sys.argv[1:])"
        prefix = [sys.executable, "-c", script]
        answer = run_tool("verify", packed, prefix=prefix, env=environment)
        self.check_error(answer, "zstd: ended with status 3", status=BAD)

    def test_locale_without_the_characters(self) -> None:
        """Names are UTF-8 on the disk, whatever the locale says that names are."""
        name = "drive-é€"
        source = self.built(Device(1, name, b"x" * 5120), configs=[("é€.conf", b"name: a\n")])
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        for command in ("unpack", "extract"):
            target, output = self.directory / command, self.directory / f"{command}.vma"
            self.check_ok(run_tool(command, source, target, env=environment))
            answer = run_tool("pack", "-q", target, output, env=environment)
            self.assertEqual((answer.returncode, answer.stderr), (0, b""))
            header = archives.parse(output.read_bytes()).archive
            self.assertEqual([d.raw_name for d in header.devices], [name.encode()])
            self.assertEqual(header.configs, [("é€.conf", b"name: a\n")])
        self.assertTrue(
            os.path.exists(os.fsencode(self.directory / "unpack") + b"/drive-\xc3\xa9\xe2\x82\xac")
        )
