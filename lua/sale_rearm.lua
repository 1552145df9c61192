#!lua flags=allow-oom
-- sale_rearm: accept a Redis that restarted from its own log as the sale's home again, or change nothing.
--
-- KEYS[1] sale            hash    the sale
-- ARGV[1] epoch           integer >= 1
-- ARGV[2] old_home        run_id before the restart
-- ARGV[3] new_home        run_id now
-- ARGV[4] pulse_at_least  Postgres' pulse
--
-- Returns {'GONE'} | {'OLD'} other epoch | {'ARMED'} | {'BEHIND', pulse} | {'NOT', home}
-- Law: only from old_home, only if nothing that Postgres saw is missing. The caller has checked that it was not promoted.
--   No fence on home: it changes here. Runs when memory is full: or a full disk would keep the sale shut.
-- Cost: O(1).
local v = redis.call('HMGET', KEYS[1], 'epoch', 'home', 'pulse')
if not v[1] then
  return {'GONE'}
end
if v[1] ~= ARGV[1] then
  return {'OLD'}
end
if v[2] == ARGV[3] then
  return {'ARMED'}
end
if v[2] ~= ARGV[2] then
  return {'NOT', v[2]}
end
local pulse = tonumber(v[3] or 0)
if pulse < tonumber(ARGV[4]) then
  return {'BEHIND', pulse}
end
redis.call('HSET', KEYS[1], 'home', ARGV[3])
return {'ARMED'}
