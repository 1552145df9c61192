-- part item: where the line of this item stands.
--
-- Needs ITEM, STOCK (keys), `sku`, part sale. The script ends with GONE if either is missing.
-- Gives I (numbers; chain, drawn_key strings; drawn, paused, ready booleans), stock (units left).
local I
do
  local v = redis.call('HMGET', ITEM, 'next_seq', 'served', 'early', 'chain', 'drawn', 'drawn_n', 'drawn_key', 'dead_seq',
    'paused')
  local early, drawn = tonumber(v[3]), v[5] == '1'
  I = {next_seq = tonumber(v[1]), served = tonumber(v[2]), early = early, chain = v[4], drawn = drawn,
    drawn_n = tonumber(v[6]), drawn_key = v[7], dead_seq = tonumber(v[8]), paused = v[9] == '1',
    ready = drawn or open and early == 0}  -- ranks are known
end
local stock = tonumber(redis.call('HGET', STOCK, sku) or nil)
if not I.next_seq or not stock then
  return {'GONE'}
end
