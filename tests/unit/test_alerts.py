"""Alerts reach a real server, never a private one unasked, and nothing about them shows the address or stops a run."""

import socket
import threading

import pytest

from tagger.alerts import PRIVATE_VARIABLE, REPEAT_AFTER_S, URL_VARIABLE, Alerts, _is_public
from tagger.errors import InputError
from tests.webhook import CERTIFICATE, Webhook

CANARY = "canary5d1f"


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))


def url_of(hook: Webhook, host: str = "localhost") -> str:
    return f"https://{host}:{hook.port}/hooks/{CANARY}?key={CANARY}"


def sent(url: str, *, allow_private: bool, event: str = "ended") -> None:
    with Alerts(url, allow_private=allow_private) as opened:
        opened.send(event, "run: ended", step=3, best=None)


def test_an_alert_arrives_as_json(caplog: pytest.LogCaptureFixture) -> None:
    with Webhook() as hook:
        for host in ("localhost", "127.0.0.1"):
            sent(url_of(hook, host), allow_private=True)
    assert hook.received == [{"event": "ended", "text": "run: ended", "step": 3, "best": None}] * 2
    assert hook.paths == [f"/hooks/{CANARY}?key={CANARY}"] * 2
    assert caplog.text == ""


def test_the_environment_alone_turns_them_on() -> None:
    with Webhook() as hook:
        environment = {URL_VARIABLE: url_of(hook), PRIVATE_VARIABLE: "1"}
        for each in ({}, {URL_VARIABLE: ""}, environment):
            with Alerts.from_environment(each) as opened:
                opened.send("ended", "run: ended")
    assert len(hook.received) == 1
    with pytest.raises(InputError, match=PRIVATE_VARIABLE):
        Alerts.from_environment({**environment, PRIVATE_VARIABLE: "yes"})


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://hooks.example.com/{CANARY}", "https"),
        (f"ftp://hooks.example.com/{CANARY}", "https"),
        (f"hooks.example.com/{CANARY}", "https"),
        (f"https:///{CANARY}", "https"),
        (f"https://[{CANARY}/", "not a URL"),
        (f"https://hooks.example.com:{CANARY}/", "not a URL"),
        (f"https://{CANARY}:word@hooks.example.com/", "'@'"),
        (f"https://hooks.example.com/{CANARY}\r\nHost: other", "%xx"),
        (f"https://127.0.0.1/{CANARY}", "private"),
        (f"https://[::1]/{CANARY}", "private"),
        (f"https://169.254.169.254/{CANARY}", "private"),
        (f"https://[fe80::1%25eth0]/{CANARY}", "private"),
    ],
)
def test_a_url_that_could_never_be_used_is_refused_at_the_start_without_showing_it(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as refused:
        Alerts(url)
    assert CANARY not in str(refused.value)
    assert refused.value.__cause__ is None and refused.value.__suppress_context__ is (message == "not a URL")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:4700:4700::1111", True),
        ("::ffff:93.184.215.14", True),
        ("64:ff9b::5db8:d70e", True),
        *[
            (address, False)
            for address in (
                *("127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1"),
                *("0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
                *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "2001:db8::1"),
                *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"),
            )
        ],
    ],
)
def test_what_counts_as_public(address: str, public: bool) -> None:
    assert _is_public(address) is public


def answer(*addresses: str) -> list[tuple[object, ...]]:
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in addresses]


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("93.184.215.14", "10.0.0.1")])
def test_a_name_with_a_private_address_is_never_connected_to(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer(*addresses))
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    sent(f"https://hooks.example.com/{CANARY}", allow_private=False)
    (record,) = caplog.records
    assert "private network" in record.message and PRIVATE_VARIABLE in record.message


def test_a_name_is_looked_up_once_and_the_connection_goes_to_what_was_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [answer("93.184.215.14"), answer("127.0.0.1")]
    connected: list[object] = []

    def connect(address: object, *_: object) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers.pop(0))
    monkeypatch.setattr(socket, "create_connection", connect)
    sent(f"https://hooks.example.com/{CANARY}", allow_private=False)
    assert connected == [("93.184.215.14", 443)] and len(answers) == 1
    assert [record.message for record in caplog.records] == [
        "an alert could not be sent: ConnectionRefusedError: Connection refused"
    ]


def test_a_connection_that_ends_up_in_a_private_network_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Webhook() as hook:
        elsewhere = socket.create_connection(("127.0.0.1", hook.port))
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer("93.184.215.14"))
        monkeypatch.setattr(socket, "create_connection", lambda *_: elsewhere)
        sent(url_of(hook), allow_private=False)
    assert hook.received == [] and "private network" in caplog.text


@pytest.mark.parametrize("status", [301, 307, 404, 500])
def test_other_answers_are_one_line_and_redirects_are_not_followed(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Webhook(status) as hook:
        sent(url_of(hook), allow_private=True)
    (record,) = caplog.records
    assert f"answered {status}" in record.message and CANARY not in caplog.text
    assert len(hook.paths) == 1


def test_a_server_that_cannot_prove_its_name_gets_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Webhook() as hook:
        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", lambda _, *a, **k: real("127.0.0.1", *a, **k))
        sent(url_of(hook, f"{CANARY}.example.com"), allow_private=True)
        monkeypatch.setattr(socket, "getaddrinfo", real)
        monkeypatch.delenv("SSL_CERT_FILE")
        sent(url_of(hook), allow_private=True)
    assert hook.received == []
    assert [record.message for record in caplog.records] == [
        "an alert could not be sent: SSLCertVerificationError CERTIFICATE_VERIFY_FAILED"
    ] * 2


def test_a_name_that_does_not_resolve_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    sent(f"https://{CANARY}.example.com/", allow_private=False)
    assert len(caplog.records) == 1 and CANARY not in caplog.text


def test_a_webhook_that_never_answers_holds_nothing_up(caplog: pytest.LogCaptureFixture) -> None:
    answering = threading.Event()
    with Webhook(silent=answering) as hook:
        opened = Alerts(url_of(hook), allow_private=True)
        for number in range(20):
            opened.send(f"event {number}", "text")
        opened.close(timeout_s=0.01)
        answering.set()
        opened.close(timeout_s=30)  # so that nothing of it speaks in another test
    assert "may be lost" in caplog.text and "is left out" in caplog.text
    assert CANARY not in caplog.text


def test_the_same_event_is_told_once_an_hour() -> None:
    now = 0.0
    with Webhook() as hook, Alerts(url_of(hook), allow_private=True, clock=lambda: now) as opened:
        for now in (0.0, 1.0, REPEAT_AFTER_S - 1, REPEAT_AFTER_S + 1):
            opened.send("save failed", f"at {now:.0f}")
            opened.send(f"other at {now:.0f}", "text")
    assert [str(each["text"]) for each in hook.received if each["event"] == "save failed"] == ["at 0", "at 3601"]
    assert len(hook.received) == 6


def test_nothing_is_sent_through_a_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with Webhook() as hook:
        sent(url_of(hook), allow_private=True)
    assert len(hook.received) == 1
