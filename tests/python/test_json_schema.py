"""Whatever schema the compiler takes, outputs are valid as jsonschema judges them; what it does not take it refuses."""

import contextlib
import datetime
import ipaddress
import json
import re
import uuid

import jsonschema
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_constrain import BYTES, COMPILERS, END, ids_in

from fixmin_cpp import json_schema
from fixmin_cpp.constrain import Constraint
from fixmin_cpp.errors import ArgumentError

# --- any schema --------------------------------------------------------------------------------------------------

NUMBERS = [-1.5, 0, 0.3, 1, 5, 7.0, 1e-5, 2**53, 2**53 + 1, 2**60, -(2**60), 2**63 - 1, -(2**63), 10**19, 1e300, -0.0]
numbers = st.sampled_from(NUMBERS) | st.integers(-20, 20) | st.integers(-(2**66), 2**66) | st.floats(-1e3, 1e3)
steps = st.sampled_from([1, 2, 3, 7.0, 0.5, 0.25, 1.5, 0.1, 0.01, 2**33])
words = st.sampled_from(["", "a", "ab", "b", "日", "\n", '"', "\\", "\x01", "c b"])
patterns = st.sampled_from(["^a", "b$", "^[a-c]{1,3}$", "a|b", "^ab?$", ".", "^$", r"^\d+$", "[^a]"])
values = st.recursive(
    st.none() | st.booleans() | numbers | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)


def some_of(**keywords: st.SearchStrategy) -> st.SearchStrategy[dict]:
    return st.fixed_dictionaries({}, optional=keywords)


