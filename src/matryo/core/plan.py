"""The plan: how a search goes from coarse to fine, as one readable line that parses and prints back exactly.

    256:binary keep 400 > 768:int8 keep 40 > 768:float32
    128:int8 hnsw(M=32,ef=80) keep 200 > 768:float16
    256:pq32 ivf(cells=1024,probe=32,at=64) keep 200 > 768:float32
    256:binary keep 1600 within 0.08 > 768:float32

A stage is `width:code [scan] [keep n [within m]]`. Stages are joined by `>`. Every stage but the last says how many
candidates it keeps; the last keeps as many as the caller asks for. The first may stop earlier for each query: it keeps
those whose score is within m of the k-th best (cosines; for bits 1 - 2 Hamming / width). `hnsw` gives each row M links
and follows the `ef` best; `ivf` sorts rows into `cells` by their first `at` dimensions (the stage's width unless said)
and scans the `probe` nearest.
"""

import re
from dataclasses import dataclass, replace

from matryo.core.errors import InputError

CODE = re.compile(r"float32|float16|bfloat16|int8|int4|binary|rabitq|pq[1-9][0-9]*")
SCANS: dict[str, tuple[str, ...]] = {"flat": (), "hnsw": ("M", "ef"), "ivf": ("cells", "probe", "at")}
STAGE = re.compile(
    r"(?P<width>[0-9]+)\s*:\s*(?P<code>[a-z0-9]+)"
    r"(?:\s+(?P<scan>(?!keep\b)[a-z]+)(?:\s*\((?P<options>[^()]*)\))?)?"
    r"(?:\s+keep\s+(?P<keep>[0-9]+)(?:\s+within\s+(?P<within>[0-9]*\.?[0-9]+))?)?"
)
NARROWEST, WIDEST = 1e-4, 2.0
"""What `within` may be: cosines differ by 2 at most, and %g writes such numbers without an exponent."""
EXAMPLE = "256:binary keep 400 > 768:float32"


@dataclass(frozen=True)
class Stage:
    """One pass over candidates: the first `width` dimensions, stored as `code`, scanned by `scan`, `keep` handed on,
    those only that score `within` so much of the k-th best.
    """

    width: int
    code: str
    scan: str = "flat"
    options: tuple[tuple[str, int], ...] = ()
    keep: int | None = None
    within: float | None = None

    def __str__(self) -> str:
        text = f"{self.width}:{self.code}"
        if self.scan != "flat":
            text += f" {self.scan}"
            if self.options:
                text += "(" + ",".join(f"{name}={value}" for name, value in self.options) + ")"
        if self.keep is not None:
            text += f" keep {self.keep}"
        return text if self.within is None else f"{text} within {self.within:g}"


@dataclass(frozen=True)
class Plan:
    """Stages from coarse to fine. `Plan.parse(str(plan)) == plan` for every plan.

    Laws, checked at construction: widths never shrink; `keep` never grows; only the first stage may scan by `hnsw` or
    `ivf` (later ones score a shortlist), with `at` up to its width; every stage but the last has a `keep`; only the
    first, if it has one, may have a `within`, of 0.0001 to 2 in six digits at most; binary widths are multiples of 8.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError(f"a plan needs at least one stage, for example '{EXAMPLE}'")
        for problem in _problems(self.stages):
            raise InputError(f"{problem}; a plan that would be right: '{_mended(self.stages)}'")

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan from its text; a bad one is an InputError that names the stage, the fault and a right plan."""
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"a plan is a line of text such as '{EXAMPLE}', got {text!r}")
        return cls(tuple(_stage(part.strip(), n) for n, part in enumerate(text.split(">"), start=1)))

    def __str__(self) -> str:
        return " > ".join(str(stage) for stage in self.stages)

    @property
    def width(self) -> int:
        """The widest prefix the plan reads."""
        return self.stages[-1].width

    def check(self, full: int) -> None:
        """Raise unless every stage fits vectors of `full` dimensions."""
        for n, stage in enumerate(self.stages, start=1):
            if stage.width > full:
                fixed = tuple(replace(s, width=min(s.width, full)) for s in self.stages)
                raise InputError(
                    f"stage {n} ({stage}): width {stage.width} is outside 1..{full}; "
                    f"a plan that would be right: '{_mended(fixed)}'"
                )


