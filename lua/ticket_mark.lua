#!lua flags=allow-oom
-- ticket_mark: tell a winner what the order's row says now, unless something newer was told.
--
-- KEYS[1] sale     hash    the sale
-- KEYS[2] item     hash    where the line of this item stands
-- KEYS[3] outcome  string  one byte a ticket
-- KEYS[4] status   hash    sku:seq -> version|byte|json
-- ARGV[1] epoch        integer >= 1
-- ARGV[2] home         run_id the caller's connection saw
-- ARGV[3] now_ms       integer, 0 = server TIME
-- ARGV[4] sku
-- ARGV[5] seq          integer >= 1
-- ARGV[6] version      of the row, integer >= 1
-- ARGV[7] byte         r reserved, p paid, k cancelled without returning units, f refunded, or the byte it has (new text)
-- ARGV[8] status_json  what the buyer is told
-- ARGV[9] keep_ask     1: the ask under way stays shown
--
-- Returns {'GONE'} | {'OLD'} | {'MARKED'} | {'STALE', version_told} | {'ALREADY_RELEASED', byte} | {'NOT', byte}
-- Law: versions only grow; an ended ticket moves only to paid or refunded (late money), refunded to nothing; paid only to
--   refunded; a ticket that holds no unit and never did is not marked. Units never move here.
-- Cost: O(1).
--@ part sale
local ITEM, OUTCOME, STATUS = KEYS[2], KEYS[3], KEYS[4]
local sku, seq = ARGV[4], tonumber(ARGV[5])
--@ part ticket
--@ part status
local to = ARGV[7]
if byte == 'w' or byte == 's' or byte == 'x' or byte == 'o' then
  return {'NOT', effective(byte)}
end
if told_version >= tonumber(ARGV[6]) then
  return {'STALE', told_version}
end
if to ~= byte then
  local ended = byte == 'e' or byte == 'k' or byte == 'l' or byte == 'f'
  local late = to == 'p' or to == 'f'
  if byte == 'f' or ended and not late then
    return {'ALREADY_RELEASED', byte}
  end
  if byte == 'p' and to ~= 'f' or not late and to ~= 'r' and to ~= 'k' then
    return {'NOT', byte}
  end
  redis.call('SETRANGE', OUTCOME, seq - 1, to)
end
redis.call('HSET', STATUS, status_field, ARGV[6] .. '|' .. to .. '|' .. ARGV[8])
if ARGV[9] ~= '1' then
  redis.call('HDEL', STATUS, ask_field)
end
return {'MARKED'}
