"""Errors: the one table from code to errno, retry rule and exit code.

Every failure that crosses a process or reaches a user is a `KaError` with a `Code`.  The code's
number travels on the wire; errno is what a file system call answers; `retryable` says whether
sending the same request again can help; `exit_code` is what a command ends with.

Numbers: 1xxx common, 2xxx POSIX answers of the file system, 3xxx metadata, 4xxx data.  A number is
never reused.  docs/operations.md prints this table (tests keep it true).
"""

from __future__ import annotations

import enum
import errno as _errno
from dataclasses import dataclass

__all__ = ["Code", "KaError", "Spec", "first_error", "from_errno"]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_REFUSED = 4
EXIT_DAMAGED = 5


@dataclass(frozen=True, slots=True)
class Spec:
    """One row of the table."""

    number: int
    errno: int
    retryable: bool
    exit_code: int
    meaning: str


def _posix(number: int, errno: int, meaning: str) -> Spec:
    return Spec(number, errno, False, EXIT_FAILURE, meaning)


class Code(enum.Enum):
    """Every failure Ka names."""

    INTERNAL = Spec(1000, _errno.EIO, False, EXIT_FAILURE, "a bug in Ka; the log has the details")
    USAGE = Spec(1001, _errno.EINVAL, False, EXIT_USAGE, "wrong arguments or configuration")
    PROTOCOL = Spec(1002, _errno.EPROTO, False, EXIT_FAILURE, "the peer broke the protocol")
    UNREACHABLE = Spec(1003, _errno.EIO, True, EXIT_UNREACHABLE, "the peer cannot be reached")
    TIMEOUT = Spec(1004, _errno.EIO, True, EXIT_UNREACHABLE, "no answer before the deadline")
    AUTH = Spec(1005, _errno.EACCES, False, EXIT_REFUSED, "the peer does not hold the cluster key")
    WRONG_CLUSTER = Spec(1006, _errno.EACCES, False, EXIT_REFUSED, "the peer is of another cluster")
    WRONG_VERSION = Spec(1007, _errno.EPROTO, False, EXIT_REFUSED, "no protocol version in common")
    BUSY = Spec(1008, _errno.EAGAIN, True, EXIT_FAILURE, "a limit was reached; try again")
    CANCELLED = Spec(1009, _errno.EINTR, False, EXIT_FAILURE, "the request was cancelled")

    EPERM = _posix(2001, _errno.EPERM, "operation not permitted")
    ENOENT = _posix(2002, _errno.ENOENT, "no such file or directory")
    EIO = _posix(2005, _errno.EIO, "input/output error")
    E2BIG = _posix(2007, _errno.E2BIG, "value too large")
    EBADF = _posix(2009, _errno.EBADF, "not open")
    EACCES = _posix(2013, _errno.EACCES, "permission denied")
    EBUSY = _posix(2016, _errno.EBUSY, "in use")
    EEXIST = _posix(2017, _errno.EEXIST, "exists already")
    EXDEV = _posix(2018, _errno.EXDEV, "across file systems")
    ENOTDIR = _posix(2020, _errno.ENOTDIR, "not a directory")
    EISDIR = _posix(2021, _errno.EISDIR, "is a directory")
    EINVAL = _posix(2022, _errno.EINVAL, "invalid argument")
    EFBIG = _posix(2027, _errno.EFBIG, "file too large")
    ENOSPC = _posix(2028, _errno.ENOSPC, "no space left")
    EROFS = _posix(2030, _errno.EROFS, "read-only")
    EMLINK = _posix(2031, _errno.EMLINK, "too many links")
    ERANGE = _posix(2034, _errno.ERANGE, "result too large")
    ENAMETOOLONG = _posix(2036, _errno.ENAMETOOLONG, "name too long")
    ENOTEMPTY = _posix(2039, _errno.ENOTEMPTY, "directory not empty")
    ENODATA = _posix(2061, _errno.ENODATA, "no such attribute")
    EOPNOTSUPP = _posix(2095, _errno.EOPNOTSUPP, "not supported")
    ESTALE = _posix(2116, _errno.ESTALE, "stale file handle")

    SESSION_UNKNOWN = Spec(3001, _errno.EIO, False, EXIT_FAILURE, "the mount's session has expired")
    EPOCH_STALE = Spec(3002, _errno.EIO, False, EXIT_FAILURE, "request made under an older epoch")
    ENGINE_DAMAGED = Spec(3003, _errno.EIO, False, EXIT_DAMAGED, "the metadata store is damaged")
    NOT_FORMATTED = Spec(3004, _errno.EIO, False, EXIT_USAGE, "no file system there; run mkfs")

    CHUNK_CORRUPT = Spec(4001, _errno.EIO, False, EXIT_DAMAGED, "stored data fail their checksum")
    PAYLOAD_CORRUPT = Spec(4002, _errno.EIO, True, EXIT_FAILURE, "data were damaged on the way")
    IOD_FENCED = Spec(4003, _errno.EIO, True, EXIT_FAILURE, "a newer connection took over")
    DATA_LOST = Spec(4004, _errno.EIO, False, EXIT_FAILURE, "un-fsynced data went with a reboot")

    @property
    def number(self) -> int:
        return self.value.number

    @property
    def errno(self) -> int:
        return self.value.errno

    @property
    def retryable(self) -> bool:
        return self.value.retryable

    @property
    def exit_code(self) -> int:
        return self.value.exit_code


_BY_NUMBER = {code.number: code for code in Code}
_BY_ERRNO = {code.errno: code for code in Code if 2000 <= code.number < 3000}


class KaError(Exception):
    """A failure with its code, one line for the user, and context for the log."""

    def __init__(self, code: Code, message: str = "", **context: object) -> None:
        self.code = code
        self.message = message or code.value.meaning
        self.context = context
        self.remote = False
        """Whether a peer answered with it, rather than that this process met it."""
        super().__init__(self.message)

    @property
    def errno(self) -> int:
        return self.code.errno

    def __str__(self) -> str:
        extra = " ".join(f"{key}={value}" for key, value in self.context.items())
        return f"{self.message} ({extra})" if extra else self.message


def from_number(number: int) -> Code:
    """Return the code with a wire number; an unknown one is INTERNAL."""
    return _BY_NUMBER.get(number, Code.INTERNAL)


def from_errno(errno: int) -> Code:
    """Return the POSIX code for an errno of the local system; an unknown one is EIO."""
    return _BY_ERRNO.get(errno, Code.EIO)


def first_error(error: BaseException) -> BaseException:
    """Return what a group of one holds, or the first of several that are all KaError or OSError.

    That a nursery was about it is nobody's business; any other group is returned as it is.  Not to
    be raised in an `except*`: Python 3.11.2, Debian 12's, puts it into a group again there.
    """
    while isinstance(error, BaseExceptionGroup):
        if len(error.exceptions) > 1 and error.split((KaError, OSError))[1] is not None:
            break
        error = error.exceptions[0]
    return error
