"""The configuration file: YAML with comments, read with line numbers, written and changed without losing a comment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from clawnet.config_keys import KEYS, RESTART, SECTIONS, Key
from clawnet.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    import yaml

FILE_BYTES_MAX = 1_048_576
DEPTH_MAX = 4

_PLAIN = re.compile(r"[A-Za-z0-9_~/.][A-Za-z0-9_~/.+-]*\Z")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "~"}


class Entry(NamedTuple):
    """A value as it stands in the file: its text (or texts), its line from 1, and its span in the file's text."""

    name: str
    raw: str | list[str]
    line: int
    start: int
    end: int


class Problem(NamedTuple):
    """Something in the file that cannot be used."""

    line: int
    message: str
    hint: str = ""


def read_entries(text: str) -> tuple[list[Entry], list[Problem]]:
    """Every known key in a YAML text with its raw value, and everything that is wrong with the text's form.

    Values are not judged here. Unknown keys name the nearest known one.
    """
    root, problems = _compose(text)
    entries: list[Entry] = []
    if root is not None:
        _walk(root, "", entries, problems, 0)
    return entries, problems


def render(values: Mapping[str, str]) -> str:
    """The commented file that `clawnet init` writes: every key with its meaning, those in `values` set.

    A key at its default is a comment, so that a later version's better default takes effect.
    """
    out = [
        "# clawnet's configuration. A commented line shows a default; remove its # to change it.",
        "# The environment is above this file (CLAWNET_SECTION_KEY), and flags are above the environment.",
        "# clawnet config set KEY VALUE keeps the comments; (restart): needs clawnet daemon restart",
    ]
    for section, meaning in SECTIONS.items():
        keys = [key for key in KEYS.values() if key.section == section and not key.unbuilt]
        subsections = [name for name in SECTIONS if name.startswith(section + ".")]
        if not keys and not subsections:
            continue
        indent = "  " * section.count(".")
        active = any(name.startswith(section + ".") for name in values)
        out += ["" if not indent else f"{indent}#", f"{indent}# {meaning}"]
        out.append(f"{indent}{'' if active or not indent else '# '}{section.rpartition('.')[2]}:")
        for key in keys:
            out.append(f"{indent}  # {key.meaning}; {key.allowed}{' (restart)' if key.apply == RESTART else ''}")
            word = key.name.rpartition(".")[2]
            if key.name in values:
                out.append(f"{indent}  {word}: {yaml_text(key, values[key.name])}")
            else:
                out.append(f"{indent}  # {word}: {yaml_text(key, key.default)}")
    return "\n".join(out) + "\n"


def yaml_text(key: Key, text: str) -> str:
    """A value as it is written in the file."""
    if key.kind in ("words", "addresses"):
        return "[" + ", ".join(_scalar(part.strip()) for part in text.split(",") if part.strip()) + "]"
    if key.kind in ("text", "name", "path", "file", "url"):
        return _scalar(text)
    return text


def edit(text: str, name: str, value: str) -> str:
    """The file's text with one key set, every other character kept.

    A value that is there is replaced; else the commented line of the key is used, else a line is added to its section.
    Raises NotFoundError for an unknown key and ConfigError when the file's form leaves no place for the line.
    """
    key = known_key(name)
    new = yaml_text(key, value)
    entries, problems = read_entries(text)
    if problems:
        raise ConfigError(f"line {problems[0].line}: {problems[0].message}", hint=problems[0].hint)
    for entry in entries:
        if entry.name == name:
            return text[: entry.start] + new + _tail(text, entry)
    lines = text.split("\n")
    top, _, rest = key.section.partition(".")
    at = _section_line(lines, top, 0, len(lines), "")
    if at is None:
        lines = [*lines[: len(lines) - (lines[-1] == "")], f"{top}:", ""]
        at = len(lines) - 2
    indent = ""
    if rest:
        indent = _child_indent(lines, at) or "  "
        inner = _section_line(lines, rest, at + 1, _section_end(lines, at), indent)
        if inner is None:
            lines.insert(at + 1, f"{indent}{rest}:")
            inner = at + 1
        at = inner
    _put(lines, at, indent, name.rpartition(".")[2], new)
    return "\n".join(lines)


def known_key(name: str) -> Key:
    """The key of this dotted name; raises NotFoundError that names the nearest one."""
    key = KEYS.get(name)
    if key is None:
        raise NotFoundError(
            f"{name!r} is not a configuration key", hint=nearest(name) or "clawnet config show lists all"
        )
    return key


