-- part ticket: the byte of one ticket as the buyer is told it.
--
-- Needs ITEM, OUTCOME (keys), `seq`, part sale. Gives byte (stored; 'o' if this seq was never given out) and
-- effective(byte): a waiting ticket that everyone passed is sold out ('s'), one of a closed sale is closed ('x').
local byte = redis.call('GETRANGE', OUTCOME, seq - 1, seq - 1)
if byte == '' or byte == '\0' then
  byte = 'o'
end
local function effective(stored)
  if stored ~= 'w' then
    return stored
  end
  if seq <= tonumber(redis.call('HGET', ITEM, 'dead_seq') or 0) then
    return 's'
  end
  return closed and 'x' or 'w'
end