def with_type(kinds: list[str], keywords: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    types = st.sampled_from([*kinds, [*kinds, "null"]])
    return st.builds(lambda kind, rest: {"type": kind, **rest}, types, keywords) | keywords


bounds = {name: numbers for name in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")}
leaves = st.one_of(
    with_type(["integer"], some_of(**bounds, multipleOf=steps)),
    with_type(["number"], some_of(**bounds, multipleOf=steps)),
    with_type(
        ["string"], some_of(minLength=st.integers(0, 3), maxLength=st.integers(0, 5), pattern=patterns, title=words)
    ),
    st.builds(lambda value: {"const": value}, values),
    st.builds(lambda some: {"enum": some}, st.lists(values, min_size=1, max_size=3)),
    st.sampled_from([True, False, {}, {"type": "boolean"}, {"$ref": "#/$defs/x"}, {"$ref": "#"}]),
)


def larger(inner: st.SearchStrategy) -> st.SearchStrategy[dict]:
    few = st.lists(inner, min_size=1, max_size=3)
    names = st.sampled_from(["a", "b", "ab", "kind"])
    counts = st.integers(0, 3)
    return st.one_of(
        with_type(
            ["array"],
            some_of(items=inner, prefixItems=few, minItems=counts, maxItems=counts, uniqueItems=st.booleans()),
        ),
        with_type(
            ["object"],
            some_of(
                properties=st.dictionaries(names, inner, max_size=3),
                required=st.lists(names, max_size=2, unique=True),
                additionalProperties=inner,
                patternProperties=st.dictionaries(patterns, inner, max_size=2),
                minProperties=counts,
                maxProperties=counts,
            ),
        ),
        st.builds(lambda some: {"anyOf": some}, few),
        st.builds(lambda some: {"oneOf": some}, few),
        st.builds(lambda some: {"allOf": some}, few),
        st.builds(lambda a, b: {**b, **a} if isinstance(a, dict) and isinstance(b, dict) else a, inner, inner),
        st.builds(lambda some: {"not": some}, inner),
    )


schemas = st.builds(
    lambda schema, x: {**schema, "$defs": {"x": x}} if isinstance(schema, dict) else {"allOf": [schema]},
    st.recursive(leaves, larger, max_leaves=6),
    leaves,
)


def an_output(kind: str, matcher, seed: int) -> str | None:
    """The text of a random walk, which ends where it can; None if it has not after a while."""
    rng, ids = np.random.default_rng(seed), []
    while not matcher.finished and len(ids) < 300:
        if len(ids) > 30 and matcher.may_end:
            break
        allowed = ids_in(matcher.mask())
        closing = [i for i in allowed if len(ids) > 40 and BYTES[kind].get(i) in (b'"', b"}", b"]", b"0", b"1")]
        ids.append(int(rng.choice(closing or allowed)))
        matcher.accept(ids[-1])
    if not matcher.may_end:
        return None
    return b"".join(BYTES[kind].get(i, b"") for i in ids if i != END[kind]).decode()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(schema=schemas, seed=st.integers(0, 2**32 - 1))
def test_outputs_are_valid_whatever_the_schema(schema, seed):
    try:
        matcher = COMPILERS["byte_level"].matcher(Constraint.check(json_schema=schema))
    except ArgumentError:
        return
    text = an_output("byte_level", matcher, seed)
    assume(text is not None)
    try:
        jsonschema.validate(json.loads(text), schema)
    except RecursionError:
        assume(False)  # a schema that leads to itself at the same value says nothing of it
    except OverflowError:
        assume("E" in text or "e" in text)  # 1E400 is JSON, but infinite for Python


def outputs(schema, n: int = 5) -> list:
    """Values that come out, each checked."""
    matcher = COMPILERS["byte_level"].matcher(Constraint.check(json_schema=schema))
    found = [json.loads(text) for seed in range(n) if (text := an_output("byte_level", matcher.clone(), seed))]
    for value in found:
        jsonschema.validate(value, schema)
    return found


def refusal(schema, n: int = 5) -> str:
    """Why it is refused; else "", its outputs having been checked."""
    try:
        assert outputs(schema, n)
    except ArgumentError as error:
        return str(error)
    return ""


def accepts(schema, text: str) -> bool:
    """Whether a text, byte by byte, may be written and then end."""
    matcher = COMPILERS["byte_level"].matcher(Constraint.check(json_schema=schema))
    for byte in text.encode():
        token_id = next(i for i in range(256) if BYTES["byte_level"][i] == bytes([byte]))
        if token_id not in ids_in(matcher.mask()):
            return False
        matcher.accept(token_id)
    return matcher.may_end


# --- numbers -----------------------------------------------------------------------------------------------------

LARGE = [2**53, 2**53 + 1, 2**60, 2**60 + 1, 2**63 - 1024, 2**63 - 1, 2**63, 2**64 + 3, 10**25, 10**50]
LARGE += [*(-number for number in LARGE), 0.1, 19.99, -0.0, 1e20, 1.5e300, 1e-7, 1e-60, 0.1234567890123456789, 2.0**60]
NESTED = [
    lambda number: {"const": number},
    lambda number: {"enum": [number]},
    lambda number: {"enum": [[{"id": number}]]},
    lambda number: {"const": {"a": [1, [number]]}},
    lambda number: {"type": "object", "properties": {"id": {"enum": [number]}}, "required": ["id"]},
    lambda number: {"$ref": "#/$defs/n", "$defs": {"n": {"const": number}}},
]


@pytest.mark.parametrize("nest", NESTED)
@pytest.mark.parametrize("number", LARGE)
def test_a_literal_number_comes_out_exactly_or_is_refused(number, nest):
    if why := refusal(nest(number)):
        assert "would not come out exactly" in why
        assert abs(number) > 2**53 or isinstance(number, float)


@pytest.mark.parametrize("number", [2**53, 2**60, -(2**60), 2**63 - 1024, 0.1, 19.99, -0.0, 1e-7, 1e18])
def test_numbers_that_can_be_written_are(number):
    assert outputs({"const": number})[0] == number


@pytest.mark.parametrize("where", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"])
@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize("limit", LARGE)
def test_outputs_keep_to_limits_of_any_size(limit, kind, where):
    assert re.search(r"^$|2\^63|regex", refusal({"type": kind, where: limit}, 8))


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"type": "integer", "exclusiveMinimum": 2**53}, 2**53 + 2, 2**53),
        ({"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}, 2**53 + 2, 2**53),
        ({"type": "number", "exclusiveMinimum": 0.3}, "0.31", "0.30000000000000000001"),
        ({"type": "number", "exclusiveMaximum": 0.3}, "0.290", "0.29999999999999999999"),
        ({"type": "number", "exclusiveMinimum": 0}, "0.0000001", "0.0"),
        ({"type": "number", "exclusiveMinimum": 0}, "2", f"0.{'0' * 400}1"),
        ({"type": "number", "multipleOf": 3}, "9", "9.0"),
        ({"type": "number", "multipleOf": 0.25}, "7.75", "7.8"),
    ],
)
def test_limits_hold_for_who_reads_doubles(schema, inside, outside):
    assert accepts(schema, str(inside))
    assert not accepts(schema, str(outside))


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"const": 1e400}, "const at # holds inf"),
        ({"properties": {"x": {"enum": [1, float("nan")]}}}, "enum at #/properties/x holds nan"),
        ({"items": {"minimum": -1e400}}, "minimum at #/items is -inf"),
    ],
)
def test_numbers_that_are_none_are_refused_by_place(schema, place):
    with pytest.raises(ArgumentError, match=f"cannot be written as JSON: {place}"):
        Constraint.check(json_schema=schema)


