"""Ports of this machine that a server can answer on."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from mmsnnet.errors import SettingError


def free_port(host: str, ports: Sequence[int]) -> int:
    """The first of some ports on which a server can answer.

    Raises:
        SettingError: there is none; the message says why.
    """
    for candidate in ports:
        try:
            family, *_ = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.create_server((host, candidate), family=family):
                return candidate
        except (OSError, OverflowError) as error:
            reason = error
    raise SettingError(f"cannot serve on {host}:{candidate}: {reason}") from reason


def url_of(host: str, port: int) -> str:
    """The URL of a server; an address of IPv6 stands in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
