"""The front door's metrics. Hot routes count in plain integers; once a second the difference goes to Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from app.purchase.accept import LATENCY_BUCKETS_MS, Door

EVERY_TICKS = 10  # of the snapshot: about once a second

ANSWERS = Counter("fairdrop_front_answers", "Answers of the front door", ["route", "outcome"])
# Cumulative, with `le`, so that histogram_quantile() works on it; a Histogram would cost 1 µs on each join.
JOINS_WITHIN = Counter(
    "fairdrop_front_joins_within_seconds", "Joins that Redis had accepted within `le`", ["le"]
)
JOIN_SECONDS = Counter("fairdrop_front_join_seconds_sum", "Seconds that joins have waited for Redis, summed")
BATCHES = Counter("fairdrop_front_join_batches", "line_join calls")
BATCHED = Counter("fairdrop_front_join_batched", "Buyers in those calls; divided by calls: the mean batch")
READS = Counter("fairdrop_front_ticket_reads", "Tickets read from Redis because their turn was near or past")
READ_BATCHES = Counter("fairdrop_front_ticket_read_batches", "Pipelines that read tickets")
SNAPSHOT_AGE = Gauge(
    "fairdrop_front_snapshot_age_seconds", "Age of the newest look at Redis", multiprocess_mode="livemax"
)
STREAMS = Gauge("fairdrop_front_streams", "Open event streams", multiprocess_mode="livesum")
REDIS_UP = Gauge("fairdrop_front_redis_up", "1 while the link to Redis stands", multiprocess_mode="livemin")


class Counts:
    """Carries a door's integers to Prometheus; called after each look at Redis."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._tick = 0
        self._answers: dict[tuple[str, str], int] = {}
        self._within = [0] * len(door.join_ms)
        self._numbers = [0.0] * 5

    def __call__(self) -> None:
        self._tick += 1
        if self._tick % EVERY_TICKS == 0:
            self.flush()

    def flush(self) -> None:
        door = self._door
        for key, count in list(door.counts.items()):
            before = self._answers.get(key, 0)
            if count != before:
                ANSWERS.labels(*key).inc(count - before)
                self._answers[key] = count
        total = 0
        for at, count in enumerate(door.join_ms):
            total += count
            if total != self._within[at]:
                le = str(LATENCY_BUCKETS_MS[at] / 1000) if at < len(LATENCY_BUCKETS_MS) else "+Inf"
                JOINS_WITHIN.labels(le).inc(total - self._within[at])
                self._within[at] = total
        now = [
            door.join_ms_sum / 1000,
            float(door.claims.batches),
            float(door.claims.joined),
            float(door.tracker.read_count),
            float(door.tracker.read_batches),
        ]
        counters = (JOIN_SECONDS, BATCHES, BATCHED, READS, READ_BATCHES)
        for counter, value, before_value in zip(counters, now, self._numbers, strict=True):
            counter.inc(value - before_value)
        self._numbers = now
        SNAPSHOT_AGE.set(min(door.snapshots.age_s, 1e6))
        STREAMS.set(door.streams.open)
        REDIS_UP.set(1 if door.link.connected else 0)
