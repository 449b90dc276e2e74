"""The page at `/`: plain files of this package, sent with a digest so that browsers ask again and load once."""

import hashlib
from functools import cache
from importlib import resources

from matryo.serving.door import Answer
from matryo.serving.errors import ApiError
from matryo.serving.service import Call, Service

MEDIA = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
"""Nothing from elsewhere, nothing inline, nobody else's frame; no text ever becomes markup."""


@cache
def files() -> dict[str, Answer]:
    """Every file of the page by its name."""
    found: dict[str, Answer] = {}
    ours = resources.files("matryo")  # not of the room of pages, whose import needs jinja2
    for file in (*ours.joinpath("serving/page").iterdir(), ours.joinpath("pages/style.css")):
        media = MEDIA.get(file.name.rpartition(".")[2])
        if media is not None:
            body = file.read_bytes()
            headers = {
                "etag": f'"{hashlib.blake2b(body, digest_size=12).hexdigest()}"',
                "cache-control": "no-cache",
                "content-security-policy": POLICY,
                "referrer-policy": "no-referrer",
                "cross-origin-opener-policy": "same-origin",
                "cross-origin-resource-policy": "same-origin",
            }
            found[file.name] = Answer(body, 200, media, headers)
    return found


async def page(service: Service, call: Call) -> Answer:
    """`/` and the files it names. It holds no secret: what it shows it asks for with the reader's key."""
    answer = files().get(call.path.get("name", "index.html"))
    if answer is None:
        raise ApiError(404, "The page has no such file.", code="not_found")
    known = call.headers.get(b"if-none-match", b"").decode("latin-1")
    if answer.headers["etag"] in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
        return Answer(b"", 304, answer.media, answer.headers)
    return answer
