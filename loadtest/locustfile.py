"""A crowd at the minute: buyers, refreshers and bots, released on a wall-clock barrier.

    locust -f loadtest/locustfile.py --headless -u 2000 -r 400 -t 2m --urls .fairdrop/urls.json --units 200

The first process makes a sale that opens `--opens-in-s` from now; everyone is spawned before and waits for that very
moment by the sale clock (LoadTestShape ticks once a second, which would smear the opening second). After the test the
verdict is printed; exit status 1 means that a promise was broken or an answer was outside the contract.
More processes: add `--processes 2`, or `--master`/`--worker` on several machines with synchronised clocks.
"""

# mypy: disable-error-code="untyped-decorator, union-attr, no-untyped-call, import-untyped"
# (Locust's hooks and gevent carry no strict types.)
from __future__ import annotations

import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import gevent.event
import gevent.pool
from locust import FastHttpUser, LoadTestShape, constant, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `locust -f` knows only this file's own folder

from app.record import Recorder, Run
from loadtest.office import Office, Sale, read_urls
from loadtest.verdict import Check, Told, judge, report, settled

RETRIES_MAX = 30  # of a join after 429 or 503; with Retry-After of a second this outlives a restart
BOT_TAPS = 10
OPERATIONS = {  # what a history calls them
    "POST pass": "pass",
    "POST tickets": "join",
    "POST tickets (bot)": "join",
    "GET ticket": "poll",
}
ENDED = frozenset({"paid", "sold_out", "closed", "left", "expired", "cancelled", "refunded", "lapsed"})


class Floor:
    """What the users of one load process share: the sale, and what they were told."""

    def __init__(self) -> None:
        self.sale: Sale | None = None
        self.known = gevent.event.Event()
        self.begun = 0
        self.ended = 0
        self.told: list[Told] = []  # of buyers who have gone home, not yet reported
        self.at_home: list[Told] = []  # all of them, on the judging process
        self.late_ms: list[float] = []  # how long after the barrier each join was sent
        self.clock_offset_s = 0.0
        self.office: Office | None = None
        self.record: Recorder | None = None  # of this process only: a history is not gathered from several

    def learn(self, sale: Sale) -> None:
        self.sale = sale
        self.known.set()

    @property
    def everyone_went_home(self) -> bool:
        return self.begun > 0 and self.ended == self.begun


FLOOR = Floor()


# --- people ----------------------------------------------------------------------------------------------------------


class Person(FastHttpUser):
    """Somebody with a phone. `abstract`: see the kinds below."""

    abstract = True
    wait_time = constant(0)
    network_timeout = 15.0
    connection_timeout = 15.0
    concurrency = BOT_TAPS

    def on_start(self) -> None:
        self.buyer_id = f"u{random.getrandbits(60):015x}"
        self.identity = {"X-Buyer-Id": self.buyer_id}
        if not FLOOR.known.wait(30):
            raise StopUser
        assert FLOOR.sale is not None
        self.sale = FLOOR.sale

    def seconds_to_opening(self) -> float:
        return self.sale.opens_s - (time.time() + FLOOR.clock_offset_s)

    def wait_for_opening(self) -> None:
        """The barrier: sleep to 50 ms before, then in small steps, so that all are let go in the same instant."""
        while (left := self.seconds_to_opening()) > 0:
            gevent.sleep(left - 0.05 if left > 0.05 else min(left, 0.002))

    def call(self, method: str, path: str, name: str, fine: tuple[int, ...], body: Any = None) -> Any:
        """One request as a client of the contract: 429 and 503 must carry Retry-After and are repeated."""
        record, op = FLOOR.record, OPERATIONS.get(name, "")
        hand = f"{self.buyer_id}#{id(gevent.getcurrent()):x}"  # a bot has several
        for _ in range(RETRIES_MAX):
            begun = (
                record.invoke(op, hand, self.buyer_id, sale=self.sale.id, sku=self.sale.sku, units=1)
                if record and op
                else None
            )
            with self.client.request(
                method, path, name=name, headers=self.identity, json=body, catch_response=True
            ) as answer:
                if record and begun:
                    if answer.status_code:
                        said = answer.json() if answer.content and answer.status_code < 500 else None
                        record.answered(begun, answer.status_code, said)
                    else:
                        record.end(begun, "unknown")
                if answer.status_code in fine:
                    answer.success()
                    return answer.json() if answer.content else None
                if answer.status_code in (429, 503) and answer.headers.get("Retry-After"):
                    answer.success()
                    wait_s = min(5.0, float(answer.headers["Retry-After"]))
                else:
                    answer.failure(f"{answer.status_code}: {(answer.text or '')[:200]}")
                    if answer.status_code:
                        raise StopUser
                    wait_s = 0.5
            gevent.sleep(wait_s * random.uniform(0.5, 1.5))
        raise StopUser


