#!lua
-- line_leave: give up a place in the line, or change nothing.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] outcome  string  one byte a ticket
-- KEYS[4] line     stream  waiting tickets
-- KEYS[5] left     list    seqs that left, for the front doors to follow
-- ARGV[1] epoch    integer >= 1
-- ARGV[2] home     run_id the caller's connection saw
-- ARGV[3] now_ms   integer, 0 = server TIME
-- ARGV[4] seq      integer >= 1
--
-- Returns {'GONE'} | {'OLD'} | {'LEFT'} | {'NOT_WAITING', byte}: claimed or reserved -> ask the worker; else it has ended
-- Law: waiting -> left, once. The rank stays as a hole that is passed without a token.
-- Cost: O(1).
--@ part sale
local ITEM, OUTCOME = KEYS[2], KEYS[3]
local seq = tonumber(ARGV[4])
--@ part ticket
local told = effective(byte)
if told ~= 'w' then
  return {'NOT_WAITING', told}
end
redis.call('SETRANGE', OUTCOME, seq - 1, 'l')
redis.call('XDEL', KEYS[4], string.format('%d-0', seq))
redis.call('RPUSH', KEYS[5], seq)
return {'LEFT'}
