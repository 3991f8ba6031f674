#!/usr/bin/env python3
"""Measure what the second backup of a guest costs, with the programs that people use.

Makes two consecutive days of one guest: a GPT disk with a Debian root file system on ext4, the
day's changes written into that file system in place, an EFI disk and a TPM disk. Each day is
written as an archive as a live backup writes it: its own uuid and ctime, clusters in the order in
which 16 readers finish, some of them early. Then restic, borg, rdiff, xdelta3, zstd and a count
of fixed blocks tell how much new data the second day is: for the archives as written, for what
`vma_tool.py optimize` makes of them, plain and compressed, and for the raw disks, which are the
limit. What comes back from restic, borg, rdiff, xdelta3 and `vma_tool.py diff` is compared byte by
byte, and verified.

    python3 tests/tools/dedup.py  the table of the README, in ten to twenty minutes
    python3 tests/tools/dedup.py --size small  a smaller guest, in a few minutes
    python3 tests/tools/dedup.py --svg tests/data/dedup.svg  its picture as well

Needs no root and mounts nothing, though mmdebstrap may want user namespaces. The Debian packages:
mmdebstrap e2fsprogs restic borgbackup rdiff xdelta3 zstd. Exit status: 0, also where a goal is
missed; 1 if something that was restored is not what was stored, or a program failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import platform
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import archives
from tests.archives import MIB

PARTITION = 1 * MIB  # where the root file system begins on the disk
TOOL = Path(__file__).resolve().parents[2] / "vma_tool.py"
PROGRAMS = ["mke2fs", "debugfs", "e2fsck", "restic", "borg", "rdiff", "xdelta3", "zstd", "tar"]
ALIGNS = ["4K", "128K", "1M"]
WRITTEN, FRAMES, RAW = "as written", ".vma.zst", "raw disks"
COLUMNS = [WRITTEN, *(f"--align {align}" for align in ALIGNS), FRAMES, RAW]
# A table of its own: FRAMES beside what zstd makes of the archives as written
ONE_FRAME, RSYNCABLE = "one zstd frame", "zstd --rsyncable"
COMPRESSED = [FRAMES, ONE_FRAME, RSYNCABLE]
DIFF = "vma-tool diff"
# The picture: of these rows these columns, each with its style and its title
PICTURE_ROWS = ("restic, compression auto", "borg", "rdiff")
FORMS = {
    WRITTEN: ("plain", "as vzdump writes it"),
    "--align 128K": ("optimized", "optimized"),
    FRAMES: ("compressed", "optimized, .vma.zst"),
}
ARCHIVE = "vzdump-qemu-100.vma"
DISKS = {"drive-efidisk0": "efidisk0.raw", "drive-scsi0": "scsi0.raw", "drive-tpmstate0": "tpm.raw"}

# (measured, column, limit, other): the figure is at most so many times that of the other column
GOALS = [
    ("restic, compression off", "--align 128K", 1.1, RAW),
    ("restic, compression auto", "--align 128K", 1.1, RAW),
    ("borg", "--align 128K", 1.1, RAW),
    ("rdiff", "--align 128K", 1.1, RAW),
    ("fixed blocks of 128 KiB", "--align 128K", 1.15, RAW),
    ("fixed blocks of 1 MiB", "--align 1M", 1.3, RAW),
    ("restic, compression auto", FRAMES, 0.45, ONE_FRAME),
    ("borg", FRAMES, 0.55, ONE_FRAME),
    ("rdiff", FRAMES, 0.15, ONE_FRAME),
    ("the second day itself", FRAMES, 1.03, ONE_FRAME),
]


class DedupError(Exception):
    """A program failed, or something came back other than it was."""


# ---- running programs ---------------------------------------------------------------------------


def run(
    *command: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: BinaryIO | None = None,
    stdout: BinaryIO | None = None,
    accept: Sequence[int] = (0,),
) -> str:
    """Run a program to its end and return its standard output; raise DedupError if it fails."""
    argv = [str(word) for word in command]
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdin=stdin or subprocess.DEVNULL,
        stdout=stdout or subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode not in accept:
        last = done.stderr.decode(errors="replace").strip()[-500:]
        raise DedupError(f"{' '.join(argv)}: exit status {done.returncode}: {last}")
    return (done.stdout or b"").decode(errors="replace")


def say(text: str) -> None:
    """Tell on standard error how far the measurement is; standard output is for the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def tree_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(MIB):
            digest.update(piece)
    return digest.hexdigest()


# ---- the guest's first day ----------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large the guest is, and how much happens to it in a day."""

    disk: int  # bytes
    variant: str  # of mmdebstrap and debootstrap
    packages: str
    copied: int  # bytes of this machine's /usr, if no Debian system is to be had
    photos: int  # files of 0.1 to 4 MiB that do not compress
    database: int  # bytes
    segments: int  # of 8 MiB, of the database's log and of the journal's files, each
    upgraded: int  # packages a day
    read_files: int  # files a day whose time of access changes


