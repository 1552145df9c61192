#!lua
-- item_switch: stop or start the admission of one item (Postgres refused an order for lack of stock; an operator looked).
--
-- KEYS[1] sale    hash    the sale
-- KEYS[2] item    hash    where the line of this item stands
-- ARGV[1] epoch   integer >= 1
-- ARGV[2] home    run_id the caller's connection saw
-- ARGV[3] now_ms  integer, 0 = server TIME
-- ARGV[4] paused  1 | 0
--
-- Returns {'GONE'} | {'OLD'} | {'SWITCHED'} | {'ALREADY'}
-- Law: joining goes on, nobody is served while paused.
-- Cost: O(1).
--@ part sale
local is = redis.call('HGET', KEYS[2], 'paused')
if not is then
  return {'GONE'}
end
if is == ARGV[4] then
  return {'ALREADY'}
end
redis.call('HSET', KEYS[2], 'paused', ARGV[4])
return {'SWITCHED'}
