"""Frozen settings of the HTTP front."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from sl_serve.errors import UserError
from sl_serve.tools.formats import ToolParserName

LONGEST_PING_S = 15.0  # proxies commonly drop a stream after 30 to 60 silent seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    served_model_names: tuple[str, ...]  # the first is the default and the one reported
    api_keys: tuple[str, ...] = ()  # empty: no key needed
    host: str = "127.0.0.1"
    port: int = 8000  # 0: chosen by the system
    allowed_hosts: tuple[str, ...] = ()  # further Host names on a loopback address without keys
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_json_depth: int = 64
    max_n: int = 128
    max_choices: int = 1024  # prompts times n of one HTTP request
    max_stop: int = 16
    max_stop_chars: int = 1000
    max_logprobs: int = 20
    tool_parser: ToolParserName = "auto"  # how the model writes calls; auto: by its chat template
    ping_s: float = LONGEST_PING_S
    drain_timeout_s: float = 30.0
    stall_floor_s: float = 120.0  # what the first steps may take; later ones are judged by them
    n_workers: int = 4  # threads that parse, tokenise and render
    log_json: bool = False
    jobs_dir: Path | None = None  # None: no files, no batches
    jobs_quota_bytes: int | None = None  # of all files there; None: as much as the disk has

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise UserError("served_model_names needs at least one name, and none may be empty")
        if not all(self.api_keys):
            raise UserError("an API key is empty; drop it or give it a value")
        if not 0 < self.ping_s <= LONGEST_PING_S:
            raise UserError(
                f"ping_s is {self.ping_s:g}; it must be above 0 and at most {LONGEST_PING_S:g}"
            )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port} does not exist; choose one of 0 to 65535")

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
