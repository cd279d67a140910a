"""`karun plan`: what it prints, for people and for programs, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from common.errors import KaError
from karun.cli import main
from karun.planning import parse_rate, rack_sizes

Karun = Callable[..., tuple[int, str, str]]


@pytest.fixture
def karun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Karun:
    """Run the command line; returns exit code, standard output and standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["karun", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, *capsys.readouterr()

    return run


def test_plan_says_what_why_how_long_and_draws_a_small_tree(karun: Karun) -> None:
    code, out, _ = karun("plan", "-w", "node[1-12]", "--size", "1GiB", "--topology", "chain")
    assert code == 0
    assert out.splitlines() == [
        "1GiB to 12 nodes (node[1-12])",
        "topology   chain, chunks of 4MiB",
        "because    asked for; every node sends and receives each byte once, so the links are used"
        " in full; 0.7 % of the time is filling the pipeline",
        "predicted  8.67 s (limited by the receivers' links; ideal 8.59 s)",
        "",
        "alternative      time    chunk  depth  fan-out",
        "chain          8.67 s     4MiB     12        1",
        "2 stripes      8.73 s     2MiB      4        2",
        "binary        17.32 s     4MiB      3        2",
        "binomial      34.56 s     4MiB      3        4",
        "lambda        34.56 s     4MiB      3        4",
        "4-ary         34.60 s     4MiB      2        4",
        "flat            104 s     4MiB      1       12",
        "",
        "(source) > node1 > node2 > node3 > node4 > node5 > node6 > node7 > node8 > node9 > node10",
        "> node11 > node12",
    ]


def test_plan_draws_branches_with_their_rails(karun: Karun) -> None:
    _, out, _ = karun("plan", "-w", "n[1-6]", "--size", "1KiB", "--topology", "binary")
    assert out.splitlines()[-7:] == [
        "(source)",
        "+- n1",
        "|  +- n3",
        "|  +- n4",
        "+- n2",
        "   +- n5",
        "   +- n6",
    ]


def test_plan_draws_a_large_tree_only_when_asked(karun: Karun) -> None:
    large = ("plan", "-w", "n[1-200]", "--size", "1GiB")
    assert "(source)" not in karun(*large)[1]
    assert "n200" in karun(*large, "--tree")[1]


def test_plan_as_json_holds_choice_reason_alternatives_and_trees(karun: Karun) -> None:
    arguments = ("plan", "-w", "n[1-3]", "--size", "64MiB", "--topology", "stripes", "--json")
    code, out, _ = karun(*arguments)
    found = json.loads(out)
    assert code == 0
    assert (found["nodes"], found["size"]) == (3, 64 << 20)
    assert found["choice"]["topology"] == "stripes"
    assert found["reason"].startswith("asked for")
    assert {one["topology"] for one in found["alternatives"]} >= {"flat", "chain", "lambda"}
    for tree in found["trees"]:
        assert set(tree) == {"n1", "n2", "n3"}
        assert list(tree.values()).count("(source)") == 1


def test_racks_and_uplink_change_the_prediction(karun: Karun) -> None:
    base = ("plan", "-w", "n[1-40]", "--size", "1GB", "--json")
    alone = json.loads(karun(*base)[1])
    racks = json.loads(karun(*base, "--rack-size", "10", "--uplink", "500Mbit")[1])
    assert racks["choice"]["bottleneck"] == "a rack's uplink"
    assert racks["choice"]["seconds"] > 1.8 * alone["choice"]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["-w", "n[1-3", "--size", "1"], 2, "node set"),
        (["-w", "n1!n1", "--size", "1"], 2, "no nodes"),
        (["-w", "n1", "--size", "much"], 2, "not a size"),
        (["-w", "n1", "--size", "1", "--link", "fast"], 2, "not a rate"),
        (["-w", "n1", "--size", "1", "--link", "0Gbit"], 2, "not a rate"),
        (["-w", "n1", "--size", "1", "--fanout", "65"], 2, "fan-out"),
        (["-w", "n1", "--size", "1", "--chunk-size", "0"], 2, "chunk size"),
        (["-w", "n1", "--size", "1GiB", "--chunk-size", "1KiB"], 2, "chunk size"),
        (["-w", "n1", "--size", "5TiB"], 2, "4TiB"),
        (["-w", "n1", "--size", "1", "--topology", "chain", "--multicast"], 2, "--multicast"),
        (["--size", "1"], 2, "-w"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(
    karun: Karun, arguments: list[str], code: int, line: str
) -> None:
    found, out, err = karun("plan", *arguments)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert err.startswith("karun: ")
    assert line in err


@pytest.mark.parametrize("arguments", [["nosuch", "-w", "node[1-3]"], ["--json"]])
def test_what_there_is_not_is_refused_in_one_line(karun: Karun, arguments: list[str]) -> None:
    code, out, err = karun(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)


def test_help_lists_the_commands(karun: Karun) -> None:
    code, out, _ = karun("--help")
    assert code == 0
    listed = {line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line}
    assert {"run", "copy", "gather", "reboot", "session", "shell", "top", "plan"} <= listed
    assert karun("--version")[0] == 0


@pytest.mark.parametrize(
    ("text", "rate"),
    [("1Gbit", 125e6), ("200 Mbit/s", 25e6), ("12.5MB/s", 12.5e6), ("56kbps", 7000)],
)
def test_rates_count_bits_in_thousands(text: str, rate: float) -> None:
    assert parse_rate(text) == rate


def test_racks_are_filled_in_order() -> None:
    assert rack_sizes(45, 20) == (20, 20, 5)
    assert rack_sizes(40, 20) == (20, 20)
    assert rack_sizes(7, None) == (7,)
    with pytest.raises(KaError):
        rack_sizes(0, 4)
