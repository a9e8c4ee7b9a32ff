"""Acceptance contracts: what is a condition, what a document's conditions mean, what a report may say, JSON Schema."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import DataError, WireError
from clawnet.execution import schema
from clawnet.ledger.taskdoc import Condition, TaskDocument, TaskInput
from clawnet.market import contracts
from clawnet.market.capability import unmet
from clawnet.market.reasons import Reason
from clawnet.market.taskspec import normalise
from clawnet.node.verdicts import cannot_judge, checks_of, files_of
from clawnet.reputation.receipts import EFFECTS, Outcome, outcome_of_waiver
from clawnet.wire import verdict as v
from clawnet.wire.messages import Requirements
from tests.rules.test_capability import card

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
VALUE_MAX = limits.CONTRACT_VALUE_BYTES_MAX
DRAFT_7 = b'"$schema": "http://json-schema.org/draft-07/schema#"'
SHELL = {"type": "shell", "argv": ["true"]}


def normal(accept: Any, **spec: Any) -> dict[str, Any]:
    return normalise({**SHELL, "accept": accept, **spec}, Config.defaults(), family="linux")


# --- from a submission


@pytest.mark.parametrize(
    ("given", "kind", "text", "value"),
    [
        ("exit:0", "exit_code", "exit:0", b"0"),
        ("exit:007", "exit_code", "exit:7", b"7"),
        ({"exit": 255}, "exit_code", "exit:255", b"255"),
        ("sha256:" + ABC.upper(), "output_sha256", "sha256:" + ABC, bytes.fromhex(ABC)),
        ({"schema": {"type": "object"}}, "output_schema", "schema", b'{"type":"object"}'),
        ({"schema": False, "name": "s.json"}, "output_schema", "schema:s.json", b"false"),
        ("test:cmp 'a:b'", "verifier_command", "test:cmp 'a:b'", msgspec.msgpack.encode({"script": "cmp 'a:b'"})),
        ({"wasm": "/tmp/x/check.wasm"}, "verifier_wasm", "wasm:check.wasm", b"accept-1.wasm"),
    ],
)  # fmt: skip
def test_conditions_are_read(given: Any, kind: str, text: str, value: bytes) -> None:
    (one,) = contracts.read([given])
    assert (one.kind, one.text, one.value) == (kind, text, value)
    assert contracts.read(given) == [one]


@pytest.mark.parametrize(
    "given",
    [
        *("exit:", "exit:256", "exit:-1", "exit:1.0", "exit:٣", "exit", "exit:0000", {"exit": True}, {"exit": "x"}),
        *("sha256:", "sha256:12", "sha256:" + "g" * 64, "sha256:" + ABC + "0", {"sha256": 5}),
        *("schema:file.json", {"schema": "text"}, {"schema": 3}, {"schema": {"a": "x" * VALUE_MAX}}),
        *("test:", "test:  ", "test:a\0b", {"test": ["a"]}, "test:" + "x" * VALUE_MAX, "test:\ud800"),
        *("wasm:x.wasm", {"wasm": ""}, {"wasm": 1}, "colour:red", "", {}, {"exit": 0, "sha256": ABC}, 7, None),
        {"exit": 0, "name": 5},
    ],
)  # fmt: skip
def test_what_is_no_condition_is_bad_input(given: Any) -> None:
    with pytest.raises(DataError) as caught:
        contracts.read([given])
    assert caught.value.exit_code == 65 and caught.value.details["field"] == "accept"
    assert len(caught.value.message) < 400


def test_there_are_at_most_so_many_conditions() -> None:
    assert len(contracts.read(["exit:0"] * limits.CONTRACT_CONDITIONS_MAX)) == limits.CONTRACT_CONDITIONS_MAX
    for accept in (["exit:0"] * (limits.CONTRACT_CONDITIONS_MAX + 1), 5, True):
        with pytest.raises(DataError):
            contracts.read(accept)
    assert contracts.read(None) == contracts.read([]) == []


def test_a_verifier_is_something_that_its_executor_must_be_able_to_run() -> None:
    prompt = {"type": "prompt", "description": "x", "argv": None}
    assert normal(["exit:0"], **prompt)["requirements"]["capabilities"] == ["ai-inference"]
    asked = normal(["test:true"], **prompt)["requirements"]
    assert asked["capabilities"] == ["ai-inference", "shell-execution"] and asked["os"] == "linux"
    assert normal(["test:true"], os="any", **prompt)["requirements"]["os"] == ""
    assert normal([{"wasm": "/x.wasm"}])["requirements"]["capabilities"] == ["shell-execution", "wasm"]


def test_a_verifier_module_is_an_input_and_no_file_of_the_task() -> None:
    spec = normal(["exit:0", {"wasm": "/x/y.wasm"}], inputs=[{"name": "a", "path": "/a"}])
    assert [item["name"] for item in spec["inputs"]] == ["a", "accept-2.wasm"]
    packed = [{"name": "a"}, {"name": "accept-2.wasm"}]
    assert contracts.files(packed, spec) == [{"name": "a"}]
    with pytest.raises(DataError, match=r"accept-1\.wasm"):
        normal([{"wasm": "/x"}], inputs=[{"name": "accept-1.wasm", "path": "/a"}])
    with pytest.raises(DataError):
        normal([{"wasm": "/x"}], inputs=[{"name": f"i{n}", "path": "/a"} for n in range(limits.INPUTS_MAX)])


# --- from a task document


def document(*acceptance: tuple[str, bytes], **fields: Any) -> TaskDocument:
    inputs = [TaskInput("a", "file", bytes(32), 1, 0o644), TaskInput("accept-1.wasm", "file", bytes(32), 8, 0o644)]
    inputs.append(TaskInput("tree", "tree", bytes(32), 8, 0))
    conditions = [Condition(kind, value) for kind, value in acceptance]
    return TaskDocument("compute", b"", inputs, conditions, 30, False, 0, bytes(32))


def test_what_a_submission_says_is_what_execution_judges_by() -> None:
    accept = ["exit:3", "sha256:" + ABC, {"schema": {}}, "test:true"]
    read = [(one.kind, one.value) for one in contracts.read(accept)]
    checks = checks_of(document(*read, ("verifier_wasm", b"accept-1.wasm")))
    assert [one.kind for one in checks] == list(contracts.WORDS.values())
    assert checks[0].value == b"3" and checks[3].argv == ("sh", "-c", "true", "sh")
    assert checks[4].module is not None and checks[4].module.size == 8
    assert [item.name for item in files_of(document(*read, ("verifier_wasm", b"accept-1.wasm")))] == ["a", "tree"]
    assert [item.name for item in files_of(document())] == ["a", "accept-1.wasm", "tree"]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("colour", b"red"),
        ("exit_code", b""),
        ("exit_code", b"256"),
        ("exit_code", b"-1"),
        ("exit_code", "٣".encode()),
        ("output_sha256", bytes(31)),
        ("verifier_command", b""),
        ("verifier_command", msgspec.msgpack.encode({"argv": []})),
        ("verifier_command", msgspec.msgpack.encode({"argv": ["--version"]})),
        ("verifier_command", msgspec.msgpack.encode({"argv": ["a\0b"]})),
        ("verifier_command", msgspec.msgpack.encode({"argv": "true"})),
        ("verifier_command", msgspec.msgpack.encode({"script": "true", "user": "root"})),
        ("verifier_command", b"\x91" * 10_000),
        ("verifier_wasm", b"nobody"),
        ("verifier_wasm", b"tree"),
        ("verifier_wasm", b"\xff"),
    ],
)
def test_a_contract_that_nobody_can_judge_is_refused(kind: str, value: bytes) -> None:
    with pytest.raises(WireError):
        checks_of(document(("exit_code", b"0"), (kind, value)))


def test_who_may_not_run_a_verifier_takes_no_task_that_has_one() -> None:
    able = card(capabilities=["compute", "shell-execution", "wasm"], shell_rings=["own"])
    command = document(("verifier_command", msgspec.msgpack.encode({"script": "true"})))
    module = document(("verifier_wasm", b"accept-1.wasm"))
    assert cannot_judge(command, "own", able) is None and cannot_judge(module, "member", able) is None
    assert cannot_judge(command, "member", able) is Reason.POLICY
    assert cannot_judge(command, "own", card(capabilities=["compute"])) is Reason.NO_CAPABILITY
    assert cannot_judge(module, "own", card(capabilities=["compute"])) is Reason.NO_CAPABILITY
    assert cannot_judge(document(("exit_code", b"0")), "member", card(capabilities=[])) is None
    assert cannot_judge(document(("colour", b"red")), "own", able) is Reason.NO_CAPABILITY


@pytest.mark.parametrize("kind", ["compute", "openclaw_prompt"])
def test_nor_is_it_asked(kind: str) -> None:
    needs = Requirements(capabilities=["shell-execution"])
    words = ["compute", "ai-inference", "shell-execution"]
    asked = card(capabilities=words, shell_rings=["own"], prompt_rings=["own", "member"])
    assert unmet(kind, needs, asked, "own") is None
    assert unmet(kind, needs, asked, "member") is Reason.POLICY


# --- reports


def test_a_report_tells_what_was_judged() -> None:
    verdict = (v.judged(0, "passed"), v.judged(2, "failed", "exit code 3", b"oh\n"))
    assert v.decode_report(v.encode_report(verdict), 3) == verdict
    assert v.failure(verdict) == verdict[1] and v.failure(verdict[:1]) is None
    assert contracts.sentence("exit:0", verdict[1]) == 'exit:0: exit code 3; it said: "oh"'


def test_what_is_said_is_cut_to_its_bounds() -> None:
    one = v.judged(0, "broken", "x" * 10_000, b"a" * 10_000 + b"end")
    assert len(one.detail) == limits.CONTRACT_DETAIL_CHARS_MAX and one.stderr.endswith(b"end")
    assert v.decode_report(v.encode_report([one]), 1) == (one,)
    whole = [v.judged(n, "failed", "€" * 10_000, b"a" * 10_000) for n in range(limits.CONTRACT_CONDITIONS_MAX)]
    assert len(v.encode_report(whole)) < 128 * limits.KIB


@pytest.mark.parametrize(
    ("report", "conditions"),
    [
        (b"", 3),
        (b"the exit code was 3", 3),
        (v.encode_report([]), 3),
        (v.encode_report([v.judged(0, "passed")]), 3),
        (v.encode_report([v.judged(0, "skipped")]), 3),
        (v.encode_report([v.judged(3, "failed")]), 3),
        (v.encode_report([v.judged(0, "failed")]), 0),
        (v.encode_report([v.judged(1, "failed"), v.judged(0, "failed")]), 3),
        (v.encode_report([v.judged(1, "failed"), v.judged(1, "failed")]), 3),
        (msgspec.msgpack.encode([[0, "refused", "", b""]]), 3),
        (msgspec.msgpack.encode([[0, "failed", "x" * 501, b""]]), 3),
        (msgspec.msgpack.encode([[0, "failed", "", b"x" * 4_097]]), 3),
        (msgspec.msgpack.encode([[-1, "failed", "", b""]]), 3),
        (b"\x91" * 60_000, 3),
    ],
)
def test_a_report_that_tells_of_no_failed_condition_is_none(report: bytes, conditions: int) -> None:
    with pytest.raises(WireError):
        v.decode_report(report, conditions)


@given(st.binary(max_size=200), st.integers(0, 16))
def test_no_bytes_are_more_than_a_refused_report(report: bytes, conditions: int) -> None:
    try:
        verdict = v.decode_report(report, conditions)
    except WireError:
        return
    assert v.failure(verdict) is not None and all(one.n < conditions for one in verdict)


def test_a_failed_contract_is_the_tasks_fault_and_a_bad_delivery_its_executors() -> None:
    honest, lying = EFFECTS[outcome_of_waiver(v.CONTRACT)], EFFECTS[Outcome.BAD_RESULT]
    assert (honest.completion, honest.on_time, honest.accuracy, honest.disputed) == (None, None, None, None)
    assert (lying.accuracy, lying.disputed) == (0, 1)


# --- JSON Schema


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"type": "object"}', ""),
        (b"true", ""),
        (b'{"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}', ""),
        (b'{"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}', ""),
        (b'{"$ref": "https://json-schema.org/draft/2020-12/schema"}', ""),
        (b'{"properties": {"$ref": {"type": "string"}}}', ""),
        (b'{"type": "objct"}', "$.type"),
        (b'{"pattern": "("}', "$.pattern"),
        (b"[1]", "not an object"),
        (b"{", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"a": 1, "a": 2}', "given twice"),
        (b'{"$schema": "https://example.com/mine"}', "unknown here"),
        (b'{"$schema": 5}', "unknown here"),
        (b'{"$ref": "https://example.com/other"}', "which is not in it"),
        (b'{"$ref": "file:///etc/passwd"}', "which is not in it"),
        (b'{"items": {"not": {"$ref": "#/$defs/missing"}}}', "which is not in it"),
        (b'{"not":' * 900 + b"{}" + b"}" * 900, "recursion"),
        (b"[" * 60_000, "recursion"),
    ],
)
def test_what_is_a_schema(text: bytes, why: str) -> None:
    assert (schema.check(text) == "") if not why else (why in schema.check(text)), schema.check(text)


@pytest.mark.parametrize(
    ("text", "answer", "why"),
    [
        (b'{"required": ["a"]}', b'{"a": 1}', ""),
        (b'{"required": ["a"]}', b'{"b": 1}', "at $: 'a' is"),
        (b'{"items": {"type": "integer"}}', b'[1, "x"]', "at $[1]"),
        (b'{"format": "email"}', b'"nobody"', ""),
        (b"{" + DRAFT_7 + b', "items": [{"type": "integer"}]}', b'["x"]', "at $[0]"),
        (b"{}", b"", "no JSON"),
        (b"{}", b"\xff\xfe", "not UTF-8"),
        (b"{}", b"NaN", "no JSON"),
        (b"{}", b"1e999", "too large"),
        (b"{}", b"1" * 5_000, "5000 digits"),
        (b"{}", b'{"a": 1, "a": 2}', "given twice"),
        (b"{}", b"[" * 60_000, "too deeply"),
        (b'{"$ref": "#"}', b"1", "refers to itself"),
        (b'{"multipleOf": 0.1}', b"1" * 399, "arithmetic"),
        (b'{"maxLength": 0}', b'"\\ud800"', "at $"),
        (b'{"additionalProperties": false}', b'{"\\ud800": 1}', "ud800"),
    ],
)  # fmt: skip
def test_how_a_schema_judges(text: bytes, answer: bytes, why: str) -> None:
    found = schema.judge(text, answer)
    assert found == "" if not why else why in found, found
    found.encode()


def test_nobody_judges_by_what_is_no_schema() -> None:
    with pytest.raises(schema.Unusable):
        schema.judge(b'{"type": "objct"}', b"1")
