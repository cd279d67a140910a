"""Printers: labelled, gathered, JSON, files; summaries and exit codes; readers that go away."""

from __future__ import annotations

import base64
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Code, KaError
from karun.lines import LINE_SIZE_MAX, STDERR, STDOUT
from karun.nodes import Names
from karun.output import Form, Printer, Style, make_printer, wants_colour
from karun.sinks import OPEN_COUNT_MAX, NodeFiles
from karun.terminal import Terminal

NODES = Names([f"node{n}" for n in range(1, 9)])


class Screen:
    """Standard output and error in memory."""

    def __init__(self) -> None:
        self.text = {STDOUT: b"", STDERR: b""}
        self.has_reader = True

    def write(self, stream: int, data: bytes) -> None:
        assert data.endswith(b"\n")
        self.text[stream] += data

    @property
    def out(self) -> str:
        return self.text[STDOUT].decode()

    @property
    def err(self) -> str:
        return self.text[STDERR].decode()


def printer(form: Form = Form.LABELLED, **style: Any) -> tuple[Printer, Screen]:
    screen = Screen()
    return make_printer(NODES, screen, Style(form=form, **style)), screen


def all_exit(printer: Printer, codes: dict[int, int] | None = None) -> int:
    for node in range(len(NODES)):
        printer.exited(node, (codes or {}).get(node, 0))
    return printer.finish()


# ---------------------------------------------------------------- labelled


def test_lines_carry_their_node_and_keep_their_stream() -> None:
    show, screen = printer()
    show.output(0, STDOUT, b"one\ntw")
    show.output(1, STDERR, b"oops\n")
    assert screen.out == "node1: one\n"
    assert screen.err == "node2: oops\n"
    show.output(0, STDOUT, b"o\n")
    assert screen.out == "node1: one\nnode1: two\n"
    assert all_exit(show) == 0


def test_a_last_line_without_newline_is_printed_when_its_node_ends() -> None:
    show, screen = printer()
    show.output(0, STDOUT, b"no end")
    show.output(1, STDERR, b"neither")
    assert screen.out == screen.err == ""
    show.exited(0, 0)
    show.failed(1, "gone", "lost")
    assert screen.out == "node1: no end\n"
    assert screen.err == "node2: neither\n"


def test_bytes_that_are_not_text_pass_unchanged() -> None:
    show, screen = printer()
    show.output(0, STDOUT, b"\xff\x00\xfe\n")
    assert screen.text[STDOUT] == b"node1: \xff\x00\xfe\n"


def test_a_line_without_end_is_printed_in_pieces() -> None:
    show, screen = printer(label=False)
    show.output(0, STDOUT, b"x" * (2 * LINE_SIZE_MAX + 5))
    assert screen.text[STDOUT] == (b"x" * LINE_SIZE_MAX + b"\n") * 2


def test_labels_are_coloured_only_where_asked_for() -> None:
    show, screen = printer(colour_out=True)
    show.output(0, STDOUT, b"a\n")
    show.output(0, STDERR, b"b\n")
    assert screen.out == "\x1b[94mnode1:\x1b[0m a\n"
    assert screen.err == "node1: b\n"


