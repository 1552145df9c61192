-- part item: where the line of this item stands.
--
-- Needs ITEM, STOCK (keys), `sku`, part sale. The script ends with GONE if either is missing.
-- Gives I (numbers; chain, drawn_key strings; drawn, paused, ready booleans), stock (units left).
local I = {}
do
  local v = redis.call('HMGET', ITEM, 'next_seq', 'served', 'early', 'chain', 'drawn', 'drawn_n', 'drawn_key', 'dead_seq',
    'paused')
  I.next_seq, I.served, I.early, I.chain = tonumber(v[1]), tonumber(v[2]), tonumber(v[3]), v[4]
  I.drawn, I.drawn_n, I.drawn_key = v[5] == '1', tonumber(v[6]), v[7]
  I.dead_seq, I.paused = tonumber(v[8]), v[9] == '1'
  I.ready = I.drawn or open and I.early == 0  -- ranks are known
end
local stock = tonumber(redis.call('HGET', STOCK, sku) or nil)
if not I.next_seq or not stock then
  return {'GONE'}
end