class Shopper(Person):
    """Gets a pass, joins early or at the minute, polls as told, pays or not."""

    weight = 90
    taps = 1

    @task
    def live(self) -> None:
        told = Told(self.buyer_id)
        FLOOR.begun += 1
        try:
            self._buy(told)
        finally:
            FLOOR.ended += 1
            FLOOR.told.append(told)
        raise StopUser

    def _buy(self, told: Told) -> None:
        sale = self.sale
        early = random.random() < 0.4 and self.seconds_to_opening() > sale.freeze_s + 1
        contact = {"contact": {"phone": f"+86139{random.randrange(10**8):08d}", "language": "zh"}}
        given = self.call("POST", f"/v1/sales/{sale.id}/pass", "POST pass", (201,), contact)
        self.identity = {"Authorization": f"Pass {given['pass']}"}
        if early:
            gevent.sleep(random.uniform(0, max(0.0, self.seconds_to_opening() - sale.freeze_s - 0.5)))
        else:
            self.wait_for_opening()
            FLOOR.late_ms.append(-self.seconds_to_opening() * 1000)
        document = self._join(told)
        pays = random.random() < 0.85
        while document["ticket"] is not None and document["state"] not in ENDED:
            gevent.sleep((document["poll_after_ms"] or 1000) / 1000)
            document = self.call("GET", f"/v1/tickets/{document['ticket']}", "GET ticket", (200,))
            told.note(document)
            payment = document["payment"]
            if (
                pays
                and document["state"] == "reserved"
                and payment
                and payment["state"] == "ready"
                and payment["url"]
            ):
                gevent.sleep(random.expovariate(2.0))
                with self.client.post(
                    payment["url"] + "/pay", name="pay (sandbox)", catch_response=True
                ) as answer:
                    answer.success()  # the supplier is no part of what is judged here

    def _join(self, told: Told) -> Any:
        body = {"sku": self.sale.sku, "units": 1}
        path = f"/v1/sales/{self.sale.id}/tickets"
        if self.taps == 1:
            document = self.call("POST", path, "POST tickets", (200, 202), body)
            told.note(document)
            return document
        pool = gevent.pool.Pool(self.taps)
        taps = [
            pool.spawn(self.call, "POST", path, "POST tickets (bot)", (200, 202), body)
            for _ in range(self.taps)
        ]
        gevent.joinall(taps)
        documents = [tap.value for tap in taps if isinstance(tap.value, dict)]
        for document in documents:
            if document["ticket"] is not None:
                told.tickets.add(document["ticket_id"])
        if not documents:
            raise StopUser
        told.note(documents[-1])
        return documents[-1]


class Bot(Shopper):
    """A buyer with a script: ten taps at once, one ticket."""

    weight = 5
    taps = BOT_TAPS


class Refresher(Person):
    """Somebody who only looks: sale page and board, over and over, and a ticket that is not theirs."""

    weight = 5

    @task
    def look(self) -> None:
        sale = self.sale
        etag = ""
        while not FLOOR.everyone_went_home:
            headers = {"If-None-Match": etag} if etag else {}
            path = f"/v1/sales/{sale.id}/board"
            with self.client.get(path, name="GET board", headers=headers, catch_response=True) as answer:
                if answer.status_code in (200, 304):
                    answer.success()
                    etag = answer.headers.get("ETag") or etag
                elif answer.status_code != 503:
                    answer.failure(f"{answer.status_code}")
            self.call("GET", f"/v1/sales/{sale.id}", "GET sale", (200,))
            self.call("GET", "/v1/tickets/" + "x" * 60, "GET forged ticket", (404,))
            gevent.sleep(random.uniform(0.5, 1.5))
        raise StopUser


# --- the shape and the hands behind it -------------------------------------------------------------------------------


