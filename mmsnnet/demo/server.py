"""The server of the page: this machine alone by default, no public link, no telemetry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mmsnnet.cli.ports import free_port
from mmsnnet.demo.page import CSS

if TYPE_CHECKING:
    from gradio import Blocks

PORTS = range(7860, 7960)


def serve(page: Blocks, host: str, port: int | None, max_upload_mb: float, announce: Callable[[str], object]) -> None:
    """Serve a page until the process is interrupted.

    Args:
        page: of :func:`mmsnnet.demo.page.build_page`.
        host: the address to answer on.
        port: None for the first free one from 7860.
        max_upload_mb: a larger upload is refused while it arrives.
        announce: gets the URL once the server answers.

    Raises:
        SettingError: the host or the port cannot be used.
    """
    import gradio as gr

    _, url, _ = page.launch(
        server_name=host,
        server_port=free_port(host, PORTS if port is None else (port,)),
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=int(max_upload_mb * 2**20),
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs=dict(docs_url=None, redoc_url=None, openapi_url=None),
        css=CSS,
        theme=gr.themes.Default(),
    )
    announce(url)
    page.block_thread()
