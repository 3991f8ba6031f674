"""Temporary home of the section "mount" of vma_tool.py."""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Callable, NamedTuple, Union

from vma_tool import BLOCK_SIZE, CLUSTER_SIZE, VmaError, escape, naming, print_error, reason

Buffer = Union[bytes, bytearray, memoryview]

# BEGIN
# ---------------------------------------------------------------------------------------------
# Mount: files in a directory, served through /dev/fuse. The protocol is the kernel's own
# (linux/fuse.h, version 7.31), which promises to stay; the names are those of its structs. All
# numbers are in the host's byte order.

FUSE_VERSION = (7, 31)
FUSE_ROOT_ID = 1
FUSE_LOOKUP, FUSE_FORGET, FUSE_GETATTR, FUSE_OPEN, FUSE_READ = 1, 2, 3, 14, 15
FUSE_STATFS, FUSE_RELEASE, FUSE_INIT, FUSE_OPENDIR, FUSE_READDIR = 17, 18, 26, 27, 28
FUSE_RELEASEDIR, FUSE_INTERRUPT, FUSE_DESTROY, FUSE_BATCH_FORGET, FUSE_LSEEK = 29, 36, 38, 42, 46
FUSE_ASYNC_READ, FUSE_PARALLEL_DIROPS, FUSE_MAX_PAGES = 1 << 0, 1 << 18, 1 << 22
FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR = 1 << 1, 1 << 3
# len, opcode, unique, nodeid, uid, gid, pid, padding; then what the opcode needs
FUSE_IN_HEADER = struct.Struct("=IIQQIII4x")
FUSE_OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
FUSE_INIT_IN = struct.Struct("=IIII")  # major, minor, max_readahead, flags
# major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran,
# max_pages
FUSE_INIT_OUT = struct.Struct("=IIIIHHIIH34x")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize
FUSE_ATTR = struct.Struct("=QQQqqq12xIIII4xI4x")
FUSE_ENTRY_OUT = struct.Struct("=QQQQ8x")  # nodeid, generation, entry_valid, attr_valid; then attr
FUSE_ATTR_OUT = struct.Struct("=Q8x")  # attr_valid; then attr
FUSE_OPEN_IN = struct.Struct("=I4x")  # flags
FUSE_OPEN_OUT = struct.Struct("=QI4x")  # fh, open_flags
FUSE_READ_IN = struct.Struct("=8xQI")  # offset, size; of lseek: offset, whence
FUSE_LSEEK_OUT = struct.Struct("=Q")  # offset
FUSE_DIRENT = struct.Struct("=QQII")  # ino, off, namelen, type; then the name, filled up to 8
# blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
FUSE_STATFS_OUT = struct.Struct("=QQQQQIII28x")

FUSE_REQUEST_SIZE = 64 << 10  # the kernel asks for at least 8 KiB
FUSE_MAX_READ = 1 << 20
FUSE_THREADS = 4
FUSE_VALID = 1 << 30  # seconds for which the kernel may remember what never changes
FILE_NAME_MAX = 255

MS_RDONLY, MS_NOSUID, MS_NODEV = 1, 2, 4
MNT_DETACH = 2
MOUNT_OPTIONS = {"ro": 0, "nosuid": 0, "nodev": 0, "noexec": 8, "noatime": 1024, "allow_other": 0}
BUSY_SECONDS = 2.0  # a loop device lets go of its file a moment after its own unmount
# SIGCHLD says that a thread or the command has ended; by default nothing happens at it.
MOUNT_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


class ServedFile(NamedTuple):
    """A file of the mount. Sizes and offsets are bytes inside of it.

    `read(offset, size, buffer)` returns exactly so many bytes, in the buffer (FUSE_MAX_READ and two
    clusters) or elsewhere. `seek(offset, data)` returns where the next data or the next hole is.
    """

    name: bytes
    size: int
    allocated: int
    read: Callable[[int, int, memoryview], Buffer]
    seek: Callable[[int, bool], int]


Reply = Union[Sequence[Buffer], int, None]  # data, an errno, or no answer


