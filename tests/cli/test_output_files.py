"""Files in and out between two machines: what goes along, what comes back, and what is never written."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.adapters.hostile_trees import TRICKS
from tests.cli.conftest import Program, Script, task
from tests.cli.harness import Node, Nodes, checked, connected, join

pytestmark = pytest.mark.slow

BUILD = r"""
set -e
test "$1" = dist
mkdir -p dist/many dist/empty
i=0; while [ $i -lt 1000 ]; do echo "file $i" > dist/many/$i.txt; i=$((i+1)); done
head -c 20000000 /dev/zero | tr '\0' 'x' > dist/big
printf '#!/bin/sh\necho hello\n' > dist/tool
chmod 755 dist/tool
ln -s tool dist/current
cp "$(printf 'gr\303\274\303\237e.txt')" dist/
cp src/main.c dist/main.c
echo other > other
echo "built" >&2
"""
LIAR = (sys.executable, "-P", "-c", "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "sys.argv[0] = 'clawnet'; runpy.run_module('tests.cli.lying_node', run_name='__main__')",
        str(Path(__file__).parents[2]))  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Node, Node]]:
    """Alice submits; Bob, a member of her mesh, has the machine that takes it."""
    nodes = Nodes()
    try:
        alice, bob = nodes.mesh("alice", "bob")
        if bob.ask("status")["shell"]["member"] != "sandboxed":
            pytest.skip("bubblewrap not installed")
        yield alice, bob
    finally:
        nodes.close()


def _abroad(bob: Node) -> tuple[str, ...]:
    return "--ring", "member", "--prefer", "market", "--peer", bob.peer_id


def _project(root: Path) -> Path:
    (root / "src").mkdir(parents=True)
    (root / "make.sh").write_text(BUILD)
    (root / "src" / "main.c").write_text("int main(void) { return 0; }\n")
    (root / "grüße.txt").write_text("hallo\n")
    return root


def _files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_build_on_another_machine_brings_its_files_back(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, bob = pair
    root = _project(tmp_path / "project")
    (root / "dist").mkdir()
    (root / "dist" / "tool").write_text("old")
    status = tmp_path / "status.json"
    done = alice(
        *("run", *_abroad(bob), "--input", ".", "--output", "dist/*", "--output-dir", "."),
        *("--status-file", str(status), "--", "sh", "make.sh", "dist"),
        cwd=root,
    )
    assert (done.code, done.out, done.err) == (0, "", "built\n")
    dist = root / "dist"
    assert len(list((dist / "many").iterdir())) == 1000
    assert (dist / "many" / "999.txt").read_text() == "file 999\n"
    assert (dist / "big").read_bytes() == b"x" * 20_000_000
    assert (dist / "tool").read_text().startswith("#!") and os.access(dist / "tool", os.X_OK)
    assert (dist / "current").is_symlink() and os.readlink(dist / "current") == "tool"
    assert (dist / "grüße.txt").read_text() == "hallo\n"
    assert (dist / "empty").is_dir()
    assert not os.access(dist / "main.c", os.X_OK)
    assert not (root / "other").exists(), "only what was asked for comes"
    assert not list(root.rglob(".clawnet*"))
    told = checked(json.loads(status.read_text()))
    result = told["result"]
    assert (result["outputs_count"], len(result["outputs"])) == (1_004, 256)
    assert result["outputs_bytes"] > 20_000_000
    first = result["outputs"][0]
    assert first["sha256"] == sha256((root / first["name"]).read_bytes()).hexdigest()
    # They are kept: later, and elsewhere, they can be had again.
    again = alice("market", "result", told["task_id"], "--output-dir", str(tmp_path / "again" / "deep"))
    assert again.code == 0
    assert _files(tmp_path / "again" / "deep" / "dist") == _files(dist)
    shown = alice("market", "show", told["task_id"])
    assert f"sha256 {first['sha256']}" in shown.out and "and 748 more files" in shown.out


def test_files_come_back_whatever_the_exit_code_and_what_is_missing_is_said(
    pair: tuple[Node, Node], tmp_path: Path
) -> None:
    alice, bob = pair
    script = "mkdir reports; echo failed > reports/junit.xml; mkfifo reports/pipe; echo x > reports/aux.txt; exit 3"
    done = alice(
        *("run", *_abroad(bob), "--output", "reports/*", "--output", "core.*", "--output", "exact.txt"),
        *("--", "sh", "-c", script),
        cwd=tmp_path,
    )
    assert done.code == 3
    assert _files(tmp_path) == {"reports/junit.xml": "failed\n"}
    for words in ("no file matched --output 'core.*'", "'exact.txt'", "pipe is no file", "aux.txt is a name that"):
        assert words in done.err
    quiet = alice("run", "-q", *_abroad(bob), "--output", "none", "--", "true", cwd=tmp_path)
    assert (quiet.code, quiet.err) == (0, "")


def test_files_of_runs_at_home_come_back_too(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    done = alice("run", "--json", "--output", "out/**/*.txt", "--", "sh", "-c", "mkdir -p out/a; echo 1 > out/a/b.txt",
                 cwd=tmp_path)  # fmt: skip
    assert checked(done.json("run"))["result"]["outputs"][0]["name"] == "out/a/b.txt"
    assert _files(tmp_path) == {"out/a/b.txt": "1\n"}


def test_a_submitted_task_is_waited_for_or_fetched_from_later(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, bob = pair
    where = tmp_path / "here"
    done = alice(
        *("market", "submit", "--type", "shell", *_abroad(bob), "--output", "x", "--wait"),
        *("--output-dir", str(where), "echo 1 > x"),
    )
    assert (done.code, _files(where)) == (0, {"x": "1\n"})
    name = alice("market", "submit", "--type", "shell", *_abroad(bob), "--output", "x", "echo 2 > x").line
    alice.reaches(name, "settled")
    assert alice("market", "result", name).code == 0
    attached = alice("run", "--attach", name, "--output-dir", str(where))
    assert (attached.code, _files(where)) == (0, {"x": "2\n"})
    bob.kill()
    bob.start()
    # Each start takes another port: one of the two has to know where the other is when both have died.
    place = bob.ask("status")["listen"][0].partition("/p2p/")[0]
    alice.until("knows where bob is", lambda: place in " ".join(alice.ask("peer.list")["items"][0]["addresses"]))
    alice.kill()
    alice.start()
    assert alice("market", "result", name[:10], "--output-dir", str(tmp_path / "there")).code == 0
    assert _files(tmp_path / "there") == {"x": "2\n"}
    alice.until("bob is back", lambda: alice.ask("peer.list")["items"][0]["state"] == "connected")


def test_a_spec_and_a_batch_say_where_their_files_go(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    spec = tmp_path / "task.yaml"
    spec.write_text(f"type: shell\nargv: [sh, -c, 'echo 1 > x']\noutputs: [x]\noutput_dir: {tmp_path}/spec\n")
    assert alice("run", "--spec", str(spec)).code == 0
    assert _files(tmp_path / "spec") == {"x": "1\n"}
    (tmp_path / "file").write_text("in the way")
    lines = [
        {"type": "shell", "argv": ["sh", "-c", f"echo {n} > x"], "outputs": "x", "output_dir": str(tmp_path / name)}
        for n, name in enumerate(["one", "two"])
    ]
    late = {**lines[0], "argv": ["sh", "-c", "mkdir x; echo 3 > x/y"], "output_dir": str(tmp_path / "one")}
    batch = tmp_path / "lines"
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert alice("market", "batch", str(batch)).code == 0
    assert (_files(tmp_path / "one"), _files(tmp_path / "two")) == ({"x": "0\n"}, {"x": "1\n"})
    batch.write_text(json.dumps(late) + "\n")
    done = alice("market", "batch", str(batch))
    (line,) = [json.loads(text) for text in done.out.splitlines()]
    assert (done.code, line["exit_code"], line["task"]["state"]) == (1, 65, "settled")
    assert "is a file there" in line["error"]["message"]
    batch.write_text(json.dumps({**late, "output_dir": str(tmp_path / "file")}) + "\n")
    alice("market", "batch", str(batch)).failed(65, "not a directory")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--output-dir", "."], 64, "--output-dir goes with --output"),
        (["--output", "../x"], 65, "leads out"),
        (["--output", "/etc/passwd"], 65, "leads out"),
        (["--output", "a\\b"], 65, "backslash"),
        (["--output", "x", "--output-dir", "file"], 65, "not a directory"),
        (["--output", "x", "--output-dir", "file/below"], 65, "not a directory"),
        (["--output", "x", "--output-dir", "{home}"], 77, "clawnet's own home"),
        (["--output", "x", "--output-dir", "{home}/keys/new"], 77, "clawnet's own home"),
        (["--output", "x", "--output-dir", "/proc/sys/nothing"], 77, "cannot be written to"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_submitted(
    pair: tuple[Node, Node], tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    alice, _ = pair
    (tmp_path / "file").write_text("x")
    before = alice.ask("task.list", limit=1)["items"]
    given = [option.format(home=alice.dir) for option in options]
    alice("run", *given, "--", "true", cwd=tmp_path).failed(code, words)
    assert alice.ask("task.list", limit=1)["items"] == before


def test_a_prompt_and_an_operation_leave_no_files(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    alice("market", "submit", "--output", "x", "Summarize").failed(64, "leaves no files")
    alice("market", "submit", "--type", "compute", "--op", "sha256", "--output", "x", "t").failed(64, "leaves no files")
    alice("market", "submit", "--type", "shell", "--output", "x", "--output-dir", ".", "true").failed(64, "--wait")


def test_more_than_is_allowed_ends_the_task_and_writes_nothing(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, bob = pair
    assert alice("config", "set", "market.outputs_max", "100KiB").code == 0
    try:
        done = alice(
            *("run", *_abroad(bob), "--output", "x", "--status-file", str(tmp_path / "status.json")),
            *("--", "sh", "-c", "head -c 200000 /dev/zero > x"),
            cwd=tmp_path,
        )
    finally:
        assert alice("config", "set", "market.outputs_max", "2GiB").code == 0
    done.failed(76, "more than 102400 bytes")
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["result"]) == ("failed", None)
    assert told["attempts"][0]["reason"].startswith("output_limit")
    assert not (tmp_path / "x").exists()


def test_files_that_cannot_be_placed_are_told_and_the_old_ones_stay(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    status, where = tmp_path / "status.json", tmp_path / "here"
    (where / "d" / "a").mkdir(parents=True)
    command = ("run", "--output", "d/*", "--output-dir", str(where), "--status-file", str(status), "--", "sh", "-c")
    alice(*command, "mkdir d; echo 1 > d/a; echo 2 > d/b").failed(65, "'d/a' is a directory there")
    told = checked(json.loads(status.read_text()))
    assert (told["state"], told["result"]["exit_code"], told["error"]["exit_code"]) == ("settled", 0, 65)
    assert (_files(where), list((where / "d" / "a").iterdir())) == ({}, [])
    failed = alice(*command, "mkdir d; echo 1 > d/a; exit 9")
    assert failed.code == 9 and "is a directory there" in failed.err, "the command's own code tells more"
    as_json = alice(command[0], "--json", *command[1:], "mkdir d; echo 1 > d/a")
    assert (as_json.code, as_json.json()["error"]) == (65, None)
    assert json.loads(as_json.err)["error"]["code"] == "bad_input"


def test_a_daemon_that_dies_while_it_saves_leaves_all_or_nothing(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    script = "mkdir d; for i in $(seq 60); do head -c 2000000 /dev/urandom > d/$i; done"
    name = alice("market", "submit", "--type", "shell", "--output", "d/*", script).line
    assert alice.reaches(name, "settled")["result"]["outputs_count"] == 60
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1").write_text("old")
    with alice.popen("market", "result", name, "--output-dir", str(tmp_path)) as saving:
        alice.until("saves", lambda: list(tmp_path.glob(".clawnet-saving-*/new/d/2*")))
        alice.kill()
        assert saving.wait(60) == 69
    alice.start()
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert left in (["1", "d"], sorted(["d", *map(str, range(1, 61))])), "all of it, or what was there"
    assert not list((alice.dir / "saving").iterdir())
    assert alice("market", "result", name, "--output-dir", str(tmp_path)).code == 0
    assert len(list((tmp_path / "d").iterdir())) == 60
    assert not list(tmp_path.glob(".clawnet-saving-*"))


def test_git_decides_what_stays_at_home(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, bob = pair
    root = tmp_path / "repo"
    (root / ".git" / "info").mkdir(parents=True)
    (root / "sub").mkdir()
    for name, text in ((".gitignore", "*.key\nbuild/\n"), ("a.key", "secret"), ("sub/.gitignore", "!b.key\n"),
                       ("sub/b.key", "public"), ("main.c", "x")):  # fmt: skip
        (root / name).write_text(text)
    done = alice("run", "-v", *_abroad(bob), "--gitignore", "--input", ".", "--", "find", ".", "-type", "f", cwd=root)
    assert sorted(done.out.split()) == ["./.gitignore", "./main.c", "./sub/.gitignore", "./sub/b.key"]
    assert "2 that Git ignores stay behind" in done.err
    whole = alice("run", *_abroad(bob), "--input", ".", "--", "cat", "a.key", cwd=root)
    assert whole.out == "secret"


# --- an executor that lies


@pytest.fixture(scope="module")
def liars() -> Iterator[tuple[Node, Node]]:
    """Alice, and Mallory, whose node sends other files than were asked for."""
    nodes = Nodes()
    try:
        alice, mallory = nodes("alice").start(), nodes("mallory")
        honest, mallory.program = mallory.program, LIAR
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with mallory.popen("daemon", "run", **quiet) as daemon:
            mallory.program = honest
            mallory.until("runs", lambda: mallory.pid)
            join(alice, mallory)
            if mallory.ask("status")["shell"]["member"] != "sandboxed":
                pytest.skip("bubblewrap not installed")
            alice.until("sees mallory", lambda: connected(alice))
            yield alice, mallory
            daemon.terminate()
            daemon.wait(60)
    finally:
        nodes.close()


@pytest.mark.parametrize("trick", [name for name in TRICKS if name != "empty"])
def test_a_lie_about_files_is_no_result_and_writes_nothing(
    liars: tuple[Node, Node], tmp_path: Path, trick: str
) -> None:
    alice, mallory = liars
    done = alice(
        *("run", "--json", *_abroad(mallory), "--output", "dist/*"),
        *("--", "sh", "-c", 'printf %s "$0" > trick; mkdir dist; echo good > dist/x', trick),
        cwd=tmp_path,
    )
    told = checked(done.json("run"))
    assert (done.code, told["state"], told["error"]["code"]) == (80, "settled", "verification_failed"), told["error"]
    assert told["escrow"]["state"] == "claimed", "it was paid before it could be opened; the proof is kept"
    assert list(tmp_path.iterdir()) == []
    alice("market", "result", told["task_id"], "--output-dir", str(tmp_path / "later")).failed(80)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/tmp/clawnet-evil").exists()


def test_the_same_node_when_it_does_not_lie_delivers(liars: tuple[Node, Node], tmp_path: Path) -> None:
    alice, mallory = liars
    done = alice("run", *_abroad(mallory), "--output", "x", "--", "sh", "-c", "echo good > x", cwd=tmp_path)
    assert (done.code, _files(tmp_path)) == (0, {"x": "good\n"})


# --- on a terminal


def _on_terminal(clawnet: Program, *arguments: str, cwd: Path) -> tuple[int, str]:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        argv = clawnet.argv(*arguments)
        os.execve(argv[0], argv, {**clawnet.environ, "TERM": "xterm", "COLUMNS": "100"})
    text = b""
    try:
        while piece := os.read(terminal, 65_536):
            text += piece
    except OSError:
        pass  # how the other end of a terminal is told to be closed
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


def test_a_person_sees_how_far_it_is(node: Script, clawnet: Program, tmp_path: Path) -> None:
    mib = 2**20
    name = task()["task_id"]
    node.answers |= {
        "task.submit": {"task_id": name, "created": True},
        "task.follow": task(),
        "task.save": {"task_id": name, "directory": str(tmp_path), "files": 2, "bytes": 5 * mib},
    }
    node.notes |= {
        "task.submit": [("task.progress", {"what": "packing", "done": 7 * mib, "total": 0})],
        "task.follow": [("task.progress", {"what": "uploading", "done": 3 * mib, "total": 9 * mib})],
        "task.save": [("task.progress", {"what": "saving", "done": 4 * mib, "total": 5 * mib})],
    }
    (tmp_path / "in").write_text("x")
    command = ("run", "--input", "in", "--output", "x", "--", "true")
    code, seen = _on_terminal(clawnet, *command, cwd=tmp_path)
    assert code == 0, seen
    for words in ("packing", "7.0", "uploading", "3.0/9.0 MiB", "saving", "4.0/5.0 MiB", "2 output files in"):
        assert words in seen, seen
    assert node.params("task.follow")["progress"] is True
    code, seen = _on_terminal(clawnet, command[0], "-q", *command[1:], cwd=tmp_path)
    assert (code, "packing" in seen, "saving" in seen) == (0, False, False)
    done = clawnet(*command, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n"), "where nobody watches there is no bar"
