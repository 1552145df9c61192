#!lua
-- consumers_remove: take workers that are gone off a stream's group, none of whose entries is still pending.
--
-- KEYS[1] stream   stream   orders or asks of a sale
-- ARGV[1] group    consumer group
-- ARGV[2] idle_ms  integer >= 1: a consumer that has not asked for so long is gone
--
-- Returns {'GONE'} | {'REMOVED', count}
-- Law: XGROUP DELCONSUMER drops what is pending; so it is looked at and removed in one step, where nothing is. A worker
--   that was only slow becomes a consumer again by its next XREADGROUP.
-- Cost: O(consumers).
local function named(flat)
  local one = {}
  for at = 1, #flat, 2 do
    one[flat[at]] = flat[at + 1]
  end
  return one
end
local there = false
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, flat in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    there = there or named(flat).name == ARGV[1]
  end
end
if not there then
  return {'GONE'}
end
local removed = 0
for _, flat in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local one = named(flat)
  if one.pending == 0 and one.idle >= tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], one.name)
    removed = removed + 1
  end
end
return {'REMOVED', removed}
