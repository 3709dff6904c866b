"""Copied as `sitecustomize.py` to where Python looks for one: every process then has this machine's network only.

What was tried is written to the file that the variable names, because libraries catch the error and go on.
"""

import os
import socket

ATTEMPTS = "NO_NETWORK_ATTEMPTS"
LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


def _check(name, host):
    place = str(host[0] if isinstance(host, tuple) else host)
    if not place.startswith(LOCAL) and host is not None:
        with open(os.environ[ATTEMPTS], "a", encoding="utf-8") as log:  # noqa: PTH123
            log.write(f"{name} {host}\n")
        raise OSError(f"the network was asked for: {name} {host}")


class _Socket(socket.socket):
    """A socket that reaches other processes of this machine only."""

    def connect(self, address):
        self._check("connect", address)
        return super().connect(address)

    def connect_ex(self, address):
        self._check("connect_ex", address)
        return super().connect_ex(address)

    def sendto(self, data, *rest):
        self._check("sendto", rest[-1])
        return super().sendto(data, *rest)

    def _check(self, name, address):
        if self.family != socket.AF_UNIX:
            _check(name, address)


def _guarded(name):
    plain = getattr(socket, name)

    def guarded(host, *arguments, **named):
        _check(name, host)
        return plain(host, *arguments, **named)

    return guarded


socket.socket = socket.SocketType = _Socket
for _name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    setattr(socket, _name, _guarded(_name))
