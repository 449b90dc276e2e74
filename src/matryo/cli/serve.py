"""`matryo serve` and `matryo key`."""

from pathlib import Path
from typing import Annotated

import typer

from matryo.cli.terminal import Json, say, say_json


def add(app: typer.Typer) -> None:
    """Put the verbs on the app."""
    app.command()(serve)
    app.command()(key)


def serve(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    index: Annotated[str | None, typer.Option(help="Index, folder or URL, that /v1/search answers from.")] = None,
    plans: Annotated[Path | None, typer.Option(help="File of matryo plan (.json, .yaml) for the page.")] = None,
    host: Annotated[str, typer.Option(help="Address; beyond loopback it needs --api-keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8000,
    backend: Annotated[str, typer.Option(help="auto, static, onnx, openvino or torch.")] = "auto",
    name: Annotated[str | None, typer.Option(help="What clients call the model; the folder's name.")] = None,
    alias: Annotated[list[str] | None, typer.Option(help="Another name for it; repeatable.")] = None,
    strict_widths: Annotated[bool, typer.Option("--strict-widths", help="Trained widths only.")] = False,
    token_ids: Annotated[bool, typer.Option("--token-ids", help="Take this model's token ids as input.")] = False,
    api_keys: Annotated[Path | None, typer.Option(help="File of keys, made by 'matryo key'.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow any address without keys.")] = False,
    cors: Annotated[list[str] | None, typer.Option(help="Origin of a page that may call; repeatable.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the port.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads of the model in each worker.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.")] = 30.0,
    queue_tokens: Annotated[int, typer.Option(help="Tokens that may wait before callers get a 429.")] = 600_000,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body.")] = 4 << 20,
    writable: Annotated[bool, typer.Option("--writable", help="Let callers change the index.")] = False,
    access_log: Annotated[bool, typer.Option(help="A line of JSON per request.")] = True,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Put input texts into those lines.")] = False,
    traces: Annotated[bool, typer.Option("--traces", help="Send OpenTelemetry traces; needs the otel extra.")] = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's /v1/embeddings and any width as 'dimensions', and a page to try it.

    Example: matryo serve runs/first --index docs.matryo
    """
    from matryo.serving import Settings
    from matryo.serving import serve as run

    run(
        Settings(
            model=model,
            index=index,
            plans=None if plans is None else str(plans),
            host=host,
            port=port,
            backend=backend,
            name=name,
            aliases=tuple(alias or ()),
            strict_widths=strict_widths,
            token_ids=token_ids,
            api_keys=None if api_keys is None else str(api_keys),
            insecure=insecure,
            cors=tuple(cors or ()),
            workers=workers,
            threads=threads,
            timeout=timeout,
            queue_tokens=queue_tokens,
            max_body_bytes=max_body_bytes,
            writable=writable,
            access_log=access_log,
            log_texts=log_texts,
            traces=traces,
        )
    )


def key(
    file: Annotated[Path, typer.Argument(help="File of keys; made if it is not there.")],
    name: Annotated[str, typer.Option(help="Whose key it is; appears in logs.")],
    scope: Annotated[list[str] | None, typer.Option(help="search or write; repeatable.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key for 'matryo serve --api-keys'. It is shown once; the file keeps its hash.

    Example: matryo key keys.json --name web
    """
    from matryo.serving.keys import add_key

    made = add_key(file, name, tuple(scope or ("search",)))
    say_json({"name": name, "key": made}) if as_json else say(made)
