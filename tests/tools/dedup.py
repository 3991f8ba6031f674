#!/usr/bin/env python3
"""Measure what the daily backups of a guest cost, with the programs that people use.

Makes days in a row of one guest: a GPT disk with a Debian root file system on ext4, each day's
changes written into that file system in place, an EFI disk and a TPM disk. Each day is written as
an archive as a live backup writes it: its own uuid and ctime, clusters in the order in which 16
readers finish, some of them early. Then restic, borg, rdiff and a count of fixed blocks tell how
much new data all days but the first are together: for the raw disks, for the archives as written,
for what `vma_tool.py optimize` makes of them, plain and compressed, and for one zstd frame. What
comes back from restic, borg, rdiff and `vma_tool.py diff` is compared byte by byte, and verified.
The price is told as well: how many chunks restic and borg keep, and how much memory borg takes.

    python3 tests/tools/dedup.py  the table of the README, in about twenty minutes
    python3 tests/tools/dedup.py --size small  a smaller guest, in under ten minutes
    python3 tests/tools/dedup.py --svg tests/data/dedup.svg  its picture as well

Needs no root and mounts nothing, though mmdebstrap may want user namespaces. The Debian packages:
mmdebstrap e2fsprogs restic borgbackup rdiff zstd. Exit status: 1 if optimized archives cost restic
more than 0.9 x what the raw disks cost, if something that was restored is not what was stored, or
if a program failed; a goal missed by others is only told.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import archives
from tests.archives import MIB

PARTITION = 1 * MIB  # where the root file system begins on the disk
TOOL = Path(__file__).resolve().parents[2] / "vma_tool.py"
PROGRAMS = ["mke2fs", "debugfs", "e2fsck", "restic", "borg", "rdiff", "zstd", "tar"]
DAYS = 6
RAW, WRITTEN, FRAMES, ONE_FRAME = "raw disks", "as written", ".vma.zst", "one zstd frame"
DEFAULT = "--align 512K"
ALIGNS = ["--align 4K", "--align 128K", DEFAULT, "--align 1M"]
COLUMNS = [RAW, WRITTEN, *ALIGNS, FRAMES, ONE_FRAME]
RESTIC, RESTIC_OFF, RDIFF = "restic", "restic, no compression", "rdiff"
# borg's --chunker-params: 2 MiB on average by default, then two with smaller chunks
BORG = "borg"
BORG_512K, BORG_256K = "borg, `buzhash,19,23,19,4095`", "borg, `buzhash,16,21,18,4095`"
BORG_ROWS = [BORG, BORG_512K, BORG_256K]
BORG_COLUMNS = [RAW, WRITTEN, DEFAULT, FRAMES, ONE_FRAME]
FIXED = {128 << 10: "fixed blocks of 128 KiB", MIB: "fixed blocks of 1 MiB"}
SIZE = "size of the last day's"
ROWS = [RESTIC, RESTIC_OFF, *BORG_ROWS, RDIFF, *FIXED.values(), SIZE]
FACTORS = [DEFAULT, FRAMES]  # the columns that are also told as multiples of the raw disks
# The picture: these rows and their titles; of each these columns, with a style and a title
PICTURE_ROWS = {RESTIC: "restic", BORG_512K: "borg", RDIFF: "rdiff"}
FORMS = {
    WRITTEN: ("plain", "as vzdump writes it"),
    FRAMES: ("compressed", "optimized, .vma.zst"),
    DEFAULT: ("optimized", "optimized"),
}
ARCHIVE = "vzdump-qemu-100.vma"
DISKS = {"drive-efidisk0": "efidisk0.raw", "drive-scsi0": "scsi0.raw", "drive-tpmstate0": "tpm.raw"}

# (row, column, limit, other): the figure is at most so many times that of the other column. The
# first one must be met.
GOALS = [
    (RESTIC, DEFAULT, 0.9, RAW),
    (BORG, DEFAULT, 1.1, RAW),
    (BORG_512K, DEFAULT, 1.1, RAW),
    (BORG_256K, DEFAULT, 1.1, RAW),
    (RDIFF, DEFAULT, 1.1, RAW),
    (FIXED[128 << 10], DEFAULT, 1.15, RAW),
    (FIXED[MIB], "--align 1M", 1.3, RAW),
    (RESTIC, FRAMES, 0.65, ONE_FRAME),
    (RDIFF, FRAMES, 0.5, ONE_FRAME),
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


def data_size(path: Path) -> int:
    """Return how many bytes are in blocks that are not all zeros, hole or not."""
    size = 0
    with open(path, "rb") as file:
        while piece := file.read(archives.BLOCK):
            size += len(piece) if any(piece) else 0
    return size


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
        disk=1536 * MIB,
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


def next_day(
    number: int, folder: Path, work: Path, scale: Scale, packages: list[str], photos: list[str]
) -> None:
    """Let a day happen to the disks in folder, which are copies of the last day's.

    `photos` are the files that are there; days are counted from 1, the day of `first_day`.
    """
    rng = random.Random(number)
    scratch = work / "scratch"
    scratch.mkdir()
    system = FileSystem(folder / DISKS["drive-scsi0"], scratch)

    count = max(2, scale.photos // 10)
    deleted = rng.sample(photos, count)
    system.remove_and_trim(deleted, 0.5)
    photos[:] = [path for path in photos if path not in deleted]
    for photo in range(count):
        photos.append(f"/srv/photos/{number}-{photo:04}.jpg")
        system.create(photos[-1], rng.randbytes(rng.randint(100_000, 4_000_000)))

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
    log = number % scale.segments
    system.overwrite(f"/var/lib/database/log.{log}", {0: rng.randbytes(5 * MIB)})
    journal = f"/var/log/journal/system@{scale.segments - 1}.journal"
    system.overwrite(journal, {0: rng.randbytes(256), number % 7 * MIB: log_lines(rng, MIB)})
    system.overwrite("<8>", {(512 << 10) + number % 2 * MIB: log_lines(rng, MIB)})
    system.check()
    scratch.rmdir()

    with open(folder / DISKS["drive-efidisk0"], "r+b") as file:
        file.seek(9000)
        file.write(rng.randbytes(120))
    with open(folder / DISKS["drive-tpmstate0"], "r+b") as file:
        file.seek(8192)
        file.write(rng.randbytes(300))


# ---- archives -----------------------------------------------------------------------------------


@dataclass
class Set:
    """One column of the table: a folder for each day, with the same file names in all."""

    column: str
    days: list[Path]

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.days[0].iterdir())


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


def make_guest(work: Path, scale: Scale, tar: Path | None, day_count: int) -> tuple[Set, Set, str]:
    """Make the guest's days: its raw disks, its archives, and what it was made of."""
    raw, written = (
        Set(column, [work / name / f"day{day}" for day in range(1, day_count + 1)])
        for column, name in ((RAW, "raw"), (WRITTEN, "written"))
    )
    origin, packages = first_day(raw.days[0], work, scale, tar, random.Random(1))
    photos = [f"/srv/photos/{number:04}.jpg" for number in range(scale.photos)]
    for day, folder in enumerate(raw.days, 1):
        say(f"day {day}")
        if day > 1:
            folder.mkdir()
            for file_name in DISKS.values():
                run("cp", "--sparse=always", raw.days[day - 2] / file_name, folder / file_name)
            next_day(day, folder, work, scale, packages, photos)
        written.days[day - 1].mkdir(parents=True)
        write_archive(folder, written.days[day - 1] / ARCHIVE, day)
    return raw, written, origin


