"""Is it our generator that we measure? The same subjects by wrk, where wrk is on PATH, beside our own closed loop.

wrk looks at no answer but its status class; that a join was a claim is seen in Redis: as many entries as answers.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

from app.keys import SaleKeys
from loadtest.bench.door import JOINS_PER_S_MAX, Door, Sales, doors
from loadtest.bench.machine import cpu_s
from loadtest.bench.results import Found, Plan, Sheet, spread
from loadtest.bench.rounds import Course, Measure, Subject
from loadtest.bench.stack import Shopfront

SUBJECTS = ("r1", "join", "poll", "board")
CONNECTIONS = 256
ROUNDS_MAX = 3
SCRIPT = Path(__file__).with_name("wrk.lua")
REPEATED = 2_000  # requests in the file where they may be used again


async def section(shop: Shopfront, sales: Sales, plan: Plan) -> Found:
    wrk = shutil.which("wrk")
    sheet = Sheet(
        f"Ceilings by our generator and by wrk, {CONNECTIONS} connections",
        ["what", "ours per second", "wrk per second", "ours API µs", "wrk API µs", "ours µs a request",
         "wrk µs a request"],
    )  # fmt: skip
    if wrk is None:
        sheet.note = "wrk is not on PATH: every figure is of our own generator."
        return Found([], [sheet])
    sheet.note = "Where wrk reaches no more than our own generator, it was the server that was measured."
    rounds = min(plan.rounds, ROUNDS_MAX)
    void: list[str] = []
    async with doors(shop, sales, "uvicorn", 1) as door:
        subjects = [door.subject(key, plan.seconds) for key in SUBJECTS]
        theirs: dict[str, list[dict[str, float]]] = {key: [] for key in SUBJECTS}
        own = Measure(plan.seconds, shop.numbers, plan.say)
        courses: dict[str, Course] = {}
        for _ in range(rounds):
            for subject in subjects:
                taken = await own.interleaved([subject], [CONNECTIONS], 1)
                course = courses.setdefault(subject.key, taken[subject.key, CONNECTIONS])
                if course is not taken[subject.key, CONNECTIONS]:
                    course.rounds += taken[subject.key, CONNECTIONS].rounds
                    course.void = course.void or taken[subject.key, CONNECTIONS].void
                plan.say(f"wrk: {subject.name}")
                found = await _round(wrk, door, subject, plan.seconds, shop.folder / "requests")
                if isinstance(found, str):
                    void.append(f"wrk, {subject.name}: {found}")
                else:
                    theirs[subject.key].append(found)
    for subject in subjects:
        course, by_wrk = courses[subject.key], theirs[subject.key]
        if course.void is not None or not by_wrk:
            reason = course.void or next(one for one in void if subject.name in one)
            sheet.rows.append([subject.name, f"void: {reason}"])
            continue
        sheet.rows.append([
            subject.name, spread(course.values("per_s")), spread([one["per_s"] for one in by_wrk]),
            f"{course.median('api'):.1f}", f"{statistics.median(one['api_us'] for one in by_wrk):.1f}",
            f"{course.median('generator'):.1f}", f"{statistics.median(one['wrk_us'] for one in by_wrk):.1f}",
        ])  # fmt: skip
    return Found([], [sheet], {"ceilings, ours": list(courses.values())}, {"wrk": theirs}, void)


async def _round(
    wrk: str, door: Door, subject: Subject, seconds: float, file: Path
) -> dict[str, float] | str:
    """One run of wrk, or why it is void."""
    whole_s = math.ceil(seconds)
    if subject.before is not None:
        await subject.before()
    joins = subject.key == "join"
    if joins:
        door.sales.claims.prepare(whole_s * JOINS_PER_S_MAX)
    requests = list(subject.requests()) if joins else list(islice(subject.requests(), REPEATED))
    file.write_bytes(b"".join(one + b"\0" for one in requests))
    before = cpu_s(subject.pids["api"])
    process = await asyncio.create_subprocess_exec(
        wrk, "-t1", f"-c{CONNECTIONS}", f"-d{whole_s}s", "-s", str(SCRIPT), f"http://127.0.0.1:{subject.port}/",
        env=os.environ | {"FAIRDROP_REQUESTS": str(file)}, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    used = asyncio.create_task(_cpu_until_end(process))
    said, _ = await process.communicate()
    wrk_s = await used
    api_s = cpu_s(subject.pids["api"]) - before
    line = next((one for one in said.decode().splitlines() if one.startswith("{")), None)
    if process.returncode != 0 or line is None:
        return f"wrk ended with {process.returncode}: {said.decode()[-200:]}"
    told: dict[str, Any] = json.loads(line)
    wrong = {kind: told[kind] for kind in ("connect", "read", "write", "timeout", "status") if told[kind]}
    if wrong:
        return f"wrk saw errors: {wrong}"
    answers = told["answers"]
    if joins:
        claims = int(await door.shop.link.call("HGET", SaleKeys("claims").sale, "claims_open"))
        if told["used"] > len(requests) or not answers <= claims <= answers + CONNECTIONS:
            return f"{answers} answers, {claims} claims, {told['used']} of {len(requests)} requests used"
    if subject.after is not None:
        await subject.after()
    return {
        "per_s": answers / told["seconds"], "api_us": api_s / answers * 1e6, "wrk_us": wrk_s / answers * 1e6,
        "p50_ms": told["p50_ms"], "p99_ms": told["p99_ms"],
    }  # fmt: skip


async def _cpu_until_end(process: asyncio.subprocess.Process) -> float:
    """CPU of wrk, as last seen before it ended: /proc forgets it then."""
    last = 0.0
    while process.returncode is None:
        last = max(last, cpu_s([process.pid]))
        await asyncio.sleep(0.02)
    return last
