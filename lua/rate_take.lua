#!lua
-- rate_take: let `who` do something at most so often (GCRA), with one small key that expires by itself.
--
-- KEYS[1] rate       string  the theoretical arrival time, ms
-- ARGV[1] now_ms     integer, 0 = server TIME
-- ARGV[2] period_ms  integer >= 1: one more is allowed each period
-- ARGV[3] burst      integer >= 1: so many at once after a pause
-- ARGV[4] cost       integer >= 1: how many this is
--
-- Returns {'TAKEN', left} | {'WAIT', ms}
-- Law: never more than burst + elapsed / period_ms; a refusal writes nothing.
-- Cost: O(1).
local now = tonumber(ARGV[1])
if now == 0 then
  local t = redis.call('TIME')
  now = t[1] * 1000 + math.floor(t[2] / 1000)
end
local period, burst = tonumber(ARGV[2]), tonumber(ARGV[3])
local arrival = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local after = arrival + tonumber(ARGV[4]) * period
local wait = after - burst * period - now
if wait > 0 then
  return {'WAIT', wait}
end
redis.call('SET', KEYS[1], string.format('%d', after), 'PX', string.format('%d', after - now))
return {'TAKEN', math.floor(-wait / period)}
