"""Tasks whose work is a WebAssembly module: how a submission becomes one, who is asked, what is learned of it."""

from __future__ import annotations

from typing import Any

import pytest

from clawnet.config import Config
from clawnet.errors import ClawnetError
from clawnet.market.pricing import duration_keys
from clawnet.market.taskspec import normalise
from clawnet.wire.messages import Requirements


def normal(**spec: Any) -> dict[str, Any]:
    return normalise({"type": "compute", **spec}, Config.defaults({}), family="linux")


def test_a_path_becomes_the_input_that_is_the_module() -> None:
    found = normal(wasm="/x/hello.wasm", argv=["a", "b"], fuel=10)
    assert (found["module"], found["inputs"]) == ("module", [{"name": "module", "path": "/x/hello.wasm"}])
    assert (found["argv"], found["fuel"], found["op"]) == (["a", "b"], 10, "")
    assert found["requirements"]["capabilities"] == ["compute", "wasm"]
    assert found["requirements"]["os"] == ""
    assert "wasm" not in found, "no path of this machine goes along"


def test_an_input_called_module_is_one_unless_an_operation_is_asked_for() -> None:
    inputs = [{"name": "module", "path": "/x/m.wasm"}, {"name": "data", "path": "/x/data"}]
    assert normal(inputs=inputs)["module"] == "module"
    found = normal(inputs=inputs, op="sha256")
    assert (found["module"], found["requirements"]["capabilities"]) == ("", ["compute", "op:sha256"])
    found = normal(inputs=inputs, wasm="/x/other.wasm")
    assert found["module"] == "module-0"
    assert found["inputs"][-1] == {"name": "module-0", "path": "/x/other.wasm"}


@pytest.mark.parametrize(
    ("spec", "exit_code", "words"),
    [
        ({}, 64, "an operation or a module"),
        ({"wasm": "/x", "op": "sort"}, 64, "not both"),
        ({"wasm": "/x", "type": "shell", "argv": ["true"]}, 64, "goes with --type compute"),
        ({"op": "sort", "fuel": 5}, 64, "fuel is a WebAssembly module's"),
        ({"wasm": "/x", "fuel": -1}, 65, "fuel"),
        ({"wasm": "/x", "fuel": "much"}, 65, "fuel"),
        ({"wasm": 5}, 65, "wasm"),
        ({"wasm": "/x", "argv": ["a\0"]}, 65, "argv"),
        ({"wasm": "/x", "argv": "words"}, 65, "argv"),
    ],
)
def test_bad_submissions(spec: dict[str, Any], exit_code: int, words: str) -> None:
    with pytest.raises(ClawnetError) as error:
        normal(**spec)
    assert error.value.exit_code == exit_code
    assert words in error.value.message


def test_runs_of_modules_are_learned_apart_from_operations() -> None:
    modules = duration_keys("compute", Requirements(capabilities=["compute", "wasm"]), 1_000)
    operations = duration_keys("compute", Requirements(capabilities=["compute", "op:sort"]), 1_000)
    assert modules == ("compute|wasm||5", "compute|wasm|")
    assert set(modules).isdisjoint(operations)
