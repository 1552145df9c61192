"""Chromium, asked over its pipe (DevTools protocol): a page at a size and in a language. Needs no driver."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ANSWERS_WITHIN_S = 60.0  # one command; on an idle machine some ms
MESSAGE_MAX_BYTES = 2**24
# Chromium reads commands from descriptor 3 and writes to 4.
LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip


def find_chromium() -> str | None:
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    async def call(self, method: str, **params: Any) -> Any:
        return await self._browser.call(method, self._session, **params)

    async def js(self, expression: str) -> Any:
        """The value of an expression; None while the page is on its way to another address."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return told["result"].get("value")

    async def text(self) -> str:
        return str(await self.js("document.body ? document.body.innerText : ''"))

    async def taps(self, selector: str) -> None:
        assert await self.js(
            f"(e => e && !e.disabled && !e.hidden && (e.click(), true))(document.querySelector('{selector}'))"
        )

    async def sees(self, selector: str) -> bool:
        """Whether it is there and can be tapped."""
        return bool(
            await self.js(f"(e => !!e && !e.hidden && !e.disabled)(document.querySelector('{selector}'))")
        )

    async def offline(self, on: bool) -> None:
        await self.call(
            "Network.emulateNetworkConditions",
            offline=on,
            latency=0,
            downloadThroughput=-1,
            uploadThroughput=-1,
        )


class Browser:
    """`async with Browser(path, folder) as browser`. OSError or TimeoutError: it does not start here."""

    def __init__(self, chromium: str, folder: Path) -> None:
        self._command = [chromium, *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
        self._number = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}

    async def __aenter__(self) -> Browser:
        theirs_in, self._out = os.pipe()
        ours_in, theirs_out = os.pipe()
        passed = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        os.close(theirs_in)
        os.close(theirs_out)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LAUNCH, *map(str, passed), *self._command,
            pass_fds=passed, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        for end in passed:
            os.close(end)
        reader = asyncio.StreamReader(limit=MESSAGE_MAX_BYTES)
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours_in, "rb")
        )
        self._reading = asyncio.create_task(self._read(reader))
        try:
            await self.call("Browser.getVersion")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await self._reading
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        self._transport.close()
        os.close(self._out)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = json.loads((await reader.readuntil(b"\0"))[:-1])
                waiting = self._waiting.pop(message.get("id", 0), None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(OSError("the browser has ended"))

    async def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | (
            {"sessionId": session} if session else {}
        )
        told = self._waiting[number] = asyncio.get_running_loop().create_future()
        os.write(self._out, json.dumps(message).encode() + b"\0")
        async with asyncio.timeout(ANSWERS_WITHIN_S):
            answer = await told
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    async def page(self, url: str, *, width: int, height: int, language: str) -> Page:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        page = Page(self, attached["sessionId"])
        for domain in ("Runtime", "Page", "Network"):
            await page.call(f"{domain}.enable")
        await page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        await page.call("Network.setUserAgentOverride", userAgent="story", acceptLanguage=language)
        await page.call("Page.navigate", url=url)
        return page