class Peak(LoadTestShape):
    """Everyone is there before the minute; the barrier, not the shape, makes the peak. Ends when all have gone home."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        if FLOOR.everyone_went_home and self.get_run_time() > options.opens_in_s:
            return None
        if options.run_time and self.get_run_time() > float(options.run_time):
            return None
        return int(options.num_users or 500), float(options.spawn_rate or 200)


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument(
        "--urls",
        type=Path,
        env_var="LOAD_URLS",
        default=Path(".fairdrop/urls.json"),
        help="urls.json of `fairdrop up`",
    )
    parser.add_argument("--units", type=int, env_var="LOAD_UNITS", default=100, help="units on sale")
    parser.add_argument(
        "--opens-in-s",
        type=float,
        env_var="LOAD_OPENS_IN_S",
        default=10.0,
        help="seconds to the opening; spawn everyone before",
    )
    parser.add_argument(
        "--open-for-s",
        type=float,
        env_var="LOAD_OPEN_FOR_S",
        default=20.0,
        help="seconds until the sale is closed",
    )
    parser.add_argument(
        "--pay-within-s",
        type=int,
        env_var="LOAD_PAY_WITHIN_S",
        default=60,
        help="seconds to pay; below 60 in development only",
    )


@events.init_command_line_parser.add_listener
def add_history(parser: Any) -> None:
    parser.add_argument(
        "--history", type=Path, help="write what every buyer asked and was told here (one load process only)"
    )


@events.init.add_listener
def set_up(environment: Environment, **_: Any) -> None:
    urls = read_urls(environment.parsed_options.urls)
    environment.host = environment.host or urls["front"]
    for kind in (Shopper, Bot, Refresher):
        kind.host = environment.host
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.register_message(
            "sale", lambda environment, msg, **_: FLOOR.learn(Sale(**msg.data))
        )
    else:
        FLOOR.office = Office(urls["office"], urls["operator_key"])


@events.test_start.add_listener
def hold_sale(environment: Environment, **_: Any) -> None:
    if isinstance(environment.runner, WorkerRunner) or FLOOR.office is None:
        return
    options = environment.parsed_options
    sale = FLOOR.office.hold_sale(
        units=options.units, opens_in_s=options.opens_in_s, pay_within_s=options.pay_within_s
    )
    print(f"sale {sale.id}: {sale.units} units, opens in {options.opens_in_s:.0f} s")
    if isinstance(environment.runner, MasterRunner):
        environment.runner.send_message("sale", asdict(sale))
    elif options.history is not None:
        FLOOR.record = Recorder(options.history)
        FLOOR.record.add(Run(at=FLOOR.record.clock(), by="locust", sale=sale.id))
    FLOOR.learn(sale)
    gevent.spawn(close_later, FLOOR.office, sale, options.open_for_s)


def close_later(office: Office, sale: Sale, open_for_s: float) -> None:
    """Close the sale once it has run its time, or every unit is paid: whoever still waits is told at the next poll."""
    gevent.sleep(max(0.0, sale.opens_s - time.time()))
    closes = time.time() + open_for_s
    while time.time() < closes:
        gevent.sleep(1.0)
        if sum(order["state"] == "paid" for order in office.orders(sale.id)) >= sale.units:
            break
    office.close(sale.id)


@events.report_to_master.add_listener
def send_memories(client_id: str, data: dict[str, Any]) -> None:
    data["told"] = [told.row() for told in FLOOR.told]
    FLOOR.told.clear()


@events.worker_report.add_listener
def gather_memories(client_id: str, data: dict[str, Any]) -> None:
    FLOOR.at_home += [Told.of(row) for row in data.get("told", [])]


@events.quitting.add_listener
def pronounce(environment: Environment, **_: Any) -> None:
    """The verdict, on the process that made the sale."""
    if isinstance(environment.runner, WorkerRunner) or FLOOR.sale is None or FLOOR.office is None:
        return
    FLOOR.at_home += FLOOR.told
    if FLOOR.record is not None:
        FLOOR.record.close()
    if FLOOR.late_ms:
        late = sorted(FLOOR.late_ms)
        p50, p99 = late[len(late) // 2], late[int(len(late) * 0.99)]
        print(f"barrier: {len(late)} buyers released, p50 {p50:.1f} ms, p99 {p99:.1f} ms late")
    orders, audit = settled(FLOOR.office, FLOOR.sale.id)
    outside = environment.stats.total.num_failures
    checks = judge(FLOOR.at_home, orders, audit, FLOOR.sale.units)
    checks.append(Check("every answer was one that the contract has", outside == 0, outside, 0))
    print(f"{len(FLOOR.at_home)} buyers went home, {len(orders)} orders")
    if not report(checks):
        environment.process_exit_code = 1
