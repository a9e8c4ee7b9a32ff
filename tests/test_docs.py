"""docs/: generated parts are what the code says, every command and flag named exists, real output fits its schema."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from clawnet.answers import ANSWERS
from scripts import gen_docs

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
WITHOUT_JSON = {"daemon", "daemon run", "daemon logs", "completion", "market logs"}
"""Commands that run, follow or print text; `market logs --json` prints lines of "stream"."""


def blocks_of(page: str) -> list[str]:
    """The lines of indented code in a page."""
    return [line[4:] for line in page.splitlines() if line.startswith("    ")]


# --- the generated parts


def test_nothing_generated_is_stale() -> None:
    assert gen_docs.stale() == [], "scripts/gen-docs writes them"


def test_every_block_is_used_and_every_marker_has_a_block() -> None:
    used = [
        name
        for name in gen_docs.PAGES
        for name in re.findall(r"<!-- generated: (\S+) -->", (gen_docs.DOCS / name).read_text())
    ]
    assert sorted(used) == sorted(gen_docs.BLOCKS)


def test_a_change_of_the_code_makes_a_page_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gen_docs.BLOCKS, "limits", lambda: "something else\n")
    assert gen_docs.stale() == ["docs/PROTOCOL.md"]


def test_every_command_is_documented() -> None:
    page = (gen_docs.DOCS / "CLI.md").read_text()
    for command in gen_docs.commands():
        assert f"\n### `{command.path}`\n" in page
        assert command.text, f"{command.path} has no help"
        for name, text in [*command.arguments, *command.options]:
            # an argument whose name says it all needs no sentence
            assert text or (name, text) in command.arguments, f"{command.path} {name} has no help"


def test_every_command_with_json_has_its_schema() -> None:
    leaves = {command.path.removeprefix("clawnet ") for command in gen_docs.commands() if not command.is_group}
    assert leaves - WITHOUT_JSON - set(ANSWERS) == set()
    assert set(ANSWERS) - leaves == {
        *("error", "stream", "stream again", "peer list nearby", "market approve held", "market history executor")
    }


# --- the written parts


def _named() -> Iterator[tuple[str, str]]:
    """(page, words after `clawnet`) of every command line in code blocks and in backticks."""
    for page in PAGES:
        text = page.read_text()
        lines = [*blocks_of(text), *re.findall(r"`([^`\n]+)`", text)]
        for line in lines:
            for found in re.finditer(r"(?:^|[;|(&]\s*|\s)clawnet ((?:[a-z-]+ ?)[^;|)&<>`]*)", line):
                yield page.name, found[1]


def test_commands_and_flags_named_in_the_pages_exist() -> None:
    known = {command.path.removeprefix("clawnet "): command for command in gen_docs.commands()}
    checked = 0
    for page, words in _named():
        told = words.partition(" -- ")[0].partition("  ")[0].split()
        path = " ".join(told[:2]) if " ".join(told[:2]) in known else told[0]
        if told[0] in ("node", "contributors") or path.startswith("-"):
            continue
        assert path in known, f"{page}: clawnet {words}"
        command = known[path]
        if (
            command.is_group
            and len(told) > 1
            and re.fullmatch("[a-z]+", told[1])
            and "|" not in words
            and path != "daemon"
        ):
            raise AssertionError(f"{page}: clawnet {words}")
        flags = {word for name, _ in command.options for word in re.findall(r"-{1,2}[a-z-]+", name)}
        for flag in (word.partition("=")[0] for word in told if word.startswith("-") and word != "-"):
            assert flag in flags, f"{page}: clawnet {words}: {flag}"
            checked += 1
    assert checked > 10


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_pages_speak_of_the_project_alone() -> None:
    """No path of any one machine, and no name of a registry."""
    for page in PAGES:
        text = page.read_text()
        for word in (str(ROOT), str(Path.home()), "pypi" + ".org", "localhost:8"):
            assert word not in text, f"{page.name}: {word}"


# --- real output against the schemas


class Node:
    """One home and its daemon, driven by the real program."""

    def __init__(self, place: Path) -> None:
        self.home = place / "home"
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(place),
            "CLAWNET_HOME": str(self.home),
            "CLAWNET_NETWORK_TCP_PORT": "0",
            "CLAWNET_NETWORK_QUIC_PORT": "0",
            "CLAWNET_NETWORK_ENABLE_MDNS": "false",
            "LC_ALL": "C.UTF-8",
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "clawnet.commands", *words],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node with one settled task and one that found no bid; its daemon is stopped at the end."""
    node = Node(tmp_path_factory.mktemp("docs"))
    try:
        assert node("init", "--name", "alone", "--json").returncode == 0
        done = node("market", "submit", "--type", "compute", "--op", "sha256", "text", "--wait", "--json")
        assert done.returncode == 0, done.stderr
        yield node
    finally:
        node("daemon", "stop", "--quiet")


