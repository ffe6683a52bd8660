"""Ports that servers answer on."""

import socket

import pytest

from mmsnnet.cli.ports import free_port, url_of
from mmsnnet.errors import SettingError


def test_a_port_that_is_taken_is_an_error_or_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"^cannot serve on 127.0.0.1:{port}: .*in use"):
            free_port("127.0.0.1", [port])
        assert free_port("127.0.0.1", [port, 0]) == 0
    assert free_port("127.0.0.1", [port]) == port


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 7860), ("no host", 7860), ("127.0.0.1", 70_000)])
def test_an_address_that_is_none_is_an_error(host: str, port: int) -> None:
    with pytest.raises(SettingError, match=f"^cannot serve on {host}:{port}: "):
        free_port(host, [port])


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert [url_of(host, 80) for host in ("::1", "127.0.0.1", "a")] == [
        "http://[::1]:80",
        "http://127.0.0.1:80",
        "http://a:80",
    ]