# --- what is refused, and where ----------------------------------------------------------------------------------

REFUSED = [
    ({"items": {"uniqueItems": True}}, "uniqueItems at #/items is not supported"),
    ({"properties": {"a/b": {"not": {}}}}, "not at #/properties/a~1b is not supported"),
    ({"if": {}, "then": {}}, "if at # is not supported"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired at #"),
    ({"anyOf": [{}, {"contains": {}}]}, "contains at #/anyOf/1"),
    ({"$ref": "#/$defs/x", "$defs": {"x": {"propertyNames": {}}}}, "propertyNames at #/\\$defs/x"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties at #"),
    ({"type": "string", "format": "regex"}, "format at # is 'regex'"),
    ({"format": {}}, "format at # is {}"),
    ({"type": "object", "minProperties": 2}, "minProperties at # is not supported where names are free"),
    ({"prefixItems": [{}], "additionalItems": False}, "additionalItems at # is of older drafts"),
    ({"items": [{}]}, "items at # is of older drafts"),
    ({"minimum": 3, "exclusiveMinimum": True}, "exclusiveMinimum at # must be a number, got true"),
    ({"multipleOf": 0.01}, "multipleOf at # is 0.01"),
    ({"multipleOf": 0}, "multipleOf at # must be above 0"),
    ({"minLength": "3"}, 'minLength at # must be an integer, got "3"'),
    ({"maxLength": True}, "maxLength at # must be an integer, got true"),
    ({"minItems": 1.5}, "minItems at # must be an integer, got 1.5"),
    ({"minItems": -1}, "minItems at # must not be negative, got -1"),
    ({"properties": []}, "properties at # must be an object"),
    ({"items": 3}, "what stands at #/items must be a schema, got 3"),
    ({"required": [3]}, "required at # must hold names only"),
    ({"$ref": "#/nowhere/at/all"}, r"\$ref at # is '#/nowhere/at/all', which is not there"),
    ({"$ref": "http://elsewhere/x"}, r"\$ref at # is 'http://elsewhere/x': only references"),
    ({"$ref": 3}, r"\$ref at # must be a string, got 3"),
    ({"const": "a\x01"}, r"const at # holds U\+0001"),
    ({"properties": {"\x7f": {}}}, r"properties at # holds U\+007F"),
    ({"x-guidance": {"lenient": True}}, "x-guidance at # may set whitespace_flexible or"),
    ({"x-guidance": {"whitespace_pattern": "x*"}}, "more than white space: 'x"),
    ({"x-guidance": 3}, "x-guidance at # must be an object"),
    ({"allOf": [{"pattern": f"{i}$"} for i in range(25)]}, "allOf at # joins 25 subschemas with patterns"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf at # .* here 0 and 1"),
    ({"oneOf": [{"const": i % 300} for i in range(301)]}, "oneOf at # .* here 0 and 300"),
    ({"oneOf": [{"const": i} for i in range(900)]}, "too complex: too much of it meets"),
    (
        {"$ref": "#/$defs/0", "$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}", "type": "null"} for i in range(3000)}},
        "too complex: too much of it meets|is '#/.defs/3000', which is not there",
    ),
    ({"const": "x" * 300_000}, "json_schema has 3000.. characters, but at most 262144"),
]


@pytest.mark.parametrize(("schema", "message"), REFUSED)
def test_a_keyword_that_is_not_supported_is_named_with_its_place(schema, message):
    with pytest.raises(ArgumentError, match=message):
        Constraint.check(json_schema=schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"unused": {"not": {}}}, "type": "integer"},
        {"properties": {"not": {"type": "integer"}, "if": True}},
        {"type": "array", "uniqueItems": False, "items": {"type": "null"}},
        {"type": "integer", "format": "int64", "nullable": True, "default": 2**70, "examples": [2**70]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "null"}], "additionalItems": False},
        {"$id": "http://a/b", "$ref": "http://a/b#/$defs/x~1%79", "$defs": {"x/y": {"const": 1}}},
        {"type": "array", "x-guidance": {"whitespace_pattern": r"[ \n\t]{0,3}"}, "maxItems": 2},
        {"type": "array", "minItems": 1.0, "maxItems": 2e0, "items": {"type": "string", "maxLength": 1.0}},
        {"type": "string", "pattern": "^a{3}$", "maxLength": 2**70, "minLength": 1},
    ],
)
def test_what_only_looks_unsupported_is_taken(schema):
    assert outputs(schema)


