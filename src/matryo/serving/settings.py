"""Everything `matryo serve` can be told, checked once."""

import dataclasses
import ipaddress
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matryo.core.errors import InputError

BACKENDS = ("auto", "static", "onnx", "openvino", "torch")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve one model. Limits are those of OpenAI's endpoint where it has them.

    Raises:
        InputError: a value out of its range, or an address that others can reach without keys or `insecure`.
    """

    model: str
    """A model folder, "toy", or whatever `matryo.load` takes."""
    index: str | None = None
    """An index folder that `/v1/search` answers from."""
    plans: str | None = None
    """A file of `matryo plan` (.json or .yaml) whose frontier the page shows."""
    backend: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    """What clients call the model; the folder's name by default."""
    aliases: tuple[str, ...] = ()
    """Other names it answers to, for clients that insist on one."""
    strict_widths: bool = False
    """Serve trained widths and the full one only."""
    token_ids: bool = False
    """Accept token ids as input. They must be of this model's own tokeniser."""
    api_keys: str | None = None
    """File of hashed keys; see `matryo.serving.keys`."""
    insecure: bool = False
    """Allow an address beyond loopback without keys."""
    cors: tuple[str, ...] = ()
    """Origins of browser pages that may call; none by default."""
    max_body_bytes: int = 4 << 20
    max_inputs: int = 2048
    max_input_tokens: int = 8192
    """An input's tokens, where the model itself takes as many."""
    max_request_tokens: int = 300_000
    queue_tokens: int = 600_000
    """Tokens that may wait; beyond, requests are told to come back."""
    batch_tokens: int = 1024
    """Tokens, padding included, of one run of a transformer. More cost memory and gain nothing on a processor."""
    timeout: float = 30.0
    """Seconds a request may take before it is given up."""
    body_timeout: float = 15.0
    """Seconds a client may take to send its request."""
    drain: float = 30.0
    """Seconds that accepted requests have to finish after the signal to stop."""
    threads: int | None = None
    """Threads of the model in each worker; the processors this process may use, shared by the workers, by default."""
    workers: int = 1
    writable: bool = False
    """Let callers change the index; with keys, those of scope "write"."""
    access_log: bool = True
    log_texts: bool = False
    traces: bool = False
    """Send OpenTelemetry traces where its environment variables say."""

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise InputError(f"backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port must be in 0..65535, got {self.port}")
        counts = ("max_body_bytes", "max_inputs", "max_input_tokens", "max_request_tokens", "queue_tokens")
        for name in (*counts, "batch_tokens", "workers", "timeout", "body_timeout"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.threads is not None and self.threads < 1:
            raise InputError(
                f"threads must be at least 1, got {self.threads}; leave it out for a choice by the machine"
            )
        if self.writable and (self.index is None or self.workers > 1):
            raise InputError("writable needs an index, and one worker: an index has one writer; leave --workers at 1")
        if not self.drain >= 0:
            raise InputError(f"drain must be at least 0 seconds, got {self.drain}")
        if "*" in self.cors and self.api_keys is None:
            raise InputError("cors '*' without keys lets any web page use this server; name origins or give api_keys")
        if not (loopback(self.host) or self.api_keys or self.insecure):
            raise InputError(
                f"host {self.host} can be reached by other machines and there are no keys; give --api-keys FILE "
                "(made by 'matryo key'), or --insecure if something in front of it checks who calls"
            )

    @property
    def served_as(self) -> tuple[str, ...]:
        """Every name the model answers to; the first is its own."""
        return (self.name or Path(self.model).name or self.model, *self.aliases)

    def to_json(self) -> str:
        """Text that `from_json` reads back, for handing to worker processes."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Settings from `to_json`."""
        found: dict[str, Any] = json.loads(text)
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return cls(**known)


def loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
