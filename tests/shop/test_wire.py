"""A POST to somebody's address goes to the internet only, and over TLS only to who the certificate names."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from app.breaker import Result
from app.settings import Settings
from app.shop.push import verdict
from app.shop.wire import Address, Answered, NotAnswered, Refused, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "224.0.0.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "::", "::1", "fe80::1", "fc00::1",
        "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "2001:db8::1",
        "2001:0:a00:1::",
    ],
)  # fmt: skip
def test_an_address_that_is_not_of_the_internet(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_an_address_of_the_internet(address: str) -> None:
    assert is_public(address)


async def test_one_private_address_among_public_ones_is_enough_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that answers with both would get through by luck else."""

    async def both(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("1.1.1.1", "10.0.0.1")]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both, raising=False)
    address = Address("https://shop.example/", Settings())
    assert await address.post(b"{}", {}) == Refused("address_refused")
    await address.aclose()


@pytest.fixture
async def secure(tmp_path: Path) -> AsyncIterator[tuple[int, ssl.SSLContext]]:
    """A TLS server whose certificate names `localhost` and nobody else; its port, and who trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(pem + private)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(tmp_path / "both.pem")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=serving)
    yield server.sockets[0].getsockname()[1], ssl.create_default_context(cadata=pem.decode())
    server.close()


async def test_the_certificate_must_name_the_host_although_the_address_is_connected_to(
    secure: tuple[int, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, trusting = secure

    async def here(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", here, raising=False)
    settings = Settings(webhooks_allow_private=True)
    outcomes = {}
    for host in ("localhost", "other.example"):
        address = Address(f"https://{host}:{port}/", settings, trusting)
        outcomes[host] = await address.post(b"{}", {})
        await address.aclose()
    untrusted = Address(f"https://localhost:{port}/", settings)
    assert outcomes == {"localhost": Answered(204, None), "other.example": NotAnswered("no_connection")}
    assert await untrusted.post(b"{}", {}) == NotAnswered("no_connection")
    await untrusted.aclose()


async def test_an_unknown_name_counts_against_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nobody(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", nobody, raising=False)
    address = Address("https://nobody.example/", Settings())
    outcome = await address.post(b"{}", {})
    assert outcome == NotAnswered("name_unknown") and verdict(outcome)[0] is Result.FAILURE
    assert verdict(Refused("address_refused"))[0] is Result.IGNORED  # our own rule
    await address.aclose()


def test_an_address_is_built_with_its_port_path_and_query() -> None:
    address = Address("https://shop.example:8443/a/b?c=d", Settings())
    assert address._at("1.1.1.1") == "https://1.1.1.1:8443/a/b?c=d"
    assert Address("https://shop.example", Settings())._at("2606:4700::1") == "https://[2606:4700::1]/"