SCALES = {
    "normal": Scale(
        disk=1536 * MIB,  # with its second day inside the window of 2 GiB that zstd has at most
        variant="important",
        packages="openssh-server,git,python3,vim,nginx-light,postgresql-client",
        copied=400 * MIB,
        photos=80,
        database=96 * MIB,
        segments=6,
        upgraded=12,
        read_files=600,
    ),
    "small": Scale(
        disk=512 * MIB,
        variant="minbase",
        packages="",
        copied=150 * MIB,
        photos=16,
        database=24 * MIB,
        segments=2,
        upgraded=4,
        read_files=200,
    ),
}


def rootfs_tar(work: Path, scale: Scale) -> Path | None:
    """Make a Debian root file system as a tar archive; None if none is to be had.

    The mirror and the release are those that this machine's apt is configured with.
    """
    tar = work / "rootfs.tar"
    try:
        targets = run(
            "apt-get", "indextargets", "--format", "$(CODENAME)|$(REPO_URI)", "Created-By: Packages"
        )
        release, mirror = targets.splitlines()[0].split("|")
        part = tar.with_suffix(".part")
        include = [f"--include={scale.packages}"] if scale.packages else []
        if shutil.which("mmdebstrap"):
            say(f"mmdebstrap --variant={scale.variant} {release}")
            options = ["--quiet", f"--variant={scale.variant}", "--format=tar", *include]
            run("mmdebstrap", *options, release, part, mirror)
        else:
            say(f"debootstrap {release}")
            variant = ["--variant=minbase"] if scale.variant == "minbase" else []
            run("debootstrap", *variant, *include, release, work / "debootstrap", mirror)
            run("tar", "-C", work / "debootstrap", "-cf", part, ".")
            shutil.rmtree(work / "debootstrap")
        part.rename(tar)
        return tar
    except (DedupError, OSError, IndexError, ValueError) as error:
        say(f"no Debian root file system: {error}")
        return None


