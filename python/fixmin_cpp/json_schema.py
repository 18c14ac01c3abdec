"""JSON schemas as llguidance is given them: so that what it makes of one is valid as `jsonschema` judges it.

llguidance leaves out some keywords, reads numbers as doubles and whole numbers as 64 bits, and takes oneOf for anyOf or
not at all. What it would get wrong is said in another way here where there is one that allows no more, else refused by
an ArgumentError that names the keyword and its place (a JSON pointer).
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from itertools import combinations
from typing import Any, TypeAlias
from urllib.parse import unquote

from .errors import ArgumentError

__all__ = ["literals", "prepared", "walk"]

_Node: TypeAlias = dict[str, Any]

# Keywords that say something about values and that llguidance does not know.
_UNSUPPORTED = frozenset(
    {
        *("$dynamicRef", "$recursiveRef", "contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems"),
        *("dependencies", "dependentRequired", "dependentSchemas", "propertyNames", "unevaluatedProperties"),
        *("disallow", "divisibleBy", "extends", "if", "then", "else", "not"),
    }
)
_KNOWN = frozenset(
    {
        *("$ref", "$schema", "$id", "$defs", "definitions", "type", "const", "enum", "anyOf", "oneOf", "allOf"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
        *("minLength", "maxLength", "pattern", "format"),
        *("items", "prefixItems", "additionalItems", "minItems", "maxItems"),
        *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    }
)
_FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
# What llguidance's formats allow too much: February 29 of any year, the year 0, second 60.
_LEAP = r"(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"(?:[0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})"
_DATE = rf"(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))|{_LEAP}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"
_STRICTER = {"date": f"^{_DATE}", "date-time": f"^{_DATE}[^T]*T{_TIME}", "time": f"^{_TIME}"}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")

# White space between the parts of a JSON text: at most a space, or a line break and an indentation. llguidance's own
# default is any amount, in which a weak model loses itself until its last token.
_WHITESPACE = r" |\r?\n[ \t]{0,40}"
# Without \u: llguidance would let a name that `properties` holds be spelled with it, to escape its schema.
_ESCAPES = 'nrbtf\\"'
_SPACES = re.compile(r"(?: |\t|\n|\r|\\[nrt]|\\x(?:20|0[9AaDd])|[\[\]()?*+|]|\?:|\{\d{1,4}(?:,\d{0,4})?\})*")

_LARGEST = 2**63 - 1024  # the largest double below 2^63; with -2^63 llguidance 1.9 overruns its stack
_SMALLEST = 1e-60  # stands for "above 0": the regex for smaller ones is nested too deeply
_MAX_PATTERNS = 10  # that one string must match: an intersection takes twice as long with each one more, at 25 minutes
_MAX_ALTERNATIVES = 64
_MAX_DEPTH = 32  # of references and subschemas, in looking for what tells the branches of a oneOf apart
_MAX_STEPS = 50_000  # of work on what meets in one value, a second at most


def prepared(schema: _Node) -> _Node:
    """A copy of `schema` for llguidance. ArgumentError: it cannot be kept to, or is none."""
    copy: _Node = json.loads(json.dumps(schema))
    options = copy.pop("x-guidance", {})
    preparation = _Preparation(copy)
    preparation.run()
    copy["x-guidance"] = {**_options(options), "coerce_one_of": preparation.has_one_of}
    return copy


def literals(schema: _Node) -> Iterator[tuple[str, str]]:
    """(place, JSON text) of every value and name that a prepared schema demands or offers literally."""
    for place, node in _Preparation(schema).nodes():
        for name in node.get("properties", {}):
            yield f"{place}/properties", json.dumps(name, ensure_ascii=False)
        for keyword in ("const", "enum"):
            if keyword in node:
                values = node[keyword] if keyword == "enum" else [node[keyword]]
                for value in values:
                    yield f"{place}/{keyword}", json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _refuse(keyword: str, place: str, why: str) -> ArgumentError:
    return ArgumentError(f"json_schema cannot be used: {keyword} at {place} {why}")


def _options(given: Any) -> _Node:
    """x-guidance, of which white space may be chosen."""
    if not isinstance(given, dict):
        raise _refuse("x-guidance", "#", "must be an object")
    for name, value in given.items():
        if name == "whitespace_flexible" and isinstance(value, bool):
            continue
        if name != "whitespace_pattern" or not isinstance(value, str):
            raise _refuse("x-guidance", "#", f"may set whitespace_flexible or whitespace_pattern, not {name}={value!r}")
        if not _SPACES.fullmatch(value):
            raise _refuse("x-guidance", "#", f"has a whitespace_pattern of more than white space: {value!r}")
    chosen = {"whitespace_pattern", "whitespace_flexible"} & given.keys()
    return {**({} if chosen else {"whitespace_pattern": _WHITESPACE}), **given, "json_allowed_escapes": _ESCAPES}


class _Preparation:
    """One schema, changed in place."""

    def __init__(self, root: _Node) -> None:
        self.root = root
        draft = re.search(r"draft-0[3467]|2019-09", str(root.get("$schema", "")))
        self.draft = draft[0] if draft else ""  # "": 2020-12, the latest
        self.has_one_of = False
        self._in_references = {
            part.replace("~1", "/").replace("~0", "~")
            for one in walk(root)
            if isinstance(one, dict) and isinstance(one.get("$ref"), str)
            for part in unquote(one["$ref"]).split("/")
        }
        self._known: dict[int, list[_Facts]] = {}  # by the id of a subschema
        self._n_steps = 0
        self._with_patterns: set[int] = set()  # ids of parts that hold a pattern

    def run(self) -> None:
        for place, node in self.nodes():
            self._check_keywords(node, place)
            _bound(node, place, self.draft == "draft-04")
            _divide(node, place)
            for keyword in ("const", "enum"):
                if keyword in node:
                    _check_value(node[keyword], keyword, place)
        self._with_patterns = _with_patterns(self.root)
        for place, node in self.nodes():
            if "allOf" in node or ("$ref" in node and len(node) > 1):
                self._check_patterns(node, place)
            if "oneOf" in node:
                self.has_one_of = True
                self._tell_apart(node["oneOf"], f"{place}/oneOf")

    # --- the tree ----------------------------------------------------------------------------------------------------

    def nodes(self) -> Iterator[tuple[str, _Node]]:
        """(place, subschema) of all that the root leads to, each once. A loop: schemas may be deeper than the stack."""
        todo: list[tuple[str, Any]] = [("#", self.root)]
        seen: set[int] = set()
        while todo:
            place, node = todo.pop()
            if isinstance(node, bool) or id(node) in seen:
                continue
            if not isinstance(node, dict):
                raise _refuse("what stands", place, f"must be a schema, got {json.dumps(node)[:60]}")
            seen.add(id(node))
            yield place, node
            todo += reversed([*self._children(node, place)])

    def _children(self, node: _Node, place: str) -> Iterator[tuple[str, Any]]:
        for keyword in ("additionalProperties", "items", "additionalItems"):
            if keyword in node and not isinstance(node[keyword], list):
                yield f"{place}/{keyword}", node[keyword]
        for keyword in ("items", "prefixItems", "allOf", "anyOf", "oneOf"):
            if isinstance(node.get(keyword), list):
                for i, one in enumerate(node[keyword]):
                    yield f"{place}/{keyword}/{i}", one
        for keyword in ("properties", "patternProperties"):
            for name, one in node.get(keyword, {}).items():
                yield f"{place}/{keyword}/{_escaped(name)}", one
        if "$ref" in node:
            yield self._target(node["$ref"], place)

    def _target(self, reference: Any, place: str) -> tuple[str, Any]:
        """(place, subschema) that a $ref leads to."""
        if not isinstance(reference, str):
            raise _refuse("$ref", place, f"must be a string, got {json.dumps(reference)[:60]}")
        pointer = reference
        name = self.root.get("$id", "")
        if name and isinstance(name, str):
            pointer = pointer.removeprefix(name.removesuffix("#"))
        pointer = unquote(pointer)
        if pointer in ("#", ""):
            return "#", self.root
        node: Any = self.root
        if not pointer.startswith("#/"):
            raise _refuse("$ref", place, f"is {reference!r}: only references into the same schema, #/..., are followed")
        for part in pointer[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(part)] if isinstance(node, list) else node[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise _refuse("$ref", place, f"is {reference!r}, which is not there") from None
        return pointer, node

    # --- single keywords ---------------------------------------------------------------------------------------------

    def _check_keywords(self, node: _Node, place: str) -> None:
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        for keyword in node.keys() - _KNOWN - _UNSUPPORTED:
            if keyword not in self._in_references:  # llguidance takes a $ref with whatever stands beside it for two
                del node[keyword]
        for keyword in sorted(_UNSUPPORTED & node.keys()):
            raise _refuse(keyword, place, "is not supported")
        if node is not self.root and isinstance(node.get("$id"), str):
            raise _refuse("$id", place, "is not supported within a schema")
        for keyword, kind in (*_KINDS.items(), *((name, list) for name in ("allOf", "anyOf", "oneOf", "prefixItems"))):
            if keyword not in node:
                continue
            if kind is int:
                _count(node, keyword, place)
            elif not isinstance(node[keyword], kind):
                raise _refuse(keyword, place, f"must be {_KIND_NAMES[kind]}, got {json.dumps(node[keyword])[:60]}")
        if not self.draft and ("additionalItems" in node or isinstance(node.get("items"), list)):
            wrong = "additionalItems" if "additionalItems" in node else "items"
            raise _refuse(wrong, place, "is of older drafts: name one in $schema, or use prefixItems and items")
        if self.draft and "prefixItems" in node:
            raise _refuse("prefixItems", place, f"is not part of {self.draft}, which $schema names")
        if "format" in node and self._may_be_string(node) and node["format"] not in list(_FORMATS):
            raise _refuse("format", place, f"is {node['format']!r}, which is not supported")
        if "format" in node and self._may_be_string(node) and node["format"] in _STRICTER:
            node["allOf"] = [*node.get("allOf", []), {"pattern": _STRICTER[node["format"]]}]
        if node.get("minProperties", 0) > len(set(map(str, node.get("required", ())))) + 1:
            # llguidance does not notice a name that comes twice, unless it is in `properties`.
            raise _refuse("minProperties", place, "is not supported where names are free: list them in required")
        for keyword in ("required", "type"):
            if keyword in node and not all(isinstance(one, str) for one in _as_list(node[keyword])):
                raise _refuse(keyword, place, "must hold names only")
        for name in [*node.get("properties", ()), *node.get("required", ())]:
            _check_text(name, "properties", place)

    @staticmethod
    def _may_be_string(node: _Node) -> bool:
        kinds = node.get("type", "string")
        return kinds == "string" or (isinstance(kinds, list) and "string" in kinds)

    def _check_patterns(self, node: _Node, place: str) -> None:
        """How many patterns may meet in one string."""
        n, todo, seen = 0, [node], set[int]()
        while todo:
            one = todo.pop()
            self._spend(1)
            if not isinstance(one, dict) or id(one) in seen:
                continue
            seen.add(id(one))
            parts = one.get("allOf", [])
            todo += parts
            if "$ref" in one:
                todo.append(self._target(one["$ref"], place)[1])
            own = (value for name, value in one.items() if name not in ("allOf", "$ref", "$defs", "definitions"))
            n += "pattern" in one or "format" in one or any(id(value) in self._with_patterns for value in own)
        if n > _MAX_PATTERNS:
            raise _refuse("allOf", place, f"joins {n} subschemas with patterns, but at most {_MAX_PATTERNS} may meet")

    def _spend(self, n: int) -> None:
        self._n_steps += n
        if self._n_steps > _MAX_STEPS:
            raise ArgumentError("json_schema is too complex: too much of it meets in one value")

    # --- oneOf -------------------------------------------------------------------------------------------------------

    def _tell_apart(self, branches: list[Any], place: str) -> None:
        """Makes sure that no value can be valid under two branches, so that oneOf means anyOf."""
        found = [self._alternatives(branch) for branch in branches]
        for i, j in combinations([i for i, facts in enumerate(found) if facts], 2):
            if not all(self._apart(a, b) for a in found[i] for b in found[j]):
                raise ArgumentError(
                    f"json_schema cannot be used: oneOf at {place.removesuffix('/oneOf')} is not supported where two "
                    f"branches, here {i} and {j}, may hold at once: give them types, or a property of which each has "
                    "another const, that tell them apart; or use anyOf"
                )

    def _alternatives(self, node: Any, depth: int = 0) -> "list[_Facts]":
        """What is known of a value that is valid: one of these. Empty: there is none."""
        if not isinstance(node, dict) or depth > _MAX_DEPTH:
            return [] if node is False else [_Facts()]
        if id(node) in self._known:
            return self._known[id(node)]
        self._known[id(node)] = [_Facts()]  # all that a schema which leads to itself knows of itself
        parts = list(node.get("allOf", ()))
        if "$ref" in node:
            parts.append(self._target(node["$ref"], "#")[1])
        found = _joined([_Facts.of(node)], self._together(parts, depth + 1))
        for keyword in ("anyOf", "oneOf"):
            if keyword in node:
                found = _joined(found, [one for part in node[keyword] for one in self._alternatives(part, depth + 1)])
        self._known[id(node)] = found
        return found

    def _together(self, nodes: list[Any], depth: int = 0) -> "list[_Facts]":
        """The same of a value that is valid under all of them."""
        found = [_Facts()]
        for node in nodes:
            more = self._alternatives(node, depth)
            self._spend(sum(len(facts.properties) for facts in (*found, *more)) * max(len(found), len(more)))
            found = _joined(found, more)
        return found

    def _apart(self, a: "_Facts", b: "_Facts", depth: int = 0) -> bool:
        self._spend(1 + len(a.properties))
        if a.types.isdisjoint(b.types):
            return True
        if a.values is not None and b.values is not None:
            return a.values.isdisjoint(b.values)
        if a.types != {"object"} or b.types != {"object"} or depth > 4:
            return False
        if any(names.isdisjoint({p}) for x, y in ((a, b), (b, a)) for p in x.required for names in y.closed):
            return True
        shared = [p for p in a.properties if p in b.properties]
        required = a.required | b.required
        shared.sort(key=lambda p: p not in required)  # stable: those that are required first
        for p in shared:
            left, right = (self._together(list(facts.properties[p].values())) for facts in (a, b))
            if all(self._apart(x, y, depth + 1) for x in left for y in right):
                if p not in required:
                    for facts in (a, b):
                        facts.definers[p].setdefault("required", []).append(p)
                        facts.required |= {p}
                return True
        return False


_KINDS: dict[str, type] = {"properties": dict, "patternProperties": dict, "required": list, "enum": list} | {
    name: int for name in ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
}
_KIND_NAMES: dict[type, str] = {dict: "an object", list: "an array"}


def _count(node: _Node, keyword: str, place: str) -> None:
    """A limit of lengths, as an integer: 1.0 is one. Nothing is too long for one beyond 2^53."""
    value = node[keyword]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refuse(keyword, place, f"must be an integer, got {json.dumps(value)[:60]}")
    if value < 0:
        raise _refuse(keyword, place, f"must not be negative, got {json.dumps(value)[:60]}")
    node[keyword] = value
    if keyword.startswith("max") and value > 2**53:
        del node[keyword]


def walk(value: Any) -> Iterator[Any]:
    """A JSON value and all values in it, outer ones first. A loop: they may be deeper than the stack."""
    todo = [value]
    while todo:
        one = todo.pop()
        yield one
        if isinstance(one, dict | list):
            todo += one.values() if isinstance(one, dict) else one


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _with_patterns(root: Any) -> set[int]:
    """The ids of all objects and arrays that have a pattern or format somewhere in them."""
    found: set[int] = set()
    for one in reversed([one for one in walk(root) if isinstance(one, dict | list)]):  # the inner ones first
        inner = one.values() if isinstance(one, dict) else one
        own = isinstance(one, dict) and ("pattern" in one or "format" in one)
        if own or any(id(part) in found for part in inner):
            found.add(id(one))
    return found


# --- numbers ---------------------------------------------------------------------------------------------------------


def _number(node: _Node, keyword: str, place: str) -> int | float:
    value = node[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _refuse(keyword, place, f"must be a number, got {json.dumps(value)[:60]}")
    if not math.isfinite(value):
        raise ArgumentError(f"json_schema cannot be written as JSON: {keyword} at {place} is {value}")
    return value


def _bound(node: _Node, place: str, old: bool) -> None:
    """Limits as doubles that belong to the range: what a reader rounds to doubles then stays within them.

    llguidance compares digits, and 0.30000000000000000001 is above 0.3 for it but not for who reads it.
    """
    whole = node.get("type") == "integer" or (isinstance(node.get("type"), list) and "number" not in node["type"])
    for side, sign in (("minimum", 1), ("maximum", -1)):
        beyond = f"exclusive{side.capitalize()}"
        limits = []
        if old and isinstance(node.get(beyond), bool) and node.pop(beyond) and side in node:  # draft 4
            node[beyond] = node.pop(side)
        for keyword, exclusive in ((side, False), (beyond, True)):
            if keyword in node:
                low = sign * _number(node, keyword, place)
                if low > _LARGEST:
                    raise _refuse(keyword, place, f"is {node[keyword]!r:.60}: limits are supported up to 2^63 only")
                limits.append(_inward(max(low, -_LARGEST), exclusive, whole))
                del node[keyword]
        if limits:
            node[side] = sign * max(limits)


def _inward(low: int | float, exclusive: bool, whole: bool) -> int | float:
    """The smallest double, whole if it must be, that is at least (above, if exclusive) `low`."""
    if whole:
        low = math.floor(low) + 1 if exclusive else math.ceil(low)
        exclusive = False
    limit = float(low)
    if limit < low or (exclusive and limit == low):
        limit = _SMALLEST if limit == 0.0 else math.nextafter(limit, math.inf)
    if limit.is_integer():
        return int(limit)
    while _as_read(limit) < limit:
        limit = math.nextafter(limit, math.inf)
    return limit


def _as_read(value: float) -> float:
    """What llguidance takes the shortest digits of `value` for: it rounds them, and once more when it scales them."""
    digits, exponent = Decimal(repr(abs(value))).as_tuple().digits, int(Decimal(repr(value)).as_tuple().exponent)
    read = float(int("".join(map(str, digits))))
    while exponent < -308:
        read, exponent = read / 1e308, exponent + 308
    scale = float(f"1e{abs(exponent)}")
    read = read / scale if exponent < 0 else read * scale
    return math.copysign(read, value)


def _divide(node: _Node, place: str) -> None:
    """multipleOf where it means the same for who reads doubles."""
    if "multipleOf" not in node:
        return
    step = Fraction(_number(node, "multipleOf", place))
    if step <= 0:
        raise _refuse("multipleOf", place, "must be above 0")
    if step.denominator == 1:  # multiples of whole numbers are whole
        kinds = _as_list(node.get("type", list(_TYPES)))
        kinds = list(dict.fromkeys("integer" if kind == "number" else kind for kind in kinds))
        node["type"] = kinds[0] if len(kinds) == 1 else kinds
        node["multipleOf"] = int(step)
    elif step.denominator > 2**20 or (step.numerator != 1 and node.get("type") != "integer"):
        raise _refuse(
            "multipleOf",
            place,
            f"is {node['multipleOf']!r}: numbers are read as doubles, in which its multiples are not all multiples "
            "(0.07 of 0.01); ask for a whole number of smaller units, or for a string with a pattern",
        )


def _check_value(value: Any, keyword: str, place: str) -> None:
    """Whether llguidance writes a literal value as it is."""
    for one in walk(value):
        if isinstance(one, dict):
            for name in one:
                _check_text(name, keyword, place)
        elif isinstance(one, str):
            _check_text(one, keyword, place)
        elif isinstance(one, int | float) and not isinstance(one, bool):
            if not math.isfinite(one):
                raise ArgumentError(f"json_schema cannot be written as JSON: {keyword} at {place} holds {one}")
            if not _is_written_exactly(one):
                raise _refuse(
                    keyword, place, f"holds {one!r:.60}, which would not come out exactly: ask for a string of digits"
                )


def _is_written_exactly(value: int | float) -> bool:
    if abs(value) > _LARGEST:
        return False
    if isinstance(value, int):
        return int(float(value)) == value
    if abs(value) > 2**53 and int(Fraction(repr(value))) != value:  # its shortest digits, filled up with zeros
        return False
    return _as_read(value) == value


def _check_text(text: str, keyword: str, place: str) -> None:
    wrong = re.search(r"[\0-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]", text)
    if wrong:
        raise _refuse(keyword, place, f"holds U+{ord(wrong[0]):04X}, which needs \\u in JSON: not supported")


# --- what tells values apart -------------------------------------------------------------------------------------


@dataclass
class _Facts:
    """What is known of the values that a subschema allows."""

    types: frozenset[str] = frozenset(_TYPES)
    values: frozenset[str] | None = None  # as comparable text; None: any
    properties: dict[str, dict[int, Any]] = field(default_factory=dict)  # by name: their subschemas, by id
    required: frozenset[str] = frozenset()
    closed: list[frozenset[str]] = field(default_factory=list)  # there are no names but these
    definers: dict[str, _Node] = field(default_factory=dict)  # by name: what has it in `properties`

    @classmethod
    def of(cls, node: _Node) -> "_Facts":
        facts = cls()
        facts.types = _types(_as_list(node.get("type", list(_TYPES))))
        if "const" in node or "enum" in node:
            values = [node["const"]] if "const" in node else node["enum"]
            facts.values = frozenset(map(_comparable, values))
            facts.types &= _types([kind for value in values for kind in _kinds(value)])
        for name, one in node.get("properties", {}).items():
            facts.properties[name] = {id(one): one}
            facts.definers[name] = node
        facts.required = frozenset(one for one in node.get("required", ()) if isinstance(one, str))
        if node.get("additionalProperties") is False and not node.get("patternProperties"):
            facts.closed = [frozenset(facts.properties)]
        return facts


def _joined(first: list[_Facts], second: list[_Facts]) -> list[_Facts]:
    """What is known of values of which one of the first and one of the second is known."""
    if len(first) * len(second) > _MAX_ALTERNATIVES:
        return first  # less is known: still true
    return [
        _Facts(
            a.types & b.types,
            a.values if b.values is None else b.values if a.values is None else a.values & b.values,
            {
                name: {**a.properties.get(name, {}), **b.properties.get(name, {})}
                for name in [*a.properties, *(name for name in b.properties if name not in a.properties)]
            },
            a.required | b.required,
            a.closed + b.closed,
            {**b.definers, **a.definers},
        )
        for a in first
        for b in second
    ]


def _types(kinds: list[Any]) -> frozenset[str]:
    return frozenset([*kinds, *(["integer"] if "number" in kinds else [])])


def _kinds(value: Any) -> list[str]:
    if isinstance(value, bool) or value is None:
        return ["null" if value is None else "boolean"]
    if isinstance(value, int | float):
        return ["integer", "number"]
    return ["string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"]


def _comparable(value: Any) -> str:
    """Equal for values that are equal in JSON: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_comparable, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}:{_comparable(v)}' for k, v in sorted(value.items()))}}}"
    return json.dumps(value)