def make_set(bench: Bench, written: Set, column: str) -> Set:
    """Make the archives of a column of those as they were written."""
    entry = Set(column, [bench.work / "column" / folder.name for folder in written.days])
    for source, folder in zip(written.days, entry.days):
        folder.mkdir(parents=True)
        command: list[str | Path] = [sys.executable, bench.tool, "optimize", source / ARCHIVE]
        target = folder / f"{ARCHIVE}.zst"
        if column == ONE_FRAME:
            command = ["zstd", "-q", source / ARCHIVE, "-o"]
        elif column in ALIGNS:
            command[2:3] = ["optimize", *column.split()]
            target = folder / ARCHIVE
        run(*command, target)
        run(sys.executable, bench.tool, "verify", folder)
    return entry


# ---- measuring ----------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all the measurements need: where to work, the tool, and the results so far."""

    work: Path
    tool: Path
    table: dict[str, dict[str, float]] = field(default_factory=dict)
    chunks: dict[str, dict[str, float]] = field(default_factory=dict)  # a GiB of different data
    remarks: list[str] = field(default_factory=list)
    restored: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, row: str, column: str, size: float) -> None:
        self.table.setdefault(row, {})[column] = size

    def note_chunks(self, row: str, column: str, count: int, size: int) -> None:
        self.chunks.setdefault(row, {})[column] = count / size * (1 << 30)

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
    """Take the growth of a repository by all backups but the first, of the same file names.

    Where restic cuts depends on a polynomial that is drawn for each new repository; all columns
    start from copies of one repository, so that they differ by their data only.
    """
    template, repository = bench.work / "restic-template", bench.work / "restic"
    env = {"RESTIC_PASSWORD": "measurement"}
    restic = ["restic", "--no-cache", "--quiet", "-r", str(repository)]
    if not template.exists():
        run("restic", "--no-cache", "--quiet", "init", "-r", template, env=env)
    for row, mode in ((RESTIC_OFF, "off"), (RESTIC, "auto")):
        shutil.copytree(template, repository)
        sizes = []
        for folder in entry.days:
            run(*restic, "--compression", mode, "backup", *entry.names, cwd=folder, env=env)
            sizes.append(tree_size(repository))
        bench.note(row, entry.column, sizes[-1] - sizes[0])
        if mode == "off":  # so that the size is that of the data
            stats = json.loads(run(*restic, "stats", "--mode", "raw-data", "--json", env=env))
            bench.note_chunks(RESTIC, entry.column, stats["total_blob_count"], stats["total_size"])
        for name in entry.names if mode == "auto" else []:
            restored = bench.work / "restored"
            with open(restored, "wb") as out:
                run(*restic, "dump", "latest", name, env=env, stdout=out)
            bench.prove("restic", entry.days[-1] / name, restored)
        shutil.rmtree(repository)


