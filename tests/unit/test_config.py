"""Configuration: exact types, unknown keys refused, one clear line for every mistake."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import SIZE, format_size, load, make_key, parse_size, read_key
from common.errors import Code, KaError


@dataclass(frozen=True, slots=True)
class Disk:
    path: Path
    reserve: Annotated[int, SIZE] = 0


@dataclass(frozen=True, slots=True)
class Iod:
    address: str
    disk: list[Disk] = field(default_factory=list)
    weight: float = 1.0

    def validate(self) -> None:
        if self.weight < 0:
            raise ValueError("'weight' must not be negative")


@dataclass(frozen=True, slots=True)
class Cache:
    size: Annotated[int, SIZE]


@dataclass(frozen=True, slots=True)
class Mds:
    threads: int = 4
    cache: Cache | None = None


@dataclass(frozen=True, slots=True)
class Cluster:
    name: str
    iod: tuple[Iod, ...] = ()
    mds: Mds = field(default_factory=Mds)
    verbose: bool = False
    tags: list[str] = field(default_factory=list)

    def validate(self) -> None:
        if self.name == "forbidden":
            raise KaError(Code.USAGE, "that name is taken")


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "cluster.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mistake(directory: Path, text: str | bytes) -> str:
    """Return what `load` says about a file, without the path."""
    path = write(directory, text)
    with pytest.raises(KaError) as caught:
        load(path, Cluster)
    assert caught.value.code is Code.USAGE
    line = str(caught.value)
    assert line.isprintable()
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def test_a_file_becomes_the_dataclass(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        name = "lab"
        verbose = true
        tags = ["a", "b"]
        [mds]
        threads = 8
        cache = { size = "64MiB" }
        [[iod]]
        address = "node1:7000"
        weight = 2
        [[iod.disk]]
        path = "data/1"
        reserve = 4096
        [[iod.disk]]
        path = "/srv/2"
        [[iod]]
        address = "node2:7000"
        """,
    )
    assert load(path, Cluster) == Cluster(
        "lab",
        (
            Iod("node1:7000", [Disk(tmp_path / "data/1", 4096), Disk(Path("/srv/2"))], 2.0),
            Iod("node2:7000"),
        ),
        Mds(8, Cache(64 << 20)),
        True,
        ["a", "b"],
    )


def test_paths_are_relative_to_the_file_not_to_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, '[[disk]]\npath = "d"')
    monkeypatch.chdir(tmp_path)

    @dataclass(frozen=True, slots=True)
    class Disks:
        disk: list[Disk]

    assert load(Path("cluster.toml"), Disks).disk[0].path == tmp_path / "d"
    write(tmp_path, '[[disk]]\npath = "~/d"')
    with pytest.raises(KaError, match="'path': ~ means nothing here: write the directory"):
        load(Path("cluster.toml"), Disks)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "missing key 'name'"),
        ('name = "x"\nverbos = true', "unknown key 'verbos' (did you mean 'verbose'?)"),
        ('name = "x"\nqqq = 1', "unknown key 'qqq'"),
        (
            'name = "x"\n[[iod]]\naddress = "a"\n[[iod]]\nadress = "b"',
            "[[iod]] 2: unknown key 'adress' (did you mean 'address'?)",
        ),
        ('name = "x"\n[[iod]]', "[[iod]] 1: missing key 'address'"),
        (
            'name = "x"\n[[iod]]\naddress = "a"\n[[iod.disk]]',
            "[[iod]] 1 [[iod.disk]] 1: missing key 'path'",
        ),
        (
            'name = "x"\n[mds.cache]\nsiz = 1',
            "[mds.cache]: unknown key 'siz' (did you mean 'size'?)",
        ),
        ("name = 1", "'name' must be a string, not 1"),
        ("name = true", "'name' must be a string, not true"),
        ('name = "x"\nverbose = 1', "'verbose' must be true or false, not 1"),
        ('name = "x"\nverbose = "true"', "'verbose' must be true or false, not 'true'"),
        ('name = "x"\nmds = 3', "'mds' must be a table, not 3"),
        ('name = "x"\n[mds]\nthreads = "4"', "[mds]: 'threads' must be a whole number, not '4'"),
        ('name = "x"\n[mds]\nthreads = true', "[mds]: 'threads' must be a whole number, not true"),
        ('name = "x"\n[mds]\nthreads = 4.0', "[mds]: 'threads' must be a whole number, not 4.0"),
        ('name = "x"\n[iod]\naddress = "a"', "'iod' must be a list, not a table"),
        ('name = "x"\niod = [1]', "'iod' must be a list of tables, not 1"),
        ('name = "x"\ntags = "a"', "'tags' must be a list, not 'a'"),
        ('name = "x"\ntags = ["a", 2]', "'tags[1]' must be a string, not 2"),
        (
            'name = "x"\n[mds.cache]\nsize = "64 MB iB"',
            "[mds.cache]: 'size': not a size (such as 64MiB): '64 MB iB'",
        ),
        (
            'name = "x"\n[mds.cache]\nsize = -1',
            "[mds.cache]: 'size' must be a size such as 65536 or \"64MiB\", not -1",
        ),
        (
            'name = "x"\n[[iod]]\naddress = "a"\nweight = -1',
            "[[iod]] 1: 'weight' must not be negative",
        ),
        (
            'name = "x"\n[[iod]]\naddress = "a"\nweight = nan',
            "[[iod]] 1: 'weight' must be a number, not nan",
        ),
        (
            'name = "x"\n[[iod]]\naddress = "a"\n[[iod.disk]]\npath = ""',
            "[[iod]] 1 [[iod.disk]] 1: 'path' must be a path, not ''",
        ),
        ('name = "forbidden"', "that name is taken"),
        (f'name = "x"\n[mds]\nthreads = {2**63}', "[mds]: 'threads' is too large"),
    ],
)
def test_each_mistake_is_named_with_its_place(tmp_path: Path, text: str, line: str) -> None:
    assert mistake(tmp_path, text) == line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('name = "x"\nname = "y"', "at line 2"),
        ("name = ", "at line 1"),
        ("[mds\n", "at line 1"),
        (b'name = "x"\n# \xff', "not UTF-8 text (at line 2)"),
        ("name = " + "[" * 100_000, "nested too deeply"),
        ("name = 1" + "0" * 5000, "digits"),
    ],
)
def test_syntax_errors_say_where(tmp_path: Path, text: str | bytes, part: str) -> None:
    assert part in mistake(tmp_path, text)


