"""The purchase without Redis: `UPDATE … WHERE stock >= n` and an INSERT in one transaction, asyncpg behind FastAPI.

It never oversells either. Every buyer waits for the one row that all of them change.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

CONNECTIONS = 16  # more only wait for the same row
STOCK = 1_000_000_000


class Purchase(BaseModel):
    sku: str
    units: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.pool = await asyncpg.create_pool(
        os.environ["FAIRDROP_DATABASE_URL"], min_size=CONNECTIONS, max_size=CONNECTIONS
    )
    async with app.state.pool.acquire() as conn:
        await conn.execute(
            "CREATE TABLE IF NOT EXISTS peer_item (sku text PRIMARY KEY, stock bigint NOT NULL CHECK (stock >= 0))"
        )
        await conn.execute(
            "CREATE TABLE IF NOT EXISTS peer_order (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,"
            " sku text NOT NULL, buyer_id text NOT NULL, units int NOT NULL, at timestamptz NOT NULL DEFAULT now(),"
            " UNIQUE (sku, buyer_id))"
        )
        await conn.execute("INSERT INTO peer_item VALUES ('PH-128', $1) ON CONFLICT DO NOTHING", STOCK)
    yield
    await app.state.pool.close()


app = FastAPI(openapi_url=None, lifespan=lifespan)


@app.post("/buy", status_code=202)
async def buy(body: Purchase, x_buyer_id: str = Header()) -> dict[str, int]:
    """Take the units and write the order, or refuse."""
    try:
        async with app.state.pool.acquire() as conn, conn.transaction():
            left = await conn.fetchval(
                "UPDATE peer_item SET stock = stock - $2 WHERE sku = $1 AND stock >= $2 RETURNING stock",
                body.sku, body.units,
            )  # fmt: skip
            if left is None:
                raise HTTPException(409, "sold out")
            await conn.execute(
                "INSERT INTO peer_order (sku, buyer_id, units) VALUES ($1, $2, $3)",
                body.sku,
                x_buyer_id,
                body.units,
            )
    except asyncpg.UniqueViolationError:
        raise HTTPException(409, "already bought") from None
    return {"left": left}