def _stage(text: str, n: int) -> Stage:
    found = STAGE.fullmatch(text)
    if not found:
        raise InputError(
            f"stage {n} ({text!r}) is not 'width:code [scan] [keep n [within m]]'; a plan that would be right: "
            f"'{EXAMPLE}'"
        )
    code, scan = found["code"], found["scan"] or "flat"
    if not CODE.fullmatch(code):
        raise InputError(
            f"stage {n}: unknown code {code!r}; use float32, float16, bfloat16, int8, int4, binary, rabitq or "
            f"pq<bytes>, for example '{EXAMPLE}'"
        )
    if scan not in SCANS:
        raise InputError(
            f"stage {n}: unknown scan {scan!r}; use flat, hnsw(M=..,ef=..) or ivf(cells=..,probe=..,at=..), "
            f"for example '{found['width']}:{code} hnsw(M=32,ef=80) keep 200 > 768:float16'"
        )
    options: list[tuple[str, int]] = []
    for item in filter(None, (part.strip() for part in (found["options"] or "").split(","))):
        name, _, value = (piece.strip() for piece in item.partition("="))
        if name not in SCANS[scan] or not value.isdecimal() or int(value) < 1:
            allowed = ", ".join(f"{o}=<integer above 0>" for o in SCANS[scan]) or "no options"
            raise InputError(f"stage {n}: {scan} takes {allowed}, got {item!r}; for example '{EXAMPLE}'")
        if name in dict(options):
            raise InputError(f"stage {n}: option {name} is given twice; for example '{EXAMPLE}'")
        options.append((name, int(value)))
    keep = int(found["keep"]) if found["keep"] else None
    within = float(found["within"]) if found["within"] else None
    return Stage(int(found["width"]), code, scan, tuple(options), keep, within)


def _problems(stages: tuple[Stage, ...]) -> list[str]:
    """What is wrong with a plan, first fault first."""
    faults: list[str] = []
    for n, stage in enumerate(stages, start=1):
        here = f"stage {n} ({stage})"
        if stage.width < 1:
            faults.append(f"{here}: the width must be at least 1")
        if stage.code == "binary" and stage.width % 8:
            faults.append(f"{here}: a binary width must be a multiple of 8")
        if stage.keep is not None and stage.keep < 1:
            faults.append(f"{here}: keep must be at least 1")
        if stage.within is not None and (n > 1 or stage.keep is None):
            faults.append(f"{here}: only a first stage that keeps rows may keep those within a distance")
        if stage.within is not None and stage.within != _rounded(stage.within):
            faults.append(f"{here}: within must be {NARROWEST:g} to {WIDEST:g}, in six digits at most")
        if dict(stage.options).get("at", 0) > stage.width:
            faults.append(f"{here}: cells are made at a width of at most the stage's, {stage.width}")
        if n > 1 and stage.scan != "flat":
            faults.append(f"{here}: only the first stage may scan by {stage.scan}; later ones score a shortlist")
        if n < len(stages) and stage.keep is None:
            faults.append(f"{here}: every stage but the last must say how many it keeps")
        if n > 1 and stage.width < stages[n - 2].width:
            faults.append(f"{here}: widths never shrink along a plan, stage {n - 1} has {stages[n - 2].width}")
        earlier = [s.keep for s in stages[: n - 1] if s.keep is not None]
        if stage.keep is not None and earlier and stage.keep > min(earlier):
            faults.append(f"{here}: keep never grows along a plan, an earlier stage keeps {min(earlier)}")
    return faults


def _rounded(within: float) -> float:
    """The nearest distance that may be written."""
    return float(f"{min(max(within, NARROWEST), WIDEST):g}")


def _mended(stages: tuple[Stage, ...]) -> "Plan":
    """The nearest plan that obeys the laws: widths raised, keeps lowered, missing keeps filled in."""
    mended: list[Stage] = []
    for n, stage in enumerate(stages):
        width = max(stage.width, mended[-1].width if mended else 1)
        if stage.code == "binary":
            width = -(-width // 8) * 8
        allowed = min((s.keep for s in mended if s.keep is not None), default=None)
        keep = stage.keep
        if keep is None and n < len(stages) - 1:
            keep = 400 if allowed is None else allowed
        if keep is not None:
            keep = max(1, keep if allowed is None else min(keep, allowed))
        scan, options = (stage.scan, stage.options) if n == 0 else ("flat", ())
        options = tuple((name, min(value, width) if name == "at" else value) for name, value in options)
        within = None if stage.within is None or n or keep is None else _rounded(stage.within)
        mended.append(Stage(width, stage.code, scan, options, keep, within))
    return Plan(tuple(mended))
