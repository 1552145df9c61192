"""The verifier and the snippets of the README agree on the same deliveries: real, forged, bent, late."""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from app.shop import signature
from clients.python.fairdrop_webhooks import NotOurs, verify

ROOT = Path(__file__).parents[2]
NOW = 1_794_322_800
OLD, NEW, OTHER = (f"whsec_{b64encode(bytes([n]) * 32).decode()}" for n in (1, 2, 3))
BODY = '{"id": "evt-1", "data": {"title": "手机 ☂ \\n"}}'.encode()


class Vector(NamedTuple):
    name: str
    secrets: list[str]
    id: str
    timestamp: str
    signatures: str
    body: bytes
    ours: bool


def signed(*secrets: int, message_id: str = "evt-1", at: int = NOW, body: bytes = BODY) -> str:
    made = signature.headers([bytes([n]) * 32 for n in secrets], message_id, at, body)
    return made["webhook-signature"]


VECTORS = [
    Vector("plain", [OLD], "evt-1", str(NOW), signed(1), BODY, True),
    Vector("empty body", [OLD], "evt-1", str(NOW), signed(1, body=b"{}"), b"{}", True),
    Vector("rotating, receiver has the old", [OLD], "evt-1", str(NOW), signed(2, 1), BODY, True),
    Vector("rotating, receiver has the new", [NEW], "evt-1", str(NOW), signed(2, 1), BODY, True),
    Vector("rotating, receiver has both", [OLD, NEW], "evt-1", str(NOW), signed(2), BODY, True),
    Vector("an unknown version first", [OLD], "evt-1", str(NOW), "v1a,AAAA " + signed(1), BODY, True),
    Vector("299 s old", [OLD], "evt-1", str(NOW - 299), signed(1, at=NOW - 299), BODY, True),
    Vector("301 s old", [OLD], "evt-1", str(NOW - 301), signed(1, at=NOW - 301), BODY, False),
    Vector("301 s ahead", [OLD], "evt-1", str(NOW + 301), signed(1, at=NOW + 301), BODY, False),
    Vector("another secret", [OTHER], "evt-1", str(NOW), signed(1, 2), BODY, False),
    Vector("another id", [OLD], "evt-2", str(NOW), signed(1), BODY, False),
    Vector("another time", [OLD], "evt-1", str(NOW + 1), signed(1), BODY, False),
    Vector("another body", [OLD], "evt-1", str(NOW), signed(1), BODY + b" ", False),
    Vector("another version", [OLD], "evt-1", str(NOW), signed(1).replace("v1,", "v2,"), BODY, False),
    Vector("cut short", [OLD], "evt-1", str(NOW), signed(1)[:-5], BODY, False),
    Vector("no signature", [OLD], "evt-1", str(NOW), "", BODY, False),
    Vector("no secret", [], "evt-1", str(NOW), signed(1), BODY, False),
    Vector("no time", [OLD], "evt-1", "", signed(1), BODY, False),
    Vector("time with a sign", [OLD], "evt-1", f"+{NOW}", signed(1), BODY, False),
    Vector("time in other digits", [OLD], "evt-1", "١٧٩", signed(1), BODY, False),
]
EXPECTED = {one.name: one.ours for one in VECTORS}


def snippet(language: str) -> str:
    """The code that the README shows."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, language
    return str(found[0])


def lines() -> str:
    """The vectors for programs: one a line, fields by tabs, in Base64 where they may hold anything."""

    def coded(text: bytes) -> str:
        return b64encode(text).decode()

    return "".join(
        "\t".join(
            (
                coded(v.name.encode()),
                ",".join(v.secrets),
                v.id,
                coded(v.timestamp.encode()),
                v.signatures,
                coded(v.body),
            )
        )
        + "\n"
        for v in VECTORS
    )


def answers(command: list[str], folder: Path) -> dict[str, bool]:
    ran = subprocess.run(
        command,
        cwd=folder,
        input=lines(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return {
        name: word == "true" for name, _, word in (line.partition("\t") for line in ran.stdout.splitlines())
    }


def test_the_signature_is_that_of_the_specification() -> None:
    """The example of the Standard Webhooks specification's libraries."""
    key = b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    body = b'{"test": 2432232314}'
    assert signature.sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body) == (
        "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.name)
def test_the_python_client(vector: Vector) -> None:
    headers = {
        "Webhook-Id": vector.id,
        "Webhook-Timestamp": vector.timestamp,
        "Webhook-Signature": vector.signatures,
    }
    if vector.ours:
        assert isinstance(verify(vector.secrets, headers, vector.body, now_s=NOW), dict)
    else:
        with pytest.raises(NotOurs):
            verify(vector.secrets, headers, vector.body, now_s=NOW)


@pytest.mark.parametrize("missing", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_the_python_client_without_a_header(missing: str) -> None:
    headers = signature.headers([bytes([1]) * 32], "evt-1", NOW, BODY)
    del headers[missing]
    with pytest.raises(NotOurs):
        verify([OLD], headers, BODY, now_s=NOW)


def test_the_python_snippet() -> None:
    there: dict[str, Any] = {}
    exec(snippet("python"), there)
    assert {
        v.name: there["is_ours"](v.secrets, v.id, v.timestamp, v.signatures, v.body, NOW) for v in VECTORS
    } == EXPECTED


def test_the_javascript_snippet(tmp_path: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node on this machine")
    run = f"""
const text = require("node:fs").readFileSync(0, "utf8");
const decoded = (part) => Buffer.from(part, "base64");
for (const line of text.split("\\n").filter(Boolean)) {{
  const [name, secrets, id, timestamp, signatures, body] = line.split("\\t");
  const keys = secrets.split(",").filter(Boolean);
  const ours = isOurs(keys, id, decoded(timestamp).toString(), signatures, decoded(body), {NOW});
  process.stdout.write(decoded(name).toString() + "\\t" + ours + "\\n");
}}
"""
    (tmp_path / "verify.js").write_text(snippet("js") + run, encoding="utf-8")
    assert answers([node, "verify.js"], tmp_path) == EXPECTED


def test_the_java_snippet(tmp_path: Path) -> None:
    java = shutil.which("java")
    if java is None or shutil.which("javac") is None:
        pytest.skip("no Java compiler on this machine")
    run = f"""
public class Run {{
    public static void main(String[] none) throws Exception {{
        var in = new java.io.BufferedReader(new java.io.InputStreamReader(System.in, "UTF-8"));
        var out = new java.io.PrintStream(System.out, true, "UTF-8");
        var base64 = Base64.getDecoder();
        for (String line; (line = in.readLine()) != null; ) {{
            String[] part = line.split("\\t", -1);
            var secrets = part[1].isEmpty() ? List.<String>of() : List.of(part[1].split(","));
            String timestamp = new String(base64.decode(part[3]), "UTF-8");
            out.println(new String(base64.decode(part[0]), "UTF-8") + "\\t"
                + FairdropWebhooks.isOurs(secrets, part[2], timestamp, part[4], base64.decode(part[5]), {NOW}L));
        }}
    }}
}}
"""
    imports, _, rest = snippet("java").partition("class FairdropWebhooks")
    (tmp_path / "Run.java").write_text(imports + run + "class FairdropWebhooks" + rest, encoding="utf-8")
    assert answers([java, "Run.java"], tmp_path) == EXPECTED