def borg_environment(work: Path) -> dict[str, str]:
    """Return variables with which borg writes into its own folder below work, and asks nothing."""
    home = str(work / "borg-home")
    return {"BORG_BASE_DIR": home, "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}


def borg_stats(repository: Path, env: Mapping[str, str]) -> dict[str, int]:
    """Return what borg counts in a repository: unique_size, total_unique_chunks and others."""
    info = json.loads(run("borg", "info", "--json", repository, env=env))
    return cast("dict[str, int]", info["cache"]["stats"])


def measure_borg(bench: Bench, entry: Set, row: str) -> None:
    """Take the growth of what borg stores by all archives but the first."""
    repository, env = bench.work / "borg", borg_environment(bench.work)
    options = ["--chunker-params", row.split("`")[1]] if "`" in row else []
    run("borg", "init", "--encryption", "none", repository, env=env)
    sizes = []
    for folder in entry.days:
        place = f"{repository}::{folder.name}"
        run("borg", "create", *options, place, *entry.names, cwd=folder, env=env)
        stats = borg_stats(repository, env)
        sizes.append(stats["unique_csize"])
    bench.note(row, entry.column, sizes[-1] - sizes[0])
    bench.note_chunks(row, entry.column, stats["total_unique_chunks"], stats["unique_size"])
    for name in entry.names:
        restored = bench.work / "restored"
        with open(restored, "wb") as out:
            run("borg", "extract", "--stdout", place, name, env=env, stdout=out)
        bench.prove("borg", entry.days[-1] / name, restored)
    shutil.rmtree(repository)
    shutil.rmtree(env["BORG_BASE_DIR"])


def borg_memory(work: Path) -> float:
    """Return the bytes of memory that borg takes for each chunk of a file when it stores it.

    Two files of random data in chunks of some 3 KiB: the second has as many as 1 TiB in chunks of
    1.5 MiB. The difference of the two peaks leaves out what borg needs for any file.
    """
    repository, source, env = work / "borg", work / "random", borg_environment(work)
    peak = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
    peak += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    options = ["--compression", "none", "--chunker-params", "buzhash,10,16,11,4095"]
    peaks, counts = [], []
    for size in (64, 2048):
        with open(source, "wb") as file:
            for _ in range(size):
                file.write(os.urandom(MIB))
        run("borg", "init", "--encryption", "none", repository, env=env)
        create = ["borg", "create", *options, f"{repository}::random", str(source)]
        peaks.append(int(run(sys.executable, "-c", peak, *create, env=env)))
        counts.append(borg_stats(repository, env)["total_unique_chunks"])
        shutil.rmtree(repository)
        shutil.rmtree(env["BORG_BASE_DIR"])
    source.unlink()
    return (peaks[1] - peaks[0]) / (counts[1] - counts[0])


def measure_rdiff(bench: Bench, entry: Set) -> None:
    """Add up the sizes of the deltas from each day to the next."""
    signature, delta, restored = (bench.work / name for name in ("signature", "delta", "restored"))
    total = 0
    for before, after in zip(entry.days, entry.days[1:]):
        for name in entry.names:
            run("rdiff", "-f", "signature", before / name, signature)
            run("rdiff", "-f", "delta", signature, after / name, delta)
            total += delta.stat().st_size
            run("rdiff", "-f", "patch", before / name, delta, restored)
            bench.prove(RDIFF, after / name, restored)
    bench.note(RDIFF, entry.column, total)


def measure_fixed(bench: Bench, entry: Set) -> None:
    """Count the blocks of all days but the first that are neither zeros nor known already."""
    known: dict[int, set[bytes]] = {size: set() for size in FIXED}
    new = dict.fromkeys(FIXED, 0)
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
                                new[size] += len(block) if day else 0
    for size, row in FIXED.items():
        bench.note(row, entry.column, new[size])


def measure_diff(bench: Bench, entry: Set, raw: Set) -> None:
    """Take the sizes of differences from the first day, each of which gives the day's disks."""
    delta, folder = bench.work / "difference.vmad", bench.work / "disks"
    base = entry.days[0] / ARCHIVE
    sizes, seconds = [], 0.0
    for day, disks in zip(entry.days[1:], raw.days[1:]):
        start = time.monotonic()
        run(sys.executable, bench.tool, "diff", "-q", base, day / ARCHIVE, delta)
        seconds += time.monotonic() - start
        sizes.append(delta.stat().st_size)
        run(sys.executable, bench.tool, "extract", "-q", "--base", base, delta, folder)
        for name, file_name in DISKS.items():
            bench.prove("diff", disks / file_name, folder / f"disk-{name}.raw")
        shutil.rmtree(folder)
        delta.unlink()
    bench.remarks.append(
        f"vma-tool diff from day 1, MiB: {', '.join(map(number, sizes))}; "
        f"{seconds / len(sizes):.1f} s each"
    )


def measure(bench: Bench, entry: Set) -> None:
    files = [entry.days[-1] / name for name in entry.names]
    # A raw disk is as large as what is in it; an archive is sent with its holes.
    sizes = [data_size(file) if entry.column == RAW else file.stat().st_size for file in files]
    bench.note(SIZE, entry.column, sum(sizes))
    say(f"{entry.column}: restic")
    measure_restic(bench, entry)
    for row in BORG_ROWS if entry.column in BORG_COLUMNS else ():
        say(f"{entry.column}: {row}")
        measure_borg(bench, entry, row)
    say(f"{entry.column}: rdiff, fixed blocks")
    measure_rdiff(bench, entry)
    measure_fixed(bench, entry)


def measure_all(bench: Bench, raw: Set, written: Set) -> None:
    """Measure all columns; only one of optimized archives is on the disk at a time."""
    for column in COLUMNS:
        if column in (RAW, WRITTEN):
            measure(bench, raw if column == RAW else written)
            continue
        say(f"{column}: making the archives")
        entry = make_set(bench, written, column)
        measure(bench, entry)
        if column == DEFAULT:
            say("diff")
            measure_diff(bench, entry, raw)
        shutil.rmtree(bench.work / "column")
    say("borg's memory")
    each = borg_memory(bench.work)
    bench.remarks.append(f"borg create: {each:.0f} bytes of memory a chunk")
    for row in BORG_ROWS:
        memory = bench.chunks[row][DEFAULT] * 1024 * each / (1 << 30)
        bench.remarks.append(f"{row}: {memory:.1f} GiB of memory a TiB, {DEFAULT}")


# ---- telling ------------------------------------------------------------------------------------


def number(size: float) -> str:
    """Return a size in MiB, with a decimal where it is small."""
    return f"{size / MIB:.1f}" if size < 99.95 * MIB else f"{size / MIB:.0f}"


def markdown(table: dict[str, dict[str, float]]) -> str:
    """Return the table; its last columns say what the raw disks' figures are multiplied by."""
    columns = [*COLUMNS, *(f"{column}, x raw disks" for column in FACTORS)]
    lines = [f"| MiB | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in ROWS:
        figures = table[row]
        cells = [number(figures[c]) if c in figures else "" for c in COLUMNS]
        cells += [f"{figures[c] / figures[RAW]:.2f}" for c in FACTORS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def chunk_table(chunks: dict[str, dict[str, float]]) -> str:
    lines = [f"| chunks a GiB | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for row, counts in chunks.items():
        cells = [f"{counts[c]:.0f}" if c in counts else "" for c in COLUMNS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def goals(table: dict[str, dict[str, float]]) -> list[str]:
    lines = []
    for row, column, limit, other in GOALS:
        factor = table[row][column] / table[row][other]
        met = "met" if factor <= limit else "MISSED"
        lines.append(f"{met}: {row}, {column}: {factor:.2f} x {other} (goal {limit} x)")
    return lines


def svg(table: dict[str, dict[str, float]], day_count: int) -> str:
    """Draw what three programs store of three forms as bars, and of raw disks as a line."""
    left, bar, top = 70, 20, 84
    unit = 480 / max(table[row][form] for row in PICTURE_ROWS for form in FORMS)  # pixels a byte
    group = len(FORMS) * (bar + 2) + 18
    height = top + len(PICTURE_ROWS) * group
    # A background of its own: a page may be dark where the reader's system is light.
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}" '
        'font-family="sans-serif" font-size="14">',
        "<style>text { fill: #1f2328 } .plain { fill: #cf222e } .optimized { fill: #0969da } "
        ".compressed { fill: #1a7f37 } .raw { stroke: #1f2328; stroke-width: 2; "
        "stroke-dasharray: 5 3 }</style>",
        f'<rect width="760" height="{height}" rx="8" fill="#ffffff"/>',
        '<text x="16" y="26" font-size="16" font-weight="bold">'
        f"What days 2 to {day_count} of a guest add: MiB, and times the raw disks</text>",
    ]
    x = 16
    for style, title in FORMS.values():
        out.append(f'<rect class="{style}" x="{x}" y="40" width="14" height="14" rx="2"/>')
        out.append(f'<text x="{x + 20}" y="52">{title}</text>')
        x += 40 + 8 * len(title)
    out.append(f'<line class="raw" x1="{x}" y1="47" x2="{x + 18}" y2="47"/>')
    out.append(f'<text x="{x + 24}" y="52">raw disks</text>')
    for place, (row, title) in enumerate(PICTURE_ROWS.items()):
        y = top + place * group
        raw = table[row][RAW]
        line = left + unit * raw
        middle = y + len(FORMS) * (bar + 2) // 2 + 4
        out.append(f'<text x="16" y="{middle}" font-weight="bold">{title}</text>')
        for at, (form, (style, _)) in enumerate(FORMS.items()):
            size = table[row][form]
            length, edge = max(1.0, unit * size), y + at * (bar + 2)
            out.append(
                f'<rect class="{style}" x="{left}" y="{edge}" width="{length:.1f}" '
                f'height="{bar}" rx="2"/><text x="{max(left + length, line) + 8:.1f}" '
                f'y="{edge + 15}">{number(size)}, {size / raw:.2f} x</text>'
            )
        ends = y - 4, y + len(FORMS) * (bar + 2) + 2
        out.append(
            f'<line class="raw" x1="{line:.1f}" y1="{ends[0]}" x2="{line:.1f}" y2="{ends[1]}"/>'
        )
    return "\n".join([*out, "</svg>", ""])


def versions() -> str:
    """Return the programs' own first line about their version."""
    texts = []
    for program, option in (
        ("restic", "version"),
        ("borg", "--version"),
        ("rdiff", "--version"),
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
        description="Measure what daily backups of a guest cost with restic, borg and others."
    )
    parser.add_argument("--days", type=int, default=DAYS, help=f"in a row; default: {DAYS}")
    parser.add_argument("--size", choices=SCALES, default="normal", help="default: normal")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw a picture")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where to work; default: TMPDIR")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in a new DIR and keep it")
    parser.add_argument("--rootfs", type=Path, metavar="TAR", help="a root file system made before")
    parser.add_argument(
        "--tool", type=Path, metavar="FILE", default=TOOL, help="vma_tool.py to use"
    )
    args = parser.parse_args()
    if args.days < 2:
        parser.error("--days: at least 2")
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if missing:
        print(f"dedup.py: not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    if args.keep:
        args.keep.mkdir(parents=True)
    work = args.keep or Path(tempfile.mkdtemp(prefix="dedup-", dir=args.work))
    bench = Bench(work.resolve(), args.tool.resolve())
    try:
        raw, written, origin = make_guest(bench.work, SCALES[args.size], args.rootfs, args.days)
        measure_all(bench, raw, written)
    except (DedupError, OSError) as error:
        print(f"dedup.py: {error}", file=sys.stderr)
        return 1
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)

    print(f"New data of days 2 to {args.days}, MiB (--size {args.size}; {origin}).\n")
    print(markdown(bench.table))
    print("", chunk_table(bench.chunks), "", *bench.remarks, "", versions(), "", sep="\n")
    print("\n".join(goals(bench.table)))
    same = bench.restored - len(bench.wrong)
    print(f"{same} of {bench.restored} restored files are identical to what was stored")
    if args.svg:
        args.svg.write_text(svg(bench.table, args.days))
    row, column, limit, other = GOALS[0]
    failed = bench.table[row][column] > limit * bench.table[row][other]
    if failed:
        print(f"dedup.py: {column} costs {row} more than {limit} x {other}", file=sys.stderr)
    return 1 if bench.wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
