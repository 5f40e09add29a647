"""One webhook: a run tells somebody far away that it ended, or that its checkpoints no longer reach the disk.

The address is a secret. It comes from the environment alone and stays out of every file, log line and error. Refuses
anything but https, and addresses of private networks, where a webhook could reach what only this machine may reach.
"""

import http.client
import ipaddress
import json
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlsplit

from tagger.errors import InputError

logger = logging.getLogger(__name__)

URL_VARIABLE = "TAGSMITH_ALERT_URL"
PRIVATE_VARIABLE = "TAGSMITH_ALERT_ALLOW_PRIVATE"
TIMEOUT_S = 5.0
# A disk that stays full fails every save; once an hour is enough to say so.
REPEAT_AFTER_S = 3600.0
_MAX_WAITING = 8

Value: TypeAlias = str | int | float | Mapping[str, str | int | float] | None


class AlertError(RuntimeError):
    """An alert that cannot be sent. The message never holds any part of the address."""


class Alerts:
    """Sends JSON to a webhook from a thread of its own. `send` never waits, `close` waits a few seconds at most.

    Without a URL both do nothing. Whatever goes wrong is one log line.
    """

    def __init__(
        self, url: str | None, *, allow_private: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Raises InputError for a URL that could never be used."""
        self._target = None if url is None else _Target(url, allow_private)
        self._clock = clock
        self._sent_at: dict[str, float] = {}
        self._waiting: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
        if self._target is not None:
            self._thread.start()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> "Alerts":
        """As `TAGSMITH_ALERT_URL` and `TAGSMITH_ALERT_ALLOW_PRIVATE` (1 or unset) say; off where there is no URL."""
        environment = os.environ if environment is None else environment
        allowed = environment.get(PRIVATE_VARIABLE, "")
        if allowed not in ("", "0", "1"):
            raise InputError(f"{PRIVATE_VARIABLE} is {allowed!r}; set it to 1 or leave it out")
        return cls(environment.get(URL_VARIABLE) or None, allow_private=allowed == "1")

    def send(self, event: str, text: str, **values: Value) -> None:
        """Queue an alert. The same event is not sent twice within an hour."""
        now = self._clock()
        if self._target is None or now - self._sent_at.get(event, -REPEAT_AFTER_S) < REPEAT_AFTER_S:
            return
        if self._waiting.qsize() >= _MAX_WAITING:
            logger.warning("the alert %r is left out: %d others have not been taken yet", event, _MAX_WAITING)
            return
        self._sent_at[event] = now
        self._waiting.put(json.dumps({"event": event, "text": text, **values}).encode())

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """Wait until what is queued was sent or failed, at most this long."""
        if not self._thread.is_alive():
            return
        self._waiting.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("the webhook has not answered within %.0f s; an alert may be lost", timeout_s)

    def __enter__(self) -> "Alerts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        assert self._target is not None
        while (body := self._waiting.get()) is not None:
            try:
                self._target.post(body)
            except (AlertError, OSError, ValueError, http.client.HTTPException) as error:
                logger.warning("an alert could not be sent: %s", _describe(error))


class _Target:
    """Where alerts go, checked: https, and at each use an address that is not of a private network."""

    def __init__(self, url: str, allow_private: bool) -> None:
        # None of these errors may quote the URL, which is why they all hide their cause.
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 443
        except ValueError:
            raise InputError(f"{URL_VARIABLE} is not a URL; it looks like https://hooks.example.com/...") from None
        if parts.scheme != "https" or not host:
            raise InputError(f"{URL_VARIABLE} must be an https:// address")
        if parts.username is not None or parts.password is not None:
            raise InputError(f"{URL_VARIABLE} holds a user name or password before '@'; a webhook's secret is its path")
        if any(ord(character) <= 32 or ord(character) > 126 for character in url):
            raise InputError(f"{URL_VARIABLE} holds a space or another character that a URL must write as %xx")
        self._host, self._port, self._allow_private = host, port, allow_private
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if _is_address(host) and not allow_private and not _is_public(host):
            raise InputError(f"{URL_VARIABLE} names an address of a private network; {_ALLOW}")
        self._context = ssl.create_default_context()

    def post(self, body: bytes) -> None:
        """Raises AlertError, OSError, ValueError or HTTPException where the webhook did not take it."""
        connection = http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=self._context)
        try:
            # An open socket keeps http.client from looking the name up a second time, when the answer may be another.
            connection.sock = self._connect()
            connection.request("POST", self._path, body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise AlertError(f"the webhook answered {status}" + (" (not followed)" if 300 <= status < 400 else ""))

    def _connect(self) -> ssl.SSLSocket:
        found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not self._allow_private and not all(_is_public(address) for address in addresses):
            raise AlertError(f"the webhook is in a private network; {_ALLOW}")
        failure: OSError = OSError("the name has no address")
        for address in addresses:
            try:
                plain = socket.create_connection((address, self._port), TIMEOUT_S)
            except OSError as error:
                failure = error
                continue
            try:
                if not self._allow_private and not _is_public(str(plain.getpeername()[0])):
                    raise AlertError(f"the webhook is in a private network; {_ALLOW}")
                return self._context.wrap_socket(plain, server_hostname=self._host)
            except BaseException:
                plain.close()
                raise
        raise failure


_ALLOW = f"set {PRIVATE_VARIABLE}=1 if that is meant"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet; of one that wraps an IPv4 address, whether that is."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        wrapped = found.ipv4_mapped
        if found in _NAT64:
            wrapped = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if wrapped is not None:
            found = wrapped
        elif found.sixtofour is not None or found.teredo is not None:
            return False  # tunnels of the past, into whatever network they name
    return found.is_global and not found.is_multicast and not found.is_reserved


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _describe(error: Exception) -> str:
    """What went wrong without the address: many errors of the network quote it in their text."""
    if isinstance(error, AlertError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"{type(error).__name__} {error.reason or ''}".strip()
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{type(error).__name__}: {error.strerror}"
    return type(error).__name__
