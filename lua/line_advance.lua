#!lua
-- line_advance: serve the next ranks of one line, as far as stock, rate, backlog and work allow.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] stock    hash    sku -> units left
-- KEYS[4] outcome  string  one byte a ticket
-- KEYS[5] line     stream  waiting tickets
-- KEYS[6] orders   stream  claims on their way to Postgres
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] work_max     ranks served or passed by this call, 1..1000
-- ARGV[6] backlog_max  claims waiting for Postgres before admission stops
--
-- Returns {'GONE'} | {'OLD'} | {'CLOSED'} | {'EARLY'} | {'PAUSED'} | {'WAIT_BEACON'} | {'BUSY'}
--   | {'SERVED', served, claimed_count, units_left, waiting}
-- Law: see part serve; the first call after the opening fixes the draw. Nothing to do writes nothing.
-- Cost: O(work_max).
--@ part sale
--@ part admission
--@ part tokens
local ITEM, STOCK, OUTCOME, LINE, ORDERS = KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local sku = ARGV[4]
--@ part item
--@ part draw
--@ part opening
--@ part serve
if closed then
  return {'CLOSED'}
end
if not open then
  return {'EARLY'}
end
if paused or I.paused then
  return {'PAUSED'}
end
local draw = draw_now()
if draw == false then
  return {'WAIT_BEACON'}
end
local fixed = draw or {n = I.drawn_n, key = I.drawn_key}
local P = serve_plan(stock, fixed.n, fixed.key, tonumber(ARGV[5]), tonumber(ARGV[6]))
if P.busy and not P.changed and not draw then
  return {'BUSY'}
end
if draw then
  draw_write(draw)
  P.changed = true
end
serve_apply(P)
return {'SERVED', P.served, P.claimed, P.stock, I.next_seq - 1 - P.served}