def schema(command: str) -> Any:
    """The committed schema of a command."""
    return json.loads((gen_docs.DOCS / "schema" / gen_docs.schema_name(command)).read_text())


def strict(node: Any) -> Any:
    """The same schema with no room for keys that it does not name: an undocumented key is a mistake of ours."""
    if isinstance(node, dict):
        closed = {name: strict(value) for name, value in node.items()}
        if "properties" in node:
            closed["additionalProperties"] = False
        return closed
    return [strict(item) for item in node] if isinstance(node, list) else node


def fits(command: str, text: str) -> Any:
    """Checks one JSON document against the command's schema and returns it."""
    value = json.loads(text)
    Draft202012Validator(strict(schema(command))).validate(value)
    return value


def test_every_schema_is_a_schema() -> None:
    for command in ANSWERS:
        Draft202012Validator.check_schema(schema(command))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "config check",
        "config path",
        "config show",
        "daemon status",
        "doctor",
        "identity show",
        "init",
        "market history",
        "market list",
        "peer invite",
        "peer list",
        "peer reputation",
        "version",
        "wallet audit",
        "wallet balance",
        "wallet escrows",
        "wallet history",
    ],
)
def test_output_fits_its_schema(node: Node, command: str) -> None:
    done = node(*command.split(), "--json")
    assert done.returncode == 0, done.stderr
    fits(command, done.stdout)


@pytest.mark.slow
def test_a_tasks_outputs_fit_their_schemas(node: Node) -> None:
    task = fits("run", node("run", "--json", "--", "echo", "out").stdout)
    assert task["result"]["stdout"] == "out\n"
    accepted = fits("market submit", node("market", "submit", "--json", "--type", "shell", "exit 3").stdout)
    fits("market wait", node("market", "wait", "--json", accepted["task_id"]).stdout)
    for command in ("market show", "market status", "market result", "market bids", "market why"):
        fits(command, node(*command.split(), "--json", accepted["task_id"]).stdout)
    *lines, whole = node("run", "--stream", "--json", "--", "sh", "-c", "echo a; echo b >&2").stdout.splitlines()
    assert {fits("stream", line)["stream"] for line in lines} == {"stdout", "stderr"}
    fits("run", whole)
    fits("config get", node("config", "get", "log.level", "--json").stdout)
    fits("config set", node("config", "set", "log.level", "debug", "--json").stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("nonsense",), 64),
        (("market", "show", "ffffffff"), 66),
        (("run", "--budget", "lots", "--", "true"), 65),
        (("wallet", "send", "nobody", "1"), 66),
        (("market", "submit", "a prompt", "--wait"), 75),
    ],
)
def test_errors_fit_their_schema_and_their_codes(node: Node, words: tuple[str, ...], code: int) -> None:
    done = node(*words[:1], *words[1:], "--json") if "--" not in words else node(words[0], "--json", *words[1:])
    assert done.returncode == code
    error = fits_error(done.stderr)
    assert error["exit_code"] == code
    page = (gen_docs.DOCS / "CLI.md").read_text()
    assert f"| {code} | `{error['code']}` |" in page


def fits_error(text: str) -> dict[str, Any]:
    """The error object on stderr; it may carry further keys."""
    value = json.loads(text.splitlines()[-1])
    Draft202012Validator(schema("error")).validate(value)
    error: dict[str, Any] = value["error"]
    return error