class FuseServer:
    """Answers the kernel's requests about one directory of files that never change.

    Whatever happens, a request gets an answer: the program that waits for it could not be killed.
    """

    def __init__(
        self, fd: int, files: Sequence[ServedFile], mode: int, ctime: int, log: Callable[[str], None]
    ) -> None:
        self.fd = fd
        self.log = log
        self.files = dict(enumerate(files, FUSE_ROOT_ID + 1))
        self.nodes = {file.name: node for node, file in self.files.items()}
        self.listing = [(FUSE_ROOT_ID, b".", stat.S_IFDIR), (FUSE_ROOT_ID, b"..", stat.S_IFDIR)]
        self.listing += [(node, file.name, stat.S_IFREG) for node, file in self.files.items()]
        owner = os.getuid(), os.getgid()

        def attributes(node: int, size: int, allocated: int, kind: int, links: int) -> bytes:
            blocks = -(-allocated // 512)
            return FUSE_ATTR.pack(
                node, size, blocks, ctime, ctime, ctime, kind, links, *owner, CLUSTER_SIZE
            )

        # Who may read a file may enter the directory.
        directory = stat.S_IFDIR | mode | mode >> 2
        self.attributes = {FUSE_ROOT_ID: attributes(FUSE_ROOT_ID, 0, 0, directory, 2)}
        for node, file in self.files.items():
            regular = stat.S_IFREG | mode
            self.attributes[node] = attributes(node, file.size, file.allocated, regular, 1)
        self.handlers: dict[int, Callable[[int, memoryview, memoryview], Reply]] = {
            FUSE_INIT: self._init,
            FUSE_LOOKUP: self._lookup,
            FUSE_GETATTR: lambda node, *_: [
                FUSE_ATTR_OUT.pack(FUSE_VALID) + self.attributes[node]
            ],
            FUSE_OPEN: self._open,
            FUSE_OPENDIR: lambda *_: [FUSE_OPEN_OUT.pack(0, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR)],
            FUSE_READ: self._read,
            FUSE_READDIR: self._read_directory,
            FUSE_LSEEK: self._seek,
            FUSE_STATFS: self._status,
            FUSE_RELEASE: lambda *_: [],
            FUSE_RELEASEDIR: lambda *_: [],
            FUSE_DESTROY: lambda *_: [],
            FUSE_FORGET: lambda *_: None,
            FUSE_BATCH_FORGET: lambda *_: None,
            FUSE_INTERRUPT: lambda *_: None,  # the answer comes soon anyway
        }

    def serve(self) -> None:
        """Answer requests until the directory is unmounted; several threads do so at once."""
        request = memoryview(bytearray(FUSE_REQUEST_SIZE))
        buffer = memoryview(bytearray(FUSE_MAX_READ + 2 * CLUSTER_SIZE))
        while True:
            try:
                size = os.readv(self.fd, [request])
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EAGAIN):  # a request that was taken back
                    continue
                if error.errno != errno.ENODEV:  # unmounted
                    self.log(f"/dev/fuse: {reason(error)}")
                return
            self._answer(request[:size], buffer)

    def _answer(self, request: memoryview, buffer: memoryview) -> None:
        _, opcode, unique, node, *_ = FUSE_IN_HEADER.unpack_from(request)
        # The kernel does without what is not here, and mostly never asks again.
        handler = self.handlers.get(opcode, lambda *_: errno.ENOSYS)
        try:
            reply = handler(node, request[FUSE_IN_HEADER.size :], buffer)
            if reply is not None:
                self._send(unique, reply)
        except Exception as error:  # noqa: BLE001 - else the request would stay without an answer
            name = self.files[node].name if node in self.files else b"directory"
            expected = isinstance(error, (VmaError, OSError))
            self.log(f"{escape(os.fsdecode(name))}: {error if expected else repr(error)}")
            self._send(unique, errno.EIO)

    def _send(self, unique: int, reply: Sequence[Buffer] | int) -> None:
        error, data = (-reply, ()) if isinstance(reply, int) else (0, reply)
        size = FUSE_OUT_HEADER.size + sum(map(len, data))
        try:
            os.writev(self.fd, [FUSE_OUT_HEADER.pack(size, error, unique), *data])
        except OSError as failure:
            # Whoever asked was killed meanwhile, or the directory was unmounted.
            if failure.errno not in (errno.ENOENT, errno.ENODEV):
                raise

    def _init(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        major, _, max_readahead, flags = FUSE_INIT_IN.unpack_from(body)
        if major < FUSE_VERSION[0]:
            return errno.EPROTO
        flags &= FUSE_ASYNC_READ | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES
        background = 16, 12  # requests that nobody waits for: reading ahead
        pages = FUSE_MAX_READ // os.sysconf("SC_PAGE_SIZE")
        sizes = max(max_readahead, FUSE_MAX_READ), flags, *background, BLOCK_SIZE, 1, pages
        return [FUSE_INIT_OUT.pack(*FUSE_VERSION, *sizes)]

    def _lookup(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        found = self.nodes.get(bytes(body).partition(b"\0")[0])
        if found is None or node != FUSE_ROOT_ID:
            return errno.ENOENT
        entry = FUSE_ENTRY_OUT.pack(found, 0, FUSE_VALID, FUSE_VALID)
        return [entry + self.attributes[found]]

    def _open(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        (flags,) = FUSE_OPEN_IN.unpack_from(body)
        if flags & os.O_ACCMODE != os.O_RDONLY:  # root may have remounted it read-write
            return errno.EROFS
        return [FUSE_OPEN_OUT.pack(0, FOPEN_KEEP_CACHE)]

    def _read(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        offset, size = FUSE_READ_IN.unpack_from(body)
        file = self.files[node]
        size = min(size, file.size - offset)
        return [file.read(offset, size, buffer)] if size > 0 else []

    def _read_directory(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        offset, size = FUSE_READ_IN.unpack_from(body)  # offset: how many were listed already
        entries = bytearray()
        for number, (child, name, kind) in enumerate(self.listing[offset:], offset + 1):
            entry = FUSE_DIRENT.pack(child, number, len(name), kind >> 12) + name
            entry += bytes(-len(entry) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return [entries]

    def _seek(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        offset, whence = FUSE_READ_IN.unpack_from(body)
        file = self.files[node]
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            return errno.EINVAL
        if offset >= file.size:
            return errno.ENXIO
        found = file.seek(offset, whence == os.SEEK_DATA)
        if found >= file.size and whence == os.SEEK_DATA:
            return errno.ENXIO
        return [FUSE_LSEEK_OUT.pack(min(found, file.size))]

    def _status(self, node: int, body: memoryview, buffer: memoryview) -> Reply:
        blocks = sum(-(-file.size // BLOCK_SIZE) for file in self.files.values())
        counts = blocks, 0, 0, len(self.files), 0
        return [FUSE_STATFS_OUT.pack(*counts, BLOCK_SIZE, FILE_NAME_MAX, BLOCK_SIZE)]


class MountPoint:
    """A directory to mount on: by system calls as root, else by fusermount, which is setuid."""

    def __init__(self, directory: str, source: str, options: Collection[str]) -> None:
        self.path = os.path.realpath(directory)
        self.source = source
        self.options = options
        self.is_root = os.geteuid() == 0
        with naming(escape(directory)):
            if not stat.S_ISDIR(os.stat(self.path).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))

    def mount(self) -> int:
        """Mount; return the file descriptor through which the requests come."""
        # The kernel checks modes and owners only if it is asked to.
        options = ["default_permissions", *self.options]
        return self._mount_as_root(options) if self.is_root else self._mount_as_user(options)

    def _mount_as_root(self, options: Sequence[str]) -> int:
        with naming("/dev/fuse"):
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV
        for option in self.options:
            flags |= MOUNT_OPTIONS[option]
        data = [f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"]
        data += [option for option in options if option not in MOUNT_OPTIONS]
        if "allow_other" in options:
            data.append("allow_other")
        try:
            with naming(escape(self.path)):
                self._call("mount", self.source, self.path, "fuse.vma-tool", flags, ",".join(data))
        except VmaError:
            os.close(fd)
            raise
        return fd

    def _mount_as_user(self, options: Sequence[str]) -> int:
        import socket

        # In an option's value, a comma would begin the next option.
        name = self.source.replace("\\", "\\\\").replace(",", "\\,")
        options = ["ro", "nosuid", "nodev", "subtype=vma-tool", f"fsname={name}", *options]
        ours, theirs = socket.socketpair()
        with ours, theirs:
            comm = theirs.fileno()
            failure = self._fusermount("-o", ",".join(options), "--", self.path, comm=comm)
            theirs.close()  # so that there is an end if nothing was sent
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        if failure or not fds:
            raise VmaError(failure or "fusermount gave no file descriptor of /dev/fuse")
        os.set_inheritable(fds[0], False)
        return fds[0]

    def unmount(self) -> bool:
        """Unmount; return False if it is in use and was only detached from the directory."""
        deadline = time.monotonic() + BUSY_SECONDS
        while not self._unmount(lazy=False):
            if time.monotonic() > deadline:
                return not self._unmount(lazy=True)
            time.sleep(BUSY_SECONDS / 20)
        return True

    def _unmount(self, lazy: bool) -> bool:
        """Unmount; return False if it is in use."""
        if not self.is_root:
            failure = self._fusermount("-u", *["-z"] * lazy, "--", self.path)
            return not failure or not os.path.ismount(self.path)
        try:
            self._call("umount2", self.path, MNT_DETACH if lazy else 0)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            if error.errno not in (errno.EINVAL, errno.ENOENT):  # somebody else was faster
                raise VmaError(f"{escape(self.path)}: {reason(error)}") from error
        return True

    @staticmethod
    def _call(function: str, *args: str | int) -> None:
        """Call a function of the C library; raises OSError."""
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        plain = [ctypes.c_ulong(a) if isinstance(a, int) else os.fsencode(a) for a in args]
        if libc[function](*plain):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    @staticmethod
    def _fusermount(*args: str, comm: int | None = None) -> str:
        """Run fusermount; return its message if it failed, else an empty string."""
        import shutil
        import subprocess

        program = shutil.which("fusermount3") or shutil.which("fusermount")
        if program is None:
            raise VmaError("only root mounts without fusermount3 (Debian package: fuse3)")
        environment = {**os.environ, "LC_ALL": "C"}
        if comm is not None:
            environment["_FUSE_COMMFD"] = str(comm)
        answer = subprocess.run(
            [program, *args],
            env=environment,
            pass_fds=[comm] if comm is not None else [],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if not answer.returncode:
            return ""
        message = escape(answer.stderr.decode(errors="replace").strip().split("\n")[-1])
        return message or f"{program} failed with exit status {answer.returncode}"


@contextmanager
def blocked_signals() -> Iterator[set[Any]]:
    """Let MOUNT_SIGNALS wait for `sigwait`; yields the signals that were blocked before."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MOUNT_SIGNALS)
    try:
        yield before
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(server: FuseServer, point: MountPoint) -> None:
    """Serve until the directory is unmounted, which a signal does. The signals are blocked."""
    caller = threading.get_ident()
    ended: list[None] = []

    def work() -> None:
        try:
            server.serve()
        finally:
            ended.append(None)
            signal.pthread_kill(caller, signal.SIGCHLD)

    for _ in range(FUSE_THREADS):
        threading.Thread(target=work, daemon=True).start()
    detached = False
    while len(ended) < FUSE_THREADS:
        if signal.sigwait(MOUNT_SIGNALS) == signal.SIGCHLD:
            continue
        if detached:  # asked for the second time
            return
        detached = not point.unmount()
        if detached:
            server.log(f"{escape(point.path)}: {STILL_IN_USE}; another signal ends that")


STILL_IN_USE = "still in use, so it is only detached, and served until it is released"


def start_server(server: FuseServer, point: MountPoint, log_to_stderr: bool) -> int:
    """Serve in a child process; return its process id when the mount is ready."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            become_daemon(keep_stderr=log_to_stderr)
            serve(server, point)
            status = 0
        except Exception as error:  # noqa: BLE001 - the parent's code must not go on in the child
            server.log(repr(error))
        finally:
            os._exit(status)
    os.close(server.fd)
    with naming(escape(point.path)):
        os.statvfs(point.path)  # the child answers this, or the kernel does if it has died
    return pid


def become_daemon(keep_stderr: bool) -> None:
    """Let go of the terminal, the working directory and what the caller left open."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1) if keep_stderr else (0, 1, 2):
        os.dup2(null, fd)
    # Our own files are not inheritable. Others are our caller's: a lock, or a pipe whose reader
    # waits for its end.
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        try:
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)
        except OSError:  # the listing's own
            continue


def run_command(command: Sequence[str], mask: Collection[Any]) -> int:
    """Run a command and return its exit status; SIGTERM and SIGHUP are handed on to it."""
    # As after any start by a shell: Python itself ignores SIGPIPE.
    defaults = [signal.SIGPIPE, signal.SIGXFSZ]
    with naming(escape(command[0])):
        pid = os.posix_spawnp(
            command[0], command, os.environ, setsigmask=mask, setsigdef=defaults
        )
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        signum = signal.sigwait(MOUNT_SIGNALS)
        if signum in (signal.SIGHUP, signal.SIGTERM):  # Ctrl-C reaches the command by itself
            os.kill(pid, signum)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