@pytest.mark.parametrize(
    ("environment", "is_terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"CLICOLOR_FORCE": "1"}, False, True),
        ({"CLICOLOR_FORCE": "0"}, False, False),
        ({"CLICOLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_are_for_terminals_and_heed_the_environment(
    environment: dict[str, str], is_terminal: bool, expected: bool
) -> None:
    assert wants_colour(environment, is_terminal=is_terminal) is expected


# ---------------------------------------------------------------- gathered


def test_equal_output_is_printed_once_under_the_names_of_its_nodes() -> None:
    show, screen = printer(Form.GATHERED)
    for node in range(8):
        show.output(node, STDOUT, b"odd\n" if node in (2, 6) else b"same\n")
    assert screen.out == ""
    assert all_exit(show) == 0
    line = "-" * 15
    assert screen.out == (
        f"{line}\nnode[1-2,4-6,8] (6)\n{line}\nsame\n{line}\nnode[3,7] (2)\n{line}\nodd\n"
    )


def test_groups_are_ordered_by_exit_code_and_then_by_size() -> None:
    show, screen = printer(Form.GATHERED, by_line=True)
    for node in range(8):
        show.output(node, STDOUT, b"bad\n" if node < 5 else b"good\n")
    all_exit(show, dict.fromkeys(range(5), 3))
    assert screen.out == "node[6-8]: good\nnode[1-5]: bad\n"
    assert screen.err == "karun: node[1-5]: exited with exit code 3\n"


def test_standard_error_is_printed_at_once_unless_it_is_gathered_too() -> None:
    show, screen = printer(Form.GATHERED)
    show.output(0, STDERR, b"e\n")
    assert screen.err == "node1: e\n"
    show, screen = printer(Form.GATHERED_ALL)
    show.output(0, STDERR, b"e\n")
    show.output(1, STDOUT, b"e\n")
    assert screen.err == ""
    all_exit(show)
    assert "node[1-2] (2)\n" in screen.out


def test_by_line_without_gathering_is_in_the_order_of_nodes() -> None:
    show, screen = printer(by_line=True)
    show.output(5, STDOUT, b"f\n")
    show.output(0, STDOUT, b"a\nb\n")
    all_exit(show)
    assert screen.out == "node1: a\nnode1: b\nnode6: f\n"


def test_differences_are_from_what_most_nodes_wrote() -> None:
    show, screen = printer(Form.GATHERED, diff=True)
    for node in range(8):
        show.output(node, STDOUT, b"a\nx\n" if node == 7 else b"a\nb\n")
    all_exit(show)
    assert screen.out == "--- node[1-7] (7)\n+++ node8\n@@ -1,2 +1,2 @@\n a\n-b\n+x\n"


def test_no_difference_prints_nothing() -> None:
    show, screen = printer(Form.GATHERED, diff=True)
    assert all_exit(show) == 0
    assert screen.out == ""


def test_an_interrupted_run_prints_what_was_gathered_and_names_the_rest() -> None:
    show, screen = printer(Form.GATHERED)
    show.output(0, STDOUT, b"done\n")
    show.exited(0, 0)
    show.output(1, STDOUT, b"hal")
    assert show.finish() == 255
    assert "node1\n" in screen.out
    assert "hal\n" in screen.out
    assert screen.err == "karun: node[2-8]: no result\n"


# ---------------------------------------------------------------- verdicts


def test_the_summary_is_folded_by_reason() -> None:
    show, screen = printer()
    for node in (2, 6):
        show.failed(node, "no route to host")
    show.failed(0, "permission denied")
    show.failed(1, "after 10 s", "timeout")
    show.failed(3, "its relay died\nand all\x1b[2J", "lost")
    show.exited(4, 0, signal=9)
    show.exited(5, 3)
    show.exited(7, 0)
    assert show.finish() == 255
    assert screen.err.splitlines() == [
        "karun: node6: exited with exit code 3",
        "karun: node5: killed by signal 9 (SIGKILL)",
        "karun: node2: command timed out (after 10 s)",
        "karun: node1: unreachable (permission denied)",
        "karun: node[3,7]: unreachable (no route to host)",
        "karun: node4: lost (its relay died and all [2J)",
    ]
    assert [result.code for result in show.results] == [255, 124, 255, 255, 137, 3, 255, 0]


@pytest.mark.parametrize(
    ("codes", "highest", "expected"),
    [({}, True, 0), ({1: 3, 2: 7}, True, 7), ({1: 3}, False, 0)],
)
def test_the_exit_code_is_the_highest_when_asked(
    codes: dict[int, int], highest: bool, expected: int
) -> None:
    show, _ = printer(highest=highest)
    assert all_exit(show, codes) == expected


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("stage", ["connect", "agent", "lost", "timeout"])
def test_a_node_without_a_code_of_its_own_makes_it_255(highest: bool, stage: str) -> None:
    show, _ = printer(highest=highest)
    show.failed(4, "why", stage)
    assert all_exit(show, {1: 3}) == 255


def test_the_first_verdict_stands() -> None:
    show, _ = printer()
    show.exited(0, 0)
    show.failed(0, "lost after its end", "lost")
    assert all_exit(show) == 0


def test_quiet_is_silent_on_exit_codes_but_not_on_lost_nodes() -> None:
    show, screen = printer(quiet=True)
    show.failed(0, "no route to host")
    all_exit(show, {1: 3})
    assert screen.err == "karun: node1: unreachable (no route to host)\n"


# ---------------------------------------------------------------- JSON


def records(screen: Screen) -> list[dict[str, Any]]:
    return [json.loads(line) for line in screen.out.splitlines()]


def test_json_is_an_object_for_each_node_and_a_summary() -> None:
    show, screen = printer(Form.JSON, highest=True)
    show.output(1, STDOUT, "é\nno end".encode())
    show.output(1, STDERR, b"\xff")
    show.exited(1, 3)
    show.failed(0, "no route to host")
    assert records(screen) == [
        {
            "type": "node", "node": "node2", "rank": 1, "state": "exited", "code": 3,
            "signal": None, "reason": None, "stdout": "é\nno end", "stderr_base64": "/w==",
        },
        {
            "type": "node", "node": "node1", "rank": 0, "state": "unreachable", "code": 255,
            "signal": None, "reason": "no route to host", "stdout": "", "stderr": "",
        },
    ]  # fmt: skip
    assert all_exit(show) == 255
    assert records(screen)[-1] == {
        "type": "summary",
        "nodes": 8,
        "good": 6,
        "codes": {"0": "node[3-8]", "3": "node2", "255": "node1"},
        "exit_code": 255,
    }


@given(st.lists(st.tuples(st.integers(0, 7), st.binary(max_size=9)), max_size=30))
def test_json_loses_no_byte(pieces: list[tuple[int, bytes]]) -> None:
    show, screen = printer(Form.JSON)
    for node, data in pieces:
        show.output(node, STDOUT, data)
    all_exit(show)
    for record in records(screen)[:-1]:
        written = b"".join(data for node, data in pieces if node == record["rank"])
        text = record.get("stdout")
        found = base64.b64decode(record["stdout_base64"]) if text is None else text.encode()
        assert found == written


# ---------------------------------------------------------------- the edge


def test_files_of_each_node_get_its_bytes_and_the_screen_too(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/node1").write_text("of an earlier run")
    files = NodeFiles([NODES[n] for n in range(8)], tmp_path / "out", tmp_path / "err")
    screen = Screen()
    show = make_printer(NODES, screen, Style(), files.append)
    show.output(0, STDOUT, b"\xffhalf")
    show.output(0, STDOUT, b" line")
    show.output(1, STDERR, b"e\n")
    assert all_exit(show) == 0
    files.close()
    assert (tmp_path / "out/node1").read_bytes() == b"\xffhalf line"
    assert (tmp_path / "err/node2").read_bytes() == b"e\n"
    assert sorted(os.listdir(tmp_path / "out")) == [f"node{n}" for n in range(1, 9)]
    assert (tmp_path / "out/node2").read_bytes() == b""
    assert screen.text[STDOUT] == b"node1: \xffhalf line\n"


def test_more_nodes_than_descriptors_have_their_files(tmp_path: Path) -> None:
    names = [f"n{n}" for n in range(OPEN_COUNT_MAX + 50)]
    files = NodeFiles(names, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for turn in (b"one", b"two"):
        for node in range(len(names)):
            files.append(node, STDOUT, turn)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_COUNT_MAX
    files.close()
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"onetwo"}


@pytest.mark.parametrize("name", ["..", ".", "a/b"])
def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(KaError, match="not a name for a file"):
        NodeFiles([name], tmp_path)


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(KaError, match=r"cannot write .*file"):
        NodeFiles(["n"], tmp_path / "file")


def test_a_reader_that_goes_away_stops_the_writing_and_shows_in_the_exit_code() -> None:
    reader, writer = os.pipe()
    spare = os.open(os.devnull, os.O_WRONLY)
    show = make_printer(NODES, Terminal(writer, spare), Style())
    show.output(0, STDOUT, b"first\n")
    assert os.read(reader, 100) == b"node1: first\n"
    os.close(reader)
    for _ in range(3):
        show.output(0, STDOUT, b"more\n")
    assert all_exit(show) == 141
    os.close(writer)
    os.close(spare)


def test_a_nonblocking_stream_gets_everything() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = b"x" * (1 << 20) + b"\n"
    found = bytearray()

    def drain() -> None:
        while piece := os.read(reader, 1 << 16):
            found.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    Terminal(writer).write(STDOUT, data)
    os.close(writer)
    thread.join()
    os.close(reader)
    assert bytes(found) == data


def test_a_full_disk_is_one_line() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(KaError, match="cannot write to standard output: No space left") as caught:
        Terminal(fd).write(STDOUT, b"x\n")
    assert caught.value.code is Code.ENOSPC
    os.close(fd)
