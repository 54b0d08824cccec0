"""`gravity-hf serve`: a model with its beliefs over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import make_console, quiet_libraries

if TYPE_CHECKING:
    from ..knowledge.server.settings import ServerSettings

_TOKEN, _ADMIN_TOKEN = "GRAVITY_HF_TOKEN", "GRAVITY_HF_ADMIN_TOKEN"


def serve(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of any causal language model.", show_default=False
        ),
    ],
    beliefs: Annotated[
        Path, typer.Argument(metavar="KB", help="Folder of its beliefs.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    name: Annotated[
        str | None, typer.Option(help="What clients call it; DIR's by default.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of one answer, at most.")] = 512,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Of one prompt, at most.")] = 2048,
    queue: Annotated[int, typer.Option(min=1, help="Texts that may wait; more get 429.")] = 64,
    active: Annotated[int, typer.Option(min=1, help="Texts written at the same time.")] = 8,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many of them share a forward pass: 1 gives each text bit for bit as if it "
            "were alone; more is faster on a GPU and equal up to rounding.",
        ),
    ] = 1,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds for one answer.")] = 60.0,
    route_threshold: Annotated[
        float | None,
        typer.Option(help="Similarity from which a belief is used; the calibrated one by default."),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Measure threshold and confidence on the beliefs' held-out prompts and keep them "
            "beside the beliefs, then serve."
        ),
    ] = False,
    enforce_registry: Annotated[
        bool, typer.Option(help="Refuse new beliefs that the registry refuses.")
    ] = False,
    log: Annotated[
        Path | None, typer.Option(help="File of the provenance log; KB.log.jsonl by default.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option(help="Log prompts as they are, not only their SHA-256.")
    ] = False,
    log_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variable with the key of the log's chain.")
    ] = None,
) -> None:
    """Serve a model with the beliefs in KB: OpenAI's /v1/chat/completions and /v1/completions, own
    endpoints that say where each answer comes from and that add, change and remove beliefs, and a
    page at /. (For a gravity model alone, by transformers' own server: gravity-hf serve-model.)

    Changing beliefs needs the admin token, read from GRAVITY_HF_ADMIN_TOKEN or made and shown
    once. Where other machines can reach the address, both that and GRAVITY_HF_TOKEN must be set.

    Example:

        gravity-hf serve model kb --port 8000
    """
    _require_packages()
    from ..knowledge.server.opening import open_knowledge
    from ..knowledge.server.running import make_server
    from ..knowledge.server.settings import ServerSettings

    # Before the model is loaded: what is wrong with the settings is said at once.
    settings = ServerSettings(
        token=os.environ.get(_TOKEN) or None,
        admin_token=os.environ.get(_ADMIN_TOKEN) or None,
        host=host,
        port=port,
        max_new_tokens=max_new_tokens,
        max_prompt_tokens=max_prompt_tokens,
        queue=queue,
        active_rows=active,
        batch_rows=batch,
        timeout_s=timeout,
        log=_log_file(beliefs) if log is None else log,
        log_prompts=log_prompts,
        log_key=_log_key(log_key_env),
    )
    settings.check_bind()
    quiet_libraries()
    base = open_knowledge(
        directory,
        beliefs,
        device=device,
        dtype=dtype,
        route_threshold=route_threshold,
        enforce_registry=enforce_registry,
        calibrate=calibrate,
    )
    own = settings.with_admin_token()
    server = make_server(base, own, model_name=name or directory.resolve().name)
    _say(base, own, is_made=settings.admin_token is None)
    server.run()


def _say(base: Any, settings: ServerSettings, *, is_made: bool) -> None:
    """Where it listens, what it serves, and the admin token where nobody else knows it."""
    console = make_console()
    shown = f"[{settings.host}]" if ":" in settings.host else settings.host
    where = f"http://{shown}:{settings.port}" if settings.port else f"a free port of {shown}"
    console.print(f"Serving {len(base.snapshot.beliefs)} beliefs at {where}", markup=False)
    console.print(f"  base {base.base_digest}, verified", markup=False)
    if not base.selector.can_route:
        console.print(
            "  beliefs are used by name only: too few facts to calibrate routing. Add facts with "
            "paraphrases and unrelated prompts, or pass --route-threshold",
            markup=False,
        )
    if settings.log is not None:
        console.print(f"  log {settings.log} (gravity-hf ledger verify)", markup=False)
    if is_made:
        console.print(f"  admin token, shown once: {settings.admin_token}", markup=False)


def _log_file(beliefs: Path) -> Path:
    folder = beliefs.resolve()
    return folder.with_name(f"{folder.name}.log.jsonl")


def _log_key(name: str | None) -> bytes | None:
    from ..runtime.ledger_key import key_from_environment

    return None if name is None else key_from_environment(name)


def _require_packages() -> None:
    from importlib.util import find_spec

    names = ("fastapi", "uvicorn", "pydantic", "prometheus_client")
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"serve: expected the packages of a server, {', '.join(missing)} is not installed. "
            'Install them with: pip install "gravity_hf[serve]"'
        )
