#!lua flags=allow-oom
-- units_release: give a ticket's units back once and, with standby, serve the next in line with them; or change nothing.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] stock    hash    sku -> units left
-- KEYS[4] outcome  string  one byte a ticket
-- KEYS[5] line     stream  waiting tickets
-- KEYS[6] orders   stream  claims on their way to Postgres
-- KEYS[7] status   hash    sku:seq -> version|byte|json
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] seq          integer >= 1
-- ARGV[6] units        integer >= 1
-- ARGV[7] version      of the order's row, above the one told so far
-- ARGV[8] to_byte      e expired, k cancelled, l left, f refunded
-- ARGV[9] status_json  what the buyer is told
-- ARGV[10] work_max    ranks served or passed by this call, 1..1000
-- ARGV[11] backlog_max claims waiting for Postgres before admission stops
--
-- Returns {'GONE'} | {'OLD'} | {'ALREADY', byte} | {'RELEASED', units_left, claimed_now}
-- Law: units enter `stock` only on the step out of claimed or reserved (or paid, when an operator takes it back), once for
--   each version. A closed sale keeps them in stock and serves nobody. Runs when memory is full: it gives back.
-- Cost: O(1), with standby O(work_max).
--@ part sale
--@ part admission
--@ part tokens
local ITEM, STOCK, OUTCOME, LINE, ORDERS, STATUS = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local sku, seq = ARGV[4], tonumber(ARGV[5])
--@ part item
--@ part ticket
--@ part status
--@ part draw
--@ part serve
local units, version = tonumber(ARGV[6]), tonumber(ARGV[7])
if not (byte == 'c' or byte == 'r' or byte == 'p' and ARGV[8] ~= 'e') or told_version >= version then
  return {'ALREADY', effective(byte)}
end
local P
if S.standby and open and I.ready and not closed and not paused and not I.paused then
  P = serve_plan(stock + units, I.drawn_n, I.drawn_key, tonumber(ARGV[10]), tonumber(ARGV[11]))
end
redis.call('SETRANGE', OUTCOME, seq - 1, ARGV[8])
redis.call('HSET', STATUS, status_field, ARGV[7] .. '|' .. ARGV[8] .. '|' .. ARGV[9])
redis.call('HDEL', STATUS, ask_field)
redis.call('HINCRBY', STOCK, sku, units)
if not P then
  return {'RELEASED', stock + units, 0}
end
serve_apply(P)
return {'RELEASED', P.stock, P.claimed}
