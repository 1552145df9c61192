#!lua
-- beacon_put: store the public random value that completes the key of the draw, once, after the freeze.
--
-- KEYS[1] sale    hash    the sale
-- ARGV[1] epoch   integer >= 1
-- ARGV[2] home    run_id the caller's connection saw
-- ARGV[3] now_ms  integer, 0 = server TIME
-- ARGV[4] value   not empty
--
-- Returns {'GONE'} | {'OLD'} | {'PUT'} | {'ALREADY', value} | {'EARLY'}: before the freeze
-- Law: never before the freeze (who knows it could still choose whom to let join), never changed.
-- Cost: O(1).
--@ part sale
local v = redis.call('HMGET', KEYS[1], 'beacon_value', 'freeze_ms')
if v[1] and v[1] ~= '' then
  return {'ALREADY', v[1]}
end
if now < tonumber(v[2]) then
  return {'EARLY'}
end
redis.call('HSET', KEYS[1], 'beacon_value', ARGV[4])
return {'PUT'}
