"""The table of errors."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from common import errors
from common.errors import Code, KaError, first_error


def test_numbers_are_unique() -> None:
    numbers = [code.number for code in Code]
    assert len(set(numbers)) == len(numbers)
    # Enum makes an alias of a repeated value: a name without a row of its own.
    assert len(Code.__members__) == len(list(Code))


def test_numbers_lie_in_their_ranges() -> None:
    assert all(1000 <= code.number < 5000 for code in Code)
    for code in Code:
        if 2000 <= code.number < 3000:
            assert code.number - 2000 == code.errno
            assert code.name == errno.errorcode[code.errno].replace("ENOTSUP", "EOPNOTSUPP")


@pytest.mark.parametrize("code", Code)
def test_each_code_has_an_errno_an_exit_code_and_a_meaning(code: Code) -> None:
    assert code.errno in errno.errorcode
    assert 1 <= code.exit_code <= 5
    assert code.value.meaning
    assert "\n" not in code.value.meaning


@pytest.mark.parametrize("code", Code)
def test_a_code_is_found_by_its_number(code: Code) -> None:
    assert errors.from_number(code.number) is code


def test_unknown_numbers_and_errnos_are_failures() -> None:
    assert errors.from_number(-1) is Code.INTERNAL
    assert errors.from_errno(errno.EL2HLT) is Code.EIO
    assert errors.from_errno(errno.ENOENT) is Code.ENOENT


def test_an_error_reads_as_one_line_with_its_context() -> None:
    assert str(KaError(Code.ENOENT)) == "no such file or directory"
    assert str(KaError(Code.EIO, "bad block", ino=3, iod=1)) == "bad block (ino=3 iod=1)"


def test_an_error_of_this_process_is_not_remote() -> None:
    assert not KaError(Code.EIO, "x", a=1).remote


def test_the_first_error_of_nested_groups_is_told_unless_there_are_others() -> None:
    first = KaError(Code.AUTH, "first")
    group = ExceptionGroup("", [ExceptionGroup("", [first]), OSError("second")])
    assert first_error(group) is first
    mixed = ExceptionGroup("", [first, ValueError()])
    assert first_error(mixed) is mixed
    interrupt = KeyboardInterrupt()
    assert first_error(BaseExceptionGroup("", [interrupt])) is interrupt


def test_no_error_is_raised_where_old_interpreters_wrap_it_again() -> None:
    """Python 3.11.2, Debian 12's, puts it into a group if that is where it comes from."""
    root = Path(__file__).parents[2]
    packages = ("common", "nfsp", "karun", "kadeploy", "kaboot")
    sources = [path for name in packages for path in (root / name).rglob("*.py")]
    used = re.compile(r"^ *except\*", re.MULTILINE)
    assert not [path for path in sources if used.search(path.read_text())]