def test_draft_4_limits_are_read_as_such():
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "minimum": 3}
    assert accepts(schema, "3")
    assert not accepts({**schema, "exclusiveMinimum": True}, "3")


@pytest.mark.parametrize(
    ("kind", "text", "valid"),
    [
        ("date", "2024-02-29", True),
        ("date", "2000-02-29", True),
        ("date", "2023-02-28", True),
        ("date", "2023-02-29", False),
        ("date", "1900-02-29", False),
        ("date", "2023-04-31", False),
        ("date", "2023-12-31", True),
        ("date", "0000-01-01", False),
        ("date", "0004-02-29", True),
        ("date-time", "2023-02-28T23:59:59Z", True),
        ("date-time", "2023-02-29T23:59:59Z", False),
        ("date-time", "2016-12-31T23:59:60Z", False),
        ("time", "23:59:59Z", True),
        ("time", "23:59:60Z", False),
    ],
)
def test_dates_that_there_are(kind, text, valid):
    assert accepts({"type": "string", "format": kind}, json.dumps(text)) == valid


def test_formats_give_what_pydantic_reads():
    pydantic = pytest.importorskip("pydantic")
    types = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, uuid.UUID, ipaddress.IPv4Address)
    for kind in (*types, ipaddress.IPv6Address):
        adapter = pydantic.TypeAdapter(kind)
        values = outputs(adapter.json_schema(), 12)
        assert values
        for value in values:
            if kind is not datetime.timedelta:  # P9999999999999Y is a duration, but beyond Python's
                adapter.validate_json(json.dumps(value))


# --- names of properties -----------------------------------------------------------------------------------------

OVERLAP = {
    "type": "object",
    "properties": {"ab": {"minimum": 3}},
    "patternProperties": {"^a": {"type": "integer"}},
    "additionalProperties": False,
}