def test_a_file_that_cannot_be_read_is_a_usage_error(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(KaError) as caught:
            load(path, Cluster)
        assert caught.value.code is Code.USAGE
        assert reason in str(caught.value)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("64 mib", 64 << 20),
        ("10MB", 10_000_000),
        ("1.5GiB", 3 << 29),
        ("0.5k", 512),
        ("7EiB", 7 << 60),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1.5", "0.3K", "8EiB", "1e3", "1MMiB", "1 2", "١", "9" * 5000]
)
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(KaError) as caught:
        parse_size(text)
    assert caught.value.code is Code.USAGE


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (1023, "1023B"), (1024, "1KiB"), (1536, "1.5KiB"), (64 << 20, "64MiB"),
     ((1 << 20) - 1, "1.0MiB"), (3 << 30, "3GiB"), (2**63, "8EiB")],
)  # fmt: skip
def test_sizes_are_written_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1023), st.integers(0, 5))
def test_whole_sizes_survive_writing_and_reading(number: int, unit: int) -> None:
    size = number * 1024**unit
    assert parse_size(format_size(size)) == size


# ---------------------------------------------------------------- the cluster key


def key_mistake(path: Path) -> str:
    with pytest.raises(KaError) as caught:
        read_key(path)
    assert caught.value.code is Code.USAGE
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_made_key_is_private_random_and_readable(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        make_key(tmp_path / "a")
        os.umask(0o777)
        make_key(tmp_path / "b")
    finally:
        os.umask(umask)
    for name in "ab":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert len(read_key(tmp_path / "a")) == 32
    assert read_key(tmp_path / "a") != read_key(tmp_path / "b")


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key(path)
    key = read_key(path)
    with pytest.raises(KaError):
        make_key(path)
    assert read_key(path) == key


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o700, 0o601])
def test_a_key_that_others_can_use_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    make_key(path)
    path.chmod(mode)
    assert f"chmod 600 {path}" in key_mistake(path)
    path.chmod(0o400)
    assert read_key(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_a_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    make_key(path)
    os.chown(path, 12345, -1)
    assert "belongs to another user" in key_mistake(path)


@pytest.mark.parametrize("content", [b"", b"00" * 31, b"00" * 33, b"zz" * 32, b"00" * 32 + b"\n0"])
def test_a_malformed_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    line = key_mistake(path)
    assert "64 hexadecimal digits" in line
    assert "zz" not in line


def test_what_is_no_file_is_no_key(tmp_path: Path) -> None:
    assert "No such file" in key_mistake(tmp_path / "none")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    assert "not a key file" in key_mistake(fifo)
    assert "not a key file" in key_mistake(tmp_path)
