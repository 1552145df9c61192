#!lua flags=allow-oom
-- sale_pulse: write the pulse; Postgres gets it afterwards, so a Redis that is behind Postgres' pulse has lost writes.
--
-- KEYS[1] sale    hash    the sale
-- ARGV[1] epoch   integer >= 1
-- ARGV[2] home    run_id the caller's connection saw
-- ARGV[3] now_ms  integer, 0 = server TIME
-- ARGV[4] pulse   integer
--
-- Returns {'GONE'} | {'OLD'} | {'PULSED', pulse}
-- Law: the pulse only grows. Runs when memory is full: a Redis that loses writes then is found out, too.
-- Cost: O(1).
--@ part sale
local pulse = math.max(tonumber(ARGV[4]), tonumber(redis.call('HGET', KEYS[1], 'pulse') or 0))
redis.call('HSET', KEYS[1], 'pulse', pulse)
return {'PULSED', pulse}
