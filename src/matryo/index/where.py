"""Metadata filters: a dict in, a tree of conditions out, which every engine says in its own language.

    {"section": "games"}                     the field equals
    {"size": {">=": 3, "<": 9}}              operators: = != < <= > >= in not_in
    {"tag": {"in": ["a", "b"]}, "year": 3}   several fields: all must hold
    {"or": [{...}, {...}]}, {"and": [...]}, {"not": {...}}

A field that an item lacks counts as None: it equals None, is unlike everything else, and is neither above nor below
anything. Numbers compare with numbers and texts with texts only; true and false count as 1 and 0.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matryo.core.errors import InputError
from matryo.index.items import check_field, check_scalar

Where = dict[str, Any]
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in", "not_in")
DEEPEST = 16
EXAMPLE = '{"section": "games", "size": {">=": 3}}'


@dataclass(frozen=True)
class Compare:
    """One field against a value: a scalar, or a tuple of scalars for `in` and `not_in`. Only = and != take None."""

    field: str
    operator: str
    value: Any


@dataclass(frozen=True)
class Every:
    """All of the parts hold."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True)
class Either:
    """At least one of the parts holds."""

    parts: tuple["Condition", ...]


@dataclass(frozen=True)
class Unless:
    """The part does not hold. A comparison is true or false, never unknown, so this is its plain opposite."""

    part: "Condition"


Condition = Compare | Every | Either | Unless


def parse_where(where: object) -> Condition:
    """The tree of a filter.

    Raises:
        InputError: an unknown operator, a value that cannot be compared, nothing at all, or too deep; says where.
    """
    return _all_of(where, 0)


def compile_where(where: object) -> tuple[str, list[Any]]:
    """(SQL condition over the embedded table `items`, its parameters). No value or name enters the SQL text."""
    return _sqlite(parse_where(where))


def _all_of(where: object, depth: int) -> Condition:
    if not isinstance(where, dict) or not where:
        raise InputError(f"where must be a dict such as {EXAMPLE}, got {where!r}")
    if depth > DEEPEST:
        raise InputError(f"where is nested more than {DEEPEST} deep; flatten it")
    return _together([_one(name, wanted, depth) for name, wanted in where.items()])


def _one(name: object, wanted: object, depth: int) -> Condition:
    if name in ("or", "and"):
        if not isinstance(wanted, list) or not wanted:
            raise InputError(f"where: {name!r} takes a list of dicts, got {wanted!r}")
        parts = tuple(_all_of(part, depth + 1) for part in wanted)
        return Either(parts) if name == "or" else Every(parts)
    if name == "not":
        return Unless(_all_of(wanted, depth + 1))
    field = check_field(name, "where")
    if not isinstance(wanted, dict):
        return _compare(field, "=", wanted)
    if not wanted:
        raise InputError(f"where[{field!r}] is empty; use one of {' '.join(OPERATORS)}, for example {EXAMPLE}")
    return _together([_compare(field, operator, value) for operator, value in wanted.items()])


def _compare(field: str, operator: object, value: object) -> Compare:
    here = f"where[{field!r}]"
    if operator in ("in", "not_in"):
        if not isinstance(value, list | tuple):
            raise InputError(f"{here}: {operator!r} takes a list, got {value!r}")
        values = tuple(check_scalar(one, f"{here}[{n}]") for n, one in enumerate(value))
        if any(one is None for one in values):
            raise InputError(f'{here}: None cannot stand in a list; write {{"or": [..., {{{field!r}: None}}]}}')
        return Compare(field, str(operator), values)
    if operator not in OPERATORS:
        raise InputError(f"{here}: unknown operator {operator!r}; use one of {' '.join(OPERATORS)}")
    if isinstance(value, list | tuple):
        raise InputError(f'{here}: to match any of several values write {{{field!r}: {{"in": [...]}}}}')
    check_scalar(value, here)
    if value is None and operator not in ("=", "!="):
        raise InputError(f"{here}: nothing is above or below None; use = or !=")
    return Compare(field, str(operator), value)


def _together(parts: Sequence[Condition]) -> Condition:
    return parts[0] if len(parts) == 1 else Every(tuple(parts))


def _sqlite(condition: Condition) -> tuple[str, list[Any]]:
    match condition:
        case Every(parts) | Either(parts):
            word = " AND " if isinstance(condition, Every) else " OR "
            said = [_sqlite(part) for part in parts]
            return "(" + word.join(sql for sql, _ in said) + ")", [value for _, values in said for value in values]
        case Unless(part):
            sql, values = _sqlite(part)
            return f"NOT {sql}", values
        case Compare(field, operator, value):
            return _sqlite_compare(f'$."{field}"', operator, value)


def _sqlite_compare(path: str, operator: str, value: Any) -> tuple[str, list[Any]]:
    """One comparison; its SQL is 0 or 1, never NULL, so that NOT around it means what it says."""
    got = "json_extract(metadata, ?)"
    if operator in ("in", "not_in"):
        sql = f"coalesce({got} IN (SELECT value FROM json_each(?)), 0)"
        text = json.dumps(list(value), ensure_ascii=False)
        return (sql if operator == "in" else f"(NOT {sql})"), [path, text]
    if operator in ("=", "!="):
        return f"({got} {'IS' if operator == '=' else 'IS NOT'} ?)", [path, value]
    kind = "'text'" if isinstance(value, str) else "'integer', 'real'"
    return f"(typeof({got}) IN ({kind}) AND {got} {operator} ?)", [path, path, value]
