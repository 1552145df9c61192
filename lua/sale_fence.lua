#!lua
-- sale_fence: shut a sale before it is rebuilt: from now on every other script answers OLD.
--
-- KEYS[1] sale   hash    the sale
-- ARGV[1] epoch  integer >= 1, of Postgres
--
-- Returns {'GONE'} | {'FENCED'} | {'OTHER', epoch}: Redis knows a later epoch than Postgres; nothing is changed
-- Law: only the home is taken away; no unit, ticket or entry moves. Nothing but a rebuild gives a home again.
-- Cost: O(1).
local epoch = redis.call('HGET', KEYS[1], 'epoch')
if not epoch then
  return {'GONE'}
end
if tonumber(epoch) > tonumber(ARGV[1]) then
  return {'OTHER', epoch}
end
redis.call('HSET', KEYS[1], 'home', '')
return {'FENCED'}
