"""The checker: each fault is found as exactly that fault, mended, and gone."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common import codec
from common.errors import EXIT_DAMAGED, EXIT_UNREACHABLE, Code, KaError
from nfsp import keys
from nfsp.check import lay_out
from nfsp.fsck.findings import EXIT_LEFTOVERS, Outcome, Report, Severity
from nfsp.fsck.table import REG, SortedInts, Table
from nfsp.model import FILE_SIZE_MAX, ROOT, ClusterMap, Inode, Layout, Remains
from tests.support.fsck_cluster import SESSION, Cluster
from tests.support.fsck_faults import (
    FAULTS,
    LOST,
    NOBODY,
    UNMENDABLE,
    Break,
    beyond,
    leftover_chunks,
    lost_name,
    missing_directory_inode,
    no_twin,
    put,
    unreachable_directory,
    unreachable_file,
    used_up,
)
from tests.support.space import CLUSTER_MAP

# ---------------------------------------------------------------- a consistent file system


def test_consistent_file_system_is_clean() -> None:
    cluster = Cluster()
    cluster.space.check()
    report = cluster.check(verify=True)
    assert report.results == []
    assert report.exit_code == 0
    assert report.counts["inodes"] == 9
    assert report.counts["iod1_chunk_files"] > 0


def test_a_report_for_people_counts_what_all_iods_have_together() -> None:
    report = Report(counts={
        "entries": 1234, "iod1_chunk_files": 1000, "iod1_bytes": 1 << 20,
        "iod12_chunk_files": 5, "iod12_bytes": 1 << 19, "inodes": 1,
    })  # fmt: skip
    told = "checked 1,234 entries, 1 inodes, 1,005 chunk files of 1.5MiB on 2 iods: clean"
    assert lay_out(report) == told


def test_file_system_with_work_going_on_is_clean() -> None:
    cluster = Cluster()
    space = cluster.space
    space.open(cluster.small, writable=True)
    cluster.write(cluster.small, 10_000_000, 5_000_000)
    removed = space.mkdir(ROOT, b"removed").ino
    space.open(cluster.file, writable=False)
    space.opens[1, removed] = False
    space.rmdir(ROOT, b"removed")
    space.unlink(cluster.sub, b"data")
    put(cluster, keys.purge(LOST), Remains(Layout(1 << 20, 1, 1, (2,)), FILE_SIZE_MAX).encode())
    used_up(cluster)
    cluster.iods[2].put(LOST, 0)
    put(cluster, keys.writer(0, cluster.small), codec.encode([]))
    put(cluster, keys.slot(SESSION, 3), codec.encode([1, b""]))
    space.check()
    assert cluster.checks(verify=True) == []


def test_unformatted_store_is_refused() -> None:
    cluster = Cluster()
    cluster.view.apply(dict.fromkeys(cluster.view.records))
    with pytest.raises(KaError) as caught:
        cluster.check()
    assert caught.value.code is Code.NOT_FORMATTED


def test_checking_writes_nothing() -> None:
    cluster = Cluster()
    put(cluster, keys.inode(cluster.sub), None)
    before = dict(cluster.view.records)
    assert cluster.check().exit_code == EXIT_DAMAGED
    assert cluster.view.records == before


# ---------------------------------------------------------------- one fault, one finding


@pytest.mark.parametrize(("check", "fault"), FAULTS)
def test_fault_is_found_as_what_it_is_mended_and_gone(check: str, fault: Break) -> None:
    cluster = Cluster()
    fault(cluster)
    before = dict(cluster.view.records)
    assert cluster.outcomes() == [(check, Outcome.REPORTED)]
    assert cluster.view.records == before
    first, *consequences = cluster.outcomes(repair=True)
    assert first == (check, Outcome.MENDED)
    assert all(outcome is Outcome.MENDED for _, outcome in consequences)
    assert cluster.checks(verify=True) == []


@pytest.mark.parametrize(("check", "fault"), UNMENDABLE)
def test_what_would_have_to_be_guessed_is_reported_and_left_alone(check: str, fault: Break) -> None:
    cluster = Cluster()
    fault(cluster)
    before = dict(cluster.view.records)
    places = cluster.places(cluster.file)
    assert cluster.outcomes(repair=True) == [(check, Outcome.UNMENDABLE)]
    assert cluster.view.records == before
    assert cluster.places(cluster.file) == places


def test_cluster_map_that_contradicts_itself_is_reported() -> None:
    cluster = Cluster()
    chains = (*CLUSTER_MAP.chains[:2], CLUSTER_MAP.chains[2]._replace(iods=(9,)))
    put(cluster, keys.CLUSTER_MAP, ClusterMap(1, CLUSTER_MAP.iods, chains).encode())
    assert "map.wrong" in cluster.checks()


# ---------------------------------------------------------------- what repairs leave behind


def test_unreachable_inodes_are_found_in_lost_and_found_as_they_were() -> None:
    cluster = Cluster()
    unreachable_file(cluster)
    unreachable_directory(cluster)
    cluster.check(repair=True)
    space = cluster.space
    lost = space.lookup(ROOT, b"lost+found").ino
    assert space.names(lost) == {b"#%d" % cluster.sub, b"#%d" % cluster.file}
    assert space.lookup(space.lookup(lost, b"#%d" % cluster.sub).ino, b"deep").ino == cluster.deep
    found = space.lookup(lost, b"#%d" % cluster.file)
    assert (found.is_file, found.size, found.nlink) == (True, 5_000_000, 1)
    assert cluster.places(cluster.file)
    space.check()


def test_rebuilt_directory_has_all_its_entries() -> None:
    cluster = Cluster()
    names = cluster.space.names(cluster.sub)
    missing_directory_inode(cluster)
    cluster.check(repair=True)
    assert cluster.space.names(cluster.sub) == names
    cluster.space.check()


def test_lost_and_found_that_is_a_file_is_not_replaced() -> None:
    cluster = Cluster()
    file = cluster.space.create(ROOT, b"lost+found").ino
    unreachable_file(cluster)
    assert cluster.outcomes(repair=True) == [("inode.unreachable", Outcome.SKIPPED)]
    assert cluster.space.lookup(ROOT, b"lost+found").ino == file


def test_number_of_chunks_never_given_out_will_not_be_given_out() -> None:
    cluster = Cluster()
    cluster.iods[3].put(LOST, 0)
    assert cluster.outcomes() == [("chunks.number", Outcome.REPORTED)]
    assert cluster.outcomes(repair=True) == [("chunks.number", Outcome.MENDED)]
    assert cluster.space.create(ROOT, b"new").ino > LOST
    assert cluster.places(LOST)
    assert cluster.checks(repair=True) == ["chunks.leftover"]
    assert not cluster.places(LOST)


def test_only_copy_of_a_misplaced_column_is_kept() -> None:
    cluster = Cluster()
    right = cluster.iod_of(cluster.file)
    other = next(iod for iod in cluster.iods.values() if iod is not right)
    other.files[cluster.file, 0] = right.files.pop((cluster.file, 0))
    report = cluster.check(repair=True)
    ((finding, outcome),) = report.results
    assert (finding.check, outcome) == ("chunks.misplaced", Outcome.UNMENDABLE)
    assert report.exit_code == EXIT_DAMAGED
    assert (cluster.file, 0) in other.files


def test_blocks_behind_the_end_of_a_sparse_file_are_found_when_verifying() -> None:
    cluster = Cluster()
    cluster.set_inode(cluster.sparse, size=10 << 20)
    assert cluster.checks() == []
    cluster.set_inode(cluster.sparse, size=(3 << 20) + 500_000)
    iod = cluster.iod_of(cluster.sparse)
    iod.put(cluster.sparse, 0, row=1, block=15)
    assert cluster.checks(verify=True) == []
    iod.files[cluster.sparse, 0] = {(1, 16)}
    assert cluster.checks(verify=True) == ["chunks.beyond"]


def test_block_that_does_not_match_its_sum_is_damage() -> None:
    cluster = Cluster()
    cluster.iod_of(cluster.file).corrupt[cluster.file, 0] = "block 7: checksum"
    assert cluster.checks() == []
    (finding,) = cluster.findings(verify=True)
    assert (finding.check, finding.severity) == ("chunks.corrupt", Severity.DAMAGE)
    assert finding.where == f"/top/sub/data (inode {cluster.file})"
    assert "block 7" in finding.what


# ---------------------------------------------------------------- a cluster in use


def test_file_made_after_the_first_look_is_no_leftover() -> None:
    cluster = Cluster()
    cluster.iods[1].before_list = lambda: (
        None if b"new" in cluster.space.names() else _make_new(cluster)
    )
    assert cluster.checks(repair=True) == []
    new = cluster.space.lookup(ROOT, b"new").ino
    assert cluster.places(new)


def _make_new(cluster: Cluster) -> None:
    cluster.make_file(ROOT, b"new", 3_000_000)


def test_file_deleted_after_the_first_look_is_no_leftover() -> None:
    cluster = Cluster()

    def delete(pin: int) -> None:
        if pin == 1:
            cluster.space.unlink(cluster.sub, b"data")

    cluster.mds.before_pin = delete
    leftover_chunks(cluster)
    assert cluster.checks() == ["chunks.leftover"]


def test_file_that_grows_meanwhile_has_nothing_behind_its_end() -> None:
    cluster = Cluster()

    def grow(pin: int) -> None:
        if pin == 1:
            cluster.set_inode(cluster.file, size=50_000_000)

    cluster.mds.before_pin = grow
    cluster.write(cluster.file, 49_000_000, 1_000_000)
    assert cluster.checks(repair=True) == []
    assert any(max(iod.files[place])[0] > 5 for place, iod in cluster.chunk_files())


def test_file_opened_for_writing_before_the_trim_is_not_trimmed() -> None:
    cluster = Cluster()
    beyond(6 << 20)(cluster)
    places = {place: set(iod.files[place]) for place, iod in cluster.chunk_files()}
    apply = cluster.mds.repair

    async def opened_first(expected: object, records: object) -> None:
        cluster.space.open(cluster.file, writable=True)
        await apply(expected, records)  # type: ignore[arg-type]

    cluster.mds.repair = opened_first  # type: ignore[method-assign]
    assert cluster.outcomes(repair=True) == [("chunks.beyond", Outcome.SKIPPED)]
    assert places == {place: set(iod.files[place]) for place, iod in cluster.chunk_files()}


def test_writer_that_is_gone_does_not_hide_what_lies_behind_the_end() -> None:
    cluster = Cluster()
    beyond(6 << 20)(cluster)
    put(cluster, keys.writer(NOBODY, cluster.file), codec.encode([]))
    assert cluster.checks() == ["writer.session", "chunks.beyond"]
    put(cluster, keys.writer(SESSION, cluster.file), codec.encode([]))
    assert cluster.checks() == ["writer.session"]


def test_record_changed_after_the_look_is_not_overwritten() -> None:
    cluster = Cluster()
    cluster.set_inode(cluster.small, nlink=9)
    apply = cluster.mds.repair

    async def changed_first(expected: object, records: object) -> None:
        if cluster.inode(cluster.small).uid != 7:
            cluster.set_inode(cluster.small, uid=7)
        await apply(expected, records)  # type: ignore[arg-type]

    cluster.mds.repair = changed_first  # type: ignore[method-assign]
    assert cluster.outcomes(repair=True) == [("inode.nlink", Outcome.MENDED)]
    inode = cluster.inode(cluster.small)
    assert (inode.uid, inode.nlink) == (7, 2)


def test_iod_out_of_reach_is_reported_and_the_others_are_checked() -> None:
    cluster = Cluster()
    cluster.iods[2].error = KaError(Code.UNREACHABLE, "iod 2 is down")
    leftover_chunks(cluster)
    report = cluster.check()
    assert report.unchecked == ["iod 2: iod 2 is down"]
    assert [finding.check for finding, _ in report.results] == ["chunks.leftover"]
    assert report.exit_code == EXIT_UNREACHABLE
    del cluster.iods[2]
    assert cluster.check().unchecked == ["iod 2: cannot be reached"]


def test_view_is_closed_when_the_check_fails() -> None:
    cluster = Cluster()
    cluster.view.apply(dict.fromkeys(cluster.view.records))
    with pytest.raises(KaError):
        cluster.check()
    assert cluster.mds.pinned is None


# ---------------------------------------------------------------- reports


def test_exit_code_tells_leftovers_from_damage() -> None:
    cluster = Cluster()
    leftover_chunks(cluster)
    assert cluster.check().exit_code == EXIT_LEFTOVERS
    lost_name(cluster)
    assert cluster.check(repair=True).exit_code == EXIT_DAMAGED
    assert cluster.check().exit_code == 0


def test_report_is_json_with_paths() -> None:
    cluster = Cluster()
    cluster.set_inode(cluster.deep, nlink=9)
    no_twin(cluster)
    data = json.loads(json.dumps(cluster.check().as_data()))
    where = {finding["check"]: finding["where"] for finding in data["findings"]}
    assert where == {
        "inode.nlink": f"/top/sub/deep (inode {cluster.deep})",
        "entry.twin": "/top/small",
    }
    assert data["exit_code"] == EXIT_DAMAGED


# ---------------------------------------------------------------- tables


@given(st.lists(st.integers(1, (1 << 64) - 1), unique=True))
def test_table_finds_every_inode_and_no_other(inos: list[int]) -> None:
    half = len(inos) // 2
    table = Table()
    rows = {ino: table.add(ino, REG) for ino in (*sorted(inos[:half]), *inos[half:])}
    assert all(table.find(ino) == row for ino, row in rows.items())
    assert all(table.find(ino + 1) == -1 for ino in inos if ino + 1 not in rows)
    assert len(table) == len(inos)


@given(st.sets(st.integers(0, (1 << 64) - 1)), st.integers(0, (1 << 64) - 1))
def test_sorted_ints_hold_what_was_put_in(numbers: set[int], other: int) -> None:
    ints = SortedInts(numbers)
    assert set(ints) == numbers
    assert (other in ints) == (other in numbers)


# ---------------------------------------------------------------- any damage whatever

_CORRUPTION = st.tuples(
    st.sampled_from(["delete", "garble", "swap", "flip", "move", "field", "insert"]),
    st.integers(0, 1 << 16),
    st.integers(0, 1 << 16),
    st.binary(max_size=20),
)
_ODD = [0, 1, 2, 3, 7, -1, 255, 1 << 31, (1 << 63) - 1, (1 << 64) - 1, 0o40755, None, b"", "x"]


def _corrupt(cluster: Cluster, how: str, a: int, b: int, data: bytes) -> None:
    records = cluster.view.records
    known = sorted(records)
    key, other = known[a % len(known)], known[b % len(known)]
    value = records[key]
    match how:
        case "delete":
            put(cluster, key, None)
        case "garble":
            put(cluster, key, data)
        case "swap":
            put(cluster, key, records[other])
        case "flip" if value:
            at = b % len(value)
            put(cluster, key, value[:at] + bytes((value[at] ^ (1 << b % 8),)) + value[at + 1 :])
        case "move":
            at = b % len(key)
            moved = key[:at] + bytes((key[at] ^ (1 << b % 8),)) + key[at + 1 :]
            cluster.view.apply({key: None, moved: value})
        case "field":
            try:
                fields = codec.decode(value)
            except KaError:
                return
            if type(fields) is list and fields:
                fields[b % len(fields)] = _ODD[len(data) % len(_ODD)]
                put(cluster, key, codec.encode(fields))
        case "insert":
            prefix = b"cdioprstwxm"[b % 11 :][:1]
            put(cluster, prefix + key[1:], value if a % 2 else data)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_CORRUPTION, min_size=1, max_size=6))
def test_any_damage_is_survived_and_mending_comes_to_an_end(
    corruptions: list[tuple[str, int, int, bytes]],
) -> None:
    cluster = Cluster()
    for corruption in corruptions:
        _corrupt(cluster, *corruption)
    formatted = {keys.SUPERBLOCK, keys.CLUSTER_MAP, keys.NEXT_INO}
    assume(formatted & cluster.view.records.keys())
    cluster.check()
    cluster.check(repair=True)
    # A second run may still finish what the first has brought to light among the chunks.
    cluster.check(repair=True)
    left = cluster.check(verify=True).results
    assert all(outcome is Outcome.UNMENDABLE for _, outcome in left), left


def test_inode_record_of_a_new_version_is_left_alone() -> None:
    cluster = Cluster()
    fields = codec.decode(cluster.inode(cluster.file).encode())
    put(cluster, keys.inode(cluster.file), codec.encode([99, *fields[1:]]))
    assert cluster.outcomes(repair=True) == [("inode.unreadable", Outcome.UNMENDABLE)]
    with pytest.raises(KaError):
        Inode.decode(cluster.view.records[keys.inode(cluster.file)])