def test_properties_that_match_a_pattern_satisfy_both():
    for text, valid in {
        '{"ab":5}': True,
        '{"ab":1}': False,
        '{"ab":"x"}': False,
        '{"ac":1}': True,
        '{"b":1}': False,
    }.items():
        assert accepts(OVERLAP, text) == valid
    with pytest.raises(ArgumentError, match="not disjoint"):
        outputs({"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}})


def test_escapes_do_not_get_a_name_past_its_schema():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert accepts(schema, '{"a":1}')
    assert accepts(schema, '{"b":"x"}')
    assert not accepts(schema, '{"\\u0061":"x"}')


# --- oneOf -------------------------------------------------------------------------------------------------------


def test_unions_of_pydantic_models():
    pydantic = pytest.importorskip("pydantic")
    from typing import Annotated, Literal

    class Cat(pydantic.BaseModel):
        kind: Literal["cat"] = "cat"
        lives: int = pydantic.Field(ge=1, le=9)

    class Dog(pydantic.BaseModel):
        kind: Literal["dog", "hound"]
        name: str = pydantic.Field(max_length=4)

    class Pack(pydantic.BaseModel):
        kind: Literal["pack"] = "pack"
        members: list["Animal"] = pydantic.Field(max_length=2)

    Animal = Annotated[Cat | Dog | Pack, pydantic.Field(discriminator="kind")]
    Pack.model_rebuild(_types_namespace={"Animal": Animal, **locals()})

    class Zoo(pydantic.BaseModel):
        star: Animal
        others: list[Animal] = pydantic.Field(max_length=2)

    schema = Zoo.model_json_schema()
    assert "oneOf" in json.dumps(schema)
    kinds = set()
    for value in outputs(schema, 12):
        kinds.add(Zoo.model_validate(value).star.kind)
    assert len(kinds) > 1


APART = [
    [{"type": "integer"}, {"type": ["string", "null"]}],
    [{"const": 1}, {"const": 1.5}, {"const": True}, {"enum": ["a", "b"]}],
    [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    [{"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"m": {}}}]}, {"$ref": "#/$defs/b"}],
    [{"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}, {"$ref": "#/$defs/b"}],
    [
        {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False},
        {"type": "object", "properties": {"y": {"type": "integer"}}, "required": ["y"], "additionalProperties": False},
    ],
    [
        {
            "type": "object",
            "properties": {"p": {"type": "object", "properties": {"t": {"const": t}}, "required": ["t"]}},
        }
        for t in (1, 2)
    ],
]
DEFS = {name: {"type": "object", "properties": {"t": {"const": name}, "n": {"type": "integer"}}} for name in ("a", "b")}


@pytest.mark.parametrize("branches", APART)
def test_one_of_branches_that_cannot_both_hold(branches):
    assert outputs({"oneOf": branches, "$defs": DEFS}, 10)


NOT_APART = [
    [{"type": "integer"}, {"minimum": 3}],
    [{"const": 1}, {"const": 1.0}],
    [{}, {"type": "null"}],
    [{"properties": {"t": {"const": "a"}}}, {"properties": {"t": {"const": "b"}}}],  # may be no objects
    [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}],
    [{"type": "string", "maxLength": 3}, {"type": "string", "maxLength": 5}],
    [{"$ref": "#"}, {"$ref": "#"}],
]


@pytest.mark.parametrize("branches", NOT_APART)
def test_one_of_branches_that_may_both_hold_are_refused(branches):
    with pytest.raises(ArgumentError, match="oneOf at # is not supported where two branches, here 0 and 1"):
        Constraint.check(json_schema={"oneOf": branches, "$defs": DEFS})


def test_branches_that_no_value_fits_take_no_time():
    """Not each with each: that would be fifty million pairs."""
    assert accepts({"oneOf": [{"type": "null"}, *[False] * 9990]}, "null")


def test_a_schema_that_branches_into_itself_is_looked_at_once():
    schema = {
        "$ref": "#/$defs/t",
        "$defs": {"t": {"oneOf": [{"type": "null"}, *[{"anyOf": [{"$ref": "#/$defs/t"}] * 9}] * 2]}},
    }
    with pytest.raises(ArgumentError, match="oneOf"):
        Constraint.check(json_schema=schema)


@pytest.mark.parametrize("depth", [100, 800])
def test_deep_schemas_are_taken_or_refused(depth):
    schema: dict = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    assert "recursion" in refusal(schema, 1) or depth == 100


# --- anything at all ---------------------------------------------------------------------------------------------

KEYWORDS = sorted(json_schema._KNOWN | json_schema._UNSUPPORTED | {"x-guidance", "title"})
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["string", "#", "#/$defs/a", "date", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYWORDS, "a"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(schema=st.dictionaries(st.sampled_from(KEYWORDS), junk, max_size=5))
def test_what_is_no_schema_is_an_argument_error(schema):
    with contextlib.suppress(ArgumentError):
        assert Constraint.check(json_schema=schema).kind == "json_schema"
