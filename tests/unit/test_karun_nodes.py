"""Node selection: ClusterShell's groups and files, exclusions, and one line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from karun.nodes import Groups, Names, select

CONF = """
[Main]
default: racks
confdir: $CFGDIR/groups.conf.d
autodir: $CFGDIR/groups.d

[shelf]
map: sed -n 's/^'$GROUP': //p' shelf.txt
list: sed -n 's/^\\([a-z]*\\): .*/\\1/p' shelf.txt

[broken]
map: exit 3
"""
YAML = """
racks:
  all: '@r1,@r2'
  r1: 'node[1-4]'
  r2: 'node[5-8]'
  odd: 'node[1-8/2]'
  both: '@r1,@shelf:top'
  nothing: ''
  loop: '@loop'
  huge: 'n[1-999999999]'
"""


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    (tmp_path / "groups.d").mkdir()
    (tmp_path / "groups.conf").write_text(CONF)
    (tmp_path / "groups.d/racks.yaml").write_text(YAML)
    (tmp_path / "shelf.txt").write_text("top: s[1-2]\nlow: s3\n")
    return Groups([tmp_path / "groups.conf"])


def chosen(groups: Groups, *where: str, **options: Any) -> str:
    names = select(where, groups=groups, **options)
    return Names(names).fold(range(len(names)))


def refusal(groups: Groups, *where: str, **options: Any) -> str:
    with pytest.raises(KaError) as caught:
        chosen(groups, *where, **options)
    assert caught.value.code is Code.USAGE
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("@r1", "node[1-4]"),
        ("@racks:r2", "node[5-8]"),
        ("@shelf:top", "s[1-2]"),
        ("@both", "node[1-4],s[1-2]"),
        ("@*", "node[1-8]"),
        ("@shelf:*", "s[1-3]"),
        ("@r1&@odd", "node[1,3]"),
        ("@r[1-2]!node2", "node[1,3-8]"),
        ("node*", "node[1-8]"),
        ("node?!@r1", "node[5-8]"),
        ("n[1-2]^n2", "n1"),
    ],
)
def test_groups_are_node_sets_by_clustershells_rules(
    groups: Groups, where: str, expected: str
) -> None:
    assert chosen(groups, where) == expected


def test_several_w_and_g_add_up_and_x_takes_away(groups: Groups) -> None:
    assert chosen(groups, "b,a", "@r1", in_groups=["shelf:top", "@r2"], exclude=["@odd", "a"]) == (
        "b,node[2,4,6,8],s[1-2]"
    )


def test_all_is_the_default_source(groups: Groups) -> None:
    assert chosen(groups, everyone=True, exclude=["node8"]) == "node[1-7]"


def test_names_come_from_files_and_standard_input_with_comments(
    groups: Groups, tmp_path: Path
) -> None:
    file = tmp_path / "hosts"
    file.write_text("# rack one\nnode1\n\nnode[2-3] @shelf:low  # and more\nnode-a.lab\n")
    expected = "node[1-3],node-a.lab,s3"
    assert chosen(groups, f"^{file}") == expected
    assert chosen(groups, hostfiles=[str(file)]) == expected
    assert chosen(groups, "-", read_stdin=file.read_bytes) == expected


def test_names_come_once_and_in_natural_order(groups: Groups) -> None:
    assert select(["n10,n9,n1", "n9"], groups=groups) == ["n1", "n9", "n10"]


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("@nosuch", "no group @nosuch"),
        ("@racks:nosuch", "no group @nosuch in source racks"),
        ("@nosource:a", "no group source nosource"),
        ("@shelf:nosuch", "no group @nosuch in source shelf"),
        ("@broken:a", "group source|not a node set"),
        ("@loop", "not a node set"),
        ("@huge", "more than"),
        ("@nothing", "-w names an empty set"),
        ("", "-w names an empty set"),
        ("n[1-", "not a node set"),
        ("a;b", "not a node set"),
        ("-oProxyCommand=x", "not a node"),
        ("^/nonexistent/hosts", "cannot read nodes from '/nonexistent/hosts': No such file"),
        ("^", "cannot read nodes"),
    ],
)
def test_a_mistake_is_one_line(groups: Groups, where: str, why: str) -> None:
    assert re.search(why, refusal(groups, where))


def test_an_empty_rest_is_told_apart_from_an_empty_set(groups: Groups) -> None:
    assert "-x takes away all of them" in refusal(groups, "@r1", exclude=["@r1"])
    assert "-w names an empty set" in refusal(groups, "n1!n1")
    assert "name some by -w" in refusal(groups)


def test_a_site_without_groups_says_where_they_would_be(tmp_path: Path) -> None:
    none = Groups([tmp_path / "groups.conf"])
    assert chosen(none, "n[1-2]") == "n[1-2]"
    assert "no group source for '@r1'" in refusal(none, "@r1")
    assert "no group source for '@*'" in refusal(none, everyone=True)


def test_a_broken_groups_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "groups.conf").write_text("[Main]\ndefault: x\n[x]\nlist: ls\n")
    assert "groups.conf: No option 'map'" in refusal(Groups([tmp_path / "groups.conf"]), "@a")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"-l\n", b"a;b\n"])
def test_a_file_of_something_else_is_refused(groups: Groups, content: bytes) -> None:
    assert refusal(groups, "-", read_stdin=lambda: content)


def test_an_endless_input_is_refused(groups: Groups) -> None:
    assert "MiB" in refusal(groups, "-", read_stdin=lambda: b"n1\n" * (3 << 20))


@given(st.lists(st.from_regex(r"\A[a-z]{1,2}[0-9]{0,2}\Z"), min_size=1, max_size=12), st.data())
def test_exclusion_is_set_difference(names: list[str], data: st.DataObject) -> None:
    out = data.draw(st.lists(st.sampled_from(names), max_size=len(names)))
    left = set(names) - set(out)
    nowhere = Groups([])
    if left:
        assert set(select(names, exclude=out, groups=nowhere)) == left
    else:
        with pytest.raises(KaError):
            select(names, exclude=out, groups=nowhere)
