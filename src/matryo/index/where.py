"""Metadata filters: a dict in, one SQL condition with bound parameters out. No value or name enters the SQL text.

    {"section": "games"}                     the field equals
    {"size": {">=": 3, "<": 9}}              operators: = != < <= > >= in not_in
    {"tag": {"in": ["a", "b"]}, "year": 3}   several fields: all must hold
    {"or": [{...}, {...}]}, {"and": [...]}, {"not": {...}}

A field that an item lacks counts as None: it equals None, is unlike everything else, and is neither above nor below
anything. Numbers compare with numbers and texts with texts only; true and false count as 1 and 0.
"""

import json
from typing import Any

from matryo.core.errors import InputError
from matryo.index.items import check_field, check_scalar

Where = dict[str, Any]
OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in", "not_in")
DEEPEST = 16
EXAMPLE = '{"section": "games", "size": {">=": 3}}'


def compile_where(where: object) -> tuple[str, list[Any]]:
    """(SQL condition over the table `items`, its parameters)."""
    return _all_of(where, 0)


def _all_of(where: object, depth: int) -> tuple[str, list[Any]]:
    if not isinstance(where, dict) or not where:
        raise InputError(f"where must be a dict such as {EXAMPLE}, got {where!r}")
    if depth > DEEPEST:
        raise InputError(f"where is nested more than {DEEPEST} deep; flatten it")
    parts = [_one(name, wanted, depth) for name, wanted in where.items()]
    return _joined(" AND ", parts)


def _one(name: object, wanted: object, depth: int) -> tuple[str, list[Any]]:
    if name in ("or", "and"):
        if not isinstance(wanted, list) or not wanted:
            raise InputError(f"where: {name!r} takes a list of dicts, got {wanted!r}")
        return _joined(f" {str(name).upper()} ", [_all_of(part, depth + 1) for part in wanted])
    if name == "not":
        sql, values = _all_of(wanted, depth + 1)
        return f"NOT {sql}", values
    field = check_field(name, "where")
    if not isinstance(wanted, dict):
        return _compare(field, "=", wanted)
    if not wanted:
        raise InputError(f"where[{field!r}] is empty; use one of {' '.join(OPERATORS)}, for example {EXAMPLE}")
    return _joined(" AND ", [_compare(field, operator, value) for operator, value in wanted.items()])


def _compare(field: str, operator: object, value: object) -> tuple[str, list[Any]]:
    """One comparison; its SQL is 0 or 1, never NULL, so that NOT around it means what it says."""
    here = f"where[{field!r}]"
    path = f'$."{field}"'
    got = "json_extract(metadata, ?)"
    if operator in ("in", "not_in"):
        if not isinstance(value, list | tuple):
            raise InputError(f"{here}: {operator!r} takes a list, got {value!r}")
        values = [check_scalar(one, f"{here}[{n}]") for n, one in enumerate(value)]
        if any(one is None for one in values):
            raise InputError(f'{here}: None cannot stand in a list; write {{"or": [..., {{{field!r}: None}}]}}')
        sql = f"coalesce({got} IN (SELECT value FROM json_each(?)), 0)"
        text = json.dumps(values, ensure_ascii=False)
        return (sql if operator == "in" else f"(NOT {sql})"), [path, text]
    if operator not in OPERATORS:
        raise InputError(f"{here}: unknown operator {operator!r}; use one of {' '.join(OPERATORS)}")
    if isinstance(value, list | tuple):
        raise InputError(f'{here}: to match any of several values write {{{field!r}: {{"in": [...]}}}}')
    check_scalar(value, here)
    if operator in ("=", "!="):
        return f"({got} {'IS' if operator == '=' else 'IS NOT'} ?)", [path, value]
    if value is None:
        raise InputError(f"{here}: nothing is above or below None; use = or !=")
    kind = "'text'" if isinstance(value, str) else "'integer', 'real'"
    return f"(typeof({got}) IN ({kind}) AND {got} {operator} ?)", [path, path, value]


def _joined(word: str, parts: list[tuple[str, list[Any]]]) -> tuple[str, list[Any]]:
    return "(" + word.join(sql for sql, _ in parts) + ")", [value for _, values in parts for value in values]
