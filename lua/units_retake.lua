#!lua
-- units_retake: take the units of an expired or cancelled ticket again for late money, once, if nobody waits for them.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] stock    hash    sku -> units left
-- KEYS[4] outcome  string  one byte a ticket
-- KEYS[5] line     stream  waiting tickets
-- KEYS[6] status   hash    sku:seq -> version|byte|json
-- ARGV[1] epoch    integer >= 1
-- ARGV[2] home     run_id the caller's connection saw
-- ARGV[3] now_ms   integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] seq      integer >= 1
-- ARGV[6] units    integer >= 1
-- ARGV[7] version  of the order's row as read; not below the one told so far
--
-- Returns {'GONE'} | {'OLD'} | {'TAKEN', units_left} | {'ALREADY', byte} | {'REFUSED', 'state' | 'waiting' | 'stock'}
-- Law: a unit leaves `stock` only on the step expired or cancelled -> claimed. The version is stored, so a repeat answers
--   ALREADY; a release of these units needs a higher one. No entry in `orders`: the row exists. The buyer is told what
--   was told before until ticket_mark says paid or refunded: nobody who heard `expired` hears `claimed`.
-- Cost: O(1).
--@ part sale
local ITEM, STOCK, OUTCOME, STATUS = KEYS[2], KEYS[3], KEYS[4], KEYS[6]
local sku, seq = ARGV[4], tonumber(ARGV[5])
--@ part item
--@ part ticket
--@ part status
local units, version = tonumber(ARGV[6]), tonumber(ARGV[7])
if (byte == 'c' or byte == 'r' or byte == 'p') and told_version >= version then
  return {'ALREADY', byte}
end
if not (byte == 'e' or byte == 'k') or told_version > version then
  return {'REFUSED', 'state'}
end
if redis.call('XLEN', KEYS[5]) > 0 then
  return {'REFUSED', 'waiting'}
end
if stock < units then
  return {'REFUSED', 'stock'}
end
redis.call('SETRANGE', OUTCOME, seq - 1, 'c')
redis.call('HSET', STATUS, status_field, ARGV[7] .. '|' .. byte .. '|' .. told_json)
redis.call('HINCRBY', STOCK, sku, -units)
return {'TAKEN', stock - units}
