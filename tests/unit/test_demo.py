"""The demo's own parts: what it copies, and that it would notice if something came out wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import demo_data
from bench.demo import Sheet, main, parse
from bench.demo_place import choose_base
from common.errors import Code, KaError

MIB = 1 << 20


def nowhere(_done: int) -> None:
    """A progress display nobody looks at."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small tree with everything a real one has."""
    top = tmp_path / "root"
    (top / "deep" / "deeper").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "a").write_bytes(b"a" * 1000)
    (top / "deep" / "b").write_bytes(os.urandom(70_000))
    (top / "deep" / "deeper" / "c").touch(mode=0o600)
    (top / "link").symlink_to("deep/b")
    (top / "dangling").symlink_to("nowhere")
    os.utime(top / "a", ns=(1, 1_234_567_890))
    return top


def copied(root: Path, tmp_path: Path) -> tuple[demo_data.Tree, Path]:
    picked = demo_data.pick([root], 1000, 1 << 40)
    return demo_data.copy_in(picked, tmp_path / "copy", nowhere), tmp_path / "copy" / "0-root"


def test_a_copied_tree_is_found_equal(root: Path, tmp_path: Path) -> None:
    tree, _ = copied(root, tmp_path)
    assert (tree.file_count, tree.size) == (3, 71_000)
    assert len(tree.items) == 9
    assert demo_data.compare(tree, tmp_path / "copy", nowhere) == []


@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        (lambda at: (at / "deep" / "b").unlink(), "deep/b: missing"),
        (lambda at: (at / "new").touch(), "new: not written, but there"),
        (lambda at: (at / "deep" / "deeper" / "c").chmod(0o640), "mode"),
        (lambda at: os.utime(at / "a", ns=(1, 2)), "mtime_ns"),
        (lambda at: os.truncate(at / "a", 999), "size"),
        (lambda at: ((at / "link").unlink(), (at / "link").symlink_to("a")), "content"),
    ],
)
def test_any_difference_is_seen(root: Path, tmp_path: Path, damage: object, seen: str) -> None:
    tree, at = copied(root, tmp_path)
    assert callable(damage)
    damage(at)
    assert any(seen in line for line in demo_data.compare(tree, tmp_path / "copy", nowhere))


def test_one_flipped_bit_is_seen_by_its_checksum(root: Path, tmp_path: Path) -> None:
    tree, at = copied(root, tmp_path)
    path = at / "deep" / "b"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[4711] ^= 16
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (line,) = demo_data.compare(tree, tmp_path / "copy", nowhere)
    assert "deep/b: content" in line


def test_picking_stops_when_both_bounds_are_reached(root: Path) -> None:
    few = demo_data.pick([root], 1, 1)
    assert sum(one.is_file for one in few) == 1
    assert demo_data.pick([root, root], 1000, 1) == demo_data.pick([root], 1000, 1)


def test_this_machine_has_enough_files_for_the_demo() -> None:
    picked = demo_data.pick(demo_data.sources(), 5000, 300_000_000)
    assert sum(one.is_file for one in picked) >= 5000
    assert sum(one.size for one in picked) >= 300_000_000
    assert len(picked) < 10_000


@pytest.mark.parametrize("size", [1, MIB, MIB + 1, 3 * MIB - 1])
def test_the_large_file_is_read_back_equal(tmp_path: Path, size: int) -> None:
    path = tmp_path / "large"
    sums = demo_data.write_large(path, size, nowhere)
    assert path.stat().st_size == size
    assert len(set(sums)) == len(sums) == -(-size // MIB)
    assert demo_data.read_large(path, sums, nowhere) == 0


def test_wrong_bytes_of_the_large_file_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "large"
    sums = demo_data.write_large(path, 3 * MIB, nowhere)
    with open(path, "r+b") as file:
        file.seek(MIB + 5)
        file.write(b"wrong")
    assert demo_data.read_large(path, sums, nowhere) == 1
    os.truncate(path, 2 * MIB)
    assert demo_data.read_large(path, sums, nowhere) == 2
    assert demo_data.read_large(path, sums[:1], nowhere) == 1


def test_a_layout_is_read() -> None:
    text = "chunk_size=1048576 stripe_width=3 replicas=1 chains=2,3,1"
    assert demo_data.parse_layout(text) == (MIB, [2, 3, 1])
    with pytest.raises(KaError):
        demo_data.parse_layout("chunk_size=1048576 chains=")


def test_too_little_space_is_refused_in_one_line_that_says_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KaError) as caught:
        choose_base(tmp_path, 1 << 60)
    assert caught.value.code is Code.USAGE
    assert "1EiB of disk space are needed" in str(caught.value)
    assert main(["--size", "1EiB", "--directory", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_wrong_options_are_usage_errors() -> None:
    for arguments in (["--files", "0"], ["--size", "0"], ["--size", "much"]):
        with pytest.raises(KaError) as caught:
            parse(arguments)
        assert caught.value.code is Code.USAGE


def test_the_table_has_straight_columns() -> None:
    sheet = Sheet()
    sheet.add("a", "short", "1 MB/s")
    sheet.add("longer", "x")
    assert sheet.lay_out() == "  a       short  1 MB/s\n  longer  x"
