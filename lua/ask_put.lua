#!lua
-- ask_put: hand a buyer's wish (leave, pay) to the worker, once while it is under way.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] outcome  string  one byte a ticket
-- KEYS[4] status   hash    sku:seq:a -> leave|ms or pay|ms|channel: the ask under way
-- KEYS[5] asks     stream  leave and payment requests
-- ARGV[1] epoch      integer >= 1
-- ARGV[2] home       run_id the caller's connection saw
-- ARGV[3] now_ms     integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] seq        integer >= 1
-- ARGV[6] buyer_id
-- ARGV[7] kind       leave | pay
-- ARGV[8] arg        pay: base64url JSON {channel, return_url, payer}; '-' if none
-- ARGV[9] channel    pay: shown while it starts; '-' if none
-- ARGV[10] repeat_ms an ask that is younger is under way; older ones may be put again
--
-- Returns {'GONE'} | {'OLD'} | {'ASKED'} | {'ALREADY', kind} | {'NOT', byte}
-- Law: leave needs a claimed or reserved ticket, pay a reserved one. Leaving hides a later wish to pay, not the reverse.
-- Cost: O(1).
--@ part sale
local ITEM, OUTCOME, STATUS = KEYS[2], KEYS[3], KEYS[4]
local sku, seq = ARGV[4], tonumber(ARGV[5])
local kind = ARGV[7]
--@ part ticket
if not (byte == 'r' or byte == 'c' and kind == 'leave') then
  return {'NOT', effective(byte)}
end
local field = sku .. ':' .. seq .. ':a'
local under_way = redis.call('HGET', STATUS, field)
if under_way then
  local what, since = string.match(under_way, '^(%a+)|(%d+)')
  if now - tonumber(since) < tonumber(ARGV[10]) and (what == kind or what == 'leave') then
    return {'ALREADY', what}
  end
end
local note = kind .. '|' .. now
if kind == 'pay' then
  note = note .. '|' .. ARGV[9]
end
redis.call('XADD', KEYS[5], '*', 'a',
  '1|' .. S.epoch .. '|' .. sku .. '|' .. seq .. '|' .. kind .. '|' .. ARGV[8] .. '|' .. now .. '|' .. ARGV[6])
redis.call('HSET', STATUS, field, note)
return {'ASKED'}
