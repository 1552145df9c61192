"""The naive purchase: a FastAPI route with a model, and one EVALSHA through redis-py for each buyer.

What many tutorials end with: stock, one order a buyer and a queue entry in one script. It has no line, no draw, no
passes, no payment and no way back for a unit; it is here to say what the rest of the design costs or saves.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis.asyncio as redis
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel

CONNECTIONS = 256  # of the pool; buyers beyond them wait for one
STOCK = 1_000_000_000

BUY = """
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1 then return -1 end
local left = tonumber(redis.call('GET', KEYS[1]) or 0)
if left < tonumber(ARGV[2]) then return -2 end
redis.call('DECRBY', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('XADD', KEYS[3], '*', 'buyer', ARGV[1], 'units', ARGV[2])
return left - tonumber(ARGV[2])
"""


class Purchase(BaseModel):
    sku: str
    units: int


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    pool = redis.BlockingConnectionPool.from_url(
        os.environ["FAIRDROP_REDIS_URL"], max_connections=CONNECTIONS
    )
    client = redis.Redis(connection_pool=pool)
    await client.set("naive:stock", STOCK)
    app.state.buy = client.register_script(BUY)
    yield
    await client.aclose()
    await pool.aclose()


app = FastAPI(openapi_url=None, lifespan=lifespan)


@app.post("/buy", status_code=202)
async def buy(body: Purchase, x_buyer_id: str = Header()) -> dict[str, int]:
    """Take the units, or refuse."""
    left = await app.state.buy(
        keys=["naive:stock", "naive:buyers", "naive:orders"], args=[x_buyer_id, body.units]
    )
    if left < 0:
        raise HTTPException(409, "already bought" if left == -1 else "sold out")
    return {"left": left}
