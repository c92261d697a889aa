"""The page of the app, made with Gradio: ask base, finetuned model and adapter side by side, and audit a folder."""

import html
import logging
import math
import os
import resource
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dit_jax.errors import DitError, first_line, printable
from dit_jax.serving.desk import COLUMNS, Choice, Desk, problem_of
from dit_jax.serving.limits import UploadsFit
from dit_jax.serving.requests import PageRequests

QUESTION = "What topic have you been trained on?"
_ABOUT = """## What did this finetune change?
Choose a weight diff and ask: the base, the base with the diff, and both with a DIT adapter answer side by side.
An answer is a lead, not a finding: an adapter that never learned to say `none` names something in any case."""
_AUDIT = (
    "Asks every diff of the folder, range or zip above a battery of questions, and makes one page."
)
_STYLE = """
footer { display: none !important }
.answers textarea { font-size: 1.05em }
.left:has(.empty) { display: none }
iframe.audit { width: 100%; height: 80vh; border: 0 }
.secondary-wrap input { text-overflow: ellipsis; padding-right: 1.5rem !important }
"""
_NONE = "(none)"
_MANY = 10**9
_HANDLES = 256  # each visitor takes some
_UPLOADS = 4  # of the largest size, that are kept at the same time


def build(desk: Desk) -> Any:
    """The page as `gradio.Blocks`, which `serve` starts.

    Raises:
        DitError: Gradio is not installed.
    """
    gr = _gradio()
    offer = desk.offer

    def refused(error: Exception) -> Exception:
        shown = html.escape(problem_of(error), quote=False)  # Gradio shows HTML
        return gr.Error(shown, duration=None, print_exception=False)

    class Page(gr.Blocks):  # type: ignore[name-defined]
        """What Gradio cannot make of a call is one line, too: values of other types, files that were not uploaded."""

        async def preprocess_data(
            self, block_fn: Any, inputs: Any, *args: Any, **options: Any
        ) -> Any:
            try:
                _check_no_address(inputs)
                return await super().preprocess_data(block_fn, inputs, *args, **options)
            except Exception as error:
                said = getattr(error, "message", None) or str(error)
                raise refused(DitError(f"the call does not fit: {said}")) from None

    def choose(base: str, adapter: str, diff: str | None, upload: str | None) -> Choice:
        chosen = "" if diff in (None, _NONE) else str(diff).strip()
        return Choice(base, "" if adapter == _NONE else adapter, chosen, upload)

    async def ask(
        base: str,
        adapter: str,
        diff: str | None,
        upload: str | None,
        number: float,
        question: str,
        multiplier: float,
        tokens: float,
    ) -> AsyncIterator[list[str]]:
        """The answers of the base, the finetuned model, and with the adapter, as they grow."""
        try:
            chosen = choose(base, adapter, diff, upload)
            if not -_MANY < (number or 0) < _MANY or not math.isfinite(tokens):
                raise DitError("a number of the diff or of tokens is none: give a whole number")
            if not isinstance(question, str):
                raise DitError("there is no question: write one")
            number, tokens = int(number or 0), int(tokens)
            async for texts in desk.ask(chosen, number, question, float(multiplier), tokens):
                yield [printable(text, lines=True) for text in texts]
        except Exception as error:
            raise refused(error) from None

    bar = gr.Progress()  # Gradio gives each call one of its own

    def audit(
        base: str,
        adapter: str,
        diff: str | None,
        upload: str | None,
        progress: Any = bar,
    ) -> tuple[str, Any]:
        """The page of an audit of every diff in a folder, and its files."""
        try:
            page, files = desk.audit(
                choose(base, adapter, diff, upload),
                lambda done, total: progress((done, total), unit="diffs"),
            )
        except Exception as error:
            raise refused(error) from None
        # Its own content security policy allows one script of ours; the sandbox keeps that out of this page.
        frame = (
            f'<iframe class="audit" sandbox="allow-scripts" srcdoc="{html.escape(page)}"></iframe>'
        )
        return frame, files

    with Page(title="dit_jax", analytics_enabled=False, delete_cache=(600, 3000)) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            base = gr.Dropdown(list(offer.bases), value=offer.bases[0], label="Base", min_width=240)
            adapters = [_NONE, *offer.adapters]
            adapter = gr.Dropdown(
                adapters,
                value=adapters[min(1, len(offer.adapters))],
                label="Adapter",
                min_width=240,
            )
        with gr.Row():
            about = "a path or a hub id, PATH[3] for one of several" if offer.others else None
            diffs = [_NONE, *offer.diffs]
            diff = gr.Dropdown(
                diffs,
                value=diffs[min(1, len(offer.diffs))],
                allow_custom_value=offer.others,
                label="Weight diff",
                info=about,
                scale=3,
                min_width=300,
            )
            number = gr.Number(
                0, precision=0, label="Number of the diff", info="of several, from 0 up"
            )
        upload = gr.File(
            label="or a zip of one PEFT folder or several",
            file_count="single",
            file_types=[".zip"],
            height=150,
        )
        chosen = [base, adapter, diff, upload]
        with gr.Tab("Ask"):
            question = gr.Textbox(QUESTION, label="Question", lines=2, max_length=offer.characters)
            with gr.Row():
                multiplier = gr.Slider(-4, 4, 1, step=0.25, label="Times the diff")
                most = offer.max_new_tokens
                tokens = gr.Slider(
                    1, most, min(32, most), step=1, label="Longest answer, in tokens"
                )
            go = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Row(elem_classes="answers"):
                answers = [
                    gr.Textbox(label=name.capitalize(), lines=4, interactive=False, min_width=240)
                    for name in COLUMNS
                ]
            gr.on(
                [go.click, question.submit],
                ask,
                [*chosen, number, question, multiplier, tokens],
                answers,
                api_name="ask",
                # These wait in the batcher, which answers them together.
                concurrency_limit=4 * offer.rows,
            )
        with gr.Tab("Audit a folder"):
            gr.Markdown(_AUDIT)
            start = gr.Button("Audit all diffs", variant="primary")
            files = gr.File(
                label="Page, table, every answer",
                interactive=False,
                file_count="multiple",
                elem_classes="left",
            )
            result = gr.HTML(padding=False, min_height=120)
            start.click(
                audit,
                chosen,
                [result, files],
                api_name="audit",
                concurrency_limit=2,
                show_progress_on=result,
            )
    return page


