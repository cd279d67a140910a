"""Node sets: names and back, natural order, bounded, no groups and no options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from common.nodeset import NODE_COUNT_MAX, expand, fold


def refusal(text: str) -> str:
    with pytest.raises(KaError) as caught:
        expand(text)
    assert caught.value.code is Code.USAGE
    assert "\n" not in str(caught.value)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node[1-3,7]", ["node1", "node2", "node3", "node7"]),
        ("node[008-011]", ["node008", "node009", "node010", "node011"]),
        ("n[1-9/4]", ["n1", "n5", "n9"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("b,a", ["a", "b"]),
        ("n[1-4]!n2", ["n1", "n3", "n4"]),
        ("n[1-4]&n[3-9]", ["n3", "n4"]),
        ("n[1-3]^n[3-4]", ["n1", "n2", "n4"]),
        ("node[1-2].lab.example", ["node1.lab.example", "node2.lab.example"]),
        ("10.0.0.[1-2]", ["10.0.0.1", "10.0.0.2"]),
        ("vm1-20240501", ["vm1-20240501"]),
        ("", []),
    ],
)
def test_sets_expand_to_names(text: str, names: list[str]) -> None:
    assert expand(text) == names


def test_order_is_natural() -> None:
    assert expand("n10,n9,n100,n1") == ["n1", "n9", "n10", "n100"]


def test_names_fold_to_the_shortest_set() -> None:
    assert fold(["n3", "n1", "n2", "n2", "m"]) == "m,n[1-3]"
    assert fold([]) == ""


@given(st.lists(st.from_regex(r"\A[a-z]{1,3}[0-9]{0,3}(-[a-z][0-9]{0,2})?\Z"), max_size=20))
def test_folding_loses_and_invents_nothing(names: list[str]) -> None:
    assert set(expand(fold(names))) == set(names)


@pytest.mark.parametrize(
    "text",
    ["n[1-", "n1]", "n[]", "n[a-b]", "n[3-1]", "n1,", ",n1", "n1!", "n[1-2/0]", "a b", "n[1][2]"],
)
def test_malformed_sets_are_refused(text: str) -> None:
    assert refusal(text)


@pytest.mark.parametrize("text", ["@racks", "n*", "n?", "@*", "a%s", "n1;reboot", "é", "n\n"])
def test_groups_wildcards_and_odd_characters_are_refused(text: str) -> None:
    assert "not a node set" in refusal(text)


@pytest.mark.parametrize("text", ["-oProxyCommand=x", "-n[1-3]", "n1,-l"])
def test_a_name_that_looks_like_an_option_is_refused(text: str) -> None:
    assert refusal(text)
    with pytest.raises(KaError):
        fold(["n1", "-l"])


@pytest.mark.parametrize(
    "text", ["n[1-999999999]", "n[1-1000]m[1-1000]", f"n[0-{10**30}]", f"n[{10**30}-1]"]
)
def test_a_set_of_absurd_size_is_refused_at_once(text: str) -> None:
    assert refusal(text)


def test_the_largest_set_is_allowed() -> None:
    assert len(expand(f"n[1-{NODE_COUNT_MAX}]")) == NODE_COUNT_MAX


@given(st.text(alphabet="an1039[]-,/!&^ .:_", max_size=25) | st.text(max_size=25))
def test_any_text_gives_names_or_a_usage_error(text: str) -> None:
    try:
        names = expand(text)
    except KaError as error:
        assert error.code is Code.USAGE  # noqa: PT017 (both outcomes are right)
        return
    assert len(set(names)) == len(names)
    assert expand(fold(names)) == names