def nearest(name: str) -> str:
    """A question that names the known key most like this one, or nothing."""
    import difflib

    known = list(KEYS) if "." in name else [*KEYS, *SECTIONS]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        last = name.rpartition(".")[2]
        close = [key for key in known if key.rpartition(".")[2] == last][:1]
    return f"did you mean {close[0]}?" if close else ""


# --- reading


def _compose(text: str) -> tuple[yaml.Node | None, list[Problem]]:
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.SafeLoader), []
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        return None, [Problem(mark.line + 1 if mark else 1, f"this is not YAML: {what}")]
    except yaml.YAMLError as error:
        return None, [Problem(1, f"this is not YAML: {str(error).splitlines()[0]}")]


def _walk(node: yaml.Node, prefix: str, entries: list[Entry], problems: list[Problem], depth: int) -> None:
    import yaml

    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
        return
    if not isinstance(node, yaml.MappingNode) or depth > DEPTH_MAX:
        problems.append(Problem(line, f"{prefix or 'the file'} must be a section: lines of KEY: VALUE"))
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem(at, "a key must be a word"))
            continue
        name = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if name in seen:
            problems.append(Problem(at, f"{name} is set twice"))
        elif name in SECTIONS:
            _walk(value_node, name, entries, problems, depth + 1)
        elif name in KEYS:
            _take(KEYS[name], value_node, at, entries, problems)
        else:
            problems.append(Problem(at, f"{name} is not a configuration key", nearest(name)))
        seen.add(name)


def _take(key: Key, node: yaml.Node, line: int, entries: list[Entry], problems: list[Problem]) -> None:
    import yaml

    raw: str | list[str]
    if key.unbuilt:
        raw = ""
    elif isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null" and node.style is None:
            problems.append(
                Problem(line, f"{key.name} has no value; allowed: {key.allowed}", "remove the line for the default")
            )
            return
        raw = str(node.value)
    elif isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        raw = [str(item.value) for item in node.value]
    else:
        problems.append(Problem(line, f"{key.name} cannot be a section; allowed: {key.allowed}"))
        return
    entries.append(Entry(key.name, raw, line, node.start_mark.index, node.end_mark.index))


# --- changing


def _scalar(text: str) -> str:
    if _PLAIN.match(text) and text.lower() not in _RESERVED:
        return text
    return json.dumps(text, ensure_ascii=False)


def _tail(text: str, entry: Entry) -> str:
    """What follows a value; a value written over several lines ends before its last line break."""
    end = entry.end
    while end > entry.start and text[end - 1] in "\r\n":
        end -= 1
    return text[end:]


def _indent_of(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" "))]


def _content(lines: list[str], start: int, end: int) -> Iterator[int]:
    """The lines that YAML sees: not blank, not a comment."""
    return (at for at in range(start, end) if lines[at].strip() and not lines[at].lstrip().startswith("#"))


def _section_line(lines: list[str], word: str, start: int, end: int, indent: str) -> int | None:
    """The line that opens a section; a commented one at this indent is opened.

    Raises ConfigError when the section is there but is written in braces, which has no lines to add.
    """
    for at in _content(lines, start, end):
        line = lines[at]
        if _indent_of(line) == indent and re.match(rf"""["']?{word}["']?\s*:""", line.strip()):
            if line.split(":", 1)[1].split(" #")[0].strip():
                raise ConfigError(
                    f"line {at + 1}: the section {word} is not written as lines of KEY: VALUE",
                    hint="write each of its keys on a line of its own, or edit the file by hand",
                )
            return at
    for at in range(start, end):
        if re.fullmatch(rf"{indent}#\s*{word}:\s*", lines[at]):
            lines[at] = f"{indent}{word}:"
            return at
    return None


def _section_end(lines: list[str], at: int) -> int:
    """The first line after a section: the next one that YAML sees at its indent or left of it."""
    width = len(_indent_of(lines[at]))
    after = (other for other in _content(lines, at + 1, len(lines)) if len(_indent_of(lines[other])) <= width)
    return next(after, len(lines))


def _child_indent(lines: list[str], at: int) -> str:
    end = _section_end(lines, at)
    return next((_indent_of(lines[child]) for child in _content(lines, at + 1, end)), "")


def _put(lines: list[str], at: int, indent: str, word: str, new: str) -> None:
    """Puts `word: new` into the section opened at line `at`: over its commented line, or right below the header."""
    child = _child_indent(lines, at) or indent + "  "
    for place in range(at + 1, _section_end(lines, at)):
        if re.match(rf"{child}#\s?{word}:(\s|\Z)", lines[place]):
            lines[place] = f"{child}{word}: {new}"
            return
    lines.insert(at + 1, f"{child}{word}: {new}")