def copy_usr(target: Path, limit: int) -> None:
    """Fill `target` with files of this machine's /usr until there are `limit` bytes of them."""
    total = 0
    for folder, _, names in os.walk("/usr"):
        for name in sorted(names):
            path = Path(folder, name)
            if total >= limit:
                return
            if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
                continue
            if path.stat().st_size > 64 * MIB:
                continue
            copy = target / path.relative_to("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            total += path.stat().st_size


def log_lines(rng: random.Random, size: int) -> bytes:
    """Return text like that of a log."""
    lines = []
    length = 0
    while length < size:
        line = (
            f"2025-11-19T{rng.randrange(24):02}:{rng.randrange(60):02}:{rng.random() * 60:09.6f} "
            f"guest {rng.choice(['sshd', 'cron', 'kernel', 'nginx', 'postgres'])}"
            f"[{rng.randrange(30000)}]: {rng.choice(['session opened', 'GET /', 'checkpoint'])} "
            f"{rng.getrandbits(64):x}\n"
        ).encode()
        lines.append(line)
        length += len(line)
    return b"".join(lines)[:size]


def database_page(rng: random.Random, number: int) -> bytes:
    """Return 8 KiB that compress to about half, as a database's pages do."""
    return (struct.pack(">QQ", number, rng.getrandbits(64)) + rng.randbytes(4080)).ljust(
        8192, b"\x20"
    )


def user_files(root: Path, rng: random.Random, scale: Scale) -> None:
    """Add what a guest has besides its packages: a database, logs, journals, photos."""
    database = root / "var/lib/database"
    journal = root / "var/log/journal"
    photos = root / "srv/photos"
    for folder in (database, journal, photos):
        folder.mkdir(parents=True, exist_ok=True)
    with open(database / "table", "wb") as file:
        for number in range(scale.database // 8192):
            file.write(database_page(rng, number))
    # Both are used again and again by their programs, so no block of them is empty.
    for number in range(scale.segments):
        (database / f"log.{number}").write_bytes(rng.randbytes(8 * MIB))
        (journal / f"system@{number}.journal").write_bytes(log_lines(rng, 8 * MIB))
    for number in range(scale.photos):
        (photos / f"{number:04}.jpg").write_bytes(rng.randbytes(rng.randint(100_000, 4_000_000)))
    (root / "var/log/syslog").write_bytes(log_lines(rng, 3 * MIB))
    (root / "var/log/syslog.1").write_bytes(log_lines(rng, 4 * MIB))


def old_files(root: Path, rng: random.Random, size: int) -> list[str]:
    """Scatter files of `size` bytes in all over the tree and return their paths.

    A file system that mke2fs has just filled has no holes, so that all that is new would come
    behind all that is old. These files are deleted again: the disk of a guest that has been in use.
    """
    folders = sorted(
        Path(folder) for folder, _, names in os.walk(root) if names and os.access(folder, os.W_OK)
    )
    paths: list[str] = []
    while size > 0:
        path = rng.choice(folders) / f"old-{len(paths)}"
        data = rng.randbytes(rng.choice([4096, 16384, 65536, 262144, 1 << 20]))
        path.write_bytes(data)
        paths.append(f"/{path.relative_to(root)}")
        size -= len(data)
    return paths


def write_gpt(disk: BinaryIO, size: int, rng: random.Random) -> None:
    """Write a GUID partition table with one partition, Linux root, that begins at 1 MiB."""
    sectors = size // 512
    linux_root = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709").bytes_le
    last = sectors - 34
    entry = linux_root + rng.randbytes(16) + struct.pack("<QQQ", PARTITION // 512, last, 0)
    entries = (entry + "root".encode("utf-16-le").ljust(72, b"\0")).ljust(128 * 128, b"\0")
    guid = rng.randbytes(16)

    def header(here: int, other: int, table: int) -> bytes:
        rest = struct.pack("<QQQQ", here, other, 34, last) + guid
        rest += struct.pack("<QIII", table, 128, 128, zlib.crc32(entries))
        start = b"EFI PART" + struct.pack("<II", 0x10000, 92)
        crc = zlib.crc32(start + bytes(8) + rest)
        return (start + struct.pack("<II", crc, 0) + rest).ljust(512, b"\0")

    protective = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1)
    disk.seek(0)
    disk.write((bytes(446) + protective).ljust(510, b"\0") + b"\x55\xaa")
    disk.write(header(1, sectors - 1, 2) + entries)
    disk.seek((sectors - 33) * 512)
    disk.write(entries + header(sectors - 1, 1, sectors - 33))


def first_day(
    day: Path, work: Path, scale: Scale, tar: Path | None, rng: random.Random
) -> tuple[str, list[str]]:
    """Make the three disks; return what the root file system is, and the files of its packages."""
    root = work / "rootfs"
    root.mkdir()
    tar = tar or rootfs_tar(work, scale)
    if tar:
        # Device nodes want root; mke2fs could not copy them anyway without it.
        run("tar", "-C", root, "-xf", tar, "--exclude=./dev/*")
        origin = "a Debian root file system by mmdebstrap or debootstrap"
    else:
        copy_usr(root, scale.copied)
        origin = "FALLBACK: files of this machine's /usr, no Debian root file system was to be had"
    packages = package_files(root)
    if not packages:
        raise DedupError("the root file system has no packages, so that none can be upgraded")
    user_files(root, rng, scale)
    old = old_files(root, rng, scale.disk // 16)

    day.mkdir(parents=True)
    disk = day / DISKS["drive-scsi0"]
    with open(disk, "wb") as file:
        file.truncate(scale.disk)
        write_gpt(file, scale.disk, rng)
    blocks = (scale.disk - 2 * PARTITION) // 4096
    say("mke2fs -d")
    options = ["-q", "-F", "-t", "ext4", "-b", "4096", "-L", "root", "-m", "1", "-d", str(root)]
    run("mke2fs", *options, "-E", f"offset={PARTITION}", disk, str(blocks))
    shutil.rmtree(root)
    (work / "scratch").mkdir()
    system = FileSystem(disk, work / "scratch")
    system.remove_and_trim(old, 0.7)
    (work / "scratch").rmdir()

    # Variables of a firmware: a store of which little is used. State of a TPM: 20 KiB of 4 MiB.
    efi = bytearray(540672)
    efi[0:300_000] = b"\xff" * 300_000
    efi[100:9000] = rng.randbytes(8900)
    (day / DISKS["drive-efidisk0"]).write_bytes(efi)
    tpm = bytearray(4 * MIB)
    tpm[4096:24576] = rng.randbytes(20480)
    (day / DISKS["drive-tpmstate0"]).write_bytes(tpm)
    return origin, packages


def package_files(root: Path) -> list[str]:
    """Return "package\\tpath" for each regular file of a package, paths with their links resolved.

    Without dpkg's lists, as in the fallback, each folder with at least four files is a package.
    """
    found: dict[str, str] = {}
    lists = sorted((root / "var/lib/dpkg/info").glob("*.list"))
    for listing in lists:
        for line in listing.read_text().splitlines():
            # A link in the guest must not lead out of it: absolute ones are left alone.
            path = Path(os.path.realpath(root / line.lstrip("/")))
            if path.is_file() and root in path.parents:
                found[f"/{path.relative_to(root)}"] = listing.stem
    if not lists:
        for folder, _, names in os.walk(root):
            if len(names) >= 4:
                for name in names:
                    path = Path(folder, name)
                    found[f"/{path.relative_to(root)}"] = folder
    # debugfs reads words that are separated by blanks and quoted by double quotes
    return sorted(f"{package}\t{path}" for path, package in found.items() if '"' not in path)


# ---- the second day -----------------------------------------------------------------------------


class FileSystem:
    """The ext4 file system inside a disk image, changed in place by debugfs, never mounted."""

    def __init__(self, disk: Path, scratch: Path) -> None:
        self.disk = disk
        self.scratch = scratch
        self.device = f"{disk}?offset={PARTITION}"
        self.commands: list[str] = []
        self.sources = 0

    def flush(self) -> None:
        """Run the commands that were collected; debugfs tells of errors on stderr only."""
        script = self.scratch / "commands"
        script.write_text("\n".join(self.commands) + "\n")
        done = subprocess.run(
            ["debugfs", "-w", "-f", str(script), self.device],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=True,
        )
        complaints = done.stderr.decode(errors="replace").splitlines()[1:]
        if complaints:
            raise DedupError(f"debugfs: {complaints[0]}")
        self.commands = []
        for source in self.scratch.iterdir():
            source.unlink()

    def read(self, path: str) -> bytes:
        argv = ["debugfs", "-R", f'cat "{path}"', self.device]
        return subprocess.run(argv, capture_output=True, check=True).stdout

    def create(self, path: str, data: bytes) -> None:
        self.sources += 1
        source = self.scratch / f"source{self.sources}"
        source.write_bytes(data)
        folder, name = path.rsplit("/", 1)
        self.commands += [f'cd "{folder or "/"}"', f'write "{source}" "{name}"']

    def replace(self, path: str, data: bytes) -> None:
        """Replace a file as dpkg does: written beside the old one, then renamed over it."""
        self.create(f"{path}.dpkg-new", data)
        self.rename(f"{path}.dpkg-new", path, replaces=True)

    def rename(self, old: str, new: str, replaces: bool = False) -> None:
        if replaces:
            self.commands.append(f'rm "{new}"')
        self.commands += [f'ln "{old}" "{new}"', f'unlink "{old}"']

    def remove(self, path: str) -> None:
        self.commands.append(f'rm "{path}"')

    def remove_and_trim(self, paths: Sequence[str], share: float) -> None:
        """Remove files; of a share of them the guest trims the blocks, so that they are zeros."""
        trimmed = [self.extents(path) for path in paths[: int(len(paths) * share)]]
        for path in paths:
            self.remove(path)
        self.flush()
        with open(self.disk, "r+b") as disk:
            for extents in trimmed:
                for _, physical, length in extents:
                    disk.seek(physical)
                    disk.write(bytes(length))

    def touch(self, path: str, when: int) -> None:
        self.commands.append(f'set_inode_field "{path}" atime @{when}')

    def extents(self, path: str) -> list[tuple[int, int, int]]:
        """Return (offset in the file, offset on the disk, length) of all that a file occupies."""
        found = []
        for line in run("debugfs", "-R", f'extents -l "{path}"', self.device).splitlines():
            numbers = re.match(
                r"\s*\d+/\s*\d+\s+\d+/\s*\d+\s+(\d+) -\s+\d+\s+(\d+) -\s+\d+\s+(\d+)", line
            )
            if numbers:
                logical, physical, count = (int(number) for number in numbers.groups())
                found.append((logical * 4096, PARTITION + physical * 4096, count * 4096))
        return found

    def overwrite(self, path: str, pieces: Mapping[int, bytes]) -> None:
        """Write into a file's blocks where they are: {offset in the file: bytes}."""
        extents = self.extents(path)
        with open(self.disk, "r+b") as disk:
            for offset, data in pieces.items():
                rest, at = data, offset
                while rest:
                    start, physical, length = next(
                        extent for extent in extents if extent[0] <= at < extent[0] + extent[2]
                    )
                    count = min(len(rest), start + length - at)
                    disk.seek(physical + at - start)
                    disk.write(rest[:count])
                    rest, at = rest[count:], at + count

    def check(self) -> None:
        run("e2fsck", "-f", "-n", self.device)


def new_version(rng: random.Random, data: bytes) -> bytes:
    """Return a file as the next build of it might be: some parts changed, a few of them longer."""
    out = []
    for at in range(0, len(data), 8192):
        piece = bytearray(data[at : at + 8192])
        if rng.random() < 0.6:
            for _ in range(rng.randint(1, 12)):
                piece[rng.randrange(len(piece))] = rng.randrange(256)
        if rng.random() < 0.05:
            place = rng.randrange(len(piece))
            piece[place:place] = rng.randbytes(rng.randint(1, 64))
        out.append(bytes(piece))
    return b"".join(out) or b"\n"


def second_day(day: Path, work: Path, scale: Scale, packages: list[str], seed: int) -> None:
    """Let a day happen to the disks in `day`, which are copies of the first day's."""
    rng = random.Random(seed)
    scratch = work / "scratch"
    scratch.mkdir()
    system = FileSystem(day / DISKS["drive-scsi0"], scratch)

    deleted = rng.sample(range(scale.photos), max(2, scale.photos // 10))
    system.remove_and_trim([f"/srv/photos/{number:04}.jpg" for number in deleted], 0.5)

    for number in range(max(2, scale.photos // 10)):
        data = rng.randbytes(rng.randint(100_000, 4_000_000))
        system.create(f"/srv/photos/{scale.photos + number:04}.jpg", data)

    # logrotate, and a day of new lines
    system.rename("/var/log/syslog", "/var/log/syslog.1", replaces=True)
    system.create("/var/log/syslog", log_lines(rng, 700_000))

    # apt upgrade
    by_package: dict[str, list[str]] = {}
    for line in packages:
        package, path = line.split("\t")
        by_package.setdefault(package, []).append(path)
    large = {name: paths for name, paths in by_package.items() if 4 <= len(paths) <= 150}
    for package in rng.sample(sorted(large), min(scale.upgraded, len(large))):
        for path in large[package]:
            data = system.read(path)
            if 0 < len(data) < 8 * MIB:
                system.replace(path, new_version(rng, data))
    status = "/var/lib/dpkg/status"
    if text := system.read(status):
        system.replace(status, text.replace(b"Version: 1", b"Version: 2", scale.upgraded))
    system.flush()

    # what was read today: times of access, spread over the tables of inodes
    paths = sorted({line.split("\t")[1] for line in packages})
    for path in rng.sample(paths, min(scale.read_files, len(paths))):
        system.touch(path, 1763600000 + rng.randrange(86400))
    system.flush()

    # Writes in place: the database's pages and its log, the journal's files, the file system's
    # own journal (which is clean, so nothing reads what it holds).
    page_count = scale.database // 8192
    pages = rng.sample(range(page_count), page_count // 60)
    changed = {number * 8192: database_page(rng, number) for number in pages}
    system.overwrite("/var/lib/database/table", changed)
    system.overwrite("/var/lib/database/log.1", {0: rng.randbytes(5 * MIB)})
    journal = f"/var/log/journal/system@{scale.segments - 1}.journal"
    system.overwrite(journal, {0: rng.randbytes(256), 6 * MIB: log_lines(rng, MIB)})
    system.overwrite("<8>", {512 * 1024: log_lines(rng, MIB)})
    system.check()
    scratch.rmdir()

    with open(day / DISKS["drive-efidisk0"], "r+b") as file:
        file.seek(9000)
        file.write(rng.randbytes(120))
    with open(day / DISKS["drive-tpmstate0"], "r+b") as file:
        file.seek(8192)
        file.write(rng.randbytes(300))


# ---- archives -----------------------------------------------------------------------------------


@dataclass
class Set:
    """One column of the table: a folder for each day, with the same file names in both."""

    column: str
    days: list[Path]

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.days[1].iterdir())

    def pairs(self) -> Iterator[tuple[Path, Path]]:
        for name in self.names:
            yield self.days[0] / name, self.days[1] / name


def write_archive(disks: Path, target: Path, day: int) -> None:
    """Write a day's disks as a live backup does: own uuid, ctime and order."""
    rng = random.Random(1000 + day)
    devices = []
    maps = []
    for dev_id, (name, file_name) in enumerate(DISKS.items(), 1):
        with open(disks / file_name, "rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        maps.append(view)
        # Only slices of it are taken, and those are bytes: no disk need fit into memory.
        devices.append(archives.Device(dev_id, name, cast(bytes, view)))
    config = b"bios: ovmf\ncores: 2\nmemory: 4096\nname: guest\nscsi0: local:100/disk-0\n"
    archive = archives.Archive(
        devices,
        [("qemu-server.conf", config)],
        uuid=rng.randbytes(16),
        ctime=1763600000 + 86400 * day,
    )
    with open(target, "wb") as out:
        out.writelines(archives.build_parts(archive, archives.live_order(archive, rng)))
    for view in maps:
        view.close()


def make_sets(work: Path, scale: Scale, tar: Path | None, tool: Path) -> tuple[list[Set], str]:
    """Make the guest's two days, and from them all the columns of the table."""
    raw = Set(RAW, [work / "raw" / "day1", work / "raw" / "day2"])
    origin, packages = first_day(raw.days[0], work, scale, tar, random.Random(1))
    say("the second day")
    raw.days[1].mkdir()
    for file_name in DISKS.values():
        run("cp", "--sparse=always", raw.days[0] / file_name, raw.days[1] / file_name)
    second_day(raw.days[1], work, scale, packages, seed=2)

    written = Set(WRITTEN, [work / "written" / "day1", work / "written" / "day2"])
    sets = [written]
    for number, folder in enumerate(written.days):
        say(f"the archive of day {number + 1}")
        folder.mkdir(parents=True)
        write_archive(raw.days[number], folder / ARCHIVE, number)
    for align in ALIGNS:
        folders = [work / f"align-{align}" / "day1", work / f"align-{align}" / "day2"]
        sets.append(Set(f"--align {align}", folders))
        for source, folder in zip(written.days, folders):
            folder.mkdir(parents=True)
            command: list[str | Path] = [sys.executable, tool, "optimize", "--align", align]
            say(f"optimize --align {align}")
            run(*command, source / ARCHIVE, folder / ARCHIVE)
    zstd: list[tuple[str, str, list[str | Path]]] = [
        (FRAMES, "frames", [sys.executable, tool, "optimize"]),
        (ONE_FRAME, "one-frame", ["zstd", "-q"]),
        (RSYNCABLE, "rsyncable", ["zstd", "-q", "--rsyncable"]),
    ]
    for column, name, command in zstd:
        folders = [work / name / "day1", work / name / "day2"]
        sets.append(Set(column, folders))
        for source, folder in zip(written.days, folders):
            folder.mkdir(parents=True)
            say(column)
            option = ["-o"] if command[0] == "zstd" else []
            run(*command, source / ARCHIVE, *option, folder / f"{ARCHIVE}.zst")
    sets.append(raw)
    for entry in sets:
        if entry is not raw:
            for folder in entry.days:
                run(sys.executable, tool, "verify", folder)
    return sets, origin


# ---- measuring ----------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all the measurements need: where to work, the tool, and the results so far."""

    work: Path
    tool: Path
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    restored: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, measured: str, column: str, size: float) -> None:
        self.table.setdefault(measured, {})[column] = size

    @contextlib.contextmanager
    def timed(self, program: str, entry: Set) -> Iterator[None]:
        """Add to the seconds that a program takes."""
        start = time.monotonic()
        yield
        column = self.seconds.setdefault(program, {})
        column[entry.column] = column.get(entry.column, 0.0) + time.monotonic() - start

    def prove(self, program: str, original: Path, restored: Path) -> None:
        """Compare what came back, verify it if it is an archive, and delete it."""
        same = sha256(original) == sha256(restored)
        if same and original.name.startswith(ARCHIVE):
            try:
                run(sys.executable, self.tool, "verify", restored)
            except DedupError as error:
                say(str(error))
                same = False
        self.restored += 1
        if not same:
            self.wrong.append(f"{program}: {original}")
            say(f"NOT IDENTICAL: {program}: {original}")
        restored.unlink()


def measure_restic(bench: Bench, entry: Set) -> None:
    """Take the growth of a repository by the second backup of the same file names.

    Where restic cuts depends on a polynomial that is drawn for each new repository; all columns
    start from copies of one repository, so that they differ by their data only.
    """
    template = bench.work / "restic-template"
    env = {"RESTIC_PASSWORD": "measurement"}
    quiet = ["restic", "--no-cache", "--quiet"]
    if not template.exists():
        run(*quiet, "init", "-r", template, env=env)
    for mode in ("off", "auto"):
        repository = bench.work / "restic"
        shutil.copytree(template, repository)
        sizes = []
        for folder in entry.days:
            options = ["--compression", mode, "-r", str(repository), "backup"]
            run(*quiet, *options, *entry.names, cwd=folder, env=env)
            sizes.append(tree_size(repository))
        bench.note(f"restic, compression {mode}", entry.column, sizes[1] - sizes[0])
        for name in entry.names if mode == "off" else []:
            restored = bench.work / "restored"
            with open(restored, "wb") as out:
                run(*quiet, "-r", repository, "dump", "latest", name, env=env, stdout=out)
            bench.prove("restic", entry.days[1] / name, restored)
        shutil.rmtree(repository)


def measure_borg(bench: Bench, entry: Set) -> None:
    """Take borg's own figure for the chunks that only the second archive has."""
    repository = bench.work / "borg"
    env = {
        "BORG_BASE_DIR": str(bench.work / "borg-home"),
        "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
    }
    variants: list[tuple[str, list[str]]] = [
        ("borg", []),
        ("borg, no compression", ["--compression", "none"]),
    ]
    for measured, options in variants:
        run("borg", "init", "--encryption", "none", repository, env=env)
        for day, folder in enumerate(entry.days, 1):
            place = f"{repository}::day{day}"
            run("borg", "create", *options, place, *entry.names, cwd=folder, env=env)
        info = json.loads(run("borg", "info", "--json", f"{repository}::day2", env=env))
        size = info["archives"][0]["stats"]["deduplicated_size"]
        bench.note(measured, entry.column, size)
        for name in entry.names if not options else []:
            restored = bench.work / "restored"
            with open(restored, "wb") as out:
                run("borg", "extract", "--stdout", f"{repository}::day2", name, env=env, stdout=out)
            bench.prove("borg", entry.days[1] / name, restored)
        shutil.rmtree(repository)
        shutil.rmtree(bench.work / "borg-home")


def measure_rdiff(bench: Bench, entry: Set) -> None:
    """Add up the sizes of the deltas."""
    signature, delta, restored = (bench.work / name for name in ("signature", "delta", "restored"))
    total = 0
    for old, new in entry.pairs():
        run("rdiff", "-f", "signature", old, signature)
        run("rdiff", "-f", "delta", signature, new, delta)
        total += delta.stat().st_size
        run("rdiff", "-f", "patch", old, delta, restored)
        bench.prove("rdiff", new, restored)
        signature.unlink()
        delta.unlink()
    bench.note("rdiff", entry.column, total)


def measure_xdelta3(bench: Bench, entry: Set, disks: Path) -> None:
    """Add up the sizes of the differences; an archive's goes all the way back to disks."""
    delta, restored = bench.work / "delta", bench.work / "restored"
    total = 0
    for old, new in entry.pairs():
        with bench.timed("xdelta3", entry):
            run("xdelta3", "-e", "-f", "-s", old, new, delta)
        total += delta.stat().st_size
        run("xdelta3", "-d", "-f", "-s", old, delta, restored)
        bench.prove("xdelta3", new, restored)
        if new.name.startswith(ARCHIVE):
            extract_difference(bench, old, delta, disks)
        delta.unlink()
    bench.note("xdelta3", entry.column, total)


def measure_diff(bench: Bench, entry: Set, disks: Path) -> None:
    """Take the size of the tool's own difference, which goes all the way back to disks."""
    delta, folder = bench.work / "difference.vmad", bench.work / "disks"
    total = 0
    for old, new in entry.pairs():
        with bench.timed(DIFF, entry):
            run(sys.executable, bench.tool, "diff", "-q", old, new, delta)
        total += delta.stat().st_size
        run(sys.executable, bench.tool, "extract", "-q", "--base", old, delta, folder)
        for name, file_name in DISKS.items():
            bench.prove(DIFF, disks / file_name, folder / f"disk-{name}.raw")
        shutil.rmtree(folder)
        delta.unlink()
    bench.note(DIFF, entry.column, total)


def extract_difference(bench: Bench, old: Path, delta: Path, disks: Path) -> None:
    """Pipe archive and difference through xdelta3 into extract, and compare the disks."""
    folder = bench.work / "disks"
    decode = ["xdelta3", "-d", "-c", "-s", str(old), str(delta)]
    with subprocess.Popen(decode, stdout=subprocess.PIPE) as xdelta3:
        run(
            sys.executable, bench.tool, "extract", "-", folder, stdin=cast(BinaryIO, xdelta3.stdout)
        )
    if xdelta3.returncode != 0:
        raise DedupError(f"xdelta3 -d: exit status {xdelta3.returncode}")
    for name, file_name in DISKS.items():
        bench.prove("xdelta3 -d | extract", disks / file_name, folder / f"disk-{name}.raw")
    shutil.rmtree(folder)


def measure_zstd(bench: Bench, entry: Set) -> None:
    """Take the size of patches, and what the second day adds to a stream with a window of 2 GiB."""
    patch = bench.work / "patch"
    total = 0
    for old, new in entry.pairs():
        run("zstd", "-q", "-f", "--long=31", f"--patch-from={old}", new, "-o", patch)
        total += patch.stat().st_size
        patch.unlink()
    bench.note("zstd --patch-from", entry.column, total)
    sizes = []
    for days in (entry.days[:1], entry.days):
        files = [str(folder / name) for folder in days for name in entry.names]
        with (
            open(patch, "wb") as out,
            subprocess.Popen(["cat", *files], stdout=subprocess.PIPE) as cat,
        ):
            run("zstd", "-q", "-c", "--long=31", stdin=cast(BinaryIO, cat.stdout), stdout=out)
        sizes.append(patch.stat().st_size)
        patch.unlink()
    bench.note("zstd --long=31", entry.column, sizes[1] - sizes[0])


def measure_fixed(bench: Bench, entry: Set) -> None:
    """Count the blocks of the second day that are neither zeros nor known already."""
    names = {4096: "4 KiB", 128 << 10: "128 KiB", MIB: "1 MiB"}
    known: dict[int, set[bytes]] = {size: set() for size in names}
    new = dict.fromkeys(names, 0)
    zeros = bytes(MIB)
    for day, folder in enumerate(entry.days):
        for name in entry.names:
            with open(folder / name, "rb") as file:
                while piece := file.read(MIB):
                    if piece == zeros:
                        continue
                    for size, hashes in known.items():
                        for at in range(0, len(piece), size):
                            block = piece[at : at + size]
                            digest = hashlib.sha256(block).digest()[:16]
                            if digest not in hashes and block != zeros[: len(block)]:
                                hashes.add(digest)
                                new[size] += len(block) * day
    for size, text in names.items():
        bench.note(f"fixed blocks of {text}", entry.column, new[size])


def measure(bench: Bench, sets: list[Set]) -> None:
    disks = sets[-1].days[1]
    for entry in sets:
        size = sum((entry.days[1] / name).stat().st_blocks * 512 for name in entry.names)
        bench.note("the second day itself", entry.column, size)
        for program, job in (
            ("restic", measure_restic),
            ("borg", measure_borg),
            ("rdiff", measure_rdiff),
            ("fixed blocks", measure_fixed),
            ("zstd", measure_zstd),
        )[: None if entry.column in COLUMNS else 3]:
            say(f"{entry.column}: {program}")
            job(bench, entry)
        if entry.column not in COLUMNS:
            continue
        say(f"{entry.column}: xdelta3")
        measure_xdelta3(bench, entry, disks)
        if entry.column != RAW:
            say(f"{entry.column}: {DIFF}")
            measure_diff(bench, entry, disks)


# ---- telling ------------------------------------------------------------------------------------

ROWS = [
    "restic, compression off",
    "restic, compression auto",
    "borg",
    "borg, no compression",
    "rdiff",
    "xdelta3",
    "zstd --patch-from",
    "zstd --long=31",
    "fixed blocks of 4 KiB",
    "fixed blocks of 128 KiB",
    "fixed blocks of 1 MiB",
    "the second day itself",
]


def number(size: float) -> str:
    """Return a size in MiB, with a decimal where it is small."""
    return f"{size / MIB:.1f}" if size < 99.95 * MIB else f"{size / MIB:.0f}"


def markdown(table: dict[str, dict[str, float]], columns: Sequence[str]) -> str:
    """Return the rows that all of these columns have."""
    lines = [f"| MiB | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in ROWS:
        if not set(columns) <= set(table[row]):
            continue
        cells = [number(table[row][column]) for column in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(bench: Bench) -> str:
    """Return the table of the programs that make a difference of two archives."""
    lines = [f"| | {' | '.join(COLUMNS[:-1])} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for program in ("xdelta3", DIFF):
        sizes = [number(bench.table[program][column]) for column in COLUMNS[:-1]]
        seconds = [f"{bench.seconds[program][column]:.1f}" for column in COLUMNS[:-1]]
        lines.append(f"| {program}, MiB | {' | '.join(sizes)} |")
        lines.append(f"| {program}, seconds | {' | '.join(seconds)} |")
    return "\n".join(lines)


def goals(table: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for row, column, limit, other in GOALS:
        factor = table[row][column] / table[row][other]
        met = "met" if factor <= limit else "MISSED"
        lines.append(f"{met}: {row}, {column}: {factor:.2f} x {other} (goal {limit} x)")
    return lines


def svg(table: dict[str, dict[str, float]]) -> str:
    """Draw what three programs store of the three forms as bars, all to one scale."""
    largest = max(table[row][form] for row in PICTURE_ROWS for form in FORMS)
    left, width, bar, top = 100, 500, 20, 64
    group = len(FORMS) * (bar + 2) + 18
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 '
        f'{top + len(PICTURE_ROWS) * group}" font-family="sans-serif" font-size="14">',
        "<style>text { fill: #1f2328 } .plain { fill: #cf222e } .optimized { fill: #0969da } "
        ".compressed { fill: #1a7f37 } @media (prefers-color-scheme: dark) { text { fill: #e6edf3 }"
        " .plain { fill: #f85149 } .optimized { fill: #4493f8 } .compressed { fill: #3fb950 } }"
        "</style>",
        '<text x="0" y="18" font-size="16" font-weight="bold">'
        "New data that the second day's backup of a guest costs, MiB</text>",
    ]
    x = left
    for style, title in FORMS.values():
        out.append(f'<rect class="{style}" x="{x}" y="34" width="14" height="14" rx="2"/>')
        out.append(f'<text x="{x + 20}" y="46">{title}</text>')
        x += 36 + 8 * len(title)
    for line, row in enumerate(PICTURE_ROWS):
        y = top + line * group
        middle = y + len(FORMS) * (bar + 2) // 2 + 4
        out.append(f'<text x="0" y="{middle}" font-weight="bold">{row.split(",")[0]}</text>')
        for place, (form, (style, _)) in enumerate(FORMS.items()):
            size = table[row][form]
            length = max(1.0, width * size / largest)
            at = y + place * (bar + 2)
            out.append(
                f'<rect class="{style}" x="{left}" y="{at}" width="{length:.1f}" height="{bar}" '
                f'rx="2"/><text x="{left + length + 6:.1f}" y="{at + 15}">{number(size)}</text>'
            )
    return "\n".join([*out, "</svg>", ""])


def versions() -> str:
    """Return the programs' own first line about their version."""
    texts = []
    for program, option in (
        ("restic", "version"),
        ("borg", "--version"),
        ("rdiff", "--version"),
        ("xdelta3", "-V"),
        ("zstd", "--version"),
        ("mke2fs", "-V"),
    ):
        done = subprocess.run([program, option], capture_output=True, text=True, check=False)
        line = (done.stdout + done.stderr).strip().splitlines()[0]
        version = re.search(r"\d+\.\d+(\.\d+)*", line)
        texts.append(f"{program} {version.group() if version else line}")
    return ", ".join([*texts, f"Python {platform.python_version()}"])


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Measure what the second backup of a guest costs with restic, borg and others."
    )
    parser.add_argument("--size", choices=SCALES, default="normal", help="default: normal")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw a picture")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work; default: TMPDIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in a new DIR and keep it")
    parser.add_argument("--rootfs", type=Path, metavar="TAR", help="a root file system made before")
    parser.add_argument(
        "--tool", type=Path, metavar="FILE", default=TOOL, help="vma_tool.py to use"
    )
    args = parser.parse_args()
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        print(f"dedup.py: not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    if args.keep:
        args.keep.mkdir(parents=True)
    work = args.keep or Path(tempfile.mkdtemp(prefix="dedup-", dir=args.work))
    bench = Bench(work.resolve(), args.tool.resolve())
    try:
        sets, origin = make_sets(bench.work, SCALES[args.size], args.rootfs, bench.tool)
        measure(bench, sets)
    except (DedupError, OSError) as error:
        print(f"dedup.py: {error}", file=sys.stderr)
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)

    print(f"New data that the second day's backup costs, MiB (--size {args.size}; {origin}).\n")
    print(markdown(bench.table, COLUMNS))
    print("\nCompressed archives, and what zstd makes of them as they were written:\n")
    print(markdown(bench.table, COMPRESSED))
    print("\nA difference of both archives, and the time that it takes to make it:\n")
    print(differences(bench))
    print(f"\n{versions()}\n")
    print("\n".join(goals(bench.table)))
    same = bench.restored - len(bench.wrong)
    print(f"{same} of {bench.restored} restored files are identical to what was stored")
    if args.svg:
        args.svg.write_text(svg(bench.table))
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