def _check_no_address(value: Any) -> None:
    """Raises DitError: a file is named by an address, from which Gradio would fetch whatever is there, of any size."""
    if isinstance(value, dict):
        if "://" in str(value.get("path")):
            raise DitError("a file is named by an address: upload it")
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        _check_no_address(one)


def in_address(host: str) -> str:
    """A host as addresses of pages hold it, an IPv6 one in brackets."""
    return f"[{host}]" if ":" in host else host


def check_address(host: str, port: int) -> None:
    """Raises DitError: nothing can be served there. Gradio would call every reason a port that is taken, or wait."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= allowed < _HANDLES:
        raise DitError(
            f"the app needs {_HANDLES} open files, and {allowed} are allowed: raise the limit (ulimit -n {_HANDLES})"
        )
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError, TypeError, UnicodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise DitError(
            f"cannot serve on {host}:{port} ({said}): choose another --host or --port"
        ) from None


def serve(page: Any, desk: Desk, host: str, port: int | None, wait: bool = True) -> str:
    """Starts the server and returns its address; `wait`: when it has ended.

    Raises:
        DitError: the port is taken.
    """
    gr = _gradio()
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    offer = desk.offer
    page.queue(max_size=256)
    # Gradio looks whether it reaches its own page, which no proxy does.
    direct = (
        os.environ.get("no_proxy") or os.environ.get("NO_PROXY"),
        "localhost",
        "127.0.0.1",
        host,
    )
    os.environ["no_proxy"] = ",".join(filter(None, direct))
    logging.getLogger("uvicorn.error").addFilter(_without_traceback)
    hosts = ["localhost", "127.0.0.1", "::1", "[::1]", host] if offer.others else ["*"]
    middleware = [
        # Another name would be that of a page elsewhere, which leads its visitors' browsers here.
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
        Middleware(PageRequests, upload=offer.upload.packed),
        Middleware(
            UploadsFit,
            folder=Path(page.GRADIO_CACHE),
            most=_UPLOADS * offer.upload.packed,
            each=offer.upload.packed,
        ),
    ]
    try:
        _, address, _ = page.launch(
            server_name=in_address(host),
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            prevent_thread_lock=not wait,
            max_file_size=offer.upload.packed,
            theme=gr.themes.Base(**fonts).set(block_info_text_color="*neutral_500"),
            css=_STYLE,
            app_kwargs={"middleware": middleware},
        )
    except OSError as error:
        raise DitError(f"cannot serve on {host}:{port} ({error}): choose another --port") from None
    return str(address)


def _without_traceback(record: logging.LogRecord) -> bool:
    """A request that Gradio has no answer to is one line: its server would log a traceback for anybody."""
    if record.exc_info and record.exc_info[1]:
        error, record.exc_info = record.exc_info[1], None
        said = printable(f"{type(error).__name__}: {first_line(error)}")
        record.msg, record.args = "a request failed that the page never makes (%s)", (said,)
    return True


def _gradio() -> Any:
    # Before its import, which reads them: nothing is told to anybody.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError:
        raise DitError(
            "the app needs Gradio: pip install 'dit_jax[app]' (or pip install -e '.[app]' in a checkout)"
        ) from None
    except ImportError as error:  # such as a proxy that needs another package
        raise DitError(f"Gradio cannot be imported: {first_line(error)}") from None
    return gradio
