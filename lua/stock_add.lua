#!lua
-- stock_add: add units to an item, or take unsold ones away, once for each top-up; new units serve a standby line at once.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands; add:<id> -> units, for each top-up applied
-- KEYS[3] stock    hash    sku -> units left
-- KEYS[4] outcome  string  one byte a ticket
-- KEYS[5] line     stream  waiting tickets
-- KEYS[6] orders   stream  claims on their way to Postgres
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] units        integer, negative takes away
-- ARGV[6] id           of the top-up
-- ARGV[7] work_max     ranks served or passed by this call, 1..1000
-- ARGV[8] backlog_max  claims waiting for Postgres before admission stops
--
-- Returns {'GONE'} | {'OLD'} | {'ADDED', units_left, claimed_now} | {'ALREADY', units_left} | {'SHORT', units_left}
-- Law: each top-up changes `stock` once; stock never goes below zero (SHORT: nothing was taken).
-- Cost: O(1), with standby O(work_max).
--@ part sale
--@ part admission
--@ part tokens
local ITEM, STOCK, OUTCOME, LINE, ORDERS = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local sku = ARGV[4]
--@ part item
--@ part draw
--@ part serve
local units, field = tonumber(ARGV[5]), 'add:' .. ARGV[6]
if redis.call('HEXISTS', ITEM, field) == 1 then
  return {'ALREADY', stock}
end
if stock + units < 0 then
  return {'SHORT', stock}
end
local P
if units > 0 and S.standby and open and I.ready and not closed and not paused and not I.paused then
  P = serve_plan(stock + units, I.drawn_n, I.drawn_key, tonumber(ARGV[7]), tonumber(ARGV[8]))
end
redis.call('HSET', ITEM, field, ARGV[5])
redis.call('HINCRBY', STOCK, sku, units)
if not P then
  return {'ADDED', stock + units, 0}
end
serve_apply(P)
return {'ADDED', P.stock, P.claimed}
